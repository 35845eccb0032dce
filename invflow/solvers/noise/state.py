"""Where a run of sequential Monte Carlo in noise space stands."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from invflow.solvers.noise.target import Particles

__all__ = ["NoiseSMCState"]


@dataclass(frozen=True)
class NoiseSMCState:
    """Where a run stands after one temperature; B observations with N particles each.

    Attributes:
        particles: with ``noise`` ``(B, N, *state_shape)`` and ``images`` ``(B, N, *image_shape)``.
        temperature: ``(B,)``, lambda, from 0 to 1.
        log_weights: ``(B, N)``, of the particles; all 0 where they have been resampled.
        log_evidence: ``(B,)``, of the target at this temperature; NaN where it is not known.
        ancestors: ``(B, N)``, the initial particle that each descends from.
        step_size: ``(B,)``, h of this step's moves.
        first_temperature: ``(B,)``, the first one over 0, which tells how informative the reward is; 0 before.
        ess: ``(B,)``, effective sample size of this step's weights, in particles; NaN where none was made.
        k_hat: ``(B,)``, tail index of this step's weights; NaN where none was made.
        acceptance: ``(B,)``, mean over this step's moves; NaN where none was made.
        adapting: whether step size or metric were still to change after this step, so that it was no move of the
            frozen chains; only with a start by randomise-then-optimise.
    """

    particles: Particles
    temperature: Tensor
    log_weights: Tensor
    log_evidence: Tensor
    ancestors: Tensor
    step_size: Tensor
    first_temperature: Tensor
    ess: Tensor
    k_hat: Tensor
    acceptance: Tensor
    adapting: bool = False
