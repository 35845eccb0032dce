"""The noise level of photographs, estimated from one of them."""

from __future__ import annotations

import io
import warnings

import numpy as np
import pytest
import torch

from invflow.likelihood import estimate_sigma


def noisy(name: str, sigma: float) -> torch.Tensor:
    data = pytest.importorskip("skimage.data")
    x = torch.from_numpy(np.atleast_3d(getattr(data, name)()) / 255).permute(2, 0, 1)[None, :, :300, :300]
    return x + sigma * torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype)


@pytest.mark.parametrize("name", ["astronaut", "chelsea", "coffee", "rocket", "camera", "brick"])
@pytest.mark.parametrize("sigma", [0.025, 0.1])
def test_the_level_of_a_photograph_is_known_to_a_tenth(name: str, sigma: float) -> None:
    assert float(estimate_sigma(noisy(name, sigma))) == pytest.approx(sigma, rel=0.11)


@pytest.mark.parametrize("name", ["astronaut", "chelsea", "coffee"])
def test_where_little_noise_was_added_the_photographs_own_counts_too(name: str) -> None:
    own = float(estimate_sigma(noisy(name, 0.0)))
    assert 0 < own < 0.008
    assert float(estimate_sigma(noisy(name, 0.01))) == pytest.approx((own**2 + 0.01**2) ** 0.5, rel=0.15)


def test_white_noise_is_not_underestimated_by_leaving_directions_out() -> None:
    y = 0.2 * torch.randn(4, 3, 160, 170, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(estimate_sigma(y), torch.full((4,), 0.2), rtol=0.03)


def test_only_observed_patches_count() -> None:
    g = torch.Generator().manual_seed(0)
    y = 0.1 * torch.randn(2, 1, 200, 200, generator=g)
    observed = torch.ones(1, 1, 200, 200, dtype=torch.bool)
    observed[:, :, 50:120, 30:170] = False
    y = torch.where(observed, y, 0.0)
    assert torch.allclose(estimate_sigma(y, observed), torch.full((2,), 0.1), rtol=0.05)
    scattered = torch.rand(1, 1, 200, 200, generator=g) < 0.7  # no patch is whole: the differences alone
    assert torch.allclose(estimate_sigma(torch.where(scattered, y, 0.0), scattered & observed),
                          torch.full((2,), 0.1), rtol=0.05)


#: estimate / noise at 0.01, 0.025, 0.05 and 0.1: little noise is topped up by the photographs' own and fine texture
RATIOS = {
    ("astronaut", "colour"): (1.23, 1.04, 1.01, 1.00), ("astronaut", "grey"): (1.35, 1.10, 1.03, 1.00),
    ("chelsea", "colour"): (1.04, 1.01, 1.00, 1.00), ("chelsea", "grey"): (1.43, 1.12, 1.02, 1.01),
    ("coffee", "colour"): (1.12, 1.04, 1.01, 1.00), ("coffee", "grey"): (1.58, 1.24, 1.07, 1.01),
    ("rocket", "colour"): (1.17, 1.04, 1.00, 1.01), ("rocket", "grey"): (1.14, 1.06, 1.02, 1.01),
    ("camera", "grey"): (1.14, 1.05, 1.01, 1.00), ("brick", "grey"): (1.04, 0.99, 1.00, 1.00),
    ("page", "grey"): (1.61, 1.23, 1.04, 1.01),
}


LEVELS = (0.01, 0.025, 0.05, 0.1)


def pictures(name: str, kind: str) -> list[torch.Tensor]:
    """One for each level; in grey, one channel's noise on the luminance."""
    found = [noisy(name, sigma) for sigma in LEVELS]
    if kind == "grey" and found[0].shape[1] == 3:
        clean = noisy(name, 0.0)
        found = [luminance(clean) + (y - clean)[:, :1] for y in found]
    return found


@pytest.mark.parametrize(("name", "kind"), RATIOS, ids="-".join)
def test_the_ratio_to_the_truth_over_levels(name: str, kind: str) -> None:
    ratios = [float(estimate_sigma(y)) / sigma for y, sigma in zip(pictures(name, kind), LEVELS)]
    assert ratios == pytest.approx(RATIOS[name, kind], abs=0.03)


@pytest.mark.parametrize(("name", "kind"), RATIOS, ids="-".join)
def test_no_worse_than_the_wavelets_of_scikit_image(name: str, kind: str) -> None:
    pytest.importorskip("pywt")
    restoration = pytest.importorskip("skimage.restoration")
    for y, sigma in zip(pictures(name, kind), LEVELS):
        theirs = restoration.estimate_sigma(y[0].numpy(), channel_axis=0, average_sigmas=True) / sigma
        assert abs(float(estimate_sigma(y)) / sigma - 1) < abs(theirs - 1) + 0.02


@pytest.mark.parametrize(("sigma", "rel"), [(0.025, 0.2), (0.05, 0.1), (0.1, 0.1)])
@pytest.mark.parametrize("name", ["astronaut", "chelsea", "coffee", "rocket"])
def test_coarse_colour_of_a_jpeg_does_not_hide_the_noise(name: str, sigma: float, rel: float) -> None:
    y = as_jpeg(noisy(name, sigma), quality=95, subsampling=2)
    truth = float((y - noisy(name, 0.0)).std())  # of an entry, after what the JPEG and its clipping leave
    assert float(estimate_sigma(y)) == pytest.approx(truth, rel=rel)


def test_estimates_that_disagree_are_said() -> None:
    y = as_jpeg(noisy("astronaut", 0.025), quality=75, subsampling=2)  # rounded away at the finest scale
    with pytest.warns(UserWarning, match=r"uncertain: 0\.0.*differences, 0\.0.*patches.*pass sigma="):
        estimate_sigma(y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        estimate_sigma(noisy("astronaut", 0.025))


def luminance(x: torch.Tensor) -> torch.Tensor:
    return (x * x.new_tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True)


def as_jpeg(x: torch.Tensor, quality: int, subsampling: int) -> torch.Tensor:
    """Saved with 8 bits and read again; subsampling 2 is 4:2:0."""
    image = pytest.importorskip("PIL.Image")
    pixels, file = (x[0].permute(1, 2, 0).clamp(0, 1).numpy() * 255).round().astype(np.uint8), io.BytesIO()
    image.fromarray(pixels).save(file, "JPEG", quality=quality, subsampling=subsampling)
    return torch.from_numpy(np.asarray(image.open(file)) / 255).permute(2, 0, 1)[None]
