"""Results on disk are identified by their inputs: whatever determines the numbers is computed anew or rejected."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import threading
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import invflow
from invflow.evaluation.comparison import Comparison
from invflow.operators import Denoising, GaussianBlur, MatrixOperator
from invflow.posterior import Posterior

SETTINGS = {"num_observations": 4, "num_samples": 4, "part_size": 2}
Pair = tuple[invflow.Problem, invflow.Solver]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def picture(n: int, g: torch.Generator) -> Tensor:
    return torch.rand(n, 1, 4, 4, generator=g)


def black(n: int, g: torch.Generator) -> Tensor:
    """Truths of which every linear operator measures the noise alone, so that no measurement tells it."""
    return torch.zeros(n, 1, 4, 4)


def denoising(sigma: float = 0.1, sampler: Callable[[int, torch.Generator], Tensor] = picture,
              operator: invflow.Operator | None = None) -> invflow.Problem:
    return invflow.Problem("one name", None, operator or Denoising((1, 4, 4)), sigma, sampler=sampler)


def linear() -> invflow.Problem:
    return invflow.load_problem("gaussian/linear")


def network(seed: int) -> nn.Linear:
    net = nn.Linear(16, 16)
    with torch.no_grad():
        net.weight.copy_(torch.randn(16, 16, generator=generator(seed)) / 16)
        net.bias.zero_()
    return net


class Own(invflow.FlowMap):
    """A flow map of somebody's own, whose weight is a plain attribute."""

    state_shape = image_shape = (1, 4, 4)

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = weight

    def velocity(self, x: Tensor, t: invflow.flowmap.Time) -> Tensor:
        return self.weight * x

    def jump(self, x: Tensor, s: invflow.flowmap.Time, t: invflow.flowmap.Time) -> Tensor:
        return x + self.weight


class Narrow(invflow.Solver):
    """A solver of somebody's own, without settings()."""

    def __init__(self, spread: float) -> None:
        self.spread = spread

    def sample(self, reward, num_samples, *, generator=None, progress=False) -> Posterior:
        x = torch.randn(reward.num_observations, num_samples, 1, 4, 4, generator=generator)
        return Posterior(0.5 + self.spread * x)


class SaysLittle(Narrow):
    """Its settings() forget what decides its numbers."""

    def settings(self) -> dict[str, float]:
        return {"steps": 3}


def written(factor: float) -> invflow.Solver:
    """A solver whose number stands in its source."""
    space: dict = {"Narrow": Narrow, "__name__": __name__}
    exec(f"class Written(Narrow):\n    def sample(self, *args, **options):\n"
         f"        self.spread = {factor}\n        return Narrow.sample(self, *args, **options)\n", space)
    return space["Written"](1.0)


def shifting(shift: float) -> invflow.Operator:
    """An operator whose number stands in its source."""
    space: dict = {"Denoising": Denoising, "__name__": __name__}
    exec(f"class Shifting(Denoising):\n    linear = False\n    def forward(self, x):\n        return x + {shift}\n",
         space)
    return space["Shifting"]((1, 4, 4))


class Delegates(Narrow):
    """A solver that leaves its number to a module."""

    def __init__(self, shift: float) -> None:
        super().__init__(1.0)
        self.backend = types.ModuleType("backend")
        self.backend.shift = shift  # type: ignore[attr-defined]

    def sample(self, reward, num_samples, *, generator=None, progress=False) -> Posterior:
        posterior = super().sample(reward, num_samples, generator=generator)
        return Posterior(posterior.samples + self.backend.shift)


def fmtt(prior: invflow.FlowMap) -> invflow.FMTT:
    return invflow.FMTT(prior, steps=2)


