"""Shared parts of particle solvers along a path: chunks of B x N rows, particles, records of steps, and checks."""

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
    """A rectangle out of the B x N particles, stored as consecutive rows.

    Attributes:
        rows: Its rows among the B N particles, which are ordered by observation.
        observations: Its observations among the B.
        shape: (number of observations, particles of each).
        reward: Reward of these observations.
    """

    rows: slice
    observations: slice
    shape: tuple[int, int]
    reward: Reward

    @property
    def count(self) -> int:
        """Number of rows."""
        result: int = self.rows.stop - self.rows.start
        return result

    def halves(self) -> tuple[Chunk, Chunk]:
        """The same rows as two chunks: each has half the observations, or half the particles of a single one."""
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
    """Run ``work`` chunk by chunk; a chunk that does not fit in memory is halved, also in the list for later use."""
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
    """Split B x N particles into chunks of at most ``size`` rows: whole observations, or equal parts of one."""
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
    """A generator seeded by one draw from another, which its own draws then leave unchanged."""
    seed = torch.randint(2**62, (1,), generator=parent, device=parent.device)
    return torch.Generator(parent.device).manual_seed(int(seed))  # waits for the GPU if the parent is on one


def first_bad(look: Look, state: Tensor) -> tuple[str, int] | None:
    """The first non-finite part of a look from states ``(n, *state_shape)``, and its first row; None if all is finite.

    A reward of -inf is not an error; it means a weight of zero.
    """
    checks: Sequence[tuple[str, Tensor | None]] = (
        ("state", ~state.isfinite()),
        ("image of the look-ahead", None if look.landing is None else ~look.landing.isfinite()),
        ("reward", look.value.isnan() | (look.value == torch.inf)),
        ("gradient of the reward", None if look.gradient is None else ~look.gradient.isfinite()),
        ("rate of the reward", None if look.rate is None else look.rate.isnan()),
    )
    found = [(what, bad) for what, bad in checks if bad is not None]
    # all checks at once, since each waits for the GPU; at every look, so that the error can name the step
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
        step: Number of steps done, from 0 to K.
        time: Time of the particles, from 0 to 1.
        states: ``(B, N, *state_shape)``, the states.
        log_weights: ``(B, N)``, not normalised, accumulated since the observation was last resampled. With them the
            particles represent the base sampler's law at this time, tilted by g(t) times the reward of the look-ahead.
        log_increments: ``(B, N)``, increments of the log weights in the last step.
        rewards: ``(B, N)``, r(L_t(x)), the rewards of the predicted images.
        ancestors: ``(B, N)``, index of each particle's ancestor among those at time 0.
        log_evidence: ``(B,)``, estimate of log E[e^{g(t) r(L_t(x))}] under the base sampler.
        resampled: ``(B,)``, whether the observation was resampled before the last step.
        capped: ``(B,)``, share of the particles whose shift was capped in that step.
        floored: ``(B, N)``, whether the look-ahead's reward was -inf; ``rewards`` then holds a finite value before
            the end.
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
    """Settings of one call, the same at every step.

    Attributes:
        chunks: Chunks of the particles; split in place if one does not fit in memory.
        size: Number of rows at a time.
        gains: ``(B or 1, K + 1)``, g at each time.
        pulls: Whether g is above 0 for any observation, at each time; kept on the CPU so that no GPU is waited for.
        shape: (B, N).
        spectrum: Spectrum of the operators, for a conjugate proposal.
    """

    chunks: list[Chunk]
    size: ChunkSize
    gains: Tensor
    pulls: tuple[bool, ...]
    shape: tuple[int, int]
    spectrum: Spectrum | None = None

    def gain(self, chunk: Chunk, index: int) -> Tensor:
        """g at the time with this index, for each of a chunk's observations."""
        return self.gains[:, index].expand(self.shape[0])[chunk.observations]

    def tilt(self, chunk: Chunk, index: int, gradient: Tensor) -> Tensor:
        """grad r_t for a chunk's particles, from the gradient of the reward of their look-ahead."""
        gain = self.gain(chunk, index).repeat_interleave(chunk.shape[1])
        return column(gain, gradient) * gradient


@dataclass(frozen=True)
class Particles:
    """FMTT's state between steps: B N particles in rows, ordered by observation.

    Attributes:
        task: Settings of the call.
        index: Number of steps done, from 0 to K.
        x: ``(B N, *state_shape)``, the states.
        look: Look-ahead from these states, with a finite value in place of -inf before the end.
        path: ``(B, N)``, the log weights in the form that the weighting keeps.
        ancestors: ``(B, N)``, index of each particle's ancestor among those at time 0.
        log_evidence: ``(B,)``, accumulated up to the last resampling.
        floored: ``(B, N)``, whether a finite value replaces -inf.
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
        """Replace all particles by those of ``index`` ``(B, N)``; the weights stay in place."""
        flat = (index + index.shape[1] * torch.arange(len(index), device=index.device)[:, None]).flatten()
        return replace(self, x=self.x[flat], look=self.look.take(flat), ancestors=self.ancestors.gather(1, index))


@dataclass(frozen=True)
class StepInfo:
    """Record of a step.

    Attributes:
        log_increments: ``(B, N)``, increments of the log weights.
        resampled: ``(B,)``, whether the observation was resampled before the step.
        capped: ``(B,)``, share of the particles whose shift was capped.
    """

    log_increments: Tensor
    resampled: Tensor
    capped: Tensor
