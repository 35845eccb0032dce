"""Damaged files: a small share of what ``tests/fuzz.py`` tries, and the worst ones by name."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import fuzz
import numpy as np
import pytest
import torch
from fuzz_damage import _pickled, _postscript
from fuzz_targets import TARGETS
from safetensors.torch import load_file, save_file

import invflow
from invflow.datasets.files import read_image, read_mask
from invflow.datasets.sets import read_idx

TARGET = {target.name: target for target in TARGETS}


def test_damaged_files_are_refused_or_read() -> None:
    summary = fuzz.run(8 * len(TARGETS), seed=2026)
    assert not summary.failures, str(summary)
    assert sum(summary.refused.values()) > 100, str(summary)


def test_the_driver_sees_what_it_looks_for(tmp_path: Path) -> None:
    """A reader that hangs, one that fails in other words, and one that takes anything."""
    def hang(place: Path) -> None:
        while True:
            pass

    def wrong(place: Path) -> None:
        raise KeyError("header")

    good = TARGET["posterior"]
    cases: dict[str, Callable[[Path], object]] = {"s of work": hang, "KeyError: 'header'": wrong}
    fuzz.SECONDS = 1
    for said, load in cases.items():
        assert said in fuzz.examine(fuzz.Target("x", good.make, load, str, []), tmp_path, "")
    lax = fuzz.Target("x", good.make, lambda place: 1, str, [], lambda place: True)
    assert "another object" in fuzz.examine(lax, tmp_path, "2")
    fuzz.SECONDS = 10


def edited(place: Path, **changes: object) -> None:
    config = json.loads((place / "config.json").read_text())
    for key, value in changes.items():
        (config["options"] if key in config.get("options", {}) else config)[key] = value
    config.pop("digest")  # as if it had been made so
    (place / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(("changes", "said"), [
    ({"blocks": 10**9}, "more than 200"), ({"channels": [4] * 10**5}, "more than 200"),
    ({"channels": [10**7, 10**7]}, "does not fit"), ({"embedding": 10**12}, "can be built|does not fit"),
    ({"mean_shape": [10**6, 10**6, 10**6]}, "can be built"), ({"state_shape": [2, 8, 8]}, "does not fit"),
    ({"decode_affine": [float("nan"), 0.5]}, "decode_affine"), ({"decode_affine": [0, 0.5]}, "decode_affine"),
    ({"independent_noise": "false"}, "expected true or false"),
])
def test_a_configuration_of_a_monster_is_refused_before_it_is_built(changes: dict[str, object], said: str,
                                                                    tmp_path: Path) -> None:
    target = TARGET["prior"]
    target.make(tmp_path)
    edited(tmp_path, **changes)
    before = fuzz.megabytes()
    with fuzz.time_limit(30), pytest.raises(ValueError, match=said):
        target.load(tmp_path)
    assert fuzz.megabytes() - before < 500


@pytest.mark.parametrize("name", ["prior", "adapter", "classifier", "lmmse", "posterior", "record", "checkpoint",
                                  "part"])
def test_a_single_bit_of_the_numbers_is_missed(name: str, tmp_path: Path) -> None:
    """No file format knows, and no network would say: a digest does."""
    target = TARGET[name]
    place = tmp_path / "good"
    target.make(place)
    path, = place.glob("*.safetensors")
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"as it was saved|damaged"):
        target.load(place)


def test_files_without_a_digest_are_read_as_before(tmp_path: Path) -> None:
    target = TARGET["prior"]
    target.make(tmp_path)
    known = target.describe(target.load(tmp_path))
    edited(tmp_path)
    assert target.describe(target.load(tmp_path)) == known


def test_nan_and_another_kind_of_numbers_among_the_weights(tmp_path: Path) -> None:
    target = TARGET["prior-mlp"]
    target.make(tmp_path)
    edited(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "network.last.weight"
    for value, said in ((torch.full_like(tensors[name], torch.nan), "not finite"),
                        (tensors[name].int(), "a different kind"), (tensors[name][:1], "does not fit")):
        save_file({**tensors, name: value.contiguous()}, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match=said):
            target.load(tmp_path)


@pytest.mark.parametrize("name", ["prior", "posterior", "png", "mask-npy", "idx", "checkpoint"])
def test_pickles_are_never_run(name: str, tmp_path: Path) -> None:
    import random

    target, ran = TARGET[name], tmp_path / "ran"
    target.make(tmp_path / "good")
    for i in range(12):
        (tmp_path / "good" / target.files[-1]).write_bytes(_pickled(random.Random(i), ran))
        with pytest.raises(ValueError, match=r"\w"):
            target.load(tmp_path / "good")
    assert not ran.exists()


def test_postscript_under_a_pictures_name_is_not_handed_to_ghostscript(tmp_path: Path) -> None:
    (tmp_path / "i.png").write_bytes(_postscript(tmp_path / "ran"))
    with pytest.raises(ValueError, match="is not an image"):
        read_image(tmp_path / "i.png")
    assert not (tmp_path / "ran").exists()


def test_a_small_file_that_declares_a_huge_thing_takes_no_memory(tmp_path: Path) -> None:
    before = fuzz.megabytes()
    png = tmp_path / "i.png"
    good = TARGET["png"]
    good.make(tmp_path / "p")
    data = bytearray((tmp_path / "p" / "i.png").read_bytes())
    import zlib

    data[16:24] = struct.pack(">II", 12_000, 12_000)
    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    png.write_bytes(data)
    with pytest.raises(ValueError, match="cannot be read"):
        read_image(png)
    header = b"{'descr': '<f8', 'fortran_order': False, 'shape': (1000000, 1000000), }"
    (tmp_path / "m.npy").write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header)
    with pytest.raises(ValueError, match="no array"):
        read_mask(tmp_path / "m.npy")
    np.save(tmp_path / "c.npy", np.ones((3, 3), dtype=complex))
    with pytest.raises(ValueError, match="complex128"):
        read_mask(tmp_path / "c.npy")
    (tmp_path / "a-idx3-ubyte").write_bytes(bytes([0, 0, 8, 3]) + struct.pack(">III", 2**31, 2**31, 4))
    with pytest.raises(ValueError, match="cannot hold more"):
        read_idx(tmp_path / "a-idx3-ubyte")
    import gzip

    bomb = bytes([0, 0, 8, 1]) + struct.pack(">I", 10) + bytes(60_000_000)
    (tmp_path / "b.gz").write_bytes(gzip.compress(bomb, 1))
    del bomb
    before = max(before, fuzz.megabytes())
    with pytest.raises(ValueError, match="too long"):
        read_idx(tmp_path / "b.gz")
    assert fuzz.megabytes() - before < 40


def test_json_that_nests_a_hundred_thousandfold(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"kind": ' + "[" * 200_000 + "]" * 200_000 + "}")
    with pytest.raises(ValueError, match="JSON"):
        invflow.load_prior(tmp_path)
