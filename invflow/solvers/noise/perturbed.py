"""Randomised optimisation problem whose minimiser is a draw: perturbed measurement and perturbed prior mean."""

from __future__ import annotations

import torch
from torch import Tensor

from invflow._core.shapes import with_axes
from invflow._core.watch import check_gradients
from invflow.flowmap import FlowMap
from invflow.likelihood import GaussianLikelihood
from invflow.smc import precise
from invflow.solvers.finite import FARTHEST, first_row, not_finite

__all__ = ["PerturbedProblem"]


class PerturbedProblem:
    """Problems of one chunk: noise xi, and a measurement with fresh noise.

    Args:
        prior: Flow map with f(z) = ``prior.one_step(z)``.
        likelihood: Likelihood of n observations, one per draw.
        xi: Prior noise, ``(n, *state_shape)``.
        error: Standard normal measurement noise, ``(n, *measurement_shape)``.
        places: (first, N), for errors: row r is draw ``first + r`` of all B N.

    Attributes:
        iteration: Iteration of the optimiser, for errors; set by the caller.
    """

    iteration = 0

    def __init__(self, prior: FlowMap, likelihood: GaussianLikelihood, xi: Tensor, error: Tensor,
                 places: tuple[int, int] = (0, 1)) -> None:
        self.prior, self.likelihood, self.xi, self.error, self.places = prior, likelihood, xi, error, places
        self.perturbed = likelihood.select(slice(None))
        sigma = with_axes(likelihood.sigma, error.ndim)
        self.perturbed.y = likelihood.y + sigma * error  # unobserved entries have no effect

    def value_and_gradient(self, noise: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Objective and gradient: noise ``(k, d)`` of the rows ``(k,)`` to ``(k,)`` in float64 and ``(k, d)``."""
        check_gradients("NoiseRTO")
        count = self.perturbed.count_observed()
        count = precise(count.expand(len(self.xi))[rows])
        likelihood = self.perturbed.select(rows)  # synchronises with the GPU: the remaining rows are needed on the host
        with torch.enable_grad():
            z = noise.detach().unflatten(1, self.xi.shape[1:]).requires_grad_()
            image = self.prior.one_step(z)
            residual = likelihood.chi_square(image[:, None])[:, 0]
            self.check(noise, image, residual, rows)
            misfit = 0.5 * count * residual
            gradient, = torch.autograd.grad(misfit.sum(), z)
        offset = (z.detach() - self.xi[rows]).flatten(1)
        value = precise(misfit.detach()) + 0.5 * precise(offset).square().sum(1)
        return value, (gradient + offset.view_as(gradient)).flatten(1)

    @torch.no_grad()
    def check(self, noise: Tensor, images: Tensor, misfit: Tensor, rows: Tensor) -> None:
        """Raise if an image is not finite or a misfit is NaN, except at trial steps beyond a hundred deviations."""
        broken = ~images.flatten(1).isfinite().all(1)
        row = first_row((broken | misfit.isnan()) & (noise.flatten(1).abs().amax(1) <= FARTHEST))
        if row is not None:
            place = divmod(self.places[0] + int(rows[row]), self.places[1])
            what = "image of the flow map" if bool(broken[row]) else "reward"
            raise not_finite("NoiseRTO", what, f"iteration {self.iteration}", *place)
