"""What a scheduler of the diffusers library says about a model: its clock, its prediction, its grid of times.

Each path answers two questions: the velocity of the linear path x_t = (1 - t) z + t m, from one prediction of the
model; and the times at which the scheduler would place equal steps.
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

    The shift of a scheduler moves its steps, u to sigma = shift (1 - u) / (1 + (shift - 1)(1 - u)); the model's
    clock, ``scale * sigma``, does not know of it.

    Args:
        scale: what the model's timestep is at pure noise.
        shift: of the grid, over 0; 1 for equal steps.
        reverse: whether the model's clock runs from 0 at the noise to ``scale`` at the data, and it predicts
            data - noise.
    """

    def __init__(self, scale: float, shift: float, reverse: bool = False) -> None:
        if not 0 < shift < math.inf:
            raise ValueError(f"shift={shift}: pass a number over 0; 1 makes equal steps, 3 more of them near the noise")
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
        """The shift undone."""
        return self.shift * t / (self.shift * t + (1 - t))


def is_flow_matching(scheduler: Any) -> bool:
    """Whether the model that a scheduler belongs to predicts noise - data along the linear path."""
    prediction = getattr(getattr(scheduler, "config", None), "prediction_type", None)
    return "FlowMatch" in type(scheduler).__name__ or prediction == "flow_prediction"


def make_path(scheduler: Any, *, scale: float | None, shift: float | None, tokens: int,
              reverse: bool = False) -> Path:
    """Read a scheduler of diffusers.

    Args:
        scheduler: what has the model's clock in its ``config``.
        scale: of the timesteps of a flow-matching model; None takes the scheduler's number of training steps.
        shift: of a flow-matching grid; None takes the scheduler's, by the number of tokens where that is dynamic.
        tokens: patches of one state.
        reverse: whether the model's clock runs the other way.

    Raises:
        ValueError: for a scheduler of another kind, or a shift where there is none.
    """
    name, config = type(scheduler).__name__, getattr(scheduler, "config", None)
    prediction = getattr(config, "prediction_type", None)
    if name.startswith("FlowMap") or is_flow_matching(scheduler):
        if getattr(config, "invert_sigmas", False):
            raise ValueError(f"{name} has invert_sigmas=True, a clock that runs the other way: wrap the model's "
                             "velocity with invflow.from_velocity")
        trained = float(getattr(config, "num_train_timesteps", 1000))
        return FlowMatchingPath(trained if scale is None else scale,
                                scheduled_shift(config, tokens) if shift is None else shift, reverse)
    if hasattr(scheduler, "alphas_cumprod") and prediction in PREDICTIONS:
        if shift is not None or scale is not None:
            raise ValueError(f"shift and timestep_scale belong to flow matching: {name} is a diffusion with its own "
                             "table of steps; leave them out")
        return VariancePreservingPath(scheduler.alphas_cumprod, str(prediction))
    raise ValueError(
        f"{name} with prediction_type={prediction!r} is neither flow matching (FlowMatchEulerDiscreteScheduler) nor a "
        f"variance-preserving diffusion (DDPMScheduler, DDIMScheduler) that predicts one of {', '.join(PREDICTIONS)}: "
        "wrap the model's velocity with invflow.from_velocity, its denoiser D(x, sigma) on m + sigma z with "
        "invflow.from_deepinv, or, if it jumps to data, invflow.from_consistency"
    )


def scheduled_mu(config: Any, tokens: int) -> float | None:
    """The logarithm of a dynamic shift, or the shift itself, by the number of tokens; None where it is not dynamic."""
    if not getattr(config, "use_dynamic_shifting", False):
        return None
    slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
    mu: float = config.base_shift + slope * (tokens - config.base_image_seq_len)
    return mu


def scheduled_shift(config: Any, tokens: int) -> float:
    """The shift of a flow-matching scheduler, for so many tokens."""
    mu = scheduled_mu(config, tokens)
    if mu is None:
        return float(getattr(config, "shift", None) or getattr(config, "flow_shift", None) or 1.0)
    return math.exp(mu) if getattr(config, "time_shift_type", "exponential") == "exponential" else mu
