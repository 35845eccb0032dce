"""Masks painted by users, and measured kernels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from invflow.datasets.files import read_kernel, read_mask

SCRATCH = np.zeros((40, 60), dtype=bool)
SCRATCH[10:14, 5:50] = True


def test_white_scratches_on_black_are_asked_about(tmp_path: Path) -> None:
    Image.fromarray(SCRATCH).convert("L").save(tmp_path / "white.png")
    with pytest.raises(ValueError, match=r"would hide 92\.5%.*--mask-hides white.*--mask-hides black"):
        read_mask(tmp_path / "white.png", say=print)
    said: list[str] = []
    found = read_mask(tmp_path / "white.png", hides="white", say=said.append)
    assert torch.equal(found[0] == 0, torch.from_numpy(SCRATCH))
    assert "hides 7.50% of the picture" in said[-1]
    assert read_mask(tmp_path / "white.png", hides="black", say=print).mean() == pytest.approx(0.075)
    Image.fromarray(~SCRATCH).convert("L").save(tmp_path / "black.png")
    assert torch.equal(read_mask(tmp_path / "black.png", say=print), found)
    with pytest.raises(ValueError, match="'white' or 'black'"):
        read_mask(tmp_path / "black.png", hides="red", say=print)


@pytest.mark.parametrize("paint", [(255, 255, 255), (0, 0, 0), (200, 30, 30)])
def test_paint_on_a_transparent_layer_hides(tmp_path: Path, paint: tuple[int, int, int]) -> None:
    layer = np.zeros((40, 60, 4), dtype=np.uint8)
    layer[SCRATCH] = (*paint, 255)
    Image.fromarray(layer).save(tmp_path / "layer.png")
    found = read_mask(tmp_path / "layer.png", (3, 40, 60), say=print)
    assert torch.equal(found[0] == 0, torch.from_numpy(SCRATCH))


def test_every_pixel_that_a_soft_brush_touched_is_hidden(tmp_path: Path) -> None:
    distance = np.abs(np.arange(60) - 30)[None].repeat(40, 0)
    paint = np.clip(1 - distance / 8, 0, 1)  # 1 in the middle of the stroke, a tenth seven pixels away
    Image.fromarray((255 * (1 - paint)).astype(np.uint8)).save(tmp_path / "soft.png")
    hidden = read_mask(tmp_path / "soft.png", say=print)[0] == 0
    assert torch.equal(hidden, torch.from_numpy(distance <= 7))
    Image.fromarray((255 * paint).astype(np.uint8)).save(tmp_path / "light.png")
    assert torch.equal(read_mask(tmp_path / "light.png", hides="white", say=print)[0] == 0, hidden)


def test_a_photograph_is_no_mask_and_no_kernel(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    photo = np.clip(128 + 50 * np.sin(np.arange(80)[:, None] / 9) + 20 * rng.standard_normal((80, 90)), 0, 255)
    Image.fromarray(photo.astype(np.uint8)).save(tmp_path / "photo.png")
    with pytest.raises(ValueError, match="looks like a photograph"):
        read_mask(tmp_path / "photo.png", say=print)
    with pytest.raises(ValueError, match="looks like a photograph"):
        read_kernel(tmp_path / "photo.png", say=print)


def gaussian(height: int, width: int, row: float, column: float, std: float = 1.5) -> np.ndarray:
    rows, columns = np.arange(height)[:, None] - row, np.arange(width) - column
    return np.exp(-(rows**2 + columns**2) / (2 * std**2))


def centre_of(kernel: torch.Tensor) -> tuple[float, float]:
    """Where it moves a picture to, in pixels down and to the right."""
    rows, columns = (torch.arange(n) - n // 2 for n in kernel.shape)
    return float((kernel.sum(1) * rows).sum()), float((kernel.sum(0) * columns).sum())


@pytest.mark.parametrize(("height", "width", "row", "column"), [
    (21, 21, 10, 10), (21, 21, 14, 10), (31, 25, 9, 16.4), (16, 16, 7.5, 7.5), (15, 16, 7, 7.5),
])
def test_kernels_are_centred(tmp_path: Path, height: int, width: int, row: float, column: float) -> None:
    kernel = gaussian(height, width, row, column)
    np.save(tmp_path / "kernel.npy", kernel / kernel.sum())
    said: list[str] = []
    found = read_kernel(tmp_path / "kernel.npy", say=said.append)
    assert np.abs(centre_of(found)).max() <= 0.51
    off = max(abs(row - height // 2), abs(column - width // 2))
    assert [s.rsplit(": ")[-1] for s in said] == (
        ["centred to the nearest pixel"] if off > 0.5 else ["left unchanged"] if off > 0.25 else [])
    assert not any("e-" in sentence for sentence in said)
    rows = torch.arange(found.shape[0]) - found.shape[0] // 2 - centre_of(found)[0]
    assert float((found.sum(1) * rows.square()).sum()) == pytest.approx(1.5**2, rel=0.01)  # moved, not changed
    as_it_is = read_kernel(tmp_path / "kernel.npy", centre=False, say=print)
    assert torch.allclose(as_it_is, torch.from_numpy(kernel / kernel.sum()).float())


@pytest.mark.parametrize("level", [0.01, 0.05, 0.2])
def test_a_pedestal_is_taken_off(tmp_path: Path, level: float) -> None:
    clean = gaussian(31, 31, 15, 15)
    dirty = np.clip(clean + level, 0, 1 + level) / (1 + level)
    Image.fromarray((255 * dirty).round().astype(np.uint8)).save(tmp_path / "psf.png")
    said: list[str] = []
    found = read_kernel(tmp_path / "psf.png", say=said.append)
    assert "constant offset" in said[0]
    assert torch.allclose(found, torch.from_numpy(clean / clean.sum()).float(), atol=0.0015)


@pytest.mark.parametrize("kernel", [np.full((9, 9), 1 / 81), gaussian(5, 5, 2, 2), np.eye(21) / 21,
                                    gaussian(25, 25, 12, 12, std=3)], ids=["box", "small", "line", "wide"])
def test_kernels_without_a_pedestal_stay(tmp_path: Path, kernel: np.ndarray) -> None:
    np.save(tmp_path / "kernel.npy", kernel / kernel.sum())
    said: list[str] = []
    found = read_kernel(tmp_path / "kernel.npy", say=said.append)
    assert torch.allclose(found, torch.from_numpy(kernel / kernel.sum()).float(), atol=1e-6)
    assert not said
