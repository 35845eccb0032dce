"""Comparisons: the same observations for all, paired differences, resuming, splitting the work, and output files."""

from __future__ import annotations

import csv
import json
import math
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

import invflow
from invflow.cli.compare import parse_solver
from invflow.cli.entry import app
from invflow.evaluation.comparison import Comparison
from invflow.evaluation.results.parts import Stage, derive_seed, plan
from invflow.evaluation.results.text import with_error
from invflow.metrics import crps, frechet_distance
from invflow.operators import MatrixOperator
from invflow.posterior import NFE, Posterior

PROBLEM = "gaussian/linear"
COSTS = ("seconds", "memory")


class Shifted(invflow.Solver):
    """The exact posterior moved by a constant, which counts its calls and can be killed."""

    def __init__(self, problem: invflow.Problem, shift: float = 0.0, calls: float = 1.0,
                 dies_at: int | None = None) -> None:
        self.exact, self.shift, self.calls, self.dies_at = problem.exact_posterior(), shift, calls, dies_at
        self.seen: list[Tensor] = []

    def sample(self, reward: invflow.Reward, num_samples: int, *, generator: torch.Generator | None = None,
               progress: bool = False) -> Posterior:
        if self.dies_at == len(self.seen):
            raise KeyboardInterrupt
        self.seen.append(reward.y)
        posterior = self.exact.sample(reward, num_samples, generator=generator)
        return Posterior(posterior.samples + self.shift, nfe=NFE(self.calls, 2 * self.calls))

    def settings(self) -> dict[str, float]:
        return {"shift": self.shift}

    def fingerprint(self) -> str:
        return f"{self.shift} {self.calls}"  # what it has seen and when it dies decide no number


def problem() -> invflow.Problem:
    return invflow.load_problem(PROBLEM)


def numbers(comparison: Comparison) -> list[dict[str, str]]:
    """The tidy table without what differs from run to run."""
    return [row for row in csv.DictReader(comparison.to_csv().splitlines()) if row["metric"] not in COSTS]


def test_all_solvers_get_the_same_observations_and_their_numbers_are_right() -> None:
    posed = problem()
    solvers = {"a": Shifted(posed), "b": Shifted(posed, 1.0)}
    comparison = invflow.compare(posed, solvers, num_observations=7, num_samples=32, part_size=3, seed=5)
    ys = [torch.cat(solver.seen) for solver in solvers.values()]
    assert torch.equal(ys[0], ys[1])
    assert [len(part) for part in solvers["a"].seen] == [3, 3, 1]
    # the numbers of one part, by hand
    g = torch.Generator().manual_seed(derive_seed(5, PROBLEM, "observations"))
    truth, likelihood = posed.simulate(7, generator=g)
    assert torch.equal(likelihood.y, ys[0])
    g = torch.Generator().manual_seed(derive_seed(5, PROBLEM, 3, "solver"))
    samples = posed.exact_posterior().sample(likelihood.select([3, 4, 5]), 32, generator=g).samples
    wanted = crps(samples, truth[3:6]).mean(1)
    assert comparison.values[PROBLEM]["a"]["crps"][3:6] == pytest.approx(wanted.tolist())
    assert comparison.seeds[PROBLEM][3:6] == [g.initial_seed()] * 3
    values = torch.tensor(comparison.values[PROBLEM]["b"]["rmse"], dtype=torch.float64)
    assert comparison.mean(PROBLEM, "b", "rmse") == pytest.approx((float(values.mean()), float(values.std() / 7**0.5)))
    assert comparison.costs[PROBLEM]["a"]["forward"] == 1.0
    assert comparison.costs[PROBLEM]["a"]["backward"] == 2.0


