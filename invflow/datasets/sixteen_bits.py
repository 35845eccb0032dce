"""Reads and writes colour PNG and TIFF with 16 bits per channel; Pillow reads only 8 of them and writes no such file.

It also handles kinds of TIFF that Pillow does not know or reads wrongly.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Pixels = npt.NDArray[np.uint16]

__all__ = ["check_tiff", "encode_png", "encode_tiff", "has_sixteen_bits", "misread_in_planes", "read_sixteen_bits",
           "read_unknown_tiff"]

_DEFLATE = (8, 32946)


def has_sixteen_bits(file: Any, data: bytes) -> bool:
    """Whether an image that Pillow opened has 16 bits for each of several channels.

    Args:
        file: Pillow's image.
        data: Content of the file, or its first 25 bytes.
    """
    if file.format == "PNG":
        return data[24:25] == b"\x10" and file.mode in ("RGB", "RGBA", "LA")
    return file.format == "TIFF" and file.tag_v2.get(277, 1) > 1 and _layout(file.tag_v2)[1:] == ({16}, {1})


def read_sixteen_bits(file: Any, data: bytes) -> Pixels:
    """Read all 16 bits of such an image.

    Args:
        file: Pillow's image, whose size Pillow has checked.
        data: Content of the whole file.

    Returns:
        Pixels ``(H, W, C)`` as stored, with C from 2 to 4.

    Raises:
        ValueError: If a TIFF is neither uncompressed nor deflated, is not in strips, or is premultiplied by its alpha.
        RuntimeError: If a PNG is damaged.
    """
    import numpy as np

    if file.format == "PNG":
        import torch
        from torchvision.io import ImageReadMode, decode_png

        pixels = decode_png(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.UNCHANGED)
        if pixels.dtype != torch.uint16:
            raise ValueError("the decoder kept 8 bits")
        return np.ascontiguousarray(pixels.permute(1, 2, 0).numpy())
    return _read_tiff(file.tag_v2, data)


def _layout(tags: Mapping[int, Any]) -> tuple[int, set[Any], set[Any]]:
    """Number of channels of a TIFF, their bits, and their kinds of numbers: 1 unsigned, 2 signed, 3 floating-point."""
    return tags.get(277, 1), set(tags.get(258, (1,))), set(tags.get(339, (1,)))


def _kind(tags: Mapping[int, Any]) -> str:
    channels, bits, numbers = _layout(tags)
    names = {1: "unsigned", 2: "signed", 3: "floating-point"}
    return (f"TIFF with {channels} channel{'s' if channels != 1 else ''} of {', '.join(map(str, sorted(bits)))} bits, "
            f"{', '.join(names.get(n, 'unknown') for n in sorted(numbers))} numbers, photometric interpretation "
            f"{tags.get(262)}, compression {tags.get(259, 1)}, predictor {tags.get(317, 1)}, "
            f"{'planes' if tags.get(284, 1) == 2 else 'one plane'} in {'tiles' if 324 in tags else 'strips'}")


def _refusal(tags: Mapping[int, Any]) -> str:
    return (f"{_kind(tags)}, which is not read here: save it as PNG, or as TIFF of 8 or 16 bits, unsigned, in one "
            "plane, with 0 for black")


def check_tiff(tags: Mapping[int, Any]) -> None:
    """Reject files that Pillow opens without an error but reads wrongly.

    Raises:
        ValueError: For signed numbers of 8 or 16 bits, unsigned numbers of 32 bits, floating-point numbers whose lowest
            value is white, uncompressed luminance and chroma, and files that do not state whether 0 is black.
    """
    _, bits, numbers = _layout(tags)
    compression, photometric = tags.get(259, 1), tags.get(262)
    wrong = (numbers == {2} and bits <= {8, 16}, numbers == {1} and bits == {32}, numbers == {3} and photometric == 0,
             photometric is None and compression not in (6, 7), photometric == 6 and compression == 1)
    if any(wrong):
        raise ValueError(_refusal(tags))


def misread_in_planes(tags: Mapping[int, Any]) -> bool:
    """Whether Pillow would read separate planes of 16 bits as 8 bits."""
    result: bool = tags.get(284, 1) == 2 and tags.get(259, 1) == 1
    return result


def read_unknown_tiff(path: Path) -> tuple[Pixels, int, bool] | None:
    """Read a TIFF that Pillow does not know: grey of 16 bits, big-endian, whose lowest value is white.

    Returns:
        Pixels ``(H, W, 1)`` from dark to light, the orientation by its EXIF number, and whether other images follow;
        None if the file is not a TIFF.

    Raises:
        ValueError: For any other TIFF.
    """
    from PIL import Image, TiffImagePlugin

    with path.open("rb") as stream:
        header = stream.read(8)
        if header[:4] not in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
            return None
        header += stream.read(8) if b"+" in header[:4] else b""
        tags = TiffImagePlugin.ImageFileDirectory_v2(header)
        stream.seek(tags.next)
        tags.load(stream)
    if _layout(tags) != (1, {16}, {1}) or tags.get(262) != 0:
        raise ValueError(_refusal(tags))
    if tags[256] * tags[257] > (Image.MAX_IMAGE_PIXELS or 0):
        raise ValueError(f"it declares {tags[257]} x {tags[256]} pixels")
    return 65535 - _read_tiff(tags, path.read_bytes()), tags.get(274, 1), tags.next != 0


def _read_tiff(tags: Mapping[int, Any], data: bytes) -> Pixels:
    import numpy as np

    width, height = tags[256], tags[257]  # as stored; Pillow gives the size of the upright picture
    channels, compression, predictor = tags.get(277, 1), tags.get(259, 1), tags.get(317, 1)
    starts, lengths, rows = tags.get(273), tags.get(279), int(tags.get(278, height))
    planes, extra = channels if tags.get(284, 1) == 2 else 1, tuple(tags.get(338, ()))
    plain = compression in (1, *_DEFLATE) and predictor in (1, 2) and tags.get(266, 1) == 1
    kinds = {(0, 1, ()), (2, 3, ()), (2, 4, ()), (2, 4, (0,)), (2, 4, (2,))}
    if not (plain and (tags.get(262), channels, extra) in kinds and starts and lengths and rows > 0):
        lost = tags.get(262) == 0 or misread_in_planes(tags)  # otherwise Pillow reads 8 bits
        raise ValueError(_refusal(tags) if lost else _kind(tags))
    order = "<" if data[:2] == b"II" else ">"
    parts, line = [], width * channels // planes * 2
    each = -(-height // rows)  # strips of a plane
    if len(starts) != planes * each:
        raise ValueError(f"it has {len(starts)} strips instead of {planes * each}")
    for i, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        size = min(rows, height - i % each * rows) * line
        part = data[start : start + length]
        if compression != 1:
            part = zlib.decompressobj().decompress(part, size)  # at most the size of the image
        if size <= 0 or len(part) < size:
            raise ValueError("the file ends too early")
        parts.append(part[:size])
    values = np.frombuffer(b"".join(parts), dtype=f"{order}u2").reshape(planes, height, width, -1).astype(np.uint16)
    values = np.cumsum(values, axis=2, dtype=np.uint16) if predictor == 2 else values
    values = np.concatenate(list(values), axis=-1)
    return values[..., :3] if extra == (0,) else values  # an unnamed fourth channel is not transparency


def encode_png(pixels: Pixels, profile: bytes | None = None, exif: bytes | None = None) -> bytes:
    """Encode pixels of 16 bits as a PNG file.

    Args:
        pixels: Pixels ``(H, W)`` or ``(H, W, C)``, with C from 2 to 4: grey or colour, with or without transparency.
        profile: ICC profile to store in the file.
        exif: EXIF tags to store in the file, as Pillow writes them.
    """
    height, width = pixels.shape[:2]
    lines = pixels.astype(">u2").reshape(height, -1).view("u1")
    # each line as its difference from the line above: photographs then compress better
    filtered = b"".join(b"\2" + (line - above).tobytes() for line, above in
                        zip(lines, [0 * lines[0], *lines[:-1]], strict=True))

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    kind = {1: 0, 2: 4, 3: 2, 4: 6}[1 if pixels.ndim == 2 else pixels.shape[2]]
    header = struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)
    beside = chunk(b"iCCP", b"ICC\0\0" + zlib.compress(profile)) if profile else b""
    beside += chunk(b"eXIf", exif.removeprefix(b"Exif\0\0")) if exif else b""
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + beside + chunk(b"IDAT", zlib.compress(filtered, 6))
            + chunk(b"IEND", b""))


def encode_tiff(pixels: Pixels, profile: bytes | None = None) -> bytes:
    """Encode pixels of 16 bits as an uncompressed TIFF file.

    Args:
        pixels: Pixels ``(H, W, 3)`` or ``(H, W)``.
        profile: ICC profile to store in the file.
    """
    height, width = pixels.shape[:2]
    channels = 1 if pixels.ndim == 2 else pixels.shape[2]
    body = pixels.astype("<u2").tobytes()
    count = 10 + bool(profile)
    after = 8 + 2 + 12 * count + 4  # header, directory; then the bits of each channel, the pixels, the profile
    entries = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, channels, after if channels > 2 else 16),
               (259, 3, 1, 1), (262, 3, 1, 2 if channels == 3 else 1), (273, 4, 1, after + 8), (277, 3, 1, channels),
               (278, 4, 1, height), (279, 4, 1, len(body)), (284, 3, 1, 1)]
    if profile:
        entries.append((34675, 7, len(profile), after + 8 + len(body)))
    directory = struct.pack("<H", count) + b"".join(struct.pack("<HHII", *entry) for entry in entries)
    bits = struct.pack("<4H", 16, 16, 16, 0)
    return b"II*\0" + struct.pack("<I", 8) + directory + struct.pack("<I", 0) + bits + body + (profile or b"")
