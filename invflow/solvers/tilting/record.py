"""How the weights of particles fared along a path, and whether the particles can be trusted."""

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

#: over this tail index the mean of the weights converges too slowly to be of use (Vehtari et al. 2024)
_WORST_K_HAT = 0.7
#: share of N in effective sample size from which weights are too even for their tail to matter
_EVEN = 0.5
#: share of particles whose reward has a stand-in up to which Jarzynski weights are taken to follow a continuous reward
_MOST_FLOORED = 0.01


class PathRecord:
    r"""Diagnostics collected along the path, and the verdict on whether the particles have converged.

    The discrepancy of a step with increments w of the weights W is :math:`D_k = \log (\sum W w^2 / (\sum W w)^2) =
    \log (N / \mathrm{CESS}_k)`, the Renyi divergence of order two between the law that the particles had and the one
    that they have come to stand for. From it

    - the **total discrepancy** is :math:`\sum_k D_k`; divided by N it is about the variance of the log evidence
      (Syed, Bouchard-Cote, Chern and Doucet 2024, "Optimised annealed sequential Monte Carlo samplers");
    - the **thermodynamic length** is :math:`\sum_k \sqrt{D_k}`. Where the increments are small it is the sum of their
      standard deviations, and with Jarzynski weights and many steps it tends to the Fisher-Rao length of the path of
      tilted laws as the flow carries them to the data (with the flow map, p e^{g(t) r}; Crooks 2007, "Measuring
      thermodynamic length"; Sivak and Crooks 2012), which does not depend on how the path is divided. Twisted
      weights also hold the noise of each step: compare theirs at equal steps.

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
        """Take in the state after one more step, by which each particle has taken so many calls."""
        shares = state.log_weights.softmax(1)
        columns = self.columns
        self.times.append(state.time)
        self.calls.append(calls)
        ess = effective_sample_size(state.log_weights)
        columns["ess"].append(ess)
        even = ess >= _EVEN * shares.shape[1]
        columns["k_hat"].append(torch.where(even, torch.nan, pareto_k_hat(state.log_weights)))
        columns["torn"].append(_torn(state))
        # a reward of -inf in a particle of weight zero says nothing about the mean
        rewards = torch.where(shares > 0, precise(state.rewards), 0.0)
        columns["reward"].append((shares * rewards).sum(1))
        columns["capped"].append(precise(state.capped))
        before, increments = self._increments(state)
        columns["spread"].append(_spread(before, increments))
        columns["gap"].append(_discrepancy(before, increments))
        count = state.resampled.long()
        self.resamplings = count if self.resamplings is None else self.resamplings + count

    def _increments(self, state: FMTTState) -> tuple[Tensor, Tensor]:
        """Log weights before the last step, equal where it began with resampling, and what it added to them."""
        after = precise(state.log_weights)
        before = torch.zeros_like(after)
        if self.previous is not None:
            before = torch.where(state.resampled[:, None], before, self.previous)
        self.previous = after
        return before, torch.where(before > -torch.inf, after - before, 0.0)

    def finish(self, state: FMTTState, solver: str, *, weighted: bool = True, advice: str = "",
               continuous: bool = False) -> dict[str, Any]:
        """The diagnostics by name; warns where an observation has not converged.

        Args:
            state: the last one.
            solver: its name, for the warning.
            weighted: False where the weights were left out, and have to be all but equal for that to be right.
            advice: what else to try, for the warning.
            continuous: whether the weights hold for continuous rewards only, as Jarzynski's do.
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
    """Where the reward breaks off, ``(B,)``: it is -inf of some particles, and not the same of all others."""
    high = torch.where(state.floored, -torch.inf, state.rewards).amax(1)
    low = torch.where(state.floored, torch.inf, state.rewards).amin(1)
    return (precise(state.floored).mean(1) > _MOST_FLOORED) & (high > low)