def test_paired_differences_see_what_means_cannot() -> None:
    posed = problem()
    comparison = invflow.compare(posed, {"exact": Shifted(posed), "moved": Shifted(posed, 0.4)}, num_observations=60,
                                 num_samples=64, part_size=60)
    own, base = (torch.tensor(comparison.values[PROBLEM][s]["crps"], dtype=torch.float64) for s in ("moved", "exact"))
    difference, error = comparison.difference(PROBLEM, "moved", "crps")
    assert difference == pytest.approx(float((own - base).mean()))
    assert error == pytest.approx(float((own - base).std() / math.sqrt(60)))
    assert error < 0.7 * comparison.mean(PROBLEM, "moved", "crps")[1]
    assert difference > 3 * error  # CRPS is proper: the moved posterior is worse
    assert comparison.best(PROBLEM, "crps") == "exact"
    back, _ = comparison.difference(PROBLEM, "exact", "crps", reference="moved")
    assert back == pytest.approx(-difference)
    assert comparison.difference(PROBLEM, "moved", "crps", reference="best")[0] == pytest.approx(difference)
    with pytest.raises(KeyError, match="choose one of"):
        comparison.difference(PROBLEM, "moved", "crps", reference="unknown")
    exact = comparison.mean(PROBLEM, "exact", "sliced_wasserstein")[0]
    assert exact < 0.5 * comparison.mean(PROBLEM, "moved", "sliced_wasserstein")[0]


def test_exact_posterior_covers_and_fits() -> None:
    comparison = invflow.compare(PROBLEM, ["exact"], num_observations=200, num_samples=64, part_size=200)
    mean, error = comparison.mean(PROBLEM, "exact", "coverage")
    assert abs(mean - 0.9) < 4 * error
    mean, error = comparison.mean(PROBLEM, "exact", "residual")
    squares = torch.tensor(comparison.values[PROBLEM]["exact"]["residual"]).square()
    assert abs(float(squares.mean()) - 1) < 4 * float(squares.std()) / math.sqrt(200)  # E[(y - A x)^2] = sigma^2


def test_a_killed_comparison_goes_on_and_gives_the_same_table(tmp_path: Path) -> None:
    posed, settings = problem(), {"num_observations": 8, "num_samples": 20, "part_size": 2}
    whole = invflow.compare(posed, {"a": Shifted(posed), "b": Shifted(posed, 0.5)}, **settings)
    dying = {"a": Shifted(posed), "b": Shifted(posed, 0.5, dies_at=2)}
    with pytest.raises(KeyboardInterrupt):
        invflow.compare(posed, dying, output=tmp_path, **settings)
    assert not (tmp_path / "comparison.json").exists()
    with pytest.raises(FileNotFoundError, match="resumes with the same call"):
        Comparison.load(tmp_path)
    done = sorted(tmp_path.glob("parts/*/*/*.safetensors"))
    assert len(done) == 5  # a: 3, b: 2
    done[0].write_bytes(done[0].read_bytes()[:100])  # and a file that was cut short
    again = {"a": Shifted(posed), "b": Shifted(posed, 0.5)}
    resumed = invflow.compare(posed, again, output=tmp_path, **settings)
    assert (len(again["a"].seen), len(again["b"].seen)) == (2, 2)
    assert numbers(resumed) == numbers(whole)
    untouched = {"a": Shifted(posed, dies_at=0), "b": Shifted(posed, 0.5, dies_at=0)}
    assert invflow.compare(posed, untouched, output=tmp_path, **settings).to_csv() == resumed.to_csv()
    loaded = Comparison.load(tmp_path)
    assert loaded.to_csv() == resumed.to_csv()
    assert loaded.to_markdown() == (tmp_path / "table.md").read_text().rstrip("\n")
    found, kept = loaded.examples(PROBLEM, "a"), resumed.examples(PROBLEM, "a")
    assert found["samples"].shape == (4, 8, 2)
    assert torch.equal(found["truth"], kept["truth"])
    assert {path.name for path in tmp_path.iterdir()} == {"parts", "comparison.json", "table.csv", "observations.csv",
                                                          "table.md", "pareto.png"}


def test_a_folder_belongs_to_one_comparison(tmp_path: Path) -> None:
    posed = problem()
    invflow.compare(posed, {"a": Shifted(posed)}, num_observations=2, num_samples=8, output=tmp_path)
    for change in ({"seed": 1}, {"num_samples": 9}, {"split": "validation"}):
        options = {"num_observations": 2, "num_samples": 8, "output": tmp_path, **change}
        with pytest.raises(ValueError, match=f"differs in {next(iter(change))}"):
            invflow.compare(posed, {"a": Shifted(posed)}, **options)
    with pytest.raises(ValueError, match="differs in solver"):
        invflow.compare(posed, {"a": Shifted(posed, 2.0)}, num_observations=2, num_samples=8, output=tmp_path)
    # a further solver is welcome
    more = {"a": Shifted(posed, dies_at=0), "b": Shifted(posed, 2.0)}
    assert len(invflow.compare(posed, more, num_observations=2, num_samples=8, output=tmp_path).solvers) == 2


