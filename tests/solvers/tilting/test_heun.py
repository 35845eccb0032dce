"""Jarzynski weights along Heun's steps: second order in the step, while Euler-Maruyama is first order."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tilting_models import Gaussian, Tilt

from invflow import FMTT, FunctionReward
from invflow.reward import RepeatedReward
from invflow.solvers.tilting.cost import path_calls
from invflow_problems.half_plane import left_penalty, ring_of_gaussians, tilted_expectations

F64 = torch.float64


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("look_ahead", ["flow_map", "denoiser", "none"])
def test_the_bias_falls_with_the_square_of_the_step(look_ahead: str) -> None:
    """The tilted mean of N(0, I) with r = -|x - 1|^2 / 2 is 1/2."""
    reward = RepeatedReward(FunctionReward(lambda x: -0.5 * (x - 1).square().sum(1)), 10)
    steps, biases = [3, 4, 6], []
    for count in steps:
        solver = FMTT(Gaussian(), steps=count, weights="jarzynski", kernel="heun", look_ahead=look_ahead,
                      chunk_size=10**6, resample_threshold=0.0)
        biases.append(float(0.5 - solver.sample(reward, 8000, generator=generator(7)).mean().mean()))
    # measured so: 0.014 to 0.018 at 4 steps, where Euler's are off by 0.07 (errors of 0.0013)
    assert 0 < biases[1] < 0.025
    x, y = torch.tensor(steps, dtype=F64).log(), torch.tensor(biases, dtype=F64).log()
    x = x - x.mean()
    assert float(x @ y / (x @ x)) < -1.5


def test_the_ring_at_25_steps() -> None:
    """32 runs of 600 particles; along Euler-Maruyama the share is off by 0.018."""
    reward, distances = Tilt(left_penalty, 32), {}
    truth = tilted_expectations()
    exact = torch.tensor([truth["share x0 > 0"], truth["reward"]], dtype=F64)
    for kernel in ("sde", "heun"):
        solver = FMTT(ring_of_gaussians(steps=4), steps=25, weights="jarzynski", kernel=kernel, chunk_size=10**6)
        posterior = solver.sample(reward, 600, generator=generator(1))
        values = torch.stack([(posterior.samples[..., 0] > 0).double(),
                              left_penalty(posterior.samples.flatten(0, 1)).view(32, 600).double()], dim=2)
        each = (posterior.weights.double()[..., None] * values).sum(1)
        distances[kernel] = float(((each.mean(0) - exact).abs() / (each.std(0) / math.sqrt(32))).max())
    assert distances["heun"] < 3, distances
    assert distances["sde"] > 5, distances


@pytest.mark.parametrize(("settings", "forward", "backward"), [
    ({}, 2 * (5 + 4), 3 + 4),  # each state's, and at what each step but the last predicts
    ({"look_ahead": "denoiser"}, 5 + 4, 5 + 4),
    ({"look_ahead": "none"}, 5 + 4 + 1, 0),
])
def test_cost_is_counted(settings: dict[str, Any], forward: int, backward: int) -> None:
    reward = FunctionReward(lambda x: -x.square().sum(1))
    solver = FMTT(Gaussian(), steps=5, weights="jarzynski", kernel="heun", chunk_size=5, **settings)
    posterior = solver.sample(reward, 12, generator=generator())
    assert (posterior.nfe.forward, posterior.nfe.backward) == (forward, backward)
    assert path_calls(solver, reward) == (forward, backward)


def test_the_base_sampler_is_the_dynamics_without_a_reward() -> None:
    """A reward of nothing leaves its law: the same moments, and weights of one."""
    prior = ring_of_gaussians(steps=4)
    solver = FMTT(prior, steps=8, weights="jarzynski", kernel="heun", chunk_size=10**6)
    posterior = solver.sample(FunctionReward(lambda x: 0.0 * x.sum(1)), 4000, generator=generator(1))
    assert float(posterior.ess()[0]) == pytest.approx(4000)
    one, two = posterior.samples[0], solver.prior_samples(4000, generator=generator(2))
    for f in (lambda x: x, lambda x: x.square(), lambda x: (x[:, :1] * x[:, 1:]).square()):
        a, b = f(one.double()), f(two.double())
        assert (((a.mean(0) - b.mean(0)).abs() / ((a.var(0) + b.var(0)) / 4000).sqrt()) < 4).all()
