"""Calibration metrics: definitions by hand, exact laws, and the triad of exact, too narrow, too wide and biased."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats

from invflow import metrics

F64 = torch.float64
ALPHA = 0.05


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=F64)


# -- ranks ----------------------------------------------------------------------------------------------------


def test_ranks_count_samples_below():
    samples, truth = randn(5, 9, 2), randn(5, 2, seed=1)
    expected = [[sum(float(samples[b, n, k]) < float(truth[b, k]) for n in range(9)) for k in range(2)]
                for b in range(5)]
    assert metrics.random_ranks(samples, truth, generator()).tolist() == expected


def test_ties_are_decided_at_random():
    # a truth equal to 3 of 4 samples, with one below: ranks 1 to 4, equally often
    samples = torch.tensor([[0.0, 1.0, 1.0, 1.0]], dtype=F64).expand(40000, 4)
    ranks = metrics.random_ranks(samples, torch.ones(40000, dtype=F64), generator())
    counts = torch.bincount(ranks, minlength=5)
    assert counts[0] == 0
    assert stats.chisquare(counts[1:].numpy()).pvalue > 0.001
    # coins: exact posterior of a discrete quantity; without random ties ranks would pile up
    coins = torch.randint(2, (20000, 11), generator=generator(1)).double()
    counts = torch.bincount(metrics.random_ranks(coins[:, 1:], coins[:, 0], generator(2)), minlength=11)
    assert stats.chisquare(counts.numpy()).pvalue > 0.001


@pytest.mark.parametrize(("count", "samples"), [(7, 3), (20, 9)])
def test_band_and_p_value_by_brute_force(count, samples):
    # every multinomial outcome for few, else simulation of the very definition in plain numpy
    draws = np.random.default_rng(0).integers(0, samples + 1, (20000, count))
    below = np.stack([(draws < k).sum(1) for k in range(1, samples + 1)], 1)
    share = np.arange(1, samples + 1) / (samples + 1)
    tails = np.minimum(stats.binom.cdf(below, count, share), stats.binom.sf(below - 1, count, share))
    gamma = 2 * tails.min(1)
    ranks = torch.from_numpy(draws[0])
    found = metrics.rank_test(ranks, samples, ALPHA)
    expected = (gamma <= gamma[0] * (1 + 1e-9)).mean()
    assert abs(found.p_value - expected) < 4 * math.sqrt(0.25 / 20000)
    # the function leaves the band just where the p-value is at most alpha
    lower, upper = (band.numpy() * count for band in metrics.ecdf_band(count, samples, ALPHA))
    outside = ((below < lower - 1e-9) | (below > upper + 1e-9)).any(1)
    size = metrics.rank_power(count, samples, ALPHA)
    assert abs(outside.mean() - size) < 4 * math.sqrt(ALPHA / 20000)
    assert size <= ALPHA
    for row in range(50):
        assert outside[row] == (metrics.rank_test(torch.from_numpy(draws[row]), samples).p_value <= ALPHA)


def test_band_by_full_enumeration():
    # three ranks among two samples: 27 outcomes, all probabilities by hand
    outcomes = np.stack(np.meshgrid(*[range(3)] * 3), -1).reshape(-1, 3)
    values = []
    for row in outcomes:
        below = [(row < k).sum() for k in (1, 2)]
        tails = [min(stats.binom.cdf(n, 3, k / 3), stats.binom.sf(n - 1, 3, k / 3)) for n, k in zip(below, (1, 2))]
        values.append(2 * min(tails))
    for row, value in zip(outcomes, values):
        expected = np.mean(np.array(values) <= value * (1 + 1e-9))
        assert metrics.rank_test(torch.from_numpy(row), 2).p_value == pytest.approx(expected, abs=1e-12)


def test_rank_test_keeps_its_level_and_its_power():
    # exact power against a wrong spread, against simulation
    count, samples, trials = 60, 19, 400
    truth = randn(trials, count)
    for spread, shift in ((1.0, 0.0), (0.6, 0.0), (1.7, 0.0), (1.0, 0.6)):
        drawn = shift + spread * randn(trials * count, samples, seed=1)
        ranks = metrics.random_ranks(drawn, truth.flatten(), generator())
        rejected = [metrics.rank_test(row, samples, ALPHA).p_value <= ALPHA for row in ranks.reshape(trials, count)]
        power = metrics.rank_power(count, samples, ALPHA, spread=spread, shift=shift)
        error = math.sqrt(max(power * (1 - power), 0.01) / trials)
        assert abs(np.mean(rejected) - power) < 3.5 * error
    assert metrics.rank_power(count, samples, ALPHA) == pytest.approx(0.05, abs=0.005)


def test_what_can_be_detected():
    narrow, wide = metrics.detectable_spread(100, 99)
    assert metrics.rank_power(100, 99, spread=narrow) == pytest.approx(0.8, abs=0.01)
    assert metrics.rank_power(100, 99, spread=wide) == pytest.approx(0.8, abs=0.01)
    shift = metrics.detectable_shift(100, 99)
    assert metrics.rank_power(100, 99, shift=shift) == pytest.approx(0.8, abs=0.01)
    assert metrics.detectable_spread(400, 99)[0] > narrow
    assert metrics.detectable_spread(400, 99)[1] < wide
    assert metrics.detectable_spread(2, 99, 0.001) == (0.0, math.inf)


def test_holm_by_hand():
    p = torch.tensor([0.04, 0.01, math.nan, 0.03, 0.8], dtype=F64)
    # ordered 0.01, 0.03, 0.04, 0.8 times 4, 3, 2, 1, then never less than the one before
    expected = torch.tensor([0.09, 0.04, math.nan, 0.09, 0.8], dtype=F64)
    torch.testing.assert_close(metrics.holm(p), expected, equal_nan=True)


# -- TARP, z-scores, coverage --------------------------------------------------------------------------------------


def test_tarp_by_hand():
    samples, truth, references = randn(6, 8, 3, 2), randn(6, 3, 2, seed=1), randn(6, 3, 2, seed=2)
    ranks = metrics.tarp_ranks(samples, truth, references, generator())
    for b in range(6):
        far = np.linalg.norm((truth[b] - references[b]).numpy())
        expected = sum(np.linalg.norm((samples[b, n] - references[b]).numpy()) < far for n in range(8))
        assert ranks[b] == expected
    levels = torch.linspace(0, 1, 11, dtype=F64)
    # as the published code has it: a histogram of rank / N, cumulated
    share = ranks.numpy() / 8
    expected = [np.mean(share < level) for level in levels.numpy()]
    np.testing.assert_allclose(metrics.tarp_curve(ranks, 8, levels).numpy(), expected)


def test_tarp_sees_what_ranks_of_pixels_do_not():
    # a posterior of two pixels with correlation 0.9; samples with the right margins and no correlation
    count, mix = 400, torch.linalg.cholesky(torch.tensor([[1.0, 0.9], [0.9, 1.0]], dtype=F64))
    truth, samples = randn(count, 2) @ mix.T, randn(count, 99, 2, seed=1)
    for pixel in range(2):
        ranks = metrics.random_ranks(samples[..., pixel], truth[:, pixel], generator())
        assert metrics.rank_test(ranks, 99).p_value > 0.001
    references = 0.5 * randn(count, 2, seed=2)
    wrong = metrics.rank_test(metrics.tarp_ranks(samples, truth, references, generator()), 99).p_value
    right = metrics.rank_test(metrics.tarp_ranks(samples @ mix.T, truth, references, generator()), 99).p_value
    assert wrong < 1e-4 < 0.01 < right


def test_z_scores_and_contraction():
    samples, truth, log_weights = randn(4, 7, 2), randn(4, 2, seed=1), randn(4, 7, seed=2)
    z = metrics.z_scores(samples, truth)
    torch.testing.assert_close(z, (samples.mean(1) - truth) / samples.std(1))
    w = log_weights.softmax(1)[..., None]
    mean = (w * samples).sum(1)
    whole = w + w.square() / (1 - w.square().sum(1, keepdim=True))
    std = (whole * (samples - mean[:, None]).square()).sum(1).sqrt()
    torch.testing.assert_close(metrics.z_scores(samples, truth, log_weights), (mean - truth) / std)
    shrunk = metrics.contraction(samples, torch.full((2,), 4.0, dtype=F64))
    torch.testing.assert_close(shrunk, 1 - samples.var(1) / 4)
    z = metrics.z_scores(randn(40000, 10), randn(40000, seed=1))
    expected = (1 + 1 / 10) * 9 / 7  # of sqrt(1 + 1/N) times Student's t
    assert abs(z.square().mean().item() - expected) < 4 * z.square().std().item() / 200


@pytest.mark.parametrize("count", [3, 20])
def test_spread_equals_skill_for_an_exact_posterior(count):
    # a skewed law, few samples: no Gaussian theory involved
    draws = torch.empty(20000, count + 1, 3, dtype=F64).exponential_(generator=generator())
    found = metrics.spread_skill(draws[:, 1:], draws[:, 0])
    ratio, error = found.ratio()
    assert abs(ratio - 1) < 4 * error
    assert error < 0.02
    narrow, error = metrics.spread_skill(1 + 0.5 * (draws[:, 1:] - 1), draws[:, 0]).ratio()
    assert narrow < 0.7
    # weights: draws from a wider law, weighted to the right one
    wide = 1.5 * randn(4000, 50)
    log_weights = -0.5 * wide.square() + 0.5 * wide.square() / 2.25
    ratio, error = metrics.spread_skill(wide, randn(4000, seed=1), log_weights).ratio()
    assert abs(ratio - 1) < 4 * error + 0.01


@pytest.mark.parametrize("count", [4, 99])
def test_coverage_curve_is_exact_at_any_level_and_with_ties(count):
    levels = [0.1, 0.37, 0.5, 0.9, 0.95]
    # pixels that are constant, coins and Gaussian
    draws = randn(3000, count + 1, 3)
    draws[..., 0] = 1.0
    draws[..., 1] = draws[..., 1].sign()
    ranks = metrics.random_ranks(draws[:, 1:], draws[:, 0], generator())
    pit = metrics.random_pit(ranks, count, generator(1))
    curve = metrics.coverage_curve(pit, levels)
    assert ((curve.coverage - curve.levels).abs() < 4 * curve.standard_error).all()
    assert stats.kstest(pit.flatten().numpy(), "uniform").pvalue > 0.001


def test_mean_test_is_students():
    values = randn(30)
    found, expected = metrics.mean_test(values, 0.2), stats.ttest_1samp(values.numpy(), 0.2)
    assert found.p_value == pytest.approx(expected.pvalue)
    assert found.standard_error == pytest.approx(float(values.std()) / math.sqrt(30))
    assert metrics.mean_test(torch.ones(4), 1.0).p_value == 1.0
    assert metrics.mean_test(torch.ones(4), 2.0).p_value == 0.0


def test_residual_chi_square_agrees_with_scipy():
    residual = 0.3 * randn(5, 4, 2, 3)
    found = metrics.residual_chi_square(residual, 0.3)
    statistic = (residual / 0.3).square().sum((2, 3))
    torch.testing.assert_close(found.statistic, statistic)
    np.testing.assert_allclose(found.p_value.numpy(), stats.chi2.sf(statistic.numpy(), 6), rtol=1e-10)
    observed = torch.tensor([[True, False, True], [True, True, False]])[None].expand(5, 2, 3)
    sigma = torch.linspace(0.1, 0.5, 5, dtype=F64)
    masked = metrics.residual_chi_square(residual, sigma, observed)
    statistic = ((residual / sigma[:, None, None, None]).square() * observed[:, None]).sum((2, 3))
    np.testing.assert_allclose(masked.p_value.numpy(), stats.chi2.sf(statistic.numpy(), 4), rtol=1e-10)
    assert masked.degrees[0].item() == 4


# -- highest density -------------------------------------------------------------------------------------------------


def test_highest_density_interval_by_hand():
    def shortest(ordered: np.ndarray, gaps: int) -> tuple[float, float]:
        start = int((ordered[gaps:] - ordered[:-gaps]).argmin())
        return ordered[start], ordered[start + gaps]

    for count, level in ((40, 0.8), (23, 0.3), (19, 0.9)):
        samples = randn(3, count, 2)
        low, high = metrics.highest_density_interval(samples, level)
        for b, k in itertools.product(range(3), range(2)):
            ordered = np.sort(samples[b, :, k].numpy())
            for gaps in range(1, count):  # the fewest with which enough of those left out are held by the others
                held = [a <= x <= z for i, x in enumerate(ordered) if gaps < count - 1
                        for a, z in [shortest(np.delete(ordered, i), gaps)]]
                if sum(held) >= level * (count + 1) - 1e-9 or gaps == count - 1:
                    break
            assert (low[b, k].item(), high[b, k].item()) == shortest(ordered, gaps)
    # weights: the quantiles at k / (n + 1), here of 20 samples among 25 without weight
    samples = randn(1, 45, 1)
    log_weights = torch.where(torch.arange(45) < 20, 0.0, -math.inf)[None]
    weighted = metrics.highest_density_interval(samples, 0.8, log_weights)
    torch.testing.assert_close(weighted, metrics.highest_density_interval(samples[:, :20], 0.8))


LAWS = {"normal": (lambda *s: randn(*s), torch.special.ndtr),
        "exponential": (lambda *s: torch.empty(*s, dtype=F64).exponential_(generator=generator()),
                        lambda v: 1 - (-v).exp())}


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize(("count", "slack"), [(20, 0.005), (50, 0.006), (200, 0.006)])
def test_highest_density_interval_holds_a_further_draw_with_its_level(law, count, slack):
    """Measured within .006 of .9; the shortest over a share of .9 of the samples held .84 to .88 of Gaussian draws."""
    draw, distribution = LAWS[law]
    low, high = metrics.highest_density_interval(draw(2000, count), 0.9)
    held = distribution(high) - distribution(low)
    assert abs(held.mean().item() - 0.9) < slack + 4 * held.std().item() / math.sqrt(len(held))


def test_highest_density_interval_is_the_shortest_of_a_skewed_law():
    draws = torch.empty(1, 100000, dtype=F64).exponential_(generator=generator())
    low, high = metrics.highest_density_interval(draws, 0.9)
    assert low.item() == pytest.approx(0.0, abs=0.02)
    assert high.item() == pytest.approx(math.log(10), abs=0.06)


# -- the triad ---------------------------------------------------------------------------------------------------------

# a conjugate Gaussian: x ~ N(0, 1) in each of 3 pixels, y = x + sigma e; posterior N(y / (1 + sigma^2), V)
SIGMA, REPETITIONS, SIMULATIONS, SAMPLES, PIXELS = 0.5, 200, 60, 39, 3
POSTERIORS = {"exact": (1.0, 0.0), "narrow": (0.5, 0.0), "wide": (2.0, 0.0), "biased": (1.0, 1.0)}
#: least share of repetitions in which each kind of error is found
POWER = {
    "rank": {"narrow": 0.95, "wide": 0.9, "biased": 0.99},
    "tarp": {"narrow": 0.95, "wide": 0.95, "biased": 0.6},
    "dispersion": {"narrow": 0.99, "wide": 0.99},
    "bias": {"biased": 0.99},
    "coverage": {"narrow": 0.99, "wide": 0.95},
    "spread_skill": {"narrow": 0.99, "wide": 0.99, "biased": 0.9},
    "z_scores": {"narrow": 0.99, "wide": 0.99, "biased": 0.95},
    "contraction": {"narrow": 0.99, "wide": 0.99},
    "highest_density": {"narrow": 0.99, "wide": 0.95, "biased": 0.95},
    "residual": {"wide": 0.99, "biased": 0.95},
}


def simulate(kind: str) -> dict[str, torch.Tensor]:
    """Samples of a posterior with the stated error, for all repetitions at once."""
    spread, shift = POSTERIORS[kind]
    total = REPETITIONS * SIMULATIONS
    truth = randn(total, PIXELS, seed=1)
    y = truth + SIGMA * randn(total, PIXELS, seed=2)
    std = SIGMA / math.sqrt(1 + SIGMA**2)
    mean = y / (1 + SIGMA**2)
    samples = mean[:, None] + std * (shift + spread * randn(total, SAMPLES, PIXELS, seed=3))
    return {"truth": truth, "samples": samples, "y": y, "mean": mean, "std": torch.tensor(std * spread, dtype=F64),
            "centre": mean + std * shift}


def p_values(kind: str) -> dict[str, torch.Tensor]:
    """P-values of each metric in each repetition."""
    case = simulate(kind)
    truth, samples = case["truth"], case["samples"]
    ranks = metrics.random_ranks(samples, truth, generator(4))
    pit = metrics.random_pit(ranks, SAMPLES, generator(5))
    tarp = metrics.tarp_ranks(samples, truth, randn(*truth.shape, seed=6), generator(7))
    # squared distances cancel out half of an error: the spread corrected for N, against the error of the mean
    found = metrics.spread_skill(samples, truth)
    excess = found.skill.square() - found.spread.square()
    # highest-density ranks: the density that the solver claims
    def density(x: torch.Tensor) -> torch.Tensor:
        centre = case["centre"] if x.ndim == 2 else case["centre"][:, None]
        return -0.5 * ((x - centre) / case["std"]).square().sum(-1)

    denser = torch.stack([metrics.highest_density_coverage(density(samples), density(truth), level)
                          for level in (0.5, 0.9)], 1).double()
    # the mean of N samples less the truth, over their standard deviation: (1 + 1/N) of a t variable's second moment
    z = metrics.z_scores(samples, truth).square() / ((1 + 1 / SAMPLES) * (SAMPLES - 1) / (SAMPLES - 3))
    shrunk = metrics.contraction(samples, torch.ones(PIXELS, dtype=F64))  # 1 - V for a prior variance of 1
    residual = (case["y"][:, None] - samples)[:, :1]
    chi = metrics.residual_chi_square(residual, SIGMA)
    p: dict[str, list[float]] = {key: [] for key in POWER}
    for r in range(REPETITIONS):
        part = slice(r * SIMULATIONS, (r + 1) * SIMULATIONS)
        p["rank"].append(metrics.rank_test(ranks[part, 0], SAMPLES).p_value)
        p["tarp"].append(metrics.rank_test(tarp[part], SAMPLES).p_value)
        p["dispersion"].append(metrics.mean_test((12 * (pit[part] - 0.5).square()).mean(1), 1.0).p_value)
        p["bias"].append(metrics.mean_test(pit[part].mean(1), 0.5).p_value)
        covered = ((pit[part] - 0.5).abs() <= 0.45).double().mean(1)
        p["coverage"].append(metrics.mean_test(covered, 0.9).p_value)
        p["spread_skill"].append(metrics.mean_test(excess[part], 0.0).p_value)
        p["z_scores"].append(metrics.mean_test(z[part].mean(1), 1.0).p_value)
        p["contraction"].append(metrics.mean_test(shrunk[part].mean(1), 1 / (1 + SIGMA**2)).p_value)
        p["highest_density"].append(metrics.mean_test(denser[part, 0], 0.5).p_value)
        # single samples of independent simulations: their chi-squares add up
        total = torch.special.gammaincc(chi.degrees[part].sum() / 2, chi.statistic[part].sum() / 2)
        p["residual"].append(2 * min(float(total), 1 - float(total)))
    return {key: torch.tensor(value, dtype=F64) for key, value in p.items()}


@pytest.fixture(scope="module")
def rejected() -> dict[str, dict[str, float]]:
    """Share of repetitions in which each metric rejects each posterior at 5%."""
    return {kind: {key: float((p <= ALPHA).double().mean()) for key, p in p_values(kind).items()}
            for kind in POSTERIORS}


@pytest.mark.parametrize("metric", list(POWER))
def test_an_exact_posterior_is_rejected_at_the_nominal_rate(metric, rejected):
    error = math.sqrt(ALPHA * (1 - ALPHA) / REPETITIONS)
    assert abs(rejected["exact"][metric] - ALPHA) < 3 * error


@pytest.mark.parametrize(("metric", "kind"), [(metric, kind) for metric, kinds in POWER.items() for kind in kinds])
def test_a_wrong_posterior_is_caught(metric, kind, rejected):
    assert rejected[kind][metric] >= POWER[metric][kind]


def test_highest_density_coverage_is_nominal():
    log_density, truth = randn(8000, 39).square().neg(), randn(8000, seed=1).square().neg()
    for level in (0.5, 0.9):
        share = metrics.highest_density_coverage(log_density, truth, level).double().mean().item()
        assert abs(share - level) < 4 * math.sqrt(level * (1 - level) / 8000)
    # weights that move N(0, 2^2) onto N(0, 1)
    wide = 2 * randn(4000, 400, seed=2)
    log_weights = -0.5 * wide.square() + 0.125 * wide.square()
    share = metrics.highest_density_coverage(-wide.square(), -randn(4000, seed=3).square(), 0.9, log_weights)
    assert abs(share.double().mean().item() - 0.9) < 4 * math.sqrt(0.09 / 4000) + 0.005


@pytest.mark.parametrize(("call", "message"), [
    (lambda: metrics.random_ranks(randn(3, 4), randn(4)), r"\(3, 4\).*\(4,\)"),
    (lambda: metrics.random_ranks(randn(3, 4), randn(3) * math.nan), "NaN"),
    (lambda: metrics.rank_test(torch.tensor([1, 12]), 9), "expected 0 to 9"),
    (lambda: metrics.rank_test(torch.tensor([[1]]), 9), "one quantity at a time"),
    (lambda: metrics.ecdf_band(0, 9), "at least 1"),
    (lambda: metrics.tarp_ranks(randn(3, 4, 2), randn(3, 2), randn(2)), "one reference image"),
    (lambda: metrics.residual_chi_square(randn(3, 4), 1.0), r"\(B, N, \*measurement_shape\)"),
    (lambda: metrics.residual_chi_square(randn(3, 4, 2), 0.0), "above 0"),
    (lambda: metrics.residual_chi_square(randn(3, 4, 2), 1.0, torch.ones(3, 3).bool()), "observed has shape"),
    (lambda: metrics.highest_density_interval(randn(2, 9), 90), "between 0 and 1"),
])
def test_errors_say_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_p_value_without_digits_is_printed_as_its_bound():
    found = metrics.rank_test(torch.zeros(500, dtype=torch.long), 99)
    assert found.p_value < 1e-10
    assert str(found) == "p < 1e-10"
    ranks = torch.arange(500) % 100
    assert str(metrics.rank_test(ranks, 99)) == f"p = {metrics.rank_test(ranks, 99).p_value:.2g}"
