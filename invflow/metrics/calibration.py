"""Tests of calibration: TARP, z-scores, contraction, coverage curves, spread against skill.

Samples are ``(B, N, *image_shape)``, truths ``(B, *image_shape)``, one truth for each of B independent
simulations. Functions without log weights take equally weighted samples: resample weighted ones first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from invflow._core.random import as_generator
from invflow._core.shapes import only_observed, with_axes
from invflow.metrics.quality import _check, spread, weighted_variances
from invflow.metrics.ranks import random_ranks

__all__ = ["ChiSquare", "CoverageCurve", "MeanTest", "SpreadSkill", "contraction", "coverage_curve", "mean_test",
           "random_pit", "residual_chi_square", "spread_skill", "tarp_curve", "tarp_ranks", "z_scores"]


def random_pit(ranks: Tensor, num_samples: int, generator: torch.Generator | None = None) -> Tensor:
    """Probability integral transforms from ranks, (rank + U) / (N + 1): exactly uniform for an exact posterior.

    Args:
        ranks: Integers from 0 to N, of any shape; see :func:`random_ranks`.
        num_samples: N.
        generator: Generator for U.

    Returns:
        The same shape, float64, in [0, 1).
    """
    generator = as_generator(generator)
    uniform = torch.rand(tuple(ranks.shape), generator=generator, device=generator.device, dtype=torch.float64)
    return (ranks + uniform.to(ranks.device)) / (num_samples + 1)


# -- TARP ----------------------------------------------------------------------------------------------------


def tarp_ranks(samples: Tensor, truth: Tensor, references: Tensor,
               generator: torch.Generator | None = None) -> Tensor:
    """Number of samples that are closer to a reference point than the truth is.

    Tests of accuracy with random points (Lemos, Coogan, Hezaveh, Perreault-Levasseur 2023, "Sampling-based
    accuracy testing of posterior estimators for general inference"). For an exact posterior the ranks are
    uniform for any references. If the references may lie anywhere, they are uniform for no other. Test
    them with :func:`rank_test`. They detect errors in the dependence between pixels; ranks of single pixels do not.

    Args:
        samples: ``(B, N, *image_shape)``, equally weighted.
        truth: ``(B, *image_shape)``.
        references: Reference points ``(B, *image_shape)``, drawn independently of the truths; they may depend on the
            measurements.
        generator: Generator for breaking ties.

    Returns:
        ``(B,)`` int64, from 0 to N.

    Raises:
        ValueError: If the shapes do not fit.
    """
    _check(samples, truth, None, "tarp_ranks", fair=False)
    if references.shape != truth.shape:
        raise ValueError(f"tarp_ranks: references {tuple(references.shape)} do not fit the truth {tuple(truth.shape)}: "
                         "pass one reference image for each truth")
    near = torch.linalg.vector_norm((samples - references[:, None]).flatten(2).double(), dim=2)
    far = torch.linalg.vector_norm((truth - references).flatten(1).double(), dim=1)
    return random_ranks(near, far, generator)


def tarp_curve(ranks: Tensor, num_samples: int, levels: Tensor) -> Tensor:
    """Expected coverage of the random balls: the share of simulations with rank / N below each level.

    Args:
        ranks: ``(B,)``, from :func:`tarp_ranks`.
        num_samples: N.
        levels: ``(K,)``, credibility levels in [0, 1].

    Returns:
        ``(K,)``; near the levels themselves for an exact posterior. For one that is too wide, above them at low levels
        and below them at high levels; the reverse for one that is too narrow.
    """
    share = ranks.to(levels) / num_samples
    return (share[:, None] < levels).to(levels).mean(0)


# -- z-scores, contraction, spread against skill -----------------------------------------------------------------


def z_scores(samples: Tensor, truth: Tensor, log_weights: Tensor | None = None) -> Tensor:
    """Posterior z-scores (mean - truth) / standard deviation (Schad, Betancourt, Vasishth 2021).

    Args:
        samples: ``(B, N, *image_shape)``, N >= 2.
        truth: ``(B, *image_shape)``.
        log_weights: ``(B, N)`` or None.

    Returns:
        ``(B, *image_shape)``. For an exact Gaussian posterior, the mean is 0 and the variance
        (1 + 1/N)(N - 1)/(N - 3). Where the samples have no spread, the score is infinite, or NaN for an error of 0.

    Raises:
        ValueError: If the shapes do not fit or N is below 2.
    """
    weights = _check(samples, truth, log_weights, "z_scores", fair=True)
    mean = torch.einsum("bn,bn...->b...", weights, samples)
    return (mean - truth) / spread(samples, log_weights)


def contraction(samples: Tensor, prior_variance: Tensor, log_weights: Tensor | None = None) -> Tensor:
    """Posterior contraction 1 - (posterior variance) / (prior variance) (Schad, Betancourt, Vasishth 2021).

    Args:
        samples: ``(B, N, *image_shape)``, N >= 2.
        prior_variance: ``(*image_shape)``.
        log_weights: ``(B, N)`` or None.

    Returns:
        ``(B, *image_shape)``: near 1 where the data are informative, near 0 where they are not; negative where the
        posterior is wider than the prior.
    """
    return 1 - spread(samples, log_weights).square() / prior_variance


class SpreadSkill(NamedTuple):
    """Root mean squares over the pixels of an observation, ``(B,)`` each; see :func:`spread_skill`."""

    spread: Tensor
    skill: Tensor

    def ratio(self) -> tuple[float, float]:
        """Ratio of the root mean squares over all observations, and its standard error (delta method).

        1 for an exact posterior, below 1 for one that is too narrow (or biased).
        """
        a, b = self.spread.double().square(), self.skill.double().square()
        ratio = float((a.mean() / b.mean()).sqrt())
        influence = 0.5 * ratio * (a / a.mean() - b / b.mean())
        return ratio, float(influence.std() / math.sqrt(len(a))) if len(a) > 1 else math.nan


def spread_skill(samples: Tensor, truth: Tensor, log_weights: Tensor | None = None) -> SpreadSkill:
    """Spread of the samples against the error of their mean (Fortin, Abaza, Anctil, Turcotte 2014).

    For an exact posterior of any shape, the mean squares agree in expectation over simulations, for any N: the
    spread includes the factor sqrt(1 + 1/N) by which the error of the mean of N samples exceeds that of the exact mean.

    Args:
        samples: ``(B, N, *image_shape)``, N >= 2.
        truth: ``(B, *image_shape)``.
        log_weights: ``(B, N)`` or None; the additional error of the mean is then the variance of the weighted mean.

    Returns:
        ``spread`` and ``skill``, ``(B,)`` each, in the units of the image.

    Raises:
        ValueError: If the shapes do not fit or N is below 2.
    """
    weights = _check(samples, truth, log_weights, "spread_skill", fair=True)
    mean = torch.einsum("bn,bn...->b...", weights, samples)
    error = (mean - truth).reshape(len(truth), -1).square().mean(1).sqrt()
    own = sum(weighted_variances(samples, weights), torch.zeros_like(mean))
    return SpreadSkill(own.reshape(len(truth), -1).mean(1).sqrt(), error)


# -- means over simulations -------------------------------------------------------------------------------------


class MeanTest(NamedTuple):
    """A mean over independent simulations, its standard error and a two-sided p-value."""

    mean: float
    standard_error: float
    p_value: float


def mean_test(values: Tensor, expected: float) -> MeanTest:
    """Student's test that independent values have this mean; exact for Gaussian values, otherwise for many values.

    Args:
        values: ``(B,)``, one number for each simulation.
        expected: Mean under the null hypothesis.

    Returns:
        Mean, standard error, p-value. If all values are equal, the p-value is 1 at the expected mean, otherwise 0. For
        B = 1 the last two are NaN.
    """
    from scipy.special import stdtr

    values = values.double().flatten()
    mean, count = float(values.mean()), len(values)
    if count < 2:
        return MeanTest(mean, math.nan, math.nan)
    error = float(values.std()) / math.sqrt(count)
    if error == 0:
        return MeanTest(mean, 0.0, 1.0 if math.isclose(mean, expected, abs_tol=1e-12) else 0.0)
    return MeanTest(mean, error, float(2 * stdtr(count - 1, -abs(mean - expected) / error)))


class CoverageCurve(NamedTuple):
    """Coverage of central intervals at several levels, ``(K,)`` each, with the error over simulations."""

    levels: Tensor
    coverage: Tensor
    standard_error: Tensor


def coverage_curve(pit: Tensor, levels: Sequence[float] | Tensor) -> CoverageCurve:
    """Coverage of central intervals against their nominal level, over all pixels.

    A pixel is covered at level p if \\|PIT - 1/2\\| <= p / 2. For an exact posterior this has probability exactly p,
    with any number of samples, at any level, and with ties. Pixels of one simulation depend on each other, so the
    standard error is over simulations.

    Args:
        pit: ``(B, ...)``, from :func:`random_pit`.
        levels: Nominal levels in (0, 1).

    Returns:
        Levels, coverage and standard error, ``(K,)`` each; NaN errors for B = 1.
    """
    level = torch.as_tensor(levels, dtype=torch.float64, device=pit.device)
    off = (pit - 0.5).abs().reshape(len(pit), -1)
    covered = torch.stack([(off <= p / 2).double().mean(1) for p in level], 1)  # (B, K)
    error = covered.std(0) / math.sqrt(len(pit)) if len(pit) > 1 else torch.full_like(level, torch.nan)
    return CoverageCurve(level, covered.mean(0), error)


# -- the residual -----------------------------------------------------------------------------------------------


class ChiSquare(NamedTuple):
    """Residual chi-square ``(B, N)``, its degrees of freedom ``(B, 1)``, and the upper tail ``(B, N)``."""

    statistic: Tensor
    degrees: Tensor
    p_value: Tensor


def residual_chi_square(residual: Tensor, sigma: float | Tensor, observed: Tensor | None = None) -> ChiSquare:
    """Sum of (y - A x)^2 / sigma^2 over the observed entries, with its p-value.

    For the truth, it has a chi-square law with as many degrees of freedom as observed entries. The same holds for a
    single exact posterior sample, over truths drawn from the prior with their measurements, because sample and truth
    have the same joint law with the measurement. It does not hold for the posterior mean, and samples of the same
    observation are not independent.

    Args:
        residual: y - A(x), ``(B, N, *measurement_shape)``.
        sigma: Standard deviation of the noise, a number or ``(B,)``.
        observed: ``(1 or B, *measurement_shape)`` in bool, or None for all.

    Returns:
        Statistic, degrees of freedom, and the probability of a larger statistic. Near 0, the sample does not explain
        the measurement; near 1, it fits the noise.

    Raises:
        ValueError: If the shapes do not fit.
    """
    if residual.ndim < 3:
        raise ValueError(f"residual_chi_square takes residuals (B, N, *measurement_shape), not "
                         f"{tuple(residual.shape)}: pass likelihood.y[:, None] - likelihood.predict(samples)")
    level = torch.as_tensor(sigma, dtype=torch.float64, device=residual.device)
    level = with_axes(level.reshape(-1), residual.ndim)
    if len(level) not in (1, len(residual)):
        raise ValueError(f"sigma has {len(level)} entries, but there are {len(residual)} observations: pass a "
                         "number or one for each")
    if not bool((level > 0).all()):
        raise ValueError(f"sigma is {level.flatten().tolist()[:4]}: a noise level must be above 0")
    square = (residual.double() / level).square()
    if observed is None:
        degrees = square.new_full((len(residual), 1), float(math.prod(residual.shape[2:])))
    else:
        if tuple(observed.shape[1:]) != tuple(residual.shape[2:]) or len(observed) not in (1, len(residual)):
            raise ValueError(f"observed has shape {tuple(observed.shape)}, residuals {tuple(residual.shape)}: pass "
                             "(1 or B, *measurement_shape), as operator.observed() gives it")
        square = only_observed(square, observed)
        degrees = observed.reshape(len(observed), -1).sum(1, keepdim=True).double().expand(len(residual), 1)
    statistic = square.flatten(2).sum(2)
    return ChiSquare(statistic, degrees, torch.special.gammaincc(degrees / 2, statistic / 2))
