"""Suites by name, merging the parts of a comparison, and the columns that an exact answer adds."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

import invflow
from invflow._core.files import alone_in
from invflow.cli.compare import parse_solver
from invflow.cli.entry import app
from invflow.evaluation.results.checks import Checks, certificate_p
from invflow.evaluation.suites import SUITES, Suite
from invflow.metrics import floor_ratio, mean_gap
from invflow.posterior import Posterior
from invflow.problem import list_problems

SOLVERS = {"exact": "exact", "fmtt": lambda problem: invflow.FMTT(problem.prior, steps=3)}
PROBLEMS = ["gaussian/linear", "curved/banana"]
SETTINGS = {"num_observations": 6, "num_samples": 20, "part_size": 2, "seed": 3}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", SUITES)
def test_suites_name_what_there_is(name: str) -> None:
    suite = SUITES[name]
    assert set(suite.problems) <= set(list_problems())
    labels = [parse_solver(text)[0] for text in suite.solvers]
    assert len(set(labels)) == len(labels)
    assert "exact" in labels
    assert set(suite.skips) <= set(suite.problems)
    assert {label for skipped in suite.skips.values() for label in skipped} <= {parse_solver(text)[0] for text in
                                                                               SUITES["full"].solvers}


def test_a_solver_that_is_left_out_of_a_problem_says_so() -> None:
    suite = Suite("tiny", ("gaussian/linear",), ("exact",), 2, 4, skips={"gaussian/linear": ("exact",)})
    build = suite.solver("exact", lambda problem: problem.exact_posterior())
    with pytest.raises(ValueError, match="left out of this suite"):
        build(invflow.load_problem("gaussian/linear"))
    assert build(invflow.load_problem("mixture/25-8-1")) is not None


@pytest.mark.filterwarnings("ignore")
def test_shares_are_one_run_bit_by_bit(tmp_path: Path) -> None:
    whole = invflow.compare(PROBLEMS, SOLVERS, output=tmp_path / "whole", **SETTINGS)
    first = invflow.compare(PROBLEMS, SOLVERS, output=tmp_path / "one", shard=(1, 2), **SETTINGS)
    assert first.waiting() == 6
    assert not (tmp_path / "one" / "table.csv").exists()
    second = invflow.compare(PROBLEMS, SOLVERS, output=tmp_path / "two", shard=(2, 2), **SETTINGS)
    assert second.waiting() == 6
    shutil.copytree(tmp_path / "two" / "parts", tmp_path / "one" / "parts", dirs_exist_ok=True)
    merged = invflow.compare(PROBLEMS, SOLVERS, output=tmp_path / "one", **SETTINGS)
    assert merged.waiting() == 0
    assert merged.values == whole.values or json.dumps(merged.values) == json.dumps(whole.values)
    assert json.dumps(merged.sets) == json.dumps(whole.sets)
    assert all("certificate" in merged.sets[problem]["exact"] for problem in PROBLEMS)
    for file in ("observations.csv",):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    assert {k: {s: (c["forward"], c["backward"]) for s, c in v.items()} for k, v in merged.costs.items()} == {
        k: {s: (c["forward"], c["backward"]) for s, c in v.items()} for k, v in whole.costs.items()}


@pytest.mark.filterwarnings("ignore")
def test_the_last_share_in_one_folder_writes_the_tables(tmp_path: Path) -> None:
    for k in (1, 2, 3):
        found = invflow.compare(PROBLEMS[0], SOLVERS, output=tmp_path, shard=(k, 3), **SETTINGS)
    assert found.waiting() == 0
    assert (tmp_path / "table.csv").exists()


@pytest.mark.filterwarnings("ignore")
def test_two_shares_that_end_together_do_not_disturb_each_other(tmp_path: Path) -> None:
    invflow.compare(PROBLEMS[0], SOLVERS, output=tmp_path, shard=(1, 2), **SETTINGS)
    with alone_in(tmp_path):
        found = invflow.compare(PROBLEMS[0], SOLVERS, output=tmp_path, shard=(2, 2), **SETTINGS)
    assert found.waiting() == 0
    assert not (tmp_path / "table.csv").exists()  # whoever holds the folder writes it


def test_shares_that_cannot_be(tmp_path: Path) -> None:
    for shard in ((0, 2), (3, 2)):
        with pytest.raises(ValueError, match="1 <= k <= n"):
            invflow.compare(PROBLEMS[0], SOLVERS, output=tmp_path, shard=shard)
    with pytest.raises(ValueError, match="output='comparison'"):
        invflow.compare(PROBLEMS[0], SOLVERS, shard=(1, 2))


@pytest.mark.filterwarnings("ignore")
def test_the_command_runs_a_suite_in_shares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = Suite("tiny", ("gaussian/linear",), ("exact", "fmtt:steps=3"), 4, 20, 2)
    monkeypatch.setitem(SUITES, "tiny", tiny)
    run = ["compare", "--suite", "tiny", "--output", str(tmp_path)]
    half = CliRunner().invoke(app, [*run, "--shard", "1/2"], catch_exceptions=False)
    assert half.exit_code == 0
    assert "2 parts of other shares are still missing" in half.output
    done = CliRunner().invoke(app, [*run, "--shard", "2/2"], catch_exceptions=False)
    assert done.exit_code == 0
    for file in ("table.csv", "comparison.json", "report.html"):
        assert (tmp_path / file).exists()
    table = (tmp_path / "table.csv").read_text()
    for column in ("floor_ratio", "mean_gap", "density_coverage", "crps", "energy", "coverage", "certificate",
                   "forward", "backward", "seconds", "memory"):
        assert f",{column}," in table


@pytest.mark.parametrize(("words", "message"), [
    (["--suite", "slow"], "there is no suite 'slow': quick, "),
    (["gaussian/linear", "--suite", "quick"], "has its own problems"),
    ([], "or --suite quick"), (["gaussian/linear", "--solver", "exact", "--shard", "5/4"], "such as 1/4")])
def test_wrong_calls_say_what_to_do(words: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["compare", *words])
    assert result.exit_code != 0
    assert message in (result.output + str(result.exception)).replace("\n", " ")


# -- columns -----------------------------------------------------------------------------------------------------------


def test_exact_draws_are_at_the_floor_and_have_no_gap() -> None:
    draws = torch.randn(200, 400, 3, generator=seeded())
    ratio = floor_ratio(draws[:, :100], draws[:, 100:], generator=seeded(1))
    # the floor is the mean of three pairs, one of which shares nothing with the samples
    assert float(ratio.mean()) == pytest.approx(1, abs=0.1)
    moved = floor_ratio(draws[:, :100] + 1.0, draws[:, 100:], generator=seeded(1))
    assert float(moved.mean()) > 3


def test_floor_ratio_weighs_samples() -> None:
    draws = torch.randn(20, 400, 2, generator=seeded())
    samples = torch.cat([draws[:, :50], 10 + draws[:, 50:100]], 1)
    weights = torch.cat([torch.zeros(20, 50), torch.full((20, 50), -200.0)], 1)
    good = floor_ratio(samples, draws[:, 100:], weights, generator=seeded(1))
    assert float(good.mean()) < 2 < float(floor_ratio(samples, draws[:, 100:], generator=seeded(1)).mean())


def test_mean_gap_is_the_ratio_of_squared_errors() -> None:
    truth, exact = torch.zeros(1, 2), torch.full((1, 5, 2), 1.0)
    assert float(mean_gap(torch.full((1, 4, 2), 3.0), exact, truth)) == pytest.approx(10 * math.log10(9))
    weights = torch.tensor([[0.0, -1000.0]])
    assert float(mean_gap(torch.tensor([[[1.0, 1.0], [9.0, 9.0]]]), exact, truth, weights)) == pytest.approx(0)


def certificate(change: Callable[[Tensor], Posterior], seed: int, observations: int = 16) -> float:
    problem = invflow.load_problem("gaussian/linear")
    truth, likelihood = problem.simulate(observations, generator=seeded(1000 + seed))
    exact = problem.exact_posterior().sample(likelihood, 40, generator=seeded(2000 + seed)).samples
    checks, half = Checks(problem, seed), observations // 2
    posterior = change(exact)
    parts = [checks.ranks(posterior.select(rows), truth[rows], likelihood.select(rows), rows.start)
             for rows in (slice(0, half), slice(half, observations))]
    found = certificate_p(parts, posterior.num_samples)
    assert found is not None
    return found


def test_the_certificate_rejects_exact_draws_no_more_often_than_it_says() -> None:
    rejected = sum(certificate(Posterior, seed) < 0.05 for seed in range(60))
    assert rejected <= 60 * 0.05 + 3 * math.sqrt(60 * 0.05 * 0.95)


def test_the_certificate_rejects_samples_that_are_too_narrow_or_displaced() -> None:
    assert certificate(lambda x: Posterior(x.mean(1, keepdim=True).lerp(x, 0.25)), 0) < 1e-3
    assert certificate(lambda x: Posterior(x + 3), 0) < 1e-3
    assert certificate(lambda x: Posterior(x[:, :1].expand_as(x)), 0) < 1e-3  # a single image


def test_the_certificate_uses_the_weights() -> None:
    log_weights = torch.cat([torch.zeros(16, 40), torch.full((16, 40), -1000.0)], 1)
    assert certificate(lambda x: Posterior(torch.cat([x, x + 3], 1), log_weights), 0) > 0.05
    assert certificate(lambda x: Posterior(torch.cat([x, x + 3], 1)), 0) < 1e-3


def test_the_certificate_needs_truths_of_the_prior_and_samples_with_ranks() -> None:
    assert [Checks.apply_to(invflow.load_problem(name)) for name in ("curved/banana", "ring/wavy", "mnist/denoising")
            ] == [True, False, False]
    problem = invflow.load_problem("gaussian/linear")
    truth, likelihood = problem.simulate(2, generator=seeded())
    checks = Checks(problem, 0)
    posterior = Posterior(torch.randn(2, 9, 2, generator=seeded()))
    known = checks.ranks(posterior, truth, likelihood, 0)
    checks._quantities["never known"] = lambda x, _: math.nan * x[:, :, 0]
    assert checks.ranks(posterior, truth, likelihood, 0) == {}
    assert certificate_p([known, {}], 9) is None
    assert certificate_p([], 9) is None


def test_sizes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="need 30 exact draws"):
        floor_ratio(torch.zeros(1, 10, 2), torch.zeros(1, 20, 2))
    with pytest.raises(ValueError, match="do not fit"):
        mean_gap(torch.zeros(1, 10, 2), torch.zeros(1, 20, 3), torch.zeros(1, 2))


@pytest.mark.filterwarnings("ignore")
def test_the_exact_solver_has_its_columns() -> None:
    comparison = invflow.compare("gaussian/linear", ["exact"], num_observations=60, num_samples=60, part_size=60)
    mean = {name: comparison.mean("gaussian/linear", "exact", name) for name in
            ("floor_ratio", "mean_gap", "density_coverage")}
    assert mean["floor_ratio"][0] == pytest.approx(1, abs=0.3)
    assert abs(mean["mean_gap"][0]) < 4 * mean["mean_gap"][1]
    assert abs(mean["density_coverage"][0] - 0.9) < 4 * mean["density_coverage"][1]
