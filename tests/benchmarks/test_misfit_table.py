"""The table of residuals: each mistake is a real one, and warnings are counted over observations."""

from __future__ import annotations

import pytest
import torch

import invflow
from benchmarks.tables.misfit_table import mistaken, untrained, warned_of


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_alarms_are_counted_over_observations() -> None:
    problem = invflow.load_problem("mnist/box-inpainting")
    generator = torch.Generator().manual_seed(0)
    _, likelihood = problem.simulate(3, generator=generator)
    given = dict(mistaken(likelihood))  # type: ignore[arg-type]
    assert list(given) == ["right", "sigma x 10", "sigma / 10", "wrong operator"]
    shown, hidden = likelihood.operator.observed(), given["wrong operator"].operator.observed()
    assert bool((shown ^ hidden).all())
    solver = invflow.VFM.load("mnist")
    assert warned_of(solver, given["right"], 16, 0) == 0
    assert warned_of(solver, given["sigma x 10"], 16, 0) == 3
    # sigma / 10 lies inside the range of the training, which starts at 0
    assert [untrained(solver, given[name], 0) for name in given] == [0, 3, 0, 3]
