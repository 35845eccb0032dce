"""The table of diagnostics: which runs count as bad, and an error for an unknown kind."""

from __future__ import annotations

import pytest
import torch

import invflow
from benchmarks.tables.diagnostics_table import KINDS, judge_runs, main
from invflow.posterior import Posterior


def test_runs_are_judged_by_mean_deviation_and_evidence() -> None:
    case = next(iter(KINDS["fmtt"]()))
    values = case.mean + case.std * torch.randn(4, 4000, generator=torch.Generator().manual_seed(0))
    values[1] += 0.8 * case.std
    values[2] = case.mean + 0.5 * (values[2] - case.mean)
    evidence = torch.full((4,), case.log_evidence)
    evidence[3] -= 2
    posterior = Posterior(torch.stack([values, values], dim=2), log_evidence=evidence,
                          diagnostics={"converged": torch.tensor([True, False, True, True])})
    bad, alarm = judge_runs(case, posterior)
    assert bad.tolist() == [False, True, True, True]
    assert alarm.tolist() == [False, True, False, False]


def test_a_kind_that_is_not_known_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["fmttt"])
    assert "choose from fmtt, fmtt-further, noise-smc, noise-smc-further, noise-rto" in capsys.readouterr().err
    assert isinstance(next(iter(KINDS["noise-rto"]())).solver, invflow.NoiseRTO)
