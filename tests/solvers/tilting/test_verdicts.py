"""Verdicts on weights along the path: bad runs that even weights at the end would hide, and good runs."""

from __future__ import annotations

import dataclasses
import math
import warnings
from typing import Any

import pytest
import torch
from tilting_models import Gaussian, Tilt

from invflow import FMTT, ExactPosterior, FunctionReward, GaussianLikelihood, GaussianMixtureFlow, NoiseSMC
from invflow.operators import MatrixOperator
from invflow.reward import RepeatedReward
from invflow.smc import effective_sample_size, pareto_k_hat
from invflow.solvers.noise.convergence import judge
from invflow.solvers.tilting.particles import FMTTState
from invflow.solvers.tilting.record import PathRecord

F64 = torch.float64


def state(step: int, log_weights: torch.Tensor, resampled: bool) -> FMTTState:
    count, none = log_weights.shape[1], torch.zeros(len(log_weights))
    return FMTTState(step, step / 3, log_weights[..., None], log_weights, torch.zeros_like(log_weights),
                     torch.zeros_like(log_weights), torch.arange(count).expand_as(log_weights), none.double(),
                     torch.full_like(none, resampled, dtype=torch.bool), none,
                     torch.zeros_like(log_weights, dtype=torch.bool))


def verdict(*path: torch.Tensor) -> dict[str, Any]:
    record = PathRecord()
    for step, log_weights in enumerate(path):
        record.add(state(step, log_weights, step > 0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return record.finish(state(len(path) - 1, path[-1], True), "FMTT")


def pareto(index: float, *, count: int = 1000) -> torch.Tensor:
    """Log weights that have 1 / index moments, two observations."""
    uniform = torch.rand(2, count, generator=torch.Generator().manual_seed(0), dtype=F64)
    return -index * uniform.log()


def test_a_heavy_tail_on_the_way_is_not_forgotten() -> None:
    even = torch.zeros(2, 1000, dtype=F64)
    assert verdict(even, even, even)["converged"].tolist() == [True, True]
    assert verdict(even, pareto(0.3), even)["converged"].tolist() == [True, True]
    found = verdict(even, pareto(1.5), even)
    assert found["converged"].tolist() == [False, False]
    assert float(found["k_hat"].max()) == 0.0  # the last weights know nothing of it
    assert float(found["k_hat_path"][:, 1].min()) > 1


def test_nearly_even_weights_are_never_called_heavy() -> None:
    """Over 956 of 1,000 effective, with a tail of k-hat 0.9 on top of weights that are equal."""
    uniform = torch.rand(1, 1000, generator=torch.Generator().manual_seed(0), dtype=F64)
    log_weights = (0.004 / uniform).log1p()
    assert float(effective_sample_size(log_weights)) > 956
    assert float(pareto_k_hat(log_weights)) > 0.9
    found = verdict(log_weights, log_weights)
    assert bool(found["k_hat_path"].isnan().all())
    assert found["converged"].tolist() == [True]
    weighed = {"k_hat": pareto_k_hat(log_weights), "least_ess": effective_sample_size(log_weights)}
    assert judge(weighed, FunctionReward(lambda x: x), 1000, moved=False)[0].tolist() == [True]
    heavy = {**weighed, "least_ess": torch.tensor([600.0])}
    assert judge(heavy, FunctionReward(lambda x: x), 1000, moved=False)[0].tolist() == [False]


def test_copies_of_a_few_are_no_independent_particles() -> None:
    """Even weights and 400 ancestors, of which one has three tenths of all descendants: as good as eleven particles."""
    ancestors = torch.arange(1000).clamp(max=700).expand(2, -1).clone()
    ancestors[1] = torch.arange(1000) // 2
    log_weights = torch.zeros(2, 1000, dtype=F64)
    ended = dataclasses.replace(state(1, log_weights, True), ancestors=ancestors)
    record = PathRecord()
    record.add(state(0, log_weights, False))
    record.add(ended)
    found = record.finish(ended, "FMTT")
    assert found["distinct_ancestors"].tolist() == [701, 500]
    share = 300 / 1000
    assert float(found["effective_ancestors"][0]) == pytest.approx(1 / (share**2 + 700 / 1000**2))
    assert float(found["effective_ancestors"][1]) == pytest.approx(500)
    assert found["converged"].tolist() == [True, True]
    ancestors[0] = torch.arange(1000).clamp(max=600)
    with pytest.warns(UserWarning, match="amount to 6.23 independent ones .required: 10; distinct ancestors: 601,"):
        assert record.finish(ended, "FMTT")["converged"].tolist() == [False, True]


def test_the_ancestors_of_one_run_tell_how_much_the_evidence_varies_between_runs() -> None:
    """N(0, 1) over 1 by a hard edge: the variance of 400 estimates of its share, and what each says of its own."""
    prior = GaussianMixtureFlow(torch.zeros(1, 1, dtype=F64), std=1.0, steps=2)
    edge = FunctionReward(lambda x: torch.where(x[:, 0] > 1, 0.0, -torch.inf), differentiable=False)
    runs, count = 400, 200
    posterior = FMTT(prior, steps=10, kernel="renoise", chunk_size=10**5).sample(
        RepeatedReward(edge, runs), count, generator=torch.Generator().manual_seed(0))
    assert posterior.log_evidence is not None
    ratio = posterior.log_evidence.exp() / 0.158655  # 1 - Phi(1)
    predicted = 1 / posterior.diagnostics["effective_ancestors"] - 1 / count
    squares = (ratio - ratio.mean()).square()
    error = float((squares - predicted).std()) / math.sqrt(runs)
    assert float(squares.mean()) == pytest.approx(float(predicted.mean()), rel=0.1, abs=4 * error)
    assert float(squares.mean()) > 2 * float((1 / posterior.ess() - 1 / count).mean())  # which weights alone would say


@pytest.mark.parametrize("count", [1, 2])
def test_one_or_two_particles_never_converge(count: int) -> None:
    with pytest.warns(UserWarning, match="required: 3"):
        posterior = FMTT(Gaussian(), steps=3).sample(Tilt(lambda x: 0 * x[:, 0], 2), count,
                                                     generator=torch.Generator().manual_seed(0))
    assert posterior.diagnostics["converged"].tolist() == [False, False]


def test_without_a_look_ahead_too_few_steps_are_told() -> None:
    """Eight dimensions, three values at sigma 0.01: most evidence is missing in the median, and alarms are raised."""
    g = torch.Generator().manual_seed(5)
    prior = GaussianMixtureFlow(torch.zeros(1, 8, dtype=F64), std=1.0, steps=2)
    operator = MatrixOperator(torch.randn(6, 8, generator=g, dtype=F64) / 8**0.5, image_shape=(8,))
    y = operator(torch.randn(1, 8, generator=g, dtype=F64))
    likelihood = GaussianLikelihood(operator, y, 0.005)
    with pytest.warns(UserWarning, match="k-hat"):
        posterior = FMTT(prior, steps=50, look_ahead="none", schedule="annealed", chunk_size=10**5).sample(
            likelihood.select([0] * 20), 500, generator=torch.Generator().manual_seed(0))
    missing = posterior.log_evidence - ExactPosterior(prior).log_evidence(likelihood)
    assert float(missing.median()) < -1
    assert int(posterior.diagnostics["converged"].sum()) <= 1


def test_few_ancestors_are_told_in_noise_space() -> None:
    """One move at each of few temperatures leaves copies of a few, whose log evidence is off by far over a half."""
    g = torch.Generator().manual_seed(5)
    prior = GaussianMixtureFlow(torch.zeros(1, 8, dtype=F64), std=1.0, steps=2)
    operator = MatrixOperator(torch.randn(3, 8, generator=g, dtype=F64), image_shape=(8,))
    likelihood = GaussianLikelihood(operator, operator(torch.randn(1, 8, generator=g, dtype=F64)), 0.02)
    hasty, default = ({"num_moves": 1, "ess_threshold": 0.5}, {})
    with pytest.warns(UserWarning, match="initial particles have descendants left"):
        posterior = NoiseSMC(prior, chunk_size=10**5, **hasty).sample(  # type: ignore[arg-type]
            likelihood.select([0] * 20), 200, generator=torch.Generator().manual_seed(0))
    error = posterior.log_evidence - ExactPosterior(prior).log_evidence(likelihood)
    assert float(error.square().mean().sqrt()) > 0.5
    assert int(posterior.diagnostics["converged"].sum()) <= 4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        NoiseSMC(prior, chunk_size=10**5, **default).sample(likelihood.select([0] * 10), 200,
                                                            generator=torch.Generator().manual_seed(0))
