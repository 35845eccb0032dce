"""Selection of the particles for the next step: resampling if the weights are uneven, or only the best."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from invflow.smc import RESAMPLERS, effective_sample_size
from invflow.solvers.tilting.particles import Particles, child_generator
from invflow.solvers.tilting.weighting import Weighting

__all__ = ["AllGoOn", "BestGoOn", "ResampleUneven", "Selection"]


class Selection(ABC):
    """Chooses the particles from which the next step starts."""

    @abstractmethod
    def __call__(self, particles: Particles, weighting: Weighting, generator: torch.Generator,
                 moves: bool) -> tuple[Particles, Tensor]:
        """Choose the particles for the next step.

        Args:
            particles: Current particles.
            weighting: Weighting of the particles.
            generator: Random generator.
            moves: Whether the next step adds noise, which separates copies of a particle.

        Returns:
            The chosen particles, with their weights, and whether each observation was resampled, ``(B,)``.
        """


@dataclass(frozen=True)
class AllGoOn(Selection):
    """Keep every particle."""

    def __call__(self, particles: Particles, weighting: Weighting, generator: torch.Generator,
                 moves: bool) -> tuple[Particles, Tensor]:
        """Return the particles unchanged."""
        return particles, torch.zeros(len(particles.path), dtype=torch.bool, device=particles.path.device)


@dataclass(frozen=True)
class ResampleUneven(Selection):
    """Resample the observations whose effective sample size is below a threshold.

    Args:
        threshold: Threshold as a share of N, from 0 to 1.
        resampling: A name from :data:`invflow.smc.RESAMPLERS`.

    Raises:
        ValueError: If the name is unknown, or the threshold out of range.
    """

    threshold: float = 0.5
    resampling: str = "systematic"

    def __post_init__(self) -> None:
        if self.resampling not in RESAMPLERS:
            raise ValueError(f"there is no resampling {self.resampling!r}: choose one of {', '.join(RESAMPLERS)}")
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"resample_threshold={self.threshold} must be a share of the particles, from 0 to 1")

    def __call__(self, particles: Particles, weighting: Weighting, generator: torch.Generator,
                 moves: bool) -> tuple[Particles, Tensor]:
        """Resample the observations that need it; the mean of their weights is added to the evidence."""
        if self.threshold == 0 or not weighting.counts or not moves:
            return AllGoOn()(particles, weighting, generator, moves)
        log_weights = weighting.log_weights(particles)
        count, child = log_weights.shape[1], child_generator(generator)
        ess = effective_sample_size(log_weights)
        chosen = (ess > 0) & (ess < self.threshold * count)
        # one wait for the GPU at each step; without it, all states and looks would be copied at every step
        if not bool(chosen.any()):
            return particles, chosen
        stay = torch.arange(count, device=log_weights.device).expand_as(log_weights)
        shares = torch.where(chosen[:, None], log_weights, 0.0).softmax(1)
        index = torch.where(chosen[:, None], RESAMPLERS[self.resampling](shares, count, child), stay)
        gained = log_weights.logsumexp(1) - math.log(count)
        others = particles.gather(index)
        return replace(others, path=torch.where(chosen[:, None], weighting.restart(others), others.path),
                       log_evidence=torch.where(chosen, others.log_evidence + gained, others.log_evidence)), chosen


@dataclass(frozen=True)
class BestGoOn(Selection):
    """Replace all particles by copies of the k with the highest reward after some steps: a search, not sampling.

    Args:
        k: Number of particles kept.
        steps: Steps after which to choose them.
    """

    k: int
    steps: frozenset[int]

    def __call__(self, particles: Particles, weighting: Weighting, generator: torch.Generator,
                 moves: bool) -> tuple[Particles, Tensor]:
        """Keep the best k, copied in turn."""
        shape, selects = particles.task.shape, particles.index in self.steps
        chosen = torch.full(shape[:1], selects, device=particles.path.device)
        if not selects:
            return particles, chosen
        best = particles.look.value.view(shape).topk(self.k, dim=1).indices
        return particles.gather(best[:, torch.arange(shape[1], device=best.device) % self.k]), chosen
