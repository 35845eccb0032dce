"""Resampling, effective sample size, tempering, evidence and k-hat, against theory."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from invflow.smc import (
    RESAMPLERS,
    conditional_ess,
    count_distinct,
    effective_sample_size,
    log_mean_weight,
    next_temperature,
    pareto_k_hat,
    reliable_k_hat,
    scale_log,
)
from invflow.testing._tools import watch_global_seed

F64 = torch.float64
WEIGHTS = torch.tensor([0.05, 0.3, 0.0, 0.22, 0.33, 0.1], dtype=F64)
NAMES = sorted(RESAMPLERS)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=F64)


def copies(name: str, weights: Tensor, n: int, runs: int = 20_000, seed: int = 0) -> Tensor:
    """How often each particle was drawn, ``(runs, N)``."""
    index = RESAMPLERS[name](weights.expand(runs, -1), n, generator(seed))
    assert index.shape == (runs, n)
    assert index.dtype == torch.int64
    return torch.zeros(runs, weights.shape[-1], dtype=F64).scatter_add(1, index, torch.ones(runs, n, dtype=F64))


# -- resampling -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("n", [1, 7, 40])
def test_resampling_is_unbiased(name: str, n: int) -> None:
    drawn = copies(name, 3.0 * WEIGHTS, n)  # of any normalisation
    error = drawn.std(0) / math.sqrt(len(drawn))
    distance = (drawn.mean(0) - n * WEIGHTS).abs()
    assert bool((distance <= 4.5 * error + 1e-12).all())
    assert bool((drawn[:, 2] == 0).all())


@pytest.mark.parametrize("name", NAMES)
def test_number_of_copies_is_as_even_as_claimed(name: str) -> None:
    drawn, expected = copies(name, WEIGHTS, 7), 7 * WEIGHTS
    if name in ("systematic", "ssp"):
        assert bool(((drawn - expected).abs() < 1).all())
    elif name == "residual":
        assert bool((drawn >= expected.floor()).all())
    elif name == "stratified":
        assert bool(((drawn - expected).abs() < 2).all())
    else:
        variance = expected * (1 - WEIGHTS)
        assert torch.allclose(drawn.var(0), variance, rtol=5 * math.sqrt(2 / len(drawn)) * 1.5)


@pytest.mark.parametrize("name", ["stratified", "systematic", "residual", "ssp"])
def test_variance_is_below_that_of_multinomial_draws(name: str) -> None:
    """Variance of a resampled mean, for values in no particular order (Douc, Cappe, Moulines 2005)."""
    weights, values = randn(30, seed=1).softmax(0), randn(30, seed=2)
    n, runs = 30, 5000
    multinomial = float((weights * values.square()).sum() - (weights @ values) ** 2) / n
    variance = float((copies(name, weights, n, runs) @ values / n).var())
    assert variance < 0.8 * multinomial
    assert float((copies("multinomial", weights, n, runs) @ values / n).var()) == pytest.approx(
        multinomial, rel=5 * math.sqrt(2 / runs))


@pytest.mark.parametrize("name", ["stratified", "systematic", "residual", "ssp"])
@pytest.mark.parametrize("count", [1, 49, 64, 1000])
def test_equal_weights_keep_every_particle(name: str, count: int) -> None:
    weights = torch.full((2, count), 1 / count, dtype=torch.float32)
    assert torch.equal(RESAMPLERS[name](weights, count, generator()).sort(1).values,
                       torch.arange(count).expand(2, -1))


@pytest.mark.parametrize("name", NAMES)
def test_a_single_particle_with_weight_takes_all(name: str) -> None:
    weights = torch.zeros(3, 5)
    weights[[0, 1, 2], [0, 2, 4]] = 1e-30
    index = RESAMPLERS[name](weights, 6, generator())
    assert torch.equal(index, torch.tensor([0, 2, 4])[:, None].expand(3, 6))


@pytest.mark.parametrize("name", NAMES)
def test_observations_are_resampled_on_their_own(name: str) -> None:
    weights = randn(3, 20).softmax(1)
    other = weights.clone()
    other[2] = 0.05
    with watch_global_seed(name):
        first = RESAMPLERS[name](weights, 15, generator(4))
    second = RESAMPLERS[name](other, 15, generator(4))
    assert torch.equal(first[:2], second[:2])
    assert not torch.equal(first[0], first[1])


@pytest.mark.parametrize("name", NAMES)
def test_resampling_refuses(name: str) -> None:
    resample = RESAMPLERS[name]
    with pytest.raises(ValueError, match=r"weights\[None\]"):
        resample(WEIGHTS, 3, None)
    with pytest.raises(ValueError, match="n=0"):
        resample(WEIGHTS[None], 0, None)
    for bad in (-1.0, torch.nan, torch.inf):
        with pytest.raises(ValueError, match=r"observation 1.*softmax"):
            resample(torch.tensor([[0.5, 0.5], [bad, 2.0]]), 3, None)
    with pytest.raises(ValueError, match="observation 0"):
        resample(torch.zeros(1, 4), 3, None)


# -- effective sample size and evidence ---------------------------------------------------------------------


def test_effective_sample_size() -> None:
    log_weights = torch.full((3, 10), 700.0)
    log_weights[1, 4:] = -torch.inf
    log_weights[2] = -torch.inf
    torch.testing.assert_close(effective_sample_size(log_weights), torch.tensor([10.0, 4.0, 0.0], dtype=F64))
    weights = randn(1, 50).exp()
    expected = weights.sum(1).square() / weights.square().sum(1)
    torch.testing.assert_close(effective_sample_size(weights.log() - 1e4), expected, rtol=1e-9, atol=0)


def test_conditional_effective_sample_size() -> None:
    weights, increments = randn(4, 50).softmax(1), randn(4, 50, seed=1).exp()
    expected = 50 * (weights * increments).sum(1).square() / (weights * increments.square()).sum(1)
    value = conditional_ess(weights.log() + 3, increments.log())
    torch.testing.assert_close(value, expected)
    equal = conditional_ess(torch.zeros(4, 50), increments.log())
    torch.testing.assert_close(equal, effective_sample_size(increments.log()))


def test_log_evidence_adds_up_over_steps() -> None:
    """Without resampling, two steps are one: mean(w1 w2) = mean(w1) * weighted mean(w2)."""
    first, second, none = randn(3, 40), 5 * randn(3, 40, seed=1), torch.zeros(3, 40)
    total = log_mean_weight(none, first) + log_mean_weight(first, second)
    expected = (first + second).logsumexp(1) - math.log(40)
    torch.testing.assert_close(total, expected)


def test_count_distinct() -> None:
    assert count_distinct(torch.tensor([[3, 1, 3, 1], [0, 0, 0, 0], [3, 2, 1, 0]])).tolist() == [2, 1, 4]


# -- tempering -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.95])
@pytest.mark.parametrize("weighted", [False, True])
def test_tempering_hits_its_target(threshold: float, weighted: bool) -> None:
    scale = torch.tensor([1e9, 1e3, 100.0, 1e-3], dtype=F64)[:, None]
    log_ratio = -scale * randn(4, 300).square()
    log_weights = randn(4, 300, seed=2) if weighted else torch.zeros(4, 300)
    start = torch.tensor([0.0, 0.01, 0.3, 0.5], dtype=F64)
    end = next_temperature(log_ratio, start, threshold, log_weights if weighted else None)
    share = conditional_ess(log_weights, (end - start)[:, None] * log_ratio) / 300
    torch.testing.assert_close(share[:3], torch.full((3,), threshold, dtype=F64), rtol=1e-6, atol=0)
    assert bool((end > start).all())
    assert float(end[3]) == 1.0
    assert float(share[3]) > threshold


def test_tempering_counts_only_particles_that_can_survive() -> None:
    log_ratio = -20 * randn(1, 400).square()
    dead = torch.cat([log_ratio, torch.full_like(log_ratio, -torch.inf)], dim=1)
    zero = torch.zeros(1, dtype=F64)
    torch.testing.assert_close(next_temperature(dead, zero, 0.5), next_temperature(log_ratio, zero, 0.5))
    assert torch.equal(scale_log(torch.zeros(1, 1), torch.full((1, 2), -torch.inf)), torch.zeros(1, 2))


def test_tempering_always_moves_on() -> None:
    """One particle in a thousand that is far better than the others: no step keeps half of them."""
    log_ratio = torch.full((1, 1000), -1e30, dtype=F64)
    log_ratio[0, 0] = 0.0
    start = torch.tensor([0.5], dtype=F64)
    assert float(next_temperature(log_ratio, start, 0.5)) > 0.5
    assert float(next_temperature(log_ratio, torch.ones(1, dtype=F64), 0.5)) == 1.0


# -- the tail of the weights ----------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [-1.0, 0.0, 0.3, 0.7, 1.0, 1.5])
def test_k_hat_of_a_known_tail(k: float) -> None:
    """Uniform, exponential and Pareto weights: what exceeds a threshold is generalised Pareto with index k."""
    runs, count = 300, 2000
    uniform = torch.rand(runs, count, generator=generator(), dtype=F64)
    weights = {-1.0: uniform, 0.0: -uniform.log()}.get(k, uniform ** -k)
    k_hat = pareto_k_hat(weights.log() + 50)
    tail = math.ceil(3 * math.sqrt(count))
    expected = (tail * k + 5) / (tail + 10)  # the weak prior at 0.5
    # the estimator's own bias is O(1 / tail)
    assert abs(float(k_hat.mean()) - expected) < 4 * float(k_hat.std()) / math.sqrt(runs) + 2.5 / tail
    # the standard error of an efficient estimate of k > -1/2 is (1 + k) / sqrt(tail)
    if k >= 0:
        assert float(k_hat.std()) == pytest.approx((1 + k) / math.sqrt(tail) * tail / (tail + 10), rel=0.3)


def test_k_hat_has_no_scale_and_works_on_rows() -> None:
    log_weights = 2 * randn(3, 500)
    together = pareto_k_hat(log_weights)
    torch.testing.assert_close(together, pareto_k_hat(log_weights - 1e5), rtol=1e-6, atol=1e-6)
    alone = torch.cat([pareto_k_hat(row[None]) for row in log_weights])
    torch.testing.assert_close(together, alone)


def test_k_hat_where_there_is_no_tail() -> None:
    assert float(pareto_k_hat(torch.zeros(1, 100))) == 0.0
    assert bool(pareto_k_hat(torch.zeros(2, 20)).isnan().all())
    one = torch.full((1, 100), -torch.inf)
    one[0, 3] = 0.0
    assert float(pareto_k_hat(one)) == torch.inf
    two_values = torch.cat([torch.zeros(1, 30), torch.full((1, 70), -3.0)], dim=1)
    assert float(pareto_k_hat(two_values)) == 0.0
    # a bounded reward that most particles reach: three weights a little over hundreds of equal ones are no tail
    saturated = torch.zeros(1, 400)
    saturated[0, :3] = 0.1
    assert float(pareto_k_hat(saturated)) == 0.0
    saturated[0, 0] = 5.0  # one weight of a hundred and fifty among them is a quarter of all
    assert float(pareto_k_hat(saturated)) == torch.inf
    assert float(pareto_k_hat(-1e4 * torch.arange(100)[None])) > 1
    assert reliable_k_hat(100) == pytest.approx(0.5)
    assert reliable_k_hat(10**6) == 0.7
