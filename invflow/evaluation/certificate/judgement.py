"""Turns the numbers of all simulations into verdicts: tests, their correction, and their power."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from invflow.metrics import (
    MeanTest,
    SpreadSkill,
    detectable_shift,
    detectable_spread,
    holm,
    mean_test,
    rank_test,
)

__all__ = ["CERTIFIABLE", "LEVELS", "Check", "Judgement", "judge", "rank_coverage"]

#: nominal levels at which coverage is reported
LEVELS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
#: a calibration that could miss a standard deviation that is wrong by this factor is not certified
CERTIFIABLE = 2.0
POWER = 0.8
#: quantities whose ranks, scaled to [0, 1], differ less on average count as one; independent ranks differ by 1/3
_ALIKE = 1e-3


@dataclass(frozen=True)
class Check:
    """Verdict on one quantity.

    Attributes:
        name: Name of the quantity.
        p_value: p-value of the test that its ranks are uniform or, for all pixels together, that its mean is correct.
        p_adjusted: p-value corrected for the number of checks (Holm). A quantity that orders all images in the same
            way as an earlier one shares its value, since both count as one check.
        passed: Whether ``p_adjusted`` is above alpha.
        reading: Kind of error, such as ``"samples too narrow"``, or ``""``.
        z_mean, z_std: Mean and standard deviation of (posterior mean - truth) / (posterior standard deviation);
            near 0 and 1. NaN where they do not apply.
        contraction: 1 - (mean posterior variance) / (variance of the truths).
        coverage, coverage_error: Coverage of central 90% intervals and its standard error over simulations.
    """

    name: str
    p_value: float
    p_adjusted: float
    passed: bool
    reading: str
    z_mean: float
    z_std: float
    contraction: float
    coverage: float
    coverage_error: float


@dataclass(frozen=True)
class Judgement:
    """All checks and their power.

    Attributes:
        checks: A :class:`Check` for each quantity, then TARP and the two for all pixels together.
        verdict: ``"passes"``, ``"fails"`` or ``"too few to certify"``.
        detectable_narrow, detectable_wide: Factors of the correct standard deviation. Any single quantity detects, with
            80% power at the corrected level, a posterior whose standard deviation is below the first or above the
            second factor.
        detectable_shift: Error of the posterior mean that is detected in the same way, in standard deviations.
        spread_skill, spread_skill_error: Ratio of spread to skill over all pixels and its standard error; the ratio is
            1 if calibrated.
    """

    checks: tuple[Check, ...]
    verdict: str
    detectable_narrow: float
    detectable_wide: float
    detectable_shift: float
    spread_skill: float
    spread_skill_error: float


def judge(record: dict[str, Tensor], names: Sequence[str], num_samples: int, alpha: float, *,
          merge: bool = True) -> Judgement:
    """Test the ranks of a calibration.

    Args:
        record: ``ranks``, ``truths``, ``means``, ``stds`` ``(S, Q)``, ``tarp_ranks``, ``pixel_rank``,
            ``pixel_dispersion``, ``pixel_spread``, ``pixel_skill`` ``(S,)``, ``pixel_coverage`` ``(S, len(LEVELS))``.
        names: Names of the Q quantities.
        num_samples: N, the number of samples among which each truth was ranked.
        alpha: Probability of any false alarm.
        merge: Whether to count quantities that order images in the same way as one check; False corrects as versions up
            to 0.1 did.

    Returns:
        The verdicts. The calibration fails if any check rejects after Holm's correction. It passes if none
        does and a single quantity, at the strictest corrected level (alpha over the number of checks), would have
        detected, with 80% power, a posterior with half or twice the correct standard deviation. Otherwise there were
        too few simulations to certify.
    """
    simulations = len(record["tarp_ranks"])
    # name, p-value, reading; z-scores and contraction; coverage and its error
    rows: list[tuple[str, float, str, tuple[float, float, float], tuple[float, float]]] = []
    for k, name in enumerate(names):
        ranks = record["ranks"][:, k]
        facts = _facts(record["truths"][:, k], record["means"][:, k], record["stds"][:, k])
        rows.append((name, rank_test(ranks, num_samples, alpha).p_value, _reading(ranks, num_samples),
                     facts, rank_coverage(ranks, num_samples)))
    tarp, none = record["tarp_ranks"], (math.nan, math.nan, math.nan)
    rows.append(("TARP", rank_test(tarp, num_samples, alpha).p_value,
                 _reading(tarp, num_samples, "samples displaced", "samples displaced"),
                 none, rank_coverage(tarp, num_samples)))
    dispersion = mean_test(record["pixel_dispersion"], 1.0)
    bias = mean_test(record["pixel_rank"], 0.5)
    covered = mean_test(record["pixel_coverage"][:, LEVELS.index(0.9)], 0.9)
    for name, test, wrong in (
        ("all pixels, spread", dispersion, "samples too narrow" if dispersion.mean > 1 else "samples too wide"),
        ("all pixels, mean", bias, "samples too low" if bias.mean > 0.5 else "samples too high"),
    ):
        rows.append((name, _p_value(test, simulations), wrong, none, covered[:2]))
    repeats = _repeats(record["ranks"], num_samples) if merge else {}
    # use the earlier p-value for both, since two p-values that differ only by rounding would be corrected as two
    tested = [row[1] if k not in repeats else math.nan for k, row in enumerate(rows)]
    adjusted = holm(torch.tensor(tested, dtype=torch.float64)).tolist()
    checks = []
    for k, (name, p_value, reading, facts, inside) in enumerate(rows):
        corrected = adjusted[repeats.get(k, k)]
        passed = not corrected <= alpha  # NaN, from a test that was not run, does not reject
        checks.append(Check(name, p_value, corrected, passed, "" if passed else reading, *facts, *inside))
    level = alpha / max(1, sum(not math.isnan(p_value) for p_value in tested))
    narrow, wide = detectable_spread(simulations, num_samples, level, POWER)
    enough = narrow >= 1 / CERTIFIABLE and wide <= CERTIFIABLE
    failed = not all(check.passed for check in checks)
    ratio, error = SpreadSkill(record["pixel_spread"], record["pixel_skill"]).ratio()
    return Judgement(tuple(checks), "fails" if failed else "passes" if enough else "too few to certify", narrow, wide,
                     detectable_shift(simulations, num_samples, level, POWER), ratio, error)


def _repeats(ranks: Tensor, num_samples: int) -> dict[int, int]:
    """Columns of ranks ``(S, Q)`` that equal an earlier one or its mirror image up to rounding, by index.

    The residual and the log likelihood of Gaussian noise are such a pair.
    """
    found: dict[int, int] = {}
    u = ranks.double() / num_samples
    for k in range(ranks.shape[1]):
        for j in range(k):
            apart = min(float((u[:, k] - u[:, j]).abs().mean()), float((u[:, k] + u[:, j] - 1).abs().mean()))
            if j not in found and apart < _ALIKE:
                found[k] = j
                break
    return found


def rank_coverage(ranks: Tensor, num_samples: int, level: float = 0.9) -> tuple[float, float]:
    """Coverage of the central interval at this level and its standard error, from ranks ``(S,)``.

    A rank r represents the probabilities from r / (N + 1) to (r + 1) / (N + 1), which may lie partly inside.
    """
    low, high = (1 - level) / 2 * (num_samples + 1), (1 + level) / 2 * (num_samples + 1)
    inside = ((ranks + 1.0).clamp(max=high) - ranks.double().clamp(min=low)).clamp(0, 1)
    error = float(inside.std()) / math.sqrt(len(ranks)) if len(ranks) > 1 else math.nan
    return float(inside.mean()), error


def _p_value(test: MeanTest, simulations: int) -> float:
    """p-value of a test; Student's approximation needs a few simulations."""
    return test.p_value if simulations >= 10 else math.nan


