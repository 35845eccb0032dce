"""What a scheduler of the diffusers library says about a model: its clock, its prediction, its grid of times.

Each path answers two questions: the velocity of the linear path x_t = (1 - t) z + t m, from one prediction of the
model; and the times at which the scheduler would place equal steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = ["FlowMatchingPath", "Path", "VariancePreservingPath", "is_flow_matching", "make_path"]

Predict = Callable[[Tensor, Tensor], Tensor]
PREDICTIONS = ("epsilon", "v_prediction", "sample")


class Path(Protocol):
    """Velocity from a prediction, and a grid of times."""

    def velocity(self, predict: Predict, x: Tensor, t: Tensor) -> Tensor:
        """Velocity b_t(x): states ``(n, *shape)`` and times ``(n, 1, ..., 1)`` to ``(n, *shape)``."""

    def to_time(self, u: Tensor) -> Tensor:
        """Time of a position u in [0, 1], in which the scheduler's steps are equal; 0 to 0 and 1 to 1."""

    def to_position(self, t: Tensor) -> Tensor:
        """The inverse of :meth:`to_time`."""


class FlowMatchingPath:
    """Flow matching: sigma = 1 - t is the share of noise, and the model predicts noise - data.

    The shift of a scheduler moves its steps, u to sigma = shift (1 - u) / (1 + (shift - 1)(1 - u)); the model's
    clock, ``scale * sigma``, does not know of it.

    Args:
        scale: what the model's timestep is at pure noise.
        shift: of the grid, over 0; 1 for equal steps.
    """

    def __init__(self, scale: float, shift: float) -> None:
        if not 0 < shift < math.inf:
            raise ValueError(f"shift={shift}: pass a number over 0; 1 makes equal steps, 3 more of them near the noise")
        self.scale, self.shift = scale, shift

    def velocity(self, predict: Predict, x: Tensor, t: Tensor) -> Tensor:
        """Minus the prediction."""
        return -predict(x, (self.scale * (1 - t)).flatten())

    def to_time(self, u: Tensor) -> Tensor:
        """1 - sigma."""
        return u / (u + self.shift * (1 - u))

    def to_position(self, t: Tensor) -> Tensor:
        """The shift undone."""
        return self.shift * t / (self.shift * t + (1 - t))


class VariancePreservingPath:
    r"""Variance-preserving diffusion, alpha_k m + sigma_k z with alpha_k^2 + sigma_k^2 = 1, as a linear path.

    The signal-to-noise ratio of x_t = (1 - t) z + t m is t / (1 - t). The step k at which the diffusion has the same,
    alpha_k / sigma_k = t / (1 - t), holds the same state up to a scale:

    .. math:: \alpha_k m + \sigma_k z = (\alpha_k + \sigma_k)\, x_t, \qquad t = \alpha_k / (\alpha_k + \sigma_k).

    So the prediction at step k for :math:`(\alpha_k + \sigma_k) x_t` is one about x_t, and any of noise, data or v
    gives E[m - z | x_t]. k is not whole: it is interpolated between the training steps, linearly in the angle
    arctan(alpha_k / sigma_k). An Euler step of this velocity is a deterministic DDIM step (Song, Meng, Ermon 2021).

    Before the first time known to the model (its training ends with a little signal left) it is asked for the state
    rescaled to the noise that is there at that time; after the last, the velocity is the one of the last.

    Args:
        alphas_cumprod: ``(K,)``, alpha_k^2, decreasing.
        prediction: ``"epsilon"``, ``"v_prediction"`` or ``"sample"``.
    """

    def __init__(self, alphas_cumprod: Tensor, prediction: str) -> None:
        square = alphas_cumprod.detach().to("cpu", torch.float64).flip(0)
        alpha, sigma = square.sqrt(), (1 - square).clamp(min=0).sqrt()
        steps = torch.arange(len(square) - 1, -1, -1, dtype=torch.float64)
        # with no signal left a noise prediction says nothing about the data: it is not asked there
        known = (alpha > (1e-3 if prediction == "epsilon" else -1.0)) & (sigma > 0)
        self.prediction = prediction
        self.angles, self.steps = torch.atan2(alpha, sigma)[known], steps[known]
        if len(self.angles) < 2 or bool((self.angles.diff() <= 0).any()):
            raise ValueError("alphas_cumprod must decrease from under 1 towards 0, over at least two steps with signal")
        ends = [torch.zeros(1, dtype=torch.float64), torch.full((1,), math.pi / 2, dtype=torch.float64)]
        self.grid = torch.cat([*(ends[:1] if self.angles[0] > 0 else []), self.angles, ends[1]])
        self.positions = torch.linspace(0, 1, len(self.grid), dtype=torch.float64)

    def velocity(self, predict: Predict, x: Tensor, t: Tensor) -> Tensor:
        """E[m - z | x_t = x], from one prediction."""
        # a rounded end of the table must not lie outside it
        angle = _angle(t).clamp(float(self.angles[0]), float(self.angles[-1]))
        alpha, sigma = angle.sin(), angle.cos()
        scale = alpha + sigma
        time, noise_share = alpha / scale, sigma / scale
        early = t < time
        y = torch.where(early, x * noise_share / (1 - t).clamp(min=1e-12), x)
        k = _interpolate(angle, self.angles, self.steps)
        out = predict(y * scale, k.flatten())
        if self.prediction == "epsilon":
            z = out
            m = (y - noise_share * z) / time
        elif self.prediction == "sample":
            m = out
            z = (y - time * m) / noise_share
        else:
            m, z = alpha * scale * y - sigma * out, sigma * scale * y + alpha * out
        # the state that the model saw lacks the signal in x: x itself says what its noise is
        z = torch.where(early, (x - t * m) / (1 - t).clamp(min=1e-12), z)
        return m - z

    def to_time(self, u: Tensor) -> Tensor:
        """Time at which the grid of steps, which is uniform in u, has got."""
        angle = _interpolate(u, self.positions, self.grid)
        return angle.sin() / (angle.sin() + angle.cos())

    def to_position(self, t: Tensor) -> Tensor:
        """Where on the grid of steps a time is."""
        return _interpolate(_angle(t), self.grid, self.positions)


