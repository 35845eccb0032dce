"""Parts of the table of photographs: images, observations, and stored cells."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from invflow.evaluation.measures import measure
from invflow.evaluation.results.parts import derive_seed
from invflow.evaluation.summary import write_json
from invflow.likelihood import GaussianLikelihood
from invflow.operator import Operator
from invflow.plugins import write_atomically
from invflow.solver import Solver
from invflow_problems import photo_problems
from invflow_problems.photo_samples import CROPS, load_photos
from invflow_problems.photo_split import photo_name, split_of

__all__ = ["SOLVERS", "TASKS", "WINDOW", "Picture", "build", "cell_path", "held_out", "observe", "run_cell",
           "scikit_image", "window", "write_picture"]

#: side of the stored windows of each image, in pixels
WINDOW = 128
SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".webp", ".bmp")

#: operators by task, and noise levels
TASKS: dict[str, tuple[Callable[[tuple[int, int, int]], Operator], float]] = {
    "denoising": (photo_problems.denoising, 0.1),
    "random-inpainting": (photo_problems.random_inpainting, 0.02),
    "box-inpainting": (photo_problems.box_inpainting, 0.02),
    "super-resolution": (photo_problems.super_resolution, 0.02),
    "gaussian-blur": (photo_problems.gaussian_blur, 0.02),
    "motion-blur": (photo_problems.motion_blur, 0.02),
    "super-resolution-x2": (lambda shape: photo_problems.super_resolution(shape, 2), 0.02),
    "super-resolution-x3": (lambda shape: photo_problems.super_resolution(shape, 3), 0.02),
}
SOLVERS = ("vfm", "bicubic", "wiener", "tv", "bm3d", "plug-and-play")

#: windows to inspect, with faces, text, foliage, sky, fur and other hard parts; centres as shares of height and width
_CENTRES = {
    "astronaut": (0.22, 0.44), "chelsea": (0.42, 0.42), "coffee": (0.45, 0.45), "rocket": (0.60, 0.50),
    "EveningGlow": (0.55, 0.25), "BytheWater": (0.55, 0.50), "Dune": (0.55, 0.55), "LadyBird": (0.50, 0.70),
    "RainDrops": (0.40, 0.50),
}


@dataclass(frozen=True)
class Picture:
    """A test photograph.

    Attributes:
        name: Name used for its cells.
        image: ``(3, H, W)`` in [0, 1], its sides multiples of 12.
    """

    name: str
    image: Tensor


def _bounded(image: Tensor, max_side: int | None) -> Tensor:
    """Scale ``(C, H, W)`` down to the side, in colour, and crop its sides to multiples of 12 (of 2, 3 and 4)."""
    image = image[:3].expand(3, -1, -1)
    if max_side is not None and max(image.shape[1:]) > max_side:
        share = max_side / max(image.shape[1:])
        size = [max(12, round(side * share)) for side in image.shape[1:]]
        image = F.interpolate(image[None], size, mode="bicubic", antialias=True)[0].clamp(0, 1)
    height, width = (side // 12 * 12 for side in image.shape[1:])
    if min(height, width) < 24:
        raise ValueError(f"a picture of shape {tuple(image.shape)} is too small: it needs at least 24 x 24 pixels")
    return image[:, :height, :width].contiguous()


def scikit_image(max_side: int | None, say: Callable[[str], None] = print) -> list[Picture]:
    """scikit-image's photographs; if it is not installed, none, and a message."""
    try:
        from skimage import data
    except ImportError:
        say("scikit-image is not installed, so its photographs are skipped: pip install 'invflow[baselines]'")
        return []
    return [Picture(name, _bounded(torch.tensor(getattr(data, name)()).permute(2, 0, 1).float() / 255, max_side))
            for name in ("astronaut", "chelsea", "coffee", "rocket")]


def held_out(folders: Sequence[Path], max_side: int | None, say: Callable[[str], None] = print) -> list[Picture]:
    """Held-out photographs.

    Args:
        folders: Folders to search, with subfolders, for the held-out photographs. If there are none, all image files
            are used except those of the training and validation splits. Without a folder, the shipped crops are used.
        max_side: Length in pixels to which the longer side of larger photographs is reduced.
        say: Function called with a message for each skipped photograph.
    """
    if not folders:
        crops = CROPS["test"]
        names = [f"{crop.photo}-{sum(c.photo == crop.photo for c in crops[: i + 1])}" for i, crop in enumerate(crops)]
        return [Picture(name, _bounded(image, max_side)) for name, image in zip(names, load_photos(), strict=True)]
    from invflow.datasets.files import read_image

    files: dict[str, Path] = {}
    found = [file for folder in folders for file in sorted(folder.rglob("*"))
             if file.suffix.lower() in SUFFIXES and file.is_file()]
    known = any(split_of(file) == "test" for file in found)
    for file in found:
        name, split = photo_name(file), split_of(file)
        if split == "test" or (not known and split is None):
            if name not in files or file.stat().st_size > files[name].stat().st_size:
                files[name] = file
        elif split is not None and not known:
            say(f"{name} is skipped: it belongs to the {split} photographs")
    if not files:
        raise ValueError(f"there are no test photographs under {', '.join(map(str, folders))}")
    return [Picture(name, _bounded(read_image(file, channels=3, say=lambda _: None), max_side))
            for name, file in sorted(files.items())]