def test_solvers_that_fail_are_listed_with_the_reason() -> None:
    def refuses(posed: invflow.Problem) -> invflow.Solver:
        raise ValueError("not this one")

    posed = problem()
    comparison = invflow.compare(posed, {"vfm": "vfm", "refuses": refuses, "exact": "exact",
                                         "norms": lambda p: invflow.DPS(p.prior, steps=5, zeta=math.inf)},
                                 num_observations=2, num_samples=20)
    assert "no solver was trained" in comparison.failures[PROBLEM]["vfm"]
    assert "not this one" in comparison.failures[PROBLEM]["refuses"]
    assert "not finite" in comparison.failures[PROBLEM]["norms"]
    assert list(comparison.values[PROBLEM]) == ["exact"]
    text = comparison.to_markdown()
    assert "| refuses | — |" in text
    assert "not this one" in text
    assert comparison.reference(PROBLEM, "crps") == "exact"
    assert {row["metric"] for row in comparison.rows() if row["solver"] == "vfm"} == {"failure"}


def test_pareto_front() -> None:
    points = {"cheap": (1.0, 3.0), "good": (10.0, 1.0), "worse": (10.0, 2.0), "dear": (50.0, 1.5), "free": (0.0, 4.0)}
    values = {name: {"crps": [loss, loss], "psnr": [-loss, -loss], "residual": [1 + loss, 1 + loss]}
              for name, (_, loss) in points.items()}
    costs = {name: {"forward": calls, "backward": 0.0, "seconds": 1.0, "memory": None}
             for name, (calls, _) in points.items()}
    comparison = Comparison({"p": values}, {"p": {}}, {"p": costs}, {"p": {}}, {}, {name: {} for name in points},
                            {"p": [0, 0]}, {})
    for metric in ("crps", "psnr", "residual"):
        assert comparison.pareto("p", metric) == ["free", "cheap", "good"]
        assert comparison.best("p", metric) == "good"
    figure = comparison.plot("crps")
    labels = {text.get_text() for text in figure.axes[0].texts}
    assert labels == set(points)
    with pytest.raises(ValueError, match="choose one of crps"):
        comparison.plot("energy")


def test_tilted_problems_are_compared_by_their_quantities() -> None:
    mixture = invflow.GaussianMixtureFlow(torch.tensor([[-1.0, 0.0], [1.0, 0.0]]), std=0.5)
    posed = invflow.Problem("tilted", None, prior=lambda: mixture, reward=invflow.FunctionReward(lambda x: 2 * x[:, 0]),
                            quantities={"right": lambda x: (x[:, 0] > 0).float()})
    comparison = invflow.compare(posed, {"fmtt": lambda p: invflow.FMTT(p.prior, steps=8)}, num_observations=6,
                                 num_samples=128, part_size=6)
    # e^{2 x}: each component moves by 2 std^2, and the right one gains a weight of e^4
    share = 1 / (1 + math.exp(-4))
    right = share * 0.5 * (1 + math.erf(1.5 / 0.5 / 2**0.5)) + (1 - share) * 0.5 * (1 + math.erf(-0.5 / 0.5 / 2**0.5))
    mean, error = comparison.mean("tilted", "fmtt", "right")
    assert abs(mean - right) < 5 * error + 0.03
    assert "crps" not in comparison.metrics("tilted")


def test_test_images_are_left_alone_while_tuning(monkeypatch: pytest.MonkeyPatch) -> None:
    posed = invflow.load_problem("mnist/super-resolution")
    read: list[str] = []
    images = posed._images
    monkeypatch.setattr(posed, "_images", lambda split: read.append(split) or images(split))
    comparison = invflow.compare(posed, ["lmmse"], num_observations=4, num_samples=24, split="validation")
    assert set(read) == {"validation"}
    name = posed.name
    assert {"crps", "psnr", "ssim", "residual", "nlpd", "energy", "coverage"} <= set(comparison.values[name]["lmmse"])
    value, error = comparison.sets[name]["lmmse"]["frechet"]
    assert value > 0
    assert error > 0
    parts = [part.tensors["features"] for part in comparison._parts.values()]
    real = invflow.metrics.classifier_features(images("validation"), "mnist")
    assert value == pytest.approx(float(frechet_distance(torch.cat(parts).flatten(0, 1), real)))
    images_kept = comparison.examples(name, "lmmse")
    assert images_kept["covered"].dtype == torch.bool
    assert images_kept["observation"].shape == (4, 1, 7, 7)


