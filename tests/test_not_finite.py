"""NaN or +inf in a reward or in the map's output stops a solver: its name, the step, the observation, the particle."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tilting_models import Gaussian
from torch import Tensor

import invflow
from invflow import FMTT, BeamSearch, BestOfN, NoiseRTO, NoiseSMC, TopKSearch, TwistedDiffusion
from invflow.likelihood import GaussianLikelihood
from invflow.models.adapter import Adapter
from invflow.operators import Denoising
from invflow.reward import Reward
from invflow.solvers.noise.target import NoiseTarget

B, N = 3, 5
OBSERVATION, PARTICLE = 1, 3


class Broken(Reward):
    """A smooth reward of B observations that takes another value once, at one particle of one observation."""

    def __init__(self, call: int, value: float, operator: Any = None) -> None:
        self.num_observations, self.index, self.value, self.operator = B, torch.arange(B), value, operator
        self.calls = [call]  # shared with what select makes

    def select(self, index: Any) -> Reward:
        other = copy.copy(self)
        other.index = self.index[index]
        other.num_observations = len(other.index)
        return other

    def __call__(self, x: Tensor) -> Tensor:
        scores = -0.5 * x.nan_to_num().flatten(2).square().sum(2)
        places = (self.index[:, None].expand(x.shape[:2]) == OBSERVATION).flatten().nonzero()[:, 0]
        if len(places) == 0:
            return scores
        self.calls[0] -= 1
        if self.calls[0] != -1:
            return scores
        where = torch.arange(scores.numel()) == places[PARTICLE]
        return torch.where(where.view_as(scores), self.value, scores)


class BrokenMap(Gaussian):
    """A map whose output is NaN once, at one row."""

    def __init__(self, call: int) -> None:
        super().__init__()
        self.call = call

    def jump(self, x: Tensor, s: Any, t: Any) -> Tensor:
        moved = super().jump(x, s, t)
        self.call -= 1
        if self.call != -1:
            return moved
        where = (torch.arange(len(x)) == OBSERVATION * N + PARTICLE)[:, None]
        return torch.where(where, torch.nan, moved)

    def velocity(self, x: Tensor, t: Any) -> Tensor:
        return super().velocity(x, t)


def place(solver: str, what: str, step: str) -> str:
    return rf"{solver}: the {what}.* is NaN or infinite at {step}.*observation {OBSERVATION}, particle {PARTICLE}:"


def sample(solver: Any, reward: Reward) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return solver.sample(reward, N, generator=torch.Generator().manual_seed(0))


CASES: dict[str, tuple[Callable[..., Any], str, int, str]] = {
    # solver, its name, the call of the reward, the step of that call
    "fmtt-start": (lambda p: FMTT(p, steps=4), "FMTT", 0, "step 0 of 4"),
    "fmtt": (lambda p: FMTT(p, steps=4), "FMTT", 2, "step 2 of 4"),
    "fmtt-chunks": (lambda p: FMTT(p, steps=4, chunk_size=N), "FMTT", 4, "step 4 of 4"),
    "fmtt-renoise": (lambda p: FMTT(p, steps=4, kernel="renoise", diffusion=0.0), "FMTT", 3, "step 3 of 4"),
    "tds": (lambda p: TwistedDiffusion(p, steps=4), "TwistedDiffusion", 1, "step 1 of 4"),
    "top-k": (lambda p: TopKSearch(p, budget=40, selections=2), "TopKSearch", 1, "step 1 of"),
    "best-of-n": (lambda p: BestOfN(p, budget=6, selections=2), "BestOfN", 4, "step 2 of 2"),
    "beam": (lambda p: BeamSearch(p, budget=12, branches=2), "BeamSearch", 2, "step 2 of"),
    "smc-start": (lambda p: NoiseSMC(p), "NoiseSMC", 0, "step 0"),
    "smc": (lambda p: NoiseSMC(p, num_moves=2, temperatures=[0.2, 0.6, 1.0]), "NoiseSMC", 3, "step 2, move 1 of 2"),
    "smc-hamiltonian": (lambda p: NoiseSMC(p, moves="hamiltonian", num_moves=1, leapfrog_steps=2,
                                           temperatures=[0.5, 1.0]), "NoiseSMC", 4, "step 2, move 1 of 1"),
    "smc-weights": (lambda p: NoiseSMC(p, num_moves=0), "NoiseSMC", 0, "step 0"),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_reward_that_is_not_finite_is_named_with_its_place(name: str, value: float) -> None:
    make, solver, call, step = CASES[name]
    with pytest.raises(ValueError, match=place(solver, "reward", step)):
        sample(make(Gaussian()), Broken(call, value))


@pytest.mark.parametrize(("name", "call", "what"), [
    ("fmtt", 2, "image"), ("smc", 3, "image"), ("best-of-n", 3, "image"), ("top-k", 1, "image"),
])
def test_a_map_that_is_not_finite_is_named_though_the_reward_takes_no_notice(name: str, call: int, what: str) -> None:
    make, solver, _, _ = CASES[name]
    reward = Broken(10**6, 0.0)  # it counts NaN as 0
    prior = BrokenMap(call)
    try:
        running = make(prior)
    except ValueError:
        raise AssertionError("the settings were refused") from None
    prior.call = call  # searches have tried a jump or two to know its cost
    with pytest.raises(ValueError, match=place(solver, what, "step")):
        sample(running, reward)


class NanOnce(Denoising):
    """An operator that measures NaN once, at one row."""

    def __init__(self, call: int) -> None:
        super().__init__((3,))
        self.calls = [call]

    def forward(self, x: Tensor) -> Tensor:
        self.calls[0] -= 1
        where = (torch.arange(len(x)) == OBSERVATION * N + PARTICLE)[:, None]
        return torch.where(where, torch.nan, x) if self.calls[0] == -1 else x.clone()


def observed(operator: Any) -> GaussianLikelihood:
    y = torch.tensor([[0.5, 0.1, 0.0], [0.2, -0.4, 1.0], [1.0, 1.0, -1.0]])
    return GaussianLikelihood(operator, y, sigma=0.5)


@pytest.mark.parametrize(("call", "step"), [(0, "iteration 0"), (1, "iteration 1")])
@pytest.mark.parametrize("source", ["reward", "image"])
def test_randomise_then_optimise_names_the_place(call: int, step: str, source: str) -> None:
    operator, prior = Denoising((3,)), Gaussian()
    if source == "reward":
        operator = NanOnce(10**6)
    likelihood = observed(operator)
    if source == "reward":
        operator.calls[0] = call
    else:
        prior = BrokenMap(call)
    with pytest.raises(ValueError, match=place("NoiseRTO", source, step)):
        sample(NoiseRTO(prior), likelihood)


def test_weighted_draws_name_the_place() -> None:
    with pytest.raises(ValueError, match=r"NoiseRTO: the image .*iteration 0, observation 1, particle 3"):
        sample(NoiseRTO(LateMap(B * N), weights=True), observed(Denoising((3,))))


class LateMap(BrokenMap):
    """As above, at the first call with so many rows: those before are of one row for each observation."""

    def __init__(self, rows: int) -> None:
        super().__init__(-1)
        self.rows = rows

    def jump(self, x: Tensor, s: Any, t: Any) -> Tensor:
        self.call = 0 if len(x) == self.rows else 10
        return super().jump(x, s, t)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_importance_weights_of_vfm_name_the_place(value: float) -> None:
    options = {"width": 8, "depth": 1, "embedding": 8}
    prior = invflow.NeuralFlowMap((3,), network="mlp", options=options, generator=torch.Generator().manual_seed(0))
    adapter = Adapter((3,), classes=["tilt"], network="mlp", options=options, trained_for=prior.fingerprint(),
                      generator=torch.Generator().manual_seed(1))
    reward = Broken(0, value)
    reward.problem_class = "tilt"  # type: ignore[attr-defined]
    vfm = invflow.VFM(prior, adapter, steps=2, importance=True)
    with pytest.raises(ValueError, match=place("VFM", "reward", "after 2 of 2 steps")):
        sample(vfm, reward)
    whole = prior.average_velocity
    row = (torch.arange(B * N) == OBSERVATION * N + PARTICLE)[:, None]
    prior.average_velocity = lambda x, s, t: torch.where(row, torch.nan, whole(x, s, t))  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=place("VFM", "image", "after 2 of 2 steps")):
        sample(invflow.VFM(prior, adapter, steps=2), reward)


def test_samplers_of_independent_rows_name_the_place() -> None:
    class NanVelocity(Gaussian):
        def velocity(self, x: Tensor, t: Any) -> Tensor:
            where = (torch.arange(len(x)) == OBSERVATION * N + PARTICLE)[:, None]
            return torch.where(where, torch.nan, super().velocity(x, t))

    with pytest.raises(ValueError, match=place("Flower", "image", "its end")):
        sample(invflow.Flower(NanVelocity(), steps=3), observed(Denoising((3,))))


def test_noise_too_far_out_is_never_accepted_and_no_error() -> None:
    """A trial step may lead where a network overflows; within a hundred deviations it must not."""
    class Overflowing(Gaussian):
        def jump(self, x: Tensor, s: Any, t: Any) -> Tensor:
            return torch.where(x.abs() > 50, torch.inf, x)

    target = NoiseTarget(Overflowing(), invflow.FunctionReward(lambda x: -x.nan_to_num(posinf=0.0).square().sum(1)))
    noise = torch.zeros(4, 3)
    noise[2] = 101.0
    found = target.evaluate_rows(noise, torch.tensor([0, 0, 0, 0]))
    assert found.log_reward.tolist() == [0.0, 0.0, -math.inf, 0.0]
    noise[1] = 51.0
    target.where = "step 3, move 2 of 5"
    with pytest.raises(ValueError, match=r"image of the flow map.*step 3, move 2 of 5, observation 0, particle 1:"):
        target.evaluate_rows(noise, torch.tensor([0, 0, 0, 0]))
    with pytest.raises(ValueError, match="observation 0, particle 17:"):
        target.evaluate_rows(noise, torch.tensor([0, 0, 0, 0]), torch.tensor([4, 17, 20, 21]))


def test_minus_infinity_is_a_weight_of_zero() -> None:
    for make in (lambda p: FMTT(p, steps=3), lambda p: NoiseSMC(p, num_moves=1), lambda p: BestOfN(p, budget=4)):
        assert bool(sample(make(Gaussian()), Broken(0, -math.inf)).samples.isfinite().all())
