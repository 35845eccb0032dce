"""Search: the maximiser is found, modes are lost, the budget is kept, and the best of N is an order statistic."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from tilting_models import Gaussian, Row, Tilt
from torch import Tensor

from invflow import FunctionReward, GaussianLikelihood, GaussianMixtureFlow
from invflow.posterior import Posterior
from invflow.registry import solver_by_name
from invflow.solvers.search import BeamSearch, BestOfN, SearchSolver, TopKSearch, largest
from invflow.solvers.tilting.fmtt import FMTT
from invflow.testing import check_solver

F64 = torch.float64
TARGET = torch.tensor([4.8, 0.0])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@functools.cache
def ring() -> GaussianMixtureFlow:
    angle = 2 * math.pi * torch.arange(8) / 8
    return GaussianMixtureFlow(4.8 * torch.stack([angle.cos(), angle.sin()], 1), std=0.5**0.5, steps=3)


def right_half(x: Tensor) -> Tensor:
    return -x[:, 0].clamp(max=0) ** 2


def modes(x: Tensor) -> float:
    """How many of the ring's modes a set of points stands for: the exponential of the entropy of their shares."""
    nearest = torch.cdist(x, ring().means.to(x)).argmin(-1)
    shares = torch.nn.functional.one_hot(nearest, 8).double().mean(-2)
    return float(torch.special.entr(shares).sum(-1).exp().mean())


SEARCHES = {
    "top-k": lambda prior: TopKSearch(prior, budget=60, k=4, look_ahead="denoiser"),
    "beam": lambda prior: BeamSearch(prior, budget=200, branches=4),
    "best-of-n": lambda prior: BestOfN(prior, budget=900),
    "multi-best-of-n": lambda prior: BestOfN(prior, budget=900, selections=4),
}


@pytest.mark.parametrize("name", SEARCHES)
def test_the_maximiser_is_found(name: str) -> None:
    near = Tilt(lambda x: -(x - TARGET).square().sum(1), 2)
    result = SEARCHES[name](ring()).sample(near, 16, generator=generator())
    best = result.diagnostics["reward"].max(1)
    assert (best.values > -0.05).all()
    found = result.samples[torch.arange(2), best.indices]
    assert ((found - TARGET).norm(dim=1) < 0.25).all()
    torch.testing.assert_close(near(result.samples), result.diagnostics["reward"])
    # more is found than an average draw of the prior has to offer, in every sample
    prior = near(ring().sample(2000, generator=generator()).expand(2, -1, 2))
    assert result.diagnostics["reward"].mean() > prior.mean()


def test_selection_collapses_modes() -> None:
    """The published finding: search reaches the half-plane, and few of its modes are left (arXiv 2511.22688)."""
    reward, counts, shares = Tilt(right_half, 8), [], []
    for selections in (1, 4, 12):
        solver = TopKSearch(ring(), budget=60, k=4, selections=selections, look_ahead="denoiser")
        found = solver.sample(reward, 64, generator=generator())
        counts.append(modes(found.samples))
        shares.append(float((found.samples[..., 0] > 0).double().mean()))
        assert (found.diagnostics["distinct_ancestors"] <= 4).all()
    sampler = FMTT(ring(), steps=30, look_ahead="denoiser", chunk_size=10**6)
    tilted = sampler.sample(reward, 500, generator=generator())
    posterior = modes(tilted.resample(64, generator=generator()).samples)
    assert min(shares[1:]) > 0.97
    assert 4 < posterior < 6  # three modes on the right, and two on the border
    assert counts[0] < posterior
    assert counts[2] < counts[0]
    assert counts[2] < 2.5


def test_beams_compete_and_best_of_n_does_not() -> None:
    reward = Tilt(right_half, 4)
    beams = BeamSearch(ring(), budget=300).sample(reward, 32, generator=generator())
    apart = BestOfN(ring(), budget=300, selections=3).sample(reward, 32, generator=generator())
    assert (beams.diagnostics["distinct_ancestors"] < 32).all()
    assert (apart.diagnostics["distinct_ancestors"] == 32).all()