def test_command_line(tmp_path: Path) -> None:
    run = CliRunner().invoke(app, ["compare", PROBLEM, "--solver", "exact", "--solver", "few=fmtt:steps=4",
                                   "--observations", "3", "--samples", "20", "--output", str(tmp_path / "out")])
    assert run.exit_code == 0, run.output
    assert "| few (collapsed) |" in run.output
    record = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert record["solvers"]["few"]["steps"] == 4
    assert record["settings"]["split"] == "test"
    again = CliRunner().invoke(app, ["compare", PROBLEM, "--solver", "exact", "--seed", "1", "--observations", "3",
                                     "--samples", "20", "--output", str(tmp_path / "out")])
    assert again.exit_code == 2
    assert "differs in seed" in again.output
    nothing = CliRunner().invoke(app, ["compare", PROBLEM])
    assert "--solver vfm" in nothing.output
    label, build = parse_solver("x=dps:steps=7,guidance=annealed,variant=deepinv")
    assert (label, build(problem()).guidance) == ("x", "annealed")
    with pytest.raises(ValueError, match="did you mean"):
        parse_solver("pigdn")


def test_mistakes_are_named() -> None:
    posed = problem()
    with pytest.raises(ValueError, match="num_samples=0"):
        invflow.compare(posed, ["exact"], num_samples=0)
    with pytest.raises(ValueError, match="pass a list"):
        invflow.compare(posed, "exact")
    with pytest.raises(ValueError, match="at least one"):
        invflow.compare(posed, {})
    with pytest.raises(TypeError, match="'a' is a int"):
        invflow.compare(posed, {"a": 3})
    with pytest.raises(ValueError, match="there is no solver"):
        invflow.compare(posed, ["exakt"])
    with pytest.raises(ValueError, match="each once"):
        invflow.compare([posed, PROBLEM], ["exact"])


def test_several_processes_need_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("invflow.evaluation.compare._place", lambda: (0, 2))
    with pytest.raises(ValueError, match="output="):
        invflow.compare(problem(), ["exact"])


def test_processes_share_the_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    posed, settings = problem(), {"num_observations": 6, "num_samples": 20, "part_size": 2}
    monkeypatch.setattr("invflow.evaluation.compare._wait", lambda: None)
    solvers = [{"a": Shifted(posed), "b": Shifted(posed, 0.5)} for _ in range(2)]
    for process in (1, 0):  # one after the other, the writer of the table last
        monkeypatch.setattr("invflow.evaluation.compare._place", lambda process=process: (process, 2))
        try:
            shared = invflow.compare(posed, solvers[process], output=tmp_path, **settings)
        except ValueError as error:  # the first of them finds the other's parts missing
            assert process == 1 and "run the same call again" in str(error)  # noqa: PT017, PT018
    assert [len(solvers[p][s].seen) for p in (0, 1) for s in ("a", "b")] == [2, 1, 1, 2]
    monkeypatch.undo()
    alone = invflow.compare(posed, {"a": Shifted(posed), "b": Shifted(posed, 0.5)}, **settings)
    assert numbers(shared) == numbers(alone)


