"""Whether a run in noise space has converged, as far as its own numbers tell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from invflow._core.chunks import ChunkSize
from invflow.reward import Reward
from invflow.smc import effective_sample_size, precise, reliable_k_hat

__all__ = ["judge", "judge_chains", "judge_draws", "residual_of_samples"]

_Seen = tuple[Tensor, str, Tensor]  # which observations, what to say, its number

_LEAST_SHARE = 0.05  # of N in effective sample size
# independent particles that those left are worth, which tell a mean to a third of a standard deviation; half of N if
# that is less
_LEAST_ANCESTORS = 10
_MOST_CHI_SQUARE = 1.5  # a mean square in units of sigma^2, for many measured values
_STANDARD_DEVIATIONS = 4.0  # of a chi-squared mean, for few; of the objective of a draw; of the drift of chains
_EVEN = 0.9  # of N in effective sample size, from which weights are too even for their tail to matter
_LEAST_COUNT = 3  # of draws: one or two tell nothing
_MOST_MISSED = 0.02  # of the posterior, in solutions that the draws of randomise-then-optimise have not found
_LEAST_SOLVED = 0.8  # of the draws of randomise-then-optimise
_LEAST_MOVED = 0.5  # of the chains that start in them
_LEAST_TURNS = 0.5  # of those chains, in quarter turns
_MOST_MEMORY = 0.5  # of those chains, as a correlation
# of A f between draws, in standard deviations of the noise: at 0.15 a mean was seen to be off by 0.43 of the
# posterior's standard deviations
_MOST_BEND = 0.1


def residual_of_samples(reward: Reward, images: Tensor, log_weights: Tensor, chunk_size: int) -> Tensor | None:
    """Root of the weighted mean square of (y - A x) / sigma, ``(B,)``; None for a reward that has none.

    Args:
        reward: with ``chi_square(x)``, as :class:`~invflow.GaussianLikelihood` has.
        images: ``(B, N, *image_shape)``.
        log_weights: ``(B, N)``, of any normalisation.
        chunk_size: images at a time.
    """
    if not hasattr(reward, "chi_square"):
        return None
    count = images.shape[1]
    owner = torch.arange(len(images)).repeat_interleave(count)  # on the host, where rewards pick observations
    rows = images.flatten(0, 1)
    parts = ChunkSize(chunk_size, "the residual").over(
        len(rows), lambda part: reward.select(owner[part]).chi_square(rows[part, None])[:, 0])  # type: ignore[attr-defined]
    squares = precise(torch.cat([part for _, part in parts])).unflatten(0, (-1, count))
    result: Tensor | None = (log_weights.softmax(1) * squares).sum(1).sqrt()
    return result


def largest_residual(reward: Reward) -> Tensor:
    """Residual over which samples do not explain the measurement, ``(B,)`` or ``(1,)``.

    Averaged over measurements, the mean square of exact posterior samples is 1. For a single one it is a mean of m
    squared normal numbers: its bound is 1.5, and four of that mean's standard deviations above 1 where m is small.
    """
    values: Tensor = reward.count_observed()  # type: ignore[attr-defined]
    most = 1 + (_STANDARD_DEVIATIONS * (2 / precise(values).clamp(min=1)).sqrt()).clamp(min=_MOST_CHI_SQUARE - 1)
    return most.sqrt()


def judge(diagnostics: Mapping[str, Tensor], reward: Reward, count: int, *,
          moved: bool) -> tuple[Tensor, str | None]:
    """Which observations have converged, and what is to be said of the others.

    Args:
        diagnostics: of the run, each ``(B, ...)``: ``effective_ancestors``, ``least_ess``, ``k_hat`` and,
            where the reward has one, ``residual``.
        reward: over B observations.
        count: N.
        moved: whether the particles were resampled and moved; else they are weighted.

    Returns:
        ``(B,)`` booleans, and a warning or None.
    """
    seen: list[_Seen] = []
    least = _LEAST_SHARE * count
    if moved:
        independent, needed = diagnostics["effective_ancestors"], min(_LEAST_ANCESTORS, count / 2)
        seen.append((independent < needed, f"{{:.3g}} of {count} initial particles have descendants left, counted by "
                                           f"their shares (under {needed:.3g})", independent))
    else:
        limit = reliable_k_hat(count)
        heavy = (diagnostics["k_hat"] > limit) & (diagnostics["least_ess"] < _EVEN * count)
        seen.append((heavy, f"the k-hat of the weights is {{:.2g}} (over {limit:.2g})", diagnostics["k_hat"]))
    seen.append((diagnostics["least_ess"] < least, f"the least effective sample size is {{:.2g}} of {count} (under 5%)",
                 diagnostics["least_ess"]))
    advice = ("take more particles or more moves, or start from a trained adapter with proposal=, or on images from "
              "independent draws with start='rto'" if moved else
              "take more particles, or let them move with num_moves=5")
    return _verdict([*seen, *_see_residual(diagnostics, reward)], advice, count)


def judge_draws(diagnostics: Mapping[str, Tensor], objective: Tensor, ended: Tensor, reward: Reward, *,
                log_weights: Tensor | None) -> tuple[Tensor, Tensor, str | None]:
    """Which observations' draws by randomise-then-optimise are what they should be.

    Where A f is linear the least objective of a draw has, over the draws, a variance of at most 1.5 m: m / 2 from the
    perturbations alone, and up to m from their product with the measurement. A draw that lies four of these standard
    deviations over the median is caught in a worse minimum than the others.

    Args:
        diagnostics: of the run, each ``(B,)``: ``residual``, and ``k_hat`` where the draws are weighted, ``bend`` where
            they are not; ``missed_share`` of weighted draws.
        objective: ``(B, N)``, at the end.
        ended: ``(B, N)``, whether the optimiser ended by itself.
        reward: over B observations.
        log_weights: ``(B, N)``, of weighted draws.

    Returns:
        ``(B,)``, the share of draws that are solved; ``(B,)`` booleans; and a warning or None.
    """
    solved = ended
    if log_weights is None:
        count = precise(reward.count_observed()).expand(len(objective))  # type: ignore[attr-defined]
        bound = objective.median(1).values + _STANDARD_DEVIATIONS * (1.5 * count).sqrt()
        solved = ended & (objective <= bound[:, None])
    share = precise(solved).mean(1)
    seen = [(share < _LEAST_SOLVED, f"{{:.0%}} of the draws reached a minimum (under {_LEAST_SOLVED:.0%})", share)]
    advice = "take more iterations with max_iterations=, or start from a trained adapter with proposal="
    if log_weights is not None:
        limit, k_hat = reliable_k_hat(objective.shape[1]), diagnostics["k_hat"]
        uneven = effective_sample_size(log_weights) < _EVEN * objective.shape[1]
        seen.append((uneven & (k_hat > limit), f"the k-hat of the weights is {{:.2g}} (over {limit:.2g})", k_hat))
        seen.append(_see_missed(diagnostics))
        advice = "take more draws, or correct those without weights by moves, invflow.NoiseSMC(prior, start='rto')"
    elif "bend" in diagnostics:
        bend = diagnostics["bend"]
        # NaN, of a single draw, shows nothing and passes for nothing
        seen.append((~(bend <= _MOST_BEND),
                     f"A f bends by {{:.2g}} noise levels between the draws (over {_MOST_BEND}), so that the shares of "
                     "different explanations are not the posterior's", bend))
        if bool((share >= _LEAST_SOLVED).all()):
            advice = ("pass weights=True for few measured values, correct the draws by moves, "
                      "invflow.NoiseSMC(prior, start='rto'), or take them as an approximation")
    good, complaint = _verdict([*seen, *_see_residual(diagnostics, reward)], advice, objective.shape[1])
    return share, good, complaint


def judge_chains(diagnostics: Mapping[str, Tensor], reward: Reward, count: int, *,
                 weighted: bool) -> tuple[Tensor, str | None]:
    """Which observations' chains, started by randomise-then-optimise, have gone far enough.

    Args:
        diagnostics: of the run, each ``(B,)``: ``solved``, ``share_moved``, ``quarter_turns``, ``drift``,
            ``memory``, ``residual``, and ``k_hat``, ``least_ess`` and ``missed_share`` of weighted draws.
        reward: over B observations.
        count: N.
        weighted: whether the draws were weighted and resampled.

    Returns:
        ``(B,)`` booleans, and a warning or None.
    """
    moved, turns, drift = (diagnostics[name] for name in ("share_moved", "quarter_turns", "drift"))
    seen = [
        (moved < _LEAST_MOVED, f"{{:.0%}} of the particles have moved since the step size was frozen (under "
                               f"{_LEAST_MOVED:.0%})", moved),
        (turns < _LEAST_TURNS, f"the moves made {{:.2g}} quarter turns (under {_LEAST_TURNS})", turns),
        (drift.abs() > _STANDARD_DEVIATIONS, "the potential still drifts, by {:.2g} standard errors", drift),
    ]
    if weighted:
        limit, k_hat = 0.7, diagnostics["k_hat"]
        uneven = diagnostics["least_ess"] < _EVEN * count
        seen.append((uneven & (k_hat > limit), f"the k-hat of the first weights is {{:.2g}} (over {limit})", k_hat))
        seen.append(_see_missed(diagnostics))
    else:
        # weighted draws are right in their shares: it does no harm that chains stay where they were
        solved, memory = diagnostics["solved"], diagnostics["memory"]
        seen.append((memory > _MOST_MEMORY, f"the chains remember their starts, with a correlation of {{:.2g}} (over "
                                            f"{_MOST_MEMORY}): the shares of different explanations are those of "
                                            "randomise-then-optimise, which are no posterior's", memory))
        seen.append((solved < _LEAST_SOLVED, f"{{:.0%}} of the first draws reached a minimum (under "
                                             f"{_LEAST_SOLVED:.0%})", solved))
    return _verdict([*seen, *_see_residual(diagnostics, reward)],
                    "take more moves or leapfrog steps, or more iterations of the start, NoiseRTO(max_iterations=)",
                    count)


def _see_missed(diagnostics: Mapping[str, Tensor]) -> _Seen:
    missed = diagnostics["missed_share"]
    return (missed > _MOST_MISSED, "the equations of the draws have other solutions, which hold {:.0%} of the "
            f"posterior and have no weight (over {_MOST_MISSED:.0%}): the map folds, and the weights do not hold",
            missed)


def _see_residual(diagnostics: Mapping[str, Tensor], reward: Reward) -> list[_Seen]:
    if "residual" not in diagnostics:
        return []
    residual = diagnostics["residual"]
    bound = largest_residual(reward).to(residual).expand_as(residual)
    return [(residual > bound, "the residual is {:.3g} sigma", residual)]


def _verdict(seen: Sequence[_Seen], advice: str, count: int) -> tuple[Tensor, str | None]:
    """``(B,)``, where nothing bad was seen, and a warning or None."""
    few = torch.full_like(seen[0][0], count < _LEAST_COUNT)
    seen = [(few, f"there are too few draws to tell (under {_LEAST_COUNT})", precise(few)), *seen]
    failed = torch.stack([bad for bad, _, _ in seen]).any(0)
    if not bool(failed.any()):
        return ~failed, None
    b = int(failed.nonzero()[0])
    what = "; ".join(text.format(float(values[b])) for bad, text, values in seen if bool(bad[b]))
    return ~failed, (f"not converged for {int(failed.sum())} of {len(failed)} observations: in observation {b}, "
                     f"{what}. Do not trust these samples as the posterior; {advice}")
