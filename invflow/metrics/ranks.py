"""Simulation-based calibration: ranks of truths among samples, and exact tests of their uniformity.

If a truth and N samples of its posterior are exchangeable given the measurement, the rank of the truth among
the samples is uniform on 0 .. N for any quantity (Talts, Betancourt, Simpson, Vehtari, Gelman 2018, "Validating
Bayesian inference algorithms with simulation-based calibration"). The quantity may depend on the measurement
(Modrak, Moon, Kim, Buerkner, Huurre, Faltejskova, Gelman, Vehtari 2023).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from invflow._core.random import as_generator

__all__ = ["RankTest", "detectable_shift", "detectable_spread", "ecdf_band", "holm", "random_ranks", "rank_power",
           "rank_test"]

_GREATEST_SPREAD = 64.0
_FLOOR = 1e-10  # rounding in the recursion reaches 1e-12 at a few thousand simulations


def random_ranks(samples: Tensor, truth: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Rank of each truth among its samples, with ties broken at random.

    If k samples equal the truth, each of the k + 1 places is equally likely, so the rank is uniform for discrete
    quantities too.

    Args:
        samples: ``(B, N, *shape)``, equally weighted: resample weighted ones first.
        truth: ``(B, *shape)``.
        generator: Generator for breaking ties; used even if there are none.

    Returns:
        ``(B, *shape)`` int64, from 0 (all samples above the truth) to N.

    Raises:
        ValueError: If the shapes do not fit, or a value is NaN.
    """
    if samples.ndim != truth.ndim + 1 or (samples.shape[0], *samples.shape[2:]) != tuple(truth.shape):
        raise ValueError(f"random_ranks: samples {tuple(samples.shape)} do not fit the truth {tuple(truth.shape)}: "
                         "pass samples (B, N, *shape) and truth (B, *shape)")
    if bool(samples.isnan().any()) or bool(truth.isnan().any()):
        raise ValueError("random_ranks: NaN has no rank; check the quantity at these samples")
    generator = as_generator(generator)
    uniform = torch.rand(tuple(truth.shape), generator=generator, device=generator.device, dtype=torch.float64)
    below = (samples < truth[:, None]).sum(1)
    ties = (samples == truth[:, None]).sum(1)
    return below + (uniform.to(ties.device) * (ties + 1)).long().minimum(ties)


@dataclass(frozen=True)
class RankTest:
    """Test of uniform ranks: their distribution function and its simultaneous band.

    Attributes:
        p_value: Exact p-value; below ``alpha`` exactly if the function leaves the band of that level.
        ecdf: ``(N,)``, share of ranks below k, for k = 1 .. N.
        lower, upper: ``(N,)``, the band. The function of uniform ranks stays inside with probability at least
            1 - alpha.
        alpha: Level of the band.
    """

    p_value: float
    ecdf: Tensor
    lower: Tensor
    upper: Tensor
    alpha: float

    def __str__(self) -> str:
        """The p-value to two digits; below 1e-10, where rounding errors leave no correct digit, the bound itself."""
        return f"p < {_FLOOR:.0e}" if self.p_value < _FLOOR else f"p = {self.p_value:.2g}"


def rank_test(ranks: Tensor, num_samples: int, alpha: float = 0.05) -> RankTest:
    r"""Test that ranks are uniform on 0 .. N, by simultaneous bands of their distribution function.

    The statistic is the smallest pointwise binomial tail, :math:`\gamma = 2 \min_k \min(P(R_k \le r_k), P(R_k \ge
    r_k))`, with :math:`R_k \sim \text{Bin}(B, k / (N + 1))` the number of ranks below k (Saeilynoja, Buerkner,
    Vehtari 2022, "Graphical test for discrete uniformity and its applications"). A recursion over k computes its law
    exactly: counts of the rank values are independent Poisson variables given their sum.

    Args:
        ranks: ``(B,)``, integers from 0 to N, from independent simulations.
        num_samples: N.
        alpha: Level of the band, in (0, 1).

    Returns:
        p-value and band. P(p-value <= a) is at most a, and slightly less since ranks are discrete.

    Raises:
        ValueError: If the ranks have another shape or are out of range.

    Example:
        >>> import torch
        >>> from invflow.metrics import rank_test
        >>> g = torch.Generator().manual_seed(0)
        >>> rank_test(torch.randint(100, (200,), generator=g), 99).p_value > 0.05
        True
    """
    if ranks.ndim != 1 or len(ranks) == 0 or ranks.is_floating_point():
        raise ValueError(f"rank_test takes integer ranks (B,), not {tuple(ranks.shape)} of {ranks.dtype}: pass the "
                         "ranks of one quantity at a time, ranks[:, i]")
    if not 0 <= int(ranks.min()) <= int(ranks.max()) <= num_samples:
        raise ValueError(f"ranks lie between {int(ranks.min())} and {int(ranks.max())}, expected 0 to {num_samples}: "
                         "pass the number of samples among which each truth was ranked as num_samples")
    count = len(ranks)
    below = torch.bincount(ranks.cpu(), minlength=num_samples + 1).cumsum(0)[:-1]  # number of ranks below 1 .. N
    tails = _pointwise_tails(count, num_samples)
    observed = 2 * float(tails[np.arange(num_samples), below.numpy()].min())
    lower, upper = ecdf_band(count, num_samples, alpha)
    return RankTest(_probability_of_less(observed, count, num_samples), below / count, lower, upper, alpha)


