"""Take the shipped sample images from the official files: ``python -m benchmarks.release.make_samples NAME``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from invflow.datasets.sets import load_images
from invflow.plugins import write_atomically
from invflow_problems.photo_samples import CROPS, SIDE
from invflow_problems.photo_split import photo_name
from invflow_problems.samples import COUNTS, FOLDER, NAMES

__all__ = ["main", "make_atoms", "make_photos", "make_samples"]


def make_samples(name: str, data: str, output: Path) -> Path:
    """Write the first images of a test set: the first 200 as split "test", the next 100 as "validation".

    Args:
        name: ``"mnist"``, ``"fashion-mnist"`` or ``"cifar10"``, also the name of the file.
        data: Folder with the official files, or a name that :func:`invflow.datasets.sets.load_images` downloads.
        output: Folder for ``<name>.safetensors``.

    Returns:
        The file.
    """
    images, labels = load_images(data, "test", labels=True, dtype=torch.uint8)
    tensors, start = {}, 0
    for split, count in COUNTS.items():
        part = images[start : start + count]
        tensors[f"{split}_images"] = (part[:, 0] if part.shape[1] == 1 else part).contiguous()
        tensors[f"{split}_labels"] = labels[start : start + count].to(torch.uint8)
        start += count
    path = output / f"{name}.safetensors"
    write_atomically(path, lambda temporary: save_file(tensors, temporary))
    return path


def make_atoms(data: str, output: Path) -> Path:
    """Write the first 1,000 training images of MNIST, the prior of the problems ``atoms/...``.

    Args:
        data: Folder with the official files, or a name that :func:`invflow.datasets.sets.load_images` downloads.
        output: Folder for ``mnist-atoms.safetensors``.

    Returns:
        The file.
    """
    images = load_images(data, "train", dtype=torch.uint8)[:1000, 0].contiguous()
    path = output / "mnist-atoms.safetensors"
    write_atomically(path, lambda temporary: save_file({"images": images}, temporary))
    return path


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the requested samples."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.release.make_samples", description=__doc__)
    parser.add_argument("name", choices=[*NAMES, "mnist-atoms", "photos"])
    parser.add_argument("data", nargs="*", help="folder with the official files; default: download them. For photos: "
                        "the folders of the two collections of wallpapers")
    parser.add_argument("--output", type=Path, default=FOLDER,
                        help="output folder; default: the folder from which the problems read")
    options = parser.parse_args(arguments)
    if options.name == "photos":
        if not options.data:
            parser.error("photos are not downloaded: pass the folders of the wallpapers")
        print(make_photos([Path(folder) for folder in options.data], options.output))
        return
    if len(options.data) > 1:
        parser.error(f"{options.name} takes one folder, not several")
    if options.name == "mnist-atoms":
        print(make_atoms(options.data[0] if options.data else "mnist", options.output))
        return
    print(make_samples(options.name, options.data[0] if options.data else options.name, options.output))


if __name__ == "__main__":
    main()


def make_photos(folders: Sequence[Path], output: Path) -> Path:
    """Cut the crops from the photographs, which are scaled to a width of 640 pixels with Lanczos's filter.

    Args:
        folders: Folders to search for JPEG files, with subfolders; the largest file of each name is used.
        output: Folder for ``photos.safetensors``.

    Returns:
        The file.

    Raises:
        ValueError: If a photograph is missing.
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
