"""Loads a folder of any pictures as one tensor: cropped, scaled and converted to the same channels."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from invflow.datasets.files import fit_to, read_image
from invflow.datasets.sets import DOWNLOADS, image_files, load_images, packed

__all__ = ["SIDE", "load_fitted"]

Say = Callable[[str], None]
#: default side in pixels: small enough to train on in minutes with two CPU cores
SIDE = 32


def load_fitted(path: str | os.PathLike[str], image_shape: Sequence[int] | None = None, *, size: int | None = None,
                say: Say = print) -> Tensor:
    """Load all images of a folder for training, whatever their sizes, bit depths and colours.

    Each picture is cropped to its centre and scaled. A grey picture among colour ones is repeated three times, a
    colour picture becomes grey if grey is requested, transparency is blended with white, and 16 bits become 8. A file
    that cannot be read is left out. One sentence reports all changes.

    Args:
        path: A folder of image files (including all subfolders except ``test``), of IDX files or of CIFAR-10's files;
            or a name that :func:`~invflow.datasets.sets.load_images` downloads.
        image_shape: Required image shape ``(C, H, W)``, such as a prior's; None to choose one that fits all images.
        size: Side of the square if ``image_shape`` is None. None keeps images that all have one size of at most
            32 x 32 pixels, and otherwise means 32.
        say: Called with the sentence, if anything was changed.

    Returns:
        ``(n, C, H, W)``, bytes.

    Raises:
        FileNotFoundError: If there is no such folder, or no image in it.
        ValueError: If none of its files can be read.

    Example:
        >>> import tempfile, torch
        >>> from invflow.datasets.files import write_image
        >>> from invflow.datasets.fitted import load_fitted
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_image(torch.rand(3, 48, 60), f"{folder}/a.png")
        ...     write_image(torch.rand(1, 50, 40), f"{folder}/b.jpg")
        ...     load_fitted(folder, size=24).shape
        2 images of 2 sizes: cropped to their centres and scaled to 24 x 24; 1 is grey among colour ones
        torch.Size([2, 3, 24, 24])
    """
    if size is not None and size < 8:
        raise ValueError(f"size={size}: images have at least 8 pixels a side, such as size=32")
    folder = Path(path)
    if not folder.is_dir() or packed(folder):
        images = list(load_images(path, dtype=torch.uint8))  # this raises an error if anything is wrong
        made = _Made(len(images), Counter({_size(images[0]): len(images)}))
    else:
        files = image_files(folder)
        if not files:
            raise FileNotFoundError(f"there is no image in {str(path)!r}: pass a folder with .png, .jpg, .webp or "
                                    f".tif files, or one of {', '.join(sorted(DOWNLOADS))}")
        images, made = _read(files)
    if image_shape is None:
        first, alike = tuple(images[0].shape[1:]), len(made.sizes) == 1
        sides = first if size is None and alike and max(first) <= SIDE else (size or SIDE,) * 2
        image_shape = (max(len(image) for image in images), *sides)
    result = torch.stack([_fitted(image, tuple(image_shape), made) for image in images])
    sentence = made.sentence(tuple(image_shape))
    if sentence:
        say(sentence)
    return result


@dataclass
class _Made:
    """Record of the changes to a set of images."""

    total: int
    sizes: Counter[str]
    notes: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    moved: int = 0
    enlarged: int = 0
    repeated: int = 0
    greyed: int = 0

    def sentence(self, shape: tuple[int, ...]) -> str:
        """All changes in one sentence, or an empty text."""
        parts = []
        if self.moved:
            what = f"of {len(self.sizes)} sizes" if len(self.sizes) > 1 else f"of {next(iter(self.sizes))} pixels"
            parts.append(f"{self.total} images {what}: cropped to their centres and scaled to {shape[1]} x {shape[2]}")
        if self.enlarged:
            parts.append(f"{self.enlarged} {'were' if self.enlarged > 1 else 'was'} smaller, and enlarged")
        if self.repeated:
            parts.append(f"{self.repeated} {'are' if self.repeated > 1 else 'is'} grey among colour ones")
        if self.greyed:
            parts.append(f"{self.greyed} in colour became grey")
        if self.notes:
            also = f", and {len(self.notes) - 1} more of this kind" if len(self.notes) > 1 else ""
            parts.append(self.notes[0] + also)
        if self.broken:
            parts.append(f"{len(self.broken)} could not be read and {'were' if len(self.broken) > 1 else 'was'} left "
                         f"out, {self.broken[0]}")
        return "; ".join(parts)


def _read(files: Sequence[Path]) -> tuple[list[Tensor], _Made]:
    images: list[Tensor] = []
    made = _Made(0, Counter())
    for file in files:
        said: list[str] = []
        try:
            image = read_image(file, say=said.append)
        except ValueError as error:
            made.broken.append(str(error))
            continue
        made.notes += said[:1]
        made.sizes[_size(image)] += 1
        images.append(image.mul(255).round().to(torch.uint8))
    if not images:
        raise ValueError(f"none of {len(files)} files can be read: {made.broken[0]}")
    made.total = len(images)
    return images, made


def _fitted(image: Tensor, shape: tuple[int, ...], made: _Made) -> Tensor:
    """One image, ``(C, H, W)`` bytes, in another shape."""
    if tuple(image.shape[1:]) != shape[1:]:
        made.moved += 1
        made.enlarged += min(image.shape[1] / shape[1], image.shape[2] / shape[2]) < 1
        image = fit_to(image.float(), shape[1:], say=lambda _: None).round().to(torch.uint8)
    if len(image) == shape[0]:
        return image
    if shape[0] == 3 and len(image) == 1:
        made.repeated += 1
        return image.expand(3, -1, -1)
    if shape[0] != 1:
        raise ValueError(f"images have {len(image)} channels, but {shape[0]} were requested: 1 is grey and 3 is colour")
    made.greyed += 1
    weights = torch.tensor([0.299, 0.587, 0.114])  # luminance, ITU-R BT.601
    return torch.einsum("c,chw->hw", weights, image.float())[None].round().to(torch.uint8)


def _size(image: Tensor) -> str:
    return f"{image.shape[-2]} x {image.shape[-1]}"
