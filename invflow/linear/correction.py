"""Correction of samples towards the measurement: one linear step, without a network."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from invflow._core.conjugate_gradients import Map, solve
from invflow._core.random import draw_noise
from invflow._core.shapes import column, only_observed
from invflow.operator import Operator

__all__ = ["correct", "measurement_noise"]

#: smallest noise level assumed, in the measurement's units: A C A^T alone can be singular
LEAST_SIGMA = 1e-4
ITERATIONS, TOLERANCE = 24, 1e-3
#: block size of torch's normal numbers on a CPU: otherwise the last values of a draw depend on its length
BLOCK = 16


def correct(operator: Operator, y: Tensor, sigma: Tensor, x: Tensor, variance: Tensor,
            noise: Tensor) -> tuple[Tensor, Tensor]:
    r"""Move samples towards their measurements, with fresh noise of the measurement's level.

    .. math:: x' = x + C A^T (A C A^T + \sigma^2)^{-1} (y + \sigma e - A x), \qquad
        C = \operatorname{diag}(\mathrm{variance}), \; e \sim N(0, I)

    (Matheron's rule, as in kriging and in ensemble Kalman filters with perturbed observations: Evensen 1994; Burgers,
    van Leeuwen and Evensen 1998.) If x is a draw from a Gaussian N(m, C) independent of y, then x' is a draw
    from the posterior under that Gaussian. A nonlinear operator is linearised at x.

    The system is solved by conjugate gradients. Gradients with respect to x and the variance use implicit
    differentiation of the solution (one more solve), not the steps of the solver.

    Args:
        operator: Operator with one parameter set, or one for each row.
        y: ``(n, *measurement_shape)``.
        sigma: Noise levels ``(n,)``, at least 0.
        x: ``(n, *image_shape)``.
        variance: ``(n, *image_shape)``, at least 0: how far each pixel may move.
        noise: e, ``(n, *measurement_shape)``.

    Returns:
        x', and the number of applications of each row's operator or adjoint, ``(n,)``.
    """
    observed = operator.observed()

    def seen(values: Tensor) -> Tensor:
        return only_observed(values, observed)

    level = column(sigma, y)
    damping = level.clamp(min=LEAST_SIGMA).square()
    clean = operator(x)
    forward, transposed = _tangent(operator, x)

    def system(spread: Tensor) -> Map:
        return lambda w: seen(forward(spread * transposed(seen(w)))) + damping * w

    right, fixed = seen(y + level * noise - clean), system(variance.detach())
    with torch.no_grad():
        # row sums: equal to the diagonal if A C A^T is diagonal (masks, block averages); one step is then enough
        scale = fixed(torch.ones_like(right)).abs().clamp(min=LEAST_SIGMA**2)

        def invert(values: Tensor) -> tuple[Tensor, Tensor]:
            return solve(fixed, values, lambda w: w / scale, ITERATIONS, TOLERANCE)

        found, steps = invert(right.detach())
    if torch.is_grad_enabled() and (right.requires_grad or variance.requires_grad):
        # at the solution the error is zero, but its gradient is not: it gives the derivative of the solution
        found = _Implicit.apply(right - system(variance)(found), found, lambda values: invert(values)[0])
    return x + variance * transposed(seen(found)), 2 * steps + 4


class _Implicit(torch.autograd.Function):
    """The solution w of M w = b for a symmetric M, with a gradient through its error b - M w, whose value is zero."""

    @staticmethod
    def forward(ctx: Any, error: Tensor, found: Tensor, invert: Map) -> Tensor:
        ctx.invert = invert
        return found.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        with torch.no_grad():
            return ctx.invert(gradient), None, None


def _tangent(operator: Operator, x: Tensor) -> tuple[Map, Map]:
    """The operator and its adjoint; for a nonlinear operator, its derivative at x and the transpose."""
    if operator.linear:
        return operator, operator.adjoint
    point = x.detach()
    pull_back = torch.func.vjp(operator, point)[1]

    def push(v: Tensor) -> Tensor:
        moved: Tensor = torch.func.jvp(operator, (point,), (v,))[1]
        return moved

    def pull(w: Tensor) -> Tensor:
        back: Tensor = pull_back(w)[0]
        return back

    return push, pull


def measurement_noise(rows: int, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Noise ``(rows, *shape)`` for :func:`correct`, where fewer rows always equal the first of more.

    The generator does not advance: the numbers come from another one, seeded by its next draw.
    """
    fork = torch.Generator(generator.device)
    fork.set_state(generator.get_state())
    seed = torch.randint(2**62, (1,), generator=fork, device=generator.device)
    own = torch.Generator(generator.device).manual_seed(int(seed))
    size = torch.Size(shape).numel()
    return draw_noise((rows, -(-size // BLOCK) * BLOCK), own)[:, :size].reshape(rows, *shape)