def ecdf_band(num_simulations: int, num_samples: int, alpha: float = 0.05) -> tuple[Tensor, Tensor]:
    """Simultaneous band of the distribution function of B uniform ranks on 0 .. N; see :func:`rank_test`.

    Args:
        num_simulations: B.
        num_samples: N.
        alpha: Largest probability with which the function leaves the band.

    Returns:
        ``(lower, upper)``, each ``(N,)``: smallest and largest share of ranks below k inside the band, k = 1 .. N.
    """
    if num_simulations < 1 or num_samples < 1 or not 0 < alpha < 1:
        raise ValueError("ecdf_band takes at least 1 simulation and 1 sample and alpha in (0, 1), not "
                         f"num_simulations={num_simulations}, num_samples={num_samples} and alpha={alpha}")
    level = _critical_level(num_simulations, num_samples, alpha)
    inside = 2 * _pointwise_tails(num_simulations, num_samples) > level
    first = inside.argmax(1)
    last = num_simulations - inside[:, ::-1].argmax(1)
    return torch.from_numpy(first / num_simulations), torch.from_numpy(last / num_simulations)


def rank_power(num_simulations: int, num_samples: int, alpha: float = 0.05, *, spread: float = 1.0,
               shift: float = 0.0) -> float:
    """Probability that :func:`rank_test` rejects samples from a wrong Gaussian, without simulation error.

    The truth is a draw from N(0, 1), the samples come from N(shift, spread^2).

    Args:
        num_simulations: B.
        num_samples: N.
        alpha: Level of the test, in (0, 1).
        spread: Ratio of the samples' standard deviation to the correct one; below 1 means overconfident.
        shift: Error of the samples' mean, in units of the correct standard deviation.

    Returns:
        The power; for spread 1 and shift 0 the size of the test, at most alpha.
    """
    level = _critical_level(num_simulations, num_samples, alpha)
    inside = 2 * _pointwise_tails(num_simulations, num_samples) > level
    return 1 - _probability_inside(inside, num_simulations, tuple(_rank_probabilities(num_samples, spread, shift)))


@functools.lru_cache(maxsize=256)
def detectable_spread(num_simulations: int, num_samples: int, alpha: float = 0.05,
                      power: float = 0.8) -> tuple[float, float]:
    """Errors of the spread that :func:`rank_test` detects with this power.

    Args:
        num_simulations: B.
        num_samples: N.
        alpha: Level of the test.
        power: Probability of detection, in (alpha, 1).

    Returns:
        ``(narrow, wide)``: ratios of the samples' standard deviation to the correct one. Gaussian posteriors narrower
        than the first or wider than the second are rejected with at least this power (see :func:`rank_power`). 0 and
        infinity if no ratio between 1/64 and 64 is.
    """
    def rejects(log_ratio: float) -> bool:
        return rank_power(num_simulations, num_samples, alpha, spread=math.exp(log_ratio)) >= power

    limit = math.log(_GREATEST_SPREAD)
    return math.exp(_least_found(rejects, -limit)), math.exp(_least_found(rejects, limit))


@functools.lru_cache(maxsize=256)
def detectable_shift(num_simulations: int, num_samples: int, alpha: float = 0.05, power: float = 0.8) -> float:
    """Error of the mean, in correct standard deviations, that :func:`rank_test` detects with this power.

    The arguments are those of :func:`detectable_spread`. Infinity if no error up to 8 is detected.
    """
    return _least_found(lambda shift: rank_power(num_simulations, num_samples, alpha, shift=shift) >= power, 8.0)


def _least_found(rejects: Callable[[float], bool], end: float) -> float:
    """Smallest value from 0 to ``end`` with enough power; infinity with the sign of ``end`` if there is none."""
    if not rejects(end):
        return math.copysign(math.inf, end)
    missed, caught = 0.0, end
    for _ in range(12):
        middle = 0.5 * (missed + caught)
        missed, caught = (missed, middle) if rejects(middle) else (middle, caught)
    return caught


