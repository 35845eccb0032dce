"""Checks of the settings of tilted sampling."""

from __future__ import annotations

from typing import Any

from invflow._core.chunks import check_chunk_size
from invflow.flowmap import FlowMap
from invflow.smc import RESAMPLERS
from invflow.solvers.tilting.conjugate import Conjugate
from invflow.solvers.tilting.kernels import KERNELS

__all__ = ["check_prior", "check_settings"]


def check_prior(prior: FlowMap) -> None:
    """Refuse what has no score to follow."""
    if not isinstance(prior, FlowMap):
        raise TypeError(f"FMTT follows a FlowMap, not a {type(prior).__name__}: pass invflow.load_prior('mnist'), say")
    reason = prior.refusal("score", "FMTT")
    if reason is not None:
        raise ValueError(reason)


def check_settings(weights: str, kernel: str, proposal: str | Conjugate, resample_threshold: float, resampling: str,
                   schedule: Any, max_shift: float, chunk_size: int | None) -> None:
    """Raise a ValueError for settings of FMTT that are unknown, out of range, or do not go together."""
    if weights not in ("twisted", "jarzynski", "none"):
        raise ValueError(f"there are no weights {weights!r}: choose 'twisted', 'jarzynski' or 'none'")
    if weights == "jarzynski" and kernel not in ("sde", "heun") and kernel in KERNELS:
        raise ValueError(
            f"Jarzynski weights belong to the continuous dynamics, and the {kernel!r} steps are jumps, which they "
            "do not describe: pass weights='twisted', or kernel='sde'"
        )
    if kernel == "heun" and weights != "jarzynski":
        raise ValueError(f"the density of Heun's steps is not known, so that {weights!r} weights have nothing to "
                         "compare with: pass weights='jarzynski', or kernel='sde'")
    if proposal not in ("gradient", "conjugate") and not isinstance(proposal, Conjugate):
        raise ValueError(f"there is no proposal {proposal!r}: choose 'gradient' or 'conjugate', or pass a "
                         "Conjugate with settings of its own")
    if weights == "jarzynski" and proposal != "gradient":
        raise ValueError("Jarzynski weights belong to the dynamics with the reward's gradient: pass "
                         "weights='twisted', or proposal='gradient'")
    if resampling not in RESAMPLERS:
        raise ValueError(f"there is no resampling {resampling!r}: choose one of {', '.join(RESAMPLERS)}")
    if isinstance(schedule, str) and schedule not in ("linear", "annealed"):
        raise ValueError(f"there is no schedule {schedule!r}: choose 'linear' or 'annealed', or pass a function")
    if not 0 <= resample_threshold <= 1:
        raise ValueError(f"resample_threshold={resample_threshold} is a share of the particles, from 0 to 1")
    if not max_shift > 0:
        raise ValueError(f"max_shift={max_shift} must be over 0")
    check_chunk_size(chunk_size)