class Line(Gaussian):
    """N(0, 1), in one dimension."""

    state_shape = image_shape = (1,)


@pytest.mark.parametrize("candidates", [1, 2, 5, 20])
def test_best_of_n_is_an_order_statistic(candidates: int) -> None:
    """For N(0, 1) and r(x) = x, the normal CDF of the best draw is Beta(N, 1), with mean N / (N + 1)."""
    count = 4000
    found = BestOfN(Line(), budget=candidates).sample(FunctionReward(lambda x: x[:, 0]), count, generator=generator())
    rank = torch.special.ndtr(found.samples.double())
    error = math.sqrt(candidates / ((candidates + 1) ** 2 * (candidates + 2)) / count)
    assert abs(float(rank.mean()) - candidates / (candidates + 1)) < 4 * error
    square, fourth = candidates / (candidates + 2), candidates / (candidates + 4)
    assert abs(float(rank.square().mean()) - square) < 4 * math.sqrt((fourth - square**2) / count)


def test_more_selections_never_lose_the_best_so_far() -> None:
    states = list(BestOfN(ring(), budget=900, selections=5).iterate(Tilt(right_half, 2), 8, generator=generator()))
    rewards = torch.stack([s.rewards for s in states])
    assert (rewards.diff(dim=0) >= 0).all()
    assert [s.time for s in states] == [0, 0.2, 0.4, 0.6, 0.8]


# -- the budget --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("make", "used"), [
    (lambda p: BestOfN(p, budget=17), 17),
    (lambda p: BestOfN(p, budget=17, selections=3), 15),
    (lambda p: BestOfN(p, budget=17, selections=3, steps=2), 12),
    (lambda p: BeamSearch(p, budget=17, branches=4), 16),
    (lambda p: BeamSearch(p, budget=17, branches=3, steps=2), 12),
    (lambda p: TopKSearch(p, budget=50, selections=2), 49),  # 2 K forward and K - 2 backward
    (lambda p: TopKSearch(p, budget=50, selections=2, look_ahead="denoiser"), 50),  # K and K - 2
    (lambda p: TopKSearch(p, budget=50, selections=2, look_ahead="denoiser", kernel="ancestral"), 50),
    (lambda p: TopKSearch(p, budget=50, selections=2, kernel="renoise"), 47),  # 4 K - 3, less two jumps to u = 1
])
def test_the_budget_is_kept_and_the_count_is_the_one_measured(make: Any, used: int) -> None:
    solver = make(Gaussian())
    reward = FunctionReward(lambda x: -x.square().sum(1))
    with solver.prior.count() as calls:
        result = solver.sample(reward, 6, generator=generator())
    assert result.diagnostics["calls"] == used <= solver.budget == result.diagnostics["budget"]
    assert result.nfe.forward + result.nfe.backward == used
    if not isinstance(solver, TopKSearch):  # which tries what a path costs beforehand
        assert calls.forward + calls.backward == 6 * used
    path = result.diagnostics["calls_path"]
    assert path[-1] == used
    assert path == sorted(path)


@pytest.mark.parametrize("make", [
    lambda: BestOfN(ring(), budget=400, selections=3), lambda: BeamSearch(ring(), budget=400),
    lambda: TopKSearch(ring(), budget=400, selections=3),
])
def test_the_budget_counts_every_velocity_of_an_ode(make: Any) -> None:
    solver: SearchSolver = make()
    result = solver.sample(Tilt(right_half, 2), 5, generator=generator())
    assert 300 < result.diagnostics["calls"] <= 400