def _facts(truth: Tensor, mean: Tensor, std: Tensor) -> tuple[float, float, float]:
    """Mean and standard deviation of z-scores where there is a spread, and the contraction."""
    z = ((mean - truth) / std)[std > 0]
    variance = truth.var(unbiased=True) if len(truth) > 1 else torch.tensor(math.nan)
    contraction = float(1 - std.square().mean() / variance) if float(variance) > 0 else math.nan
    return (float(z.mean()) if len(z) else math.nan, float(z.std()) if len(z) > 1 else math.nan, contraction)


def _reading(ranks: Tensor, num_samples: int, low: str = "samples too low", high: str = "samples too high") -> str:
    """Kind of error that non-uniform ranks show: the larger of mean and dispersion, in standard errors."""
    u = (ranks + 0.5) / (num_samples + 1)
    scale = math.sqrt(len(ranks))
    bias = float((u.mean() - 0.5) * math.sqrt(12) * scale)
    # 12 (u - 1/2)^2 has mean 1 and variance 4/5 for uniform u
    dispersion = float((12 * (u - 0.5).square()).mean() - 1) * scale / math.sqrt(0.8)
    if abs(bias) > abs(dispersion):
        return low if bias > 0 else high
    return "samples too narrow" if dispersion > 0 else "samples too wide"
