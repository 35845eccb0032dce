"""What particle solvers along a path share: chunks of B x N rows, their state, and checks."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from invflow.reward import Reward
from invflow.solvers.conjugate import Spectrum
from invflow.solvers.tilting import Look

__all__ = ["Chunk", "FMTTState", "Run", "child_generator", "first_bad", "make_chunks"]


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
    return torch.Generator(parent.device).manual_seed(int(seed))


def first_bad(look: Look) -> tuple[str, int] | None:
    """What is NaN in a look, or a reward of +inf, and its first row; None where all is well.

    A reward of -inf is no error: it is a weight of zero.
    """
    checks: Sequence[tuple[str, Tensor | None]] = (
        ("reward", look.value.isnan() | (look.value == torch.inf)),
        ("gradient of the reward", None if look.gradient is None else ~look.gradient.flatten(1).isfinite().all(1)),
        ("rate of the reward", None if look.rate is None else look.rate.isnan()),
    )
    for what, bad in checks:
        if bad is not None and bool(bad.any()):
            return what, int(bad.nonzero()[0])
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


@dataclass
class Run:
    """What one call carries from step to step; particles of all observations stand in one row after another."""

    chunks: list[Chunk]
    gains: Tensor  # (B or 1, K + 1): g at each time
    generator: torch.Generator
    shape: tuple[int, int]  # (B, N)
    x: Tensor  # (B N, *state_shape)
    look: Look  # of the particles, where they stand
    path: Tensor  # (B, N): the log weight, without the term r_t(x) of twisted weights
    ancestors: Tensor  # (B, N)
    log_evidence: Tensor  # (B,): up to the last resampling
    index: int = 0
    spectrum: Spectrum | None = None  # of the operators, for the conjugate proposal
