"""Reads and writes pictures with their format, bit depth, colour profile, EXIF data and transparency."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from invflow._core.records import write_atomically
from invflow.datasets.files import read_alpha, read_image
from invflow.datasets.sixteen_bits import check_tiff, encode_png, encode_tiff, has_sixteen_bits

__all__ = ["NUMBERS", "Picture", "read_picture", "write_picture"]

Say = Callable[[str], None]

#: suffixes of files of numbers, whose range of values is not stored
NUMBERS = (".npy", ".fits", ".fit", ".fts")
#: Pillow formats that are written in the format in which they were read
_KEPT = ("PNG", "JPEG", "TIFF", "WEBP", "BMP", "PPM", "JPEG2000", "TGA", "AVIF")
#: EXIF tags that are not kept: the orientation, since pictures are turned upright, and the structure of a TIFF
_NOT_KEPT = (0x0112, 254, 255, 256, 257, 258, 259, 262, 266, 273, 277, 278, 279, 284, 292, 293, 317, 320, 322, 323,
             324, 325, 330, 338, 339, 347, 530, 531, 532, 34675)


@dataclass(frozen=True)
class Picture:
    """A picture and the properties of its file.

    Attributes:
        values: Values ``(C, H, W)`` with one or three channels, upright; [0, 1] is the range of the file.
        known: Mask ``(1, H, W)`` bool, False where the file has NaN; None if all values are known.
        kind: Pillow's name of the format, ``"npy"``, ``"fits"`` or ``"float TIFF"``.
        bits: Bits per value, 8, 16 or 32.
        alpha: Opacity ``(1, H, W)``, or None.
        profile: ICC profile, or None.
        exif: EXIF data without the orientation, or None.
        low, high: Values in the file that correspond to 0 and 1.
        header: Header of a FITS file.
        channels_last: Order of an array's axes.
    """

    values: Tensor
    known: Tensor | None = None
    kind: str = "PNG"
    bits: int = 8
    alpha: Tensor | None = None
    profile: bytes | None = None
    exif: bytes | None = None
    low: float = 0.0
    high: float = 1.0
    header: Any = None
    channels_last: bool = False

    @property
    def suffix(self) -> str | None:
        """The suffix to write instead of the file's own; None to keep it."""
        return ".png" if self.bits < 32 and self.kind not in _KEPT else None


