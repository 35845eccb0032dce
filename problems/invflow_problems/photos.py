"""Crops of photographs for training: from every photograph of a folder, at several scales and positions."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from invflow.datasets.files import read_image
from invflow.datasets.sets import IMAGE_SUFFIXES
from invflow_problems.photo_split import photo_name, split_of

__all__ = ["PhotoCrops", "find_photographs"]

#: lengths to which the longer side is reduced, so that pixels show detail rather than filter and JPEG artefacts
SIDES = (2000, 1400, 1000, 700, 500, 350, 250)


def find_photographs(folders: Sequence[str | os.PathLike[str]] | str | os.PathLike[str],
                     split: str = "training") -> list[Path]:
    """Find the photographs of a split: the largest file of each.

    Args:
        folders: Folders to search, with their subfolders; several may be joined by ``os.pathsep``. Files that are in no
            split of :mod:`invflow_problems.photo_split` are skipped. But if none of a folder's files is in any split,
            all of them are training photographs.
        split: ``"training"``, ``"validation"`` or ``"test"``.

    Raises:
        FileNotFoundError: If there is no photograph of the split.
    """
    if isinstance(folders, str | os.PathLike):
        folders = str(folders).split(os.pathsep)
    best: dict[str, Path] = {}
    for folder in folders:
        files = [f for f in sorted(Path(folder).rglob("*")) if f.suffix.lower() in IMAGE_SUFFIXES and f.is_file()
                 and not f.is_symlink() and f.stem != "screenshot"]
        known = [f for f in files if split_of(f) is not None]
        chosen = [f for f in known if split_of(f) == split] if known else files if split == "training" else []
        for file in chosen:
            name = photo_name(file) if known else str(file)
            if name not in best or best[name].stat().st_size < file.stat().st_size:
                best[name] = file
    if not best:
        raise FileNotFoundError(f"no photographs of the split {split!r} in {', '.join(map(str, folders))}: pass a "
                                "folder with image files, such as wallpapers")
    return [best[name] for name in sorted(best)]


class PhotoCrops:
    """Random square crops of photographs; ``crops(n, generator)`` gives ``(n, 3, size, size)``.

    A photograph, a scale and a position are drawn uniformly. Much of a photograph is sky or out of focus, so one, two
    or four positions are drawn, and the one with the largest contrast between neighbouring pixels is used. Crops are
    rotated and mirrored, and their colours permuted and weighted at random, because a few photographs contain few
    colours.

    Args:
        files: Files of the photographs.
        size: Side of a crop.
    """

    def __init__(self, files: Sequence[Path], size: int = 64) -> None:
        self.size = size
        self.levels = [self._pyramid(read_image(f, channels=3, say=lambda _: None)) for f in files]

    def _pyramid(self, image: Tensor) -> list[Tensor]:
        longer, levels = max(image.shape[1:]), []
        for side in SIDES:
            sides = [round(s * side / longer) for s in image.shape[1:]]
            if side < longer and min(sides) >= self.size:
                small = interpolate(image[None], sides, mode="bilinear", antialias=True)[0]
                levels.append(small.mul(255).round().clamp(0, 255).to(torch.uint8))
        if not levels:
            raise ValueError(f"a photograph of {tuple(image.shape[1:])} pixels is too small for a crop of {self.size}")
        return levels

    def __call__(self, n: int, generator: torch.Generator) -> Tensor:
        """``(n, 3, size, size)`` in [0, 1]."""
        return torch.stack([self._crop(generator) for _ in range(n)])

    def _crop(self, generator: torch.Generator) -> Tensor:
        photograph, level, places, turn = torch.randint(2**31, (4,), generator=generator).tolist()
        levels = self.levels[photograph % len(self.levels)]
        image = levels[level % len(levels)]
        crops = []
        for place in torch.rand((1, 2, 4)[places % 3], 2, generator=generator).tolist():
            i, j = (round(p * (side - self.size)) for p, side in zip(place, image.shape[1:]))
            crops.append(image[:, i : i + self.size, j : j + self.size].float() / 255)
        crop = max(crops, key=lambda c: float((c[..., 1:] - c[..., :-1]).abs().mean()))
        crop = torch.rot90(crop, turn % 4, (1, 2))
        if turn // 4 % 2:
            crop = crop.flip(2)
        if turn // 8 % 3 == 0:
            crop = crop[torch.randperm(3, generator=generator)]
        gains = 0.8 + 0.4 * torch.rand(3, 1, 1, generator=generator)
        return (crop * gains).clamp(0, 1)
