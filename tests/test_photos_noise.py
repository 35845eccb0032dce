"""The noise level of photographs, estimated from a single one."""

from __future__ import annotations

import io
import warnings

import numpy as np
import pytest
import torch
from torch.nn.functional import avg_pool2d, conv2d, pad

from invflow.likelihood import GaussianLikelihood, estimate_sigma, noise_levels
from invflow.operators import Denoising

LEVELS = (0.01, 0.025, 0.05, 0.1)


def clean(name: str) -> torch.Tensor:
    data = pytest.importorskip("skimage.data")
    return torch.from_numpy(np.atleast_3d(getattr(data, name)()) / 255).permute(2, 0, 1)[None, :, :400, :400]


def with_noise(x: torch.Tensor, sigma: float) -> torch.Tensor:
    return x + sigma * torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype)


def noisy(name: str, sigma: float) -> torch.Tensor:
    return with_noise(clean(name), sigma)


def as_jpeg(x: torch.Tensor, quality: int, subsampling: int) -> torch.Tensor:
    """Saved with 8 bits and read again; subsampling 2 is 4:2:0."""
    image = pytest.importorskip("PIL.Image")
    pixels, file = (x[0].permute(1, 2, 0).clamp(0, 1).numpy() * 255).round().astype(np.uint8), io.BytesIO()
    image.fromarray(pixels).save(file, "JPEG", quality=quality, subsampling=subsampling)
    return torch.from_numpy(np.asarray(image.open(file)) / 255).permute(2, 0, 1)[None]


def demosaiced(x: torch.Tensor) -> torch.Tensor:
    """One colour kept of each pixel, as Bayer has it, and the others interpolated."""
    kept = torch.zeros_like(x)
    kept[:, 0, ::2, ::2] = kept[:, 1, ::2, 1::2] = kept[:, 1, 1::2, ::2] = kept[:, 2, 1::2, 1::2] = 1
    kernel = x.new_tensor([[1.0, 2.0, 1.0], [2.0, 4.0, 2.0], [1.0, 2.0, 1.0]]).expand(3, 1, 3, 3)

    def spread(y: torch.Tensor) -> torch.Tensor:
        return conv2d(pad(y, (1, 1, 1, 1), mode="reflect"), kernel, groups=3)

    return spread(x * kept) / spread(kept)


@pytest.mark.parametrize("name", ["astronaut", "chelsea", "coffee", "rocket", "camera", "brick", "page", "coins",
                                  "moon"])
@pytest.mark.parametrize("sigma", LEVELS)
def test_the_level_of_a_photograph(name: str, sigma: float) -> None:
    """Little noise is topped up by the photographs' own: that of the astronaut is half of 0.01."""
    rel = 0.15 if sigma < 0.02 else 0.04
    level = noise_levels(noisy(name, sigma))[0]
    assert level.sigma == pytest.approx(sigma, rel=rel)
    assert level.low / 1.15 < sigma < level.high


@pytest.mark.parametrize(("name", "sigma", "rel"), [
    ("grass", 0.025, 0.3), ("grass", 0.05, 0.1), ("grass", 0.1, 0.08),
    ("gravel", 0.025, 0.12), ("gravel", 0.05, 0.06), ("gravel", 0.1, 0.04),
])
def test_texture_is_not_taken_for_noise(name: str, sigma: float, rel: float) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert float(estimate_sigma(noisy(name, sigma))) == pytest.approx(sigma, rel=rel)


@pytest.mark.parametrize("factor", [2, 4])
@pytest.mark.parametrize("name", ["astronaut", "chelsea", "coffee", "rocket", "camera", "moon"])
def test_the_level_of_a_measurement_under_super_resolution(name: str, factor: int) -> None:
    for sigma in (0.01, 0.05):
        y = with_noise(avg_pool2d(clean(name), factor), sigma)
        assert float(estimate_sigma(y)) == pytest.approx(sigma, rel=0.15)


def test_what_cannot_be_told_is_refused() -> None:
    """Texture in all of a small picture; a picture of 7 x 7; a ground without noise; noise that black has cut off."""
    texture = with_noise(avg_pool2d(clean("gravel"), 4), 0.01)
    level = noise_levels(texture)[0]
    assert not level.known
    with pytest.raises(ValueError, match=r"between 0\.0\d+ and 0\.\d+: texture.*pass sigma="):
        estimate_sigma(texture)
    g = torch.Generator().manual_seed(0)
    small = avg_pool2d(torch.rand(1, 1, 28, 28, generator=g), 4)
    with pytest.raises(ValueError, match=r"\(1, 1, 7, 7\).*pass sigma"):
        estimate_sigma(small)
    with pytest.raises(ValueError, match="pass sigma"):
        estimate_sigma((0.1 * torch.randn(1, 1, 90, 90, generator=g)).clamp(min=0))