def observe(picture: Picture, task: str, seed: int) -> GaussianLikelihood:
    """Observation of an image, the same for every solver: names and seed determine the mask, kernel and noise."""
    make, sigma = TASKS[task]
    shape = (3, *picture.image.shape[1:])
    generator = torch.Generator().manual_seed(derive_seed(seed, picture.name, task))
    operator = make(shape)  # type: ignore[arg-type]
    if task in ("random-inpainting", "motion-blur"):
        operator = operator.randomize(1, generator)
    return GaussianLikelihood(operator, operator.measure(picture.image[None], sigma, generator=generator), sigma)


def build(name: str, vfm: str, prior: str) -> Solver:
    """A solver of the table, with its defaults."""
    from invflow.registry import solver_by_name

    return solver_by_name(name, {"vfm": vfm}.get(name, prior))


def window(picture: Picture) -> tuple[slice, slice]:
    """Rows and columns of an image that the picture sheet shows."""
    centre = _CENTRES.get(picture.name, (0.5, 0.5))
    parts = []
    for share, side in zip(centre, picture.image.shape[1:], strict=True):
        length = min(WINDOW, side)
        start = min(max(0, round(share * side) - length // 2), side - length)
        parts.append(slice(start, start + length))
    return parts[0], parts[1]


def cell_path(output: Path, picture: str, task: str, solver: str) -> Path:
    """Path of a cell's files, without the suffix."""
    return output / "cells" / f"{picture}__{task}__{solver}"


def write_picture(image: Tensor, path: Path) -> None:
    """Write ``(3, H, W)``, clipped to [0, 1], as a PNG file, whole or not at all."""
    from PIL import Image

    data = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    write_atomically(path, lambda name: Image.fromarray(data).save(name, format="PNG"))


def run_cell(output: Path, picture: Picture, task: str, name: str, solver: Callable[[], Solver],
             setup: dict[str, Any]) -> dict[str, Any]:
    """Run one solver on one observation of one image; an existing cell of the same setup is read instead.

    Args:
        output: Folder of the cells.
        picture: The truth.
        task: One of :data:`TASKS`.
        name: Name of the solver.
        solver: Function that builds it.
        setup: ``seed``, ``samples``, and all else that must agree for a stored cell to be reused.

    Returns:
        ``psnr``, ``ssim``, ``crps``, ``seconds``, ``calls`` and, for a posterior, ``coverage``; or ``failure``.
    """
    path = cell_path(output, picture.name, task, name)
    kept = path.with_name(path.name + ".json")
    setup = json.loads(json.dumps({**setup, "shape": picture.image.shape}))  # as in the file
    if kept.is_file():
        cell: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
        if cell["setup"] == setup:
            return cell
        raise ValueError(f"{kept} has another setup, {cell['setup']}: pass another output folder")
    likelihood, truth = observe(picture, task, setup["seed"]), picture.image[None]
    generator = torch.Generator().manual_seed(derive_seed(setup["seed"], picture.name, task, "solver"))
    cell = {"picture": picture.name, "task": task, "solver": name, "setup": setup}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            posterior = solver().sample(likelihood, setup["samples"], generator=generator)
    except (TypeError, ValueError) as error:
        cell["failure"] = " ".join(str(error).split())
        write_json(cell, kept)
        return cell
    mean, samples = posterior.mean(), posterior.samples
    point = posterior.diagnostics.get("point_estimate", False)
    found = measure(posterior, likelihood, truth, only=("psnr", "ssim", "crps", "coverage"))
    cell |= {"crps": float((mean - truth).abs().mean()),  # of one sample; several have their own CRPS
             **{key: float(value) for key, value in found.items()}, "seconds": posterior.seconds,
             "calls": posterior.nfe.forward * posterior.num_samples}
    rows_shown, columns_shown = window(picture)
    write_picture(mean[0, :, rows_shown, columns_shown], path.with_name(path.name + ".png"))
    if not point:
        write_picture(samples[0, 0, :, rows_shown, columns_shown], path.with_name(path.name + "__sample.png"))
    write_json(cell, kept)  # last, so that a cell with numbers also has its images
    return cell
