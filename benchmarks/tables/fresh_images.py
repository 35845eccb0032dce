"""Test images that no table has used before, identified by their digests.

The official test file of MNIST has 10,000 images. The first 300 ship with the problems and have been inspected.
Tables use others, in an order drawn once. ``fresh_images.txt`` lists the digests of the images that may be used. So
anybody can check which images a table has read, and no two runs read different images by accident.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor

from invflow.datasets.sets import load_images
from invflow_problems.samples import COUNTS, load_samples

__all__ = ["LISTED", "digest", "fresh_images", "shuffled"]

LISTED = Path(__file__).with_suffix(".txt")
_SEED = 2026


def digest(image: Tensor) -> str:
    """SHA-256 of the bytes of an image in uint8."""
    return hashlib.sha256(image.contiguous().numpy().tobytes()).hexdigest()


def shuffled(folder: Path, data: str = "mnist") -> Tensor:
    """The test images of a folder in an order drawn once, without the shipped ones.

    Args:
        folder: Folder with the official files, for :func:`invflow.datasets.sets.load_images`.
        data: Data set whose shipped samples are excluded.

    Returns:
        ``(n, C, H, W)`` in uint8.
    """
    images = load_images(folder, split="test", dtype=torch.uint8)
    seen = {digest((image * 255).round().to(torch.uint8)) for split in COUNTS for image in load_samples(data, split)[0]}
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(_SEED))
    return torch.stack([images[k] for k in order if digest(images[k]) not in seen])


def fresh_images(folder: Path, count: int, listed: Path = LISTED) -> Tensor:
    """The first images of the list, found in a folder of the official files by their digests.

    Args:
        folder: Same as in :func:`shuffled`.
        count: Number of images, at most the length of the list.
        listed: File with one digest per line.

    Returns:
        ``(count, C, H, W)`` in [0, 1].

    Raises:
        ValueError: For more images than are listed, or if the folder lacks one of them.
    """
    wanted = listed.read_text(encoding="utf-8").split()
    if count > len(wanted):
        raise ValueError(f"{listed.name} lists {len(wanted)} images, not {count}: request fewer, or use --list to add "
                         "images that nobody has read")
    found = {digest(image): image for image in load_images(folder, split="test", dtype=torch.uint8)}
    missing = [name for name in wanted[:count] if name not in found]
    if missing:
        raise ValueError(f"{len(missing)} of {count} images are not among the test images of {str(folder)!r}, the "
                         f"first with the digest {missing[0][:12]}...: pass the folder of the official files")
    return torch.stack([found[name] for name in wanted[:count]]).float() / 255
