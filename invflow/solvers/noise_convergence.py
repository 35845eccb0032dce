"""Whether a run in noise space has converged, as far as its own numbers tell."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from invflow.reward import Reward
from invflow.smc import precise, reliable_k_hat

__all__ = ["judge", "mean_squared_residual"]

_LEAST_SHARE = 0.05  # of the initial particles that still have descendants, or of N in effective sample size
_MOST_RESIDUAL = 1.5  # in sigma^2, for many measured values
_STANDARD_DEVIATIONS = 4.0  # of a chi-squared mean, for few


def mean_squared_residual(reward: Reward, images: Tensor, log_weights: Tensor, chunk_size: int) -> Tensor | None:
    """Weighted mean of the squared residual in units of sigma^2, ``(B,)``; None for a reward that has none.

    Args:
        reward: with ``residual(x)``, as :class:`~invflow.GaussianLikelihood` has.
        images: ``(B, N, *image_shape)``.
        log_weights: ``(B, N)``, of any normalisation.
        chunk_size: images at a time.
    """
    if not hasattr(reward, "residual"):
        return None
    count = images.shape[1]
    owner = torch.arange(len(images), device=images.device).repeat_interleave(count)
    parts = [reward.select(index).residual(x[:, None])[:, 0]  # type: ignore[attr-defined]
             for x, index in zip(images.flatten(0, 1).split(chunk_size), owner.split(chunk_size))]
    return (log_weights.softmax(1) * precise(torch.cat(parts)).unflatten(0, (-1, count))).sum(1)


def largest_residual(reward: Reward) -> Tensor:
    """Mean squared residual over which samples do not explain the measurement, ``(B,)`` or ``(1,)``.

    Averaged over measurements, that of exact posterior samples is 1. For a single one it is a mean of m squared
    normal numbers: the bound is 1.5, and four of that mean's standard deviations above 1 where m is small.
    """
    values: Tensor = reward.count_observed()  # type: ignore[attr-defined]
    return 1 + (_STANDARD_DEVIATIONS * (2 / precise(values).clamp(min=1)).sqrt()).clamp(min=_MOST_RESIDUAL - 1)


def judge(diagnostics: Mapping[str, Tensor], reward: Reward, count: int, *,
          moved: bool) -> tuple[Tensor, str | None]:
    """Which observations have converged, and what is to be said of the others.

    Args:
        diagnostics: of the run, each ``(B, ...)``: ``distinct_ancestors``, ``least_ess``, ``k_hat`` and, where
            the reward has one, ``residual``.
        reward: over B observations.
        count: N.
        moved: whether the particles were resampled and moved; else they are weighted.

    Returns:
        ``(B,)`` booleans, and a warning or None.
    """
    seen: list[tuple[Tensor, str, Tensor]] = []  # which observations, what to say, its number

    def see(bad: Tensor, text: str, values: Tensor) -> None:
        seen.append((bad, text, values))

    least = _LEAST_SHARE * count
    if moved:
        ancestors = diagnostics["distinct_ancestors"]
        see(ancestors < least, f"{{:.0f}} of {count} initial particles have descendants left (under 5%)", ancestors)
    else:
        limit = reliable_k_hat(count)
        see(diagnostics["k_hat"] > limit, f"the k-hat of the weights is {{:.2g}} (over {limit:.2g})",
            diagnostics["k_hat"])
    see(diagnostics["least_ess"] < least, f"the least effective sample size is {{:.2g}} of {count} (under 5%)",
        diagnostics["least_ess"])
    if "residual" in diagnostics:
        residual = diagnostics["residual"]
        bound = largest_residual(reward).to(residual).expand_as(residual)
        see(residual > bound, "the mean squared residual is {:.3g} sigma^2", residual)
    failed = torch.stack([bad for bad, _, _ in seen]).any(0)
    if not bool(failed.any()):
        return ~failed, None
    b = int(failed.nonzero()[0])
    what = "; ".join(text.format(float(values[b])) for bad, text, values in seen if bool(bad[b]))
    advice = ("take more particles or more moves, or start from a trained adapter with proposal=" if moved else
              "take more particles, or let them move with num_moves=5")
    return ~failed, (f"not converged for {int(failed.sum())} of {len(failed)} observations: in observation {b}, "
                     f"{what}. Do not trust these samples as the posterior; {advice}")
