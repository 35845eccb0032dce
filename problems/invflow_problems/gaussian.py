"""A mixture of Gaussians in the plane with one measured number; everything is known in closed form."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from invflow.models.mixture import GaussianMixtureFlow
from invflow.operator import Operator
from invflow.problem import Problem

__all__ = ["gaussian_linear"]


@functools.cache
def _mixture() -> GaussianMixtureFlow:
    means = torch.tensor([[0.0, 2.0], [2.0, 0.0], [0.0, -2.0], [-2.0, 0.0], [0.5, 0.5]])
    return GaussianMixtureFlow(means, std=0.5, weights=torch.tensor([0.3, 0.2, 0.2, 0.2, 0.1]))


def _sampler(n: int, generator: torch.Generator) -> Tensor:
    return _mixture().sample(n, generator=generator)


def _operator() -> Operator:
    from invflow_operators.linear import MatrixOperator

    return MatrixOperator(torch.tensor([[1.0, 0.5]]), image_shape=(2,))


gaussian_linear = Problem("gaussian/linear", None, _operator, 0.3, sampler=_sampler, prior=_mixture,
                          description="five Gaussians in the plane, x + y/2 observed with noise 0.3")
