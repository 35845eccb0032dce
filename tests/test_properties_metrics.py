"""Properties of the metrics: invariance to order, correct units, weights as repetitions, unbiased fair estimates."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import strategies as st
from property_tools import assert_near, generator, property_test, seeds, tensor
from torch import Tensor

from invflow import metrics as M

sizes = {"seed": seeds, "b": st.integers(1, 3), "n": st.integers(2, 7), "d": st.integers(1, 3)}
scales = st.sampled_from([-3.0, 0.5, 2.0])  # exact in binary, so that no rounding decides an order


def _sets(seed: int, b: int, n: int, d: int) -> tuple[Tensor, Tensor]:
    """Samples ``(B, N, d)`` and truth ``(B, d)``."""
    return tensor(seed, b, n, d), tensor(seed + 1, b, d)


def _order(seed: int, n: int) -> Tensor:
    return torch.randperm(n, generator=generator(seed))


#: scores of samples against a truth, and the power of a scale that they go with
SCORES: dict[str, tuple[Callable[..., Tensor], int]] = {
    "crps": (M.crps, 1), "crps-unfair": (lambda s, t, w=None: M.crps(s, t, w, fair=False), 1),
    "energy": (M.energy_score, 1), "energy-unfair": (lambda s, t, w=None: M.energy_score(s, t, w, fair=False), 1),
    "spread": (lambda s, t, w=None: M.spread(s, w), 1),
    "coverage": (lambda s, t, w=None: M.coverage(s, t, 0.6, w), 0),
    "z": (lambda s, t, w=None: M.z_scores(s, t, w).abs(), 0),
    "contraction": (lambda s, t, w=None: M.contraction(s, torch.full_like(t[0], 2.0), w) - 1, 2),
    "spread-skill": (lambda s, t, w=None: torch.stack(M.spread_skill(s, t, w)[:2]), 1),
}


@pytest.mark.parametrize("name", SCORES)
def test_scores_know_neither_order_nor_units(name: str) -> None:
    metric, power = SCORES[name]

    @property_test(8, **sizes, scale=scales)
    def test_score(seed: int, b: int, n: int, d: int, scale: float) -> None:
        n = n + 3 if name == "coverage" else n  # an interval takes some
        samples, truth = _sets(seed, b, n, d)
        log_weights = 0.2 * tensor(seed + 2, b, n)
        order = _order(seed, n)
        for weights in (None, log_weights):
            value = metric(samples, truth, weights)
            shuffled = None if weights is None else weights[:, order]
            assert_near(metric(samples[:, order], truth, shuffled), value, 1e-9)
            moved = metric(scale * samples + 4, scale * truth + 4, weights)
            assert_near(moved, abs(scale) ** power * value, 1e-9)
        assert_near(metric(samples, truth, torch.full((b, n), 3.0)), metric(samples, truth), 1e-9)

    test_score()


@property_test(8, **sizes, counts=st.lists(st.integers(0, 3), min_size=7, max_size=7))
def test_weights_are_repetitions(seed: int, b: int, n: int, d: int, counts: list[int]) -> None:
    """Only the unfair forms: the fair forms assume independent draws, and repeated draws are not independent."""
    samples, truth = _sets(seed, b, n, d)
    often = torch.tensor([1, *counts])[:n]
    repeated, weights = samples.repeat_interleave(often, 1), often.double().log().expand(b, n)
    for metric in (SCORES["crps-unfair"][0], SCORES["energy-unfair"][0]):
        assert_near(metric(repeated, truth), metric(samples, truth, weights), 1e-9)
    level = tensor(seed + 3, b, n)
    assert_near(M.nlpd(level.repeat_interleave(often, 1)), M.nlpd(level, weights), 1e-9)
    other, directions = tensor(seed + 4, b, 5, d), tensor(seed + 5, 4, d)
    for p in (1, 2):
        pair = (M.sliced_wasserstein(repeated, other, p, projections=directions),
                M.sliced_wasserstein(samples, other, p, projections=directions, log_weights=weights))
        assert_near(*pair, 1e-7)


@property_test(6, seed=seeds, k=st.integers(2, 4), n=st.integers(2, 3))
def test_fair_scores_are_unbiased_whatever_the_number_of_samples(seed: int, k: int, n: int) -> None:
    """All samples of n points of a law on k points, each by its probability: the mean is the score of the law."""
    points, truth = tensor(seed, k, 2), tensor(seed + 1, 1, 2)
    law = tensor(seed + 2, k).softmax(0)
    index = torch.tensor(list(itertools.product(range(k), repeat=n)))
    probability = law[index].prod(1)
    for fair, whole in ((M.crps, SCORES["crps-unfair"][0]), (M.energy_score, SCORES["energy-unfair"][0])):
        scores = fair(points[index], truth.expand(len(index), 2))
        mean = torch.einsum("i,i...->...", probability, scores)
        assert_near(mean, whole(points[None], truth, law.log()[None])[0], 1e-9)
    # and the squared maximum mean discrepancy, of two points against the law of n
    y, bandwidth = tensor(seed + 3, 1, 2, 2), 1.3
    squared = M.mmd(points[index], y.expand(len(index), 2, 2), bandwidth=bandwidth)
    kernel = torch.exp(-0.5 * (torch.cdist(points, points) / bandwidth).square())
    across = torch.exp(-0.5 * (torch.cdist(points, y[0]) / bandwidth).square()).mean(1)
    inside = torch.exp(-0.5 * (torch.cdist(y[0], y[0]) / bandwidth).square())[0, 1]
    assert_near(probability @ squared, law @ kernel @ law - 2 * law @ across + inside, 1e-9)


PAIRS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], int]] = {
    "mmd": (lambda x, y: M.mmd(x, y), 0), "median": (M.median_distance, 1), "mmd-root": (M.mmd_root, 0),
    "sliced": (lambda x, y: M.sliced_wasserstein(x, y, projections=torch.eye(x.shape[2], dtype=x.dtype)), 1),
    "sliced-2": (lambda x, y: M.sliced_wasserstein(x, y, 2, projections=torch.eye(x.shape[2], dtype=x.dtype)), 1),
    "max-sliced": (lambda x, y: M.max_sliced_wasserstein(
        x, y, projections=torch.eye(x.shape[2], dtype=x.dtype), steps=3), 1),
    "frechet": (lambda x, y: torch.stack([M.frechet_distance(a, b) for a, b in zip(x, y)]), 2),
    "precision": (lambda x, y: torch.tensor([sorted(M.precision_recall(a, b, k=1)) for a, b in zip(x, y)]), 0),
}


@pytest.mark.parametrize("name", PAIRS)
def test_distances_know_neither_order_nor_side(name: str) -> None:
    metric, power = PAIRS[name]

    @property_test(6, **sizes, m=st.integers(3, 6), scale=scales)
    def test_distance(seed: int, b: int, n: int, d: int, m: int, scale: float) -> None:
        x, y = tensor(seed, b, n + 1, d), tensor(seed + 1, b, m, d) + 0.3
        value = metric(x, y)
        loose = 1e-6 if name in ("frechet", "max-sliced") else 1e-9  # a root of eigenvalues near 0; an ascent
        assert_near(metric(x[:, _order(seed, n + 1)], y), value, loose)
        assert_near(metric(y, x), value, loose)
        # those without units have a bandwidth of the data's own: all but the published variant
        if name != "mmd-root":
            assert_near(metric(scale * x - 2, scale * y - 2), abs(scale) ** power * value, loose, value)
        if name not in ("mmd", "precision", "median", "mmd-root"):
            assert_near(metric(x, x), torch.zeros_like(value), 1e-7, value)

    test_distance()


@property_test(8, **sizes, level=st.floats(0.2, 0.8), scale=scales)
def test_intervals_move_with_the_samples(seed: int, b: int, n: int, d: int, level: float, scale: float) -> None:
    b, n = b + 4, n + 9
    samples, truth = _sets(seed, b, n, d)
    order = _order(seed, n)
    for interval in (M.central_interval, M.highest_density_interval):
        low, high = interval(samples, level)
        assert bool((low <= high).all())
        for value, same in zip(interval(samples[:, order], level), (low, high)):
            assert_near(value, same, 1e-9)
        if interval is M.central_interval or scale > 0:  # of two shortest intervals the lower is taken
            moved = sorted(interval(scale * samples + 4, level), key=lambda v: float(v.sum()))
            for value, same in zip(moved, sorted((scale * low + 4, scale * high + 4), key=lambda v: float(v.sum()))):
                assert_near(value, same, 1e-9)
    density, own = samples[..., 0], truth[:, 0]
    inside = M.highest_density_coverage(density, own, level)
    assert torch.equal(M.highest_density_coverage(density[:, order] + 3, own + 3, level), inside)
    scale_of = M.conformal_scale(samples, truth, level, kind="image")
    assert_near(scale_of.scale, M.conformal_scale(samples[:, order], truth, level, kind="image").scale, 1e-9)


@property_test(6, seed=seeds, b=st.integers(1, 3), n=st.integers(4, 9), side=st.integers(3, 6), scale=scales)
def test_regions_know_neither_order_nor_units(seed: int, b: int, n: int, side: int, scale: float) -> None:
    samples, truth = tensor(seed, b, n, 1, side, side), tensor(seed + 1, b, 1, side, side)
    order, weights = _order(seed, n), tensor(seed + 2, b, n)
    value = M.patch_energy_score(samples, truth, weights, size=2)
    assert_near(M.patch_energy_score(samples[:, order], truth, weights[:, order], size=2), value, 1e-9)
    assert_near(M.patch_energy_score(scale * samples + 4, scale * truth + 4, weights, size=2), abs(scale) * value, 1e-9)
    assert_near(M.block_means(scale * samples + 4, 2), scale * M.block_means(samples, 2) + 4, 1e-12)
    assert_near(M.block_means(samples, 1), samples, 1e-12)
    near = M.near_ink(truth, 0.1, 1)
    assert bool((M.near_ink(truth + 0.2, 0.1, 1) >= near).all())
    assert torch.equal(M.near_ink(truth.flip(-1), 0.1, 1), near.flip(-1))
    inside = M.coverage_near_ink(samples, truth, 0.4, threshold=-9.0)
    assert_near(inside, M.coverage(samples, truth, 0.4).flatten(1).mean(1), 1e-9)


@property_test(8, **sizes)
def test_ranks_know_the_order_of_values_alone(seed: int, b: int, n: int, d: int) -> None:
    samples, truth = _sets(seed, b, n, d)
    ranks = M.random_ranks(samples, truth, generator(0))
    assert torch.equal(ranks, (samples < truth[:, None]).sum(1))
    assert torch.equal(M.random_ranks(samples.exp()[:, _order(seed, n)], truth.exp(), generator(1)), ranks)
    assert torch.equal(M.random_ranks(-samples, -truth, generator(1)), n - ranks)
    pit = M.random_pit(ranks, n, generator(2))
    assert bool(((pit * (n + 1)).floor() == ranks).all())
    references = tensor(seed + 3, b, d)
    near = M.tarp_ranks(samples, truth, references, generator(3))
    turn = torch.linalg.qr(tensor(seed + 4, d, d))[0]
    turned = M.tarp_ranks(samples[:, _order(seed, n)] @ turn + 1, truth @ turn + 1, references @ turn + 1, generator(3))
    assert torch.equal(near, turned)
    levels = torch.linspace(0, 1, 5)
    assert torch.equal(M.tarp_curve(near, n, levels), M.tarp_curve(near.flip(0), n, levels))
    many = torch.randint(n + 1, (20,), generator=generator(seed))
    first, second = M.rank_test(many, n), M.rank_test(many[_order(seed, 20)], n)
    assert first.p_value == second.p_value
    curve = M.coverage_curve(M.random_pit(many, n, generator(4))[:, None], [0.5, 0.9]).coverage
    assert bool((curve.diff() >= 0).all())


@property_test(8, seed=seeds, n=st.integers(2, 9))
def test_tests_of_means_and_many_p_values(seed: int, n: int) -> None:
    p = tensor(seed, n).sigmoid()
    order = _order(seed, n)
    adjusted = M.holm(p)
    assert_near(M.holm(p[order]), adjusted[order], 1e-12)
    assert bool((adjusted >= p).all())
    assert bool((adjusted <= 1).all())
    values = tensor(seed + 1, n)
    one, two = M.mean_test(values, 0.4), M.mean_test(-2 * values[order], -0.8)
    assert one.p_value == pytest.approx(two.p_value, rel=1e-9)
    residual = tensor(seed + 2, n, 2, 4)
    first, second = M.residual_chi_square(residual, 0.5), M.residual_chi_square(-3 * residual, 1.5)
    assert_near(first.statistic, second.statistic, 1e-12)
    assert_near(first.p_value, second.p_value, 1e-9)
    low, high = M.ecdf_band(n, 5)
    assert bool((low <= high).all())


@property_test(6, seed=seeds, n=st.integers(1, 3), c=st.sampled_from([1, 3]), side=st.integers(11, 14))
def test_image_quality_goes_with_the_range(seed: int, n: int, c: int, side: int) -> None:
    x, truth = tensor(seed, n, c, side, side).sigmoid(), tensor(seed + 1, n, c, side, side).sigmoid()
    for metric in (M.psnr, M.ssim):
        value = metric(x, truth)
        assert_near(metric(4 * x, 4 * truth, 4.0), value, 1e-9)
        assert_near(metric(truth, x), value, 1e-9)
        assert_near(metric(x.flip(-1), truth.flip(-1)), value, 1e-9)
        assert bool((metric(x, 0.9 * x + 0.1 * truth) >= value).all())
    mean, std = tensor(seed, n, 2), tensor(seed + 1, n, 2).exp()
    at = tensor(seed + 2, n, 2)
    assert_near(M.gaussian_crps(-2 * mean + 1, 2 * std, -2 * at + 1), 2 * M.gaussian_crps(mean, std, at), 1e-12)
    assert_near(M.gaussian_crps(mean, 0 * std, at), (at - mean).abs(), 1e-12)


@property_test(4, seed=seeds, b=st.integers(1, 3), n=st.integers(1, 6))
def test_nlpd_is_a_mean_of_densities(seed: int, b: int, n: int) -> None:
    level, weights = tensor(seed, b, n), tensor(seed + 1, b, n)
    order = _order(seed, n)
    assert_near(M.nlpd(level[:, order] + 5, weights[:, order]), M.nlpd(level, weights) - 5, 1e-12)


@property_test(4, seed=seeds, b=st.integers(1, 3), n=st.integers(2, 6), d=st.integers(1, 4))
def test_distances_to_the_exact_posterior_do_not_depend_on_the_order(seed: int, b: int, n: int, d: int) -> None:
    samples, exact, truth = tensor(seed, b, n, d), tensor(seed + 1, b, 3 * n, d), tensor(seed + 2, b, d)
    weights, order = tensor(seed + 3, b, n), _order(seed, n)
    ratio = [M.floor_ratio(x, exact, w, generator=generator(seed))
             for x, w in ((samples, weights), (samples[:, order], weights[:, order]))]
    assert_near(ratio[1], ratio[0], 1e-9)
    assert_near(M.floor_ratio(2 * samples, 2 * exact, weights, generator=generator(seed)), ratio[0], 1e-9)
    gap = M.mean_gap(samples, exact, truth, weights)
    assert_near(M.mean_gap(samples[:, order], exact, truth, weights[:, order]), gap, 1e-9)
    assert_near(M.mean_gap(3 * samples, 3 * exact, 3 * truth, weights), gap, 1e-9)


#: of networks whose weights are not here, of a trained classifier, of a likelihood's replicates, and of sizes of
#: simulations alone
ELSEWHERE = {"inception_features", "lpips", "classifier_features", "classifier_two_sample_test", "rank_power",
             "detectable_shift", "detectable_spread", "vgg_features", "predictive_check"}


def test_every_metric_is_here_or_elsewhere() -> None:
    text = inspect.getsource(inspect.getmodule(_sets))  # type: ignore[arg-type]
    functions = {name for name in M.__all__ if inspect.isfunction(getattr(M, name))}
    missing = {name for name in functions - ELSEWHERE if f"M.{name}" not in text}
    assert not missing, f"no property is tested of {sorted(missing)}"
