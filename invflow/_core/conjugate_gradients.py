"""Preconditioned conjugate gradients for linear systems that are given as functions."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from invflow._core.shapes import column, only_observed

__all__ = ["conjugate_gradient", "Map", "solve"]

Map = Callable[[Tensor], Tensor]

#: number of steps after which a badly conditioned system is abandoned
_MOST_STEPS = 1000


def solve(apply: Map, right: Tensor, precondition: Map | None, iterations: int, tolerance: float,
          start: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Solve M x = right for a symmetric positive definite M, by preconditioned conjugate gradients, row by row.

    Hestenes and Stiefel (1952). A row that has converged is not updated further, so that no row depends on the others.

    Args:
        apply: Function that applies M to rows ``(n, ...)``.
        right: Right-hand sides, ``(n, ...)``.
        precondition: Approximate inverse of M, symmetric and positive definite. None is the identity.
        iterations: Maximum number of iterations.
        tolerance: Relative residual, in the preconditioner's norm, at which a row has converged. With 0 all iterations
            are used.
        start: Initial guess; default 0.

    Returns:
        The solution, and the number of steps that each row took, ``(n,)``.
    """
    if start is None:
        return _iterate(apply, None, None, right, precondition, iterations, tolerance)[:2]
    scaled = right if precondition is None else precondition(right)
    return _iterate(apply, None, start, right - apply(start), precondition, iterations, tolerance,
                    first=_dot(right, scaled))[:2]


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).flatten(1).sum(1)


def _iterate(forward: Map, back: Map | None, x: Tensor | None, residual: Tensor, precondition: Map | None,
             iterations: int, tolerance: float, first: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Iterate from x (None: 0) for M = ``forward``, or ``back`` after ``forward`` with the residual before ``back``.

    Returns:
        The solution, the steps of each row ``(n,)``, and the squared ratio of its last residual to its first, ``(n,)``.
    """
    def seen(residual: Tensor) -> tuple[Tensor, Tensor]:
        gradient = residual if back is None else back(residual)
        scaled = gradient if precondition is None else precondition(gradient)
        return scaled, _dot(gradient, scaled)

    tiny = torch.finfo(residual.dtype).tiny
    direction, size = seen(residual)
    x = torch.zeros_like(direction) if x is None else x
    first = size if first is None else first
    target, taken = first * tolerance**2, torch.zeros_like(size)
    # checking each step would synchronise with the GPU each time; superfluous steps have length zero
    asked = 1 if x.device.type == "cpu" else 8
    for k in range(iterations):
        active = size > target
        if tolerance and k % asked == 0 and not bool(active.any()):
            break
        moved = forward(direction)
        bend = _dot(direction, moved) if back is None else _dot(moved, moved)
        step = torch.where(active, size / bend.clamp(min=tiny), 0.0)
        x, residual = x + column(step, x) * direction, residual - column(step, residual) * moved
        scaled, new = seen(residual)
        new = torch.where(active, new, size)
        direction = scaled + column(new / size.clamp(min=tiny), direction) * direction
        size, taken = new, taken + active
    return x, taken, size / first.clamp(min=tiny)


class Linear(Protocol):
    """The part of a linear operator that conjugate gradients need."""

    image_shape: tuple[int, ...]

    def __call__(self, x: Tensor) -> Tensor: ...
    def adjoint(self, y: Tensor) -> Tensor: ...
    def observed(self) -> Tensor | None: ...


def conjugate_gradient(operator: Linear, y: Tensor, iterations: int | None = None,
                       tolerance: float | None = None) -> Tensor:
    """Least-squares image of smallest norm, by conjugate gradients on the normal equations.

    Hestenes and Stiefel (1952), in the stable form CGLS of Bjorck (1996, section 7.4). All rows advance
    together, each with its own step lengths, so that the result of a row does not depend on the others.

    Args:
        operator: Linear forward operator.
        y: Measurements, ``(n, *measurement_shape)``. Unobserved entries are ignored.
        iterations: Maximum number of iterations; a small number regularises. None iterates to the tolerance, with at
            most twenty steps per unknown and 1,000 in total.
        tolerance: Share of |A'y| to which |A'(y - A x)| must fall before a row stops. Default: ten times the machine
            precision.

    Returns:
        ``(n, *image_shape)``.

    Warns:
        UserWarning: If ``iterations`` is None and the tolerance was not reached, with the remaining share.
    """
    tolerance = 10 * torch.finfo(y.dtype).eps if tolerance is None else tolerance
    seen = only_observed(y, operator.observed())
    to_the_end = iterations is None
    if iterations is None:
        iterations = min(_MOST_STEPS, max(100, 20 * min(math.prod(operator.image_shape), y[0].numel())))
    image, _, left = _iterate(operator, operator.adjoint, None, seen, None, iterations, tolerance)
    if to_the_end and bool((left > tolerance**2).any()):  # synchronises with the GPU once
        share = math.sqrt(float(left.max()))
        warnings.warn(f"the pseudo-inverse of {type(operator).__name__} was not reached: after {iterations} conjugate "
                      f"gradient steps {share:.1g} of the gradient is left (tolerance: {tolerance:.1g}). The image is "
                      "therefore regularised. The operator is badly conditioned, and further steps would amplify the "
                      "noise: use a solver instead", stacklevel=2)
    return image
