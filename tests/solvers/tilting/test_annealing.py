"""The schedule from the covariance of the data, and the diffusion that mixes modes early: against closed forms."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from invflow import FMTT, ExactPosterior, FunctionReward, GaussianLikelihood, GaussianMixtureFlow
from invflow.operators import MatrixOperator
from invflow.solvers.tilting.annealing import AnnealedCovariance, ReversalDiffusion
from invflow.solvers.tilting.kernels import base_steps
from invflow.solvers.tilting.schedules import AnnealedVariance, logit_grid, schedule_values

F64 = torch.float64


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def mixture(d: int = 6, distance: float = 4.0) -> GaussianMixtureFlow:
    """Three modes on a line and one off it, in d dimensions."""
    places = torch.tensor([[-1.0, 0.0], [0.0, 0.0], [1.0, 0.0], [0.0, 1.0]], dtype=F64)
    means = distance * (places @ torch.randn(2, d, generator=generator(3), dtype=F64))
    return GaussianMixtureFlow(means, std=0.7, weights=torch.tensor([1.0, 2.0, 3.0, 2.0]), steps=8)


def posed(prior: GaussianMixtureFlow, m: int, sigma: Any = 0.3, count: int = 1) -> GaussianLikelihood:
    matrix = torch.randn(m, prior.dimension, generator=generator(5), dtype=F64)
    truth = prior.sample(1, generator=generator(6))
    operator = MatrixOperator(matrix, image_shape=tuple(prior.state_shape))
    return GaussianLikelihood(operator, (truth @ matrix.T).expand(count, m), sigma)


def covariance(prior: GaussianMixtureFlow) -> Tensor:
    centred = prior.means - prior.weights @ prior.means
    return centred.T @ (prior.weights[:, None] * centred) + prior.std[0] ** 2 * torch.eye(prior.dimension, dtype=F64)


@pytest.mark.parametrize("m", [1, 3])
@pytest.mark.parametrize("known", [1.0, 0.8])
def test_schedule_is_the_widest_direction_of_the_unknown(m: int, known: float) -> None:
    """Against the d x d matrices, inverted."""
    prior, sigma, times = mixture(), torch.tensor([0.3, 2.0], dtype=F64), [0.0, 0.05, 0.3, 0.7, 0.8, 0.95, 1.0]
    likelihood, sigma_0 = posed(prior, m, sigma, 2), covariance(prior)
    scale = -0.5

    def unknown(t: float) -> Tensor:
        if t == 1:
            return torch.zeros_like(sigma_0)
        return torch.linalg.inv(torch.linalg.inv(sigma_0) + (t / (1 - t)) ** 2 * torch.eye(6, dtype=F64))

    matrix = scale * likelihood.operator.matrix[0].double()
    expected = torch.ones(2, len(times), dtype=F64)
    for k, t in enumerate(times):
        if t < known:
            widest = torch.linalg.eigvalsh(matrix @ (unknown(t) - unknown(known)) @ matrix.T)[-1]
            expected[:, k] = sigma**2 / (sigma**2 + widest)
    found = AnnealedCovariance.of_mixture(prior).values(times, likelihood, scale, known)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)
    assert (found.diff(dim=1) >= -1e-12).all()


def test_white_data_have_the_schedule_of_one_variance() -> None:
    s, times = 1.7, [0.0, 0.1, 0.5, 0.9, 1.0]
    rows = torch.linalg.qr(torch.randn(4, 2, generator=generator(), dtype=F64)).Q.T
    likelihood = GaussianLikelihood(MatrixOperator(rows, image_shape=(4,)), torch.zeros(1, 2, dtype=F64), 0.4)
    prior = GaussianMixtureFlow(torch.zeros(1, 4, dtype=F64), std=s)
    white = AnnealedCovariance(torch.full((1,), s**2), torch.eye(4)[:1], s**2)
    found = schedule_values(white, times, likelihood, prior)
    for k, t in enumerate(times):
        extra = 0.0 if t == 1 else s**2 * (1 - t) ** 2 / ((1 - t) ** 2 + t**2 * s**2)
        assert float(found[0, k]) == pytest.approx(0.16 / (0.16 + extra), rel=1e-6)
    one = schedule_values(AnnealedVariance(1.0), times, likelihood, prior)
    unit = schedule_values(AnnealedCovariance(torch.ones(1), torch.eye(4)[:1], 1.0), times, likelihood, prior)
    torch.testing.assert_close(one, unit, rtol=1e-6, atol=1e-9)


def test_covariance_of_samples_is_that_of_the_mixture() -> None:
    prior = mixture(distance=2.0)
    exact = AnnealedCovariance.of_mixture(prior)
    found = AnnealedCovariance.from_samples(prior.sample(40_000, generator=generator()), 2)
    torch.testing.assert_close(found.variances.sort().values, exact.variances.sort().values, rtol=0.05, atol=0)
    assert found.rest == pytest.approx(0.49, rel=0.02)
    torch.testing.assert_close(exact.variances.sort().values, torch.linalg.eigvalsh(covariance(prior))[-2:])
    # by the time that is called first, the widest direction is under a third of the noise
    t = exact.first_time
    assert t * float(exact.variances.max()) ** 0.5 == pytest.approx(0.3 * (1 - t))


def test_reversal_adds_the_same_share_of_noise_at_each_step_of_a_logit_grid() -> None:
    times = logit_grid(200, first=1e-3, last=0.99)
    steps = base_steps("renoise", times, ReversalDiffusion(0.5))
    assert steps[0].variance == (1 - steps[0].end) ** 2  # all of it at the first
    length = math.log(times[2] / (1 - times[2])) - math.log(times[1] / (1 - times[1]))
    for step in steps[1:-1]:
        middle = 0.5 * (step.start + step.end)
        assert step.variance == pytest.approx(length * (1 - middle) ** 2, rel=0.06)
    with pytest.raises(ValueError, match="finite except for"):
        base_steps("sde", times, ReversalDiffusion())


def test_modes_that_part_early_get_their_shares() -> None:
    """Where the default diffusion leaves particles in the modes of their first noise, this one redraws them."""
    prior = mixture(d=60, distance=1.5)
    likelihood, runs = posed(prior, 1, 2.0), 12
    exact = ExactPosterior(prior)
    shares = exact.sample(likelihood, 1).diagnostics["component_weights"][0].double()
    schedule = AnnealedCovariance.of_mixture(prior)
    solver = FMTT(prior, steps=24, kernel="renoise", proposal="conjugate", schedule=schedule, chunk_size=10**5,
                  diffusion=ReversalDiffusion(0.5), time_grid=logit_grid(24, first=schedule.first_time))
    posterior = solver.sample(likelihood.select([0] * runs), 200, generator=generator(1))
    nearest = torch.cdist(posterior.samples.flatten(0, 1), prior.means).argmin(1).view(runs, 200)
    found = torch.stack([(posterior.weights.double() * (nearest == k)).sum(1) for k in range(4)], dim=1)
    error = found.std(0) / math.sqrt(runs)
    assert (((found.mean(0) - shares).abs() / error.clamp(min=1e-3)) < 4).all(), (found.mean(0), shares, error)
    assert posterior.log_evidence is not None
    ratio = (posterior.log_evidence - exact.log_evidence(likelihood)).exp()
    assert abs(ratio.mean() - 1) < 4 * ratio.std() / math.sqrt(runs)


def test_what_does_not_fit_is_refused() -> None:
    prior = mixture()
    schedule = AnnealedCovariance.of_mixture(prior)
    with pytest.raises(TypeError, match="linear operator"):
        schedule.values([0.0, 1.0], FunctionReward(lambda x: x.sum(1)))
    with pytest.raises(ValueError, match="directions have 6 values and the images 60"):
        schedule.values([0.0, 1.0], posed(mixture(60), 1))
    with pytest.raises(ValueError, match="orthonormal"):
        AnnealedCovariance(torch.ones(2), torch.ones(2, 3))
    with pytest.raises(ValueError, match="one variance over 0"):
        AnnealedCovariance(-torch.ones(1), torch.eye(3)[:1])
    with pytest.raises(ValueError, match="3 samples show 2"):
        AnnealedCovariance.from_samples(torch.zeros(3, 2), 3)
    with pytest.raises(ValueError, match="scale=0"):
        ReversalDiffusion(0.0)
    settings = FMTT(prior, schedule=schedule, kernel="renoise", diffusion=ReversalDiffusion(0.5)).settings()
    assert settings["diffusion"] == "ReversalDiffusion(scale=0.5)"
    assert "AnnealedCovariance" in settings["schedule"]
    assert "directions" not in settings["schedule"]
