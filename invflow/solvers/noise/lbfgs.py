"""Limited-memory BFGS for many small problems in parallel. Each row has its own steps and stops by itself."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from invflow.smc import precise

__all__ = ["BatchedLBFGS", "Objective"]

#: function that returns values ``(k,)`` in float64 and gradients ``(k, d)`` at points ``(k, d)`` of the rows ``(k,)``
Objective = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

_ARMIJO = 1e-4
_MAX_BACKTRACKS = 12
_WINDOW = 10  # iterations over which the decrease of the objective is measured
_LEAST_CURVATURE = 1e-10  # smallest curvature of a step, in units of |step| |change of gradient|


class BatchedLBFGS:
    """Minimiser of ``n`` functions of ``d`` variables in parallel (Nocedal and Wright 2006, algorithm 7.4).

    The rows share only the batch: each has its own step lengths, curvature pairs and stopping time. A row stops when
    its objective has fallen by less than ``tolerance`` in ten iterations, or when no step along its direction lowers
    it. It then costs nothing more. Step lengths come from backtracking with quadratic interpolation.

    Args:
        objective: Function that returns values and gradients of given rows.
        start: Initial points, ``(n, d)``.
        scale: Guess of each variable's range, ``(n, d)`` or broadcastable, over 0. Its square is the initial inverse
            Hessian. None: 1.
        memory: Number of curvature pairs kept; each takes two tensors like ``start``.
        tolerance: Smallest decrease in ten iterations, in units of the objective; see above.
        max_step: Largest length of the first trial step of an iteration, in units of ``scale``.

    Attributes:
        point: Best points so far, ``(n, d)``.
        value: Values at ``point``, ``(n,)``, float64.
        gradient: Gradients at ``point``, ``(n, d)``.
        active: Whether a row is still running, ``(n,)``.
        levelled: Whether a row has converged, ``(n,)``.
        iterations: Number of iterations of each row, ``(n,)``.
    """

    def __init__(self, objective: Objective, start: Tensor, *, scale: Tensor | None = None, memory: int = 50,
                 tolerance: float = 1.0, max_step: float = 8.0) -> None:
        self.objective, self.memory, self.tolerance, self.max_step = objective, memory, tolerance, max_step
        self._rows = torch.arange(len(start), device=start.device)  # rows that are still running
        self.point = start.clone()
        self.value, self.gradient = objective(start, self._rows)
        self._scale = torch.ones_like(start) if scale is None else scale.to(start).expand_as(start).clone()
        self.active = torch.ones_like(self._rows, dtype=torch.bool)
        self.levelled = torch.zeros_like(self.active)
        self.iterations = torch.zeros_like(self._rows)
        self._steps: list[Tensor] = []  # for the running rows, oldest first
        self._changes: list[Tensor] = []
        self._values = [self.value.clone()]  # values of all rows in the last iterations

    @property
    def running(self) -> bool:
        """Whether any row is still running."""
        return len(self._rows) > 0

    def step(self) -> None:
        """Do one iteration of every running row."""
        rows = self._rows
        if len(rows) == 0:
            return
        point, value, gradient = self.point[rows], self.value[rows], self.gradient[rows]
        direction = -self._apply_inverse_hessian(gradient)
        slope = _dot(gradient, direction)
        # rounding can corrupt the pairs; the negative gradient is always a descent direction
        uphill = ~(slope < 0)
        scaled = -self._scale[rows].square() * gradient
        direction = torch.where(uphill[:, None], scaled, direction)
        length = (direction / self._scale[rows]).norm(dim=1, keepdim=True)
        direction = direction * (self.max_step / length.clamp(min=self.max_step))
        slope = _dot(gradient, direction)
        new_point, new_value, new_gradient, found = self._search(rows, point, value, gradient, direction, slope)
        self._remember(new_point - point, new_gradient - gradient)
        self.point[rows], self.value[rows], self.gradient[rows] = new_point, new_value, new_gradient
        self.iterations[rows] += 1
        self._finish(rows, found, -slope)

    def _apply_inverse_hessian(self, gradient: Tensor) -> Tensor:
        """Two-loop recursion. Without pairs, a step of unit length in units of the scale."""
        scale = self._scale[self._rows].square()
        if not self._steps:
            moved = scale * gradient
            result: Tensor = moved / (moved / scale.sqrt()).norm(dim=1, keepdim=True).clamp(min=1.0)
            return result
        q, alphas = gradient, []
        for s, y in zip(reversed(self._steps), reversed(self._changes)):
            rho = _inverse(_dot(s, y))[:, None]
            alpha = rho * _dot(s, q)[:, None]
            q = q - alpha * y
            alphas.append((rho, alpha))
        s, y = self._steps[-1], self._changes[-1]
        usable = _dot(s, y) > 0
        gamma = torch.where(usable, _dot(s, y) * _inverse((scale * y.square()).sum(1)), 1.0)
        q = gamma[:, None] * scale * q
        for s, y, (rho, alpha) in zip(self._steps, self._changes, reversed(alphas)):
            q = q + s * (alpha - rho * _dot(y, q)[:, None])
        return q

    def _search(self, rows: Tensor, point: Tensor, value: Tensor, gradient: Tensor, direction: Tensor,
                slope: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Points with a sufficient decrease, and a mask of the rows that found one. Other rows keep their points."""
        point, value, gradient, start = point.clone(), value.clone(), gradient.clone(), point
        first, slope = value.clone(), precise(slope)
        length = torch.ones_like(slope)
        pending = torch.arange(len(rows), device=rows.device)
        for _ in range(_MAX_BACKTRACKS):
            trial = start[pending] + length[pending, None].to(start) * direction[pending]
            trial_value, trial_gradient = self.objective(trial, rows[pending])
            # NaN fails too
            enough = trial_value <= first[pending] + _ARMIJO * length[pending] * slope[pending]
            # the number of rows left decides the cost of the next trial: this synchronises with the GPU
            fell, left = enough.nonzero()[:, 0], (~enough).nonzero()[:, 0]
            done = pending[fell]
            point[done], value[done], gradient[done] = trial[fell], trial_value[fell], trial_gradient[fell]
            pending, trial_value = pending[left], trial_value[left]
            if len(pending) == 0:
                break
            old = length[pending]
            fall = slope[pending] * old
            parabola = -fall * old / (2 * (trial_value - first[pending] - fall))
            length[pending] = parabola.nan_to_num(nan=0.0).clamp(min=0.1 * old, max=0.5 * old)
        found = torch.ones_like(rows, dtype=torch.bool)
        found[pending] = False
        return point, value, gradient, found

    def _remember(self, step: Tensor, change: Tensor) -> None:
        """Keep a pair if the curvature along it is positive; a pair of zeros has no effect."""
        curved = _dot(step, change) > _LEAST_CURVATURE * step.norm(dim=1) * change.norm(dim=1)
        self._steps.append(torch.where(curved[:, None], step, 0.0))
        self._changes.append(torch.where(curved[:, None], change, 0.0))
        del self._steps[: -self.memory], self._changes[: -self.memory]

    def _finish(self, rows: Tensor, found: Tensor, promised: Tensor) -> None:
        """Stop the rows that have converged or cannot make progress."""
        self._values = [*self._values[-_WINDOW:], self.value.clone()]
        level = torch.zeros_like(found)
        if len(self._values) > _WINDOW:
            level = (self._values[0] - self.value)[rows] < self.tolerance
        # if no decrease was found and little was expected, only rounding is left
        level = level | (~found & (promised < self.tolerance))
        keep = found & ~level
        self.levelled[rows], self.active[rows] = level, keep
        kept = keep.nonzero()[:, 0]  # synchronises with the GPU, so that rows that have stopped cost no more calls
        if len(kept) < len(rows):
            self._rows = rows[kept]
            self._steps = [s[kept] for s in self._steps]
            self._changes = [y[kept] for y in self._changes]


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(1)


def _inverse(values: Tensor) -> Tensor:
    """1 / x where x is over 0, else 0."""
    return torch.where(values > 0, 1 / values, 0.0)
