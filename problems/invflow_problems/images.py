"""Six inverse problems on MNIST and Fashion-MNIST, 28 x 28 pixels in [0, 1], and on CIFAR-10, 32 x 32 in colour.

The noise has standard deviation 0.025, or 0.05 for images in [-1, 1], as in the literature. Denoising uses 0.25: at
0.025, the measurement itself has a PSNR of 32 dB, and the prior would have nothing to add.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from torch import Tensor

from invflow.operator import Operator
from invflow.problem import Problem
from invflow_problems.samples import load_samples

__all__ = [
    "cifar10_box_inpainting",
    "cifar10_denoising",
    "cifar10_gaussian_blur",
    "cifar10_motion_blur",
    "cifar10_random_inpainting",
    "cifar10_super_resolution",
    "fashion_mnist_box_inpainting",
    "fashion_mnist_denoising",
    "fashion_mnist_gaussian_blur",
    "fashion_mnist_motion_blur",
    "fashion_mnist_random_inpainting",
    "fashion_mnist_super_resolution",
    "mnist_box_inpainting",
    "mnist_denoising",
    "mnist_gaussian_blur",
    "mnist_motion_blur",
    "mnist_random_inpainting",
    "mnist_super_resolution",
]

Shape = tuple[int, int, int]

SHAPES: dict[str, Shape] = {"mnist": (1, 28, 28), "fashion-mnist": (1, 28, 28), "cifar10": (3, 32, 32)}


def _denoising(shape: Shape) -> Operator:
    from invflow_operators.elementwise import Denoising

    return Denoising(shape)


def _random_inpainting(shape: Shape) -> Operator:
    import torch

    from invflow_operators.inpainting import RandomInpainting

    return RandomInpainting(shape, generator=torch.Generator().manual_seed(0))


def _box_inpainting(shape: Shape) -> Operator:
    from invflow_operators.inpainting import BoxInpainting

    return BoxInpainting(shape, box=(shape[1] // 2, shape[2] // 2))


def _super_resolution(shape: Shape) -> Operator:
    from invflow_operators.superresolution import SuperResolution

    return SuperResolution(shape, factor=4)


def _gaussian_blur(shape: Shape) -> Operator:
    from invflow_operators.blur import GaussianBlur

    return GaussianBlur(shape)


def _motion_blur(shape: Shape) -> Operator:
    import torch

    from invflow_operators.blur import MotionBlur

    return MotionBlur(shape, generator=torch.Generator().manual_seed(0))


def _problem(data: str, task: str, operator: Callable[[Shape], Operator], description: str, *,
             sigma: float = 0.025, random: bool = False) -> Problem:
    def images(split: str) -> Tensor:
        return load_samples(data, split)[0]

    return Problem(f"{data}/{task}", data, functools.partial(operator, SHAPES[data]), sigma, images=images,
                   random=random, description=description)


def _family(data: str) -> tuple[Problem, ...]:
    """The six problems on one data set."""
    side = SHAPES[data][1]
    # kernels and boxes grow with the image, as in the operators' defaults
    std = {28: "1 pixel", 32: "1.2 pixels"}[side]
    return (
        _problem(data, "denoising", _denoising, "white noise of standard deviation 0.25", sigma=0.25),
        _problem(data, "random-inpainting", _random_inpainting,
                 "30 to 70% of the pixels observed, a new mask for each image", random=True),
        _problem(data, "box-inpainting", _box_inpainting, f"a centred box of {side // 2} x {side // 2} pixels hidden"),
        _problem(data, "super-resolution", _super_resolution, "4 x 4 pixels averaged into one"),
        _problem(data, "gaussian-blur", _gaussian_blur, f"Gaussian blur of standard deviation {std}"),
        _problem(data, "motion-blur", _motion_blur, "blur along a random path, a new one for each image",
                 random=True),
    )


(mnist_denoising, mnist_random_inpainting, mnist_box_inpainting, mnist_super_resolution, mnist_gaussian_blur,
 mnist_motion_blur) = _family("mnist")
(fashion_mnist_denoising, fashion_mnist_random_inpainting, fashion_mnist_box_inpainting,
 fashion_mnist_super_resolution, fashion_mnist_gaussian_blur,
 fashion_mnist_motion_blur) = _family("fashion-mnist")
(cifar10_denoising, cifar10_random_inpainting, cifar10_box_inpainting, cifar10_super_resolution,
 cifar10_gaussian_blur, cifar10_motion_blur) = _family("cifar10")
