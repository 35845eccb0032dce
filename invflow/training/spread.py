"""Spread of a VFM: factors of its standard deviations, fitted to held-out images."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from statistics import NormalDist

import torch
from torch import Tensor

from invflow.likelihood import GaussianLikelihood
from invflow.solvers.vfm import VFM
from invflow.training import TrainingProblem

__all__ = ["LEVEL", "spread_factor", "spread_factors"]

LEVEL = 0.9


def spread_factor(scores: Tensor, level: float = LEVEL) -> float:
    """Factor of the standard deviations for which central Gaussian intervals have coverage ``level`` in a new group.

    It uses the quantile at level (1 + 1/n), which has coverage ``level`` on average over groups, n of them seen and one
    new (Lee, Barber and Willett 2023, "Distribution-free inference with hierarchical data").

    Args:
        scores: Absolute errors divided by standard deviations, ``(n, ...)``: n independent groups of equal size.
        level: Level of the intervals.

    Raises:
        ValueError: If there are too few groups for any factor.

    Example:
        >>> import torch
        >>> scores = torch.randn(100_000, generator=torch.Generator().manual_seed(0)).abs()
        >>> round(spread_factor(1.5 * scores), 2)
        1.5
    """
    groups = len(scores)
    share = level * (1 + 1 / max(groups, 1))
    if share >= 1:
        raise ValueError(f"{groups} crops are too few for intervals at level {level:.0%}: pass at least "
                         f"{math.floor(level / (1 - level)) + 1}")
    ranked = scores.flatten().double().sort().values
    return float(ranked[math.ceil(share * len(ranked)) - 1]) / NormalDist().inv_cdf((1 + level) / 2)


def spread_factors(vfm: VFM, images: Tensor, problems: Sequence[TrainingProblem], *, num_samples: int = 32,
                   seed: int = 0) -> dict[str, float]:
    """Factor of each problem class, relative to those of the adapter.

    Args:
        vfm: Solver with Gaussian samples.
        images: ``(n, C, H, W)``, held out from all training; each is observed once in each class.
        problems: Problem classes, with their ranges of operators and noise levels.
        num_samples: Samples of each posterior, for its mean and its standard deviation.
        seed: Random seed.
    """
    # the deviations of slow cosines are known: no factor scales them
    vfm, factors = copy.copy(vfm), {}
    vfm.adapter = copy.copy(vfm.adapter)
    vfm.adapter.slow_cosines = lambda reward, n, generator: None  # type: ignore[method-assign]
    for index, problem in enumerate(problems):
        g = torch.Generator().manual_seed(seed * 1000 + index)
        operator, sigma = problem.operator.randomize(len(images), g), problem.draw_sigma(len(images), g)
        y = operator.measure(images, sigma, generator=g)
        samples = vfm.sample(GaussianLikelihood(operator, y, sigma), num_samples, generator=g).samples
        # the mean of N samples deviates from the posterior mean with 1/N of their variance
        error = (images - samples.mean(1)).abs() / (samples.std(1) * (1 + 1 / num_samples) ** 0.5)
        factors[str(problem.operator.problem_class)] = spread_factor(error)
    return factors
