"""What particle solvers along a path share: chunks of B x N rows, the particles and what a step does, and checks."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from invflow._core.chunks import ChunkSize
from invflow._core.shapes import column
from invflow.linear.structure import Spectrum
from invflow.reward import Reward
from invflow.smc import precise, scale_log
from invflow.solvers.finite import first_row
from invflow.solvers.tilting.look_ahead import Look

__all__ = ["Chunk", "FMTTState", "Particles", "StepInfo", "Task", "child_generator", "first_bad", "make_chunks",
           "over_chunks"]

T = TypeVar("T")


@dataclass(frozen=True)
class Chunk:
    """A rectangle of B x N particles, which are consecutive rows.

    Attributes:
        rows: of the B N particles, observation after observation.
        observations: of the B.
        shape: (observations, particles of each).
        reward: of those observations.
    """

    rows: slice
    observations: slice
    shape: tuple[int, int]
    reward: Reward

    @property
    def count(self) -> int:
        """How many rows there are."""
        result: int = self.rows.stop - self.rows.start
        return result

    def halves(self) -> tuple[Chunk, Chunk]:
        """The same rows as two chunks: some of the observations each, or half the particles of a single one."""
        axis = 0 if self.shape[0] > 1 else 1
        middle, per = self.shape[axis] // 2, self.shape[1] if axis == 0 else 1
        cuts = (slice(0, middle), slice(middle, self.shape[axis]))
        first, second = (
            Chunk(slice(self.rows.start + cut.start * per, self.rows.start + cut.stop * per),
                  slice(self.observations.start + cut.start, self.observations.start + cut.stop)
                  if axis == 0 else self.observations,
                  (cut.stop - cut.start, self.shape[1]) if axis == 0 else (1, cut.stop - cut.start),
                  self.reward.select(cut) if axis == 0 else self.reward)
            for cut in cuts)
        return first, second


def over_chunks(chunks: list[Chunk], size: ChunkSize, work: Callable[[Chunk], T]) -> list[T]:
    """Work done chunk by chunk; one that does not fit in memory is halved, in the list too, for what is to come."""
    waiting, results = chunks[::-1], []
    chunks.clear()
    while waiting:
        chunk = waiting.pop()
        done = size.attempt(chunk.count, partial(work, chunk)) if chunk.count <= size.rows else None
        if done is None:
            waiting.extend(reversed(chunk.halves()))
        else:
            chunks.append(chunk)
            results.append(done[0])
    return results


def make_chunks(reward: Reward, observations: int, count: int, size: int) -> list[Chunk]:
    """Cut B x N particles into chunks of at most ``size`` rows: whole observations, or even parts of one."""
    chunks = []
    if count <= size:
        together = size // count
        for b in range(0, observations, together):
            end = min(b + together, observations)
            part = slice(b, end)
            chunks.append(Chunk(slice(b * count, end * count), part, (end - b, count), reward.select(part)))
        return chunks
    parts = -(-count // size)
    cuts = [count * k // parts for k in range(parts + 1)]
    for b in range(observations):
        part = slice(b, b + 1)
        single = reward.select(part)
        for low, high in itertools.pairwise(cuts):
            chunks.append(Chunk(slice(b * count + low, b * count + high), part, (1, high - low), single))
    return chunks


def child_generator(parent: torch.Generator) -> torch.Generator:
    """A generator seeded by one draw of another, so that what it serves takes nothing more from the other."""
    seed = torch.randint(2**62, (1,), generator=parent, device=parent.device)
    return torch.Generator(parent.device).manual_seed(int(seed))  # a GPU is waited for where the parent is on one


def first_bad(look: Look, state: Tensor) -> tuple[str, int] | None:
    """What is not finite in a look from states ``(n, *state_shape)``, and its first row; None where all is well.

    A reward of -inf is no error: it is a weight of zero.
    """
    checks: Sequence[tuple[str, Tensor | None]] = (
        ("state", ~state.isfinite()),
        ("image of the look-ahead", None if look.landing is None else ~look.landing.isfinite()),
        ("reward", look.value.isnan() | (look.value == torch.inf)),
        ("gradient of the reward", None if look.gradient is None else ~look.gradient.isfinite()),
        ("rate of the reward", None if look.rate is None else look.rate.isnan()),
    )
    found = [(what, bad) for what, bad in checks if bad is not None]
    # asked of all at once, since a GPU is waited for; needed at every look, so that the error can tell the step
    if not bool(torch.stack([bad.any() for _, bad in found]).any()):
        return None
    for what, bad in found:
        row = first_row(bad)
        if row is not None:
            return what, row
    return None


@dataclass(frozen=True)
class FMTTState:
    """The particles of :meth:`FMTT.iterate` after some of the steps.

    Attributes:
        step: steps done, from 0 to K.
        time: where the particles stand, from 0 to 1.
        states: ``(B, N, *state_shape)``.
        log_weights: ``(B, N)``, not normalised, grown since the observation was last resampled. Under them the
            particles stand for the base sampler's law at this time, tilted by g(t) times the reward of the look-ahead.
        log_increments: ``(B, N)``, what the step that led here added to the log weights.
        rewards: ``(B, N)``, r(L_t(x)), the reward of the images that the particles are heading for.
        ancestors: ``(B, N)``, the index of each particle's ancestor among those at time 0.
        log_evidence: ``(B,)``, estimate of log E[e^{g(t) r(L_t(x))}] under the base sampler.
        resampled: ``(B,)``, whether the observation was resampled before the step that led here.
        capped: ``(B,)``, share of the particles whose shift was capped in that step.
        floored: ``(B, N)``, whether the look-ahead's reward was -inf, for which a finite one stands in ``rewards``
            before the end.
    """

    step: int
    time: float
    states: Tensor
    log_weights: Tensor
    log_increments: Tensor
    rewards: Tensor
    ancestors: Tensor
    log_evidence: Tensor
    resampled: Tensor
    capped: Tensor
    floored: Tensor


@dataclass(frozen=True)
class Task:
    """What one call is about, the same at every step.

    Attributes:
        chunks: of the particles; cut smaller, in place, where one does not fit in memory.
        size: rows at a time.
        gains: ``(B or 1, K + 1)``, g at each time.
        pulls: whether g is over 0 for any observation, at each time, where no device has to be asked.
        shape: (B, N).
        spectrum: of the operators, for a conjugate proposal.
    """

    chunks: list[Chunk]
    size: ChunkSize
    gains: Tensor
    pulls: tuple[bool, ...]
    shape: tuple[int, int]
    spectrum: Spectrum | None = None

    def gain(self, chunk: Chunk, index: int) -> Tensor:
        """g at the time of that index, of each of a chunk's observations."""
        return self.gains[:, index].expand(self.shape[0])[chunk.observations]

    def tilt(self, chunk: Chunk, index: int, gradient: Tensor) -> Tensor:
        """grad r_t of a chunk's particles, from the gradient of the reward of their look-ahead."""
        gain = self.gain(chunk, index).repeat_interleave(chunk.shape[1])
        return column(gain, gradient) * gradient


