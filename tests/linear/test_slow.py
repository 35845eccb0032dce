"""Slow scales: samples vary there as much as the data allow, without a tint of their own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import avg_pool2d

import invflow
from invflow.linear.slow import draw_slow_cosines, hides_blocks, with_slow_cosines
from invflow.linear.spectral import Spectrum, gaussian_estimate
from invflow.operator import Operator
from invflow.operators import Blur, Denoising, MaskInpainting, RandomInpainting, SuperResolution
from invflow.restore.posterior import posterior_of

SHAPE, SIGMA, SCALE = (3, 128, 192), 0.05, 0.5


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def operator_of(kind: str) -> Operator:
    if kind == "noise":
        return Denoising(SHAPE)
    if kind == "box":
        mask = torch.ones(SHAPE[1:])
        mask[32:80, 64:120] = 0
        return MaskInpainting(mask, SHAPE)
    if kind == "scattered":
        return RandomInpainting(SHAPE, keep=0.5, generator=seeded(3))
    if kind == "blur":
        grid = torch.arange(-12, 13)
        kernel = torch.exp(-(grid[:, None] ** 2 + grid**2) / 32)
        return Blur(kernel / kernel.sum(), SHAPE, padding="reflect", problem_class="gaussian-blur")
    return SuperResolution(SHAPE, factor=4, filter="lanczos" if kind == "lanczos" else "average")


@pytest.mark.parametrize("kind", ["noise", "box", "scattered", "blur", "smallness", "lanczos"])
def test_slow_deviations_are_those_of_the_posterior(kind: str) -> None:
    """Under a Gaussian prior, the error of the best linear estimate has the law that samples' deviations must have."""
    spectrum, operator = Spectrum(3, (0.03 / Spectrum.frequencies()).log().float().expand(3, -1)), operator_of(kind)
    x = SCALE * spectrum.colour(torch.randn(32, *SHAPE, generator=seeded(0)))
    y = operator(x)
    y = y + SIGMA * torch.randn(y.shape, generator=seeded(1))
    centre = torch.zeros(3, 1, 1)
    known = SCALE * gaussian_estimate(spectrum, centre, (SCALE, 0.0), operator, y, torch.full((32,), SIGMA))
    drawn = draw_slow_cosines(spectrum, SCALE, operator, SIGMA, 32, seeded(2))
    assert drawn is not None
    away = with_slow_cosines(torch.zeros_like(x), drawn)
    hidden = torch.zeros(SHAPE[1:], dtype=torch.bool)
    hidden[32:80, 64:120] = kind == "box"
    for side in (16, 64):
        errors, spread = (avg_pool2d(image, side).square().mean((0, 1)) for image in (x - known, away))
        inside = avg_pool2d(hidden[None].float(), side)[0]
        for where in (inside == 0, inside > 0.7):  # half a block at a hole's border counts as seen
            if bool(where.any()):
                assert float(spread[where].mean().sqrt()) == pytest.approx(float(errors[where].mean().sqrt()), rel=0.3)


def test_scratches_and_scattered_pixels_hide_no_block_and_a_box_does() -> None:
    scratches = torch.ones(SHAPE[1:])
    scratches[40:46, 10:180] = 0
    assert [hides_blocks(operator_of(kind)) for kind in ("noise", "scattered", "box")] == [False, False, True]
    assert not hides_blocks(MaskInpainting(scratches, SHAPE))


@pytest.mark.parametrize("restored", [False, True])
def test_intervals_of_means_over_a_photographs_blocks_hold_what_they_say(restored: bool) -> None:
    """Intervals from the VFM's own samples, and from samples that were moved to a better mean."""
    data = pytest.importorskip("skimage.data")
    x = torch.from_numpy(data.astronaut()[:192, 150:342] / 255).float().permute(2, 0, 1)
    y = x + SIGMA * torch.randn(x.shape, generator=seeded(0))
    vfm = invflow.VFM.load("photos")
    vfm.adapter.symmetries = 1
    operator = Denoising(tuple(x.shape))
    if restored:
        mean, images = posterior_of(vfm, operator, y[None], SIGMA, 16, seeded(1))
    else:
        posterior = vfm.sample(invflow.GaussianLikelihood(operator, y[None], SIGMA), 16, generator=seeded(1))
        mean, images = posterior.mean()[0], posterior.samples[0]
    # neighbouring means have errors that are nearly independent: those of 3 x 3 x 3, of 432, of 1728
    for side, low in ((8, 0.8), (16, 0.8), (64, 0.6)):
        error, spread = avg_pool2d(mean - x, side), avg_pool2d(images - mean, side).square().mean(0).sqrt()
        held = float((error.abs() < 1.645 * spread).float().mean())
        assert low < held < (0.97 if side < 64 else 1.01)
        assert float(spread.square().mean().sqrt()) < 1.4 * SIGMA / side
    tints = (images - mean).mean((2, 3))  # of each sample
    assert float(tints.std()) < 1.5 * SIGMA / np.sqrt(192 * 192)
