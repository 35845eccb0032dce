"""Weighted samples: quantiles, ranks, and corrections for small numbers of samples.

Samples are ``(B, N, ...)``, and weights ``(B, N)`` sum to one over N. Samples of weight zero have no effect, and the
effective sample size 1 / sum w^2 replaces N.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from invflow._core.checks import precise

__all__ = ["effective_size", "least_samples", "pair_mass", "pieces", "quantiles", "rank_window", "variance_weights"]

VALUES_AT_A_TIME = 2**21  # processing this many at a time takes under 100 MB


def effective_size(weights: Tensor) -> Tensor:
    """1 / sum w^2 (Kong, Liu, Wong 1994): ``(B, N)`` to ``(B,)`` in double precision."""
    return 1 / precise(weights).square().sum(1)


def least_samples(level: float, sides: int = 2) -> int:
    """Smallest number of samples for an interval of this level: the widest interval leaves ``sides`` / (N + 1) outside.

    Raises:
        ValueError: For a level outside (0, 1).
    """
    if not 0 < level < 1:
        raise ValueError(f"level={level}: pass a level between 0 and 1, such as 0.9")
    return max(1, math.ceil(sides / (1 - level) - 1 - 1e-9))


def pair_mass(weights: Tensor) -> Tensor:
    """Total weight of pairs of different samples, 1 - sum w^2, computed without cancellation: (B, N) to (B,)."""
    return 2 * (weights[:, 1:] * weights.cumsum(1)[:, :-1]).sum(1)


def variance_weights(weights: Tensor) -> tuple[Tensor, Tensor]:
    r"""Weights of squared deviations from the weighted mean: for the variance, and for the variance of the mean.

    The weighted mean has the variance :math:`M = \sum w_i^2 (x_i - m)^2 / (1 - \sum w^2)`. This is the usual estimate
    for self-normalised weights, with the divisor that equal weights need (Owen 2013, "Monte Carlo theory, methods and
    examples", section 9.2). The sum :math:`\sum w_i (x_i - m)^2` is smaller than the variance by M. With equal weights
    the sum of both has the divisor N - 1. If one sample has all the weight, both vanish; dividing by
    :math:`1 - \sum w^2` instead would give the spread of the samples without weight.

    Args:
        weights: Normalised weights, ``(B, N)``.

    Returns:
        ``(whole, mean)``, ``(B, N)`` each: multiply by ``(x - m)^2`` and sum over N.
    """
    mass = pair_mass(weights)[:, None]
    mean = torch.where(mass > 0, weights.square() / mass.clamp(min=torch.finfo(mass.dtype).tiny), 0.0)
    return weights + mean, mean


def pieces(observations: int, length: int, width: int, values: int = VALUES_AT_A_TIME) -> Iterator[tuple[slice, slice]]:
    """Slices of B and of an axis of ``length``, small enough for ``width`` values at each place."""
    per_piece = max(1, values // width)
    rows, part = max(1, per_piece // length), min(length, per_piece)
    for b in range(0, observations, rows):
        for start in range(0, length, part):
            yield slice(b, b + rows), slice(start, start + part)


def quantiles(samples: Tensor, weights: Tensor | None, levels: tuple[float, ...],
              values: int = VALUES_AT_A_TIME) -> list[Tensor]:
    """Quantiles of each pixel; see :meth:`invflow.Posterior.quantile`.

    Args:
        samples: Samples, ``(B, N, *shape)``.
        weights: Normalised weights, ``(B, N)``. None: equal weights.
        levels: Levels, each in [0, 1].
        values: Number of values to sort at a time.

    Returns:
        ``(B, *shape)`` for each level.
    """
    flat = samples.reshape(*samples.shape[:2], -1)
    out = [torch.empty_like(flat[:, 0]) for _ in levels]
    for rows, part in pieces(len(flat), flat.shape[2], flat.shape[1], values):
        found = _quantiles(flat[rows, :, part], None if weights is None else weights[rows], levels)
        for whole, piece in zip(out, found, strict=True):
            whole[rows, part] = piece
    return [whole.reshape(len(flat), *samples.shape[2:]) for whole in out]


def _quantiles(values: Tensor, weights: Tensor | None, levels: tuple[float, ...]) -> list[Tensor]:
    """Quantiles of values ``(b, N, p)``: ``(b, p)`` for each level."""
    count = values.shape[1]
    ordered, index = values.sort(1)
    found = []
    if weights is None:  # two neighbouring order statistics
        for q in levels:
            position = min(max(q * (count + 1), 1.0), float(count))
            below = min(int(position), max(1, count - 1))
            found.append(torch.lerp(ordered[:, below - 1], ordered[:, min(below, count - 1)], position - below))
        return found
    weights = precise(weights)
    size = effective_size(weights).reshape(-1, 1, 1)
    cumulative = weights.unsqueeze(2).expand_as(values).gather(1, index).cumsum(1)
    for q in levels:
        position_of = (q * (size + 1)).clamp(min=1).minimum(size)
        # share of the window [(h - 1) / n, h / n] that lies below each step of the cumulative weights
        covered = (cumulative * size - (position_of - 1)).clamp(0, 1)
        covered[:, -1] = 1.0  # the sum of the weights, up to rounding
        share = covered.diff(dim=1, prepend=torch.zeros_like(covered[:, :1]))
        found.append((share * ordered).sum(1).to(values.dtype))
    return found


def rank_window(below: Tensor, equal: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """Interval of a truth's rank, as a share. The rank is uniform within it, and ties are broken at random.

    For N equal weights, the truth's rank r represents r / (N + 1) to (r + 1) / (N + 1). A quantile is the mean over the
    same window: with randomisation, a truth is below the quantile at q if its rank is below q.

    Args:
        below: Weight of the samples below the truth, ``(b, ...)``.
        equal: Weight of the samples equal to the truth.
        size: Effective sample size, broadcast against both.

    Returns:
        ``(low, high)``, in [0, 1].
    """
    return size * below / (size + 1), (size * (below + equal) + 1) / (size + 1)
