"""The table of diagnostics: which runs count as bad, and an error for an unknown kind."""

from __future__ import annotations

import pytest
import torch

import invflow
from benchmarks.tables.diagnostics_checks import checks_of
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


# per kind, cases with good and with bad verdicts
CASES = [("fmtt", range(1, 12, 2)), ("noise-smc", (2, 8, 10, 14)), ("noise-rto", (8, 9, 12, 13, 16, 17)),
         ("noise-rto-chains", (0, 2, 18, 19, 20, 25, 26)), ("importance", (0, 4, 12, 16))]


@pytest.mark.parametrize(("kind", "chosen"), CASES)
def test_the_checks_make_up_the_verdict(kind: str, chosen: tuple[int, ...]) -> None:
    cases, verdicts = list(KINDS[kind]()), []
    for index in chosen:
        posterior = cases[index].run(6, 1)
        checks = torch.stack([*checks_of(posterior, cases[index].reward).values()])
        verdicts.append(posterior.diagnostics["converged"])
        assert torch.equal(checks.any(0), ~verdicts[-1]), cases[index].name
    assert 0 < int(torch.cat(verdicts).sum()) < 6 * len(chosen)


def test_a_kind_that_is_not_known_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["fmttt"])
    assert f"choose from {', '.join(KINDS)}" in " ".join(capsys.readouterr().err.split())
    assert isinstance(next(iter(KINDS["noise-rto"]())).solver, invflow.NoiseRTO)
