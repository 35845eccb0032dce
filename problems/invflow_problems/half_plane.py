r"""Eight Gaussians on a ring, tilted to the right half-plane: the toy example of the flow map trajectory tilting paper.

The means lie at the angles 2 pi k / 8 and radius 4.8, and the variance is 0.5. The reward is r(x) = -x_0^2 where
x_0 < 0, else 0 (arXiv 2511.22688). Two of the eight means lie on the edge of the half-plane. The tilted law is known in
closed form: the share with x_0 > 0 is 0.8490 and the mean reward -0.0405 (0.5 and -6.01 for the untilted ring).
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from invflow.models.mixture import GaussianMixtureFlow, draw_components
from invflow.problem import Problem
from invflow.reward import FunctionReward, Reward

__all__ = ["RADIUS", "VARIANCE", "half_plane", "left_penalty", "ring_of_gaussians", "tilted_expectations",
           "tilted_sample"]

RADIUS, VARIANCE, COUNT = 4.8, 0.5, 8


def ring_of_gaussians(offset: float = 0.0, *, dtype: torch.dtype = torch.float32,
                      steps: int = 16) -> GaussianMixtureFlow:
    """The prior: eight Gaussians of variance 0.5 at radius 4.8.

    Args:
        offset: Angle of rotation of the ring, in radians.
        dtype: Dtype of the flow.
        steps: Number of steps of its jump, see :class:`~invflow.GaussianMixtureFlow`.
    """
    angle = offset + 2 * math.pi * torch.arange(COUNT, dtype=torch.float64) / COUNT
    means = RADIUS * torch.stack([angle.cos(), angle.sin()], dim=1)
    return GaussianMixtureFlow(means.to(dtype), std=VARIANCE**0.5, steps=steps)


def left_penalty(x: Tensor) -> Tensor:
    """r(x) = -x_0^2 where x_0 < 0, else 0: ``(n, 2)`` to ``(n,)``."""
    return -x[:, 0].clamp(max=0) ** 2


def _sides(prior: GaussianMixtureFlow) -> tuple[Tensor, Tensor, Tensor, float]:
    """Tilted masses of each component right and left of the edge, and the Gaussian that is truncated at 0 on the left.

    On the left e^{-x^2} N(x; c, v) = Z N(x; c / (1 + 2 v), v / (1 + 2 v)), Z = e^{-c^2 / (1 + 2 v)} / sqrt(1 + 2 v).

    Returns:
        Masses right and left, unnormalised ``(K,)``, and the Gaussian's means ``(K,)`` and variance on the left.
    """
    center, variance = prior.means[:, 0].double(), float(prior.std[0].double() ** 2)
    weight, shrink = prior.weights.double(), 1 + 2 * variance
    right = weight * torch.special.ndtr(center / variance**0.5)
    mean, narrow = center / shrink, variance / shrink
    left = weight * (-center.square() / shrink).exp() / shrink**0.5 * torch.special.ndtr(-mean / narrow**0.5)
    return right, left, mean, narrow


def tilted_expectations(prior: GaussianMixtureFlow | None = None) -> dict[str, float]:
    """Share with x_0 > 0, mean reward and log evidence log E[e^r] of the tilted ring, in closed form.

    Args:
        prior: Ring with one standard deviation; default: the problem's.
    """
    right, left, mean, narrow = _sides(_prior() if prior is None else prior)
    total = right.sum() + left.sum()
    # second moment of N(mean, narrow) truncated to x < 0: with a = -mean / std and the density over the mass at a
    std = narrow**0.5
    edge = -mean / std
    mills = (-0.5 * edge.square() - 0.5 * math.log(2 * math.pi) - torch.special.log_ndtr(edge)).exp()
    square = mean.square() + narrow - 2 * mean * std * mills - narrow * edge * mills
    return {"share x0 > 0": float(right.sum() / total), "reward": float(-(left * square).sum() / total),
            "log evidence": float(total.log())}


def tilted_sample(n: int, generator: torch.Generator, prior: GaussianMixtureFlow | None = None) -> Tensor:
    """Independent draws of the tilted ring, in closed form.

    Args:
        n: Number of draws.
        generator: Source of randomness.
        prior: Ring with one standard deviation; default: the problem's.

    Returns:
        ``(n, 2)``.
    """
    prior = _prior() if prior is None else prior
    right, left, mean, narrow = _sides(prior)
    index = draw_components(torch.cat([right, left]).log()[None], n, generator)[0]
    k, is_left = index % len(right), index >= len(right)
    center, std = torch.where(is_left, mean[k], prior.means[k, 0].double()), prior.std.double()[k]
    std = torch.where(is_left, narrow**0.5, std)
    # by inversion, mirrored so that the part to draw from is the lower tail, where probabilities keep their digits
    flip = torch.where(is_left, -1.0, 1.0)
    uniform = 1 - torch.rand(n, generator=generator, device=generator.device, dtype=torch.float64).to(center.device)
    mass = torch.special.ndtr(flip * center / std)
    first = flip * (flip * center - std * torch.special.ndtri(uniform * mass))
    second = prior.means[k, 1].double() + prior.std.double()[k] * torch.randn(
        n, generator=generator, device=generator.device, dtype=torch.float64).to(center.device)
    return torch.stack([first, second], dim=1).to(prior.dtype)


@functools.cache
def _prior() -> GaussianMixtureFlow:
    return ring_of_gaussians()


def _share(x: Tensor) -> Tensor:
    return (x[:, 0] > 0).to(x)


def _reward() -> Reward:
    return FunctionReward(left_penalty)


def _expectations() -> dict[str, float]:
    return {name: value for name, value in tilted_expectations().items() if name != "log evidence"}


half_plane = Problem("mixture/half-plane", None, reward=_reward, prior=_prior, sampler=tilted_sample,
                     quantities={"share x0 > 0": _share}, expectations=_expectations,
                     description="eight Gaussians on a ring, tilted by the reward -x0^2 where x0 < 0")
