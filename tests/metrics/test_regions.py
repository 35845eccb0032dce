"""Coverage near ink, energy score over patches, means over blocks: counts and closed forms."""

from __future__ import annotations

import math

import pytest
import torch

from invflow import metrics

F64 = torch.float64


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def test_near_ink_by_hand() -> None:
    truth = torch.zeros(2, 3, 9, 9)
    truth[0, 1, 4, 4] = 0.11  # any channel
    truth[1, :, 0, 8] = 0.1  # not above
    near = metrics.near_ink(truth)
    assert near.shape == truth.shape
    expected = torch.zeros(9, 9, dtype=torch.bool)
    expected[2:7, 2:7] = True
    assert bool((near[0] == expected).all())
    assert not bool(near[1].any())
    assert int(metrics.near_ink(truth, 0.05)[1, 0].sum()) == 9  # a corner
    assert int(metrics.near_ink(truth, distance=0).sum()) == 3
    with pytest.raises(ValueError, match=r"pictures \(B, C, H, W\)"):
        metrics.near_ink(truth[0])


def test_coverage_near_ink_does_not_see_the_background() -> None:
    """A black background that every sample has covers itself: .95 of all pixels, where near ink nothing is covered."""
    truth = torch.zeros(4, 1, 20, 20, dtype=F64)
    truth[:3, :, 8:11, 8:11] = 1
    samples = 1e-3 * randn(4, 39, 1, 20, 20)
    inside = metrics.coverage(samples, truth)
    near = metrics.near_ink(truth)
    found = metrics.coverage_near_ink(samples, truth)
    for b in range(3):
        assert int(near[b].sum()) == 49
        assert float(found[b]) == pytest.approx(float(inside[b][near[b]].mean()))
    assert bool(found[3].isnan())  # no ink
    assert float(inside[:3].mean()) > float(found[:3].mean()) + 0.05
    # an exact posterior whose pixels do not depend on the truth's threshold: the level
    law = 1 + randn(3000, 40, 1, 3, 3)
    share = metrics.coverage_near_ink(law[:, 1:], law[:, 0], threshold=-math.inf)
    assert abs(float(share.mean()) - 0.9) < 4 * float(share.std()) / math.sqrt(3000)
    few = torch.where(torch.arange(39) < 18, 0.0, -math.inf).expand(4, 39)
    with pytest.warns(UserWarning, match="effective samples"):
        assert bool(metrics.coverage_near_ink(samples, truth, 0.9, few).isnan().all())


def test_patch_energy_score_by_hand() -> None:
    samples, truth = randn(2, 10, 2, 7, 6), randn(2, 2, 7, 6, seed=1)
    log_weights = randn(2, 10, seed=2)
    corners = [(0, 0), (0, 3), (3, 0), (3, 3)]
    expected = torch.stack([metrics.energy_score(samples[..., i:i + 3, j:j + 3], truth[..., i:i + 3, j:j + 3],
                                                 log_weights) for i, j in corners]).mean(0)
    torch.testing.assert_close(metrics.patch_energy_score(samples, truth, log_weights, size=3), expected)
    # of one pixel each it is the mean CRPS
    crps = metrics.crps(samples[:, :, :1], truth[:, :1]).flatten(1).mean(1)
    torch.testing.assert_close(metrics.patch_energy_score(samples[:, :, :1], truth[:, :1], size=1), crps)
    overlapping = metrics.patch_energy_score(samples, truth, size=6, stride=1)
    both = [metrics.energy_score(samples[..., i:i + 6, :], truth[..., i:i + 6, :]) for i in (0, 1)]
    torch.testing.assert_close(overlapping, torch.stack(both).mean(0))
    with pytest.raises(ValueError, match="size=8"):
        metrics.patch_energy_score(samples, truth, size=8)


def test_patches_tell_correlations_that_pixels_do_not() -> None:
    """Pixels of a patch that are one number, and samples of independent pixels with the same margins."""
    truth = randn(400, 1, 1, 1).expand(400, 1, 4, 4)
    same, apart = randn(400, 30, 1, 1, 1, seed=1).expand(400, 30, 1, 4, 4), randn(400, 30, 1, 4, 4, seed=2)
    pixels = metrics.crps(apart, truth).flatten(1).mean(1) - metrics.crps(same, truth).flatten(1).mean(1)
    assert abs(float(pixels.mean())) < 4 * float(pixels.std()) / 20
    patches = metrics.patch_energy_score(apart, truth, size=2) - metrics.patch_energy_score(same, truth, size=2)
    assert float(patches.mean()) > 4 * float(patches.std()) / 20


def test_block_means_by_hand() -> None:
    images = randn(2, 5, 3, 9, 8)
    found = metrics.block_means(images, 4)
    assert found.shape == (2, 5, 3, 2, 2)
    torch.testing.assert_close(found[1, 2, 0, 1, 0], images[1, 2, 0, 4:8, :4].mean())
    torch.testing.assert_close(metrics.block_means(images[:, 0], 4), found[:, 0])
    with pytest.raises(ValueError, match="size=10"):
        metrics.block_means(images, 10)
    # intervals of pixels can be right while a region's are not
    truth = randn(500, 1, 1, 1).expand(500, 1, 4, 4)
    samples = randn(500, 39, 1, 4, 4, seed=2)
    assert abs(float(metrics.coverage(samples, truth).mean()) - 0.9) < 0.06
    assert float(metrics.coverage(metrics.block_means(samples), metrics.block_means(truth)).mean()) < 0.5
