"""What particle solvers along a path share: chunks of B x N rows, and the record of how the weights fared."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from invflow.reward import Reward
from invflow.smc import count_distinct, effective_sample_size, pareto_k_hat, precise
from invflow.solvers.tilting import Look

__all__ = ["Chunk", "FMTTState", "PathRecord", "Run", "child_generator", "first_bad", "make_chunks"]


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


class PathRecord:
    """Diagnostics collected along the path, and the verdict on whether the particles have converged."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.columns: dict[str, list[Tensor]] = {"ess": [], "reward": [], "spread": [], "capped": []}
        self.resamplings: Tensor | None = None

    def add(self, state: FMTTState) -> None:
        """Take in the state after one more step."""
        shares = state.log_weights.softmax(1)
        columns = self.columns
        self.times.append(state.time)
        columns["ess"].append(effective_sample_size(state.log_weights))
        # a reward of -inf in a particle of weight zero says nothing about the mean
        rewards = torch.where(shares > 0, precise(state.rewards), 0.0)
        columns["reward"].append((shares * rewards).sum(1))
        columns["capped"].append(precise(state.capped))
        columns["spread"].append(_spread(state))
        count = state.resampled.long()
        self.resamplings = count if self.resamplings is None else self.resamplings + count

    def finish(self, state: FMTTState, solver: str) -> dict[str, Any]:
        """The diagnostics by name; warns where an observation has not converged.

        Args:
            state: the last one.
            solver: its name, for the warning.
        """
        ess = torch.stack(self.columns["ess"], dim=1)
        ancestors = count_distinct(state.ancestors)
        k_hat = pareto_k_hat(state.log_weights)
        converged = _verdict(solver, state.log_weights.shape[1], ess[:, -1], ancestors, k_hat)
        return {
            "times": self.times, "ess_path": ess, "reward_path": torch.stack(self.columns["reward"], dim=1),
            "increment_std": torch.stack(self.columns["spread"][1:], dim=1),
            "least_ess": ess.min(1).values, "resamplings": self.resamplings, "distinct_ancestors": ancestors,
            "k_hat": k_hat, "capped_share": torch.stack(self.columns["capped"][1:], dim=1).mean(1),
            "converged": converged,
        }


def _spread(state: FMTTState) -> Tensor:
    """Standard deviation of the last step's log weight increments under the weights before it, ``(B,)``."""
    alive = state.log_increments.isfinite()
    increments = torch.where(alive, state.log_increments, 0.0)
    shares = torch.where(alive, state.log_weights - increments, -torch.inf).softmax(1).nan_to_num(nan=0.0)
    mean = (shares * increments).sum(1, keepdim=True)
    return (shares * (increments - mean).square()).sum(1).sqrt()


def _verdict(solver: str, count: int, ess: Tensor, ancestors: Tensor, k_hat: Tensor) -> Tensor:
    """Whether each observation has converged, ``(B,)``; warns with the worst one's figures.

    Ten independent particles tell a mean to a third of a standard deviation; with fewer nothing is said about
    spread. Where there are under twenty particles, half of them are asked for.
    """
    needed = max(2.0, min(10.0, count / 2))
    converged = (ess >= needed) & (ancestors >= needed)
    if not bool(converged.all()):
        independent = torch.minimum(ess, ancestors.to(ess))
        worst = int(torch.where(converged, torch.inf, independent).argmin())
        warnings.warn(
            f"{solver} has not converged for {int((~converged).sum())} of {len(converged)} observations: of {count} "
            f"particles, observation {worst} is left with {int(ancestors[worst])} distinct ancestors and an effective "
            f"sample size of {float(ess[worst]):.3g}, under {needed:.3g} (k-hat {float(k_hat[worst]):.2g}). Its spread "
            "is not to be trusted: take more particles or more steps, or a solver made for sharp likelihoods, "
            "invflow.NoiseSMC(prior)",
            stacklevel=4)
    return converged
