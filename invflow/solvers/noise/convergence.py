"""Convergence checks for runs in noise space, from their own diagnostics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from invflow._core.chunks import ChunkSize
from invflow.reward import Reward
from invflow.smc import effective_sample_size, precise, reliable_k_hat

__all__ = ["judge", "judge_chains", "judge_draws", "residual_of_samples"]

_Seen = tuple[Tensor, str, Tensor]  # observations concerned, message, number in the message

_LEAST_SHARE = 0.05  # of N in effective sample size
# independent particles to which those left are equivalent, which give a mean to a third of a standard deviation; half
# of N if that is less
_LEAST_ANCESTORS = 10
_MOST_CHI_SQUARE = 1.5  # a mean square in units of sigma^2, for many measured values
_STANDARD_DEVIATIONS = 4.0  # for a chi-squared mean of few values, the objective of a draw, and the drift of chains
_EVEN = 0.9  # share of N in effective sample size above which the weights are too even for their tail to matter
_LEAST_COUNT = 3  # draws: one or two show nothing
_MOST_MISSED = 0.02  # share of the posterior in solutions that the draws of randomise-then-optimise did not find
_LEAST_SOLVED = 0.8  # share of the draws of randomise-then-optimise
_LEAST_MOVED = 0.5  # share of the chains that start at these draws
_LEAST_TURNS = 0.5  # quarter turns of those chains
_MOST_MEMORY = 0.5  # correlation of those chains with their start
# bend of A f between draws, in standard deviations of the noise: at 0.15 a mean was off by 0.43 posterior standard
# deviations
_MOST_BEND = 0.1


def residual_of_samples(reward: Reward, images: Tensor, log_weights: Tensor, chunk_size: int) -> Tensor | None:
    """Weighted root mean square of (y - A x) / sigma, ``(B,)``; None for a reward without it.

    Args:
        reward: Reward; one with ``chi_square(x)``, such as :class:`~invflow.GaussianLikelihood`, has a residual.
        images: Samples, ``(B, N, *image_shape)``.
        log_weights: Log weights, ``(B, N)``, with any normalisation.
        chunk_size: Number of images at a time.
    """
    if not hasattr(reward, "chi_square"):
        return None
    count = images.shape[1]
    owner = torch.arange(len(images)).repeat_interleave(count)  # on the host, where rewards select observations
    rows = images.flatten(0, 1)
    parts = ChunkSize(chunk_size, "the residual").over(
        len(rows), lambda part: reward.select(owner[part]).chi_square(rows[part, None])[:, 0])  # type: ignore[attr-defined]
    squares = precise(torch.cat([part for _, part in parts])).unflatten(0, (-1, count))
    result: Tensor | None = (log_weights.softmax(1) * squares).sum(1).sqrt()
    return result


def largest_residual(reward: Reward) -> Tensor:
    """Residual above which samples do not explain the measurement, ``(B,)`` or ``(1,)``.

    Averaged over measurements, the mean squared residual of exact posterior samples is 1. For a single measurement it
    is a mean of m squared normal numbers: its bound is 1.5, or, if m is small, four standard deviations of that mean
    above 1.
    """
    values: Tensor = reward.count_observed()  # type: ignore[attr-defined]
    most = 1 + (_STANDARD_DEVIATIONS * (2 / precise(values).clamp(min=1)).sqrt()).clamp(min=_MOST_CHI_SQUARE - 1)
    return most.sqrt()


def judge(diagnostics: Mapping[str, Tensor], reward: Reward, count: int, *,
          moved: bool) -> tuple[Tensor, str | None]:
    """Check which observations have converged, and describe the failures.

    Args:
        diagnostics: Diagnostics of the run, each ``(B, ...)``: ``effective_ancestors``, ``least_ess``, ``k_hat`` and,
            if the reward has one, ``residual``.
        reward: Reward over B observations.
        count: Number of particles N.
        moved: Whether the particles were resampled and moved; otherwise they are weighted.

    Returns:
        ``(B,)`` booleans, and a warning or None.
    """
    seen: list[_Seen] = []
    least = _LEAST_SHARE * count
    if moved:
        independent, needed = diagnostics["effective_ancestors"], min(_LEAST_ANCESTORS, count / 2)
        seen.append((independent < needed, f"effectively {{:.3g}} of {count} initial particles have descendants left "
                                           f"(under {needed:.3g})", independent))
    else:
        limit = reliable_k_hat(count)
        heavy = (diagnostics["k_hat"] > limit) & (diagnostics["least_ess"] < _EVEN * count)
        seen.append((heavy, f"the k-hat of the weights is {{:.2g}} (over {limit:.2g})", diagnostics["k_hat"]))
    seen.append((diagnostics["least_ess"] < least, f"the least effective sample size is {{:.2g}} of {count} (under 5%)",
                 diagnostics["least_ess"]))
    advice = ("use more particles or more moves, start from a trained adapter with proposal=, or, on images, start "
              "from independent draws with start='rto'" if moved else
              "use more particles, or move them with num_moves=5")
    return _verdict([*seen, *_see_residual(diagnostics, reward)], advice, count)


def judge_draws(diagnostics: Mapping[str, Tensor], objective: Tensor, ended: Tensor, reward: Reward, *,
                log_weights: Tensor | None) -> tuple[Tensor, Tensor, str | None]:
    """Check for which observations the draws of randomise-then-optimise are sound.

    If A f is linear, the minimal objective has a variance over the draws of at most 1.5 m: m / 2 from the perturbations
    alone, and up to m from their product with the measurement. A draw that lies four of these standard deviations above
    the median is trapped in a worse minimum than the others.

    Args:
        diagnostics: Diagnostics of the run, each ``(B,)``: ``residual``; ``k_hat`` and ``missed_share`` of weighted
            draws; ``bend`` of unweighted draws.
        objective: Final objective, ``(B, N)``.
        ended: Whether the optimiser stopped by itself, ``(B, N)``.
        reward: Reward over B observations.
        log_weights: Log weights of weighted draws, ``(B, N)``.

    Returns:
        The share of solved draws, ``(B,)``; ``(B,)`` booleans; and a warning or None.
    """
    solved = ended
    if log_weights is None:
        count = precise(reward.count_observed()).expand(len(objective))  # type: ignore[attr-defined]
        bound = objective.median(1).values + _STANDARD_DEVIATIONS * (1.5 * count).sqrt()
        solved = ended & (objective <= bound[:, None])
    share = precise(solved).mean(1)
    seen = [(share < _LEAST_SOLVED, f"{{:.0%}} of the draws reached a minimum (under {_LEAST_SOLVED:.0%})", share)]
    advice = "use more iterations with max_iterations=, or start from a trained adapter with proposal="
    if log_weights is not None:
        limit, k_hat = reliable_k_hat(objective.shape[1]), diagnostics["k_hat"]
        uneven = effective_sample_size(log_weights) < _EVEN * objective.shape[1]
        seen.append((uneven & (k_hat > limit), f"the k-hat of the weights is {{:.2g}} (over {limit:.2g})", k_hat))
        seen.append(_see_missed(diagnostics))
        advice = "use more draws, or correct unweighted draws by moves, invflow.NoiseSMC(prior, start='rto')"
    elif "bend" in diagnostics:
        bend = diagnostics["bend"]
        # a single draw has NaN, which shows nothing and does not count as converged
        seen.append((~(bend <= _MOST_BEND),
                     f"A f bends by {{:.2g}} noise levels between the draws (over {_MOST_BEND}), so the shares of "
                     "different explanations are not those of the posterior", bend))
        if bool((share >= _LEAST_SOLVED).all()):
            advice = ("pass weights=True for few measured values, correct the draws by moves, "
                      "invflow.NoiseSMC(prior, start='rto'), or treat them as an approximation")
    good, complaint = _verdict([*seen, *_see_residual(diagnostics, reward)], advice, objective.shape[1])
    return share, good, complaint


def judge_chains(diagnostics: Mapping[str, Tensor], reward: Reward, count: int, *,
                 weighted: bool) -> tuple[Tensor, str | None]:
    """Check for which observations the chains started by randomise-then-optimise have run long enough.

    Args:
        diagnostics: Diagnostics of the run, each ``(B,)``: ``solved``, ``share_moved``, ``quarter_turns``, ``drift``,
            ``memory``, ``residual``, and ``k_hat``, ``least_ess`` and ``missed_share`` of weighted draws.
        reward: Reward over B observations.
        count: Number of chains N.
        weighted: Whether the draws were weighted and resampled.

    Returns:
        ``(B,)`` booleans, and a warning or None.
    """
    moved, turns, drift = (diagnostics[name] for name in ("share_moved", "quarter_turns", "drift"))
    seen = [
        (moved < _LEAST_MOVED, f"only {{:.0%}} of the particles have moved since the step size was frozen (under "
                               f"{_LEAST_MOVED:.0%})", moved),
        (turns < _LEAST_TURNS, f"the moves made {{:.2g}} quarter turns (under {_LEAST_TURNS})", turns),
        (drift.abs() > _STANDARD_DEVIATIONS, "the potential is still drifting, by {:.2g} standard errors", drift),
    ]
    if weighted:
        limit, k_hat = 0.7, diagnostics["k_hat"]
        uneven = diagnostics["least_ess"] < _EVEN * count
        seen.append((uneven & (k_hat > limit), f"the k-hat of the first weights is {{:.2g}} (over {limit})", k_hat))
        seen.append(_see_missed(diagnostics))
    else:
        # weighted draws have correct shares, so chains may stay near their start
        solved, memory = diagnostics["solved"], diagnostics["memory"]
        seen.append((memory > _MOST_MEMORY, f"the chains are correlated with their starts by {{:.2g}} (over "
                                            f"{_MOST_MEMORY}): the shares of different explanations are those of "
                                            "randomise-then-optimise, not those of the posterior", memory))
        seen.append((solved < _LEAST_SOLVED, f"{{:.0%}} of the first draws reached a minimum (under "
                                             f"{_LEAST_SOLVED:.0%})", solved))
    return _verdict([*seen, *_see_residual(diagnostics, reward)],
                    "use more moves or leapfrog steps, or more iterations of the start, NoiseRTO(max_iterations=)",
                    count)


def _see_missed(diagnostics: Mapping[str, Tensor]) -> _Seen:
    missed = diagnostics["missed_share"]
    return (missed > _MOST_MISSED, "the equations of the draws have other solutions, which hold {:.0%} of the "
            f"posterior but have no weight (over {_MOST_MISSED:.0%}): the map folds, and the weights are not valid",
            missed)


def _see_residual(diagnostics: Mapping[str, Tensor], reward: Reward) -> list[_Seen]:
    if "residual" not in diagnostics:
        return []
    residual = diagnostics["residual"]
    bound = largest_residual(reward).to(residual).expand_as(residual)
    return [(residual > bound, "the residual is {:.3g} sigma", residual)]


def _verdict(seen: Sequence[_Seen], advice: str, count: int) -> tuple[Tensor, str | None]:
    """Which observations passed all checks, ``(B,)``, and a warning or None."""
    few = torch.full_like(seen[0][0], count < _LEAST_COUNT)
    seen = [(few, f"there are too few draws to check (under {_LEAST_COUNT})", precise(few)), *seen]
    failed = torch.stack([bad for bad, _, _ in seen]).any(0)
    if not bool(failed.any()):
        return ~failed, None
    b = int(failed.nonzero()[0])
    what = "; ".join(text.format(float(values[b])) for bad, text, values in seen if bool(bad[b]))
    return ~failed, (f"not converged for {int(failed.sum())} of {len(failed)} observations: in observation {b}, "
                     f"{what}. Do not trust these samples as the posterior; {advice}")
