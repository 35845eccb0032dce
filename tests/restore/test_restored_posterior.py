"""The mean of a noisy picture: a mixture that is no worse than the picture itself."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

import invflow
from invflow.operators import Denoising, MaskInpainting, SuperResolution
from invflow.restore.posterior import best_mixture, fitted_wiener, no_worse_than_the_picture, posterior_of


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def photos() -> invflow.VFM:
    vfm = invflow.VFM.load("photos")
    vfm.adapter.symmetries = 1
    return vfm


def test_the_best_mixture_is_that_of_a_fine_grid() -> None:
    for seed in range(6):
        g = seeded(seed)
        target = torch.randn(400, generator=g)
        shares = torch.rand(3, 1, generator=g)
        estimates = list(target * shares + 0.8 * torch.randn(3, 400, generator=g))
        weights = best_mixture(estimates, target)
        assert sum(weights) == pytest.approx(1)
        assert min(weights) >= 0

        def loss(w, estimates=estimates, target=target):
            return float((sum(a * x for a, x in zip(w, estimates, strict=True)) - target).square().mean())

        grid = [(a / 40, b / 40, (40 - a - b) / 40) for a, b in itertools.product(range(41), repeat=2) if a + b <= 40]
        assert loss(weights) <= min(map(loss, grid)) + 1e-9


@pytest.mark.parametrize("factor", [0.2, 1.0, 5.0])
def test_the_spectrum_is_scaled_as_the_picture_is(photos: invflow.VFM, factor: float) -> None:
    """For a draw from the scaled prior, the filter is that of the scaled prior, which is the best linear one."""
    shape, sigma = (64, 80), 0.05
    prior, spectrum = photos.prior.resized((3, *shape)), photos.adapter.spectrum
    x = prior.decode(prior.mean + factor**0.5 * spectrum.colour(torch.randn(1, 3, *shape, generator=seeded(0))))
    y = x + sigma * torch.randn(x.shape, generator=seeded(1))
    found = fitted_wiener(photos, spectrum, y, sigma)
    power = factor * (spectrum.scales(*shape) * prior.decode_affine[0]).square()
    centre = prior.mean * prior.decode_affine[0] + prior.decode_affine[1]
    exact = centre + spectrum.inverse_transform(power / (power + sigma**2) * spectrum.forward_transform(y - centre))
    risk = float((power * sigma**2 / (power + sigma**2)).mean())
    assert float((found - x).square().mean()) == pytest.approx(risk, rel=0.05)
    assert float((found - exact).square().mean()) < 0.01 * risk


@pytest.mark.parametrize("sigma", [0.005, 0.01, 0.02, 0.04, 0.1])
@pytest.mark.parametrize("name", ["astronaut", "coffee", "grass", "brick"])
def test_a_photograph_never_comes_out_worse(photos: invflow.VFM, name: str, sigma: float) -> None:
    data = pytest.importorskip("skimage.data")
    x = torch.from_numpy(np.atleast_3d(getattr(data, name)()) / 255).float().permute(2, 0, 1)[:, 100:228, 100:228]
    y = x + sigma * torch.randn(x.shape, generator=seeded(0))
    restored, _ = posterior_of(photos, Denoising(tuple(x.shape)), y[None], sigma, 0, seeded(1))
    assert float((restored - x).square().mean()) < 1.01 * float((y - x).square().mean())


def test_noise_below_what_was_trained_for_does_not_break_the_network(photos: invflow.VFM) -> None:
    """Scratches in a picture without noise: what fills them is the same whatever small level is named."""
    x = (0.5 + 0.3 * torch.sin(torch.arange(96) / 7 + torch.arange(80)[:, None] / 5)).expand(3, -1, -1)
    mask = torch.ones(80, 96)
    mask[30:34, 10:80] = 0
    operator = MaskInpainting(mask, tuple(x.shape), "box-inpainting")
    filled = [posterior_of(photos, operator, x[None] * mask, sigma, 0, seeded(0))[0] for sigma in (0.005, 1e-4, 1e-9)]
    for image in filled:
        assert float((image - x)[:, mask == 0].square().mean().sqrt()) < 0.02
        torch.testing.assert_close(image, filled[0])


def test_detail_that_the_network_takes_for_noise_stays(photos: invflow.VFM) -> None:
    """Stripes of one pixel are detail beyond all photographs: the network alone makes them worse, the mixture not."""
    x = (0.5 + 0.2 * (torch.arange(96) % 2) * torch.ones(96, 1)).expand(3, -1, -1)
    y = (x + 0.03 * torch.randn(x.shape, generator=seeded(0)))[None]
    operator = Denoising((3, 96, 96))
    network = photos.sample(invflow.GaussianLikelihood(operator, y, 0.03), 1, generator=seeded(1)).mean()
    better = no_worse_than_the_picture(photos, operator, y, 0.03, network, seeded(2))
    errors = [float((image - x).square().mean().sqrt()) for image in (y, network, better)]
    assert errors[1] > 1.5 * errors[0]
    assert errors[2] < errors[0]


def test_a_filter_that_is_known_helps(photos: invflow.VFM) -> None:
    """For a thumbnail: better than enlarging with Lanczos's filter, and better than assuming another filter."""
    data, image = pytest.importorskip("skimage.data"), pytest.importorskip("PIL.Image")
    whole = data.astronaut()[20:148, 160:288]
    small = image.fromarray(whole).resize((32, 32), image.Resampling.LANCZOS)
    x, y = (torch.from_numpy(np.array(a) / 255).float().permute(2, 0, 1) for a in (whole, small))
    large = torch.from_numpy(np.array(small.resize((128, 128), image.Resampling.LANCZOS)) / 255).permute(2, 0, 1)

    def level(found: torch.Tensor) -> float:
        return float(-10 * (found - x).square().mean().log10())

    found = {filter: level(posterior_of(photos, SuperResolution((3, 128, 128), 4, filter), y[None], 0.005, 0,
                                        seeded(0))[0]) for filter in ("lanczos", "bicubic", "bilinear")}
    assert found["lanczos"] > level(large) + 0.6
    assert found["lanczos"] > found["bilinear"] + 1
    assert found["bicubic"] > found["lanczos"] - 0.5  # the default
