"""Metrics against closed forms, hand-computed cases, and their own fairness."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import wasserstein_distance

from invflow import metrics

F64 = torch.float64


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=F64)


def within(values: torch.Tensor, expected: float, errors: float = 4.0) -> bool:
    """Whether the mean of independent values lies within a few of its own standard errors of the expected."""
    return bool((values.mean() - expected).abs() < errors * values.std() / math.sqrt(values.numel()))


def with_one(equal: int, *more: float) -> torch.Tensor:
    """Log weights (1, N) proportional to ``equal`` ones followed by ``more``."""
    return torch.tensor([[1.0] * equal + list(more)], dtype=F64).log()


# -- image quality -------------------------------------------------------------------------------------------


def test_psnr_of_a_constant_error():
    truth = torch.rand(3, 1, 12, 12, generator=generator(), dtype=F64)
    assert metrics.psnr(truth + 0.1, truth) == pytest.approx(torch.full((3,), 20.0, dtype=F64))
    assert metrics.psnr(truth + 0.1, truth, data_range=10) == pytest.approx(torch.full((3,), 40.0, dtype=F64))
    samples = torch.stack([truth + 0.1, truth + 0.01], 1)
    expected = torch.tensor([[20.0, 40.0]] * 3, dtype=F64)
    torch.testing.assert_close(metrics.psnr(samples, truth), expected)


def test_ssim_agrees_with_torchmetrics():
    reference = pytest.importorskip("torchmetrics.functional.image").structural_similarity_index_measure
    truth = torch.rand(2, 3, 20, 17, generator=generator(), dtype=F64)
    x = truth + 0.2 * randn(2, 3, 20, 17)
    # torchmetrics pads by reflection and averages the whole image: keep the positions that need no padding
    full = reference(x, truth, data_range=1.0, reduction="none", return_full_image=True)[1]
    expected = full[..., 5:-5, 5:-5].mean((1, 2, 3))
    torch.testing.assert_close(metrics.ssim(x, truth), expected, rtol=1e-5, atol=1e-6)
    both = metrics.ssim(torch.stack([x, truth], 1), truth)
    torch.testing.assert_close(both, torch.stack([metrics.ssim(x, truth), torch.ones(2, dtype=F64)], 1))


def test_ssim_of_constant_images_by_hand():
    a, b = torch.full((1, 1, 11, 11), 0.2, dtype=F64), torch.full((1, 1, 11, 11), 0.6, dtype=F64)
    expected = (2 * 0.2 * 0.6 + 1e-4) / (0.2**2 + 0.6**2 + 1e-4)
    assert metrics.ssim(a, b).item() == pytest.approx(expected)


# -- scores --------------------------------------------------------------------------------------------------


def test_crps_of_two_samples_by_hand():
    samples, truth = torch.tensor([[0.0, 1.0]], dtype=F64), torch.tensor([0.25], dtype=F64)
    # E|X - y| = (0.25 + 0.75) / 2; the pair distance is 1 among different samples and 1/2 with the diagonal
    assert metrics.crps(samples, truth).item() == pytest.approx(0.5 - 0.5)
    assert metrics.crps(samples, truth, fair=False).item() == pytest.approx(0.5 - 0.25)
    log_weights = torch.tensor([[0.8, 0.2]], dtype=F64).log()
    error = 0.8 * 0.25 + 0.2 * 0.75
    assert metrics.crps(samples, truth, log_weights, fair=False).item() == pytest.approx(error - 0.16)
    # the fair correction of two samples: w1 w2 (w1 + w2) - w1 w2 (w1^2 + w2^2) over 1 - w1^2 - w2^2, here w1 w2
    assert metrics.crps(samples, truth, log_weights).item() == pytest.approx(error - 0.16 - 0.16)


def test_crps_equals_the_sum_over_all_pairs():
    samples, truth, log_weights = randn(3, 7, 2, 5), randn(3, 2, 5, seed=1), randn(3, 7, seed=2)
    w = torch.softmax(log_weights, 1)
    error = torch.einsum("bn,bnhw->bhw", w, (samples - truth[:, None]).abs())
    pairs = torch.einsum("bi,bj,bijhw->bhw", w, w, (samples[:, :, None] - samples[:, None]).abs())
    torch.testing.assert_close(metrics.crps(samples, truth, log_weights, fair=False), error - 0.5 * pairs)
    own = torch.einsum("bi,bj,bijhw->bhw", w.square(), w, (samples[:, :, None] - samples[:, None]).abs())
    square = w.square().sum(1)[:, None, None]
    fair = error - 0.5 * pairs - (own - 0.5 * square * pairs) / (1 - square)
    torch.testing.assert_close(metrics.crps(samples, truth, log_weights), fair)
    error = (samples - truth[:, None]).abs().mean(1)
    pairs = (samples[:, :, None] - samples[:, None]).abs().sum((1, 2)) / (7 * 6)
    torch.testing.assert_close(metrics.crps(samples, truth), error - 0.5 * pairs)


@pytest.mark.parametrize("count", [2, 5, 50])
def test_fair_crps_of_gaussian_samples_has_the_gaussian_score_as_its_mean(count):
    truth = torch.tensor(0.7, dtype=F64)
    samples = 0.3 + 2.0 * randn(20000, count)
    expected = metrics.gaussian_crps(torch.tensor(0.3, dtype=F64), torch.tensor(2.0, dtype=F64), truth).item()
    assert within(metrics.crps(samples, truth.expand(20000)), expected)
    # with the diagonal the score is larger by E|X - X'| / 2N = 2 / (sqrt(pi) N)
    kept = metrics.crps(samples, truth.expand(20000), fair=False)
    assert within(kept, expected + 2.0 / (math.sqrt(math.pi) * count))


def test_gaussian_crps_by_quadrature():
    # CRPS = integral of (F(u) - 1{u >= y})^2
    mean, std = torch.tensor([0.2, -1.0], dtype=F64), torch.tensor([0.5, 2.0], dtype=F64)
    truth = torch.ones(2, dtype=F64)
    u = torch.linspace(-20, 20, 400001, dtype=F64)[:, None]
    step = (u >= truth).to(F64)
    integral = torch.trapezoid((torch.special.ndtr((u - mean) / std) - step).square(), u, dim=0)
    torch.testing.assert_close(metrics.gaussian_crps(mean, std, truth), integral, atol=2e-4, rtol=0)
    point = metrics.gaussian_crps(mean, torch.zeros(2, dtype=F64), truth)
    torch.testing.assert_close(point, (mean - truth).abs())
    equal = metrics.gaussian_crps(truth, torch.zeros(2, dtype=F64), truth)
    torch.testing.assert_close(equal, torch.zeros(2, dtype=F64))


def test_energy_score_in_one_dimension_is_the_crps():
    samples, truth, log_weights = randn(4, 30), randn(4, seed=1), randn(4, 30, seed=2)
    for fair in (True, False):
        expected = metrics.crps(samples, truth, log_weights, fair=fair)
        torch.testing.assert_close(metrics.energy_score(samples, truth, log_weights, fair=fair), expected)
        chunked = metrics.energy_score(samples, truth, log_weights, fair=fair, max_entries=4 * 30 * 7)
        torch.testing.assert_close(chunked, expected)


def test_energy_score_by_hand():
    samples = torch.tensor([[[0.0, 0.0], [3.0, 4.0]]], dtype=F64)
    truth = torch.tensor([[0.0, 4.0]], dtype=F64)
    assert metrics.energy_score(samples, truth).item() == pytest.approx(3.5 - 2.5)
    assert metrics.energy_score(samples, truth, fair=False).item() == pytest.approx(3.5 - 1.25)


def test_weights_are_the_same_as_repetition():
    x, truth = randn(1, 3, 2), randn(1, 2, seed=1)
    log_weights, repeated = with_one(2, 3.0), x[:, [0, 1, 2, 2, 2]]
    for score in (metrics.crps, metrics.energy_score):
        weighted = score(x, truth, log_weights, fair=False)
        torch.testing.assert_close(weighted, score(repeated, truth, fair=False))
    a = metrics.sliced_wasserstein(x, truth[:, None], log_weights=log_weights, generator=generator())
    b = metrics.sliced_wasserstein(repeated, truth[:, None], generator=generator())
    torch.testing.assert_close(a, b)
    weighted = metrics.nlpd(x[..., 0], log_weights)
    torch.testing.assert_close(weighted, metrics.nlpd(repeated[..., 0]))


def test_all_weight_on_one_sample_is_a_point_mass():
    x, truth = randn(1, 3, 4), randn(1, 4, seed=1)
    log_weights = torch.tensor([[-math.inf, 0.0, -math.inf]], dtype=F64)
    torch.testing.assert_close(metrics.crps(x, truth, log_weights), (x[:, 1] - truth).abs())
    torch.testing.assert_close(metrics.energy_score(x, truth, log_weights), (x[:, 1] - truth).norm(dim=1))
    torch.testing.assert_close(metrics.spread(x, log_weights), torch.zeros(1, 4, dtype=F64))


def test_nlpd_by_hand():
    log_likelihood = torch.tensor([[0.5, 0.25]], dtype=F64).log()
    assert metrics.nlpd(log_likelihood).item() == pytest.approx(-math.log(0.375))
    weighted = metrics.nlpd(log_likelihood, torch.tensor([[0.8, 0.2]], dtype=F64).log())
    assert weighted.item() == pytest.approx(-math.log(0.45))


# -- spread and intervals ------------------------------------------------------------------------------------


def test_spread_is_the_standard_deviation():
    x = randn(3, 9, 1, 4)
    torch.testing.assert_close(metrics.spread(x), x.std(1))
    # draws of N(0, 1.5^2), weighted to N(0, 1)
    draws = 1.5 * randn(40000, 40)
    log_weights = -0.5 * draws.square() + 0.5 * draws.square() / 2.25
    variance = metrics.spread(draws, log_weights).square()  # .010 too high, self-normalisation's own bias of order 1/N
    assert abs(variance.mean().item() - 1) < 0.011 + 4 * variance.std().item() / 200


@pytest.mark.parametrize(("count", "level"), [(19, 0.9), (99, 0.9), (64, 0.5), (199, 0.99)])
def test_an_honest_posterior_has_nominal_coverage(count, level):
    trials = 10000
    covered = metrics.coverage(randn(trials, count), randn(trials, seed=1), level).to(F64)
    # exact where level (N + 1) / 2 is whole; else off by the curvature of the density, well under 0.004 here
    curvature = 0.004 if count == 64 else 0.0
    assert abs(covered.mean().item() - level) < 4 * math.sqrt(level * (1 - level) / trials) + curvature


def test_coverage_sees_too_narrow_and_too_wide():
    truth = randn(5000, seed=1)
    assert metrics.coverage(0.7 * randn(5000, 99), truth).double().mean() < 0.8
    assert metrics.coverage(1.5 * randn(5000, 99), truth).double().mean() > 0.96


def test_weighted_intervals():
    x = randn(2, 199, 3)
    low, high = metrics.central_interval(x, 0.9)
    equal = metrics.central_interval(x, 0.9, torch.full((2, 199), -3.0, dtype=F64))
    torch.testing.assert_close(torch.stack(equal), torch.stack([low, high]))
    # i / (N + 1): the 10th and the 190th of 199
    ordered = x.sort(1).values
    torch.testing.assert_close(low, ordered[:, 9])
    torch.testing.assert_close(high, ordered[:, 189])
    # draws from N(0, 2^2) weighted to N(0, 1)
    wide = 2 * randn(4000, 400, seed=2)
    log_weights = -0.5 * wide.square() + 0.125 * wide.square()
    covered = metrics.coverage(wide, randn(4000, seed=3), 0.9, log_weights).double()
    assert abs(covered.mean().item() - 0.9) < 4 * math.sqrt(0.09 / 4000) + 0.005


# -- distances -----------------------------------------------------------------------------------------------


def gaussian_mmd(shift: float, scale: float, h: float) -> float:
    """Squared MMD between N(0, 1) and N(shift, scale^2) under the kernel exp(-d^2 / 2h^2), in closed form."""

    def kernel_mean(variance: float, distance: float) -> float:
        return h / math.sqrt(h**2 + variance) * math.exp(-0.5 * distance**2 / (h**2 + variance))

    return kernel_mean(2, 0) + kernel_mean(2 * scale**2, 0) - 2 * kernel_mean(1 + scale**2, shift)


@pytest.mark.parametrize(("shift", "scale"), [(0.0, 1.0), (0.5, 1.0), (0.0, 2.0)])
def test_mmd_is_unbiased(shift, scale):
    values = metrics.mmd(randn(10000, 6), shift + scale * randn(10000, 9, seed=1), bandwidth=0.8)
    assert within(values, gaussian_mmd(shift, scale, 0.8))


def test_mmd_weights_move_a_law_onto_another():
    x, y = 1.3 * randn(2000, 60), randn(2000, 20, seed=1)
    log_weights = -0.5 * x.square() + 0.5 * x.square() / 1.69
    unweighted = metrics.mmd(x, y, bandwidth=0.8)
    assert within(metrics.mmd(x, y, log_weights, bandwidth=0.8), 0.0, errors=5)
    assert not within(unweighted, 0.0, errors=5)


def test_mmd_by_hand_and_its_median_bandwidth():
    x, y = torch.tensor([[0.0, 1.0]], dtype=F64), torch.tensor([[0.0, 3.0]], dtype=F64)
    # distances among the pooled four: 1, 0, 3, 1, 2, 3; torch's median is the lower one, 1
    assert metrics.median_distance(x, y).item() == 1.0

    def k(d: float) -> float:
        return math.exp(-0.5 * d**2)

    expected = k(1) + k(3) - 2 * (k(0) + k(3) + k(1) + k(2)) / 4
    assert metrics.mmd(x, y).item() == pytest.approx(expected)
    assert metrics.mmd_root(x, y).item() == pytest.approx(math.sqrt(max(expected, 0.0)))
    far = metrics.mmd_root(x, y + 100)
    assert far.item() == pytest.approx(math.sqrt(metrics.mmd(x, y + 100).item()))


@pytest.mark.parametrize(("n", "m"), [(30, 30), (30, 17)])
def test_wasserstein_in_one_dimension_agrees_with_scipy(n, m):
    x, y = randn(2, n), 0.5 + 2 * randn(2, m, seed=1)
    wx, wy = randn(2, n, seed=2), randn(2, m, seed=3)
    plain = metrics.sliced_wasserstein(x, y, generator=generator(), num_projections=3)
    weighted = metrics.sliced_wasserstein(x, y, log_weights=wx, y_log_weights=wy, generator=generator(),
                                          num_projections=3)
    for b in range(2):
        assert plain[b].item() == pytest.approx(wasserstein_distance(x[b], y[b]))
        expected = wasserstein_distance(x[b], y[b], np.exp(wx[b].numpy()), np.exp(wy[b].numpy()))
        assert weighted[b].item() == pytest.approx(expected)


def test_wasserstein_of_order_two_by_hand():
    x, y = torch.tensor([[0.0, 1.0]], dtype=F64), torch.tensor([[5.0, 2.0]], dtype=F64)
    plain = metrics.sliced_wasserstein(x, y, 2, generator=generator())
    assert plain.item() == pytest.approx(math.sqrt((4 + 16) / 2))
    weights = torch.tensor([[0.25, 0.75]], dtype=F64).log()
    weighted = metrics.sliced_wasserstein(x, y, 2, y_log_weights=weights, generator=generator())
    # y is 2 with weight 3/4 and 5 with 1/4: transport 0 to 2 (1/2), 1 to 2 (1/4), 1 to 5 (1/4)
    assert weighted.item() == pytest.approx(math.sqrt(0.5 * 4 + 0.25 * 1 + 0.25 * 16))


def test_sliced_wasserstein_of_a_shift():
    x = randn(1, 50, 2, 2)
    shift = torch.tensor([[1.0, 0.0], [0.0, 2.0]], dtype=F64)
    axes = torch.eye(4, dtype=F64).reshape(4, 2, 2) * 7
    by_axes = metrics.sliced_wasserstein(x, x + shift, 2, projections=axes)
    assert by_axes.item() == pytest.approx(math.sqrt(5 / 4))
    # over the sphere E (u . s)^2 = |s|^2 / d
    random = metrics.sliced_wasserstein(x, x + shift, 2, num_projections=20000, generator=generator())
    assert random.item() == pytest.approx(math.sqrt(5 / 4), rel=0.02)
    chunked = metrics.sliced_wasserstein(x, x + shift, 2, projections=axes, max_entries=150)
    torch.testing.assert_close(chunked, by_axes)


# -- errors --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("call", "message"), [
    (lambda: metrics.psnr(randn(2, 1, 4, 4), randn(3, 1, 4, 4)), r"\(2, 1, 4, 4\).*\(3, 1, 4, 4\)"),
    (lambda: metrics.ssim(randn(2, 1, 9, 9), randn(2, 1, 9, 9)), "11 x 11"),
    (lambda: metrics.crps(randn(2, 5, 4), randn(2, 3)), r"\(2, 5, 4\).*\(2, 3\)"),
    (lambda: metrics.crps(randn(2, 1, 4), randn(2, 4)), "at least 2"),
    (lambda: metrics.crps(randn(2, 5, 4), randn(2, 4), randn(2, 4)), r"log_weights has shape \(2, 4\)"),
    (lambda: metrics.energy_score(randn(2, 5, 4), randn(5, 2, 4)), "do not fit"),
    (lambda: metrics.gaussian_crps(randn(2), -torch.ones(2), randn(2)), "negative"),
    (lambda: metrics.coverage(randn(2, 10), randn(2), 0.9), "needs 19 samples"),
    (lambda: metrics.coverage(randn(2, 10), randn(2), 90), "between 0 and 1"),
    (lambda: metrics.spread(randn(2, 1, 4)), "N >= 2"),
    (lambda: metrics.nlpd(randn(2)), r"\(B, N\)"),
    (lambda: metrics.mmd(randn(5, 2), randn(1, 5, 2)), r"x\[None\]"),
    (lambda: metrics.mmd(torch.zeros(1, 3), torch.zeros(1, 3)), "bandwidth > 0"),
    (lambda: metrics.sliced_wasserstein(randn(1, 5, 2), randn(1, 5, 2), 3), "p=1 and p=2"),
    (lambda: metrics.sliced_wasserstein(randn(1, 5, 2), randn(1, 5, 2), projections=randn(4, 3)), "not fit"),
])
def test_errors_say_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_no_metric_touches_the_global_seed():
    before = torch.random.get_rng_state()
    metrics.sliced_wasserstein(randn(1, 5, 2), randn(1, 5, 2))
    assert torch.equal(before, torch.random.get_rng_state())
