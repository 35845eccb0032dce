"""Image data sets as tensors: IDX files (MNIST, Fashion-MNIST), CIFAR-10's binary files, image folders."""

from __future__ import annotations

import gzip
import math
import os
import shutil
import struct
import tarfile
import zlib
from io import BufferedReader
from pathlib import Path
from typing import IO, Literal, overload

import torch
from torch import Tensor

from invflow._core.records import write_atomically
from invflow.datasets.files import fit_to, read_image

__all__ = ["DOWNLOADS", "IMAGE_SUFFIXES", "cache_folder", "image_files", "load_images", "packed", "read_idx"]

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff")

#: data sets that can be downloaded by name, with the folder of their files. Except for CIFAR-10, the folder is named
#: after the torchvision class that knows their addresses and checksums
DOWNLOADS = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "kmnist": "KMNIST",
             "cifar10": "cifar-10-batches-bin"}
#: the author's own archive of the binary version, with the checksum from his page. torchvision's class cannot be used:
#: it downloads pickles, which can run code when they are read
_CIFAR_ARCHIVE = ("https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530")

_MOST_PACKED = 1100  # bytes that one byte of a gzip file can encode, slightly above the limit of deflate

_SPLITS = {"train": "train", "test": "t10k"}
_CIFAR_FILES = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}
_CIFAR_SIDE = 32


@overload
def load_images(path: str | os.PathLike[str], split: str = ..., labels: Literal[False] = ..., *,
                dtype: torch.dtype = ..., size: int | None = ..., channels: int | None = ...) -> Tensor: ...
@overload
def load_images(path: str | os.PathLike[str], split: str = ..., *, labels: Literal[True],
                dtype: torch.dtype = ..., size: int | None = ...,
                channels: int | None = ...) -> tuple[Tensor, Tensor]: ...


def load_images(path: str | os.PathLike[str], split: str = "train", labels: bool = False, *,
                dtype: torch.dtype = torch.float32, size: int | None = None,
                channels: int | None = None) -> Tensor | tuple[Tensor, Tensor]:
    """Load all images of a data set's split.

    The contents of the folder determine how it is read: IDX files (``train-images-idx3-ubyte``,
    ``t10k-images-idx3-ubyte`` and their labels, uncompressed or ending in ``.gz``, in the folder or in its
    ``raw`` folder); CIFAR-10's binary files (``data_batch_1.bin``, ...); otherwise image files, in ``<folder>/<split>``
    or, for the split ``train``, in the folder itself. If the image files lie in one folder per class, these folders
    give the labels, in alphabetical order.

    Args:
        path: A folder, or one of the names in :data:`DOWNLOADS`, whose official files are then downloaded
            once (checksums verified) into :func:`cache_folder`. For CIFAR-10 this is the binary version: pickles are
            never read.
        split: ``"train"`` or ``"test"``.
        labels: Whether to return the labels too.
        dtype: A floating-point type for values in [0, 1], or ``torch.uint8`` for the raw values in [0, 255].
        size: For image files, the side to which the centre square is scaled; required if the sizes of the files
            differ.
        channels: For image files: 1 for grey, 3 for colour; None keeps the channels of the first file.

    Returns:
        Images ``(n, C, H, W)``, and with ``labels`` also ``(n,)`` in int64.

    Raises:
        FileNotFoundError: If the folder or its files are missing; the message lists the expected files.
        ValueError: If the split is unknown, a file is truncated or of another kind, sizes differ, or labels are
            missing.

    Example:
        >>> from invflow.datasets.sets import load_images
        >>> images = load_images("data/mnist")  # doctest: +SKIP
        >>> images.shape  # doctest: +SKIP
        torch.Size([60000, 1, 28, 28])
    """
    if split not in _SPLITS:
        raise ValueError(f"unknown split {split!r}: pass split='train' or split='test'")
    if dtype != torch.uint8 and not dtype.is_floating_point:
        raise ValueError(f"dtype={dtype}: pass torch.float32 for values in [0, 1] or torch.uint8 for bytes")
    folder = Path(path)
    if not folder.exists() and str(path) in DOWNLOADS:
        folder = _download(str(path))
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{str(path)!r} is not a folder: pass a folder with IDX files, CIFAR-10's binary files or "
            f"image files, or a name to download, one of {', '.join(sorted(DOWNLOADS))}"
        )
    images, targets = _load_folder(folder, split, size, channels)
    result = images if dtype == torch.uint8 else _to_unit_range(images, dtype)
    if not labels:
        return result
    if targets is None:
        raise ValueError(f"{folder} has no labels: pass labels=False, or sort its files into class folders")
    return result, targets


def _to_unit_range(images: Tensor, dtype: torch.dtype) -> Tensor:
    return images.to(dtype).div_(255)


