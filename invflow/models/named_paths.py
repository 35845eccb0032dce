"""Named paths, as functions of the distance from the data."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

__all__ = ["PATHS", "Named", "Schedule"]

Schedule: TypeAlias = Callable[[Tensor], Tensor]


def _log_mean(gap: Tensor) -> Tensor:
    """Log alpha of the variance-preserving diffusion of Song et al. (2021), beta 0.1 to 20, ``gap`` from the data."""
    return -0.25 * 19.9 * gap.square() - 0.5 * 0.1 * gap


def _log_slope(gap: Tensor) -> Tensor:
    return -0.5 * 19.9 * gap - 0.5 * 0.1


def _noise(gap: Tensor) -> Tensor:
    return (-(2 * _log_mean(gap)).expm1()).sqrt()


def _gap_of(t: Tensor) -> Tensor:
    """Where alpha / sigma = t / (1 - t): -2 log alpha = log(1 + ((1 - t) / t)^2), a quadratic equation."""
    level = 0.5 * ((1 - t) / t).square().log1p()
    return 2 * level / (0.05 + (0.05**2 + 19.9 * level).sqrt())


class Named(NamedTuple):
    """A named path, as functions of the distance from the data."""

    alpha: Schedule
    sigma: Schedule
    slopes: tuple[Schedule, Schedule]
    inverse: Schedule


_TURN = math.pi / 2
#: shares of data and of noise as functions of the distance from the data, in [0, 1]
PATHS = {
    "cosine": Named(lambda gap: (_TURN * gap).cos(), lambda gap: (_TURN * gap).sin(),
                    (lambda gap: -_TURN * (_TURN * gap).sin(), lambda gap: _TURN * (_TURN * gap).cos()),
                    lambda t: torch.atan2(1 - t, t) / _TURN),
    "vp": Named(lambda gap: _log_mean(gap).exp(), _noise,
                (lambda gap: _log_slope(gap) * _log_mean(gap).exp(),
                 lambda gap: -_log_slope(gap) * (2 * _log_mean(gap)).exp() / _noise(gap)), _gap_of),
    "linear": Named(lambda gap: 1 - gap, lambda gap: gap, (lambda gap: -torch.ones_like(gap), torch.ones_like),
                    lambda t: 1 - t),
}
