"""Convert PNG sheets of CIFAR-10 to its binary files: ``python -m benchmarks.release.cifar_sheets FOLDER OUTPUT``.

The sheets are ``data_batch_1.png`` to ``data_batch_5.png`` and ``test_batch.png``. A sheet is 1024 pixels wide, and
each row is one image of 32 x 32 pixels. The labels are lists, ``train_labels.json`` and ``test_labels.json``, in the
same folder.
:func:`invflow.datasets.sets.load_images` reads the resulting files.
"""

from __future__ import annotations

import argparse
import json
import warnings
from pathlib import Path

import torch
from torch import Tensor

from invflow.plugins import write_atomically

__all__ = ["convert", "main", "read_labels", "read_sheet"]

SIDE = 32
SHEETS = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}


def read_sheet(path: Path) -> Tensor:
    """Images of a sheet, ``(n, 3, 32, 32)`` in uint8.

    Raises:
        ValueError: If the file is not a sheet.
    """
    from PIL import Image

    width = SIDE**2
    try:
        with warnings.catch_warnings():
            # reject a small file that declares a huge image before allocating memory for it
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=("PNG",)) as sheet:
                mode, size = sheet.mode, sheet.size
                data = sheet.tobytes() if mode == "RGB" and size[0] == width else b""
    except Exception as error:  # Pillow raises many kinds of errors for damaged files
        raise ValueError(f"{path} is not a readable PNG: {error}") from error
    if not data:
        raise ValueError(f"{path} is not a sheet of CIFAR-10 (colour, {width} pixels wide, one image per row): it is "
                         f"{size[0]} x {size[1]} of mode {mode}")
    values = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return values.reshape(-1, SIDE, SIDE, 3).permute(0, 3, 1, 2).contiguous()


def read_labels(folder: Path, split: str, count: int) -> Tensor:
    """Labels of a split's images, ``(count,)`` in uint8.

    Raises:
        FileNotFoundError: If the file is missing.
        ValueError: If it does not contain such a list.
    """
    # the second spelling is that of the package that uses this layout
    places = [folder / f"{split}_{word}.json" for word in ("labels", "lables")]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        raise FileNotFoundError(f"there is no {places[0]}, the list of labels, which the binary files need")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}), expected a list of labels") from error
    known = isinstance(values, list) and all(type(v) is int and 0 <= v <= 9 for v in values)
    if not known or len(values) != count:
        what = f"{len(values)}" if known else "something else"
        raise ValueError(f"{path} must hold {count} labels from 0 to 9, one per image, not {what}")
    return torch.tensor(values, dtype=torch.uint8)


def convert(folder: Path, output: Path) -> list[Path]:
    """Write the binary files of each split whose sheets are in the folder.

    Raises:
        FileNotFoundError: If only some sheets of a split exist, or no sheets at all.
    """
    written = []
    for split, names in SHEETS.items():
        found = [name for name in names if (folder / f"{name}.png").is_file()]
        if not found:
            continue
        if len(found) < len(names):
            raise FileNotFoundError(f"{folder} has {found} but not {sorted(set(names) - set(found))}")
        images = [read_sheet(folder / f"{name}.png") for name in names]
        labels = read_labels(folder, split, sum(map(len, images))).split([len(part) for part in images])
        for name, part, own in zip(names, images, labels, strict=True):
            rows = torch.cat([own[:, None], part.flatten(1)], 1)
            written.append(output / f"{name}.bin")
            write_atomically(written[-1], lambda path, rows=rows: Path(path).write_bytes(rows.numpy().tobytes()))
    if not written:
        raise FileNotFoundError(f"no sheets in {folder}: looked for {SHEETS['train'][0]}.png and similar names")
    return written


def main() -> None:
    """Convert the sheets, and print the names of the files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("output", type=Path)
    options = parser.parse_args()
    for path in convert(options.folder, options.output):
        print(path)


if __name__ == "__main__":
    main()