def _angle(t: Tensor) -> Tensor:
    return torch.atan2(t, 1 - t)


def _interpolate(x: Tensor, knots: Tensor, values: Tensor) -> Tensor:
    """Piecewise linear, differentiable in x; beyond the ends the last piece goes on."""
    knots, values = knots.to(x), values.to(x)
    right = torch.searchsorted(knots, x.detach().contiguous()).clamp(1, len(knots) - 1)
    left = right - 1
    share = (x - knots[left]) / (knots[right] - knots[left])
    return torch.lerp(values[left], values[right], share)


def is_flow_matching(scheduler: Any) -> bool:
    """Whether the model that a scheduler belongs to predicts noise - data along the linear path."""
    prediction = getattr(getattr(scheduler, "config", None), "prediction_type", None)
    return "FlowMatch" in type(scheduler).__name__ or prediction == "flow_prediction"


def make_path(scheduler: Any, *, scale: float | None, shift: float | None, tokens: int) -> Path:
    """Read a scheduler of diffusers.

    Args:
        scheduler: what has the model's clock in its ``config``.
        scale: of the timesteps of a flow-matching model; None takes the scheduler's number of training steps.
        shift: of a flow-matching grid; None takes the scheduler's, by the number of tokens where that is dynamic.
        tokens: patches of one state.

    Raises:
        ValueError: for a scheduler of another kind, or a shift where there is none.
    """
    name, config = type(scheduler).__name__, getattr(scheduler, "config", None)
    prediction = getattr(config, "prediction_type", None)
    if is_flow_matching(scheduler):
        if getattr(config, "invert_sigmas", False):
            raise ValueError(f"{name} has invert_sigmas=True, a clock that runs the other way: wrap the model's "
                             "velocity with invflow.from_velocity")
        trained = float(getattr(config, "num_train_timesteps", 1000))
        return FlowMatchingPath(trained if scale is None else scale,
                                _scheduled_shift(config, tokens) if shift is None else shift)
    if hasattr(scheduler, "alphas_cumprod") and prediction in PREDICTIONS:
        if shift is not None or scale is not None:
            raise ValueError(f"shift and timestep_scale belong to flow matching: {name} is a diffusion with its own "
                             "table of steps; leave them out")
        return VariancePreservingPath(scheduler.alphas_cumprod, str(prediction))
    raise ValueError(
        f"{name} with prediction_type={prediction!r} is neither flow matching (FlowMatchEulerDiscreteScheduler) nor a "
        f"variance-preserving diffusion (DDPMScheduler, DDIMScheduler) that predicts one of {', '.join(PREDICTIONS)}: "
        "wrap the model's velocity with invflow.from_velocity, or its denoiser with invflow.from_deepinv"
    )


def _scheduled_shift(config: Any, tokens: int) -> float:
    if not getattr(config, "use_dynamic_shifting", False):
        return float(getattr(config, "shift", None) or getattr(config, "flow_shift", None) or 1.0)
    slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
    mu = config.base_shift + slope * (tokens - config.base_image_seq_len)
    return math.exp(mu) if getattr(config, "time_shift_type", "exponential") == "exponential" else mu
