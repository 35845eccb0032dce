"""Warnings of mistakes: residuals that noise cannot explain, ranges of values, levels outside the training."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import invflow
from invflow import ExactPosterior, GaussianLikelihood, GaussianMixtureFlow, Operator
from invflow._core.misfit import rarer_than_noise
from invflow.operators import Denoising, GaussianBlur, MaskInpainting, SuperResolution

SHAPE = (1, 12, 12)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def greys() -> GaussianMixtureFlow:
    """Two flat greys, and next to nothing around them: pixels that cannot follow the noise."""
    means = torch.stack([torch.full(SHAPE, 0.3), torch.full(SHAPE, 0.7)])
    return GaussianMixtureFlow(means, std=0.002, steps=4)


def said(solver: invflow.Solver, likelihood: GaussianLikelihood, count: int = 64) -> list[str]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        solver.sample(likelihood, count, generator=seeded(1))
    return [str(warning.message) for warning in found if "the mean of the samples" in str(warning.message)]


def measured(operator: Operator, sigma: float, count: int = 4) -> tuple[Tensor, Tensor]:
    x = greys().generate(count, generator=seeded())
    return x, operator.measure(x, sigma, generator=seeded(2))


def test_wrong_levels_are_warned_of_and_right_ones_are_not() -> None:
    operator, solver = Denoising(SHAPE), ExactPosterior(greys())
    _, y = measured(operator, 0.1)
    assert said(solver, GaussianLikelihood(operator, y, 0.1)) == []
    small, = said(solver, GaussianLikelihood(operator, y, 0.01))
    assert "misses 4 of 4 measurements" in small
    assert "sigma is too small" in small
    large, = said(solver, GaussianLikelihood(operator, y, 1.0))
    assert "fits 4 of 4 measurements" in large
    assert "sigma is too large" in large
    one, = said(solver, GaussianLikelihood(operator, y[:1], 1.0))
    assert "fits the measurement to within 0.09" in one


def test_a_wrong_mask_and_a_wrong_operator_are_warned_of() -> None:
    mask = (torch.arange(144).reshape(1, 12, 12) % 3 > 0).float()
    right, inverse = MaskInpainting(mask, SHAPE), MaskInpainting(1 - mask, SHAPE)
    solver = ExactPosterior(greys())
    _, y = measured(right, 0.05)
    assert said(solver, GaussianLikelihood(right, y, 0.05)) == []
    assert "an inverted mask" in said(solver, GaussianLikelihood(inverse, y, 0.05))[0]
    pattern = (torch.arange(12) % 4 > 1).float() * 0.8
    stripes = GaussianMixtureFlow(pattern.expand(1, *SHAPE).clone(), std=0.02, steps=4)
    sharp, blurred = Denoising(SHAPE), GaussianBlur(SHAPE, std=2.0)
    x = stripes.generate(2, generator=seeded())
    y = blurred.measure(x, 0.05, generator=seeded(1))
    assert said(ExactPosterior(stripes), GaussianLikelihood(blurred, y, 0.05)) == []
    assert "misses 2 of 2" in said(ExactPosterior(stripes), GaussianLikelihood(sharp, y, 0.05))[0]


@pytest.mark.parametrize(("size", "spread"), [(1, 3.0), (2, 0.3), (50, 3.0), (400, 0.3), (400, 30.0)])
@pytest.mark.parametrize("count", [1, 32])
def test_right_posteriors_are_hardly_ever_warned_of(size: int, spread: float, count: int) -> None:
    """Means that all but interpolate, of few values and of many: none of 2,000, where one in 11,000 may be."""
    prior = GaussianMixtureFlow(torch.zeros(1, size), std=spread, steps=2)
    x = spread * torch.randn(2000, size, generator=seeded())
    operator = Denoising((size,))
    y = operator.measure(x, 0.5, generator=seeded(1))
    assert said(ExactPosterior(prior), GaussianLikelihood(operator, y, 0.5), count) == []


def test_the_bound_holds_for_normal_numbers_and_is_not_idle() -> None:
    """Chernoff's bound on chi-squared means, against their quantiles."""
    for m in (1, 4, 30, 200):
        chi = torch.distributions.Gamma(m / 2, m / 2)
        u = torch.linspace(1e-3, 40, 40_001, dtype=torch.float64)
        rare = torch.tensor([rarer_than_noise(square, m) for square in u.tolist()])
        density = chi.log_prob(u).exp() * (u[1] - u[0])
        assert float(density[rare & (u > 1)].sum()) < math.exp(-10)
        assert float(density[rare & (u < 1)].sum()) < math.exp(-10)
        assert bool(rare[u > 1 + 4 * math.sqrt(20 / m) + 20 / m * 2].all())
    assert all(rarer_than_noise(square, 144) for square in (0.0, 0.09, 9.0))


