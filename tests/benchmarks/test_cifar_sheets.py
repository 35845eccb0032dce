"""Conversion of CIFAR-10 from PNG sheets to its binary files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from benchmarks.release.cifar_sheets import SHEETS, convert
from invflow.datasets.sets import load_images


def pixels(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def write(folder: Path, images: torch.Tensor, split: str = "train") -> None:
    """Each image a row of 1024 pixels, the images shared out evenly among files; their labels, 0 to 9 and on."""
    stems = SHEETS[split]
    for stem, part in zip(stems, images.chunk(len(stems)), strict=True):
        Image.fromarray(part.permute(0, 2, 3, 1).reshape(len(part), 1024, 3).numpy()).save(folder / f"{stem}.png")
    (folder / f"{split}_labels.json").write_text(json.dumps([i % 10 for i in range(len(images))]))


def test_images_and_labels_come_back(tmp_path: Path) -> None:
    images, test = pixels(10, 3, 32, 32), pixels(3, 3, 32, 32, seed=1)
    write(tmp_path, images)
    write(tmp_path, test, "test")
    assert len(convert(tmp_path, tmp_path / "bin")) == 6
    found, labels = load_images(tmp_path / "bin", labels=True, dtype=torch.uint8)
    assert torch.equal(found, images)
    assert labels.tolist() == list(range(10))
    torch.testing.assert_close(load_images(tmp_path / "bin", "test"), test.float() / 255)
    # a channel is a channel, a row a row: one green pixel in the upper right corner of the first image
    sheet = torch.zeros(1, 1024, 3, dtype=torch.uint8)
    sheet[0, 31, 1] = 255
    Image.fromarray(sheet.numpy()).save(tmp_path / "test_batch.png")
    (tmp_path / "test_labels.json").rename(tmp_path / "test_lables.json")
    (tmp_path / "test_lables.json").write_text("[3]")
    convert(tmp_path, tmp_path / "bin")
    assert load_images(tmp_path / "bin", "test")[0].nonzero().tolist() == [[1, 0, 31]]


@pytest.mark.parametrize(("text", "message"), [
    ("[1, 2]", "10 labels.*not 2$"), (json.dumps([10] * 10), "from 0 to 9.*something else"),
    (json.dumps([True] * 10), "something else"), ('{"a": 1}', "something else"), ("[1,", "not JSON"),
    ("[" * 100000, "not JSON")])
def test_labels_that_are_none(tmp_path: Path, text: str, message: str) -> None:
    write(tmp_path, pixels(10, 3, 32, 32))
    (tmp_path / "train_labels.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        convert(tmp_path, tmp_path / "bin")


def test_sheets_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no sheets"):
        convert(tmp_path, tmp_path / "bin")
    write(tmp_path, pixels(10, 3, 32, 32))
    path = tmp_path / "data_batch_3.png"
    whole = path.read_bytes()
    for data in (whole[: len(whole) // 2], b"hello"):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"data_batch_3\.png is not a readable PNG"):
            convert(tmp_path, tmp_path / "bin")
    for image in (Image.new("RGB", (1000, 2)), Image.new("L", (1024, 2)), Image.new("RGBA", (1024, 2))):
        image.save(path)
        with pytest.raises(ValueError, match=rf"1024 pixels wide.*{image.width} x 2 of mode {image.mode}"):
            convert(tmp_path, tmp_path / "bin")
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"not \['data_batch_3'\]"):
        convert(tmp_path, tmp_path / "bin")
