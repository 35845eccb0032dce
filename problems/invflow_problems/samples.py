"""The shipped sample images: parts of the official test sets, never used for training."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

__all__ = ["COUNTS", "FOLDER", "NAMES", "load_samples"]

FOLDER = Path(__file__).parent / "data"
NAMES = ("mnist", "fashion-mnist", "cifar10")
# number of images of each split, in the order of the official test file: first test images, then validation images
COUNTS = {"test": 200, "validation": 100}


def load_samples(name: str, split: str = "test") -> tuple[Tensor, Tensor]:
    """Load shipped images.

    Args:
        name: ``"mnist"``, ``"fashion-mnist"`` or ``"cifar10"``.
        split: ``"test"`` or ``"validation"``.

    Returns:
        images: ``(n, 1, 28, 28)``, for CIFAR-10 ``(n, 3, 32, 32)``, in [0, 1], float32.
        labels: ``(n,)`` int64, 0 to 9.

    Raises:
        ValueError: For any other name or split.
    """
    if name not in NAMES or split not in COUNTS:
        raise ValueError(f"there are no samples {name!r} of split {split!r}: pass one of {NAMES} and {tuple(COUNTS)}")
    tensors = _read(name)
    images = tensors[f"{split}_images"].to(torch.float32).div_(255)
    # files of grey images have no channel axis
    return images if images.ndim == 4 else images[:, None], tensors[f"{split}_labels"].long()


@functools.cache
def _read(name: str) -> dict[str, Tensor]:
    return load_file(FOLDER / f"{name}.safetensors")