def read_picture(path: str | os.PathLike[str], *, value_range: tuple[float, float] | None = None,
                 say: Say = print) -> Picture:
    """Read a picture with all the properties of its file that are kept.

    In addition to the formats of :func:`~invflow.datasets.files.read_image`, this reads ``.npy``, FITS (with astropy)
    and floating-point TIFF of one channel. NaN in these means that nothing was observed.

    Args:
        path: Path of the file.
        value_range: Values of black and white, for files of numbers; by default the range of 8-bit or 16-bit integers,
            or 0 and 1 if all numbers lie between them.
        say: Called with a sentence for each change.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file cannot be read, or if the range of its numbers is unknown.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {str(path)!r}")
    suffix = path.suffix.lower()
    if suffix == ".npy":
        import numpy as np

        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except Exception as error:  # numpy's header is a Python expression: errors of any kind
            raise ValueError(f"{str(path)!r} holds no array of numbers: {error}") from error
        return _numbers(np.array(array), "npy", path.name, value_range)
    if suffix in NUMBERS:
        return _read_fits(path, value_range)
    return _read_file(path, value_range, say)


def _read_file(path: Path, value_range: tuple[float, float] | None, say: Say) -> Picture:
    import numpy as np
    from PIL import Image, UnidentifiedImageError

    kind, bits, profile, exif = "PNG", 8, None, None
    try:
        with Image.open(path) as file, path.open("rb") as stream:
            kind = {"MPO": "JPEG"}.get(str(file.format), str(file.format))
            if kind == "TIFF" and file.mode == "F":
                check_tiff(getattr(file, "tag_v2", {}))
                return _numbers(np.array(file), "float TIFF", path.name, value_range)
            bits = 16 if file.mode.startswith("I") or has_sixteen_bits(file, stream.read(25)) else 8
            profile, tags = file.info.get("icc_profile"), file.getexif()
            if len(tags):
                exif = _kept_tags(tags)
    except UnidentifiedImageError:  # read_image reads it anyway, or raises an error that explains the problem
        if path.suffix.lower() in (".tif", ".tiff"):  # with 16 bits, whose lowest value is white
            kind, bits = "TIFF", 16
        else:
            kind = "HEIC"
    values, alpha = read_image(path, say=_without("transparent", say)), read_alpha(path)
    if value_range is not None:  # after reading, which refuses a TIFF that holds other numbers by what they are
        raise ValueError(f"--range belongs to files of numbers (.npy, FITS, floating-point TIFF), not to {path.name}")
    if alpha is not None:  # it was blended with white: undo that
        values = torch.where(alpha > 0, (values - (1 - alpha)) / alpha.clamp(min=1 / 255), 1.0).clamp(0, 1)
    if profile is not None and profile[16:20] != (b"GRAY" if len(values) == 1 else b"RGB "):
        say(f"the colour profile of {path.name} is for a colour space other than the written one: left out")
        profile = None
    return Picture(values, None, kind, bits, alpha, profile, exif)


def _kept_tags(tags: Any) -> bytes | None:
    """The part of a file's EXIF that is kept, encoded by Pillow."""
    from PIL import Image

    kept = Image.Exif()  # a new object, since that of a BigTIFF would be written in BigTIFF form
    for tag, value in tags.items():
        if tag not in _NOT_KEPT:
            # the tables of the camera and of the place are stored by their offsets
            kept[tag] = tags.get_ifd(tag) if tag in (0x8769, 0x8825) else value
    return kept.tobytes() if len(kept) else None


def _without(word: str, say: Say) -> Say:
    return lambda sentence: None if word in sentence else say(sentence)


def _read_fits(path: Path, value_range: tuple[float, float] | None) -> Picture:
    try:
        from astropy.io import fits
    except ImportError as error:
        raise ValueError(f"{path.name} is a FITS file, which astropy reads: pip install astropy") from error
    with fits.open(path, memmap=False) as file:
        found = next((part for part in file if part.data is not None and part.data.ndim in (2, 3)), None)
        if found is None:
            raise ValueError(f"{path.name} holds no image with two or three axes")
        return replace(_numbers(found.data, "fits", path.name, value_range), header=found.header.copy())


def _numbers(array: Any, kind: str, name: str, value_range: tuple[float, float] | None) -> Picture:
    import numpy as np

    last = array.ndim == 3 and array.shape[-1] in (1, 3) and array.shape[0] not in (1, 3)
    first = array.ndim == 3 and array.shape[0] in (1, 3)
    if array.dtype.kind not in "biuf" or not (array.ndim == 2 or last or first):
        raise ValueError(f"{name} holds {array.dtype} of shape {array.shape}, but a picture has numbers (H, W), "
                         "(H, W, 3) or (3, H, W)")
    values = torch.from_numpy(np.ascontiguousarray(array, dtype=np.float64))
    values = values[None] if values.ndim == 2 else values.permute(2, 0, 1) if last else values
    known = values.isfinite().all(0, keepdim=True)
    if not bool(known.any()):
        raise ValueError(f"{name} holds no finite number")
    low, high = value_range or (0.0, 1.0)
    if value_range is None and array.dtype.kind == "u":
        high = float(np.iinfo(array.dtype).max)
    least, most = float(values[known.expand_as(values)].min()), float(values[known.expand_as(values)].max())
    if value_range is None and not (low <= least and most <= high):
        raise ValueError(f"{name} holds numbers from {least:.6g} to {most:.6g}, and it is unknown which are black and "
                         f"white: pass --range {least:.4g} {most:.4g}, or the range of its sensor")
    if not low < high:
        raise ValueError(f"--range {low:g} {high:g}: pass black first, then white")
    scaled = ((values - low) / (high - low)).float()
    return Picture(torch.where(known, scaled, 0.0), None if bool(known.all()) else known, kind, 32, low=low, high=high,
                   channels_last=last)


