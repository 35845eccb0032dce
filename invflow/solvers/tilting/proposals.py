"""Proposals of FMTT's next state: the base step, shifted by the reward's gradient or unshifted."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from invflow._core.shapes import with_axes
from invflow.flowmap import FlowMap
from invflow.smc import precise
from invflow.solvers.tilting.kernels import BaseStep, HeunStep, RenoiseStep
from invflow.solvers.tilting.look_ahead import Look, LookAhead
from invflow.solvers.tilting.particles import Chunk, Task

__all__ = ["GradientShift", "HeunShift", "Move", "Proposal"]


@dataclass(frozen=True)
class Move:
    """The inputs of a proposal that moves the n particles of a chunk by one step.

    Attributes:
        prior: The flow map.
        look_ahead: The look-ahead.
        task: Settings of the call.
        chunk: Chunk of the n particles.
        index: Index of the current time.
        step: Base step to propose from.
        x: ``(n, *state_shape)``, current states.
        mean: ``(n, *state_shape)``, m(x), the mean of the base step.
        known: Look-ahead from x.
        noise: ``(n, *state_shape)``, standard normal noise.
        look: Function that looks ahead from other states at the end of the step, with a gradient.
    """

    prior: FlowMap
    look_ahead: LookAhead
    task: Task
    chunk: Chunk
    index: int
    step: BaseStep
    x: Tensor
    mean: Tensor
    known: Look
    noise: Tensor
    look: Callable[[Tensor], Look]

    @property
    def ratio_of_one(self) -> Tensor:
        """log p - log q of states drawn from p itself, zeros ``(n,)``."""
        return precise(self.mean.new_zeros(len(self.mean)))

    @property
    def none_capped(self) -> Tensor:
        """Zeros ``(n,)``: no shift was capped."""
        return self.mean.new_zeros(len(self.mean))


class Proposal(ABC):
    """The kernel q(x' | x) that moves the particles."""

    #: whether it follows the gradient of the reward
    follows_gradient: ClassVar[bool] = True

    @abstractmethod
    def propose(self, move: Move) -> tuple[Tensor, Tensor, Tensor]:
        """Draw the next states by a step that adds noise.

        Args:
            move: Inputs of the step.

        Returns:
            The states ``(n, *state_shape)``, log p(x' | x) - log q(x' | x) ``(n,)``, and whether each shift was
            capped ``(n,)``, as 0 or 1.
        """


@dataclass(frozen=True)
class GradientShift(Proposal):
    r"""The base step N(m, v I), shifted by c v grad r_t.

    Args:
        strength: c; 1/2 for the tilted process with the same noise as the base process.
        max_shift: Largest root mean square of a shift, in units of sqrt(v).

    Raises:
        ValueError: If a setting is not above 0.
    """

    strength: float = 0.5
    max_shift: float = math.inf

    def __post_init__(self) -> None:
        if not self.max_shift > 0:
            raise ValueError(f"max_shift={self.max_shift} must be over 0")
        if not self.strength > 0:
            raise ValueError(f"strength={self.strength} must be over 0")

    def share(self, step: BaseStep) -> float:
        """c for a step."""
        return self.strength

    def propose(self, move: Move) -> tuple[Tensor, Tensor, Tensor]:
        """Shift and draw; for a reward without a gradient, draw from the base step."""
        pushed, ratio, capped = move.noise, move.ratio_of_one, move.none_capped
        pull = self._pull(move)
        if pull is not None:
            length = pull.flatten(1).square().mean(dim=1).sqrt()
            scale = (self.max_shift / length.clamp(min=1e-30)).clamp(max=1.0)
            pull, capped = pull * with_axes(scale, pull.ndim), (scale < 1).to(pull)
            wide = precise(pull.flatten(1))
            # in units of sqrt(v): log N(pull + noise; 0, I) - log N(pull + noise; pull, I)
            ratio = -(0.5 * wide.square() + wide * precise(pushed.flatten(1))).sum(1)
            pushed = pushed + pull
        return move.mean + math.sqrt(move.step.variance) * pushed, ratio, capped

    def _pull(self, move: Move) -> Tensor | None:
        """The whole shift in units of sqrt(v), ``(n, *state_shape)``."""
        index, gradient = move.index, move.known.gradient
        if isinstance(move.step, RenoiseStep) and move.chunk.reward.differentiable:
            index = move.index + 1  # grad r_{t'} at the mean, to which the noise is added
            gradient = move.look(move.mean).gradient
        if gradient is None:
            return None
        return self.share(move.step) * math.sqrt(move.step.variance) * move.task.tilt(move.chunk, index, gradient)


@dataclass(frozen=True)
class HeunShift(Proposal):
    """Heun's tilted step, which uses the tilts at both ends; its density is not known."""

    def propose(self, move: Move) -> tuple[Tensor, Tensor, Tensor]:
        """Predict, look again, correct."""
        step, task, chunk = move.step, move.task, move.chunk
        assert isinstance(step, HeunStep)
        predicted = move.mean + math.sqrt(step.variance) * move.noise
        known = move.known
        before = None if known.gradient is None else task.tilt(chunk, move.index, known.gradient)
        if before is not None:
            predicted = predicted + (step.end - step.start) * step.diffusion * before
        ahead = move.look(predicted)
        after = None if ahead.gradient is None else task.tilt(chunk, move.index + 1, ahead.gradient)
        x = step.correct(move.prior, move.x, predicted, (known.velocity, ahead.velocity), (before, after))
        return x, move.ratio_of_one, move.none_capped
