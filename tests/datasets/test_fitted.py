"""Folders of arbitrary pictures: sizes, colours, bit depths, transparency, and files that are not pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from invflow.datasets.fitted import load_fitted


def load(folder: Path, *arguments: object, **settings: object) -> tuple[Tensor, list[str]]:
    said: list[str] = []
    return load_fitted(folder, *arguments, say=said.append, **settings), said  # type: ignore[arg-type]


def colours(height: int, width: int) -> np.ndarray:
    """Red grows to the right, green downwards, blue is the half."""
    red, green = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return np.stack([red, green, np.full_like(red, 128)], axis=-1).round().astype(np.uint8)


def test_images_of_one_small_size_stay_as_they_are(tmp_path: Path) -> None:
    pixels = colours(20, 30)
    for name in ("a", "b"):
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    images, said = load(tmp_path)
    assert said == []
    assert torch.equal(images[1], torch.from_numpy(pixels).permute(2, 0, 1))


def test_a_mixed_folder(tmp_path: Path) -> None:
    pixels, grey = colours(40, 64), colours(40, 40)[..., 0]
    (tmp_path / "deep").mkdir()
    (tmp_path / "test").mkdir()
    Image.fromarray(pixels).save(tmp_path / "0.png")
    Image.fromarray(grey).save(tmp_path / "1-grey.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "2-deep-grey.png")
    Image.fromarray(np.dstack([pixels, np.zeros((40, 64), np.uint8)]), "RGBA").save(tmp_path / "3-clear.png")
    Image.fromarray(pixels).quantize(64).save(tmp_path / "4-palette.png")
    Image.fromarray(colours(16, 16)).save(tmp_path / "deep" / "5-small.png")
    Image.fromarray(pixels).save(tmp_path / "test" / "6-held-out.png")
    (tmp_path / "7-none.png").write_bytes(b"no picture")
    images, said = load(tmp_path, size=40)
    assert images.shape == (6, 3, 40, 40)
    # the centre, at its own scale: column 12 of the file is column 0 here
    assert torch.equal(images[0], torch.from_numpy(pixels[:, 12:52].copy()).permute(2, 0, 1))
    for row in (1, 2):  # eight bits and sixteen are the same grey, in each channel
        assert torch.equal(images[row], torch.from_numpy(grey).expand(3, 40, 40))
    assert bool((images[3] == 255).all())  # nothing on white
    assert float((images[4].float() - images[0].float()).abs().mean()) < 12  # 64 colours
    # scaled up, what grows to the right still does, by the same amount
    columns = images[5, 0].float().mean(0)
    assert bool((columns.diff() >= 0).all())
    assert float(columns[-1] - columns[0]) == pytest.approx(255, abs=8)
    assert len(said) == 1
    for words in ("6 images of 3 sizes", "scaled to 40 x 40", "1 was smaller, and enlarged", "2 are grey among colour",
                  "3-clear.png is transparent", "1 could not be read", "7-none.png"):
        assert words in said[0]


def test_the_default_side_and_a_priors_shape(tmp_path: Path) -> None:
    for i in range(3):
        Image.fromarray(colours(60, 50)).save(tmp_path / f"{i}.png")
    assert load(tmp_path)[0].shape == (3, 3, 32, 32)
    images, said = load(tmp_path, (1, 20, 40))
    assert images.shape == (3, 1, 20, 40)
    assert "3 images of 60 x 50 pixels: cropped to their centres and scaled to 20 x 40; 3 in colour became grey" in said
    grey = 0.299 * 127.5 + 0.587 * 127.5 + 0.114 * 128
    assert float(images.float().mean()) == pytest.approx(grey, abs=1.5)


def test_a_data_set_by_its_files(tmp_path: Path) -> None:
    values = torch.arange(2 * 28 * 28).remainder(256).to(torch.uint8)
    header = bytes([0, 0, 8, 3]) + b"".join(n.to_bytes(4, "big") for n in (2, 28, 28))
    (tmp_path / "train-images-idx3-ubyte").write_bytes(header + bytes(values.tolist()))
    images, said = load(tmp_path)
    assert said == []
    assert torch.equal(images.flatten(), values)
    images, said = load(tmp_path, (3, 14, 14))
    assert images.shape == (2, 3, 14, 14)
    assert "2 images of 28 x 28 pixels" in said[0]


def test_nothing_to_train_on(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no image in"):
        load(tmp_path)
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        load(tmp_path / "missing")
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="none of 1 files can be read"):
        load(tmp_path)
    with pytest.raises(ValueError, match="at least 8"):
        load(tmp_path, size=2)
