"""Input images: shipped ones, and users' own, converted to the format of a prior."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from invflow.datasets.files import fit_to, read_image

__all__ = ["DIGITS", "DRAWN", "LONGEST", "MEGAPIXELS", "OWN", "PHOTOGRAPHS", "PRIORS", "drawn_digit", "prior_of",
           "read_own", "sample_picture", "samples_of"]

#: names of the shipped images
DIGITS = tuple(f"digit {k}" for k in range(1, 13))
PHOTOGRAPHS = tuple(f"photograph {k}" for k in range(1, 11))
OWN, DRAWN = "your own file", "a digit that you draw"
PRIORS = ("mnist", "photos")
#: limits for a user's own file: size when decoding, and longest side in pixels after scaling
MEGAPIXELS, LONGEST = 40, 320


@functools.lru_cache
def _shipped(problem: str) -> Tensor:
    from invflow.problem import load_problem

    return load_problem(problem).images()


def sample_picture(name: str) -> Tensor:
    """An image that ships with the library, ``(C, H, W)`` in [0, 1], in steps of 1/255.

    Args:
        name: Name in :data:`DIGITS` (1 x 28 x 28) or :data:`PHOTOGRAPHS` (3 x 256 x 256).

    Raises:
        ValueError: For any other name.
    """
    for names, problem in ((DIGITS, "mnist/denoising"), (PHOTOGRAPHS, "photos/denoising")):
        if name in names:
            return _eight_bits(_shipped(problem)[names.index(name)])
    raise ValueError(f"image {name!r} is unknown: choose one such as {DIGITS[0]!r} or {PHOTOGRAPHS[0]!r}")


def prior_of(name: str) -> str:
    """Default prior of an image."""
    return "photos" if name in PHOTOGRAPHS else "mnist"


def samples_of(prior: str) -> int:
    """Default number of samples."""
    return 16 if prior == "photos" else 64


def read_own(path: str | os.PathLike[str], prior: str, say: Callable[[str], None]) -> Tensor:
    """Read a user's file as an image for the prior.

    For ``mnist``, it is cropped to a square, scaled to 28 x 28 in grey, and inverted if it has dark strokes on a light
    background; for ``photos``, it is scaled to at most :data:`LONGEST` pixels per side.

    Args:
        path: Path of the file.
        prior: One of :data:`PRIORS`.
        say: Function called with a sentence for each change.

    Returns:
        ``(C, H, W)`` in [0, 1], in steps of 1/255.

    Raises:
        ValueError: If the file is not an image or is too large.
    """
    try:
        return _read_own(path, prior, say)
    except (ValueError, OSError) as error:  # which contain the path of the uploaded file
        raise ValueError(str(error).replace(str(path), Path(path).name)) from error


def _read_own(path: str | os.PathLike[str], prior: str, say: Callable[[str], None]) -> Tensor:
    _check_size(path)
    if prior != "photos":
        image = read_image(path, image_shape=(1, 28, 28), resize=True, say=say)
        if float(image.median()) > 0.5:
            say("assumed dark strokes on a light background: dark and light are swapped")
            image = 1 - image
        return _eight_bits(image)
    image = read_image(path, channels=3, say=say)
    height, width = image.shape[1:]
    if max(height, width) > LONGEST:
        ratio = LONGEST / max(height, width)
        image = fit_to(image, (max(8, round(ratio * height)), max(8, round(ratio * width))), say=say)
    if min(image.shape[1:]) < 16:
        raise ValueError(f"this file is {height} x {width} pixels: pass a photograph with sides of at least 16 pixels")
    return _eight_bits(image)


def _check_size(path: str | os.PathLike[str]) -> None:
    """Reject a file by its header, before allocating memory for the image."""
    from PIL import Image

    try:
        with Image.open(path) as file:
            width, height = file.size
    except Exception:  # reading the file gives a clear error
        return
    if width * height > 1_000_000 * MEGAPIXELS:
        raise ValueError(f"this file has {width * height / 1e6:.0f} megapixels: pass one of at most {MEGAPIXELS}, or "
                         "use invflow restore, which takes any size")


def drawn_digit(strokes: Tensor) -> Tensor:
    """Convert a painting on a square canvas to a digit.

    Args:
        strokes: Opacity of the paint, ``(H, W)`` in [0, 1].

    Returns:
        ``(1, 28, 28)`` as in MNIST: scaled to fit 20 x 20 and centred by its mass (LeCun et al. 1998).

    Raises:
        ValueError: If nothing was painted.
    """
    rows, columns = (strokes.amax(1) > 0.1).nonzero().flatten(), (strokes.amax(0) > 0.1).nonzero().flatten()
    if not len(rows):
        raise ValueError("nothing is drawn yet: draw a digit with the brush")
    ink = strokes[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    scale = 20 / max(ink.shape)
    size = [max(1, round(scale * side)) for side in ink.shape]
    small = torch.nn.functional.interpolate(ink[None, None], size=size, mode="bilinear", antialias=True)[0, 0]
    place = torch.stack(torch.meshgrid(*(torch.arange(side) + 0.5 for side in size), indexing="ij"))
    centre = (place * small).sum((1, 2)) / small.sum()
    top, left = (int(min(max(0, round(14 - float(c))), 28 - side)) for c, side in zip(centre, size, strict=True))
    image = torch.zeros(1, 28, 28)
    image[0, top : top + size[0], left : left + size[1]] = small
    return _eight_bits(image)


def _eight_bits(image: Tensor) -> Tensor:
    """Round to the values of a PNG file, so that code that reads one gets the same numbers."""
    return (image.clamp(0, 1) * 255).round() / 255
