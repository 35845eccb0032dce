"""Whether a posterior lies farther from its measurement, or closer to it, than the measurement's noise explains."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["complaints", "rarer_than_noise"]

#: residuals of a posterior mean, root mean square in the noise's deviations, beyond which something is wrong; and what
#: samples have at least that scatter about a mean close to the measurement as the noise does
_FAR, _NEAR, _SCATTERED = 3.0, 0.3, 0.8
#: log probability of a residual that noise is not taken to make
_RARE = -10.0


def complaints(of_mean: Tensor, of_samples: Callable[[], Tensor], count: Tensor, sigma: Tensor) -> list[str]:
    """What is wrong with residuals, in words that go after "the mean of the samples".

    Args:
        of_mean: of the posterior mean, root mean square in the noise's deviations, ``(B,)``.
        of_samples: gives the mean over samples of their mean squared residuals, ``(B,)``; called where it matters.
        count: measured values of each observation, ``(B,)`` or ``(1,)``.
        sigma: noise levels, ``(B,)``; nothing is said of those that are 0.
    """
    given = (of_mean, count.to(of_mean).expand_as(of_mean), sigma.to(of_mean))
    of_mean, count, sigma = torch.stack(given).cpu()  # in one copy: a GPU is waited for once
    noisy = sigma > 0
    far = noisy & (of_mean > _FAR) & rarer_than_noise(of_mean.square(), count)
    near = noisy & (of_mean < _NEAR) & (count > 0)
    if bool(near.any()):
        square = of_samples().cpu()
        near = near & (square < _SCATTERED**2) & rarer_than_noise(square, count)
    said = []
    if bool(far.any()):
        said.append(f"misses {_which(far)} by {float(of_mean[far].max()):.3g} times the noise (over {_FAR:g} is too "
                    "far): sigma is too small, or y was not made by this operator (by another blur, say, or by the "
                    "inverse of its mask), or these are no draws of the posterior")
    if bool(near.any()):
        said.append(f"meets {_which(near)} to {float(of_mean[near].min()):.2g} times the noise (under {_NEAR} is too "
                    "close), and so do the samples: sigma is too large, or they take the noise for the image")
    return said


def rarer_than_noise(square: Tensor, count: Tensor) -> Tensor:
    r"""Where a mean of squared residuals is one that a right posterior shows with a probability under e^-10.

    Truth and measurement being drawn from the prior and the likelihood, a posterior sample x and y are distributed as
    the truth and y are, and y - A x as the noise. Chernoff's bound on a mean u of m squared normal numbers,

    .. math:: P(\text{beyond } u) \le e^{-m (u - 1 - \log u) / 2},

    is one on an expectation of a convex function, and by convexity holds as well for averages over samples, whichever
    their number: of the residuals themselves, for u over 1, and of their mean squares, for u on either side.

    Args:
        square: mean squares u in units of the noise's variance, of any shape.
        count: numbers m of measured values that they are means over, broadcast to it.

    Returns:
        Booleans in the shape of ``square``.
    """
    least = torch.finfo(square.dtype).tiny
    return count * (square - 1 - square.clamp(min=least).log()) / 2 > -_RARE


def _which(rows: Tensor) -> str:
    return "the measurement" if len(rows) == 1 else f"{int(rows.sum())} of {len(rows)} measurements"
