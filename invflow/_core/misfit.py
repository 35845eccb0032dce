"""Whether a posterior lies farther from its measurement, or closer to it, than the measurement's noise explains."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["complaints", "rarer_than_noise"]

#: residuals of a posterior mean, root mean square in the noise's deviations, beyond which something is wrong; and what
#: samples have at least that scatter about a mean close to the measurement as the noise does
_FAR, _NEAR, _SCATTERED = 3.0, 0.3, 0.8
#: log probability of a residual that noise is not taken to make
_RARE = -10.0
#: stands in for 0, which has no logarithm
_LEAST = 1e-300


def complaints(of_mean: Tensor, of_samples: Callable[[], Tensor], count: Tensor, sigma: Tensor) -> list[str]:
    """What is wrong with residuals, in words that go after "the mean of the samples".

    Args:
        of_mean: of the posterior mean, root mean square in the noise's deviations, ``(B,)``.
        of_samples: gives the mean over samples of their mean squared residuals, ``(B,)``; called where it matters.
        count: measured values of each observation, ``(B,)`` or ``(1,)``.
        sigma: noise levels, ``(B,)``; nothing is said of those that are 0.
    """
    # numbers on the host, in one copy: a GPU is waited for once, and tensors of a few would cost more than a hundredth
    # of a single sample
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
                    "far): sigma is too small, or y was not made by this operator (by another blur, say, or by the "
                    "inverse of its mask), or these are no draws of the posterior")
    if near:
        said.append(f"meets {_which(near, of_mean)} to {min(near):.2g} times the noise (under {_NEAR} is too "
                    "close), and so do the samples: sigma is too large, or they take the noise for the image")
    return said


def rarer_than_noise(square: float, count: float) -> bool:
    r"""Whether a mean of squared residuals is one that a right posterior shows with a probability under e^-10.

    Truth and measurement being drawn from the prior and the likelihood, a posterior sample x and y are distributed as
    the truth and y are, and y - A x as the noise. Chernoff's bound on a mean u of m squared normal numbers,

    .. math:: P(\text{beyond } u) \le e^{-m (u - 1 - \log u) / 2},

    is one on an expectation of a convex function, and by convexity holds as well for averages over samples, whichever
    their number: of the residuals themselves, for u over 1, and of their mean squares, for u on either side.

    Args:
        square: the mean square u in units of the noise's variance.
        count: number m of measured values that it is a mean over.
    """
    return count * (square - 1 - math.log(max(square, _LEAST))) / 2 > -_RARE


def _which(rows: list[float], measurements: Tensor) -> str:
    return "the measurement" if len(measurements) == 1 else f"{len(rows)} of {len(measurements)} measurements"
