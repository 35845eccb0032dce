"""Information in a diffusers scheduler about its model: time scale, prediction, and grid of times.

Each path provides two things: the velocity of the linear path x_t = (1 - t) z + t m, from one prediction of the
model, and the times of the scheduler's equal steps.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from invflow.models.paths import Path, Predict, VariancePreservingPath

__all__ = ["FlowMatchingPath", "Path", "VariancePreservingPath", "is_flow_matching", "make_path", "scheduled_mu",
           "scheduled_shift"]

PREDICTIONS = ("epsilon", "v_prediction", "sample")


class FlowMatchingPath:
    """Flow matching: sigma = 1 - t is the share of noise, and the model predicts noise - data.

    The shift of a scheduler only moves its steps, from u to sigma = shift (1 - u) / (1 + (shift - 1)(1 - u)). The
    model's timestep, ``scale * sigma``, does not depend on it.

    Args:
        scale: The model's timestep at pure noise.
        shift: Shift of the grid, > 0; 1 for equal steps.
        reverse: Whether the model's timestep runs from 0 at the noise to ``scale`` at the data, and it predicts
            data - noise.
    """

    def __init__(self, scale: float, shift: float, reverse: bool = False) -> None:
        if not 0 < shift < math.inf:
            raise ValueError(f"shift={shift}: pass a number over 0, 1 for equal steps or 3 for more near the noise")
        self.scale, self.shift, self.reverse = scale, shift, reverse

    def estimate(self, predict: Predict, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Data x + (1 - t) b and noise x - t b."""
        b = self.velocity(predict, x, t)
        return x + (1 - t) * b, x - t * b

    def velocity(self, predict: Predict, x: Tensor, t: Tensor) -> Tensor:
        """Minus the prediction."""
        if self.reverse:
            return predict(x, (self.scale * t).flatten())
        return -predict(x, (self.scale * (1 - t)).flatten())

    def to_time(self, u: Tensor) -> Tensor:
        """1 - sigma."""
        return u / (u + self.shift * (1 - u))

    def to_position(self, t: Tensor) -> Tensor:
        """Position before the shift."""
        return self.shift * t / (self.shift * t + (1 - t))


def is_flow_matching(scheduler: Any) -> bool:
    """Whether the model that a scheduler belongs to predicts noise - data along the linear path."""
    prediction = getattr(getattr(scheduler, "config", None), "prediction_type", None)
    return "FlowMatch" in type(scheduler).__name__ or prediction == "flow_prediction"


def make_path(scheduler: Any, *, scale: float | None, shift: float | None, tokens: int,
              reverse: bool = False) -> Path:
    """Build the path of a diffusers scheduler.

    Args:
        scheduler: Scheduler whose ``config`` describes the model's timesteps.
        scale: Scale of the timesteps of a flow-matching model; None uses the scheduler's number of training steps.
        shift: Shift of a flow-matching grid; None uses the scheduler's, which may depend on the number of tokens.
        tokens: Number of patches of one state.
        reverse: Whether the model's timesteps run in the other direction.

    Raises:
        ValueError: For an unsupported scheduler, or a shift for one without a shift.
    """
    name, config = type(scheduler).__name__, getattr(scheduler, "config", None)
    prediction = getattr(config, "prediction_type", None)
    if name.startswith("FlowMap") or is_flow_matching(scheduler):
        if getattr(config, "invert_sigmas", False):
            raise ValueError(f"{name} has invert_sigmas=True: its timesteps run in reverse. Wrap the model's "
                             "velocity with invflow.from_velocity")
        trained = float(getattr(config, "num_train_timesteps", 1000))
        return FlowMatchingPath(trained if scale is None else scale,
                                scheduled_shift(config, tokens) if shift is None else shift, reverse)
    if hasattr(scheduler, "alphas_cumprod") and prediction in PREDICTIONS:
        if shift is not None or scale is not None:
            raise ValueError(f"shift and timestep_scale apply to flow matching only: {name} is a diffusion with a "
                             "fixed table of steps; leave them out")
        return VariancePreservingPath(scheduler.alphas_cumprod, str(prediction))
    raise ValueError(
        f"{name} with prediction_type={prediction!r} is neither flow matching (FlowMatchEulerDiscreteScheduler) nor a "
        f"variance-preserving diffusion (DDPMScheduler, DDIMScheduler) that predicts one of {', '.join(PREDICTIONS)}: "
        "wrap the model's velocity with invflow.from_velocity, or its denoiser D(x, sigma) on m + sigma z with "
        "invflow.from_deepinv, or, if it jumps to data, invflow.from_consistency"
    )


def scheduled_mu(config: Any, tokens: int) -> float | None:
    """Log of a dynamic shift, or the shift itself, for a number of tokens; None if it is not dynamic."""
    if not getattr(config, "use_dynamic_shifting", False):
        return None
    slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
    mu: float = config.base_shift + slope * (tokens - config.base_image_seq_len)
    return mu


def scheduled_shift(config: Any, tokens: int) -> float:
    """Shift of a flow-matching scheduler for a number of tokens."""
    mu = scheduled_mu(config, tokens)
    if mu is None:
        return float(getattr(config, "shift", None) or getattr(config, "flow_shift", None) or 1.0)
    return math.exp(mu) if getattr(config, "time_shift_type", "exponential") == "exponential" else mu
