"""A solver as a deepinv reconstructor. This module imports deepinv, so import it only where needed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from deepinv.models import Reconstructor
from deepinv.physics import GaussianNoise, Physics
from torch import Tensor

from invflow import operators
from invflow.likelihood import GaussianLikelihood
from invflow.operator import Operator
from invflow.posterior import Posterior
from invflow.reward import Reward
from invflow.solver import Solver

__all__ = ["SolverReconstructor"]


class SolverReconstructor(Reconstructor):  # type: ignore[misc]  # deepinv has no types
    """Images from ``model(y, physics)``; built and documented by :func:`invflow.deepinv_bridge.as_reconstructor`."""

    def __init__(self, solver: Solver, sigma: float | Tensor | None, num_samples: int, estimate: str,
                 per_set: tuple[str, ...], likelihood: Callable[[Operator, Tensor], Reward] | None, seed: int) -> None:
        super().__init__()
        self.solver, self.sigma, self.num_samples, self.estimate = solver, sigma, num_samples, estimate
        self.per_set, self.likelihood, self.seed = per_set, likelihood, seed

    @torch.no_grad()
    def forward(self, y: Any, physics: Physics, **kwargs: Any) -> Tensor:
        """Images ``(B, *image_shape)`` from measurements ``(B, ...)`` of the physics."""
        generator = self._generator()
        posterior = self._draw(y, physics, generator)
        if self.estimate == "mean":
            return posterior.mean()
        return posterior.resample(1, generator=generator).samples[:, 0]

    @torch.no_grad()
    def posterior(self, y: Any, physics: Physics) -> Posterior:
        """The whole posterior; :meth:`forward` returns its mean or a sample."""
        return self._draw(y, physics, self._generator())

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)

    def _draw(self, y: Any, physics: Physics, generator: torch.Generator) -> Posterior:
        kind: Any = operators.find("DeepinvOperator")
        prior = self.solver.prior
        shape = prior.image_shape if prior is not None else self.solver.image_shape
        if shape is None:
            raise ValueError(f"{type(self.solver).__name__} has no shape of images: set "
                             "solver.image_shape")
        operator = kind(physics, tuple(shape), per_set=self.per_set)
        measured = kind.as_measurement(y)
        if self.likelihood is not None:
            reward = self.likelihood(operator, measured)
        else:
            reward = GaussianLikelihood(operator, measured, self._sigma(physics))
        if prior is not None:
            reward = reward.to(prior.device)
        return self.solver.sample(reward, self.num_samples, generator=generator)

    def _sigma(self, physics: Physics) -> float | Tensor:
        if self.sigma is not None:
            return self.sigma
        noise = physics.noise_model
        level = getattr(noise, "sigma", None)
        if not isinstance(noise, GaussianNoise) or level is None:
            raise ValueError(f"{type(physics).__name__} has {type(noise).__name__}, not Gaussian noise of a known "
                             "level: pass as_reconstructor(solver, sigma=...), or likelihood=... for other noise")
        if not bool((torch.as_tensor(level) > 0).all()):
            raise ValueError("the physics has noise level 0, but a likelihood needs noise: pass "
                             "as_reconstructor(solver, sigma=...)")
        return torch.as_tensor(level).flatten()
