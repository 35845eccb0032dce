"""Twisted diffusion: exact for its own base, at any number of steps."""

from __future__ import annotations

import math

import pytest
import torch

import invflow
from invflow.operators import MatrixOperator
from invflow.solvers.tilting.twisted_diffusion import TwistedDiffusion
from invflow.testing import check_solver

SHAPE = (1, 8, 8)
PRIOR = (0.5, 0.1)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussian(shape: tuple[int, ...] = SHAPE, std: float = PRIOR[1], **options: object) -> invflow.GaussianMixtureFlow:
    return invflow.GaussianMixtureFlow(torch.full((1, *shape), PRIOR[0]), std=std, **options)


def test_twisted_diffusion_is_exact() -> None:
    check_solver(lambda p: TwistedDiffusion(p, steps=25, resample_threshold=0.0), exact=False)
    prior = gaussian((2,), std=0.4)
    likelihood = invflow.GaussianLikelihood(MatrixOperator(torch.tensor([[1.0, 0.5]])), torch.tensor([[1.2]]), 0.3)
    solver = TwistedDiffusion(prior, steps=12)
    runs = solver.sample(likelihood.select([0] * 40), 400, generator=seeded())
    # e^r times the law of the sampler's own base, which is Gaussian here: its moments from many draws
    base = solver.prior_samples(200_000, generator=seeded(1)).double()
    base_mean, base_cov = base.mean(0), base.T.cov()
    a = torch.tensor([[1.0, 0.5]], dtype=torch.float64)
    gain = base_cov @ a.T / (a @ base_cov @ a.T + 0.09)
    mean = base_mean + (gain @ (torch.tensor([1.2], dtype=torch.float64) - a @ base_mean)[:, None])[:, 0]
    found = runs.mean().double()
    error = found.std(0) / math.sqrt(len(found)) + base.std(0) / math.sqrt(len(base))
    assert bool(((found.mean(0) - mean).abs() < 4.5 * error).all())
    evidence = runs.log_evidence.double().exp()
    exact = torch.distributions.Normal((a @ base_mean)[0], ((a @ base_cov @ a.T)[0, 0] + 0.09).sqrt())
    ratio = evidence / exact.log_prob(torch.tensor(1.2, dtype=torch.float64)).exp()
    assert abs(float(ratio.mean()) - 1) < 4.5 * float(ratio.std()) / math.sqrt(len(ratio)) + 0.01


def test_ancestral_kernel_has_the_marginals_of_the_path() -> None:
    # ancestral sampling is exact where data are a single point
    prior = gaussian((2,), std=1e-3)
    x = TwistedDiffusion(prior, steps=5).prior_samples(500, generator=seeded())
    torch.testing.assert_close(x, torch.full_like(x, 0.5), atol=5e-3, rtol=0)
    steps = TwistedDiffusion(gaussian((2,), std=1e-6), steps=5).base_steps
    g = seeded()
    z = torch.randn(100_000, 2, generator=g)
    for step in steps[:3]:
        z = step.mean(gaussian((2,), std=1e-6), z) + math.sqrt(step.variance) * torch.randn(z.shape, generator=g)
        assert float(z.mean()) == pytest.approx(0.5 * step.end, abs=0.01)
        assert float(z.std()) == pytest.approx(1 - step.end, rel=0.01)