def test_a_dark_ground_that_is_cut_off_does_not_count() -> None:
    x = clean("camera").clone()
    x[..., :200, :] = 0
    y = with_noise(x, 0.05).clamp(0, 1)
    assert float(estimate_sigma(y)) == pytest.approx(0.05, rel=0.06)


def test_white_noise_in_colour_and_grey() -> None:
    y = 0.2 * torch.randn(4, 3, 160, 170, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(estimate_sigma(y), torch.full((4,), 0.2), rtol=0.03)
    assert torch.allclose(estimate_sigma(y[:, :1]), torch.full((4,), 0.2), rtol=0.05)


def test_only_what_was_observed_counts() -> None:
    g = torch.Generator().manual_seed(0)
    y = 0.1 * torch.randn(2, 1, 200, 200, generator=g)
    observed = torch.ones(1, 1, 200, 200, dtype=torch.bool)
    observed[:, :, 50:120, 30:170] = False
    y = torch.where(observed, y, 0.0)
    assert torch.allclose(estimate_sigma(y, observed), torch.full((2,), 0.1), rtol=0.05)
    scattered = torch.rand(1, 1, 200, 200, generator=g) < 0.7  # no block is whole: differences alone
    assert torch.allclose(estimate_sigma(torch.where(scattered, y, 0.0), scattered & observed),
                          torch.full((2,), 0.1), rtol=0.05)


@pytest.mark.parametrize("sigma", LEVELS)
@pytest.mark.parametrize("name", ["astronaut", "chelsea", "coffee", "camera", "page", "grass", "gravel"])
def test_no_worse_than_the_wavelets_of_scikit_image(name: str, sigma: float) -> None:
    pytest.importorskip("pywt")
    restoration = pytest.importorskip("skimage.restoration")
    y = noisy(name, sigma)
    level = noise_levels(y)[0]
    theirs = restoration.estimate_sigma(y[0].numpy(), channel_axis=0, average_sigmas=True) / sigma
    assert not level.known or abs(level.sigma / sigma - 1) < abs(theirs - 1) + 0.02


@pytest.mark.parametrize(("quality", "sigma", "least", "most"), [
    (95, 0.025, 0.8, 1.2), (95, 0.05, 0.9, 1.15), (95, 0.1, 0.85, 1.15), (85, 0.025, 0.65, 1.1),
    (85, 0.05, 0.9, 1.2), (75, 0.05, 0.9, 1.2),
])
@pytest.mark.parametrize("name", ["astronaut", "chelsea", "coffee", "rocket"])
def test_noise_that_was_saved_as_jpeg(name: str, quality: int, sigma: float, least: float, most: float) -> None:
    y = as_jpeg(noisy(name, sigma), quality, subsampling=2)
    truth = float((y - clean(name)).std())  # of an entry, after what the JPEG and its clipping leave
    with pytest.warns(UserWarning,
                      match=r"uncertain: 0\.\d+, between 0\.\d+ and 0\.\d+, because its colours are coarser"):
        assert least < float(estimate_sigma(y)) / truth < most
    assert noise_levels(y)[0].low < truth < noise_levels(y)[0].high


@pytest.mark.parametrize("name", ["astronaut", "chelsea", "coffee", "rocket"])
def test_noise_that_was_demosaiced(name: str) -> None:
    x = clean(name)
    y = demosaiced(with_noise(x, 0.05))
    truth = float((y - demosaiced(x)).std())
    with pytest.warns(UserWarning, match="correlated between pixels"):
        assert 0.75 < float(estimate_sigma(y)) / truth < 1.0
    assert noise_levels(y)[0].low < truth < noise_levels(y)[0].high


def test_no_doubt_is_raised_where_there_is_none() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        estimate_sigma(noisy("astronaut", 0.025))
    y = noisy("astronaut", 0.05)
    with pytest.warns(UserWarning, match=r"sigma was estimated from y as 0\.05\d* \(0\.0\d+ to 0\.0\d+\): pass"):
        GaussianLikelihood(Denoising(tuple(y.shape[1:])), y)