def cache_folder() -> Path:
    """Folder of the downloads: ``$INVFLOW_DATA``, or by default ``~/.cache/invflow/datasets``."""
    return Path(os.environ.get("INVFLOW_DATA", Path.home() / ".cache" / "invflow" / "datasets"))


def _download(name: str) -> Path:
    root = cache_folder() / name
    try:
        if name == "cifar10":
            _download_cifar(root)
        else:
            import torchvision.datasets

            dataset = getattr(torchvision.datasets, DOWNLOADS[name])
            for train in (True, False):
                dataset(root=str(root), train=train, download=True)
    except (ImportError, OSError, RuntimeError, tarfile.TarError, KeyError) as error:
        known = f"unpacked from {_CIFAR_ARCHIVE[0]}" if name == "cifar10" else "such as train-images-idx3-ubyte.gz"
        raise FileNotFoundError(
            f"{name!r} is not a local folder and could not be downloaded ({error}): pass the folder with "
            f"the official files, {known}"
        ) from error
    return root / DOWNLOADS[name]


def _download_cifar(root: Path) -> None:
    """Download the archive, and extract only its six files of images."""
    from torchvision.datasets.utils import download_url

    folder = root / DOWNLOADS["cifar10"]
    names = [f"{stem}.bin" for stems in _CIFAR_FILES.values() for stem in stems]
    if all((folder / name).is_file() for name in names):
        return
    address, checksum = _CIFAR_ARCHIVE
    download_url(address, str(root), md5=checksum)
    with tarfile.open(root / Path(address).name) as archive:
        for name in names:
            member = archive.extractfile(f"{folder.name}/{name}")
            if member is None:
                raise OSError(f"{name} in the archive is not a file")
            with member:
                write_atomically(folder / name, lambda path: _copy(member, path))  # noqa: B023


def _copy(source: IO[bytes], path: str) -> None:
    with open(path, "wb") as file:
        shutil.copyfileobj(source, file)


def _load_folder(folder: Path, split: str, size: int | None,
                 channels: int | None) -> tuple[Tensor, Tensor | None]:
    """Raw images ``(n, C, H, W)`` in uint8 and their labels, read from the first layout that is found in the folder."""
    idx_names = _idx_names(split)
    cifar_names = _CIFAR_FILES[split]
    for place in (folder, folder / "raw"):
        for name in idx_names:
            if (place / name).is_file():
                return _load_idx_pair(place / name)
    for place in (folder, folder / "cifar-10-batches-bin"):
        files = [place / f"{name}.bin" for name in cifar_names]
        found = [file.name for file in files if file.is_file()]
        if found and len(found) < len(files):
            raise FileNotFoundError(f"{place} has {found} but not {[f.name for f in files if f.name not in found]}")
        if found:
            return _load_cifar(files)
    place, files = _files_of(folder, split)
    if {file.stem for file in files} & {*cifar_names}:
        raise ValueError(f"{files[0]} is a sheet of CIFAR-10, with many images in one file: convert it to binary files "
                         "with python -m benchmarks.release.cifar_sheets FOLDER OUTPUT in a clone of invflow, or "
                         "download them")
    if not files:
        raise FileNotFoundError(
            f"no images of the split {split!r} in {folder}. Looked for the IDX files {', '.join(idx_names)} "
            f"(also in raw/), CIFAR-10's {', '.join(name + '.bin' for name in cifar_names)} (also in "
            f"cifar-10-batches-bin/), and image files ({', '.join(IMAGE_SUFFIXES)}) in {place}"
        )
    return _load_files(files, place, size, channels)


def image_files(folder: str | os.PathLike[str], split: str = "train") -> list[Path]:
    """The image files of a folder's split, by their suffixes, in order."""
    return _files_of(Path(folder), split)[1]


def packed(folder: Path, split: str = "train") -> bool:
    """Whether a folder contains IDX files or CIFAR-10's binary files rather than image files."""
    idx = [place / name for place in (folder, folder / "raw") for name in _idx_names(split)]
    cifar = [place / f"{name}.bin" for name in _CIFAR_FILES[split]
             for place in (folder, folder / "cifar-10-batches-bin")]
    return any(path.is_file() for path in (*idx, *cifar))


def _idx_names(split: str) -> list[str]:
    return [f"{_SPLITS[split]}-images{dash}idx3-ubyte{end}" for dash in "-." for end in ("", ".gz")]


def _files_of(folder: Path, split: str) -> tuple[Path, list[Path]]:
    """Folder of a split's image files, and these files."""
    # a flat folder is training data only: using it as the test split as well would go unnoticed
    place = folder if split == "train" and not (folder / split).is_dir() else folder / split
    files = sorted(f for f in place.rglob("*") if f.suffix.lower() in IMAGE_SUFFIXES and f.is_file())
    if place == folder:
        files = [f for f in files if f.relative_to(folder).parts[0] != "test"]
    return place, files


