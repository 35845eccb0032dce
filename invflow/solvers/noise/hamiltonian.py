"""Hamiltonian moves in noise space, with or without a metric learnt from the likelihood."""

from __future__ import annotations

import torch
from torch import Tensor

from invflow._core.shapes import column
from invflow.smc import precise, scale_log
from invflow.solvers.noise.metric import Preconditioner
from invflow.solvers.noise.moves import (
    CrankNicolson,
    CrankNicolsonLangevin,
    EllipticalSlice,
    Move,
    MoveRandom,
    accept_or_stay,
    gradient_of,
)
from invflow.solvers.noise.target import NoiseTarget, Particles

__all__ = ["MOVES", "Hamiltonian"]

_TRUSTED = -3.0  # change of the log density over a trajectory above which its gradients are used
_MOST_SEEN = 2048  # gradients kept per observation and move
_JITTER = 0.2  # jitter of each particle's step, so that no trajectory closes on itself


class Hamiltonian(Move):
    r"""Hamiltonian Monte Carlo on function space (Beskos, Pinski, Sanz-Serna, Stuart 2011).

    In units w in which the reference is N(0, I), the target is :math:`e^{-|w|^2 / 2 - \psi(w)}`. The move draws a
    velocity v ~ N(0, I). Each of L steps then kicks v by :math:`-(\theta / 2) \nabla \psi`, rotates (w, v) by the angle
    :math:`\theta`, which is exact for the Gaussian, and kicks again; sin(theta) is the step size. The end point is
    accepted according to the change of the energy. Neither the rotations nor the dimension contribute to this change. A
    single step is a Langevin move.

    Without a metric, w = u is noise in units of the reference and psi = -lambda r. With a metric
    (:class:`~invflow.solvers.noise.metric.Metric`), u = K w, and
    :math:`\psi = (|K w|^2 - |w|^2) / 2 - \lambda r`. The kicks are then adapted to the sharpness of the likelihood
    along each direction, and on images the step can be many times as large.

    Args:
        steps: L, the number of steps and of forward and backward calls per move.
        preconditioned: Whether to use a metric.
    """

    uses_gradient = True
    uniforms = 2
    best_acceptance = 0.8

    def __init__(self, steps: int = 10, preconditioned: bool = False) -> None:
        self.steps, self.preconditioned = steps, preconditioned

    def __call__(self, target: NoiseTarget, particles: Particles, rows: Tensor, temperature: Tensor,
                 step_size: Tensor, random: MoveRandom,
                 preconditioner: Preconditioner | None = None) -> tuple[Particles, Tensor]:
        """One move; see :class:`Move`. It passes its gradients to the preconditioner."""
        mean, std = target.reference(temperature, rows)
        whole = None if preconditioner is None else preconditioner.metric
        metric = None if whole is None else whole.select(rows)
        shape = particles.noise.shape
        jitter = 1 - _JITTER + 2 * _JITTER * random.uniform[..., 1]
        angle = (step_size.to(jitter)[:, None] * jitter).clamp(max=1.0).asin()
        angle, level = angle.to(particles.noise)[..., None], column(temperature, particles.noise)
        cosine, sine = angle.cos(), angle.sin()

        def kick_of(particles: Particles, w: Tensor) -> tuple[Tensor, Tensor]:
            """-grad psi, ``(b, N, d)``, and the part of psi without the reward, ``(b, N)``."""
            force = (level * std * gradient_of(particles)).flatten(2)
            if metric is None:
                return force, torch.zeros_like(particles.log_reward)
            half, slope = metric.excess(w)
            return metric.stretch(force) - slope, half

        w = ((particles.noise - mean) / std).flatten(2)
        w = w if metric is None else metric.whiten(w)
        velocity = random.standard.flatten(2)
        current, (kick, start) = particles, kick_of(particles, w)
        gained = torch.zeros_like(start)  # kinetic energy, kick by kick: avoids a difference of nearly equal sums
        extra, visited = start, []
        recording = preconditioner is not None and preconditioner.recording
        stride = max(1, shape[1] * self.steps // _MOST_SEEN)
        for k in range(self.steps):
            velocity, gained = _kicked(velocity, kick, 0.5 * angle, gained)
            w, velocity = cosine * w + sine * velocity, cosine * velocity - sine * w
            u = w if metric is None else metric.stretch(w)
            current = target.evaluate(mean + std * u.view(shape), rows)
            if recording and k % stride == 0:
                visited.append(gradient_of(current))
            kick, extra = kick_of(current, w)
            velocity, gained = _kicked(velocity, kick, 0.5 * angle, gained)
        gain = scale_log(temperature[:, None], current.log_reward - particles.log_reward) - (extra - start) - gained
        if preconditioner is not None:
            for gradient in visited:
                preconditioner.see(rows, gradient, gain > _TRUSTED)
        return accept_or_stay(particles, current, gain, random)


def _kicked(velocity: Tensor, kick: Tensor, length: Tensor, gained: Tensor) -> tuple[Tensor, Tensor]:
    """The velocity after a kick, and the kinetic energy gained so far."""
    change = length * kick
    return velocity + change, gained + precise(change * (velocity + 0.5 * change)).sum(2)


#: the moves by name
MOVES: dict[str, Move] = {
    "crank-nicolson-langevin": CrankNicolsonLangevin(),
    "crank-nicolson": CrankNicolson(),
    "elliptical-slice": EllipticalSlice(),
    "hamiltonian": Hamiltonian(),
    "preconditioned-hamiltonian": Hamiltonian(preconditioned=True),
}