def velocity(seed: int) -> invflow.FlowMap:
    net = network(seed)

    class Velocity(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return self.net(x.flatten(1)).view_as(x)

    return invflow.from_velocity(Velocity(), (1, 4, 4), steps=2)


def closure(seed: int) -> invflow.FlowMap:
    net = network(seed)
    return invflow.from_velocity(lambda x, t: net(x.flatten(1)).view_as(x), (1, 4, 4), steps=2)


def denoiser(seed: int) -> invflow.FlowMap:
    net = network(seed)
    return invflow.from_deepinv(lambda x, sigma: net(x.flatten(1)).view_as(x), (1, 4, 4), steps=2, sigma_max=1.0)


def latent(seed: int) -> invflow.FlowMap:
    net, codes = network(seed), invflow.GaussianMixtureFlow(torch.zeros(1, 16), std=1.0, steps=2)
    return invflow.LatentFlowMap(codes, lambda state: net(state).view(-1, 1, 4, 4), image_shape=(1, 4, 4))


def mixture(shift: float) -> invflow.FlowMap:
    own = linear().prior
    return invflow.GaussianMixtureFlow(own.means + shift, 0.5, own.log_weights.exp())


def composed(sigma: float) -> invflow.Operator:
    return Denoising((1, 4, 4)) @ GaussianBlur((1, 4, 4), sigma, 3)


def fitted(seed: int) -> invflow.Solver:
    return invflow.LinearMMSE.fit(torch.rand(40, 1, 4, 4, generator=generator(seed)))


#: what decides the numbers: one way, another that nothing but its content tells, and what it is found in
CASES: dict[str, tuple[Callable[[], Pair], Callable[[], Pair], str]] = {
    "the mixture of an exact posterior": (
        lambda: (linear(), invflow.ExactPosterior(mixture(0.0))),
        lambda: (linear(), invflow.ExactPosterior(mixture(30.0))), "solver"),
    "a flow map's own weight": (
        lambda: (denoising(), fmtt(Own(0.1))), lambda: (denoising(), fmtt(Own(0.2))), "solver"),
    "the network of a velocity": (
        lambda: (denoising(), fmtt(velocity(0))), lambda: (denoising(), fmtt(velocity(1))), "solver"),
    "a network that a function closes over": (
        lambda: (denoising(), fmtt(closure(0))), lambda: (denoising(), fmtt(closure(1))), "solver"),
    "a denoiser of deepinv's kind": (
        lambda: (denoising(), fmtt(denoiser(0))), lambda: (denoising(), fmtt(denoiser(1))), "solver"),
    "the decoder of a latent map": (
        lambda: (denoising(), fmtt(latent(0))), lambda: (denoising(), fmtt(latent(1))), "solver"),
    "the noise of a problem": (
        lambda: (denoising(0.05), Narrow(1.0)), lambda: (denoising(0.3), Narrow(1.0)), "observations"),
    "the operator of a problem": (
        lambda: (denoising(), Narrow(1.0)),
        lambda: (denoising(operator=GaussianBlur((1, 4, 4), 1.0, 3)), Narrow(1.0)),
        "observations"),
    "an operator that no measurement tells": (
        lambda: (denoising(sampler=black), Narrow(1.0)),
        lambda: (denoising(sampler=black, operator=GaussianBlur((1, 4, 4), 1.0, 3)),
                 Narrow(1.0)), "observations"),
    "an operator inside a composition": (
        lambda: (denoising(sampler=black, operator=composed(0.5)), Narrow(1.0)),
        lambda: (denoising(sampler=black, operator=composed(0.8)), Narrow(1.0)), "observations"),
    "what a solver was fitted to": (
        lambda: (denoising(), fitted(0)), lambda: (denoising(), fitted(1)), "solver"),
    "a solver without settings": (
        lambda: (denoising(), Narrow(1.0)), lambda: (denoising(), Narrow(0.1)), "solver"),
    "settings that say too little": (
        lambda: (denoising(), SaysLittle(1.0)), lambda: (denoising(), SaysLittle(0.1)), "solver"),
    "the source of an operator": (
        lambda: (denoising(operator=shifting(0.0)), Narrow(1.0)),
        lambda: (denoising(operator=shifting(0.5)), Narrow(1.0)), "observations"),
    "a module that a solver holds": (
        lambda: (denoising(), Delegates(0.0)), lambda: (denoising(), Delegates(0.5)), "solver"),
    "the source of a solver": (
        lambda: (denoising(), written(1.0)), lambda: (denoising(), written(0.1)), "solver"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_comparison_is_not_taken_for_another(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other, where = CASES[name]
    posed, solver = one()
    first = invflow.compare(posed, {"mine": solver}, output=tmp_path, **SETTINGS)
    assert not first.failures[posed.name]
    another, changed = other()
    assert another.name == posed.name
    fresh = invflow.compare(another, {"mine": changed}, **SETTINGS)
    assert fresh.values != first.values  # it does decide the numbers
    with pytest.raises(ValueError, match=f"differs in .*content of the {where}"):
        invflow.compare(another, {"mine": changed}, output=tmp_path, **SETTINGS)
    # the same again, built anew, is known: nothing is computed
    posed, solver = one()
    monkeypatch.setattr("invflow.evaluation.results.bench.Bench.run", lambda *_: pytest.fail("computed again"))
    assert invflow.compare(posed, {"mine": solver}, output=tmp_path, **SETTINGS).values == first.values


@pytest.mark.parametrize("name", ["what a solver was fitted to", "the network of a velocity",
                                  "the mixture of an exact posterior", "the decoder of a latent map"])
def test_a_solver_that_has_worked_is_still_the_same(tmp_path: Path, name: str) -> None:
    """What solvers, operators and problems cache does not affect the result."""
    posed, solver = CASES[name][0]()
    first = invflow.compare(posed, {"mine": solver}, output=tmp_path, **SETTINGS)
    assert invflow.compare(posed, {"mine": solver}, output=tmp_path, **SETTINGS).to_csv() == first.to_csv()


def test_what_a_problem_is_judged_by_counts_too(tmp_path: Path) -> None:
    def tilted(bound: float) -> invflow.Problem:
        own = invflow.GaussianMixtureFlow(torch.tensor([[-1.0, 0.0], [1.0, 0.0]]), std=0.5)
        return invflow.Problem("tilted", None, prior=lambda: own, reward=invflow.FunctionReward(lambda x: 2 * x[:, 0]),
                               quantities={"right": lambda x: (x[:, 0] > bound).float()})

    solvers = {"fmtt": lambda p: fmtt(p.prior)}
    invflow.compare(tilted(0.0), solvers, output=tmp_path, **SETTINGS)
    with pytest.raises(ValueError, match="differs in content of the problem"):
        invflow.compare(tilted(0.5), solvers, output=tmp_path, **SETTINGS)
    assert invflow.compare(tilted(0.0), solvers, output=tmp_path, **SETTINGS).folder is None


class Stops(Narrow):
    """Counts its calls, and ends the run or fails at some of them, all of which decides no number."""

    def __init__(self, stop: int | None = None, error: type[BaseException] = KeyboardInterrupt) -> None:
        super().__init__(1.0)
        self.stop, self.error = stop, error
        self.seen: list[Tensor] = []

    @property
    def calls(self) -> int:
        return len(self.seen)

    def fingerprint(self) -> str:
        return "the same"

    def settings(self) -> dict[str, str]:
        return {"solver": "Stops"}

    def sample(self, reward, num_samples, **options) -> Posterior:
        if self.calls == self.stop:
            self.stop = None
            raise self.error("a fault")
        self.seen.append(reward.y)
        return super().sample(reward, num_samples, **options)


class Fails(Stops):
    """Fails at each call until it is mended."""

    def sample(self, *args, **options) -> Posterior:
        self.stop = self.calls if self.error is RuntimeError else None
        return super().sample(*args, **options)


def test_no_table_is_half_of_one_noise_and_half_of_another(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        invflow.compare(denoising(0.05), {"mine": Stops(stop=1)}, output=tmp_path, **SETTINGS)
    assert len(list(tmp_path.glob("parts/*/*/*"))) == 1
    solver = Stops()
    with pytest.raises(ValueError, match="content of the observations"):
        invflow.compare(denoising(0.3), {"mine": solver}, output=tmp_path, **SETTINGS)
    assert solver.calls == 0
    assert not (tmp_path / "comparison.json").exists()


class Unknown(Narrow):
    def __init__(self) -> None:
        super().__init__(1.0)
        self.held, self.calls = threading.Lock(), 0  # whose content nobody can read

    def sample(self, *args, **options) -> Posterior:
        self.calls += 1
        return super().sample(*args, **options)


def test_what_cannot_be_identified_is_computed_again(tmp_path: Path) -> None:
    solvers = {"unknown": Unknown(), "known": Narrow(1.0)}
    with pytest.warns(UserWarning, match="cannot be identified.*held"):
        first = invflow.compare(denoising(), solvers, output=tmp_path, **SETTINGS)
    assert solvers["unknown"].calls == 2
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("parts/*/known/*")}
    with pytest.warns(UserWarning, match="computed again by each call"):
        again = invflow.compare(denoising(), solvers, output=tmp_path, **SETTINGS)
    assert solvers["unknown"].calls == 4
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert again.values == first.values


# -- failures, versions, extensions ------------------------------------------------------------------------------------


def test_a_mended_fault_is_not_listed_any_more(tmp_path: Path) -> None:
    failed = invflow.compare(denoising(), {"mended": Fails(error=RuntimeError), "other": Narrow(1.0)}, output=tmp_path,
                             **SETTINGS)
    assert failed.failures["one name"] == {"mended": "RuntimeError: a fault"}
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("parts/*/other/*")}
    good = invflow.compare(denoising(), {"mended": Fails(), "other": Narrow(1.0)}, output=tmp_path, **SETTINGS)
    assert not good.failures["one name"]
    assert good.values["one name"]["mended"] == good.values["one name"]["other"]  # but for the fault they are the same
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.parametrize("error", [RuntimeError, KeyError, AssertionError, MemoryError, SystemExit, ZeroDivisionError])
def test_any_error_is_the_reason_of_its_part_alone(tmp_path: Path, error: type[BaseException]) -> None:
    solvers = {"mended": Stops(stop=1, error=error), "other": Narrow(1.0)}
    found = invflow.compare(denoising(), solvers, output=tmp_path, **{**SETTINGS, "num_observations": 6})
    gap = found.missing["one name"]["mended"]
    assert gap["observations"] == [2, 3]
    assert error.__name__ in gap["reason"]
    assert not found.failures["one name"]
    own, other = (found.values["one name"][s]["crps"] for s in ("mended", "other"))
    assert [math.isnan(v) for v in own] == [False, False, True, True, False, False]
    assert [v for v in own if not math.isnan(v)] == [*other[:2], *other[4:]]  # the same solver, but for the fault
    # means over the others, which are compared with no other's
    assert found.mean("one name", "mended", "crps")[0] == pytest.approx(sum([*other[:2], *other[4:]]) / 4)
    assert found.best("one name", "crps") == "other"
    assert "mended" not in found.pareto("one name", "crps")
    assert found.reference("one name", "crps") == "other"
    assert found.difference("one name", "mended", "crps")[0] == pytest.approx(0, abs=1e-12)
    assert "failed on 2 of 6 observations" in found.to_markdown()
    assert Comparison.load(tmp_path).missing == found.missing
    found.report(tmp_path / "report.html")
    assert "failed on 2 of 6 observations" in (tmp_path / "report.html").read_text()
    # the same call tries that part again, and no other
    again = {"mended": Stops(), "other": Narrow(1.0)}
    whole = invflow.compare(denoising(), again, output=tmp_path, **{**SETTINGS, "num_observations": 6})
    assert again["mended"].calls == 1
    assert not whole.missing["one name"]
    assert whole.values["one name"]["mended"]["crps"] == other


def test_ctrl_c_is_no_reason() -> None:
    with pytest.raises(KeyboardInterrupt):
        invflow.compare(denoising(), {"stops": Stops(stop=0)}, **SETTINGS)


@pytest.mark.parametrize(("count", "image"), [(3, (1, 4, 4)), (5, (1, 4, 4)), (4, (1, 4, 5))])
def test_a_wrong_number_of_samples_is_a_failure(count: int, image: tuple[int, ...]) -> None:
    class Wrong(Narrow):
        def sample(self, reward, num_samples, **options) -> Posterior:
            return Posterior(torch.zeros(reward.num_observations, count, *image))

    found = invflow.compare(denoising(), {"wrong": Wrong(1.0), "right": Narrow(1.0)}, **SETTINGS)
    assert f"returned samples {(2, count, *image)}, not (2, 4, 1, 4, 4)" in found.failures["one name"]["wrong"]
    assert list(found.values["one name"]) == ["right"]


def test_the_exit_status_tells_whether_every_solver_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from invflow.cli.entry import app

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("out of luck")

    arguments = ["compare", "gaussian/linear", "--solver", "fmtt:steps=2", "--observations", "2", "--samples", "8"]
    monkeypatch.setattr(invflow.FMTT, "_sample", fail)
    monkeypatch.setattr(invflow.FMTT, "sample", fail)
    alone = CliRunner().invoke(app, [*arguments, "--output", str(tmp_path / "alone")])
    assert alone.exit_code == 1
    assert "out of luck" in alone.output
    both = CliRunner().invoke(app, [*arguments, "--solver", "exact", "--output", str(tmp_path / "both")])
    assert both.exit_code == 0
    assert "out of luck" in both.output


def test_a_part_has_a_time_limit(tmp_path: Path) -> None:
    import time

    class Slow(Narrow):
        def sample(self, reward, num_samples, **options) -> Posterior:
            try:
                while self.spread > 2:
                    time.sleep(0.01)
            except Exception:  # a solver that takes any error for one of its own
                while True:
                    time.sleep(0.01)
            return super().sample(reward, num_samples, **options)

    start = time.monotonic()
    found = invflow.compare(denoising(), {"slow": Slow(3.0), "fast": Slow(1.0)}, timeout=0.3, **SETTINGS)
    assert time.monotonic() - start < 20
    assert "0.3 s, the time limit" in found.failures["one name"]["slow"]
    assert list(found.values["one name"]) == ["fast"]
    with pytest.raises(ValueError, match="timeout=0"):
        invflow.compare(denoising(), {"fast": Narrow(1.0)}, timeout=0, **SETTINGS)
    time.sleep(0.4)  # the clock was stopped


def test_versions_are_those_of_the_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = {"invflow": "1", "torch": "2", "python": "3.10"}
    for place in ("_core.records", "evaluation.results.parts"):
        monkeypatch.setattr(f"invflow.{place}.versions", lambda: dict(first))
    invflow.compare(denoising(), {"mine": Narrow(1.0)}, output=tmp_path, **SETTINGS)
    # another Python goes on, and is named beside the first
    first["python"] = "3.12"
    found = invflow.compare(denoising(), {"mine": Narrow(1.0), "more": Narrow(0.5)}, output=tmp_path, **SETTINGS)
    assert found.versions["python"] == "3.10, 3.12"
    first["torch"] = "3"  # other code is another comparison
    with pytest.raises(ValueError, match="differs in versions"):
        invflow.compare(denoising(), {"mine": Narrow(1.0)}, output=tmp_path, **SETTINGS)


def test_parts_of_other_code_are_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A changed source of the library, of a solver or an operator, say, is another comparison, and calibration."""
    options = {"output": tmp_path / "calibrated", **CALIBRATION}
    invflow.compare(denoising(), {"mine": Narrow(1.0)}, output=tmp_path / "compared", **SETTINGS)
    invflow.calibrate(exact(0.5), linear(), generator=generator(), **options)
    monkeypatch.setattr("invflow._core.records.code_digest", lambda: "changed")
    with pytest.raises(ValueError, match="differs in versions"):
        invflow.compare(denoising(), {"mine": Narrow(1.0)}, output=tmp_path / "compared", **SETTINGS)
    with pytest.raises(ValueError, match="versions"):
        invflow.calibrate(exact(0.5), linear(), generator=generator(), **options)


def test_a_comparison_is_extended_without_computing_its_parts_again(tmp_path: Path) -> None:
    def run(count: int, size: int = 2, **solvers: Stops) -> Comparison:
        return invflow.compare(denoising(), solvers, output=tmp_path, num_observations=count, num_samples=4,
                               part_size=size)

    first, more, other, none = Stops(), Stops(), Stops(), Stops()
    three = run(3, a=first)
    assert [len(y) for y in first.seen] == [2, 1]
    # more observations: two more parts, of further measurements
    seven = run(7, a=more)
    assert [len(y) for y in more.seen] == [2, 2]
    measured = torch.cat([*first.seen, *more.seen])
    assert len({tuple(y.flatten().tolist()) for y in measured}) == 7
    assert seven.values["one name"]["a"]["crps"][:3] == three.values["one name"]["a"]["crps"]
    assert seven.seeds["one name"][:3] == three.seeds["one name"]
    # another solver, on the same measurements
    both = run(7, a=none, b=other)
    assert none.calls == 0
    assert torch.equal(torch.cat(other.seen), measured)
    assert both.values["one name"]["a"] == seven.values["one name"]["a"] == both.values["one name"]["b"]
    # parts keep the size that they have
    assert run(7, 7, a=none, b=none).values == both.values
    assert none.calls == 0
    truths = both.examples("one name", "a")["truth"]
    assert truths.unique(dim=0).shape == (4, 1, 4, 4)  # the fourth is a further one
    with pytest.raises(ValueError, match="num_observations=7"):
        run(3, a=none)


def test_extended_observations_of_a_set_are_its_next_images(tmp_path: Path) -> None:
    images = torch.rand(10, 1, 4, 4, generator=generator())
    posed = invflow.Problem("a set", None, Denoising((1, 4, 4)), 0.1, images=lambda split: images)
    for count in (3, 7, 10):
        found = invflow.compare(posed, {"a": Narrow(1.0)}, output=tmp_path, gallery=10,
                                **{**SETTINGS, "num_observations": count})
        assert torch.equal(found.examples("a set", "a")["truth"], images[:count])
    with pytest.raises(ValueError, match="has 10 test images, but 11"):
        invflow.compare(posed, {"a": Narrow(1.0)}, output=tmp_path, **{**SETTINGS, "num_observations": 11})


def test_tables_of_another_run_do_not_lie_beside_new_parts(tmp_path: Path) -> None:
    found = invflow.compare(denoising(), {"a": Stops()}, output=tmp_path, **SETTINGS)
    found.report(tmp_path / "report.html")
    with pytest.raises(KeyboardInterrupt):
        invflow.compare(denoising(), {"a": Stops(stop=1)}, output=tmp_path, **{**SETTINGS, "num_observations": 8})
    assert [path.name for path in tmp_path.iterdir()] == ["parts"]
    # a table of other solvers takes the page of the former ones with it, one of the same does not
    whole = tmp_path / "whole"
    invflow.compare(denoising(), {"a": Narrow(1.0), "b": Narrow(2.0)}, output=whole, **SETTINGS).report(
        whole / "report.html")
    invflow.compare(denoising(), {"a": Narrow(1.0), "b": Narrow(2.0)}, output=whole, **SETTINGS)
    assert (whole / "report.html").exists()
    invflow.compare(denoising(), {"a": Narrow(1.0)}, output=whole, **SETTINGS)
    assert not (whole / "report.html").exists()


# -- calibrations ------------------------------------------------------------------------------------------------------


def exact(std: float) -> invflow.Solver:
    own = linear().prior
    return invflow.ExactPosterior(invflow.GaussianMixtureFlow(own.means, std, own.log_weights.exp()))


CALIBRATION = {"num_simulations": 12, "num_samples": 9, "num_particles": 9, "chunk_size": 4, "source": "data"}


def bound(value: float) -> Callable[[Tensor, object], Tensor]:
    return lambda x, _: (x[..., 0] - value).abs()


@pytest.mark.parametrize(("changed", "where"), [
    ({"solver": exact(0.6)}, "solver"), ({"quantities": {"mine": bound(1.0)}}, "quantities"),
])
def test_a_calibration_is_not_taken_for_another(tmp_path: Path, changed: dict, where: str,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    def run(solver: invflow.Solver | None = None, quantities: dict | None = None) -> invflow.Certificate:
        return invflow.calibrate(solver or exact(0.5), linear(), output=tmp_path, generator=generator(),
                                 quantities=quantities or {"mine": bound(0.5)}, **CALIBRATION)

    first = run()
    with pytest.raises(ValueError, match=f"its content was .*'{where}'"):
        run(**changed)
    monkeypatch.setattr("invflow.evaluation.calibrate._simulate", lambda *_: pytest.fail("computed again"))
    assert str(run()) == str(first)


def test_a_calibration_of_another_problem_by_that_name_is_refused(tmp_path: Path) -> None:
    def posed(matrix: float) -> invflow.Problem:
        own = linear()
        return invflow.Problem("one name", None, MatrixOperator(torch.tensor([[matrix, 1.0]])), 0.5,
                               sampler=lambda n, g: torch.zeros(n, 2), prior=lambda: own.prior)

    for matrix in (1.0, 2.0):
        options = {"output": tmp_path, "generator": generator(), **CALIBRATION}
        if matrix == 1.0:
            invflow.calibrate(exact(0.5), posed(matrix), **options)
        else:
            with pytest.raises(ValueError, match="'truths and measurements'"):
                invflow.calibrate(exact(0.5), posed(matrix), **options)


def test_a_calibration_that_cannot_be_identified_does_not_go_on(tmp_path: Path) -> None:
    options = {"output": tmp_path, "generator": generator(), **CALIBRATION}
    assert invflow.calibrate(Unknown(), denoising(), **options).num_simulations == 12
    with pytest.raises(ValueError, match="cannot determine whether they have the same solver"):
        invflow.calibrate(Unknown(), denoising(), **{**options, "generator": generator()})


def test_the_certificate_of_an_earlier_run_goes_before_new_simulations(tmp_path: Path) -> None:
    options = {"output": tmp_path, "generator": generator(), **CALIBRATION}
    invflow.calibrate(exact(0.5), linear(), **options)
    (tmp_path / "certificate.md").write_text("as the command line writes it")
    (tmp_path / "simulations.safetensors").unlink()

    class Dies(Narrow):
        def sample(self, *args, **options) -> Posterior:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        invflow.calibrate(Dies(1.0), linear(), **{**options, "generator": generator()})
    assert list(tmp_path.iterdir()) == []


def test_content_is_the_same_in_every_process(tmp_path: Path) -> None:
    """Else nothing would be resumed after a kill."""
    program = ("import sys, torch, invflow\n"
               "problem = invflow.load_problem('mnist/super-resolution')\n"
               "invflow.compare(problem, ['lmmse', 'vfm'], num_observations=2, num_samples=4, output=sys.argv[1])\n")
    times = []
    for _ in range(2):
        subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True, capture_output=True)
        parts = sorted(tmp_path.glob("parts/*/*/*"))
        assert len(parts) == 2
        times.append([path.stat().st_mtime_ns for path in parts])
    assert times[0] == times[1]
    assert not json.loads((tmp_path / "comparison.json").read_text())["failures"]["mnist/super-resolution"]
