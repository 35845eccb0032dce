"""Collapsed weights: the row is marked in every table and never called the best."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import invflow
from invflow.evaluation.comparison import Comparison
from invflow.evaluation.measures import measure
from invflow.evaluation.summary import format_table, is_collapsed, summarise
from invflow.posterior import Posterior


class Weighted(invflow.Solver):
    """The exact posterior with log weights of its own, of a temperature."""

    def __init__(self, problem: invflow.Problem, temperature: float) -> None:
        self.exact, self.temperature = problem.exact_posterior(), temperature

    def sample(self, reward: invflow.Reward, num_samples: int, *, generator: torch.Generator | None = None,
               progress: bool = False) -> Posterior:
        posterior = self.exact.sample(reward, num_samples, generator=generator)
        noise = torch.randn(posterior.samples.shape[:2], generator=torch.Generator().manual_seed(0))
        return Posterior(posterior.samples, noise / self.temperature)

    def settings(self) -> dict[str, float]:
        return {"temperature": self.temperature}


def test_collapsed_by_half_of_the_observations() -> None:
    assert is_collapsed([1.1, 9.9], 64)
    assert not is_collapsed([10.0, 64.0], 64)
    assert is_collapsed([9.0, 64.0], 64)  # half
    assert not is_collapsed([9.0, 64.0, 64.0], 64)
    assert not is_collapsed([], 64)  # no weights
    assert not is_collapsed([8.0], 8)  # all that were drawn
    assert is_collapsed([3.9], 8)


def test_a_collapsed_solver_is_never_best() -> None:
    """Better in every number, one effective sample: as a sampler whose one particle happens to be near the truth."""
    values = {"right": {"crps": [2.0, 2.0], "coverage": [0.8, 0.8], "psnr": [20.0, 20.0], "residual": [2.0, 2.0]},
              "is": {"crps": [1.0, 1.0], "coverage": [0.9, 0.9], "psnr": [30.0, 30.0], "residual": [1.0, 1.0],
                     "ess": [1.1, 1.2]}}
    costs = {name: {"forward": 1.0, "backward": 0.0, "seconds": 1.0, "memory": None} for name in values}
    settings = {"num_samples": 64, "num_observations": 2}

    def compared(values: dict[str, dict[str, list[float]]]) -> Comparison:
        return Comparison({"p": values}, {"p": {}}, {"p": costs}, {"p": {}}, settings, {name: {} for name in values},
                          {"p": [0, 0]}, {})

    found = compared(values)
    for metric in ("crps", "coverage", "psnr", "residual"):
        assert found.best("p", metric) == "right"
        assert found.reference("p", metric, "best") == "right"
        assert found.pareto("p", metric) == ["right"]
    lines = found.to_markdown().splitlines()
    row = next(line for line in lines if line.startswith("| is (collapsed) |"))
    assert "**" not in row
    assert "Collapsed: under 10 effective samples" in lines[-1]
    # many effective samples: the same numbers are the best, and nothing is marked
    values["is"]["ess"] = [40.0, 50.0]
    sound = compared(values)
    assert sound.best("p", "crps") == "is"
    assert "ollapsed" not in sound.to_markdown()
    # alone it is not best either
    values["is"]["ess"] = [1.1, 1.2]
    alone = compared({"is": values["is"]})
    assert alone.best("p", "crps") is None
    assert alone.pareto("p") == []


def test_a_comparison_marks_a_collapsed_solver(tmp_path) -> None:
    problem = invflow.load_problem("gaussian/linear")
    found = invflow.compare(problem, {"collapsed": Weighted(problem, 0.02), "sound": Weighted(problem, 5.0)},
                            num_observations=6, num_samples=64, output=tmp_path)
    name = found.problems[0]
    assert found.collapsed(name, "collapsed")
    assert not found.collapsed(name, "sound")
    assert found.best(name, "crps") == "sound"
    assert math.isnan(found.mean(name, "collapsed", "coverage")[0])
    assert "nan" not in found.to_markdown()
    assert Comparison.load(tmp_path).collapsed(name, "collapsed")
    found.report(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "collapsed (collapsed)" in page
    found.plot("crps")


def test_the_short_table_marks_observations(recwarn: pytest.WarningsRecorder) -> None:
    samples = torch.randn(2, 40, 1, 12, 12, generator=torch.Generator().manual_seed(0))
    log_weights = torch.zeros(2, 40)
    log_weights[0, 0] = 12.0
    lines = format_table(summarise(Posterior(samples, log_weights), truth=samples[:, 0])).splitlines()
    assert lines[1].split()[:2] == ["1", "*"]
    assert "*" not in lines[2]
    assert lines[3].split()[:2] == ["mean", "*"]
    assert "* collapsed: under 10 effective samples (1 of 2)" in "\n".join(lines)
    sound = format_table(summarise(Posterior(samples, 0 * log_weights), truth=samples[:, 0]))
    assert "*" not in sound
    assert "*" not in format_table(summarise(Posterior(samples), truth=samples[:, 0]))


def test_the_image_table_marks_a_row() -> None:
    from benchmarks.tables.image_table import evaluate

    problem = invflow.load_problem("mnist/super-resolution")
    solvers: dict[str, invflow.Solver] = {
        "is": invflow.VFM.load("mnist", importance=True), "vfm": invflow.VFM.load("mnist")}
    table = evaluate(problem, solvers, num_observations=3, num_samples=32, seed=0)
    assert set(table) == {"pseudo-inverse", "is (collapsed)", "vfm"}
    assert math.isnan(table["is (collapsed)"]["coverage"][0])
    assert table["is (collapsed)"]["crps"][0] > table["vfm"]["crps"][0]


def test_weights_reach_every_number_of_a_comparison() -> None:
    """All weight on one of 64 draws: what is judged is a point."""
    problem = invflow.load_problem("gaussian/linear")
    truth, likelihood = problem.simulate(5, generator=torch.Generator().manual_seed(0))
    posterior = problem.exact_posterior().sample(likelihood, 64, generator=torch.Generator().manual_seed(1))
    log_weights = torch.full((5, 64), -math.inf)
    log_weights[:, 3] = 0
    collapsed = Posterior(posterior.samples, log_weights)
    point: Tensor = collapsed.samples[:, 3]
    found = measure(collapsed, likelihood, truth, problem=problem, generator=torch.Generator().manual_seed(2))
    truth = truth.to(point)
    torch.testing.assert_close(found["crps"], (point - truth).abs().flatten(1).mean(1).double())
    torch.testing.assert_close(found["energy"], (point - truth).flatten(1).norm(dim=1).double())
    assert bool(found["coverage"].isnan().all())
    assert float(found["spread"].abs().max()) == 0
