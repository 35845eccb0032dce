"""Diagnostics of tilting: thermodynamic length and total discrepancy against closed forms."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tilting_models import Gaussian, Tilt
from torch import Tensor

from invflow import FMTT
from invflow.solvers.tilting.particles import FMTTState
from invflow.solvers.tilting.record import PathRecord

F64 = torch.float64


class Line(Gaussian):
    state_shape = image_shape = (1,)


def tilt(fn: Any, **settings: Any) -> dict[str, Any]:
    solver = FMTT(Line(), weights="jarzynski", resample_threshold=0.0, chunk_size=10**6, **settings)
    return solver.sample(Tilt(fn, 8), 1000, generator=torch.Generator().manual_seed(0)).diagnostics


def near(found: Tensor, exact: float, share: float) -> bool:
    """Whether the mean over replicates is within four standard errors, and a share for the error of the steps."""
    return abs(float(found.mean()) - exact) < share * exact + 4 * float(found.std()) / len(found) ** 0.5


@pytest.mark.parametrize("schedule", ["linear", lambda t: t**2])
def test_a_linear_reward_has_the_fisher_rao_length_of_a_shift(schedule: Any) -> None:
    """N(0, 1) tilted by b x becomes N(b, 1), at a distance of b, however the way is divided."""
    slope, steps = 1.5, 50
    found = tilt(lambda x: slope * x[:, 0], steps=steps, schedule=schedule)
    assert near(found["thermodynamic_length"], slope, 0.02)
    gains = torch.tensor([t if schedule == "linear" else t**2 for t in torch.linspace(0, 1, steps + 1).tolist()])
    # a step from g to g' has the Renyi divergence of order two of two unit Gaussians, slope^2 (g' - g)^2
    assert near(found["total_discrepancy"], slope**2 * float(gains.diff().square().sum()), 0.04)


def test_a_quadratic_reward_has_the_fisher_rao_length_of_a_contraction() -> None:
    """N(0, 1) tilted by -c x^2 / 2 becomes N(0, 1 / (1 + c)), at a distance of log(1 + c) / sqrt(2)."""
    found = tilt(lambda x: -1.5 * x[:, 0] ** 2, steps=100)
    assert near(found["thermodynamic_length"], math.log(4) / math.sqrt(2), 0.03)


def test_the_length_does_not_depend_on_the_steps_and_the_discrepancy_falls_with_them() -> None:
    few, many = (tilt(lambda x: 1.5 * x[:, 0], steps=steps) for steps in (20, 80))
    assert near(many["thermodynamic_length"], float(few["thermodynamic_length"].mean()), 0.04)
    assert float(few["total_discrepancy"].mean() / many["total_discrepancy"].mean()) == pytest.approx(4, rel=0.1)


def test_a_constant_reward_costs_nothing() -> None:
    found = tilt(lambda x: torch.ones(len(x)), steps=5)
    assert (found["total_discrepancy"] < 1e-9).all()
    assert found["discrepancy_path"].shape == (8, 6)


def state(before: list[float], after: list[float], step: int = 1) -> FMTTState:
    low, high = (torch.tensor([w], dtype=F64) for w in (before, after))
    none = torch.zeros(1, dtype=torch.bool)
    ancestors = torch.arange(len(before))[None]
    return FMTTState(step, 0.1 * step, high[..., None], high, high - low, high, ancestors, high[:, 0], none, none,
                     torch.zeros_like(high, dtype=torch.bool))


def test_discrepancy_is_the_log_of_n_over_the_conditional_effective_sample_size() -> None:
    record = PathRecord()
    record.add(state([0.0, 0.0], [0.0, math.log(3)], 0), 0)  # log(E w^2 / (E w)^2) = log((1/2 + 9/2) / (1/2 + 3/2)^2)
    # weights 1/4 and 3/4, increments 2 and 1: log(E w^2 / (E w)^2) = log((1/4 4 + 3/4) / (1/4 2 + 3/4)^2)
    record.add(state([0.0, math.log(3)], [math.log(2), math.log(3)]), 7)
    with pytest.warns(UserWarning, match="solver has not converged"):
        found = record.finish(state([0.0, 0.0], [0.0, -9.0], 2), "solver")
    expected = math.log(1.75 / 1.25**2)
    start = math.log(1.25)
    torch.testing.assert_close(found["discrepancy_path"], torch.tensor([[start, expected]], dtype=F64))
    length = start**0.5 + expected**0.5
    torch.testing.assert_close(found["thermodynamic_length"], torch.tensor([length], dtype=F64))
    assert found["calls_path"] == [0, 7]


def test_lost_particles_count_as_a_loss() -> None:
    record = PathRecord()
    record.add(state([0.0] * 4, [0.0] * 4, 0))
    record.add(state([0.0] * 4, [0.0, -math.inf, -math.inf, 0.0]))
    assert float(record.columns["gap"][1]) == pytest.approx(math.log(2))
    record.add(state([0.0, -math.inf, -math.inf, 0.0], [0.0, -math.inf, -math.inf, 0.0], 2))
    assert float(record.columns["gap"][2]) == pytest.approx(0.0, abs=1e-12)


def test_calls_stand_beside_the_rewards() -> None:
    reward = Tilt(lambda x: -x.square().sum(1), 2)
    solver = FMTT(Gaussian(), steps=5)
    found = solver.sample(reward, 12, generator=torch.Generator().manual_seed(0))
    assert len(found.diagnostics["calls_path"]) == found.diagnostics["reward_path"].shape[1] == 6
    assert found.diagnostics["calls_path"][-1] == found.nfe.forward + found.nfe.backward
    assert found.diagnostics["calls_path"] == sorted(found.diagnostics["calls_path"])