def holm(p_values: Tensor) -> Tensor:
    """Adjusted p-values: rejecting those up to alpha keeps the chance of any false rejection at alpha (Holm 1979).

    Args:
        p_values: ``(m,)``; NaN for a test that was not run, which does not count.

    Returns:
        ``(m,)``, at least as large as the p-values, at most 1.
    """
    adjusted = torch.full_like(p_values, torch.nan)
    made = (~p_values.isnan()).nonzero()[:, 0]
    order = made[p_values[made].argsort(stable=True)]
    factor = torch.arange(len(order), 0, -1, dtype=p_values.dtype, device=p_values.device)
    if len(order):
        adjusted[order] = (factor * p_values[order]).cummax(0).values.clamp(max=1)
    return adjusted


# -- the law of the statistic ----------------------------------------------------------------------------------


@functools.lru_cache(maxsize=32)
def _pointwise_tails(count: int, num_samples: int) -> np.ndarray:
    """The smaller binomial tail, P(R_k <= r) or P(R_k >= r), for k = 1 .. N and r = 0 .. B: ``(N, B + 1)``."""
    from scipy.special import bdtr  # imports much faster than scipy.stats

    share = np.arange(1, num_samples + 1)[:, None] / (num_samples + 1)
    below = bdtr(np.arange(count + 1.0), count, share)
    # by symmetry, so that both tails round alike: R_k >= r exactly if B - R_k, with share 1 - k / (N + 1), is <= B - r
    result: np.ndarray = np.minimum(below, below[::-1, ::-1])
    return result


@functools.lru_cache(maxsize=256)
def _critical_level(count: int, num_samples: int, alpha: float) -> float:
    """Largest value g with P(gamma <= g) <= alpha; a function is inside the band if all of its tails are above g."""
    # the statistic takes only these values
    values = np.unique(2 * _pointwise_tails(count, num_samples))
    low, high = -1, len(values)
    while high - low > 1:
        middle = (low + high) // 2
        if _probability_of_less(float(values[middle]), count, num_samples) <= alpha:
            low = middle
        else:
            high = middle
    return float(values[low]) * (1 + 1e-9) if low >= 0 else 0.0


@functools.lru_cache(maxsize=8192)
def _probability_of_less(level: float, count: int, num_samples: int) -> float:
    """P(gamma <= level) for uniform ranks."""
    inside = 2 * _pointwise_tails(count, num_samples) > level * (1 + 1e-9)  # a margin for rounding of ties
    uniform = (1 / (num_samples + 1),) * (num_samples + 1)
    return min(1.0, max(0.0, 1 - _probability_inside(inside, count, uniform)))


def _probability_inside(inside: np.ndarray, count: int, probabilities: Sequence[float]) -> float:
    """Probability that cumulative counts of a multinomial stay where ``inside`` ``(N, B + 1)`` is true.

    Given their sum, independent Poisson counts are multinomial. The law of the running sum is convolved with
    one Poisson law for each rank value, and set to zero outside.
    """
    law = np.zeros(count + 1)
    law[0] = 1.0
    last, poisson = -1.0, law
    for k, probability in enumerate(probabilities):
        if probability != last:
            last, poisson = probability, _poisson(count * probability, count)
        law = np.convolve(law, poisson)[: count + 1]
        if k < len(inside):
            law = np.where(inside[k], law, 0.0)
    return float(law[count] / _poisson(float(count), count)[count])


def _poisson(mean: float, largest: int) -> np.ndarray:
    k = np.arange(largest + 1)
    log = k * math.log(mean) - mean - _log_factorials(largest) if mean > 0 else np.where(k == 0, 0.0, -np.inf)
    return np.exp(log)


@functools.lru_cache(maxsize=32)
def _log_factorials(largest: int) -> np.ndarray:
    return np.array([math.lgamma(k + 1.0) for k in range(largest + 1)])


def _rank_probabilities(num_samples: int, spread: float, shift: float) -> np.ndarray:
    """Law of the rank of a draw from N(0, 1) among N draws from N(shift, spread^2), by quadrature: ``(N + 1,)``."""
    from scipy.special import gammaln, log_ndtr

    z = np.linspace(-8, 8, 2001)
    weight = np.exp(-0.5 * z**2)
    weight /= weight.sum()
    u = (z - shift) / spread
    k = np.arange(num_samples + 1)[:, None]
    chosen = gammaln(num_samples + 1) - gammaln(k + 1) - gammaln(num_samples - k + 1)
    law = np.exp(chosen + k * log_ndtr(u) + (num_samples - k) * log_ndtr(-u)) @ weight
    result: np.ndarray = law / law.sum()
    return result