@pytest.mark.parametrize(("make", "message"), [
    (lambda: BestOfN(Gaussian(), budget=2, selections=3), "pass budget=3 or more"),
    (lambda: BeamSearch(Gaussian(), budget=3, branches=4), "pass budget=4 or more"),
    (lambda: TopKSearch(Gaussian(), budget=5, selections=4).sample(FunctionReward(lambda x: -x.square().sum(1)), 2),
     "pass budget=13 or more"),
    (lambda: BestOfN(Gaussian(), budget=0), "at least 1"), (lambda: BestOfN(Gaussian(), budget=2.5), "whole number"),
    (lambda: BestOfN(Gaussian(), selections=0), "selections=0"), (lambda: BeamSearch(Gaussian(), branches=0), "branch"),
    (lambda: TopKSearch(Gaussian(), k=0), "k=0"), (lambda: TopKSearch(Gaussian(), look_ahead="map"), "flow_map"),
    (lambda: TopKSearch(Gaussian(), time_grid=[0.0, 1.0]), "one by one"),
    (lambda: TopKSearch(Gaussian(), k=9).sample(FunctionReward(lambda x: x[:, 0]), 4), "pass num_samples=9"),
    (lambda: BestOfN(Gaussian()).sample(FunctionReward(lambda x: x[:, 0]), 0), "at least one sample"),
    (lambda: BestOfN(Gaussian()).sample(FunctionReward(lambda x: (x[:, 0] * 0).log()), 2), "reward is NaN|-inf"),
])
def test_what_cannot_be_met_is_refused(make: Any, message: str) -> None:
    if "NaN" in message:
        make = lambda: BestOfN(Gaussian()).sample(FunctionReward(lambda x: x[:, 0] * math.nan), 2)  # noqa: E731
    with pytest.raises(ValueError, match=message):
        make()


def test_only_flow_maps_are_searched() -> None:
    with pytest.raises(TypeError, match="FlowMap, not a str"):
        BestOfN("mnist")  # type: ignore[arg-type]


def test_largest() -> None:
    assert [largest(lambda n: n * n <= 50, 1, high) for high in (3, 7, 100)] == [3, 7, 7]
    assert largest(lambda n: False, 4, 2) == 4


# -- the contract of a solver ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [
    lambda p: BestOfN(p, budget=6, selections=2), lambda p: BeamSearch(p, budget=6, branches=2),
    lambda p: TopKSearch(p, budget=40, k=3, selections=2),
], ids=["best-of-n", "beam", "top-k"])
def test_contract(make: Any) -> None:
    check_solver(make, exact=False, num_samples=24)


@pytest.mark.parametrize("name", SEARCHES)
def test_chunks_change_nothing_and_black_boxes_are_searched(name: str) -> None:
    prior = GaussianMixtureFlow(ring().means.double(), std=0.7, steps=3)
    results: list[Posterior] = []
    for size in (5, 10**6):
        solver = SEARCHES[name](prior)
        solver.chunk_size = size
        results.append(solver.sample(Tilt(right_half, 2, differentiable=False), 7, generator=generator()))
    torch.testing.assert_close(results[0].samples, results[1].samples, rtol=1e-9, atol=1e-9)
    assert results[0].nfe.backward == 0


@pytest.mark.parametrize("name", SEARCHES)
def test_results_are_labelled_as_search(name: str, tmp_path: Any) -> None:
    result = SEARCHES[name](ring()).sample(Tilt(right_half, 2), 6, generator=generator())
    assert result.ess() is None
    assert not result.weighted
    assert result.log_evidence is None
    assert result.settings["kind"] == result.diagnostics["kind"] == "search"
    assert "ptimisation" in (type(SEARCHES[name](ring())).__doc__ or "")
    result.save(tmp_path / "found.safetensors")
    assert Posterior.load(tmp_path / "found.safetensors").settings["kind"] == "search"


def test_a_likelihood_is_searched_for_each_observation() -> None:
    likelihood = GaussianLikelihood(Row(torch.eye(2)), torch.tensor([[4.8, 0.0], [0.0, -4.8]]), sigma=0.5)
    found = BestOfN(ring(), budget=1800).sample(likelihood, 4, generator=generator())
    assert ((found.samples - likelihood.y[:, None]).norm(dim=2) < 1).all()


@pytest.mark.parametrize(("name", "kind"), [("top-k", TopKSearch), ("beam", BeamSearch), ("best-of-n", BestOfN)])
def test_they_are_registered_by_name(name: str, kind: type) -> None:
    assert isinstance(solver_by_name(name, ring(), budget=200), kind)
