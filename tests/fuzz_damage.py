"""Ways to damage a file, each a function of a seed word."""

from __future__ import annotations

import json
import pickle
import random
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["damage", "sentinel_of"]

#: values that a configuration never holds on purpose
HOSTILE: list[Any] = [None, True, "", "x", "\u0000", -1, 0, 1, 2.5, 1e308, 10**6, 10**9, 2**31, 2**63, 10**30, -(10**9),
                      float("nan"), float("inf"), [], {}, [0], [-1], [10**9] * 3, [[1]], {"a": 1}, "../../etc/passwd",
                      [10**5] * 200, "unet", "mlp", [None], list(range(100))]


def sentinel_of(place: Path) -> Path:
    """The file that exists once a pickle has been run."""
    return place.with_name("ran")


class _Runs:
    """Unpickled, it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self.path, "w")


def damage(place: Path, names: list[str], foreign: list[Path], word: str, target: str) -> str:
    """Damage one of the files of a folder, at times in two ways; says which and how."""
    chance = random.Random(f"{target}-{word}")
    path = place / chance.choice(names)
    ways: list[Callable[[random.Random, bytes], bytes]] = [
        _flip, _flip, _flip, _cut, _stretch, _zero, _repeat, _overwrite, _number]
    if path.suffix == ".safetensors":
        ways += [_length, _header, _header, _header, _nan, _nan]
    if path.suffix == ".json":
        ways += [_values] * 8 + [_nest]
    special: dict[str, Callable[[random.Random, bytes], bytes]] = {
        "pickle": lambda c, b: _pickled(c, sentinel_of(place)), "swap": lambda c, b: c.choice(foreign).read_bytes(),
        "empty": lambda c, b: b"", "postscript": lambda c, b: _postscript(sentinel_of(place)),
    }
    said = []
    for _ in range(1 if chance.random() < 0.8 else 2):
        data = path.read_bytes()
        if chance.random() < 0.12:
            name = chance.choice(sorted(special))
            changed = special[name](chance, data)
        else:
            way = chance.choice(ways)
            name, changed = way.__name__.strip("_"), way(chance, data)
        path.write_bytes(changed)
        said.append(name)
    if chance.random() < 0.02:
        path.unlink()
        said.append("gone")
    return f"{'+'.join(said)} in {path.relative_to(place)}"


# -- bytes -------------------------------------------------------------------------------------------------------------


def _place(chance: random.Random, data: bytes) -> int:
    """A place in a file, often near its beginning, where headers are."""
    limit = len(data) if chance.random() < 0.5 else min(len(data), 200)
    return chance.randrange(max(1, limit))


def _flip(chance: random.Random, data: bytes) -> bytes:
    out = bytearray(data)
    for _ in range(chance.choice([1, 1, 1, 2, 8]) if out else 0):
        out[_place(chance, data)] ^= 1 << chance.randrange(8)
    return bytes(out)


def _cut(chance: random.Random, data: bytes) -> bytes:
    return data[: _place(chance, data)]


def _stretch(chance: random.Random, data: bytes) -> bytes:
    return data + chance.randbytes(chance.choice([1, 8, 1000]))


def _zero(chance: random.Random, data: bytes) -> bytes:
    start, length = _place(chance, data), chance.choice([1, 4, 64])
    return data[:start] + bytes(len(data[start : start + length])) + data[start + length :]


def _repeat(chance: random.Random, data: bytes) -> bytes:
    start, length = _place(chance, data), chance.choice([1, 4, 64])
    return data[: start + length] + data[start:]


def _overwrite(chance: random.Random, data: bytes) -> bytes:
    start, length = _place(chance, data), chance.choice([1, 4, 16])
    return data[:start] + chance.randbytes(len(data[start : start + length])) + data[start + length :]


def _number(chance: random.Random, data: bytes) -> bytes:
    """A number of four bytes in place of others: lengths and shapes are such numbers."""
    start = _place(chance, data)
    value = chance.choice([0, 1, 0x7FFFFFFF, 0xFFFFFFFF, 0x80000000, 65536])
    return data[:start] + struct.pack(chance.choice(["<I", ">I"]), value) + data[start + 4 :]


def _pickled(chance: random.Random, path: Path) -> bytes:
    plain = pickle.dumps(_Runs(path), protocol=chance.choice([0, 2, 4]))
    kind = chance.randrange(3)
    if kind == 0:
        return plain
    if kind == 1:  # as torch.save writes it
        import io

        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as file:
            file.writestr("archive/data.pkl", plain)
        return buffer.getvalue()
    header = b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }"  # as numpy writes arrays of objects
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + plain


def _postscript(path: Path) -> bytes:
    return (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n"
            b"(" + str(path).encode() + b") (w) file closefile\nshowpage\n%%EOF\n")


# -- safetensors and JSON ----------------------------------------------------------------------------------------------


def _length(chance: random.Random, data: bytes) -> bytes:
    """Another length of the header."""
    value = chance.choice([0, 1, 8, 10**8, 2**40, 2**63, 2**64 - 1, len(data), max(0, len(data) - 8)])
    return struct.pack("<Q", value) + data[8:]


def _header(chance: random.Random, data: bytes) -> bytes:
    """Another shape, type, place or name of a tensor, or another text beside them; the length of the header fits."""
    try:
        size = struct.unpack("<Q", data[:8])[0]
        header = json.loads(data[8 : 8 + size])
        entry = header[chance.choice(sorted(header))]
        key = chance.choice(sorted(entry))
        if key == "shape" and entry["shape"]:
            entry["shape"][chance.randrange(len(entry["shape"]))] = chance.choice([0, 1, 2, 10**6, 10**12, -1])
        elif key == "dtype":
            entry["dtype"] = chance.choice(["F64", "F32", "F16", "BF16", "I32", "U8", "BOOL", "F8_E4M3", "C64", "X"])
        elif key == "data_offsets":
            entry["data_offsets"][chance.randrange(2)] += chance.choice([-4, -1, 1, 4, 10**9])
        elif isinstance(entry[key], str):
            entry[key] = _values(chance, entry[key].encode()).decode()
        text = json.dumps(header).encode()
    except (ValueError, KeyError, TypeError, struct.error, IndexError, RecursionError):
        return _flip(chance, data)
    return struct.pack("<Q", len(text)) + text + data[8 + size :]


def _nan(chance: random.Random, data: bytes) -> bytes:
    """NaN or infinity among the numbers."""
    if len(data) < 16:
        return data
    start = 8 + struct.unpack("<Q", data[:8])[0]
    count = (len(data) - start) // 4
    if count < 1:
        return data
    at = start + 4 * chance.randrange(count)
    return data[:at] + struct.pack("<f", chance.choice([float("nan"), float("inf"), -float("inf")])) + data[at + 4 :]


def _values(chance: random.Random, data: bytes) -> bytes:
    """Another value, key, or order somewhere in JSON."""
    try:
        whole = json.loads(data)
    except (ValueError, RecursionError):
        return _flip(chance, data)
    holder: Any = [whole]
    key: Any = 0
    while isinstance(holder[key], dict | list) and holder[key] and chance.random() < 0.85:
        holder = holder[key]
        key = chance.choice(sorted(holder)) if isinstance(holder, dict) else chance.randrange(len(holder))
    if isinstance(holder, dict) and chance.random() < 0.2:
        value = holder.pop(key)
        if chance.random() < 0.5:
            holder[str(key) + "x"] = value
    else:
        holder[key] = chance.choice(HOSTILE)
    return json.dumps(whole if holder is not whole or not isinstance(holder, list) else holder).encode()


def _nest(chance: random.Random, data: bytes) -> bytes:
    depth = chance.choice([100, 5000, 200_000])
    return b"[" * depth + b"]" * depth if chance.random() < 0.5 else b'{"kind": ' + b"[" * depth + b"]" * depth + b"}"
