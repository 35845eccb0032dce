"""FMTT as a state machine: a step is a function of its state and its noise, and its cost is known in advance."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch

from invflow import FMTT, FunctionReward, GaussianLikelihood, GaussianMixtureFlow
from invflow.operators import MatrixOperator
from invflow.solvers.tilting.cost import path_calls
from invflow.solvers.tilting.particles import Particles
from invflow.solvers.tilting.proposals import GradientShift

pytestmark = pytest.mark.filterwarnings("ignore:FMTT has not converged")

SETTINGS: list[dict[str, Any]] = [
    {}, {"kernel": "renoise"}, {"kernel": "renoise", "diffusion": math.inf, "look_ahead_steps": 2},
    {"kernel": "ancestral", "look_ahead": "denoiser"}, {"kernel": "ancestral", "look_ahead": "none"},
    {"weights": "jarzynski", "look_ahead": "denoiser"}, {"weights": "jarzynski", "kernel": "heun"},
    {"proposal": "conjugate"}, {"proposal": "conjugate", "kernel": "ancestral", "look_ahead": "denoiser"},
    {"proposal": "conjugate", "kernel": "renoise"}, {"schedule": lambda t: max(0.0, 2 * t - 1)}]


def posed() -> tuple[GaussianMixtureFlow, GaussianLikelihood]:
    prior = GaussianMixtureFlow(torch.tensor([[-2.0, 0.0], [2.0, 0.0], [0.0, 1.0]]).double(), std=0.5, steps=3)
    operator = MatrixOperator(torch.tensor([[1.0, 0.2]]).double(), image_shape=(2,))
    return prior, GaussianLikelihood(operator, torch.tensor([[1.0], [-1.0]]).double(), sigma=0.3)


def tensors(state: Particles) -> list[torch.Tensor]:
    fields = [getattr(state, field.name) for field in dataclasses.fields(state)]
    return [value for value in (*fields, *state.look, state.task.gains) if isinstance(value, torch.Tensor)]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_step_leaves_its_state_as_it_was(settings: dict[str, Any]) -> None:
    prior, reward = posed()
    solver = FMTT(prior, steps=3, resample_threshold=1.0, **settings)
    state = solver.init(reward, 6, generator=generator(0))
    while state.index < solver.steps:
        before = [value.clone() for value in tensors(state)]
        one, info = solver.step(state, generator=generator(7))
        assert all(torch.equal(old, now) for old, now in zip(before, tensors(state)))
        two, again = solver.step(state, generator=generator(7))  # of the same state and noise, the same
        assert all(torch.equal(a, b) for a, b in zip(tensors(one), tensors(two)))
        assert torch.equal(info.log_increments, again.log_increments)
        with pytest.raises(dataclasses.FrozenInstanceError):
            state.index = 0  # type: ignore[misc]
        state = one
    with pytest.raises(ValueError, match=r"all 3 steps are done: start again with init\(reward, num_samples\)"):
        solver.step(state, generator=generator(7))


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("black_box", [False, True])
def test_the_bill_is_what_a_path_costs(settings: dict[str, Any], black_box: bool) -> None:
    if black_box and (settings.get("proposal") == "conjugate" or settings.get("weights") == "jarzynski"):
        pytest.skip("they take no such reward")
    prior, likelihood = posed()
    reward = FunctionReward(lambda x: -x.square().sum(1), differentiable=False) if black_box else likelihood
    solver = FMTT(prior, steps=4, **settings)
    posterior = solver.sample(reward, 5, generator=0)
    assert path_calls(solver, reward) == (posterior.nfe.forward, posterior.nfe.backward)


def test_a_bill_calls_no_network_and_no_reward_of_a_user() -> None:
    prior, _ = posed()

    def never(x: torch.Tensor) -> torch.Tensor:
        raise AssertionError("the reward was evaluated")

    with prior.count() as calls:
        path_calls(FMTT(prior, steps=4), FunctionReward(never))
    assert calls.forward == calls.backward == 0


def test_settings_that_do_not_fit_say_so() -> None:
    prior, _ = posed()
    for settings, words in (({"weights": "jarzynski", "kernel": "renoise"}, "not the jumps of kernel='renoise'"),
                            ({"kernel": "heun"}, "weights='twisted' needs the density of the steps"),
                            ({"kernel": "heun", "weights": "none"}, "weights='none' needs the density of the steps"),
                            ({"weights": "jarzynski", "proposal": "conjugate"}, "guided by the reward's gradient"),
                            ({"max_shift": 0}, "max_shift=0"), ({"resampling": "twice"}, "no resampling 'twice'"),
                            ({"resample_threshold": 2}, "resample_threshold=2"), ({"weights": "w"}, "no weights 'w'")):
        with pytest.raises(ValueError, match=words):
            FMTT(prior, **settings)
    with pytest.raises(ValueError, match="strength=0"):
        GradientShift(strength=0)
