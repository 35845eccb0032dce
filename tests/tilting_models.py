"""A flow map and an operator that the tests of tilted sampling share."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from invflow import FlowMap, Operator
from invflow.flowmap import expand_time


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
