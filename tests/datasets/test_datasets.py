"""Data sets: each layout against files written here byte by byte, and the errors for damaged ones."""

from __future__ import annotations

import gzip
import hashlib
import io
import math
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from invflow.datasets import sets as datasets
from invflow.datasets.sets import load_images, read_idx


def pixels(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, shape, generator=generator, dtype=torch.uint8)


def idx(values: torch.Tensor) -> bytes:
    return b"\x00\x00\x08" + bytes([values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape) + bytes(
        values.flatten().tolist())


def write_idx(folder: Path, split: str, images: torch.Tensor, labels: torch.Tensor | None, *,
              end: str = "", dash: str = "-") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    pack = gzip.compress if end == ".gz" else bytes
    (folder / f"{split}-images{dash}idx3-ubyte{end}").write_bytes(pack(idx(images)))
    if labels is not None:
        (folder / f"{split}-labels{dash}idx1-ubyte{end}").write_bytes(pack(idx(labels)))


def write_image(path: Path, image: torch.Tensor) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(image.squeeze() if len(image) == 1 else image.permute(1, 2, 0))).save(path)


@pytest.mark.parametrize("end", ["", ".gz"])
@pytest.mark.parametrize("dash", ["-", "."])
@pytest.mark.parametrize("place", [".", "raw"])
def test_idx_files(tmp_path, end, dash, place):
    train, test, labels = pixels(7, 5, 6), pixels(3, 5, 6, seed=1), pixels(7, seed=2)
    write_idx(tmp_path / place, "train", train, labels, end=end, dash=dash)
    write_idx(tmp_path / place, "t10k", test, labels[:3], end=end, dash=dash)
    images, found = load_images(tmp_path, "train", labels=True)
    assert images.shape == (7, 1, 5, 6)
    assert images.dtype == torch.float32
    torch.testing.assert_close(images, train[:, None].float() / 255)
    assert torch.equal(found, labels.long())
    raw = load_images(str(tmp_path), split="test", dtype=torch.uint8)
    assert torch.equal(raw, test[:, None])
    assert load_images(tmp_path, dtype=torch.float64).dtype == torch.float64


def test_cifar_binary_files(tmp_path):
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    images, labels = pixels(10, 3, 32, 32), pixels(10, seed=1) % 10
    rows = torch.cat([labels[:, None], images.flatten(1)], 1)
    for i in range(5):
        (folder / f"data_batch_{i + 1}.bin").write_bytes(bytes(rows[2 * i : 2 * i + 2].flatten().tolist()))
    found, targets = load_images(tmp_path, labels=True, dtype=torch.uint8)
    assert torch.equal(found, images)
    assert torch.equal(targets, labels.long())
    with pytest.raises(FileNotFoundError, match=r"test_batch\.bin"):
        load_images(tmp_path, "test")
    (folder / "data_batch_5.bin").write_bytes(b"\x01" * 100)
    with pytest.raises(ValueError, match="truncated"):
        load_images(tmp_path)
    (folder / "data_batch_5.bin").unlink()
    with pytest.raises(FileNotFoundError, match="data_batch_5"):
        load_images(tmp_path)


TRAIN_SHEETS = [f"data_batch_{i}" for i in range(1, 6)]


def test_a_sheet_of_images_is_not_taken_for_one(tmp_path):
    Image.new("RGB", (1024, 2)).save(tmp_path / "data_batch_1.png")
    with pytest.raises(ValueError, match=r"cifar_sheets FOLDER OUTPUT"):
        load_images(tmp_path)


