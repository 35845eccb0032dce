"""Conjugate gradients with a preconditioner, for systems that are known by what they do."""

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

#: steps after which a system too badly conditioned is given up
_MOST_STEPS = 1000


def solve(apply: Map, right: Tensor, precondition: Map | None, iterations: int, tolerance: float,
          start: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Solve M x = right for a symmetric positive definite M, by preconditioned conjugate gradients, row by row.

    Hestenes and Stiefel (1952). A row that has arrived stays where it is, so that no row depends on the others.

    Args:
        apply: M, of rows ``(n, ...)``.
        right: ``(n, ...)``.
        precondition: roughly the inverse of M, symmetric and positive definite; None is the identity.
        iterations: at most so many.
        tolerance: a row has arrived where its residual, in the preconditioner's norm, is this share of that of
            ``right``; 0 takes all the steps.
        start: first guess; default 0.

    Returns:
        The solution, and the steps that each row took, ``(n,)``.
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
    """Steps from x (None: 0) for M = ``forward``, or for ``back`` after it, whose residual is kept before ``back``.

    Returns:
        The solution, each row's steps ``(n,)``, and the square of what is left of its first residual, ``(n,)``.
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
    # a GPU would be waited for at each step; the steps that it takes in vain are of length zero
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
    """A linear operator, as far as conjugate gradients need it."""

    image_shape: tuple[int, ...]

    def __call__(self, x: Tensor) -> Tensor: ...
    def adjoint(self, y: Tensor) -> Tensor: ...
    def observed(self) -> Tensor | None: ...


def conjugate_gradient(operator: Linear, y: Tensor, iterations: int | None = None,
                       tolerance: float | None = None) -> Tensor:
    """Least-squares image of smallest norm, by conjugate gradients on the normal equations.

    Hestenes and Stiefel (1952), in the stable form CGLS of Bjorck (1996, section 7.4). All rows advance
    together, each with its own step lengths, so that a row's answer does not depend on the others.

    Args:
        operator: linear.
        y: ``(n, *measurement_shape)``; entries that were not observed are ignored.
        iterations: at most so many; few of them regularise. None: until the tolerance is reached, within twenty steps
            for each unknown and 1,000 in all.
        tolerance: stop a row once |A'(y - A x)| falls to this share of |A'y|; default ten times the rounding.

    Returns:
        ``(n, *image_shape)``.

    Warns:
        UserWarning: where the tolerance was to be reached and was not, with what is left.
    """
    tolerance = 10 * torch.finfo(y.dtype).eps if tolerance is None else tolerance
    seen = only_observed(y, operator.observed())
    to_the_end = iterations is None
    if iterations is None:
        iterations = min(_MOST_STEPS, max(100, 20 * min(math.prod(operator.image_shape), y[0].numel())))
    image, _, left = _iterate(operator, operator.adjoint, None, seen, None, iterations, tolerance)
    if to_the_end and bool((left > tolerance**2).any()):  # a GPU is waited for, once
        share = math.sqrt(float(left.max()))
        warnings.warn(f"the pseudo-inverse of {type(operator).__name__} was not reached: after {iterations} conjugate "
                      f"gradient steps {share:.1g} of the gradient is left (asked for: {tolerance:.1g}), so that the "
                      "image is a regularised one: the operator is badly conditioned, and the noise that is blown up "
                      "on the rest of the way is better left to a solver", stacklevel=2)
    return image
