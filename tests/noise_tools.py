"""Shared by the tests of sampling in noise space: numbers, a Gaussian problem, a proposal, standard errors."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor

import invflow
from invflow import FlowMap, GaussianLikelihood, GaussianMixtureFlow, NoiseSMC
from invflow.operators import MatrixOperator

F64 = torch.float64
MATRIX = torch.tensor([[1.0, 0.5]], dtype=F64)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=F64)


def within(estimates: Tensor, truth: Tensor, standard_errors: float = 4.5) -> None:
    """The mean over independent runs ``(runs, ...)`` is ``truth`` within standard errors."""
    error = estimates.std(0) / math.sqrt(len(estimates))
    distance = (estimates.mean(0) - truth).abs()
    assert bool((distance <= standard_errors * error).all()), (distance / error).tolist()


class GaussianProposal:
    """A proposal like an adapter's: one Gaussian for each observation, here the same for all, correct or not."""

    def __init__(self, mean: Tensor, std: Tensor) -> None:
        self.mean, self.std = mean, std

    def check_map(self, prior: FlowMap) -> None:
        if prior.state_shape != tuple(self.mean.shape):
            raise ValueError("the proposal was made for another map")

    def propose(self, reward: Any) -> tuple[Tensor, Tensor]:
        count = reward.num_observations or 1
        return self.mean.expand(count, -1), self.std.expand(count, -1)


def gaussian() -> GaussianMixtureFlow:
    """One Gaussian: f(z) = mean + 0.8 z."""
    return GaussianMixtureFlow(torch.tensor([[0.5, -0.3]], dtype=F64), std=0.8)


def measured(y: list[float], sigma: float | Tensor = 0.4, matrix: Tensor = MATRIX) -> GaussianLikelihood:
    operator = MatrixOperator(matrix, image_shape=(2,))
    return GaussianLikelihood(operator, torch.tensor(y, dtype=F64)[:, None].expand(-1, len(matrix)), sigma)


def quiet(solver: NoiseSMC, *arguments: Any, **options: Any) -> invflow.Posterior:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return solver.sample(*arguments, **options)