@pytest.mark.slow
def test_two_processes_started_by_torchrun(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "invflow",
               "compare", PROBLEM, "--solver", "exact", "--solver", "few=fmtt:steps=4", "--observations", "20",
               "--samples", "20", "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("wrote") == 1
    shared = Comparison.load(tmp_path)
    assert shared.settings["processes"] == 2
    alone = invflow.compare(PROBLEM, {"exact": "exact", "few": parse_solver("fmtt:steps=4")[1]}, num_observations=20,
                            num_samples=20)
    assert numbers(shared) == numbers(alone)


def test_texts() -> None:
    assert with_error(0.123456, 0.0123) == "0.123 ± 0.012"
    assert with_error(-596.1, 130.0) == "-596 ± 130"
    assert with_error(1.0, math.nan) == "1"
    assert with_error(811837398.0, 811837080.0) == "8.1e8 ± 8.1e8"
    assert with_error(-12345.6, 9999.0) == "-12346 ± 9999"
    assert with_error(0.3, 2.5e10) == "3.0e-1 ± 2.5e10"
    assert with_error(3.0, 1e105) == "3.0e0 ± 1.0e105"
    tasks = plan({"p": [Stage(0, 5, 2)]}, ["a", "b"])
    assert [(t.solver, t.start, t.stop) for t in tasks] == [("a", 0, 2), ("b", 0, 2), ("a", 2, 4), ("b", 2, 4),
                                                            ("a", 4, 5), ("b", 4, 5)]
    assert len({derive_seed(0, "p", i, what) for i in range(50) for what in ("solver", "judge")}) == 100
    comparison = invflow.compare(invflow.Problem("<b>", None, MatrixOperator(torch.eye(2)), 1.0, prior=problem()._prior,
                                                 sampler=lambda n, g: torch.randn(n, 2, generator=g)), ["exact"],
                                 num_observations=2, num_samples=4)
    assert "<b>" not in comparison._repr_html_()
    assert "2 observations" in repr(comparison)


# -- the field's samplers, tuned ---------------------------------------------------------------------------------------


def test_tuning_keeps_the_best_candidate(tmp_path: Path) -> None:
    from benchmarks.release.tune_samplers import CANDIDATES, tune

    scores = tune(problem(), "flower", tmp_path, images=12, samples=24)
    assert len(scores) == len(CANDIDATES["flower"])
    assert [s["crps"] for s in scores] == sorted(s["crps"] for s in scores)
    record = Comparison.load(tmp_path)
    assert record.settings["split"] == "validation"
    assert scores[0]["crps"] == min(record.mean(PROBLEM, solver, "crps")[0] for solver in record.solvers)


def test_tuned_samplers_get_the_same_budget() -> None:
    from benchmarks.release.tune_samplers import CANDIDATES, steps_of
    from invflow.registry import solver_by_name

    mixture = invflow.GaussianMixtureFlow(torch.full((1, 1, 4, 4), 0.5), std=0.1)
    likelihood = invflow.GaussianLikelihood(invflow.operators.Denoising((1, 4, 4)), torch.full((1, 1, 4, 4), 0.6), 0.1)
    for sampler, candidates in CANDIDATES.items():
        for settings in candidates:
            solver = solver_by_name(sampler, mixture, **settings, **steps_of(sampler, 20, settings))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                nfe = solver.sample(likelihood, 20).nfe
            assert nfe.forward + nfe.backward == pytest.approx(20, rel=0.12), (sampler, settings)


def test_tuned_settings_are_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.release import tune_samplers

    path = tmp_path / "tuned.json"
    path.write_text(json.dumps({"chosen": {"mnist/denoising": {"tds": {"max_shift": "inf", "schedule": "annealed"}}}}))
    monkeypatch.setattr(tune_samplers, "TUNED", path)
    tune_samplers._read.cache_clear()
    assert tune_samplers.tuned_settings("mnist/denoising", "tds") == {"max_shift": math.inf, "schedule": "annealed"}
    assert tune_samplers.tuned_settings("mnist/denoising", "dps") == {}
    tune_samplers._read.cache_clear()


def test_particles_are_resampled_to_what_is_asked_for() -> None:
    from benchmarks.tables.compare_table import Particles

    mixture = invflow.GaussianMixtureFlow(torch.tensor([[-1.0, 0.0], [1.0, 0.0]]), std=0.5)
    likelihood = invflow.GaussianLikelihood(MatrixOperator(torch.tensor([[1.0, 0.0]])), torch.tensor([[0.9]]), 0.3)
    solver = Particles(invflow.FMTT(mixture, steps=4), 60)
    g = torch.Generator().manual_seed(0)
    posterior = solver.sample(likelihood, 15, generator=g)
    assert posterior.samples.shape == (1, 15, 2)
    assert not posterior.weighted
    own = invflow.FMTT(mixture, steps=4).sample(likelihood, 60, generator=torch.Generator().manual_seed(0)).nfe
    assert posterior.nfe == invflow.NFE(4 * own.forward, 4 * own.backward)
    assert solver.settings()["particles"] == 60
