"""The photographs that come with the problems: 256 x 256 crops of photographs that no prior was trained on."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from invflow.pretrained import write_atomically
from invflow_problems.photo_split import photo_name
from invflow_problems.samples import FOLDER

__all__ = ["CROPS", "SIDE", "Crop", "load_photos", "make_photos"]

#: side of the crops, in pixels
SIDE = 256


@dataclass(frozen=True)
class Crop:
    """Where a crop lies.

    Attributes:
        photo: the photograph's name in :mod:`invflow_problems.photo_split`.
        top, left: of the crop in the photograph scaled to a width of 640 pixels.
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
        ValueError: for another split.

    Example:
        >>> from invflow_problems.photo_samples import load_photos
        >>> load_photos("validation").shape
        torch.Size([8, 3, 256, 256])
    """
    if split not in CROPS:
        raise ValueError(f"no photographs of split {split!r}: splits are {tuple(CROPS)}")
    return _read()[f"{split}_images"].to(torch.float32).div_(255)


@functools.cache
def _read() -> dict[str, Tensor]:
    return load_file(FOLDER / "photos.safetensors")


def make_photos(folders: Sequence[Path], output: Path) -> Path:
    """Cut the crops out of the photographs, scaled to a width of 640 pixels with Lanczos's filter.

    Args:
        folders: searched for JPEG files, also in the folders within; the largest file of each name is taken.
        output: folder that ``photos.safetensors`` is written into.

    Returns:
        The file.

    Raises:
        ValueError: if a photograph is not there.
    """
    from PIL import Image

    files: dict[str, Path] = {}
    for file in sorted(found for folder in folders for found in folder.rglob("*.jpg") if found.is_file()):
        name = photo_name(file)
        if name not in files or file.stat().st_size > files[name].stat().st_size:
            files[name] = file
    missing = sorted({crop.photo for crops in CROPS.values() for crop in crops} - set(files))
    if missing:
        raise ValueError(f"there is no photograph {missing[0]} under {', '.join(map(str, folders))}")
    tensors = {}
    for split, crops in CROPS.items():
        images = []
        for crop in crops:
            with Image.open(files[crop.photo]) as image:
                scaled = image.convert("RGB").resize((640, round(image.height * 640 / image.width)),
                                                     Image.Resampling.LANCZOS)
            part = scaled.crop((crop.left, crop.top, crop.left + SIDE, crop.top + SIDE))
            data = torch.frombuffer(bytearray(part.tobytes()), dtype=torch.uint8)
            images.append(data.reshape(SIDE, SIDE, 3).permute(2, 0, 1))
        tensors[f"{split}_images"] = torch.stack(images).contiguous()
    path = output / "photos.safetensors"
    write_atomically(path, lambda temporary: save_file(tensors, temporary))
    return path
