r"""A thin ring, tilted to a wavy curve: six arches that meet in rounded cusps, like those of a cycloid.

The prior is a ring of radius 2, made of 80 Gaussians of standard deviation 0.2 that overlap smoothly. The reward is
:math:`r(x) = -(|x| - c(\theta))^2 / (2 \cdot 0.08^2)`, where :math:`c(\theta) = 2 + 0.4 (2 \sqrt{\cos^2 3 \theta +
0.01} - 1)` is the curve's radius in the direction of x. The tilted law is thinner than the ring, and lies partly inside
and partly outside it. Truths are drawn by rejection.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from invflow.models.mixture import GaussianMixtureFlow
from invflow.problem import Problem
from invflow.reward import FunctionReward, Reward
from invflow_problems.rejection import rejection_sample

__all__ = ["curve_radius", "on_curve", "ring_wavy", "wavy_reward", "wavy_sample"]

RADIUS, THICKNESS, COUNT = 2.0, 0.2, 80
ARCHES, HEIGHT, WIDTH = 6, 0.4, 0.08


def curve_radius(x: Tensor) -> Tensor:
    """Radius of the curve in the direction of points: ``(n, 2)`` to ``(n,)``."""
    angle = torch.atan2(x[:, 1], x[:, 0])
    # the square root rounds the corner of |cos|, so the reward has a gradient everywhere
    arch = ((ARCHES / 2 * angle).cos().square() + 0.01).sqrt()
    return RADIUS + HEIGHT * (2 * arch - 1)


def wavy_reward(x: Tensor) -> Tensor:
    """r(x) = -(|x| - c(theta))^2 / (2 0.08^2): ``(n, 2)`` to ``(n,)``; at most 0."""
    radius = (x.square().sum(1) + 1e-12).sqrt()
    return -0.5 * ((radius - curve_radius(x)) / WIDTH).square()


def wavy_sample(n: int, generator: torch.Generator) -> Tensor:
    """Independent draws of the tilted ring by rejection: ``(n, 2)``."""
    prior = _prior()
    return rejection_sample(lambda count, g: prior.sample(count, generator=g), wavy_reward, n, generator)


def on_curve(x: Tensor) -> Tensor:
    """1 where a point is within 0.16 of the curve, measured from the origin, else 0: ``(n, 2)`` to ``(n,)``."""
    result: Tensor = ((x.norm(dim=1) - curve_radius(x)).abs() < 2 * WIDTH).to(x)
    return result


def _outside(x: Tensor) -> Tensor:
    result: Tensor = (x.norm(dim=1) > RADIUS).to(x)
    return result


@functools.cache
def _prior() -> GaussianMixtureFlow:
    angle = 2 * math.pi * torch.arange(COUNT, dtype=torch.float64) / COUNT
    means = RADIUS * torch.stack([angle.cos(), angle.sin()], dim=1)
    return GaussianMixtureFlow(means.float(), std=THICKNESS)


@functools.cache
def _expectations() -> dict[str, float]:
    """Expectations by the midpoint rule in polar coordinates, on a quarter of the plane, which suffices by symmetry."""
    prior = GaussianMixtureFlow(_prior().means.double(), std=THICKNESS)
    radius = 0.5 + (torch.arange(1500, dtype=torch.float64) + 0.5) / 500  # the circle coincides with cell edges
    angle = math.pi / 2 * (torch.arange(180, dtype=torch.float64) + 0.5) / 180
    r, a = (v.flatten() for v in torch.meshgrid(radius, angle, indexing="ij"))
    x = torch.stack([r * a.cos(), r * a.sin()], dim=1)
    log_density = torch.cat([prior.log_prob(part) + wavy_reward(part) for part in x.split(2**16)])
    mass = (log_density + r.log()).softmax(0)
    functions = {"share on the curve": on_curve, "share outside": _outside, "reward": wavy_reward}
    return {name: float((mass * function(x)).sum()) for name, function in functions.items()}


def _reward() -> Reward:
    return FunctionReward(wavy_reward)


ring_wavy = Problem("ring/wavy", None, reward=_reward, prior=_prior, sampler=wavy_sample,
                    quantities={"share on the curve": on_curve, "share outside": _outside},
                    expectations=_expectations, description="a thin ring, tilted to a closed curve of six arches")
