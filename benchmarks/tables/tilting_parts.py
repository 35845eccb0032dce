"""Shared parts of the tilting tables: replicates, and the number of steps within a budget of calls.

Replicates are the observations of one call: each has its own random numbers, is resampled separately, and is
independent of the others.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.tables.shared import Rows
from invflow.plugins import Index, as_index
from invflow.posterior import Posterior
from invflow.reward import Reward
from invflow.solver import Solver
from invflow.solvers.tilting.cost import JumpCalls, path_calls
from invflow.solvers.tilting.fmtt import FMTT
from invflow_problems.half_plane import tilted_expectations

__all__ = ["REPLICATES", "Replicated", "affordable", "sample_quietly"]

REPLICATES = 10


class Replicated(Reward):
    """A function of images as the reward of B observations, which are replicates."""

    def __init__(self, fn: Callable[[Tensor], Tensor], count: int = REPLICATES) -> None:
        self.fn, self.num_observations = fn, count

    def select(self, index: Index) -> Reward:
        """Replicates selected by an index."""
        return Replicated(self.fn, len(as_index(index, self.num_observations or 1)))

    def __call__(self, x: Tensor) -> Tensor:
        """``(B, N, *image_shape)`` to ``(B, N)``."""
        result: Tensor = self.fn(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        return result


def sample_quietly(solver: Solver, reward: Reward, particles: int, seed: int) -> Posterior:
    """Samples of B observations, without convergence warnings, because the tables show convergence."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return solver.sample(reward, particles, generator=torch.Generator().manual_seed(seed))


def affordable(make: Callable[[int], FMTT], reward: Reward, budget: int) -> FMTT:
    """FMTT with the largest number of steps within a budget of calls per particle, forward and backward.

    Args:
        make: Function from a number of steps to a solver.
        reward: Reward to tilt by.
        budget: Calls of the map per particle.

    Raises:
        ValueError: If the budget is too small for two steps.
    """
    jumps = JumpCalls(make(2).prior)
    if sum(path_calls(make(2), reward, jumps)) > budget:
        raise ValueError(f"a budget of {budget} calls is too small for two steps: pass at least "
                         f"{sum(path_calls(make(2), reward, jumps))}")
    low, high = 2, budget + 1
    while high - low > 1:
        middle = (low + high) // 2
        fits = sum(path_calls(make(middle), reward, jumps)) <= budget
        low, high = (middle, high) if fits else (low, middle)
    return make(low)


def choose(rows: Rows, **wanted: Any) -> Rows:
    """The rows with these values."""
    return [row for row in rows if all(row[name] == str(value) for name, value in wanted.items())]


def mean_and_std(rows: Rows, name: str) -> tuple[float, float]:
    """Mean and standard deviation of a column over the rows that have it; NaN if no row does."""
    values = torch.tensor([float(row[name]) for row in rows if row[name]], dtype=torch.float64)
    if len(values) == 0:
        return math.nan, math.nan
    return float(values.mean()), float(values.std()) if len(values) > 1 else math.nan


def from_base(rows: Rows, name: str) -> tuple[float, float]:
    """Difference of a column's mean from the tilted base sampler's, and its standard error."""
    mean, std = mean_and_std(rows, name)
    return mean - float(rows[0][f"base_{name}"]), math.hypot(std / len(rows) ** 0.5,
                                                             float(rows[0][f"base_{name}_error"]))


def from_exact(rows: Rows, name: str) -> tuple[float, float]:
    """Difference of a column's mean from the exact law's, and its standard error."""
    mean, std = mean_and_std(rows, name)
    exact = tilted_expectations()
    return mean - exact["share x0 > 0" if name == "share" else name], std / len(rows) ** 0.5
