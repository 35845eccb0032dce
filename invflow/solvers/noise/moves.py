"""Markov moves in noise space that leave N(mean, diag std^2) e^{lambda r(f(z))} invariant."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from invflow._core.random import as_generator, draw_noise
from invflow._core.shapes import column
from invflow.smc import precise, scale_log
from invflow.solvers.noise.metric import Preconditioner
from invflow.solvers.noise.target import NoiseTarget, Particles

__all__ = [
    "CrankNicolson", "CrankNicolsonLangevin", "EllipticalSlice", "Move", "MoveRandom", "accept_or_stay", "gradient_of",
]

_MAX_SHRINKS = 40  # the bracket roughly halves each time, so that only rounding is left in the end


@dataclass(frozen=True)
class MoveRandom:
    """Random numbers for one move of b observations.

    Attributes:
        standard: Standard normal numbers, ``(b, N, *state_shape)``.
        uniform: Uniform numbers in [0, 1), ``(b, N, k)``.
    """

    standard: Tensor
    uniform: Tensor

    def select(self, rows: Tensor) -> MoveRandom:
        """Random numbers of some observations."""
        return MoveRandom(self.standard[rows.to(self.standard.device)], self.uniform[rows.to(self.uniform.device)])

    def to(self, like: Tensor) -> MoveRandom:
        """Move to the device of ``like``; the normal numbers also take its type."""
        return MoveRandom(self.standard.to(like), precise(self.uniform.to(like.device)))


class Move(ABC):
    """One move of every particle, reversible with respect to the tempered target.

    Attributes:
        uses_gradient: Whether particles must carry the gradient of r(f(z)).
        tunable: Whether there is a step size.
        uniforms: Number of uniform random numbers per move and particle.
        preconditioned: Whether it uses a metric if one is given.
        best_acceptance: Share of accepted proposals at which it moves farthest per network call.
    """

    uses_gradient = False
    tunable = True
    uniforms = 1
    preconditioned = False
    best_acceptance = 0.57

    def draw(self, shape: tuple[int, ...], generator: torch.Generator | int | None) -> MoveRandom:
        """Draw random numbers for a move of ``shape = (B, N, *state_shape)``.

        Their number never depends on the data, so that an observation's numbers do not depend on the others.
        """
        generator = as_generator(generator)
        wide = torch.float32 if generator.device.type == "mps" else torch.float64
        uniform = torch.rand((*shape[:2], self.uniforms), generator=generator, device=generator.device, dtype=wide)
        return MoveRandom(draw_noise(shape, generator), uniform)

    @abstractmethod
    def __call__(self, target: NoiseTarget, particles: Particles, rows: Tensor, temperature: Tensor,
                 step_size: Tensor, random: MoveRandom,
                 preconditioner: Preconditioner | None = None) -> tuple[Particles, Tensor]:
        """Move b observations.

        Args:
            target: Target over all B observations.
            particles: Particles of the b observations.
            rows: Indices of these among the B observations, ``(b,)``.
            temperature: lambda, ``(b,)``.
            step_size: h in (0, 1], ``(b,)``; ignored by moves that are not tunable.
            random: Random numbers from :meth:`draw`.
            preconditioner: Source of the metric and receiver of the gradients; ignored by moves without a metric.

        Returns:
            The particles, and the share of accepted proposals, ``(b,)``.
        """


class CrankNicolson(Move):
    r"""Preconditioned Crank-Nicolson: in units of the reference, u' = rho u + h xi, rho = sqrt(1 - h^2).

    It leaves the Gaussian reference invariant for any h. The acceptance ratio therefore contains only the reward,
    :math:`e^{\lambda (r' - r)}`, and does not fall with the dimension (Neal 1999; Cotter, Roberts, Stuart,
    White 2013, "MCMC methods for functions"). It needs no gradient.
    """

    def __call__(self, target: NoiseTarget, particles: Particles, rows: Tensor, temperature: Tensor,
                 step_size: Tensor, random: MoveRandom,
                 preconditioner: Preconditioner | None = None) -> tuple[Particles, Tensor]:
        """One move; see :class:`Move`."""
        mean, std = target.reference(temperature, rows)
        h = column(step_size, particles.noise)
        u = (particles.noise - mean) / std
        moved = (1 - h.square()).sqrt() * u + h * random.standard
        proposed = target.evaluate(mean + std * moved, rows)
        gain = scale_log(temperature[:, None], proposed.log_reward - particles.log_reward)
        return accept_or_stay(particles, proposed, gain, random)


class CrankNicolsonLangevin(Move):
    r"""Crank-Nicolson with a Langevin drift (Cotter, Roberts, Stuart, White 2013).

    In units of the reference, let v be the gradient of lambda r(f(z)). Then :math:`u' = \rho u + s` with the
    step :math:`s = (1 - \rho) v + h \xi`. The symmetric part of the proposal density cancels against the
    reference, which leaves the log acceptance ratio

    .. math:: \lambda (r' - r) + \frac{\langle h^2 u - \rho s, v' \rangle - \langle s, v \rangle
        - \frac{1 - \rho}{2} (|v'|^2 - |v|^2)}{1 + \rho},

    where v' is the gradient at u'. This form has no difference of nearly equal densities.
    """

    uses_gradient = True

    def __call__(self, target: NoiseTarget, particles: Particles, rows: Tensor, temperature: Tensor,
                 step_size: Tensor, random: MoveRandom,
                 preconditioner: Preconditioner | None = None) -> tuple[Particles, Tensor]:
        """One move; see :class:`Move`."""
        mean, std = target.reference(temperature, rows)
        h = column(step_size, particles.noise)
        rho = (1 - h.square()).sqrt()
        scale = column(temperature, particles.noise) * std
        u = (particles.noise - mean) / std
        drift = scale * gradient_of(particles)
        step = (1 - rho) * drift + h * random.standard
        proposed = target.evaluate(mean + std * (rho * u + step), rows)
        back = scale * gradient_of(proposed)
        asymmetry = (h.square() * u - rho * step) * back - step * drift
        asymmetry = asymmetry - 0.5 * (1 - rho) * (back.square() - drift.square())
        gain = scale_log(temperature[:, None], proposed.log_reward - particles.log_reward)
        gain = gain + precise(asymmetry / (1 + rho)).flatten(2).sum(2)
        return accept_or_stay(particles, proposed, gain, random)


def gradient_of(particles: Particles) -> Tensor:
    """Gradient of r(f(z)) with respect to z, at the particles."""
    if particles.gradient is None:
        raise ValueError("a Langevin move needs particles with gradients: pass NoiseTarget(..., gradient=True)")
    return particles.gradient


def accept_or_stay(particles: Particles, proposed: Particles, gain: Tensor,
                   random: MoveRandom) -> tuple[Particles, Tensor]:
    """Accept with probability e^gain, and never if it is NaN."""
    accept = random.uniform[..., 0].log() < gain
    return particles.choose(accept, proposed), precise(accept).mean(1)


class EllipticalSlice(Move):
    """Elliptical slice sampling (Murray, Adams, MacKay 2010): no step size, no gradient.

    The move draws a level below the current tempered reward. It then tries points on the ellipse through the particle
    and a fresh draw of the reference, from a bracket that shrinks towards the particle, until one lies above the level.
    Every point costs a call; the reported acceptance is one over the number of points tried. A particle that finds no
    point in 40 tries stays, which is reversible too.
    """

    tunable = False
    uniforms = 2 + _MAX_SHRINKS

    def __call__(self, target: NoiseTarget, particles: Particles, rows: Tensor, temperature: Tensor,
                 step_size: Tensor, random: MoveRandom,
                 preconditioner: Preconditioner | None = None) -> tuple[Particles, Tensor]:
        """One move; see :class:`Move`."""
        mean, std = target.reference(temperature, rows)
        batch, trailing = particles.noise.shape[:2], particles.noise.shape[2:]
        mean, std = (v.expand(*batch, *trailing).flatten(0, 1) for v in (mean, std))
        current = particles.map(lambda values: values.flatten(0, 1))
        standard, uniform = random.standard.flatten(0, 1), random.uniform.flatten(0, 1)
        owner, level = rows.repeat_interleave(batch[1]), temperature.repeat_interleave(batch[1])
        u = (current.noise - mean) / std
        height = scale_log(level, current.log_reward) + uniform[:, 0].log()
        angle = 2 * math.pi * uniform[:, 1]
        low, high = angle - 2 * math.pi, angle.clone()
        pending = torch.arange(len(u), device=u.device)
        tried = precise(torch.zeros_like(level))
        for k in range(_MAX_SHRINKS + 1):
            theta = column(angle[pending], u)
            point = u[pending] * theta.cos() + standard[pending] * theta.sin()
            found = target.evaluate_rows(mean[pending] + std[pending] * point, owner[pending], pending % batch[1])
            tried[pending] += 1
            inside = scale_log(level[pending], found.log_reward) > height[pending]
            # the number of particles left decides the cost of the next round: this synchronises with the GPU
            done, left = inside.nonzero()[:, 0], (~inside).nonzero()[:, 0]
            current = current.write(pending[done], found.map(partial(_rows, chosen=done)))
            pending = pending[left]
            if len(pending) == 0 or k == _MAX_SHRINKS:
                break
            rejected = angle[pending]
            low[pending] = torch.where(rejected < 0, rejected, low[pending])
            high[pending] = torch.where(rejected < 0, high[pending], rejected)
            angle[pending] = torch.lerp(low[pending], high[pending], uniform[pending, 2 + k])
        accepted = 1 / tried.unflatten(0, batch).mean(1)
        return current.map(lambda values: values.unflatten(0, batch)), accepted


def _rows(values: Tensor, chosen: Tensor) -> Tensor:
    """Some rows of a tensor."""
    return values[chosen]
