"""State of a run of sequential Monte Carlo in noise space."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from invflow.solvers.noise.target import Particles

__all__ = ["NoiseSMCState"]


@dataclass(frozen=True)
class NoiseSMCState:
    """State of a run after one temperature, for B observations with N particles each.

    Attributes:
        particles: Particles with ``noise`` ``(B, N, *state_shape)`` and ``images`` ``(B, N, *image_shape)``.
        temperature: lambda, from 0 to 1, ``(B,)``.
        log_weights: Log weights of the particles, ``(B, N)``; all 0 after resampling.
        log_evidence: Log evidence of the target at this temperature, ``(B,)``; NaN if unknown.
        ancestors: Initial particle that each particle descends from, ``(B, N)``.
        step_size: h of this step's moves, ``(B,)``.
        first_temperature: First temperature above 0, which shows how informative the reward is, ``(B,)``; 0 before it.
        ess: Effective sample size of this step's weights, in particles, ``(B,)``; NaN in a step without weights.
        k_hat: Tail index of this step's weights, ``(B,)``; NaN in a step without weights.
        acceptance: Mean acceptance of this step's moves, ``(B,)``; NaN in a step without moves.
        adapting: Whether step size or metric still changed after this step, so that it does not belong to the frozen
            chains; only with a start by randomise-then-optimise.
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
