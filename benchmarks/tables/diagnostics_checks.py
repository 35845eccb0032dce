"""The checks behind ``converged``, one by one, and stricter or simpler ones for comparison."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from invflow.posterior import Posterior
from invflow.reward import Reward
from invflow.smc import effective_sample_size, reliable_k_hat
from invflow.solvers.noise.convergence import largest_residual

__all__ = ["checks_of", "rivals_of"]


def checks_of(posterior: Posterior, reward: Reward) -> dict[str, Tensor]:
    """The alarms of each check, ``(B,)``; ``converged`` is False where any of them is raised."""
    found, count = posterior.diagnostics, posterior.samples.shape[1]
    if "k_hat_path" in found:
        return _of_paths(found, count)
    checks: dict[str, Tensor] = {}
    if "memory" in found:
        checks |= {"share moved under 50%": found["share_moved"] < 0.5, "under half a quarter turn":
                   found["quarter_turns"] < 0.5, "drift over 4 standard errors": found["drift"].abs() > 4}
        if "missed_share" not in found:
            checks["memory over 0.5"] = found["memory"] > 0.5
    elif "distinct_ancestors" in found and not posterior.weighted:
        checks["under 10 independent particles"] = found["effective_ancestors"] < min(10, count / 2)
    if "least_ess" in found and "memory" not in found:
        checks["least effective sample size under 5%"] = found["least_ess"] < 0.05 * count
    if "solved" in found and not ("memory" in found and "missed_share" in found):
        checks["solved under 80%"] = found["solved"] < 0.8
    if posterior.weighted or "missed_share" in found:
        limit = 0.7 if "memory" in found else reliable_k_hat(count)
        ess = found["least_ess"] if "least_ess" in found else effective_sample_size(posterior.log_weights)
        checks["k-hat over its limit"] = (ess < 0.9 * count) & (found["k_hat"] > limit)
    if "missed_share" in found:
        checks["missed share over 2%"] = found["missed_share"] > 0.02
    if "bend" in found:
        checks["bend over 0.1"] = ~(found["bend"] <= 0.1)
    if "residual" in found:
        checks["residual"] = found["residual"] > largest_residual(reward).to(found["residual"])
    return checks


def _of_paths(found: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    k_hat = found["k_hat_path"].nan_to_num(nan=-torch.inf, posinf=-torch.inf).amax(1)
    error = (1 + k_hat) / math.sqrt(min(0.2 * count, 3 * math.sqrt(count)))
    return {"under 10 independent particles": found["effective_ancestors"] < min(10, count / 2),
            "k-hat along the path": k_hat - error > 0.7, "total discrepancy over N": found["total_discrepancy"] > count}


def rivals_of(posterior: Posterior) -> dict[str, Tensor]:
    """The alarms of checks that ``converged`` could use and does not, ``(B,)`` each."""
    found, count = posterior.diagnostics, posterior.samples.shape[1]
    rivals: dict[str, Tensor] = {}
    if "effective_ancestors" in found and "memory" not in found:
        rivals["under 20 independent particles"] = found["effective_ancestors"] < 20
    if "k_hat_path" in found:
        rivals["k-hat of the last weights over its limit"] = found["k_hat"] > reliable_k_hat(count)
        rivals["last effective sample size under 10%"] = found["ess_path"][:, -1] < 0.1 * count
        rivals["least effective sample size under 5%"] = found["least_ess"] < 0.05 * count
    return rivals
