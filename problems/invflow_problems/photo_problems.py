"""Inverse problems on colour photographs, 256 x 256 pixels in [0, 1] (255 x 255 for a factor of 3).

The noise has standard deviation 0.02, or five of 255 grey levels; denoising uses 0.1. The size of kernels is given in
pixels and does not depend on the size of the photograph, as in a camera. The photographs were held out: no shipped
prior was trained on them.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from invflow.operator import Operator
from invflow.problem import Problem
from invflow_problems.photo_samples import SIDE, load_photos

__all__ = [
    "photos_box_inpainting",
    "photos_denoising",
    "photos_gaussian_blur",
    "photos_motion_blur",
    "photos_random_inpainting",
    "photos_super_resolution",
    "photos_super_resolution_x2",
    "photos_super_resolution_x3",
]

Shape = tuple[int, int, int]


def denoising(shape: Shape) -> Operator:
    """The identity: only white noise is added."""
    from invflow_operators.elementwise import Denoising

    return Denoising(shape)


def random_inpainting(shape: Shape) -> Operator:
    """Half of the pixels, chosen at random."""
    import torch

    from invflow_operators.inpainting import RandomInpainting

    return RandomInpainting(shape, keep=0.5, generator=torch.Generator().manual_seed(0))


def box_inpainting(shape: Shape) -> Operator:
    """A hole of 32 x 32 pixels in the middle."""
    from invflow_operators.inpainting import BoxInpainting

    return BoxInpainting(shape, box=(32, 32), sides=None)


def super_resolution(shape: Shape, factor: int = 4) -> Operator:
    """Blocks of pixels averaged into one."""
    from invflow_operators.superresolution import SuperResolution

    return SuperResolution(shape, factor=factor)


def gaussian_blur(shape: Shape) -> Operator:
    """A Gaussian of standard deviation 2 pixels."""
    from invflow_operators.blur import GaussianBlur

    return GaussianBlur(shape, std=2.0, kernel_size=21)


def motion_blur(shape: Shape) -> Operator:
    """Blur along a random path within 21 x 21 pixels."""
    import torch

    from invflow_operators.blur import MotionBlur

    return MotionBlur(shape, kernel_size=21, generator=torch.Generator().manual_seed(0))


def _problem(task: str, operator: Callable[[Shape], Operator], description: str, *, sigma: float = 0.02,
             random: bool = False, side: int = SIDE) -> Problem:
    def images(split: str) -> Tensor:
        return load_photos(split)[..., :side, :side]

    return Problem(f"photos/{task}", "photos", lambda: operator((3, side, side)), sigma, images=images, random=random,
                   description=description)


photos_denoising = _problem("denoising", denoising, "white noise of standard deviation 0.1", sigma=0.1)
photos_random_inpainting = _problem("random-inpainting", random_inpainting,
                                    "half of the pixels observed, a new mask for each image", random=True)
photos_box_inpainting = _problem("box-inpainting", box_inpainting, "a centred box of 32 x 32 pixels hidden")
photos_super_resolution = _problem("super-resolution", super_resolution, "4 x 4 pixels averaged into one")
photos_super_resolution_x2 = _problem("super-resolution-x2", lambda shape: super_resolution(shape, 2),
                                      "2 x 2 pixels averaged into one")
photos_super_resolution_x3 = _problem("super-resolution-x3", lambda shape: super_resolution(shape, 3),
                                      "3 x 3 pixels averaged into one, images of 255 x 255", side=255)
photos_gaussian_blur = _problem("gaussian-blur", gaussian_blur, "Gaussian blur of standard deviation 2 pixels")
photos_motion_blur = _problem("motion-blur", motion_blur,
                              "blur along a random path in 21 x 21 pixels, a new one for each image", random=True)
