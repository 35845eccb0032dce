"""Split-conformal intervals: the scale by hand, and the guarantee for samples of any quality."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from invflow import metrics

F64 = torch.float64


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def conformal_case(spread: float, trials: int, count: int, pixels: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """Truths and samples of the wrong spread, pixels correlated, ``count`` for calibration and one to try."""
    common = randn(trials, count + 1, 1, seed=1)
    truth = 0.8 * common + 0.6 * randn(trials, count + 1, pixels, seed=2)
    return truth, spread * randn(trials, count + 1, 39, pixels, seed=3)


@pytest.mark.parametrize("kind", ["pixel", "average", "image"])
@pytest.mark.parametrize("spread", [0.3, 1.0, 3.0])
def test_conformal_intervals_keep_their_guarantee(kind, spread):
    trials, count, level = 300, 29, 0.9
    truth, samples = conformal_case(spread, trials, count)
    covered = []
    for t in range(trials):
        intervals = metrics.conformal_scale(samples[t, :count], truth[t, :count], level, kind=kind)
        inside = intervals.covered(samples[t, count:], truth[t, count:]).double()
        covered.append(float(inside.amin()) if kind == "image" else float(inside.mean()))
    share, error = np.mean(covered), np.std(covered) / math.sqrt(trials)
    # at least the level, and with continuous scores at most 1 / (B + 1) more (2 / (B + 1) for the average)
    assert level - 3.5 * error < share < level + 2 / (count + 1) + 3.5 * error


def test_conformal_scale_by_hand():
    # intervals [-1, 1] up to rounding: 19 samples at level 0.9 are the outermost ones
    samples = torch.linspace(-1, 1, 19, dtype=F64)[None, :, None].expand(9, 19, 2)
    truth = torch.stack([torch.arange(1, 10).double() / 10, torch.arange(1, 10).double()], 1)
    pixel = metrics.conformal_scale(samples, truth, 0.9, kind="pixel")
    torch.testing.assert_close(pixel.scale, torch.tensor([0.9, 9.0], dtype=F64))  # the 9th of 9
    low, high = pixel.interval(samples[:1])
    torch.testing.assert_close(high, torch.tensor([[0.9, 9.0]], dtype=F64))
    torch.testing.assert_close(low, -high)
    # at level 0.5 the half width is that of the 5th and the 15th sample, 5/9; the 5th of 9 largest scores
    assert metrics.conformal_scale(samples, truth, 0.5, kind="image").scale.item() == pytest.approx(5 / (5 / 9))
    # (misses + 1) / 10 <= 0.5 lets 4 images' worth, 8 pixels of 18, stay outside: the 9th largest, of a truth of 1
    assert metrics.conformal_scale(samples, truth, 0.5).scale.item() == pytest.approx(1 / (5 / 9))
    assert "expected share of pixels" in metrics.conformal_scale(samples, truth, 0.5).guarantee
    still = metrics.conformal_scale(torch.zeros(9, 19, 2), torch.zeros(9, 2), 0.5, floor=0.0)
    assert still.covered(torch.zeros(1, 19, 2), torch.zeros(1, 2)).all()


def test_conformal_intervals_take_a_posterior():
    from invflow import Posterior

    truth, samples = conformal_case(0.5, 1, 30)
    log_weights = randn(31, 39, seed=5)
    intervals = metrics.conformal_scale(samples[0, :30], truth[0, :30], 0.8, log_weights[:30])
    low, high = intervals.interval(Posterior(samples[0, 30:], log_weights[30:]))
    expected = intervals.interval(samples[0, 30:], log_weights[30:])
    torch.testing.assert_close(torch.stack([low, high]), torch.stack(expected))


@pytest.mark.parametrize(("call", "message"), [
    (lambda: metrics.conformal_scale(randn(8, 39), randn(8), 0.9), "for level 0.9: pass 9"),
    (lambda: metrics.conformal_scale(randn(9, 39), randn(9), 0.9, kind="pixels"), "'pixel', 'average', 'image'"),
])
def test_errors_say_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=message):
        call()
