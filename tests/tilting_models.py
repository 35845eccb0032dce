"""A flow map, an operator and a reward that the tests of tilted sampling share."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from invflow import FlowMap, Operator
from invflow.flowmap import expand_time
from invflow.reward import Reward


class Gaussian(FlowMap):
    """The flow of N(0, I) to N(0, I), with a map in closed form: one call for each jump."""

    state_shape = image_shape = (3,)

    def velocity(self, x: Tensor, t: Any) -> Tensor:
        t = expand_time(t, x)
        return x * (2 * t - 1) / ((1 - t) ** 2 + t**2)

    def jump(self, x: Tensor, s: Any, t: Any) -> Tensor:
        s, t = expand_time(s, x), expand_time(t, x)
        return x * (((1 - t) ** 2 + t**2) / ((1 - s) ** 2 + s**2)).sqrt()


class Row(Operator):
    """One linear measurement."""

    matrix: Tensor

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.register_buffer("matrix", matrix)
        self.measurement_shape, self.image_shape = (len(matrix),), (matrix.shape[1],)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.matrix.T


class Tilt(Reward):
    """The same function of images for each of so many observations, which are replicates of one another."""

    def __init__(self, fn: Callable[[Tensor], Tensor], count: int, differentiable: bool = True) -> None:
        self.fn, self.num_observations, self.differentiable = fn, count, differentiable

    def select(self, index: Any) -> Reward:
        other = copy.copy(self)
        other.num_observations = len(torch.arange(self.num_observations or 1)[index])
        return other

    def __call__(self, x: Tensor) -> Tensor:
        assert x.shape[0] == self.num_observations
        return self.fn(x.flatten(0, 1)).unflatten(0, x.shape[:2])