def write_picture(picture: Picture, path: str | os.PathLike[str], *, say: Say = print) -> None:
    """Write a picture with the properties of its original file, and report what is lost.

    Args:
        picture: The picture. If ``values`` and ``alpha`` differ in size, ``alpha`` is scaled.
        path: Path with the suffix of the format.
        say: Called with a sentence for each property that cannot be kept.
    """
    import numpy as np

    path = Path(path)
    if picture.bits == 32:
        _write_numbers(picture, path)
        return
    values, channels = picture.values.detach().cpu(), len(picture.values)
    if picture.alpha is not None:
        values, alpha = values.double().clamp(0, 1), picture.alpha.double().cpu()
        if alpha.shape[1:] != values.shape[1:]:
            alpha = torch.nn.functional.interpolate(alpha[None], size=values.shape[1:], mode="bilinear")[0]
        if picture.kind in ("PNG", "WEBP", "TGA", "AVIF", "JPEG2000") or (picture.kind == "TIFF" and picture.bits == 8):
            values = torch.cat([values, alpha])
        else:
            say(f"{path.name} cannot hold transparency here: blended with white")
            values = values * alpha + 1 - alpha
    kind = picture.kind if picture.kind in _KEPT else "PNG"
    bits = picture.bits if kind in ("PNG", "TIFF") else 8
    if bits < picture.bits:
        say(f"{path.name} is written with 8 of its 16 bits: writing {kind} with 16 is not supported")
    pixels = np.empty((*values.shape[1:], len(values)), dtype=f"u{bits // 8}")
    for i, channel in enumerate(values):  # one by one, since a large picture in double precision takes gigabytes
        pixels[..., i] = channel.double().clamp(0, 1).mul_(2**bits - 1).round_().numpy()
    pixels = pixels[..., 0] if len(values) == 1 else pixels
    if bits == 16:
        if kind == "TIFF" and picture.exif:
            say(f"{path.name} is written without its EXIF: it cannot be stored in a TIFF with 16 bits here")
        data = (encode_tiff(pixels, picture.profile) if kind == "TIFF"
                else encode_png(pixels, picture.profile, picture.exif))
    else:
        data = _encode(pixels, kind, picture, channels)
    write_atomically(path, lambda name: Path(name).write_bytes(data))


def _encode(pixels: Any, kind: str, picture: Picture, channels: int) -> bytes:
    from PIL import Image

    by_format: dict[str, dict[str, Any]] = {
        "JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"quality": 95}, "AVIF": {"quality": 95},
        "TIFF": {"compression": "tiff_adobe_deflate"},
    }
    options = dict(by_format.get(kind, {}))
    if picture.profile is not None:
        options["icc_profile"] = picture.profile
    if picture.exif is not None and kind in ("PNG", "JPEG", "TIFF", "WEBP", "AVIF"):
        options["exif"] = picture.exif
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format=kind, **options)
    return stream.getvalue()


def _write_numbers(picture: Picture, path: Path) -> None:
    import numpy as np

    numbers = (picture.values.double() * (picture.high - picture.low) + picture.low).float().cpu()
    array = numbers[0] if len(numbers) == 1 else numbers.permute(1, 2, 0) if picture.channels_last else numbers
    stream = io.BytesIO()
    if picture.kind == "npy":
        np.save(stream, array.numpy())
    elif picture.kind == "fits":
        from astropy.io import fits

        header = picture.header
        for key in ("BSCALE", "BZERO", "BLANK"):  # these apply to integers only
            header.remove(key, ignore_missing=True)
        fits.PrimaryHDU(array.numpy(), header=header).writeto(stream)
    else:
        from PIL import Image

        Image.fromarray(array.numpy()).save(stream, format="TIFF")
    write_atomically(path, lambda name: Path(name).write_bytes(stream.getvalue()))
