"""Markov moves in noise space that leave N(mean, diag std^2) e^{lambda r(f(z))} invariant."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from invflow._random import as_generator, draw_noise
from invflow.smc import precise, scale_log
from invflow.solvers.noise_target import NoiseTarget, Particles

__all__ = ["MOVES", "CrankNicolson", "CrankNicolsonLangevin", "EllipticalSlice", "Move", "MoveRandom"]

_MAX_SHRINKS = 40  # the bracket shrinks by half or so each time: what is left then is rounding


@dataclass(frozen=True)
class MoveRandom:
    """The random numbers of one move of b observations.

    Attributes:
        standard: ``(b, N, *state_shape)``, standard normal.
        uniform: ``(b, N, k)``, in [0, 1).
    """

    standard: Tensor
    uniform: Tensor

    def select(self, rows: Tensor) -> MoveRandom:
        """Those of some observations."""
        return MoveRandom(self.standard[rows.to(self.standard.device)], self.uniform[rows.to(self.uniform.device)])

    def to(self, like: Tensor) -> MoveRandom:
        """On the device of ``like``, the normal ones also in its type."""
        return MoveRandom(self.standard.to(like), precise(self.uniform.to(like.device)))


class Move(ABC):
    """One move of every particle, reversible with respect to the tempered target.

    Attributes:
        uses_gradient: whether particles must carry the gradient of r(f(z)).
        tunable: whether there is a step size.
        uniforms: uniform random numbers that one move of one particle takes.
    """

    uses_gradient = False
    tunable = True
    uniforms = 1

    def draw(self, shape: tuple[int, ...], generator: torch.Generator | None) -> MoveRandom:
        """Random numbers for a move of ``shape = (B, N, *state_shape)``.

        How many are drawn never depends on the data: an observation's do not depend on the others.
        """
        generator = as_generator(generator)
        wide = torch.float32 if generator.device.type == "mps" else torch.float64
        uniform = torch.rand((*shape[:2], self.uniforms), generator=generator, device=generator.device, dtype=wide)
        return MoveRandom(draw_noise(shape, generator), uniform)

    @abstractmethod
    def __call__(self, target: NoiseTarget, particles: Particles, rows: Tensor, temperature: Tensor,
                 step_size: Tensor, random: MoveRandom) -> tuple[Particles, Tensor]:
        """Move b observations.

        Args:
            target: over all B observations.
            particles: of the b observations.
            rows: ``(b,)``, which of the B they are.
            temperature: ``(b,)``, lambda.
            step_size: ``(b,)``, h in (0, 1]; ignored by a move that is not tunable.
            random: from :meth:`draw`.

        Returns:
            The particles, and ``(b,)``, the share of proposals that was accepted.
        """


class CrankNicolson(Move):
    r"""Preconditioned Crank-Nicolson: in units of the reference, u' = rho u + h xi, rho = sqrt(1 - h^2).

    It leaves the Gaussian reference invariant at any h, so that the acceptance ratio holds the reward alone,
    :math:`e^{\lambda (r' - r)}`, and does not fall with the dimension (Neal 1999; Cotter, Roberts, Stuart,
    White 2013, "MCMC methods for functions"). Needs no gradient.
    """

    def __call__(self, target: NoiseTarget, particles: Particles, rows: Tensor, temperature: Tensor,
                 step_size: Tensor, random: MoveRandom) -> tuple[Particles, Tensor]:
        mean, std = target.reference(temperature, rows)
        u = (particles.noise - mean) / std
        h = step_size.to(u).reshape(-1, *[1] * (u.ndim - 1))
        rho = (1 - h.square()).sqrt()
        center = rho * u
        if self.uses_gradient:
            center = center + (1 - rho) * self._drift(particles, temperature, std)
        moved = center + h * random.standard
        proposed = target.evaluate(mean + std * moved, rows)
        gain = scale_log(temperature[:, None], proposed.log_reward - particles.log_reward)
        if self.uses_gradient:
            gain = gain + self._asymmetry(u, moved, self._drift(particles, temperature, std),
                                          self._drift(proposed, temperature, std), rho)
        accept = random.uniform[..., 0].log() < gain
        return particles.choose(accept, proposed), accept.double().mean(1).to(step_size)

    def _drift(self, particles: Particles, temperature: Tensor, std: Tensor) -> Tensor:
        raise NotImplementedError("a Crank-Nicolson move without gradient has no drift")

    def _asymmetry(self, u: Tensor, moved: Tensor, drift: Tensor, drift_back: Tensor, rho: Tensor) -> Tensor:
        raise NotImplementedError("a Crank-Nicolson move without gradient is symmetric")


class CrankNicolsonLangevin(CrankNicolson):
    r"""Crank-Nicolson with a Langevin drift (Cotter, Roberts, Stuart, White 2013).

    In units of the reference, with v the gradient of lambda r(f(z)) in them,
    :math:`u' = \rho u + (1 - \rho) v + h \xi`. The reference's own density cancels against the symmetric part
    of the proposal's, which leaves the acceptance ratio

    .. math:: \lambda (r' - r) + \frac{\langle u - \rho u', v' \rangle - \langle u' - \rho u, v \rangle
        - \frac{1 - \rho}{2} (|v'|^2 - |v|^2)}{1 + \rho}.
    """

    uses_gradient = True

    def _drift(self, particles: Particles, temperature: Tensor, std: Tensor) -> Tensor:
        assert particles.gradient is not None
        level = temperature.to(particles.noise).reshape(-1, *[1] * (particles.noise.ndim - 1))
        return level * std * particles.gradient

    def _asymmetry(self, u: Tensor, moved: Tensor, drift: Tensor, drift_back: Tensor, rho: Tensor) -> Tensor:
        inner = (u - rho * moved) * drift_back - (moved - rho * u) * drift
        inner = inner - 0.5 * (1 - rho) * (drift_back.square() - drift.square())
        return precise(inner / (1 + rho)).flatten(2).sum(2)


class EllipticalSlice(Move):
    """Elliptical slice sampling (Murray, Adams, MacKay 2010): no step size, no gradient.

    A level under the current tempered reward is drawn, then points of the ellipse through the particle and a
    fresh draw of the reference, from a bracket that shrinks towards the particle, until one lies above the
    level. Every point costs a call; the acceptance that is reported is one over the points tried. A particle
    that finds none in 40 stays, which is reversible too.
    """

    tunable = False
    uniforms = 2 + _MAX_SHRINKS

    def __call__(self, target: NoiseTarget, particles: Particles, rows: Tensor, temperature: Tensor,
                 step_size: Tensor, random: MoveRandom) -> tuple[Particles, Tensor]:
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
            theta = angle[pending].to(u).reshape(-1, *[1] * len(trailing))
            point = u[pending] * theta.cos() + standard[pending] * theta.sin()
            found = target.evaluate_rows(mean[pending] + std[pending] * point, owner[pending])
            tried[pending] += 1
            inside = scale_log(level[pending], found.log_reward) > height[pending]
            current = current.write(pending[inside], found.map(lambda values, keep=inside: values[keep]))
            pending = pending[~inside]
            if len(pending) == 0 or k == _MAX_SHRINKS:
                break
            rejected = angle[pending]
            low[pending] = torch.where(rejected < 0, rejected, low[pending])
            high[pending] = torch.where(rejected < 0, high[pending], rejected)
            angle[pending] = torch.lerp(low[pending], high[pending], uniform[pending, 2 + k])
        accepted = 1 / tried.unflatten(0, batch).mean(1)
        return current.map(lambda values: values.unflatten(0, batch)), accepted.to(step_size)


#: the moves by name
MOVES: dict[str, Move] = {
    "crank-nicolson-langevin": CrankNicolsonLangevin(),
    "crank-nicolson": CrankNicolson(),
    "elliptical-slice": EllipticalSlice(),
}
