"""Conjugate gradients with a preconditioner, for systems that are known by what they do."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["Map", "solve"]

Map = Callable[[Tensor], Tensor]


def solve(apply: Map, right: Tensor, precondition: Map, iterations: int, tolerance: float,
          start: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Solve M x = right for a symmetric positive definite M, by preconditioned conjugate gradients, row by row.

    Hestenes and Stiefel (1952). A row that has arrived stays where it is, so that no row depends on the others.

    Args:
        apply: M, of rows ``(n, ...)``.
        right: ``(n, ...)``.
        precondition: roughly the inverse of M, symmetric and positive definite.
        iterations: at most so many.
        tolerance: a row has arrived where its residual, in the preconditioner's norm, is this share of that of
            ``right``; 0 takes all the steps.
        start: first guess; default 0.

    Returns:
        The solution, and the steps that each row took, ``(n,)``.
    """
    def dot(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).flatten(1).sum(1)

    def scale(factor: Tensor, values: Tensor) -> Tensor:
        return factor.reshape(-1, *[1] * (values.ndim - 1)) * values

    tiny = torch.finfo(right.dtype).tiny
    x = torch.zeros_like(right) if start is None else start
    residual = right if start is None else right - apply(start)
    scaled = precondition(residual)
    size = dot(residual, scaled)
    target = tolerance**2 * (size if start is None else dot(right, precondition(right)))
    direction, taken = scaled, torch.zeros_like(size)
    for _ in range(iterations):
        active = size > target
        if tolerance and not bool(active.any()):  # asked only where rows can arrive: a GPU would wait for the answer
            break
        moved = apply(direction)
        step = torch.where(active, size / dot(direction, moved).clamp(min=tiny), 0.0)
        x, residual = x + scale(step, direction), residual - scale(step, moved)
        scaled = precondition(residual)
        new = torch.where(active, dot(residual, scaled), size)
        direction = scaled + scale(new / size.clamp(min=tiny), direction)
        size, taken = new, taken + active
    return x, taken
