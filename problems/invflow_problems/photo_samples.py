"""The shipped photographs: 256 x 256 crops of photographs that no shipped prior was trained on."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from safetensors.torch import load_file
from torch import Tensor

from invflow_problems.samples import FOLDER

__all__ = ["CROPS", "SIDE", "Crop", "load_photos"]

#: side of the crops, in pixels
SIDE = 256


@dataclass(frozen=True)
class Crop:
    """Position of a crop.

    Attributes:
        photo: Name of the photograph in :mod:`invflow_problems.photo_split`.
        top, left: Position of the crop in the photograph scaled to a width of 640 pixels.
    """

    photo: str
    top: int
    left: int


CROPS = {
    "test": (Crop("EveningGlow", 140, 0), Crop("BytheWater", 40, 384), Crop("Dune", 60, 128), Crop("LadyBird", 90, 340),
             Crop("RainDrops", 100, 150), Crop("EveningGlow", 60, 330), Crop("BytheWater", 144, 100),
             Crop("Dune", 140, 300), Crop("LadyBird", 10, 20), Crop("RainDrops", 20, 330)),
    "validation": (Crop("ColdRipple", 144, 60), Crop("Garden", 60, 250), Crop("GreenMeadow", 100, 100),
                   Crop("Storm", 60, 40), Crop("ColdRipple", 110, 280), Crop("Garden", 140, 230),
                   Crop("GreenMeadow", 220, 360), Crop("Storm", 170, 384)),
}


def load_photos(split: str = "test") -> Tensor:
    """Load the shipped photographs.

    Args:
        split: ``"test"``, 10 crops of 5 photographs, or ``"validation"``, 8 crops of 4 others.

    Returns:
        ``(n, 3, 256, 256)`` in [0, 1], float32.

    Raises:
        ValueError: For any other split.

    Example:
        >>> from invflow_problems.photo_samples import load_photos
        >>> load_photos("validation").shape
        torch.Size([8, 3, 256, 256])
    """
    if split not in CROPS:
        raise ValueError(f"there is no split {split!r} of the photographs: pass one of {tuple(CROPS)}")
    return _read()[f"{split}_images"].to(torch.float32).div_(255)


@functools.cache
def _read() -> dict[str, Tensor]:
    return load_file(FOLDER / "photos.safetensors")
