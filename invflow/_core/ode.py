"""Runge-Kutta steps along a flow, with times that may differ between rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from invflow._core.checks import to_tensor_hint
from invflow._core.shapes import with_axes

__all__ = ["TABLEAUS", "Tableau", "Time", "expand_time", "integrate", "runge_kutta_step"]

Time: TypeAlias = "float | Tensor"


class Tableau(NamedTuple):
    """Explicit Runge-Kutta method: times of the stages, their coefficients, and the weights of the step."""

    nodes: tuple[float, ...]
    rows: tuple[tuple[float, ...], ...]
    weights: tuple[float, ...]
    order: int


#: Euler, midpoint, Heun, the classical fourth-order rule, the fifth-order rule of Dormand and Prince (1980)
TABLEAUS = {
    "euler": Tableau((0.0,), ((),), (1.0,), 1),
    "midpoint": Tableau((0.0, 0.5), ((), (0.5,)), (0.0, 1.0), 2),
    "heun": Tableau((0.0, 1.0), ((), (1.0,)), (0.5, 0.5), 2),
    "rk4": Tableau((0.0, 0.5, 0.5, 1.0), ((), (0.5,), (0.0, 0.5), (0.0, 0.0, 1.0)),
                   (1 / 6, 1 / 3, 1 / 3, 1 / 6), 4),
    "dopri5": Tableau(
        (0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0),
        ((), (1 / 5,), (3 / 40, 9 / 40), (44 / 45, -56 / 15, 32 / 9),
         (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
         (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656)),
        (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84), 5),
}


def expand_time(t: Time, x: Tensor) -> Tensor:
    """Shape a time for broadcasting against a batch.

    Args:
        t: A float, a 0-d tensor or an ``(n,)`` tensor.
        x: Batch, ``(n, *shape)``.

    Returns:
        ``(n, 1, ..., 1)`` with as many axes as ``x``, in its dtype and on its device.

    Raises:
        ValueError: If ``t`` has neither one entry nor ``n``.
    """
    if not isinstance(x, Tensor):
        raise TypeError(to_tensor_hint(x, "x"))
    if isinstance(t, float | int):  # created on the device of x: a copy to it would synchronise the GPU at each call
        t = torch.full((), t, dtype=x.dtype, device=x.device)
    else:
        t = torch.as_tensor(t, dtype=x.dtype, device=x.device)
    if t.ndim > 1 or (t.ndim == 1 and t.shape[0] not in (1, x.shape[0])):
        raise ValueError(
            f"the time has shape {tuple(t.shape)}, but the batch has {x.shape[0]} rows: pass a float or a "
            f"tensor of shape ({x.shape[0]},)"
        )
    return with_axes(t.expand(x.shape[0]), x.ndim)


def runge_kutta_step(velocity: Callable[[Tensor, Tensor], Tensor], x: Tensor, start: Tensor, end: Tensor,
                     tableau: Tableau) -> Tensor:
    """One explicit Runge-Kutta step of dx/dt = velocity(x, t).

    Args:
        velocity: Velocity, ``(n, *shape), (n, 1, ..., 1) -> (n, *shape)``.
        x: State at time ``start``, ``(n, *shape)``.
        start: Start time, ``(n, 1, ..., 1)``.
        end: End time, ``(n, 1, ..., 1)``.
        tableau: Runge-Kutta method.

    Returns:
        State at time ``end``, ``(n, *shape)``.
    """
    h = end - start
    slopes: list[Tensor] = []

    def combine(coefficients: tuple[float, ...]) -> Tensor:
        used = [c * slope for c, slope in zip(coefficients, slopes) if c]
        return x + h * sum(used[1:], used[0]) if used else x

    for node, row in zip(tableau.nodes, tableau.rows):
        # lerp is exact at both ends, so that a stage at t = 1 is never beyond it
        slopes.append(velocity(combine(row), torch.lerp(start, end, node)))
    return combine(tableau.weights)


def integrate(velocity: Callable[[Tensor, Tensor], Tensor], x: Tensor, s: Time, t: Time, steps: int,
              method: str = "midpoint") -> Tensor:
    """Solve dx/dt = velocity(x, t) from s to t in equal steps.

    Args:
        velocity: Velocity, ``(n, *shape), (n,) -> (n, *shape)``.
        x: State at time ``s``, ``(n, *shape)``.
        s: Start time, a float or ``(n,)``.
        t: End time, a float or ``(n,)``. Rows may run forwards or backwards.
        steps: Number of steps, at least 1. All steps of a row have the same length.
        method: ``"euler"``, ``"midpoint"``, ``"heun"``, ``"rk4"`` or ``"dopri5"``, with 1, 2, 2, 4 or 6
            velocities per step, of order 1, 2, 2, 4 or 5.

    Returns:
        State at time ``t``, ``(n, *shape)``.

    Raises:
        ValueError: For an unknown method, or less than 1 step.
    """
    if method not in TABLEAUS:
        raise ValueError(f"no integration method is called {method!r}: choose one of {', '.join(TABLEAUS)}")
    if steps < 1:
        raise ValueError(f"steps={steps}: an ODE needs at least 1 step")
    start, end = expand_time(s, x), expand_time(t, x)
    for i in range(steps):
        x = runge_kutta_step(lambda state, now: velocity(state, now.flatten()), x,
                             torch.lerp(start, end, i / steps), torch.lerp(start, end, (i + 1) / steps),
                             TABLEAUS[method])
    return x
