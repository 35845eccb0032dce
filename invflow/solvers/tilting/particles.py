"""What particle solvers along a path share: chunks of B x N rows, their state, and checks."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from invflow._core.chunks import ChunkSize
from invflow.linear.structure import Spectrum
from invflow.reward import Reward
from invflow.smc import precise, scale_log
from invflow.solvers.finite import first_row
from invflow.solvers.tilting.look_ahead import Look

__all__ = ["Chunk", "FMTTState", "Run", "child_generator", "first_bad", "make_chunks", "over_chunks"]

T = TypeVar("T")

_UNDER_THE_LEAST = 3.0


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


@dataclass
class Run:
    """What one call carries from step to step; particles of all observations stand in one row after another."""

    chunks: list[Chunk]
    size: ChunkSize
    gains: Tensor  # (B or 1, K + 1): g at each time
    pulls: list[bool]  # (K + 1,): whether g is over 0 for any observation, where no device has to be asked
    generator: torch.Generator
    shape: tuple[int, int]  # (B, N)
    x: Tensor  # (B N, *state_shape)
    look: Look  # of the particles, where they stand
    path: Tensor  # (B, N): the log weight, without the term r_t(x) of twisted weights
    ancestors: Tensor  # (B, N)
    log_evidence: Tensor  # (B,): up to the last resampling
    floored: Tensor  # (B, N): of which the look-ahead's reward was -inf
    index: int = 0
    spectrum: Spectrum | None = None  # of the operators, for the conjugate proposal

    def gain(self, chunk: Chunk, index: int) -> Tensor:
        """g at the time of that index, of each of a chunk's observations."""
        return self.gains[:, index].expand(self.shape[0])[chunk.observations]

    def tilt(self, chunk: Chunk, index: int, gradient: Tensor) -> Tensor:
        """grad r_t of a chunk's particles, from the gradient of the reward of their look-ahead."""
        gain = self.gain(chunk, index).repeat_interleave(chunk.shape[1])
        return gain.to(gradient).view(-1, *[1] * (gradient.ndim - 1)) * gradient

    def floor(self, look: Look, margin: float = _UNDER_THE_LEAST) -> Look:
        """A look before the end, its rewards of -inf put under the least finite one of the observation by a margin.

        A look-ahead only guesses: a state whose image breaks a constraint now may yet come to meet it, and the weight
        of zero that it would have for any g over 0 would rule it out for good. Any finite value leaves the weights
        exact, since that of the image itself counts in the end. This one keeps what the constraint says (such
        particles are worth a twentieth of the worst others), and what a likelihood beside it says among the rest. As
        it depends on all particles, it costs a bias of the order 1 / N.
        """
        value = look.value.view(self.shape)
        self.floored = value == -torch.inf
        least = torch.where(self.floored, torch.inf, value).amin(1, keepdim=True)
        least = torch.where(least == torch.inf, 0.0, least - margin)  # all alike where none is finite
        return look._replace(value=torch.where(self.floored, least, value).flatten())

    def work(self, old: Look, length: float) -> Tensor:
        """Jarzynski's dA over the step just made, of that length in time, by the trapezoidal rule: ``(B, N)``."""
        low, high = self.gains[:, self.index - 1, None], self.gains[:, self.index, None]
        reward = 0.5 * (precise(old.value) + precise(self.look.value)).view(self.shape)
        work = scale_log(high - low, reward)
        for gain, look in ((low, old), (high, self.look)):
            if look.rate is not None:
                work = work + 0.5 * length * gain * precise(look.rate).view(self.shape)
        return work