class Magnitude(Operator):
    """y = |x|, which does not tell x from -x: the mean of both measures nothing."""

    linear = False

    def __init__(self, size: int) -> None:
        super().__init__()
        self.image_shape = self.measurement_shape = (size,)

    def forward(self, x: Tensor) -> Tensor:
        return x.abs()


def test_of_an_operator_that_is_not_linear_the_mean_of_what_is_measured_counts() -> None:
    size, sigma = 40, 0.1

    class TwoSigns(invflow.Solver):
        def _sample(self, reward: Any, n: int, generator: torch.Generator, progress: bool) -> invflow.Posterior:
            signs = torch.where(torch.arange(n) % 2 > 0, 1.0, -1.0)[None, :, None]
            noise = sigma * torch.randn(len(reward.y), n, size, generator=generator)
            return invflow.Posterior(signs * (reward.y[:, None] + noise))

    y = 2 + 0.5 * torch.rand(3, size, generator=seeded())
    assert said(TwoSigns(), GaussianLikelihood(Magnitude(size), y, sigma)) == []
    far, = said(TwoSigns(), GaussianLikelihood(Magnitude(size), y, 1e-4))
    assert "misses 3 of 3" in far


def test_a_measurement_between_minus_one_and_one_is_warned_of() -> None:
    x = torch.rand(2, 1, 16, 16, generator=seeded())
    x[..., :4] = 0.0
    for operator in (Denoising((1, 16, 16)), SuperResolution((1, 16, 16), factor=4), GaussianBlur((1, 16, 16))):
        for sigma in (0.0, 0.1):
            noise = sigma * torch.randn(operator(x).shape, generator=seeded())
            with pytest.warns(UserWarning, match=r"\[-1, 1\].*\(y \+ 1\) / 2, and half the noise"):
                GaussianLikelihood(operator, operator(2 * x - 1) + noise, sigma)


class Differences(Operator):
    """Differences of neighbours, which may be negative for images in [0, 1]."""

    image_shape = measurement_shape = (1, 16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x - x.roll(1, -1)


def test_measurements_that_may_be_negative_are_not_warned_of() -> None:
    x = torch.rand(2, 1, 16, 16, generator=seeded()).round()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        GaussianLikelihood(Differences(), Differences()(x), 0.1)
        for sigma in (0.2, 0.5, 3.0, 100.0):  # noise alone, down to -3 sigma
            y = x + sigma * torch.randn(x.shape, generator=seeded(1))
            GaussianLikelihood(Denoising((1, 16, 16)), y, sigma)


def test_noise_levels_that_were_not_trained_for_are_told_once() -> None:
    for name, kind in (("mnist", "denoising"), ("fashion-mnist", "super-resolution"), ("cifar10", "box-inpainting")):
        vfm = invflow.VFM.load(name, chunk_size=2)
        truth, likelihood = invflow.load_problem(f"{name}/{kind}").simulate(5, generator=seeded())
        low, high = vfm.adapter.levels[likelihood.operator.problem_class]
        for sigma in (low / 5, 0.5 * (low + high), 4 * high):
            levels = sigma * torch.linspace(1, 1.01, 5)
            y = likelihood.operator.measure(truth, sigma, generator=seeded())
            with warnings.catch_warnings(record=True) as found:
                warnings.simplefilter("always")  # in three chunks of observations
                vfm.sample(GaussianLikelihood(likelihood.operator, y, levels), 2, generator=seeded())
            beyond = [str(w.message) for w in found if "outside the noise" in str(w.message)]
            assert len(beyond) == (0 if low <= sigma <= high else 1)
            assert all(f"{low:.4g} to {high:.4g}" in words for words in beyond)