@dataclass(frozen=True)
class Particles:
    """The state that FMTT steps from and to; B N particles stand in rows, observation after observation.

    Attributes:
        task: what the call is about.
        index: steps done, from 0 to K.
        x: ``(B N, *state_shape)``.
        look: what the look-ahead sees from there, with a finite value in place of -inf before the end.
        path: ``(B, N)``, the log weights as the weighting keeps them.
        ancestors: ``(B, N)``, index of each one's ancestor among those at time 0.
        log_evidence: ``(B,)``, gathered up to the last resampling.
        floored: ``(B, N)``, whether a finite value stands for -inf.
    """

    task: Task
    index: int
    x: Tensor
    look: Look
    path: Tensor
    ancestors: Tensor
    log_evidence: Tensor
    floored: Tensor

    @property
    def tilt(self) -> Tensor:
        """r_t(x) = g(t) r(L_t(x)), ``(B, N)``."""
        return scale_log(self.task.gains[:, self.index, None], precise(self.look.value).view(self.task.shape))

    def gather(self, index: Tensor) -> Particles:
        """Particles ``index`` ``(B, N)`` in the place of all; the weights stay where they are."""
        flat = (index + index.shape[1] * torch.arange(len(index), device=index.device)[:, None]).flatten()
        return replace(self, x=self.x[flat], look=self.look.take(flat), ancestors=self.ancestors.gather(1, index))


@dataclass(frozen=True)
class StepInfo:
    """What happened in a step.

    Attributes:
        log_increments: ``(B, N)``, what it added to the log weights.
        resampled: ``(B,)``, whether the observation was resampled before it.
        capped: ``(B,)``, share of the particles whose shift was capped.
    """

    log_increments: Tensor
    resampled: Tensor
    capped: Tensor
