"""The contract of a reward, as one check for any reward."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from invflow.likelihood import Likelihood
from invflow.reward import Reward
from invflow.testing._densities import check_density
from invflow.testing._tools import attempt, expect, expect_close, rounding, watch_global_seed

__all__ = ["check_reward"]

_PARTICLES = 4


def check_reward(reward: Reward | Callable[[], Reward], image_shape: Sequence[int] | None = None, *,
                 gradient_tolerance: float = 1e-4, seed: int = 0) -> None:
    """Check that a reward satisfies the contract that solvers rely on.

    Checked in float64: the shape (B, N); scores that are independent of other particles and other observations;
    the order of ``select``, with repeats; sums and scalings; gradients, against finite differences, if it
    is differentiable; that the input is not modified, and global seeds are not used.

    For a likelihood, ``simulate``: shape, reproducible, and unobserved entries zero; ``log_density``: its sum
    over the observed entries is the score, and it integrates to one over the measurement (for counts, sums to one);
    and ``simulate`` draws from it: for y drawn at c, the ratio p(y | c') / p(y | c) averages one. This detects a mean
    instead of a sum, a missing factor, and a wrong noise level (on 128 pixels, by 3% and more). It allows five
    standard errors: about one in a million seeds would raise a false alarm. A seed that passes always passes.

    Args:
        reward: The reward, or a function without arguments that builds it.
        image_shape: Shape of the images; default: that of the reward's operator.
        gradient_tolerance: Relative error allowed between a gradient and finite differences.
        seed: Random seed of the test images.

    Raises:
        AssertionError: At the first failure; the message says what failed, by how much, and what to check.

    Example:
        >>> import invflow
        >>> from invflow.testing import check_reward
        >>> check_reward(invflow.FunctionReward(lambda x: -x.square().flatten(1).sum(1)), (1, 8, 8))
    """
    subject = reward if isinstance(reward, Reward) else reward()
    expect(isinstance(subject, Reward),
           f"a {type(subject).__name__} is not a Reward: derive it from invflow.Reward, and pass an instance")
    name, count = type(subject).__name__, subject.num_observations
    expect(count is None or (isinstance(count, int) and count >= 1),
           f"{name}.num_observations is {count!r}: set the number of observations, or None for any")
    expect(isinstance(subject.differentiable, bool), f"{name}.differentiable is {subject.differentiable!r}")
    shape = image_shape or (None if subject.operator is None else subject.operator.image_shape)
    if shape is None:
        raise ValueError(f"{name} has no operator that defines the images' shape: pass image_shape=(C, H, W)")
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(count or 3, _PARTICLES, *shape, generator=generator, dtype=torch.float64)
    subject = subject.to(torch.float64)
    with watch_global_seed(name):
        _check_values(subject, x)
        _check_observations(subject, x)
        _check_select(subject, x)
        _check_algebra(subject, x)
        _check_gradient(subject, x, gradient_tolerance, generator)
        if isinstance(subject, Likelihood):
            _check_simulate(subject, x, seed)
            check_density(subject, x, seed)


def _check_values(reward: Reward, x: Tensor) -> None:
    kept, name = x.clone(), type(reward).__name__
    values = attempt(lambda: reward(x), f"{name}: scoring images {tuple(x.shape)}, (B, N, *image_shape),",
                     "It must accept N images for each of B observations, here in float64")
    expect(torch.equal(x, kept), f"{name} modified the images: copy before writing in place")
    expect(tuple(values.shape) == tuple(x.shape[:2]) and values.is_floating_point(),
           f"{name}: images {tuple(x.shape)} score {values.dtype} {tuple(values.shape)}, expected floats "
           f"(B, N) = {tuple(x.shape[:2])}")
    expect(not bool(torch.isnan(values).any()), f"{name}: images in [0, 1] score NaN")
    expect_close(reward(x), values, rounding(x.dtype), f"{name}: the same images again",
                 "A reward must be deterministic: fix its random numbers when it is built")
    tolerance, advice = 10 * rounding(x.dtype), "A score must not depend on the other images of the batch"
    expect_close(reward(x[:, 1:2]), values[:, 1:2], tolerance, f"{name}: particle 1 alone", advice)
    expect_close(reward(x.flip(1)), values.flip(1), tolerance, f"{name}: particles in reverse order", advice)


def _check_observations(reward: Reward, x: Tensor) -> None:
    """Check that scores of one observation do not depend on the images of others."""
    if len(x) < 2:
        return
    name, values = type(reward).__name__, reward(x)
    for b in (0, len(x) - 1):
        others = 1 - x
        others[b] = x[b]
        expect_close(reward(others)[b], values[b], 10 * rounding(x.dtype),
                     f"{name}: scores of observation {b} before and after the images of the other observations changed",
                     "It mixes observations: reduce only over the axes of the image, never over B or N, as in "
                     "x.flatten(2).sum(2)")


def _check_select(reward: Reward, x: Tensor) -> None:
    name, values, last = type(reward).__name__, reward(x), len(x) - 1
    for index in ([last, 0, last], torch.tensor([last]), slice(0, 1), last):
        rows = torch.arange(len(x))[index].reshape(-1)
        some = reward.select(index)
        expect(some.num_observations in (None, len(rows)),
               f"{name}: select({index}).num_observations is {some.num_observations}, expected {len(rows)}")
        expect_close(some(x[rows]), values[rows], 10 * rounding(x.dtype),
                     f"{name}: select({index}), against those rows of all",
                     "select must keep the order of its index, with repeats, for both data and parameters")


def _check_algebra(reward: Reward, x: Tensor) -> None:
    name, values = type(reward).__name__, reward(x)
    both = reward + 0.5 * reward
    expect_close(both(x), 1.5 * values, 10 * rounding(x.dtype), f"{name}: r + 0.5 r, against 1.5 r",
                 "Do not override + and *, or return a Reward from them")
    expect(both.num_observations == reward.num_observations and both.differentiable == reward.differentiable,
           f"{name}: a sum loses num_observations or differentiable")


def _check_gradient(reward: Reward, x: Tensor, tolerance: float, generator: torch.Generator) -> None:
    name = type(reward).__name__
    images = x.clone().requires_grad_()
    values = reward(images)
    if not reward.differentiable:
        expect(not values.requires_grad,
               f"{name} has differentiable=False, but its score has a gradient: detach the score")
        return
    expect(values.requires_grad,
           f"{name} has differentiable=True, but its score has no gradient: set "
           "differentiable=False, or avoid torch.no_grad and detach")
    (gradient,) = torch.autograd.grad(values.sum(), images)
    direction = torch.randn(x.shape, generator=generator, dtype=x.dtype)
    along = (gradient * direction).flatten(2).sum(2)
    step = 1e-6
    difference = (reward(x + step * direction) - reward(x - step * direction)) / (2 * step)
    expect_close(along, difference, tolerance,
                 f"{name}: the gradient along a random direction, against finite differences",
                 "Check custom backward passes, detach, and kinks")


def _check_simulate(reward: Likelihood, x: Tensor, seed: int) -> None:
    name, measured = type(reward).__name__, tuple(reward.operator.measurement_shape)
    generators = [torch.Generator().manual_seed(s) for s in (seed, seed, seed + 1)]
    first, again, other = (reward.simulate(x, g) for g in generators)
    expect(tuple(first.shape) == (*x.shape[:2], *measured),
           f"{name}: simulate of {tuple(x.shape)} has shape {tuple(first.shape)}, expected "
           f"{(*x.shape[:2], *measured)}")
    expect(torch.equal(first, again),
           f"{name}: simulate gave other draws for the same generator seed: draw from the generator passed to it")
    expect(not torch.equal(first, other),
           f"{name}: simulate gave the same draws for two generator seeds: draw from the generator passed to it")
    single = reward.simulate(x[:, 0], torch.Generator().manual_seed(seed))
    expect(tuple(single.shape) == (len(x), *measured),
           f"{name}: simulate of {tuple(x[:, 0].shape)} has shape {tuple(single.shape)}, expected "
           f"{(len(x), *measured)}")
    observed = reward.operator.observed()
    if observed is not None:
        expect(bool((first * ~observed[:, None] == 0).all()),
               f"{name}: simulate fills unobserved entries")
