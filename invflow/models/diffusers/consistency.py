"""Schedulers of models that jump to data: meaning of the prediction, and times of renoising."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from invflow._core.shapes import with_axes
from invflow.models.consistency import Times
from invflow.models.diffusers.paths import FlowMatchingPath, scheduled_mu
from invflow.models.paths import Jumps, Predict, VariancePreservingPath, edm_path, trigonometric_path

__all__ = ["consistency_path", "jumps_to_data"]

#: schedulers that add noise back after each jump to the data
JUMPING = ("LCMScheduler", "TCDScheduler", "CMStochasticIterativeScheduler", "SCMScheduler", "FlowMatchLCMScheduler")


def kind_of(thing: Any, names: tuple[str, ...] | set[str] | dict[str, Any]) -> str | None:
    """The first class of an object that is among the names, found without importing diffusers."""
    return next((c.__name__ for c in type(thing).__mro__ if c.__name__ in names), None)


def jumps_to_data(scheduler: Any) -> bool:
    """Whether a scheduler belongs to a model that jumps to data, whose prediction is not a velocity."""
    return kind_of(scheduler, JUMPING) is not None


def consistency_path(model: nn.Module, scheduler: Any, scale: float, shift: float, tokens: int) -> tuple[Jumps, Times]:
    """Read the jump of a model, and the times at which its scheduler renoises.

    Args:
        model: Model that the scheduler belongs to.
        scheduler: One of :data:`JUMPING`.
        scale: For flow matching: the model's timestep at pure noise.
        shift: Shift of a flow-matching grid.
        tokens: Number of patches of one state.

    Raises:
        ValueError: If the scheduler changes the size of its states.
    """
    kind, config = kind_of(scheduler, JUMPING), scheduler.config
    if kind in ("LCMScheduler", "TCDScheduler"):
        boundary = _Boundary(config.timestep_scaling) if kind == "LCMScheduler" else None
        path = VariancePreservingPath(scheduler.alphas_cumprod, config.prediction_type, boundary, unit_noise=True)
        return path, _Schedule(scheduler, lambda own: path.time_of_step(own.timesteps))
    if kind == "CMStochasticIterativeScheduler":
        return _Preconditioned(config.sigma_min, config.sigma_max, config.sigma_data), _Schedule(
            scheduler, lambda own: 1 / (1 + own.sigmas[:-1]))
    if kind == "SCMScheduler":
        times = _Schedule(scheduler, lambda own: own.timesteps[:-1].cos() / (
            own.timesteps[:-1].cos() + own.timesteps[:-1].sin()), intermediate_timesteps=None)
        # Sana's transformer still predicts a flow-matching velocity: its pipeline computes x - sigma prediction
        return (FlowMatchingPath(1.0, 1.0) if kind_of(model, ("SanaTransformer2DModel",)) else _Trigonometric()), times
    if getattr(config, "scale_factors", None):
        raise ValueError("FlowMatchLCMScheduler has scale_factors: its states grow from step to step. A flow map's "
                         "states keep one shape: pass a scheduler without them")
    return FlowMatchingPath(scale, shift), _Schedule(scheduler, lambda own: 1 - own.sigmas[:-1], sigmas=True,
                                                     mu=scheduled_mu(config, tokens))


class _Schedule:
    """Times of a scheduler's own steps, the first set to 0; uses a copy, because schedulers store their steps."""

    def __init__(self, scheduler: Any, read: Any, *, sigmas: bool = False, mu: float | None = None,
                 **settings: Any) -> None:
        self.scheduler, self.read, self.sigmas, self.mu, self.settings = scheduler, read, sigmas, mu, settings

    def __call__(self, steps: int) -> list[float]:
        own = copy.deepcopy(self.scheduler)
        if self.sigmas:
            own.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps).tolist(), mu=self.mu)
        elif steps == 2 and "intermediate_timesteps" in self.settings:
            own.set_timesteps(steps)
        else:
            own.set_timesteps(steps, **self.settings)
        times = torch.as_tensor(self.read(own)).double().tolist()
        return [0.0, *times[1:]]


class _Boundary:
    """Boundary coefficients that make a latent consistency model the identity at its first step."""

    def __init__(self, scaling: float, spread: float = 0.5) -> None:
        self.scaling, self.spread = scaling, spread

    def __call__(self, k: Tensor) -> tuple[Tensor, Tensor]:
        scaled = k * self.scaling
        skip = self.spread**2 / (scaled.square() + self.spread**2)
        return skip, scaled / (scaled.square() + self.spread**2).sqrt()


class _Preconditioned:
    """Consistency models on m + sigma z: f = c_skip y + c_out F(y / sqrt(sigma^2 + s^2), 250 log sigma)."""

    def __init__(self, sigma_min: float, sigma_max: float, sigma_data: float) -> None:
        self.sigma_min, self.sigma_data, self.path = sigma_min, sigma_data, edm_path(sigma_min, sigma_max)

    def estimate(self, predict: Predict, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """End of the jump of f, and the noise implied by it."""
        def jump(y: Tensor, sigma: Tensor) -> Tensor:
            level = with_axes(sigma.reshape(-1), y.ndim)
            spread = (level.square() + self.sigma_data**2).sqrt()
            gap = level - self.sigma_min
            skip = self.sigma_data**2 / (gap.square() + self.sigma_data**2)
            return skip * y + gap * self.sigma_data / spread * predict(y / spread, 250 * sigma.log())

        return self.path.estimate(jump, x, t)


class _Trigonometric:
    """TrigFlow: f = cos(t) y - sin(t) F(y, t) on y = cos(t) m + sin(t) z."""

    def __init__(self) -> None:
        self.path = trigonometric_path()

    def estimate(self, predict: Predict, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """End of the jump of f, and the noise implied by it."""
        def jump(y: Tensor, time: Tensor) -> Tensor:
            angle = with_axes(time.reshape(-1), y.ndim)
            return angle.cos() * y - angle.sin() * predict(y, time)

        return self.path.estimate(jump, x, t)
