"""Shared by the tests of classical restoration: pictures, operators, dense matrices, and a flow in closed form."""

from __future__ import annotations

import math

import torch
from torch import Tensor

import invflow
from invflow.flowmap import FlowMap, expand_time
from invflow.operators import Blur, Denoising, GaussianBlur, MatrixOperator, RandomInpainting, SuperResolution

F64 = torch.float64


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=F64)


def edges(*shape: int) -> Tensor:
    """Pictures with an edge in each channel, in [0.2, 0.8]."""
    rows, columns = torch.arange(shape[-2], dtype=F64)[:, None], torch.arange(shape[-1], dtype=F64)
    inside = (rows - shape[-2] / 2) ** 2 + (columns - shape[-1] / 2) ** 2 < (shape[-1] / 4) ** 2
    return (0.2 + 0.6 * inside).expand(*shape).clone()


def operators(shape: tuple[int, int, int]) -> dict[str, invflow.Operator]:
    kernel = randn(2, 1, 3, 4, seed=9).abs()
    return {
        "denoising": Denoising(shape),
        "mask": RandomInpainting(shape, keep=0.5, generator=generator(1)),
        "masks": RandomInpainting(shape, keep=0.5, generator=generator(1)).randomize(2, generator(2)),
        "super-resolution": SuperResolution(shape, factor=2),
        "blur": GaussianBlur(shape, std=0.8, kernel_size=3).double(),
        "blurs": Blur(kernel / kernel.sum((2, 3), keepdim=True), shape).double(),
        "blur, reflected": GaussianBlur(shape, std=0.8, kernel_size=3, padding="reflect").double(),
        "blur, a kernel a channel": Blur(randn(shape[0], 3, 3, seed=4).abs(), shape).double(),
        "matrix": MatrixOperator(randn(7, math.prod(shape), seed=3), image_shape=shape),
    }


def likelihood_of(operator: invflow.Operator, count: int = 2, sigma: float = 0.1) -> invflow.GaussianLikelihood:
    x = edges(count, *operator.image_shape) + 0.05 * randn(count, *operator.image_shape, seed=5)
    y = operator(x) + sigma * randn(count, *operator.measurement_shape, seed=6)
    return invflow.GaussianLikelihood(operator, y, torch.linspace(sigma, 1.5 * sigma, count, dtype=F64))


def dense(likelihood: invflow.GaussianLikelihood, b: int) -> Tensor:
    """The matrix of an observation's operator, unobserved rows zero."""
    one = likelihood.select(slice(b, b + 1))
    unit = torch.eye(math.prod(one.operator.image_shape), dtype=F64).reshape(-1, *one.operator.image_shape)
    rows = one.operator.expand(len(unit))(unit).flatten(1).mT
    observed = one.operator.observed()
    return rows if observed is None else rows * observed.reshape(-1, 1)


class Ellipsoid(FlowMap):
    """The flow of a Gaussian with independent values of mean m and their own variances; states are in [-1, 1]."""

    def __init__(self, mean: Tensor, variance: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("variance", variance)
        self.state_shape = self.image_shape = tuple(mean.shape)

    @property
    def decode_affine(self) -> tuple[float, float]:
        return 0.5, 0.5

    def velocity(self, x: Tensor, t) -> Tensor:
        t = expand_time(t, x)
        gain = (t * self.variance - (1 - t)) / (t**2 * self.variance + (1 - t) ** 2)
        return self.mean + gain * (x - t * self.mean)


def ellipsoid(shape: tuple[int, ...]) -> Ellipsoid:
    return Ellipsoid(0.3 * randn(*shape, seed=11), 0.05 + 0.5 * randn(*shape, seed=12).abs())