def _spread(before: Tensor, increments: Tensor) -> Tensor:
    """Standard deviation of log weight increments under the weights before them, ``(B,)``, over those not lost."""
    alive = increments > -torch.inf
    increments = torch.where(alive, increments, 0.0)
    shares = torch.where(alive, before, -torch.inf).softmax(1).nan_to_num(nan=0.0)
    mean = (shares * increments).sum(1, keepdim=True)
    return (shares * (increments - mean).square()).sum(1).sqrt()


def _discrepancy(before: Tensor, increments: Tensor) -> Tensor:
    """log (N / CESS) of a step, ``(B,)``; at least 0 up to rounding, at most log N."""
    count = before.shape[1]
    share = conditional_ess(before, increments).clamp(min=1.0) / count
    return -share.clamp(max=1.0).log()


def advise(reward: Reward, conjugate: bool) -> str:
    """What a sampler guided by gradients can do better for this reward; empty where there is nothing to say."""
    if not conjugate and isinstance(reward, GaussianLikelihood) and reward.operator.linear:
        return ", or FMTT's proposal='conjugate' with schedule='annealed', which conditions on the measurement"
    return ""


def _verdict(solver: str, count: int, found: dict[str, Any], torn: Tensor, weighted: bool, advice: str) -> Tensor:
    """Whether each observation has converged, ``(B,)``; warns with the worst one's figures.
 Ten independent particles tell a mean to a third of a standard deviation; with fewer nothing is said about spread. They
are counted by :func:`~invflow.smc.effective_ancestors`, which is at most the effective sample size and the number of
different ancestors. Where there are under twenty particles, half of them are asked for, and of one or two nothing is
known. On top of that the weights must have a mean that an average can find, all along the path, since what was lost in
a step is missing from the weights of all later ones: where they are uneven, k-hat may exceed 0.7 by no more than its
standard error, (1 + k) / sqrt(M) for M weights in the tail (Hosking and Wallis 1987). And the log evidence must have a
standard deviation under 1, for which the total discrepancy must not exceed N.
    """
    needed = max(3.0, min(10.0, count / 2)) if weighted else max(3.0, count / 2)
    independent, path, discrepancy = found["effective_ancestors"], found["k_hat_path"], found["total_discrepancy"]
    # infinite where few of the largest weights differ: by itself that is no failure, and ESS tells if it is
    k_hat = path.nan_to_num(nan=-torch.inf, posinf=-torch.inf).amax(1)
    error = (1 + k_hat) / math.sqrt(min(0.2 * count, 3 * math.sqrt(count)))
    heavy = k_hat - error > _WORST_K_HAT
    converged = (independent >= needed) & ~heavy & (discrepancy <= count) & ~torn
    if not bool(converged.all()):
        worst = int(torch.where(converged, torch.inf, independent).argmin())
        what = "is left with" if weighted else "would, with the weights that were left out, be left with"
        breaks = (", and its reward breaks off to -inf, where Jarzynski weights do not hold (pass weights='twisted')"
                  if bool(torn[worst]) else "")
        warnings.warn(
            f"{solver} has not converged for {int((~converged).sum())} of {len(converged)} observations: of {count} "
            f"particles, observation {worst} {what} the worth of {float(independent[worst]):.3g} independent ones "
            f"(asked for: {needed:.3g}; distinct ancestors: {int(found['distinct_ancestors'][worst])}, effective "
            f"sample size: {float(found['ess_path'][worst, -1]):.3g}), with a greatest k-hat of "
            f"{float(k_hat[worst].clamp(min=0)):.2g} along the path (at most {_WORST_K_HAT}, but for its error) and a "
            f"total discrepancy of {float(discrepancy[worst]):.3g} (at most {count}){breaks}. Its spread is not to be "
            "trusted: take more particles or more steps, or a solver made for sharp likelihoods, "
            f"invflow.NoiseSMC(prior){advice}",
            stacklevel=6)
    result: Tensor = converged
    return result
