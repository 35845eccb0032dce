"""What the tests of sampling in noise space share: seeded numbers, a proposal, and a test in standard errors."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from invflow import FlowMap

F64 = torch.float64


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
    """As an adapter: one Gaussian for each observation, here the same for all; rightly placed or not."""

    def __init__(self, mean: Tensor, std: Tensor) -> None:
        self.mean, self.std = mean, std

    def check_map(self, prior: FlowMap) -> None:
        if prior.state_shape != tuple(self.mean.shape):
            raise ValueError("the proposal was made for another map")

    def propose(self, reward: Any) -> tuple[Tensor, Tensor]:
        count = reward.num_observations or 1
        return self.mean.expand(count, -1), self.std.expand(count, -1)
