"""Every metric with weights: of N, N / 8 and 1 effective samples it is the resampled law's, or NaN with a reason."""

from __future__ import annotations

import inspect
import math
import warnings
from pathlib import Path

import pytest
import torch

from invflow import Posterior, metrics
from invflow.posterior import FewSamplesWarning

F64 = torch.float64
COUNT = 400  # N; 50 of them are effective at N / 8


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def importance(observations: int, count: int, size: int, scale: float,
               seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws of N(0, scale^2 I) with the log weights that make them draws of N(0, I)."""
    z = randn(observations, count, size, seed=seed)
    return scale * z, 0.5 * (1 - scale**2) * z.square().sum(2)


def tempered(samples: torch.Tensor, size: float) -> torch.Tensor:
    """Log weights ``(B, N)``, towards the point (1, ..., 1), of this effective size up to a thousandth."""
    tilt = -(samples - 1).flatten(2).square().sum(2)
    low, high = torch.zeros(len(tilt), 1, dtype=F64), torch.full((len(tilt), 1), 1e6, dtype=F64)
    for _ in range(200):
        middle = 0.5 * (low + high)
        enough = 1 / (middle * tilt).softmax(1).square().sum(1, keepdim=True) > size
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    return low * tilt


def width(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    return (high - low).flatten(1).mean(1)


METRICS = {
    "crps": lambda x, y, w: metrics.crps(x, y, w).flatten(1).mean(1),
    "crps-law": lambda x, y, w: metrics.crps(x, y, w, fair=False).flatten(1).mean(1),
    "energy": metrics.energy_score,
    "patches": lambda x, y, w: metrics.patch_energy_score(x, y, w, size=2),
    "blocks": lambda x, y, w: metrics.crps(metrics.block_means(x, 2), metrics.block_means(y, 2), w).flatten(1).mean(1),
    "spread": lambda x, y, w: metrics.spread(x, w).square().flatten(1).mean(1),
    "z": lambda x, y, w: 1 / (1 + metrics.z_scores(x, y, w).abs().flatten(1).median(1).values),
    "contraction": lambda x, y, w: metrics.contraction(x, torch.ones_like(y[0]), w).flatten(1).mean(1),
    "spread-skill": lambda x, y, w: metrics.spread_skill(x, y, w).spread,
    "skill": lambda x, y, w: metrics.spread_skill(x, y, w).skill,
    "coverage": lambda x, y, w: metrics.coverage(x, y, 0.9, w).flatten(1).mean(1),
    "near-ink": lambda x, y, w: metrics.coverage_near_ink(x, y, 0.9, w),
    "interval": lambda x, y, w: width(*metrics.central_interval(x, 0.9, w)),
    "shortest": lambda x, y, w: width(*metrics.highest_density_interval(x, 0.9, w)),
    "region": lambda x, y, w: metrics.highest_density_coverage(
        -x.flatten(2).square().sum(2), -y.flatten(1).square().sum(1), 0.9, w),
    "nlpd": lambda x, y, w: metrics.nlpd(-0.5 * (x - y[:, None]).flatten(2).square().sum(2), w),
    "mmd": lambda x, y, w: metrics.mmd(x, OTHER.expand(len(x), *OTHER.shape), w, bandwidth=2.0),
    "sliced": lambda x, y, w: metrics.sliced_wasserstein(
        x, OTHER.expand(len(x), *OTHER.shape), projections=AXES, log_weights=w),
    "max-sliced": lambda x, y, w: metrics.max_sliced_wasserstein(
        x, OTHER.expand(len(x), *OTHER.shape), projections=AXES, steps=0, log_weights=w),
    "frechet": lambda x, y, w: torch.stack([metrics.frechet_distance(a.flatten(1), OTHER.flatten(1), v)
                                            for a, v in zip(x, w if w is not None else [None] * len(x))]),
    "floor": lambda x, y, w: metrics.floor_ratio(
        x, randn(len(x), 3 * x.shape[1], 1, 4, 4, seed=8), w, generator=torch.Generator().manual_seed(0)),
    "gap": lambda x, y, w: metrics.mean_gap(x, randn(len(x), 40, 1, 4, 4, seed=8), y, w),
}
AXES = torch.eye(16, dtype=F64).reshape(16, 1, 4, 4)
OTHER = 0.3 + randn(40, 1, 4, 4, seed=9)
#: what takes more effective samples than one, and says so
TAKES_MANY = {"coverage", "near-ink", "interval", "shortest", "region"}


@pytest.mark.filterwarnings("ignore:.*effective samples")
@pytest.mark.parametrize("name", METRICS)
def test_a_weighted_metric_is_that_of_the_resampled_law(name: str) -> None:
    metric, observations = METRICS[name], 12
    samples, truth = randn(observations, COUNT, 1, 4, 4), 0.5 + randn(observations, 1, 4, 4, seed=1)
    equal = metric(samples, truth, torch.full((observations, COUNT), 3.0, dtype=F64))
    torch.testing.assert_close(equal, metric(samples, truth, None))
    # 50 effective samples: the error is that of one set of 50 draws of the weighted law. Distances between plain laws
    # grow with the noise of fewer draws, so that of all 400
    log_weights = tempered(samples, COUNT / 8)
    count = COUNT if name in ("sliced", "max-sliced", "frechet", "floor") else COUNT // 8
    drawn = [Posterior(samples, log_weights).resample(count, generator=torch.Generator().manual_seed(seed)).samples
             for seed in range(12)]
    found = torch.stack([metric(x, truth, None) for x in drawn])
    value = metric(samples, truth, log_weights)
    # the squared discrepancy alone takes off what the weighted law itself errs, which resampled draws keep
    errors = 3 if name == "mmd" else 1
    assert float((value - found.mean(0)).mean().abs()) < errors * float(found.std(0).mean()), (value, found.mean(0))
    # one: nearly all weight on a single sample
    log_weights = tempered(samples, 1.0001)
    if name in TAKES_MANY:
        assert bool(metric(samples, truth, log_weights).isnan().all())
        with pytest.warns(UserWarning, match="effective samples, but 12 of 12 observations have fewer"):
            metric(samples, truth, log_weights)
        return
    point = samples.gather(1, log_weights.argmax(1)[:, None, None, None, None].expand(-1, COUNT, 1, 4, 4))
    torch.testing.assert_close(metric(samples, truth, log_weights), metric(point, truth, None), rtol=0.02, atol=0.05)


def test_precision_and_recall_and_the_classifier_refuse_one_effective_sample() -> None:
    x = randn(1, COUNT, 3)
    log_weights = tempered(x, 1.0001)
    with pytest.raises(ValueError, match="have a weight of at least"):
        metrics.precision_recall(x[0], randn(50, 3, seed=1), log_weights=log_weights[0])
    with pytest.warns(UserWarning, match="fewer than four effective samples"):
        found = metrics.classifier_two_sample_test(x, randn(1, 50, 3, seed=1), log_weights, steps=2)
    assert bool(found.accuracy.isnan().all())
    assert bool(found.p_value.isnan().all())
    # recall sees the law of the weights: samples around one point recall nobody, whatever else has weight 1e-30
    y = randn(200, 3, seed=2)
    narrow = metrics.precision_recall(x[0], y, log_weights=tempered(x, 8.0)[0])
    assert narrow.recall < 0.5 * metrics.precision_recall(x[0], y).recall


def test_samples_without_weight_cover_nothing() -> None:
    """64 draws with all weight on one: the law is a point, and no interval of it holds 97%."""
    samples, truth = randn(50, 64, 4), randn(50, 4, seed=1)
    log_weights = torch.full((50, 64), -math.inf, dtype=F64)
    log_weights[:, 5] = 0
    with pytest.warns(UserWarning, match="needs 19 effective samples, but 50 of 50"):
        assert bool(metrics.coverage(samples, truth, 0.9, log_weights).isnan().all())
    torch.testing.assert_close(metrics.crps(samples, truth, log_weights), (samples[:, 5] - truth).abs())
    # and what has next to no weight next to no say: the score is continuous there
    log_weights = torch.where(log_weights == 0, 0.0, -9.0)
    nearly = metrics.crps(samples, truth, log_weights) - (samples[:, 5] - truth).abs()
    assert float(nearly.abs().max()) < 0.1
    energy = metrics.energy_score(samples, truth, log_weights) - (samples[:, 5] - truth).norm(dim=1)
    assert float(energy.abs().max()) < 0.1
    assert float(metrics.spread(samples, log_weights).max()) < 0.4


def test_conformal_intervals_of_one_sample_hold_every_value() -> None:
    """All weight on one sample, which is no interval: its width would be what rounding left, times thousands."""
    samples, truth, log_weights = randn(60, 64, 4), randn(60, 4, seed=1), torch.zeros(60, 64, dtype=F64)
    equal = metrics.conformal_scale(samples[20:], truth[20:], 0.8)
    log_weights[:20, 1:] = -math.inf
    with pytest.warns(UserWarning, match="needs 9 effective samples, but 20 of 60 observations have fewer"):
        found = metrics.conformal_scale(samples, truth, 0.8, log_weights)
    assert bool((found.scale < equal.scale).all())  # those of the others may miss more often
    with pytest.warns(UserWarning, match="their intervals contain every value"):
        low, high = found.interval(samples[:30], log_weights[:30])
    assert bool((low[:20] == -torch.inf).all() & (high[:20] == torch.inf).all() & high[20:].isfinite().all())
    with pytest.warns(UserWarning, match="their intervals contain every value"):
        covered = found.covered(samples, truth, log_weights)
    assert float(covered.double().mean()) >= 0.8
    with pytest.warns(UserWarning, match="20 of 20 observations have fewer"):
        nothing = metrics.conformal_scale(samples[:20], truth[:20], 0.8, log_weights[:20])
    assert bool(nothing.scale.isnan().all())
    # and of many effective samples it is the scale of resampled draws
    log_weights = tempered(samples, 32.0)
    drawn = [Posterior(samples, log_weights).resample(32, generator=torch.Generator().manual_seed(seed)).samples
             for seed in range(8)]
    scales = torch.stack([metrics.conformal_scale(x, truth, 0.8, kind="average").scale for x in drawn])
    weighted = metrics.conformal_scale(samples, truth, 0.8, log_weights, kind="average").scale
    assert abs(float(weighted - scales.mean())) < 2 * float(scales.std()) + 0.02 * float(scales.mean())
    few = metrics.conformal_scale(samples[:, :5], truth, 0.8, torch.zeros(60, 5, dtype=F64))  # equal weights are none
    torch.testing.assert_close(few.scale, metrics.conformal_scale(samples[:, :5], truth, 0.8).scale)


def test_every_metric_of_weights_is_here() -> None:
    text = Path(__file__).read_text(encoding="utf-8")
    weighted = {name for name in metrics.__all__ if inspect.isfunction(getattr(metrics, name))
                and "log_weights" in inspect.signature(getattr(metrics, name)).parameters}
    assert len(weighted) > 20
    missing = {name for name in weighted if f"metrics.{name}(" not in text and f"metrics.{name}," not in text}
    assert not missing, f"no weights are tested of {sorted(missing)}"


def test_weighted_intervals_have_one_implementation() -> None:
    samples, log_weights = randn(3, 300, 2), randn(3, 300, seed=1)
    posterior = Posterior(samples, log_weights)
    for level in (0.5, 0.9):
        torch.testing.assert_close(metrics.central_interval(samples, level, log_weights), posterior.interval(level))
    torch.testing.assert_close(metrics.spread(samples, log_weights), posterior.std())
    intervals = metrics.conformal_scale(samples, randn(3, 2, seed=2), 0.5, log_weights)
    low, high = posterior.interval(0.5)
    ends = intervals.interval(posterior)
    torch.testing.assert_close(ends[1] - ends[0], intervals.scale * (high - low))


@pytest.mark.parametrize(("count", "level"), [(32, 0.9), (20, 0.5), (64, 0.9), (21, 0.9)])
def test_coverage_of_an_exact_posterior_is_nominal_at_any_number_of_samples(count: int, level: float) -> None:
    """A skewed law; the interpolated ends cover .9087 of Gaussian draws at 32 samples."""
    draws = torch.empty(40000, count + 1, 1, dtype=F64).exponential_(generator=torch.Generator().manual_seed(0))
    inside = metrics.coverage(draws[:, 1:], draws[:, 0], level)
    assert abs(float(inside.mean()) - level) < 4 * float(inside.std()) / 200
    # and of the ranks themselves: each of N + 1 places as often as any other
    places = torch.linspace(-1, 1, count, dtype=F64)[None, :, None].expand(count + 1, count, 1)
    truth = torch.linspace(-1 - 1 / (count - 1), 1 + 1 / (count - 1), count + 1, dtype=F64)[:, None]
    assert float(metrics.coverage(places, truth, level).mean()) == pytest.approx(level, abs=1e-6)
    assert metrics.coverage(torch.zeros(1, count, 1), torch.zeros(1, 1), level).item() == pytest.approx(level, abs=1e-6)


def test_weighted_coverage_is_nominal_and_conditional_on_enough_effective_samples() -> None:
    wide, log_weights = importance(20000, 100, 1, 2.0)
    truth = randn(20000, 1, seed=1)
    inside = metrics.coverage(wide, truth, 0.9, log_weights)
    assert abs(float(inside.mean()) - 0.9) < 4 * float(inside.std()) / math.sqrt(20000) + 0.004
    few = torch.where(torch.arange(40) < torch.tensor([[18], [19], [40]]), 0.0, -math.inf)
    with pytest.warns(UserWarning, match=r"1 of 3 observations have fewer \(18 at least\)"):
        value = metrics.coverage(randn(3, 40, 2), randn(3, 2), 0.9, few)
    assert value.isnan().all(1).tolist() == [True, False, False]
    torch.testing.assert_close(value[1], metrics.coverage(randn(3, 40, 2)[1:2, :19], randn(3, 2)[1:2])[0])
    with pytest.raises(ValueError, match="needs 19 samples"):
        metrics.coverage(randn(1, 10, 2), randn(1, 2), 0.9, few[:1, :10])


@pytest.mark.parametrize(("size", "scale", "count", "low", "high"), [
    (1, 2.0, 64, -0.01, 0.02), (10, 1.3, 64, -0.015, 0.01), (10, 1.95, 64, 0.0, 0.25), (10, 1.0, 20, -0.001, 0.001)])
def test_fair_scores_of_weighted_draws_are_those_of_the_target(size: int, scale: float, count: int, low: float,
                                                                  high: float) -> None:
    """Relative bias, with the truth integrated out: nearly none at many effective samples, never better at few.

    At scale 1.95 in ten dimensions 4 samples of 64 are effective; the divisor 1 - sum w^2 gives -.04 there.
    """
    x, log_weights = importance(1500, count, size, scale)
    truth = randn(1500, size, seed=1)
    exact = metrics.energy_score(randn(1500, 200, size, seed=2), truth)
    error = metrics.energy_score(x, truth, log_weights) - exact
    scale_of, mean, spread = float(exact.mean()), float(error.mean()), float(error.std()) / math.sqrt(1500)
    assert low - 4 * spread / scale_of < mean / scale_of < high + 4 * spread / scale_of


@pytest.mark.parametrize("scale", [1.3, 2.0])
def test_weighted_mmd_is_unbiased(scale: float) -> None:
    """Equal laws, 20 samples: the divisor 1 - sum w^2 would give -.0037 and -.0068."""
    x, log_weights = importance(20000, 20, 1, scale)
    value = metrics.mmd(x, randn(20000, 20, 1, seed=1), log_weights, bandwidth=0.8)
    assert abs(float(value.mean())) < 0.0005 + 4 * float(value.std()) / math.sqrt(20000)
    assert float(value.std()) / math.sqrt(20000) < 0.0005


# -- many samples --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("fair", [False, True])
def test_energy_score_of_a_subset_of_pairs_is_unbiased(weighted: bool, fair: bool) -> None:
    samples, truth = randn(2, 23, 3), randn(2, 3, seed=1)
    log_weights = randn(2, 23, seed=2) if weighted else None
    generator = torch.Generator().manual_seed(0)
    exact = metrics.energy_score(samples, truth, log_weights, fair=fair)
    state = generator.get_state()
    some = torch.stack([metrics.energy_score(samples, truth, log_weights, fair=fair, max_pairs=3 * 23,
                                             generator=generator) for _ in range(800)])
    assert bool(((some.mean(0) - exact).abs() < 4 * some.std(0) / math.sqrt(800)).all())
    assert bool((some.std(0) > 0).all())
    generator.set_state(state)
    assert torch.equal(metrics.energy_score(samples, truth, log_weights, fair=fair, generator=generator), exact)
    assert torch.equal(generator.get_state(), state)  # nothing is drawn where all pairs are taken


def test_energy_score_does_not_change_its_error_with_a_subset_of_pairs() -> None:
    samples, truth = randn(1, 1500, 20), randn(1, 20, seed=1)
    exact = metrics.energy_score(samples, truth, max_pairs=1500**2)
    some = metrics.energy_score(samples, truth, max_pairs=1500 * 100, generator=torch.Generator().manual_seed(0))
    distances = (samples[0] - truth).norm(dim=1)
    assert float((some - exact).abs()) < 0.1 * float(distances.std()) / math.sqrt(1500)


def test_pieces_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    samples, truth, log_weights = randn(3, 40, 2, 5), randn(3, 2, 5, seed=1), randn(3, 40, seed=2)

    def values() -> list[torch.Tensor]:
        return [f(samples, truth, w) for w in (None, log_weights)
                for f in (metrics.crps, lambda x, y, w: metrics.coverage(x, y, 0.5, w),
                          lambda x, y, w: metrics.spread(x, w),
                          lambda x, y, w: torch.stack(metrics.central_interval(x, 0.5, w)))]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = values()
        monkeypatch.setattr("invflow.metrics.quality._CRPS_VALUES", 70)
        monkeypatch.setattr("invflow._core.weighted.pieces.__defaults__", (70,))
        for a, b in zip(expected, values(), strict=True):
            torch.testing.assert_close(a, b, equal_nan=True)


# -- what a posterior says -------------------------------------------------------------------------------------------


def test_an_interval_wider_than_the_samples_is_said() -> None:
    posterior = Posterior(randn(2, 16, 3))
    with pytest.warns(FewSamplesWarning, match=r"^16 samples allow no interval above 88.2%: .* 0.99 needs 199"):
        low, high = posterior.interval(0.99)
    assert torch.equal(low, posterior.samples.amin(1))
    assert torch.equal(high, posterior.samples.amax(1))
    log_weights = torch.where(torch.arange(40) < torch.tensor([[2], [40]]), 0.0, -math.inf)
    few = r"^2 effective samples allow no interval above 33.3% \(1 of 2 observations have too few\)"
    with pytest.warns(UserWarning, match=few):
        Posterior(randn(2, 40, 3), log_weights).interval(0.9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Posterior(randn(2, 19, 3)).interval(0.9)
        Posterior(randn(2, 19, 3).float(), torch.full((2, 19), 5.0)).interval(0.9)
