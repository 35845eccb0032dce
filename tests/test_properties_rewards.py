"""Properties of every reward: observations and particles can be split anywhere, and nothing else changes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from property_tools import assert_near, dtypes, generator, property_test, seeds, tensor
from torch import Tensor

import invflow
from invflow import FunctionReward, GaussianLikelihood, PoissonLikelihood
from invflow.likelihood import Likelihood
from invflow.operators import Blur, Denoising, MatrixOperator, RandomInpainting, SuperResolution
from invflow.reward import RepeatedReward, Reward, ScaledReward, SumReward
from invflow.rewards.images import ClassReward, MaskMatchReward, MirrorReward, RotationReward

SHAPE = (1, 4, 4)
ROUNDING = {torch.float32: 3e-5, torch.float64: 1e-10}


def _operator(draw: Any, seed: int, count: int) -> invflow.Operator:
    return draw(st.sampled_from([
        lambda: Denoising(SHAPE), lambda: SuperResolution(SHAPE, factor=2),
        lambda: RandomInpainting(SHAPE).randomize(count, generator(seed)),
        lambda: Blur(tensor(seed, count, 1, 3, 3).abs(), SHAPE),
        lambda: MatrixOperator(tensor(seed, count, 5, 16).abs(), image_shape=SHAPE),
    ]))()


def _levels(draw: Any, seed: int, count: int) -> float | Tensor:
    return draw(st.sampled_from([0.3, 0.1 + tensor(seed, count).abs()]))


def _gaussian(draw: Any, seed: int, count: int) -> Reward:
    operator = _operator(draw, seed, count).double()
    y = tensor(seed + 1, count, *operator.measurement_shape)
    return GaussianLikelihood(operator, y, sigma=_levels(draw, seed + 2, count))


def _poisson(draw: Any, seed: int, count: int) -> Reward:
    operator = _operator(draw, seed, count).double()
    y = (3 * tensor(seed + 1, count, *operator.measurement_shape)).abs().round()
    return PoissonLikelihood(operator, y, gain=_levels(draw, seed + 2, count), background=0.2)


def _function(draw: Any, seed: int, count: int) -> Reward:
    weight = tensor(seed, *SHAPE)
    return FunctionReward(lambda x: (weight.to(x) * x.sin()).flatten(1).sum(1), differentiable=draw(st.booleans()))


#: by class: a reward of ``count`` observations, or of any number
BUILDERS: dict[type[Reward], Callable[[Any, int, int], Reward]] = {
    GaussianLikelihood: _gaussian, PoissonLikelihood: _poisson, FunctionReward: _function,
    SumReward: lambda d, s, c: _gaussian(d, s, c) + _function(d, s + 5, c) + _poisson(d, s + 7, c),
    ScaledReward: lambda d, s, c: -0.7 * _gaussian(d, s, c),
    RepeatedReward: lambda d, s, c: RepeatedReward(_function(d, s, c), c),
    MaskMatchReward: lambda d, s, c: MaskMatchReward(tensor(s, *SHAPE), tensor(s + 1, 4, 4) > -1.5, 0.4),
    MirrorReward: lambda d, s, c: MirrorReward(0.3), RotationReward: lambda d, s, c: RotationReward(0.3),
}
#: not from here: they take trained networks, and are tested with them
ELSEWHERE = {ClassReward}
ELSEWHERE_MODULES = ("invflow.rewards.vision",)


def _kinds(of: type) -> Iterator[type]:
    for kind in of.__subclasses__():
        yield kind
        yield from _kinds(kind)


def test_every_reward_has_its_builder() -> None:
    public = {kind for kind in _kinds(Reward)
              if kind.__module__.startswith("invflow.") and not kind.__name__.startswith("_")
              and kind.__module__ not in ELSEWHERE_MODULES}
    assert public - {Likelihood} - ELSEWHERE <= set(BUILDERS), "say in BUILDERS how to make the new one"


@pytest.mark.parametrize("kind", BUILDERS, ids=lambda kind: kind.__name__)
def test_rewards_may_be_cut_anywhere(kind: type[Reward], device: torch.device) -> None:
    @property_test(8, data=st.data(), seed=seeds, b=st.integers(1, 4), n=st.integers(1, 5), dtype=dtypes)
    def test_reward(data: Any, seed: int, b: int, n: int, dtype: torch.dtype) -> None:
        reward = BUILDERS[kind](data.draw, seed, b).to(device, dtype)
        x = tensor(seed + 3, b, n, *SHAPE).to(device, dtype)
        tolerance = ROUNDING[dtype]
        whole = reward(x)
        assert whole.shape == (b, n)
        assert reward.num_observations in (None, b)
        cut = data.draw(st.integers(0, n))
        parts = [reward(part) for part in (x[:, :cut], x[:, cut:]) if part.shape[1]]
        assert_near(torch.cat(parts, 1), whole, tolerance)
        index = data.draw(st.lists(st.integers(0, b - 1), min_size=1, max_size=6))
        assert_near(reward.select(index)(x[index]), whole[index], tolerance, whole)
        # rows of B x N in any order, each an observation of its own, as solvers cut them
        rows = torch.randperm(b * n, generator=generator(seed))[: data.draw(st.integers(1, b * n))]
        owner = rows // n
        scored = reward.select(owner)(x.flatten(0, 1)[rows][:, None])[:, 0]
        assert_near(scored, whole.flatten()[rows], tolerance, whole)
        # selecting from a selection
        first, second = torch.tensor(index), data.draw(st.lists(st.integers(0, len(index) - 1), min_size=1, max_size=3))
        assert_near(reward.select(first).select(second)(x[first[second]]), whole[first[second]], tolerance, whole)
        if reward.differentiable:
            x.requires_grad_()
            gradient, = torch.autograd.grad(reward(x).sum(), x)
            particle = data.draw(st.integers(0, n - 1))
            alone, = torch.autograd.grad(reward(x[:, particle : particle + 1]).sum(), x)
            assert_near(alone[:, particle], gradient[:, particle], tolerance, gradient)

    test_reward()


@property_test(12, data=st.data(), seed=seeds, b=st.integers(1, 3), n=st.integers(1, 3), scale=st.floats(-3, 3))
def test_rewards_add_and_scale(data: Any, seed: int, b: int, n: int, scale: float) -> None:
    one, two = _gaussian(data.draw, seed, b), _function(data.draw, seed + 9, b)
    x = tensor(seed + 3, b, n, *SHAPE)
    assert_near((scale * one + two)(x), scale * one(x) + two(x), 1e-12, one(x))
    assert_near((two * scale).select(0)(x[:1]), scale * two(x[:1]), 1e-12)


@property_test(16, data=st.data(), seed=seeds, b=st.integers(1, 3), n=st.integers(1, 3))
def test_gaussian_likelihoods_are_normalised_sums(data: Any, seed: int, b: int, n: int) -> None:
    """Over the observed entries, log N(y; A x, sigma^2 I): by the residual, which counts them too."""
    reward = _gaussian(data.draw, seed, b)
    assert isinstance(reward, GaussianLikelihood)
    x = tensor(seed + 3, b, n, *SHAPE)
    count, sigma = reward.count_observed().expand(b)[:, None], reward.sigma[:, None]
    expected = -0.5 * count * reward.residual(x) - count * (sigma * math.sqrt(2 * math.pi)).log()
    assert_near(reward(x), expected, 1e-12)


@property_test(10, data=st.data(), seed=seeds, b=st.integers(1, 3), n=st.integers(1, 3),
               kind=st.sampled_from([_gaussian, _poisson]))
def test_simulate_draws_from_its_generator_alone(data: Any, seed: int, b: int, n: int, kind: Any) -> None:
    reward, x = kind(data.draw, seed, b), tensor(seed + 3, b, n, *SHAPE)
    first, second = (reward.simulate(x, generator(seed)) for _ in range(2))
    assert torch.equal(first, second)
    assert first.shape == (b, n, *reward.operator.measurement_shape)
    assert torch.equal(reward.simulate(x[:, 0], generator(seed)), reward.simulate(x[:, :1], generator(seed))[:, 0])
    seen = reward.operator.observed()
    if seen is not None:
        assert not bool(first[~seen[:, None].expand(b, n, *seen.shape[1:])].any())
