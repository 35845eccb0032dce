"""Colour with 16 bits for each channel, of which Pillow reads 8 and writes none: PNG and TIFF, in and out."""

from __future__ import annotations

import struct
import zlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Pixels = npt.NDArray[np.uint16]

__all__ = ["encode_png", "encode_tiff", "has_sixteen_bits", "read_sixteen_bits"]

_DEFLATE = (8, 32946)


def has_sixteen_bits(file: Any, data: bytes) -> bool:
    """Whether an image that Pillow opened has 16 bits for each of several channels.

    Args:
        file: Pillow's image.
        data: the file, or its first 25 bytes.
    """
    if file.format == "PNG":
        return data[24:25] == b"\x10" and file.mode in ("RGB", "RGBA", "LA")
    bits = file.tag_v2.get(258) if file.format == "TIFF" else None
    return isinstance(bits, tuple) and len(bits) > 1 and set(bits) == {16}


def read_sixteen_bits(file: Any, data: bytes) -> Pixels:
    """All 16 bits of such an image.

    Args:
        file: Pillow's image, which has checked its size.
        data: the whole file.

    Returns:
        ``(H, W, C)``, as stored, C from 2 to 4.

    Raises:
        ValueError: for a TIFF that is neither uncompressed nor deflated, or not in strips.
        RuntimeError: for a damaged PNG.
    """
    import numpy as np

    if file.format == "PNG":
        import torch
        from torchvision.io import ImageReadMode, decode_png

        pixels = decode_png(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.UNCHANGED)
        if pixels.dtype != torch.uint16:
            raise ValueError("the decoder kept 8 bits")
        return np.ascontiguousarray(pixels.permute(1, 2, 0).numpy())
    return _read_tiff(file, data)


def _read_tiff(file: Any, data: bytes) -> Pixels:
    import numpy as np

    tags, (width, height) = file.tag_v2, file.size
    channels, compression, predictor = len(tags[258]), tags.get(259, 1), tags.get(317, 1)
    starts, lengths, rows = tags.get(273), tags.get(279), int(tags.get(278, height))
    plain = tags.get(284, 1) == 1 and tags.get(262) == 2 and compression in (1, *_DEFLATE) and predictor in (1, 2)
    if not (plain and starts and lengths and rows > 0 and 3 <= channels <= 4):
        raise ValueError(f"TIFF of a kind in which 16 bits are not read here: compression {compression}, predictor "
                         f"{predictor}, {'strips' if starts else 'tiles'}")
    order = "<" if data[:2] == b"II" else ">"
    parts, line = [], width * channels * 2
    for i, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        size = min(rows, height - i * rows) * line
        part = data[start : start + length]
        if compression != 1:
            part = zlib.decompressobj().decompress(part, size)  # at most what the image holds
        if size <= 0 or len(part) < size:
            raise ValueError("the file ends too early")
        parts.append(part[:size])
    values = np.frombuffer(b"".join(parts), dtype=f"{order}u2").reshape(height, width, channels).astype(np.uint16)
    return np.cumsum(values, axis=1, dtype=np.uint16) if predictor == 2 else values


def encode_png(pixels: Pixels) -> bytes:
    """A PNG file of ``(H, W, 3)`` or ``(H, W)`` pixels with 16 bits."""
    height, width = pixels.shape[:2]
    lines = pixels.astype(">u2").reshape(height, -1).view("u1")
    # each line as the difference to the one above it, which photographs compress better in
    filtered = b"".join(b"\2" + (line - above).tobytes() for line, above in
                        zip(lines, [0 * lines[0], *lines[:-1]], strict=True))

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 16, 2 if pixels.ndim == 3 else 0, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(filtered, 6))
            + chunk(b"IEND", b""))


def encode_tiff(pixels: Pixels) -> bytes:
    """An uncompressed TIFF file of ``(H, W, 3)`` or ``(H, W)`` pixels with 16 bits."""
    height, width = pixels.shape[:2]
    channels = 1 if pixels.ndim == 2 else pixels.shape[2]
    body = pixels.astype("<u2").tobytes()
    count = 10
    after = 8 + 2 + 12 * count + 4  # header, directory; then the bits of each channel, then the pixels
    entries = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, channels, after if channels > 2 else 16),
               (259, 3, 1, 1), (262, 3, 1, 2 if channels == 3 else 1), (273, 4, 1, after + 8), (277, 3, 1, channels),
               (278, 4, 1, height), (279, 4, 1, len(body)), (284, 3, 1, 1)]
    directory = struct.pack("<H", count) + b"".join(struct.pack("<HHII", *entry) for entry in entries)
    bits = struct.pack("<4H", 16, 16, 16, 0)
    return b"II*\0" + struct.pack("<I", 8) + directory + struct.pack("<I", 0) + bits + body
