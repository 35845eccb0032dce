r"""A thousand handwritten digits as the prior: an image problem with a known exact posterior.

The prior is a mixture of Gaussians of standard deviation 0.1, centred at the first 1,000 training images of MNIST. With
a finite set of images, the velocity, the flow map and the posterior are exact: each image (an *atom*) becomes a
Gaussian of the posterior, with the weight :math:`N(y; A \mu_k, 0.1^2 A A^T + \sigma^2 I)`. The noise is strong enough
that about five to fifty atoms have weight. At the noise levels of photographs, one atom would have all the weight, and
every sampler that finds it would look exact.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable

import torch
from safetensors.torch import load_file
from torch import Tensor

from invflow.datasets.sets import load_images
from invflow.models.mixture import GaussianMixtureFlow
from invflow.operator import Operator
from invflow.problem import Problem
from invflow_problems.samples import FOLDER

__all__ = ["WIDTH", "atoms_mnist_box_inpainting", "atoms_mnist_denoising", "atoms_mnist_gaussian_blur",
           "atoms_mnist_super_resolution", "atoms_prior", "load_atoms"]

#: standard deviation of each Gaussian, in units of images
WIDTH = 0.1
SHAPE = (1, 28, 28)


def load_atoms() -> Tensor:
    """The first 1,000 training images of MNIST, ``(1000, 1, 28, 28)`` in [0, 1]."""
    images: Tensor = load_file(FOLDER / "mnist-atoms.safetensors")["images"]
    return images[:, None].to(torch.float32).div_(255)


def atoms_prior(data: str | os.PathLike[str] | None = None, count: int = 1000, *,
                width: float = WIDTH) -> GaussianMixtureFlow:
    """Build a prior from images: a mixture of equally likely Gaussians of one width, centred at them.

    Args:
        data: Folder or name for :func:`invflow.datasets.load_images`; None for the shipped digits.
        count: Number of images, the first ones of the training split.
        width: Standard deviation of each Gaussian, > 0.

    Returns:
        An exact prior of ``count`` components.

    Raises:
        ValueError: If there are fewer images.

    Example:
        >>> from invflow_problems.atoms import atoms_prior
        >>> atoms_prior(count=50).image_shape
        (1, 28, 28)
    """
    images = load_atoms() if data is None else load_images(data, "train")
    if not 1 <= count <= len(images):
        raise ValueError(f"count={count}: there are {len(images)} images; pass count={len(images)} for all of them"
                         + (", or data='mnist' for all 60,000" if data is None else ""))
    return GaussianMixtureFlow(images[:count], std=width)


@functools.cache
def _prior() -> GaussianMixtureFlow:
    return atoms_prior()


def _sample(n: int, generator: torch.Generator) -> Tensor:
    return _prior().sample(n, generator=generator)


def _denoising() -> Operator:
    from invflow_operators.elementwise import Denoising

    return Denoising(SHAPE)


def _super_resolution() -> Operator:
    from invflow_operators.superresolution import SuperResolution

    return SuperResolution(SHAPE, factor=4)


def _box_inpainting() -> Operator:
    from invflow_operators.inpainting import BoxInpainting

    return BoxInpainting(SHAPE, box=(14, 14))


def _gaussian_blur() -> Operator:
    from invflow_operators.blur import GaussianBlur

    return GaussianBlur(SHAPE)


def _problem(task: str, operator: Callable[[], Operator], sigma: float, what: str) -> Problem:
    return Problem(f"atoms/mnist-{task}", None, operator, sigma, sampler=_sample, prior=_prior,
                   description=f"1,000 digits as the prior, {what}, noise {sigma}; exact posterior")


atoms_mnist_super_resolution = _problem("super-resolution", _super_resolution, 0.35, "4 x 4 pixels averaged into one")
atoms_mnist_denoising = _problem("denoising", _denoising, 2.5, "all pixels observed")
atoms_mnist_box_inpainting = _problem("box-inpainting", _box_inpainting, 1.5, "a box of 14 x 14 pixels hidden")
atoms_mnist_gaussian_blur = _problem("gaussian-blur", _gaussian_blur, 1.5, "Gaussian blur")
