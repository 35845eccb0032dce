"""Checks whether a posterior fits its measurement worse, or better, than the measurement noise explains."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["complaints", "rarer_than_noise"]

#: limits on the residual of a posterior mean (root mean square, in units of sigma): beyond the first two something is
#: wrong; the third is the least residual of samples that scatter like the noise about a mean close to the measurement
_FAR, _NEAR, _SCATTERED = 3.0, 0.3, 0.8
#: log probability under which a residual is not attributed to noise
_RARE = -10.0
#: replaces 0, which has no logarithm
_LEAST = 1e-300


def complaints(of_mean: Tensor, of_samples: Callable[[], Tensor], count: Tensor, sigma: Tensor) -> list[str]:
    """Complaints about residuals, each worded to follow "the mean of the samples".

    Args:
        of_mean: Residuals of the posterior mean, root mean square in units of sigma, ``(B,)``.
        of_samples: Function that returns the mean over samples of their mean squared residuals, ``(B,)``. It is called
            only when needed.
        count: Number of measured values in each observation, ``(B,)`` or ``(1,)``.
        sigma: Noise levels, ``(B,)``. Observations with level 0 are not checked.
    """
    # one copy to the host, so that the GPU synchronises once; working on such small tensors there would cost more than
    # a hundredth of a single sample
    rows = [(found, entries) for found, entries, level in zip(*torch.stack(
        [of_mean, count.to(of_mean).expand_as(of_mean), sigma.to(of_mean)]).tolist()) if level > 0]
    far = [found for found, entries in rows if found > _FAR and rarer_than_noise(found**2, entries)]
    near = [found for found, entries in rows if found < _NEAR and entries > 0]
    if near:
        squares = [square for square, level in zip(of_samples().tolist(), sigma.tolist()) if level > 0]
        near = [found for (found, entries), square in zip(rows, squares) if found < _NEAR and entries > 0
                and square < _SCATTERED**2 and rarer_than_noise(square, entries)]
    said = []
    if far:
        said.append(f"misses {_which(far, of_mean)} by {max(far):.3g} times the noise (over {_FAR:g} is too "
                    "far): sigma is too small, or y was made by another operator (another blur, or an inverted mask, "
                    "for example), or these are not samples of the posterior")
    if near:
        said.append(f"fits {_which(near, of_mean)} to within {min(near):.2g} times the noise (under {_NEAR} is too "
                    "close), and so do the samples: sigma is too large, or the samples fit the noise")
    return said


def rarer_than_noise(square: float, count: float) -> bool:
    r"""Whether a correct posterior has a mean squared residual this extreme with a probability under e^-10.

    If truth and measurement are drawn from the prior and the likelihood, then a posterior sample x and y have the same
    joint distribution as the truth and y, so y - A x is distributed like the noise. Chernoff's bound on a mean u of m
    squared standard normal numbers,

    .. math:: P(\text{beyond } u) \le e^{-m (u - 1 - \log u) / 2},

    bounds the expectation of a convex function. By convexity it also holds for averages over any number of samples: for
    averages of the residuals themselves if u is over 1, and for averages of their mean squares on both sides.

    Args:
        square: Mean square u, in units of the noise variance.
        count: Number m of measured values that the mean is over.
    """
    return count * (square - 1 - math.log(max(square, _LEAST))) / 2 > -_RARE


def _which(rows: list[float], measurements: Tensor) -> str:
    return "the measurement" if len(measurements) == 1 else f"{len(rows)} of {len(measurements)} measurements"
