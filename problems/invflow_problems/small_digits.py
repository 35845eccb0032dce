"""MNIST averaged to 14 x 14 pixels, with a prior small enough to calibrate exact samplers.

The noise has standard deviation 0.1 throughout. The prior is a perceptron on 196 values (:func:`small_digits_prior`)
with half a million parameters. It generates tens of thousands of images per second on one core. Its digits are rougher
than those of the priors at 28 x 28, but this does not affect whether a sampler draws from the posterior of *its* prior.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

from invflow.flowmap import FlowMap
from invflow.models.latent import LatentFlowMap
from invflow.operator import Operator
from invflow.problem import Problem
from invflow_problems.samples import load_samples

__all__ = ["halve", "mnist_14_box_inpainting", "mnist_14_denoising", "mnist_14_super_resolution", "small_digits_prior"]

SHAPE = (1, 14, 14)
SIGMA = 0.1


def halve(images: Tensor) -> Tensor:
    """Averages of 2 x 2 pixels: ``(n, 1, 28, 28)`` to ``(n, 1, 14, 14)``."""
    return avg_pool2d(images, 2)


def small_digits_prior(name: str = "mnist-14") -> LatentFlowMap:
    """The prior of these problems: a flow map on vectors of 196 values, with images ``(1, 14, 14)``.

    Args:
        name: Name of the weights, or a folder written by ``invflow train mnist-14``.

    Example:
        >>> import torch
        >>> from invflow_problems.small_digits import small_digits_prior
        >>> small_digits_prior().generate(4, steps=1, generator=torch.Generator().manual_seed(0)).shape
        torch.Size([4, 1, 14, 14])
    """
    from invflow.models.neural import load_prior

    vectors = load_prior(name)
    return LatentFlowMap(vectors, _Pictures(vectors), _Vectors(vectors), image_shape=SHAPE)


class _Pictures(nn.Module):
    """Convert vectors of the map's states to images in [0, 1]."""

    def __init__(self, vectors: FlowMap) -> None:
        super().__init__()
        self.vectors = vectors

    def forward(self, state: Tensor) -> Tensor:
        result: Tensor = self.vectors.decode(state).unflatten(1, SHAPE)
        return result


class _Vectors(_Pictures):
    """The inverse."""

    def forward(self, image: Tensor) -> Tensor:
        return self.vectors.encode(image.flatten(1))


def _denoising() -> Operator:
    from invflow_operators.elementwise import Denoising

    return Denoising(SHAPE)


def _box_inpainting() -> Operator:
    from invflow_operators.inpainting import BoxInpainting

    return BoxInpainting(SHAPE, box=(7, 7))


def _super_resolution() -> Operator:
    from invflow_operators.superresolution import SuperResolution

    return SuperResolution(SHAPE, factor=2)


def _images(split: str) -> Tensor:
    return halve(load_samples("mnist", split)[0])


def _problem(task: str, operator: Callable[[], Operator], description: str) -> Problem:
    return Problem(f"mnist-14/{task}", None, operator, SIGMA, images=_images, prior=small_digits_prior,
                   description=f"digits of 14 x 14 pixels, {description}, noise {SIGMA}")


mnist_14_denoising = _problem("denoising", _denoising, "all pixels observed")
mnist_14_box_inpainting = _problem("box-inpainting", _box_inpainting, "a centred box of 7 x 7 pixels hidden")
mnist_14_super_resolution = _problem("super-resolution", _super_resolution, "2 x 2 pixels averaged into one")
