"""Non-local means, written out pixel by pixel, and their benefit for a restored picture."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import invflow
from invflow.operators import Denoising
from invflow.restore import non_local
from invflow.restore.non_local import PATCH, REACH, non_local_means
from invflow.restore.posterior import posterior_of

STRENGTH = 0.6


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def written_out(y: torch.Tensor, sigma: float) -> torch.Tensor:
    """Non-local means, written out for pixels far enough inside that no patch leaves the picture."""
    height, width = y.shape[1:]
    half, out = PATCH // 2, torch.full_like(y, math.nan)
    far = REACH + half
    for i in range(far, height - far):
        for j in range(far, width - far):
            patch, total, weights = y[:, i - half : i + half + 1, j - half : j + half + 1], 0.0, 0.0
            for k in range(i - REACH, i + REACH + 1):
                for m in range(j - REACH, j + REACH + 1):
                    other = y[:, k - half : k + half + 1, m - half : m + half + 1]
                    apart = float((patch - other).square().mean())
                    weight = math.exp(-max(apart - 2 * sigma**2, 0.0) / (STRENGTH * sigma) ** 2)
                    total, weights = total + weight * y[:, k, m], weights + weight
            out[:, i, j] = total / weights
    return out


@pytest.mark.parametrize("channels", [1, 3])
def test_every_pixel_is_the_mean_of_those_like_it(channels: int) -> None:
    waves = 0.5 + 0.3 * torch.sin(torch.arange(18) / 2 + torch.arange(17)[:, None])
    y = (waves + 0.1 * torch.randn(channels, 17, 18, generator=seeded(0))).double()
    expected = written_out(y, 0.1)
    found = non_local_means(y[None], 0.1)[0]
    inside = expected.isfinite()
    assert int(inside.sum()) == channels * (17 - 2 * (REACH + PATCH // 2)) * (18 - 2 * (REACH + PATCH // 2))
    torch.testing.assert_close(found[inside], expected[inside])


@pytest.mark.parametrize("shape", [(1, 53, 12), (3, 33, 40), (1, 16, 3), (3, 17, 7), (1, 3, 20)])
def test_strips_give_what_the_whole_picture_gives(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    y = torch.rand(1, *shape, generator=seeded(0), dtype=torch.float64) / 4
    whole = non_local_means(y, 0.1)
    monkeypatch.setattr(non_local, "STRIP", 1)  # the fewest rows, 16
    torch.testing.assert_close(non_local_means(y, 0.1), whole)


def test_a_flat_picture_comes_out_flat_and_a_tiny_one_at_all() -> None:
    y = 0.5 + 0.1 * torch.randn(1, 3, 64, 64, generator=seeded(0))
    assert float((non_local_means(y, 0.1) - 0.5).square().mean().sqrt()) < 0.1 / 5
    constant = torch.full((1, 1, 2, 3), 0.25)
    torch.testing.assert_close(non_local_means(constant, 0.1), constant)


@pytest.mark.parametrize("sigma", [0.005, 0.01, 0.02])
@pytest.mark.parametrize("name", ["motorcycle", "brick", "china"])
def test_sharp_pictures_are_not_restored_worse_than_by_scikit_image(name: str, sigma: float) -> None:
    restoration = pytest.importorskip("skimage.restoration")
    if name == "china":
        pixels = pytest.importorskip("sklearn.datasets").load_sample_image("china.jpg")[100:196, 200:296]
    else:
        data = pytest.importorskip("skimage.data")
        pixels = data.stereo_motorcycle()[0] if name == "motorcycle" else data.brick()
        pixels = pixels[100:196, 200:296]
    x = torch.from_numpy(np.atleast_3d(pixels) / 255).float().permute(2, 0, 1)
    y = x + sigma * torch.randn(x.shape, generator=seeded(0))
    means = restoration.denoise_nl_means(y.numpy(), h=0.6 * sigma, sigma=sigma, patch_size=5, patch_distance=6,
                                         channel_axis=0)
    vfm = invflow.VFM.load("photos")
    vfm.adapter.symmetries = 1
    restored, _ = posterior_of(vfm, Denoising(tuple(x.shape)), y[None], sigma, 0, seeded(1))
    assert float((restored - x).square().mean()) < 1.05 * float((torch.from_numpy(means) - x).square().mean())
