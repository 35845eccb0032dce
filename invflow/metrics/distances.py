"""Distances between two sampled laws: maximum mean discrepancy and sliced Wasserstein.

Both take samples ``(B, N, *shape)`` against ``(B, M, *shape)``, one comparison for each b; log weights
``(B, N)`` and ``(B, M)`` need not be normalised. For two plain sets pass ``x[None]`` and ``y[None]``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from invflow._core.random import draw_noise
from invflow._core.weighted import variance_weights
from invflow.metrics.quality import exact_distances, normalised_weights

__all__ = ["max_sliced_wasserstein", "median_distance", "mmd", "mmd_root", "sliced_wasserstein"]


def median_distance(x: Tensor, y: Tensor) -> Tensor:
    """Median Euclidean distance between pairs of different samples from the pooled sets.

    Args:
        x: ``(B, N, *shape)``.
        y: ``(B, M, *shape)``.

    Returns:
        ``(B,)``.
    """
    a, b = _flat_pair(x, y, "median_distance")
    return _median(torch.cat([a, b], 1))


def mmd(x: Tensor, y: Tensor, log_weights: Tensor | None = None, y_log_weights: Tensor | None = None, *,
        bandwidth: float | Tensor | None = None) -> Tensor:
    """Squared maximum mean discrepancy, unbiased, with the kernel exp(-d^2 / 2h^2) (Gretton et al. 2012).

    Its expectation is 0 for equal laws, so single values may be negative. With weights, the square is corrected by
    the estimated variance of the weighted mean. The remaining bias is of order 1 / N^2 for equal laws, and otherwise
    of order 1 / N, as usual for self-normalised weights.

    Args:
        x: ``(B, N, *shape)``, N >= 2.
        y: ``(B, M, *shape)``, M >= 2.
        log_weights: Log weights of x, ``(B, N)`` or None.
        y_log_weights: Log weights of y, ``(B, M)`` or None.
        bandwidth: h, a number or ``(B,)``; None for :func:`median_distance`. Values are comparable between methods, and
            without weights exactly unbiased, only with a fixed h.

    Returns:
        ``(B,)``.

    Raises:
        ValueError: If the shapes do not fit, a set has fewer than two samples, or the bandwidth is not
            positive.
    """
    a, b = _flat_pair(x, y, "mmd")
    if min(a.shape[1], b.shape[1]) < 2:
        raise ValueError(f"mmd takes at least two samples of each law, not {a.shape[1]} and {b.shape[1]}")
    if bandwidth is None:
        bandwidth = _median(torch.cat([a, b], 1))
    h = torch.as_tensor(bandwidth, dtype=a.dtype, device=a.device).reshape(-1, 1, 1)
    if not bool((h > 0).all()):
        raise ValueError("mmd takes a bandwidth > 0 (a median of 0: most samples coincide): pass bandwidth=")
    wa, wb = normalised_weights(log_weights, a, "mmd"), normalised_weights(y_log_weights, b, "mmd")
    return _within(a, wa, h) + _within(b, wb, h) - 2 * torch.einsum("bi,bij,bj->b", wa, _kernel(a, b, h), wb)


def mmd_root(x: Tensor, y: Tensor) -> Tensor:
    """Root of the unbiased squared MMD clamped at 0, with the kernel exp(-d^2 / 2m), m the median *squared* distance.

    The published Variational Flow Maps code tabulates this variant for its checkerboard (arXiv 2603.07276). The clamp
    makes it positive on average for equal laws (about 0.03 for 100 against 100 draws in two dimensions). Compare it
    only with values of the same N and M, and use :func:`mmd` elsewhere.

    Args:
        x: ``(B, N, *shape)``, N >= 2.
        y: ``(B, M, *shape)``, M >= 2.

    Returns:
        ``(B,)``, at least 0.
    """
    # torch's median is one of the values, so the median of squares is the square of the median
    return mmd(x, y).clamp(min=0).sqrt()


def sliced_wasserstein(x: Tensor, y: Tensor, p: int = 1, *, num_projections: int = 1000,
                       projections: Tensor | None = None, log_weights: Tensor | None = None,
                       y_log_weights: Tensor | None = None, generator: torch.Generator | None = None,
                       max_entries: int = 1 << 24) -> Tensor:
    """Sliced Wasserstein distance, (mean of W_p^p over projections)^(1/p) (Bonneel et al. 2015).

    Args:
        x: ``(B, N, *shape)``.
        y: ``(B, M, *shape)``; M may differ from N.
        p: 1 or 2.
        num_projections: Number of random directions, the same for all b.
        projections: Directions to use in place of random ones, ``(P, *shape)``, scaled to length 1 here.
        log_weights: Log weights of x, ``(B, N)`` or None.
        y_log_weights: Log weights of y, ``(B, M)`` or None.
        generator: Generator for the directions.
        max_entries: Number of projected values in memory at a time.

    Returns:
        ``(B,)``, in the units of the samples.

    Raises:
        ValueError: If the shapes do not fit or p is neither 1 nor 2.
    """
    a, wa, b, wb, transport = _weighted_pair(x, y, p, log_weights, y_log_weights, "sliced_wasserstein")
    directions = _directions(projections, num_projections, a, generator)
    total = a.new_zeros(a.shape[0])
    chunk = max(1, max_entries // (a.shape[0] * (a.shape[1] + b.shape[1])))
    for direction in directions.split(chunk):
        u, v = (torch.einsum("bnd,pd->bpn", z, direction) for z in (a, b))
        total += transport(u, wa, v, wb, p).sum(1)
    return (total / directions.shape[0]).pow(1 / p)


def max_sliced_wasserstein(x: Tensor, y: Tensor, p: int = 2, *, num_projections: int = 100,
                           projections: Tensor | None = None, steps: int = 100, log_weights: Tensor | None = None,
                           y_log_weights: Tensor | None = None,
                           generator: torch.Generator | None = None) -> Tensor:
    """Maximum sliced Wasserstein distance: W_p along the direction where it is largest (Deshpande et al. 2019).

    A gradient ascent starts from the best of the directions tried, separately for each b. The result is a lower bound
    of the maximum. It is positive even for equal laws, of order (d / N)^(1/2) with N samples and d dimensions, so
    compare only values of the same N and M.

    Args:
        x: ``(B, N, *shape)``.
        y: ``(B, M, *shape)``.
        p: 1 or 2.
        num_projections: Number of random directions to start from, in addition to the axis between the two means.
        projections: Directions to try in place of these, ``(P, *shape)``.
        steps: Number of steps of the ascent (Adam); 0 takes the best direction tried.
        log_weights: Log weights of x, ``(B, N)`` or None.
        y_log_weights: Log weights of y, ``(B, M)`` or None.
        generator: Generator for the directions.

    Returns:
        ``(B,)``, in the units of the samples.

    Raises:
        ValueError: If the shapes do not fit or p is neither 1 nor 2.
    """
    a, wa, b, wb, transport = _weighted_pair(x, y, p, log_weights, y_log_weights, "max_sliced_wasserstein")

    def cost(directions: Tensor) -> Tensor:
        """W_p^p along directions ``(B, P, D)``: ``(B, P)``."""
        directions = directions / torch.linalg.vector_norm(directions, dim=2, keepdim=True)
        u, v = (directions @ z.mT for z in (a, b))
        return transport(u, wa, v, wb, p)

    with torch.no_grad():
        start = _directions(projections, num_projections, a, generator).expand(len(a), -1, -1)
        if projections is None:
            between = (wa[:, None] @ a) - (wb[:, None] @ b)
            length = torch.linalg.vector_norm(between, dim=2, keepdim=True)
            start = torch.cat([start, torch.where(length > 0, between, start[:, :1])], 1)
        tried = torch.cat([cost(part) for part in start.split(256, 1)], 1)
        best, index = tried.max(1)
        direction = start.gather(1, index[:, None, None].expand(-1, 1, a.shape[2]))
    with torch.enable_grad():
        direction = (direction / torch.linalg.vector_norm(direction, dim=2, keepdim=True)).detach().requires_grad_()
        optimiser = torch.optim.Adam([direction], lr=0.05)
        for _ in range(steps):
            optimiser.zero_grad()
            found = cost(direction)[:, 0]
            best = best.maximum(found.detach())
            (-found.clamp(min=torch.finfo(found.dtype).tiny).log().sum()).backward()
            optimiser.step()
    return best.pow(1 / p)


def _directions(projections: Tensor | None, count: int, a: Tensor, generator: torch.Generator | None) -> Tensor:
    """Unit directions ``(P, D)`` for samples ``(B, N, D)``."""
    if projections is None:
        projections = draw_noise((count, a.shape[2]), generator)
    directions = projections.to(a).flatten(1)
    if directions.shape[1] != a.shape[2]:
        raise ValueError(f"projections {tuple(projections.shape)} do not fit samples of {a.shape[2]} values each: pass "
                         "(P, *shape)")
    result: Tensor = directions / torch.linalg.vector_norm(directions, dim=1, keepdim=True)
    return result


def _weighted_pair(x: Tensor, y: Tensor, p: int, log_weights: Tensor | None, y_log_weights: Tensor | None,
                   name: str) -> tuple[Tensor, Tensor, Tensor, Tensor, Callable[..., Tensor]]:
    """Both flat sets, each with its weights, and the function for W_p^p between them on the line."""
    if p not in (1, 2):
        raise ValueError(f"p={p}: {name} supports only p=1 and p=2")
    a, b = _flat_pair(x, y, name)
    plain = log_weights is None and y_log_weights is None and a.shape[1] == b.shape[1]
    wa, wb = normalised_weights(log_weights, a, name), normalised_weights(y_log_weights, b, name)
    return a, wa, b, wb, _plain_transport if plain else _weighted_transport


def _plain_transport(u: Tensor, wu: Tensor, v: Tensor, wv: Tensor, p: int) -> Tensor:
    """W_p^p on the line for equal weights and N = M: (B, P, N) twice to (B, P)."""
    return (u.sort(-1).values - v.sort(-1).values).abs().pow(p).mean(-1)


def _weighted_transport(u: Tensor, wu: Tensor, v: Tensor, wv: Tensor, p: int) -> Tensor:
    """W_p^p on the line, the integral of |quantile difference|^p: (B, P, N) and (B, P, M) to (B, P)."""
    values, levels = [], []
    for points, weights in ((u, wu), (v, wv)):
        ordered, order = points.sort(-1)
        cumulative = weights[:, None].expand_as(points).gather(-1, order).cumsum(-1)
        values.append(ordered)
        levels.append(cumulative / cumulative[..., -1:])
    grid = torch.cat(levels, -1).sort(-1).values
    width = torch.diff(grid, dim=-1, prepend=torch.zeros_like(grid[..., :1]))
    # the quantile function is constant between levels: evaluate it in the middle, where ties do not matter
    middle = grid - 0.5 * width
    quantiles = []
    for ordered, level in zip(values, levels, strict=True):
        index = torch.searchsorted(level.contiguous(), middle).clamp(max=ordered.shape[-1] - 1)
        quantiles.append(ordered.gather(-1, index))
    return (width * (quantiles[0] - quantiles[1]).abs().pow(p)).sum(-1)


def _kernel(a: Tensor, b: Tensor, h: Tensor) -> Tensor:
    return torch.exp(-0.5 * (exact_distances(a, b) / h).square())


def _within(a: Tensor, weights: Tensor, h: Tensor) -> Tensor:
    """Squared norm of the law's mean in the kernel's space, corrected for the error of the weighted mean.

    With equal weights, it is the mean of the kernel over pairs of different samples; if one sample has all the weight,
    it is 1.
    """
    kernel = _kernel(a, a, h)
    own = torch.einsum("bij,bj->bi", kernel, weights)
    square = (weights * own).sum(1)
    # as for a variance, with the squared distance of each sample from the mean, 1 - 2 own + square
    return square - (variance_weights(weights)[1] * (1 - 2 * own + square[:, None])).sum(1)


def _median(pooled: Tensor) -> Tensor:
    size = pooled.shape[1]
    first, second = torch.triu_indices(size, size, offset=1, device=pooled.device)
    return exact_distances(pooled, pooled)[:, first, second].median(1).values


def _flat_pair(x: Tensor, y: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Both sets as ``(B, N, D)`` and ``(B, M, D)``."""
    if x.ndim != y.ndim or x.ndim < 2 or x.shape[0] != y.shape[0] or x.shape[2:] != y.shape[2:]:
        raise ValueError(
            f"{name}: {tuple(x.shape)} and {tuple(y.shape)} are not two sets of samples (B, N, *shape) and "
            "(B, M, *shape); for plain sets pass x[None] and y[None]"
        )
    return (x.flatten(2), y.flatten(2)) if x.ndim > 2 else (x[:, :, None], y[:, :, None])
