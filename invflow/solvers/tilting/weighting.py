"""The weights of FMTT's particles: twisted, exact at any number of steps; Jarzynski's, of the continuous process."""

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
    """How the log weights of particles are kept: where they start, what a step adds, what resampling leaves."""

    #: whether the posterior carries the weights, and particles are resampled by them
    counts = True
    #: whether the weights are those of a continuous reward that is followed by its gradient
    continuous = False
    #: how far under the least finite reward of the observation one of -inf is put, see :func:`floor_rewards`
    margin = 3.0

    def refusal(self, kernel: str, gradient: bool) -> str | None:
        """Why the weighting does not fit a kernel, or a proposal (one by the gradient or another); None if it does."""
        return None

    @abstractmethod
    def start(self, particles: Particles) -> Tensor:
        """What is kept of the log weights at time 0, ``(B, N)``, where they are r_0(x_0)."""

    @abstractmethod
    def log_weights(self, particles: Particles) -> Tensor:
        """The log weights, ``(B, N)``, not normalised."""

    @abstractmethod
    def restart(self, particles: Particles) -> Tensor:
        """What is kept where the weights have become equal, ``(B, N)``."""

    @abstractmethod
    def add(self, before: Particles, after: Particles, ratio: Tensor, step: BaseStep) -> Tensor:
        """What is kept after a step, ``(B, N)``.

        Args:
            before: the particles that it began with, after resampling.
            after: those that it led to, with the weights of before.
            ratio: ``(B, N)``, log p(x' | x) - log q(x' | x).
            step: the step.
        """

    def needs_rate(self, look_ahead: LookAhead, last: bool) -> bool:
        """Whether the rate of change of the reward counts at a time, ``last`` for t = 1."""
        return False


class Twisted(Weighting):
    """log w += log p(x' | x) + r_{t'}(x') - log q(x' | x) - r_t(x); kept without its last term (Whiteley, Lee 2014)."""

    def refusal(self, kernel: str, gradient: bool) -> str | None:
        """Heun's steps have no density that is known."""
        if kernel != "heun":
            return None
        return (f"the density of Heun's steps is not known, so that {'twisted' if self.counts else 'none'!r} weights "
                "have nothing to compare with: pass weights='jarzynski', or kernel='sde'")

    def start(self, particles: Particles) -> Tensor:
        """Zero: r_0(x_0) is the last term."""
        return torch.zeros_like(particles.path)

    def log_weights(self, particles: Particles) -> Tensor:
        """With the last term, r_t(x)."""
        return particles.path + particles.tilt

    def restart(self, particles: Particles) -> Tensor:
        """So that the sum with the last term is zero."""
        return -particles.tilt

    def add(self, before: Particles, after: Particles, ratio: Tensor, step: BaseStep) -> Tensor:
        """The ratio of the densities; the rest telescopes."""
        return after.path + ratio


class Unweighted(Twisted):
    """Twisted weights that are computed for the diagnostics, and left out of the posterior."""

    counts = False


class Jarzynski(Weighting):
    """dA = g'(t) r(L_t(x)) dt + g(t) (d/dt + b . grad) r(L_t(x)) dt, by the trapezoidal rule.

    They hold for a reward that is continuous where it is followed: there the stand-in for -inf of a pure constraint is
    the value that it has elsewhere, whose difference is added after the last step.
    """

    continuous = True
    margin = 0.0

    def refusal(self, kernel: str, gradient: bool) -> str | None:
        """They describe dynamics with the reward's gradient, in small steps."""
        if kernel not in ("sde", "heun"):
            return (f"Jarzynski weights belong to the continuous dynamics, and the {kernel!r} steps are jumps, which "
                    "they do not describe: pass weights='twisted', or kernel='sde'")
        if not gradient:
            return ("Jarzynski weights belong to the dynamics with the reward's gradient: pass weights='twisted', or "
                    "proposal='gradient'")
        return None

    def start(self, particles: Particles) -> Tensor:
        """r_0(x_0)."""
        return particles.tilt

    def log_weights(self, particles: Particles) -> Tensor:
        """As they are kept."""
        return particles.path

    def restart(self, particles: Particles) -> Tensor:
        """Zero."""
        return torch.zeros_like(particles.path)

    def add(self, before: Particles, after: Particles, ratio: Tensor, step: BaseStep) -> Tensor:
        """The work of the step."""
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
        """The flow map sees the same image all along the flow; other look-aheads change their minds."""
        return look_ahead.kind != "flow_map" and (not last or look_ahead.kind == "none")


WEIGHTINGS: dict[str, Weighting] = {"twisted": Twisted(), "jarzynski": Jarzynski(), "none": Unweighted()}


def floor_rewards(look: Look, shape: tuple[int, int], margin: float) -> tuple[Look, Tensor]:
    """A look before the end, its rewards of -inf put under the least finite one of the observation by a margin.

    A look-ahead only guesses: a state whose image breaks a constraint now may yet come to meet it, and the weight
    of zero that it would have for any g over 0 would rule it out for good. Any finite value leaves the weights
    exact, since that of the image itself counts in the end. This one keeps what the constraint says (such
    particles are worth a twentieth of the worst others), and what a likelihood beside it says among the rest. As
    it depends on all particles, it costs a bias of the order 1 / N.

    Args:
        look: of B N rows.
        shape: (B, N).
        margin: nonnegative.

    Returns:
        The look, and which rewards were -inf, ``(B, N)``.
    """
    value = look.value.view(shape)
    floored = value == -torch.inf
    least = torch.where(floored, torch.inf, value).amin(1, keepdim=True)
    least = torch.where(least == torch.inf, 0.0, least - margin)  # all alike where none is finite
    return look._replace(value=torch.where(floored, least, value).flatten()), floored