def test_cifar_is_downloaded_as_bytes_and_never_as_pickles(tmp_path, monkeypatch):
    utils = pytest.importorskip("torchvision.datasets.utils")
    rows = torch.cat([pixels(6, seed=1)[:, None] % 10, pixels(6, 3072)], 1)
    calls = []

    def download(url, root, md5):
        calls.append((url, md5))
        members = [f"cifar-10-batches-bin/{stem}.bin" for stem in [*TRAIN_SHEETS, "test_batch"]]
        Path(root).mkdir(parents=True, exist_ok=True)
        with tarfile.open(Path(root) / Path(url).name, "w:gz") as archive:
            for name, row in zip([*members, "../escaped.bin"], [*rows, rows[0]], strict=True):
                data, member = bytes(row.tolist()), tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))

    monkeypatch.setattr(utils, "download_url", download)
    monkeypatch.setenv("INVFLOW_DATA", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    images, labels = load_images("cifar10", labels=True, dtype=torch.uint8)
    assert torch.equal(images, rows[:5, 1:].reshape(-1, 3, 32, 32))
    assert torch.equal(labels, rows[:5, 0].long())
    assert torch.equal(load_images("cifar10", "test", dtype=torch.uint8), rows[5:, 1:].reshape(-1, 3, 32, 32))
    assert len(calls) == 1
    assert "binary" in calls[0][0]
    assert len(calls[0][1]) == len(hashlib.md5(b"").hexdigest())
    assert not list(tmp_path.rglob("escaped.bin"))
    for file in (tmp_path / "cache").rglob("*.bin"):
        file.unlink()

    def broken(url, root, md5):
        (Path(root) / Path(url).name).write_bytes(b"no archive")

    monkeypatch.setattr(utils, "download_url", broken)
    with pytest.raises(FileNotFoundError, match=r"(?s)could not be downloaded.*unpacked from .*cifar-10-binary"):
        load_images("cifar10")


def test_a_flat_folder_of_images(tmp_path):
    images = pixels(3, 1, 9, 8)
    for i, image in enumerate(images):
        write_image(tmp_path / f"{i}.png", image)
    (tmp_path / "notes.txt").write_text("not an image")
    assert torch.equal(load_images(tmp_path, dtype=torch.uint8), images)
    assert load_images(tmp_path, channels=3).shape == (3, 3, 9, 8)
    with pytest.raises(ValueError, match="no labels"):
        load_images(tmp_path, labels=True)
    # the same images must not pass for a test set
    with pytest.raises(FileNotFoundError, match="test"):
        load_images(tmp_path, "test")
    write_image(tmp_path / "test" / "a.png", pixels(1, 9, 8, seed=1))
    assert len(load_images(tmp_path)) == 3
    assert len(load_images(tmp_path, "test")) == 1


def test_a_folder_for_each_class(tmp_path):
    colours = pixels(4, 3, 10, 10)
    for i, (kind, image) in enumerate(zip(["dog", "cat", "dog", "ant"], colours, strict=True)):
        write_image(tmp_path / "train" / kind / f"{i}.png", image)
    images, labels = load_images(tmp_path, labels=True, dtype=torch.uint8)
    assert labels.tolist() == [0, 1, 2, 2]
    assert torch.equal(images, colours[[3, 1, 0, 2]])


def test_images_of_different_sizes_need_a_size(tmp_path):
    write_image(tmp_path / "a.png", pixels(1, 20, 30))
    write_image(tmp_path / "b.png", pixels(1, 25, 16))
    with pytest.raises(ValueError, match=r"\(1, 25, 16\).*\(1, 20, 30\).*size="):
        load_images(tmp_path)
    assert load_images(tmp_path, size=12).shape == (2, 1, 12, 12)


def test_missing_files_are_listed(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"train-images-idx3-ubyte\.gz.*data_batch_1\.bin.*\.png"):
        load_images(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"is not a folder.*fashion-mnist"):
        load_images(tmp_path / "nowhere")


@pytest.mark.parametrize(("damage", "message"), [
    (lambda data: data[:-1], "truncated.*5, 6"), (lambda data: data + b"\x00", "too long"),
    (lambda data: data[:9], "truncated.*header"), (lambda data: b"\x89PNG" + data, "not an IDX file.*89 50 4e"),
    (lambda data: b"", "not an IDX file"), (lambda data: idx(pixels(7)), "not images"),
])
def test_damaged_idx_files(tmp_path, damage, message):
    (tmp_path / "train-images-idx3-ubyte").write_bytes(damage(idx(pixels(7, 5, 6))))
    with pytest.raises(ValueError, match=message):
        load_images(tmp_path)


def test_damaged_gzip(tmp_path):
    packed = gzip.compress(idx(pixels(7, 5, 6)))
    path = tmp_path / "train-images-idx3-ubyte.gz"
    for data in (packed[:-12], b"nothing", packed[:20] + b"\xff\xff\xff\xff" + packed[24:]):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"gzip|IDX|truncated"):
            read_idx(path)


def test_labels_that_do_not_fit(tmp_path):
    write_idx(tmp_path, "train", pixels(7, 5, 6), pixels(6))
    with pytest.raises(ValueError, match="7 images"):
        load_images(tmp_path)
    write_idx(tmp_path, "t10k", pixels(7, 5, 6), None)
    with pytest.raises(ValueError, match="no labels"):
        load_images(tmp_path, "test", labels=True)


def test_a_file_that_is_no_image(tmp_path):
    (tmp_path / "a.png").write_bytes(b"hello")
    with pytest.raises(ValueError, match=r"a\.png"):
        load_images(tmp_path)


def test_settings_that_make_no_sense(tmp_path):
    with pytest.raises(ValueError, match="unknown split 'valid'"):
        load_images(tmp_path, "valid")
    with pytest.raises(ValueError, match=r"torch\.int32"):
        load_images(tmp_path, dtype=torch.int32)


def test_a_name_is_downloaded_once_by_torchvision(tmp_path, monkeypatch):
    torchvision = pytest.importorskip("torchvision.datasets")
    calls = []

    def download(root, train, download):
        calls.append((train, download))
        write_idx(Path(root) / "MNIST" / "raw", "train" if train else "t10k", pixels(7, 5, 6), pixels(7))

    monkeypatch.setattr(torchvision, "MNIST", download)
    monkeypatch.setenv("INVFLOW_DATA", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert load_images("mnist").shape == (7, 1, 5, 6)
    assert calls == [(True, True), (False, True)]
    assert datasets.cache_folder() == tmp_path

    def offline(root, train, download):
        raise RuntimeError("Error downloading")

    monkeypatch.setattr(torchvision, "FashionMNIST", offline)
    with pytest.raises(FileNotFoundError, match=r"could not be downloaded.*Error downloading"):
        load_images("fashion-mnist")


def test_values_span_the_unit_range(tmp_path):
    values = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16)
    write_idx(tmp_path, "train", values, None)
    images = load_images(tmp_path)
    assert images.min() == 0
    assert images.max() == 1
    assert math.isclose(images[0, 0, 8, 0].item(), 128 / 255, rel_tol=1e-6)
