"""Cut the shipped sample images out of the official test files; a command, see ``--help``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from invflow.datasets import load_images
from invflow.pretrained import write_atomically
from invflow_problems.samples import COUNTS, FOLDER, NAMES

__all__ = ["main", "make_samples"]


def make_samples(name: str, data: str, output: Path) -> Path:
    """Write the first images of a test set: the first 200 as split "test", the next 100 as "validation".

    Args:
        name: ``"mnist"`` or ``"fashion-mnist"``; names the file.
        data: folder with the official files, or a name that :func:`invflow.datasets.load_images` downloads.
        output: folder that ``<name>.safetensors`` is written into.

    Returns:
        The file.
    """
    images, labels = load_images(data, "test", labels=True, dtype=torch.uint8)
    tensors, start = {}, 0
    for split, count in COUNTS.items():
        tensors[f"{split}_images"] = images[start : start + count, 0].contiguous()
        tensors[f"{split}_labels"] = labels[start : start + count].to(torch.uint8)
        start += count
    path = output / f"{name}.safetensors"
    write_atomically(path, lambda temporary: save_file(tensors, temporary))
    return path


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m invflow_problems.make_samples", description=__doc__)
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("data", nargs="?", help="folder with the official files; default: download them")
    parser.add_argument("--output", type=Path, default=FOLDER, help="default: where problems look")
    options = parser.parse_args(arguments)
    print(make_samples(options.name, options.data or options.name, options.output))


if __name__ == "__main__":
    main()