# -- IDX -----------------------------------------------------------------------------------------------------


def read_idx(path: str | os.PathLike[str]) -> Tensor:
    """Read one IDX file of bytes (LeCun, Cortes), uncompressed or compressed by gzip (name ending in ``.gz``).

    Args:
        path: Path of the file.

    Returns:
        uint8, in the shape given in the header: ``(n, H, W)`` for images, ``(n,)`` for labels.

    Raises:
        ValueError: If the file is not an IDX file of bytes, or is shorter or longer than its header says.
    """
    path = Path(path)
    packed = path.suffix == ".gz"
    try:
        with gzip.open(path) if packed else path.open("rb") as file:
            return _read_idx(path, file, path.stat().st_size * (_MOST_PACKED if packed else 1))
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is not a complete gzip file ({error}): download it again") from error


def _read_idx(path: Path, file: gzip.GzipFile | BufferedReader, largest: int) -> Tensor:
    """Read the array of an open file of at most ``largest`` bytes, and unpack no more than its header declares."""
    data = file.read(4)
    if len(data) < 4 or data[:3] != b"\x00\x00\x08" or not 1 <= data[3] <= 4:
        raise ValueError(
            f"{path} is not an IDX file of bytes: it begins with {data.hex(' ')}, not 00 00 08 and a rank"
        )
    rank = data[3]
    data = file.read(4 * rank)
    if len(data) < 4 * rank:
        raise ValueError(f"{path} is truncated: {4 + len(data)} bytes, less than its header of {4 + 4 * rank}")
    shape = struct.unpack(f">{rank}I", data)
    expected = math.prod(shape)
    if not 0 < expected <= largest:
        raise ValueError(f"{path} is truncated or damaged: its header says shape {shape}, {expected} bytes, and it "
                         f"cannot hold more than {largest}")
    data = file.read(expected + 1)  # one byte more, so that gzip reads to its checksum at the end
    if len(data) != expected:
        problem = "truncated" if len(data) < expected else "too long"
        raise ValueError(f"{path} is {problem}: its header says shape {shape}, {expected} bytes, but it has "
                         f"{len(data) if len(data) < expected else 'more'}")
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).reshape(shape)


def _load_idx_pair(path: Path) -> tuple[Tensor, Tensor | None]:
    images = read_idx(path)
    if images.ndim != 3:
        raise ValueError(f"{path} holds an array of shape {tuple(images.shape)}, not images (n, H, W)")
    stem = path.name.replace("images", "labels").replace("idx3", "idx1").removesuffix(".gz")
    for label_path in (path.with_name(stem), path.with_name(stem + ".gz")):
        if label_path.is_file():
            targets = read_idx(label_path)
            if targets.shape != images.shape[:1]:
                raise ValueError(f"{label_path} holds {tuple(targets.shape)} for {images.shape[0]} images")
            return images[:, None], targets.long()
    return images[:, None], None


# -- CIFAR-10 and image files --------------------------------------------------------------------------------


def _load_cifar(paths: list[Path]) -> tuple[Tensor, Tensor]:
    row = 1 + 3 * _CIFAR_SIDE**2
    rows = []
    for path in paths:
        data = path.read_bytes()
        if not data or len(data) % row:
            raise ValueError(f"{path} is truncated: its {len(data)} bytes are not a multiple of {row}")
        rows.append(torch.frombuffer(bytearray(data), dtype=torch.uint8).reshape(-1, row))
    table = torch.cat(rows)
    greatest = int(table[:, 0].max())
    if greatest > 9:
        raise ValueError(f"{paths[0].parent} holds labels up to {greatest}, but CIFAR-10 has ten classes: the files "
                         "are damaged or of another data set")
    return table[:, 1:].reshape(-1, 3, _CIFAR_SIDE, _CIFAR_SIDE).clone(), table[:, 0].long()


def _load_files(files: list[Path], root: Path, size: int | None,
                channels: int | None) -> tuple[Tensor, Tensor | None]:
    images: list[Tensor] = []
    for file in files:
        image = read_image(file, channels=channels, say=_silent)
        if size is not None:
            image = fit_to(image, (size, size), say=_silent)
        image = image.mul(255).round().to(torch.uint8)
        channels = image.shape[0]
        if images and image.shape != images[0].shape:
            raise ValueError(
                f"{file} has shape {tuple(image.shape)}, but {files[0]} has {tuple(images[0].shape)}: pass "
                "size= to crop and scale all images to one square"
            )
        images.append(image)
    parents = [file.relative_to(root).parts[0] if file.parent != root else None for file in files]
    if None in parents:
        return torch.stack(images), None
    classes = sorted({str(p) for p in parents})
    return torch.stack(images), torch.tensor([classes.index(str(p)) for p in parents])


def _silent(message: str) -> None:
    """Drop a message: thousands of files would give the same one."""
