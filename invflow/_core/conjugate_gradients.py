"""Conjugate gradients with a preconditioner, for systems that are known by what they do."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["conjugate_gradient", "Map", "solve"]

Map = Callable[[Tensor], Tensor]

#: steps after which a system too badly conditioned is given up
_MOST_STEPS = 1000


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


class Linear(Protocol):
    """A linear operator, as far as conjugate gradients need it."""

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
    def squared_norm(values: Tensor) -> Tensor:
        return values.square().flatten(1).sum(1)

    def scale(factor: Tensor, values: Tensor) -> Tensor:
        return factor.reshape(-1, *([1] * (values.ndim - 1))) * values

    kind = torch.finfo(y.dtype)
    tolerance = 10 * kind.eps if tolerance is None else tolerance
    observed = operator.observed()
    residual = y if observed is None else torch.where(observed, y, 0.0)
    direction = operator.adjoint(residual)
    image, size = torch.zeros_like(direction), squared_norm(direction)
    first, target = size, size * tolerance**2
    to_the_end = iterations is None
    if iterations is None:
        iterations = min(_MOST_STEPS, max(100, 20 * min(direction[0].numel(), y[0].numel())))
    # a GPU would be waited for at each step; the steps that it takes in vain are of length zero
    asked = 1 if y.device.type == "cpu" else 8
    for k in range(iterations):
        active = size > target
        if k % asked == 0 and not bool(active.any()):
            break
        moved = operator(direction)
        # a row that has arrived takes steps of length zero, and stays where it is
        step = torch.where(active, size / squared_norm(moved).clamp(min=kind.tiny), 0.0)
        image, residual = image + scale(step, direction), residual - scale(step, moved)
        gradient = operator.adjoint(residual)
        new_size = torch.where(active, squared_norm(gradient), size)
        direction = gradient + scale(new_size / size.clamp(min=kind.tiny), direction)
        size = new_size
    if to_the_end and bool((size > target).any()):  # a GPU is waited for, once
        left = math.sqrt(float((size / first.clamp(min=kind.tiny)).max()))
        warnings.warn(f"the pseudo-inverse of {type(operator).__name__} was not reached: after {iterations} conjugate "
                      f"gradient steps {left:.1g} of the gradient is left (asked for: {tolerance:.1g}), so that the "
                      "image is a regularised one: the operator is badly conditioned, and the noise that is blown up "
                      "on the rest of the way is better left to a solver", stacklevel=2)
    return image
