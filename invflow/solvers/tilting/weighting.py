"""Weights of FMTT's particles: twisted, exact at any number of steps, or Jarzynski's, for the continuous process."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from invflow.smc import precise, scale_log
from invflow.solvers.tilting.kernels import BaseStep
from invflow.solvers.tilting.look_ahead import Look, LookAhead
from invflow.solvers.tilting.particles import Particles

__all__ = ["WEIGHTINGS", "Jarzynski", "Twisted", "Unweighted", "Weighting", "floor_rewards"]


class Weighting(ABC):
    """Bookkeeping of the particles' log weights: their start, their increment in a step, and after resampling."""

    #: whether the posterior carries the weights, and particles are resampled by them
    counts = True
    #: whether the weights hold only for a continuous reward whose gradient guides the particles
    continuous = False
    #: how far below the smallest finite reward of the observation -inf is placed, see :func:`floor_rewards`
    margin = 3.0

    def refusal(self, kernel: str, gradient: bool) -> str | None:
        """Why the weighting does not fit a kernel or a proposal (guided by a gradient or not); None if it fits."""
        return None

    @abstractmethod
    def start(self, particles: Particles) -> Tensor:
        """The stored part of the log weights r_0(x_0) at time 0, ``(B, N)``."""

    @abstractmethod
    def log_weights(self, particles: Particles) -> Tensor:
        """The log weights, ``(B, N)``, not normalised."""

    @abstractmethod
    def restart(self, particles: Particles) -> Tensor:
        """The stored part when the weights have become equal, ``(B, N)``."""

    @abstractmethod
    def add(self, before: Particles, after: Particles, ratio: Tensor, step: BaseStep) -> Tensor:
        """The stored part after a step, ``(B, N)``.

        Args:
            before: Particles at the start of the step, after resampling.
            after: Particles at its end, with the weights of ``before``.
            ratio: ``(B, N)``, log p(x' | x) - log q(x' | x).
            step: The step.
        """

    def needs_rate(self, look_ahead: LookAhead, last: bool) -> bool:
        """Whether the weights need the reward's rate of change at a time; ``last`` for t = 1."""
        return False


class Twisted(Weighting):
    """log w += log p(x' | x) + r_{t'}(x') - log q(x' | x) - r_t(x); stored without r_t(x) (Whiteley, Lee 2014)."""

    def refusal(self, kernel: str, gradient: bool) -> str | None:
        """Refuse Heun's steps, whose density is not known."""
        if kernel != "heun":
            return None
        return (f"weights={'twisted' if self.counts else 'none'!r} needs the density of the steps, which is not known "
                "for Heun's: pass weights='jarzynski', or kernel='sde'")

    def start(self, particles: Particles) -> Tensor:
        """Zero, since r_0(x_0) is the term that is not stored."""
        return torch.zeros_like(particles.path)

    def log_weights(self, particles: Particles) -> Tensor:
        """With r_t(x) added to the stored part."""
        return particles.path + particles.tilt

    def restart(self, particles: Particles) -> Tensor:
        """Minus r_t(x), so that the log weights are zero."""
        return -particles.tilt

    def add(self, before: Particles, after: Particles, ratio: Tensor, step: BaseStep) -> Tensor:
        """Add the log ratio of the densities; the rest telescopes."""
        return after.path + ratio


class Unweighted(Twisted):
    """Twisted weights that are computed for the diagnostics but left out of the posterior."""

    counts = False


class Jarzynski(Weighting):
    """dA = g'(t) r(L_t(x)) dt + g(t) (d/dt + b . grad) r(L_t(x)) dt, by the trapezoidal rule.

    They hold for a reward that is continuous along the path. For a pure constraint, the value in place of -inf is the
    constraint's value elsewhere; the difference is added after the last step.
    """

    continuous = True
    margin = 0.0

    def refusal(self, kernel: str, gradient: bool) -> str | None:
        """Refuse all but dynamics with the reward's gradient in small steps."""
        if kernel not in ("sde", "heun"):
            return (f"Jarzynski weights describe continuous dynamics, not the jumps of kernel={kernel!r}: pass "
                    "weights='twisted', or kernel='sde'")
        if not gradient:
            return ("Jarzynski weights describe dynamics guided by the reward's gradient: pass weights='twisted', or "
                    "proposal='gradient'")
        return None

    def start(self, particles: Particles) -> Tensor:
        """r_0(x_0)."""
        return particles.tilt

    def log_weights(self, particles: Particles) -> Tensor:
        """The stored values."""
        return particles.path

    def restart(self, particles: Particles) -> Tensor:
        """Zero."""
        return torch.zeros_like(particles.path)

    def add(self, before: Particles, after: Particles, ratio: Tensor, step: BaseStep) -> Tensor:
        """Add the work of the step."""
        shape, gains, length = after.task.shape, after.task.gains, step.end - step.start
        low, high = gains[:, before.index, None], gains[:, after.index, None]
        reward = 0.5 * (precise(before.look.value) + precise(after.look.value)).view(shape)
        work = scale_log(high - low, reward)
        for gain, look in ((low, before.look), (high, after.look)):
            if look.rate is not None:
                work = work + 0.5 * length * gain * precise(look.rate).view(shape)
        path = after.path + work
        return torch.where(after.floored, -torch.inf, path) if step.end == 1 else path

    def needs_rate(self, look_ahead: LookAhead, last: bool) -> bool:
        """Not with the flow map, which predicts the same image all along the flow; with other look-aheads."""
        return look_ahead.kind != "flow_map" and (not last or look_ahead.kind == "none")


WEIGHTINGS: dict[str, Weighting] = {"twisted": Twisted(), "jarzynski": Jarzynski(), "none": Unweighted()}


def floor_rewards(look: Look, shape: tuple[int, int], margin: float) -> tuple[Look, Tensor]:
    """Replace rewards of -inf in a look before the end: below the observation's smallest finite one by a margin.

    A look-ahead is only a prediction. A state whose predicted image breaks a constraint may still meet it later, but
    for any g above 0 its weight would be zero, which would rule it out for good. A fixed finite value would leave
    twisted weights exact, since the reward of the final image itself counts at the end. This value keeps the effect of
    the constraint (such particles weigh a twentieth of the worst others), and that of a likelihood in addition to it
    among the others. As it depends on all particles, it causes a bias of the order 1 / N.

    Args:
        look: Look of B N rows.
        shape: (B, N).
        margin: Distance below the smallest finite reward; nonnegative.

    Returns:
        The look, and whether each reward was -inf, ``(B, N)``.
    """
    value = look.value.view(shape)
    floored = value == -torch.inf
    least = torch.where(floored, torch.inf, value).amin(1, keepdim=True)
    least = torch.where(least == torch.inf, 0.0, least - margin)  # all equal if none is finite
    return look._replace(value=torch.where(floored, least, value).flatten()), floored
