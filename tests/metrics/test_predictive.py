"""The predictive check on a conjugate Gaussian: uniform p-values where the model is right, small ones elsewhere."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import kstest
from torch import Tensor

import invflow
from invflow.metrics import predictive_check
from invflow.operators import Denoising, MaskInpainting, MatrixOperator

SHAPE = (1, 12, 12)
PRIOR, NOISE = 0.1, 0.1


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def measured(count: int, operator: invflow.Operator, seed: int = 0, prior: float = PRIOR) -> Tensor:
    g = seeded(seed)
    x = 0.5 + prior * torch.randn(count, *SHAPE, generator=g)
    return operator.measure(x, NOISE, generator=g)


def exact(likelihood: invflow.GaussianLikelihood, n: int = 4, prior: float = PRIOR) -> invflow.Posterior:
    """Pixel by pixel: precisions and weighted means; the prior where nothing is observed."""
    observed = likelihood.operator.observed()
    seen = torch.ones(1, *SHAPE) if observed is None else observed.float()
    precision = 1 / prior**2 + seen / likelihood.sigma.reshape(-1, 1, 1, 1) ** 2
    mean = (0.5 / prior**2 + seen * likelihood.y / likelihood.sigma.reshape(-1, 1, 1, 1) ** 2) / precision
    noise = torch.randn(len(likelihood.y), n, *SHAPE, generator=seeded(7))
    return invflow.Posterior(mean[:, None] + noise / precision.sqrt()[:, None])


MASK = (torch.rand(1, *SHAPE, generator=seeded(3)) < 0.7).float()


@pytest.mark.parametrize("operator", [Denoising(SHAPE), MaskInpainting(MASK[0], SHAPE)], ids=["whole", "masked"])
def test_p_values_are_uniform_where_the_model_is_right(operator: invflow.Operator) -> None:
    likelihood = invflow.GaussianLikelihood(operator, measured(250, operator), sigma=NOISE)
    check = predictive_check(exact(likelihood), likelihood, num_replicates=99, generator=seeded(1))
    assert set(check.p_values) == {"residual", "regions", "spectrum"}
    for p in check.p_values.values():
        # ranks take a hundred values: spread evenly within each, they are uniform on [0, 1]
        assert kstest((p - 0.01 * torch.rand(250, generator=seeded(2))).numpy(), "uniform").pvalue > 1e-3 or (
            p is check.p_values["residual"])
    two_sided = check.p_values["residual"]
    assert kstest((two_sided - 0.02 * torch.rand(250, generator=seeded(2))).numpy(), "uniform").pvalue > 1e-3
    assert float(check.passed(0.05).double().mean()) > 0.95 - 4 * math.sqrt(0.05 * 0.95 / 250)


def test_several_draws_give_valid_p_values() -> None:
    operator = Denoising(SHAPE)
    likelihood = invflow.GaussianLikelihood(operator, measured(100, operator), sigma=NOISE)
    check = predictive_check(exact(likelihood, 6), likelihood, num_draws=3, num_replicates=49, generator=seeded(1))
    for p in check.p_values.values():
        assert float((p <= 0.1).double().mean()) < 0.1 + 4 * math.sqrt(0.09 / 100)


@pytest.mark.parametrize("factor", [0.6, 1.6])
def test_a_wrong_noise_level_is_found(factor: float) -> None:
    operator = Denoising(SHAPE)
    # where the prior is as wide as the noise, it takes the rest for image: a narrow one leaves it to the residual
    likelihood = invflow.GaussianLikelihood(operator, measured(20, operator, prior=0.03), sigma=factor * NOISE)
    check = predictive_check(exact(likelihood, prior=0.03), likelihood, generator=seeded(1))
    assert float((check.p_values["residual"] < 0.02).double().mean()) > 0.9


def test_a_wrong_mask_is_found_and_located() -> None:
    operator = Denoising(SHAPE)
    y = measured(20, operator)
    y[..., 3:6, 6:9] = 0  # dead pixels that the operator takes for observed ones
    likelihood = invflow.GaussianLikelihood(operator, y, sigma=NOISE)
    check = predictive_check(exact(likelihood), likelihood, generator=seeded(1))
    assert float((check.p_values["regions"] < 0.02).double().mean()) > 0.9
    assert check.regions is not None
    assert bool((check.regions.flatten(1).argmax(1) == 4 * 1 + 2).all())
    assert not bool(check.passed().any())


def test_a_posterior_that_is_too_smooth_fails_by_its_spectrum() -> None:
    operator = Denoising(SHAPE)
    y = measured(20, operator) + 0.3 * torch.sin(2.6 * torch.arange(12.0))  # a pattern that the posterior lacks
    flat = invflow.Posterior(torch.full((20, 2, *SHAPE), 0.5))
    # a noise level that accounts for all of the power, but not for where it is
    likelihood = invflow.GaussianLikelihood(operator, y, sigma=(y - 0.5).flatten(1).std(1))
    check = predictive_check(flat, likelihood, generator=seeded(1))
    assert float((check.p_values["spectrum"] < 0.05).double().mean()) > 0.9
    assert float((check.p_values["residual"] < 0.05).double().mean()) < 0.2
    assert check.bands is not None
    assert bool((check.bands.argmax(1) == 3).all())
    assert "spectrum" in str(check)


def test_counts_are_checked_too() -> None:
    operator = Denoising(SHAPE)
    x = 0.5 + 0.1 * torch.rand(30, *SHAPE, generator=seeded())
    empty = invflow.PoissonLikelihood(operator, torch.full((30, *SHAPE), 20.0), gain=40.0)
    y = empty.simulate(x, seeded(1))
    right, wrong = (invflow.PoissonLikelihood(operator, y, gain=gain) for gain in (40.0, 60.0))
    posterior = invflow.Posterior(x[:, None])  # the truth is one exact draw
    assert bool(predictive_check(posterior, right, generator=seeded(2)).passed(1e-3).double().mean() > 0.9)
    assert not bool(predictive_check(posterior, wrong, generator=seeded(2)).passed(0.05).any())


def test_measurements_that_are_no_pictures_have_a_residual_alone() -> None:
    operator = MatrixOperator(torch.eye(3))
    likelihood = invflow.GaussianLikelihood(operator, torch.zeros(2, 3), sigma=1.0)
    check = predictive_check(invflow.Posterior(torch.zeros(2, 2, 3)), likelihood, generator=0)
    assert list(check.p_values) == ["residual"]
    assert check.regions is None


def test_what_does_not_fit() -> None:
    operator = MatrixOperator(torch.eye(3))
    likelihood = invflow.GaussianLikelihood(operator, torch.zeros(2, 3), sigma=1.0)
    with pytest.raises(ValueError, match="3 observations and a likelihood of 2"):
        predictive_check(invflow.Posterior(torch.zeros(3, 2, 3)), likelihood)
    with pytest.raises(ValueError, match="num_draws=2 or fewer"):
        predictive_check(invflow.Posterior(torch.zeros(2, 2, 3)), likelihood, num_draws=3)
    with pytest.raises(ValueError, match="at least 1"):
        predictive_check(invflow.Posterior(torch.zeros(2, 2, 3)), likelihood, num_replicates=0)
