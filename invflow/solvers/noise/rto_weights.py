"""Randomise-then-optimise with a known density: equations with a fixed linearisation, and weights of their solutions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from invflow.smc import precise

if TYPE_CHECKING:
    from invflow.likelihood import GaussianLikelihood
    from invflow.solvers.noise.perturbed import PerturbedProblem

__all__ = ["MAX_MEASURED", "Linearisation", "Solution", "find_missed", "solve_linearised"]

MAX_MEASURED = 256  # each draw and iteration takes a determinant of this size, and a call for each of its rows
_MAX_HALVINGS = 10
_APART = 0.05  # distance in noise space below which two solutions are the same up to rounding


@dataclass(frozen=True)
class Linearisation:
    r"""Derivative of the scaled measurement h(z) = A f(z) / sigma at one point per observation.

    Attributes:
        point: Points of linearisation, ``(B, d)``.
        value: h at these points, ``(B, m)``.
        jacobian: :math:`G_*`, ``(B, m, d)``.
        columns: Entries of the flattened measurement that are observed in any observation, ``(m,)``.
    """

    point: Tensor
    value: Tensor
    jacobian: Tensor
    columns: Tensor

    def select(self, owner: Tensor) -> Linearisation:
        """Linearisations of the observations ``owner`` ``(n,)``."""
        return Linearisation(self.point[owner], self.value[owner], self.jacobian[owner], self.columns)

    @classmethod
    def at(cls, problem: PerturbedProblem, noise: Tensor) -> Linearisation:
        """Linearise the problems of B observations at ``(B, *state_shape)``.

        Raises:
            ValueError: For more than 256 measured values.
        """
        columns = _observed_columns(problem.likelihood)
        if len(columns) > MAX_MEASURED:
            raise ValueError(
                f"weights need a determinant over the measured values, and there are {len(columns)}, more than "
                f"{MAX_MEASURED}: use NoiseRTO without weights and correct it, invflow.NoiseSMC(prior, start='rto')")
        value, jacobian, _ = _linearise(problem, noise, torch.arange(len(noise), device=noise.device), columns)
        return cls(noise.flatten(1), value, jacobian, columns)


@dataclass(frozen=True)
class Solution:
    """Draws of one chunk after one iteration; see :class:`~invflow.solvers.noise.rto.NoiseRTOState`.

    Attributes:
        noise: z, ``(n, *state_shape)``.
        residual: Norm of the equations' residual, ``(n,)``.
        iterations, active, converged: Each ``(n,)``.
        log_weights: Log weights, ``(n,)``; -inf for draws without a solution so far.
    """

    noise: Tensor
    residual: Tensor
    iterations: Tensor
    active: Tensor
    converged: Tensor
    log_weights: Tensor

    def take(self, index: Tensor) -> Solution:
        """Select some of the draws."""
        return Solution(*(getattr(self, field.name)[index] for field in fields(self)))


def find_missed(problem: PerturbedProblem, linearisation: Linearisation, solution: Solution, starts: Tensor,
                max_iterations: int) -> Tensor:
    """Log weights of solutions that the draws have missed, found from other starts.

    The density of the draws is valid if each equation has only the solution that was found. The weight of another
    solution measures the posterior there, which no draw represents. Far out, where the posterior is negligible, such a
    solution does no harm.

    Args:
        problem, linearisation, max_iterations: As in :func:`solve_linearised`.
        solution: Solution of each draw.
        starts: Noise near which to start, as far as the equations allow, ``(k, n, d)``.

    Returns:
        Largest log weight, ``(n,)``; -inf if no other solution was found, which does not prove that there is none.
    """
    missed = torch.full_like(solution.log_weights, -torch.inf)
    inverse = torch.linalg.pinv(linearisation.jacobian.mT)
    for start in starts:
        u = (inverse @ (start - problem.xi.flatten(1))[..., None])[..., 0]
        *_, other = solve_linearised(problem, linearisation, max_iterations, u)
        apart = (other.noise - solution.noise).flatten(1).norm(dim=1) > _APART
        found = other.converged & (apart | ~solution.converged)
        missed = torch.where(found, missed.maximum(other.log_weights), missed)
    return missed


def solve_linearised(problem: PerturbedProblem, linearisation: Linearisation, max_iterations: int,
                     start: Tensor | None = None) -> Iterator[Solution]:
    r"""Solve z - xi + G*^T (h(z) - d) = 0 for each draw, d = (y + sigma e) / sigma, by damped Newton steps.

    All solutions are z = xi + G*^T u with u in R^m. This leaves the m equations u + h(xi + G*^T u) - d = 0 with the
    derivative I + G(z) G*^T.

    Args:
        problem: Problem of n draws.
        linearisation: Linearisation of the n draws.
        max_iterations: Maximum number of Newton iterations. Each takes 1 forward call and m backward calls, and a call
            for each halving.
        start: Initial u, ``(n, m)``. None: the solution for an exact linearisation.

    Yields:
        A :class:`Solution` before the first iteration and after each.
    """
    jacobian, columns = linearisation.jacobian, linearisation.columns
    xi, rows = problem.xi.flatten(1), torch.arange(len(problem.xi), device=problem.xi.device)
    target, measured = (_measured(lik, columns).to(xi) for lik in (problem.perturbed, problem.likelihood))
    gram = _with_unit(jacobian @ jacobian.mT)
    # if the linearisation is exact, this is the solution
    offset = target - linearisation.value - (jacobian @ (xi - linearisation.point)[..., None])[..., 0]
    u = torch.linalg.solve(gram, offset) if start is None else start.clone()
    tolerance = 10 * math.sqrt(torch.finfo(u.dtype).eps)
    noise, residual = problem.xi.clone(), torch.full_like(u[:, 0], torch.inf)
    iterations, converged = torch.zeros_like(rows), torch.zeros_like(rows, dtype=torch.bool)
    log_weights = precise(torch.full_like(residual, -torch.inf))
    for k in range(max_iterations + 1):
        problem.iteration = k
        z = (xi[rows] + (jacobian[rows].mT @ u[rows][..., None])[..., 0]).view(-1, *problem.xi.shape[1:])
        value, slope, log_likelihood = _linearise(problem, z, rows, columns)
        equations = u[rows] + value - target[rows]
        norm = equations.norm(dim=1)
        derivative = _with_unit(slope @ jacobian[rows].mT)
        noise[rows], residual[rows], iterations[rows] = z, norm, k
        solved = norm < tolerance
        converged[rows] = solved
        weights = _log_weights(z.flatten(1), value - measured[rows], log_likelihood,
                               derivative, jacobian[rows], gram[rows])
        log_weights[rows] = torch.where(solved, weights, -torch.inf)
        step, failed = torch.linalg.solve_ex(derivative, -equations)
        usable = (~solved & (failed == 0) & step.isfinite().all(1)).nonzero()[:, 0]
        if k < max_iterations and len(usable):
            found = _halve(problem, jacobian, columns, target, u, rows[usable], step[usable], norm[usable])
            rows = rows[usable][found]
        else:
            rows = rows[:0]
        active = torch.zeros_like(converged)
        active[rows] = True
        yield Solution(noise.clone(), residual.clone(), iterations.clone(), active, converged.clone(),
                       log_weights.clone())
        if len(rows) == 0:
            return


def _halve(problem: PerturbedProblem, jacobian: Tensor, columns: Tensor, target: Tensor, u: Tensor, rows: Tensor,
           step: Tensor, norm: Tensor) -> Tensor:
    """Take steps, halved until the norm of the equations falls. Writes to ``u``; returns which rows found a step."""
    length, pending = torch.ones_like(norm), torch.arange(len(rows), device=rows.device)
    start = u[rows]
    for _ in range(_MAX_HALVINGS):
        trial = start[pending] + length[pending, None] * step[pending]
        chosen = rows[pending]
        z = problem.xi.flatten(1)[chosen] + (jacobian[chosen].mT @ trial[..., None])[..., 0]
        value = _scaled(problem, z.view(-1, *problem.xi.shape[1:]), chosen, columns)[0]
        lower = (trial + value - target[chosen]).norm(dim=1) <= (1 - 1e-4 * length[pending]) * norm[pending]
        fell, left = lower.nonzero()[:, 0], (~lower).nonzero()[:, 0]
        u[chosen[fell]] = trial[fell]
        pending = pending[left]
        length[pending] *= 0.5
        if len(pending) == 0:
            break
    found = torch.ones_like(rows, dtype=torch.bool)
    found[pending] = False
    return found


def _log_weights(z: Tensor, residual: Tensor, log_likelihood: Tensor, derivative: Tensor, jacobian: Tensor,
                 gram: Tensor) -> Tensor:
    """Log of N(z; 0, I) p(y | f(z)) / q(z), ``(n,)`` in float64."""
    z, residual, derivative, jacobian, gram = (precise(v) for v in (z, residual, derivative, jacobian, gram))
    v = z + (jacobian.mT @ residual[..., None])[..., 0]
    image = (jacobian @ v[..., None])[..., 0]
    # |v|^2 - |G v|^2 in the norm of (I + G G^T)^-1 is the quadratic form of (I + G^T G)^-1
    form = v.square().sum(1) - (image * torch.linalg.solve(gram, image)).sum(1)
    log_q = torch.linalg.slogdet(derivative)[1] - 0.5 * torch.linalg.slogdet(gram)[1] - 0.5 * form
    result: Tensor = precise(log_likelihood) - 0.5 * z.square().sum(1) - log_q
    return result


def _linearise(problem: PerturbedProblem, noise: Tensor, rows: Tensor,
               columns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """h ``(k, m)``, its derivative ``(k, m, d)`` and the log likelihood ``(k,)`` at the noise of the rows."""
    with torch.enable_grad():
        z = noise.detach().requires_grad_()
        value, log_likelihood = _scaled(problem, z, rows, columns)
        slope = [torch.autograd.grad(value[:, j].sum(), z, retain_graph=True)[0].flatten(1)
                 for j in range(value.shape[1])]
    return value.detach(), torch.stack(slope, dim=1), log_likelihood.detach()


def _scaled(problem: PerturbedProblem, noise: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """h ``(k, m)`` and the log likelihood ``(k,)``."""
    likelihood = problem.likelihood.select(rows)
    images = problem.prior.one_step(noise)[:, None]
    log_likelihood = likelihood(images)[:, 0]
    problem.check(noise, images, log_likelihood, rows)
    clean = likelihood.predict(images)[:, 0].flatten(1)[:, columns]
    observed = _mask(likelihood, columns)
    scaled = clean / likelihood.sigma[:, None].to(clean)
    return (scaled if observed is None else scaled * observed), log_likelihood


def _measured(likelihood: GaussianLikelihood, columns: Tensor) -> Tensor:
    """y / sigma, ``(n, m)``; zero at unobserved entries."""
    y = likelihood.y.flatten(1)[:, columns] / likelihood.sigma[:, None]
    observed = _mask(likelihood, columns)
    return y if observed is None else y * observed


def _mask(likelihood: GaussianLikelihood, columns: Tensor) -> Tensor | None:
    observed = likelihood.operator.observed()
    return None if observed is None else observed.to(likelihood.y.device).flatten(1)[:, columns]


def _observed_columns(likelihood: GaussianLikelihood) -> Tensor:
    observed = likelihood.operator.observed()
    if observed is None:
        return torch.arange(likelihood.y[0].numel(), device=likelihood.y.device)
    return observed.to(likelihood.y.device).flatten(1).any(0).nonzero()[:, 0]


def _with_unit(matrices: Tensor) -> Tensor:
    """I + M for each matrix."""
    return matrices + torch.eye(matrices.shape[-1], device=matrices.device, dtype=matrices.dtype)
