"""Pictures to begin with: those that ship, and a user's own, fitted to what a prior knows."""

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

#: names of the pictures that ship
DIGITS = tuple(f"digit {k}" for k in range(1, 13))
PHOTOGRAPHS = tuple(f"photograph {k}" for k in range(1, 11))
OWN, DRAWN = "your own file", "a digit that you draw"
PRIORS = ("mnist", "photos")
#: limits of a user's own file: what is decoded, and the longest side in pixels of what is worked on
MEGAPIXELS, LONGEST = 40, 320


@functools.lru_cache
def _shipped(problem: str) -> Tensor:
    from invflow.problem import load_problem

    return load_problem(problem).images()


def sample_picture(name: str) -> Tensor:
    """A picture that ships with the library, ``(C, H, W)`` in [0, 1], in steps of 1/255.

    Args:
        name: of :data:`DIGITS` (1 x 28 x 28) or :data:`PHOTOGRAPHS` (3 x 256 x 256).

    Raises:
        ValueError: for another name.
    """
    for names, problem in ((DIGITS, "mnist/denoising"), (PHOTOGRAPHS, "photos/denoising")):
        if name in names:
            return _eight_bits(_shipped(problem)[names.index(name)])
    raise ValueError(f"there is no picture {name!r}: choose one such as {DIGITS[0]!r} or {PHOTOGRAPHS[0]!r}")


def prior_of(name: str) -> str:
    """The prior that a picture goes with by itself."""
    return "photos" if name in PHOTOGRAPHS else "mnist"


def samples_of(prior: str) -> int:
    """How many samples are drawn unless somebody asks for others."""
    return 16 if prior == "photos" else 64


def read_own(path: str | os.PathLike[str], prior: str, say: Callable[[str], None]) -> Tensor:
    """Read a user's file as a picture that the prior takes.

    For ``mnist`` it is cropped to a square, scaled to 28 x 28 in grey, and dark strokes on light become light ones on
    dark; for ``photos`` it is scaled to at most :data:`LONGEST` pixels a side.

    Args:
        path: the file.
        prior: one of :data:`PRIORS`.
        say: called with a sentence for each change.

    Returns:
        ``(C, H, W)`` in [0, 1], in steps of 1/255.

    Raises:
        ValueError: for what is no picture, or too large a one.
    """
    try:
        return _read_own(path, prior, say)
    except (ValueError, OSError) as error:  # which name the file by the place that an upload was put
        raise ValueError(str(error).replace(str(path), Path(path).name)) from error


def _read_own(path: str | os.PathLike[str], prior: str, say: Callable[[str], None]) -> Tensor:
    _check_size(path)
    if prior != "photos":
        image = read_image(path, image_shape=(1, 28, 28), resize=True, say=say)
        if float(image.median()) > 0.5:
            say("taken as dark strokes on light: dark and light are exchanged")
            image = 1 - image
        return _eight_bits(image)
    image = read_image(path, channels=3, say=say)
    height, width = image.shape[1:]
    if max(height, width) > LONGEST:
        ratio = LONGEST / max(height, width)
        image = fit_to(image, (max(8, round(ratio * height)), max(8, round(ratio * width))), say=say)
    if min(image.shape[1:]) < 16:
        raise ValueError(f"this file is {height} x {width} pixels: a photograph of at least 16 a side is needed")
    return _eight_bits(image)


def _check_size(path: str | os.PathLike[str]) -> None:
    """Refuse by the header, before anything of the picture's size is made."""
    from PIL import Image

    try:
        with Image.open(path) as file:
            width, height = file.size
    except Exception:  # whatever it is, reading it says so in words
        return
    if width * height > 1_000_000 * MEGAPIXELS:
        raise ValueError(f"this file has {width * height / 1e6:.0f} megapixels: pass one of at most {MEGAPIXELS}, or "
                         "use invflow restore, which takes any size")


def drawn_digit(strokes: Tensor) -> Tensor:
    """A digit from what was painted on a square canvas.

    Args:
        strokes: ``(H, W)``, opacity of the paint in [0, 1].

    Returns:
        ``(1, 28, 28)`` as MNIST has them: scaled to fit 20 x 20 and centred by its mass (LeCun et al. 1998).

    Raises:
        ValueError: if nothing was painted.
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
    """What a PNG file holds, so that code that reads one has the same numbers."""
    return (image.clamp(0, 1) * 255).round() / 255
