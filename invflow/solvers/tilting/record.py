"""Diagnostics of the weights along a path, and a verdict on whether the particles can be trusted."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor

from invflow.likelihood import GaussianLikelihood
from invflow.reward import Reward
from invflow.smc import (
    conditional_ess,
    count_distinct,
    effective_ancestors,
    effective_sample_size,
    pareto_k_hat,
    precise,
)
from invflow.solvers.tilting.particles import FMTTState

__all__ = ["PathRecord", "advise"]

#: tail index above which the mean of the weights converges too slowly to be useful (Vehtari et al. 2024)
_WORST_K_HAT = 0.7
#: effective sample size, as a share of N, above which weights are too even for their tail to matter
_EVEN = 0.5
#: largest share of particles with a replaced reward for which Jarzynski weights count as those of a continuous reward
_MOST_FLOORED = 0.01


class PathRecord:
    r"""Diagnostics collected along the path, and the verdict on whether the particles have converged.

    The discrepancy of a step with increments w of the weights W is :math:`D_k = \log (\sum W w^2 / (\sum W w)^2) =
    \log (N / \mathrm{CESS}_k)`. It is the Renyi divergence of order two between the law that the particles represented
    before the step and the one after it. Two sums follow:

    - The **total discrepancy** is :math:`\sum_k D_k`. Divided by N, it is about the variance of the log evidence
      (Syed, Bouchard-Cote, Chern and Doucet 2024, "Optimised annealed sequential Monte Carlo samplers").
    - The **thermodynamic length** is :math:`\sum_k \sqrt{D_k}`. If the increments are small, it is the sum of their
      standard deviations. With Jarzynski weights and many steps it tends to the Fisher-Rao length of the path of
      tilted laws as the flow carries them to the data (with the flow map, p e^{g(t) r}; Crooks 2007, "Measuring
      thermodynamic length"; Sivak and Crooks 2012), which does not depend on how the path is divided. Twisted weights
      also contain the noise of each step, so compare their lengths at equal numbers of steps.

    The weights :math:`r_0(x_0)` at the start count as a step. A discrepancy estimated from N particles never exceeds
    log N.
    """

    def __init__(self) -> None:
        self.times: list[float] = []
        self.calls: list[float] = []
        names = ("ess", "reward", "spread", "capped", "gap", "k_hat", "torn")
        self.columns: dict[str, list[Tensor]] = {name: [] for name in names}
        self.resamplings: Tensor | None = None
        self.previous: Tensor | None = None

    def add(self, state: FMTTState, calls: float = math.nan) -> None:
        """Add the state after one more step; ``calls`` is the number of calls per particle so far."""
        shares = state.log_weights.softmax(1)
        columns = self.columns
        self.times.append(state.time)
        self.calls.append(calls)
        ess = effective_sample_size(state.log_weights)
        columns["ess"].append(ess)
        even = ess >= _EVEN * shares.shape[1]
        columns["k_hat"].append(torch.where(even, torch.nan, pareto_k_hat(state.log_weights)))
        columns["torn"].append(_torn(state))
        # a particle of weight zero does not count in the mean, even if its reward is -inf
        rewards = torch.where(shares > 0, precise(state.rewards), 0.0)
        columns["reward"].append((shares * rewards).sum(1))
        columns["capped"].append(precise(state.capped))
        before, increments = self._increments(state)
        columns["spread"].append(_spread(before, increments))
        columns["gap"].append(_discrepancy(before, increments))
        count = state.resampled.long()
        self.resamplings = count if self.resamplings is None else self.resamplings + count

    def _increments(self, state: FMTTState) -> tuple[Tensor, Tensor]:
        """Log weights before the last step, equal if it began with resampling, and their increments."""
        after = precise(state.log_weights)
        before = torch.zeros_like(after)
        if self.previous is not None:
            before = torch.where(state.resampled[:, None], before, self.previous)
        self.previous = after
        return before, torch.where(before > -torch.inf, after - before, 0.0)

    def finish(self, state: FMTTState, solver: str, *, weighted: bool = True, advice: str = "",
               continuous: bool = False) -> dict[str, Any]:
        """The diagnostics by name; warns if an observation has not converged.

        Args:
            state: Last state of the path.
            solver: Name of the solver, for the warning.
            weighted: Whether the posterior keeps the weights; without them the weights must be nearly equal.
            advice: What else to try, for the warning.
            continuous: Whether the weights hold only for continuous rewards, as Jarzynski's do.
        """
        ess, gap, k_hat, torn = (torch.stack(self.columns[name], dim=1) for name in ("ess", "gap", "k_hat", "torn"))
        found = {
            "times": self.times, "calls_path": self.calls, "ess_path": ess,
            "reward_path": torch.stack(self.columns["reward"], dim=1),
            "increment_std": torch.stack(self.columns["spread"][1:], dim=1), "discrepancy_path": gap,
            "thermodynamic_length": gap.sqrt().sum(1), "total_discrepancy": gap.sum(1),
            "least_ess": ess.min(1).values, "resamplings": self.resamplings,
            "distinct_ancestors": count_distinct(state.ancestors),
            "effective_ancestors": effective_ancestors(state.ancestors, state.log_weights),
            "k_hat": pareto_k_hat(state.log_weights), "k_hat_path": k_hat,
            "capped_share": torch.stack(self.columns["capped"][1:], dim=1).mean(1),
        }
        broken = torn.any(1) if continuous else torch.zeros_like(torn[:, 0])
        found["converged"] = _verdict(solver, state.log_weights.shape[1], found, broken, weighted, advice)
        return found


def _torn(state: FMTTState) -> Tensor:
    """Whether the reward drops to -inf, ``(B,)``: for some particles, while it varies over the others."""
    high = torch.where(state.floored, -torch.inf, state.rewards).amax(1)
    low = torch.where(state.floored, torch.inf, state.rewards).amin(1)
    return (precise(state.floored).mean(1) > _MOST_FLOORED) & (high > low)


def _spread(before: Tensor, increments: Tensor) -> Tensor:
    """Standard deviation of finite log weight increments under the weights before the step, ``(B,)``."""
    alive = increments > -torch.inf
    increments = torch.where(alive, increments, 0.0)
    shares = torch.where(alive, before, -torch.inf).softmax(1).nan_to_num(nan=0.0)
    mean = (shares * increments).sum(1, keepdim=True)
    return (shares * (increments - mean).square()).sum(1).sqrt()


def _discrepancy(before: Tensor, increments: Tensor) -> Tensor:
    """log (N / CESS) for a step, ``(B,)``; at least 0 up to rounding, at most log N."""
    count = before.shape[1]
    share = conditional_ess(before, increments).clamp(min=1.0) / count
    return -share.clamp(max=1.0).log()


def advise(reward: Reward, conjugate: bool) -> str:
    """A better setting for this reward in a sampler guided by gradients; empty if there is none."""
    if not conjugate and isinstance(reward, GaussianLikelihood) and reward.operator.linear:
        return ", or FMTT's proposal='conjugate' with schedule='annealed', which conditions on the measurement"
    return ""


def _verdict(solver: str, count: int, found: dict[str, Any], torn: Tensor, weighted: bool, advice: str) -> Tensor:
    """Whether each observation has converged, ``(B,)``; warns with the numbers of the worst one.

    Three conditions must hold. First, there must be ten independent particles, which give a mean to a third of a
    standard deviation; fewer show nothing about the spread. :func:`~invflow.smc.effective_ancestors` counts them; its
    count is at most the effective sample size and the number of distinct ancestors. If there are fewer than twenty
    particles, half of them must be independent, and at least three. Second, at every step, the weights must have a mean
    that an average can estimate, because particles lost in a step are missing from all later weights: where the weights
    are uneven, k-hat may exceed 0.7 by at most its standard error, (1 + k) / sqrt(M) for M weights in the tail (Hosking
    and Wallis 1987). Third, the log evidence must have a standard deviation below 1, so the total discrepancy must not
    exceed N.
    """
    needed = max(3.0, min(10.0, count / 2)) if weighted else max(3.0, count / 2)
    independent, path, discrepancy = found["effective_ancestors"], found["k_hat_path"], found["total_discrepancy"]
    # infinite if few of the largest weights differ: that alone is no failure, and the ESS detects one
    k_hat = path.nan_to_num(nan=-torch.inf, posinf=-torch.inf).amax(1)
    error = (1 + k_hat) / math.sqrt(min(0.2 * count, 3 * math.sqrt(count)))
    heavy = k_hat - error > _WORST_K_HAT
    converged = (independent >= needed) & ~heavy & (discrepancy <= count) & ~torn
    if not bool(converged.all()):
        worst = int(torch.where(converged, torch.inf, independent).argmin())
        what = "amount to" if weighted else "would, if they were weighted, amount to"
        breaks = (", and its reward drops to -inf, where Jarzynski weights do not hold (pass weights='twisted')"
                  if bool(torn[worst]) else "")
        warnings.warn(
            f"{solver} has not converged for {int((~converged).sum())} of {len(converged)} observations: in "
            f"observation {worst}, the {count} particles {what} {float(independent[worst]):.3g} independent ones "
            f"(required: {needed:.3g}; distinct ancestors: {int(found['distinct_ancestors'][worst])}, effective "
            f"sample size: {float(found['ess_path'][worst, -1]):.3g}). The largest k-hat along the path is "
            f"{float(k_hat[worst].clamp(min=0)):.2g} (limit: {_WORST_K_HAT} plus its error), and the total discrepancy "
            f"is {float(discrepancy[worst]):.3g} (limit: {count}){breaks}. Do not trust the spread: use more particles "
            "or more steps, or a solver made for sharp likelihoods, "
            f"invflow.NoiseSMC(prior){advice}",
            stacklevel=6)
    result: Tensor = converged
    return result
