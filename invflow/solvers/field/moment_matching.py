"""Moment matching posterior sampling."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from invflow._core.conjugate_gradients import solve
from invflow._core.shapes import column
from invflow.flowmap import FlowMap
from invflow.solvers.field.diffusion import DiffusionSampler, Scaled, SharedSettings, require_positive
from invflow.solvers.field.rows import Rows

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["MomentMatching"]

#: first and last noise level, for images in [-1, 1]
_LEVELS = (100.0, 0.001)


class MomentMatching(DiffusionSampler):
    r"""Moment matching posterior sampling (Rozet, Andry, Lanusse and Louppe 2024).

    Ancestral sampling with a denoiser for the posterior: the prior's denoiser plus :math:`\sigma_t^2` times the
    gradient of the log likelihood. The likelihood uses the covariance of the image that the denoiser itself implies,
    :math:`\sigma_t^2 J_D`, which is the right one for every Gaussian prior. The noise level falls from 100 to 0.001,
    evenly in its logarithm. deepinv's form has the same gradient, on the noise levels of a variance-preserving
    diffusion.

    Args:
        prior: Same as in :class:`DiffusionSampler`, as are the settings not listed here.
        steps: Number of network calls, each with ``iterations + 1`` backward passes (``iterations + 2`` in deepinv's
            form).
        iterations: Number of conjugate gradient steps for each linear system.
        weight: Factor of the gradient.

    Example:
        >>> import torch, invflow
        >>> from invflow.operators import Denoising
        >>> prior = invflow.GaussianMixtureFlow(torch.full((1, 1, 4, 4), 0.5), std=0.1)
        >>> likelihood = invflow.GaussianLikelihood(Denoising((1, 4, 4)), torch.full((2, 1, 4, 4), 0.7), sigma=0.1)
        >>> posterior = invflow.MomentMatching(prior, steps=10).sample(likelihood, 2)
        >>> posterior.nfe
        NFE(forward=10.0, backward=20.0)
    """

    most_steps = None

    def __init__(self, prior: FlowMap, *, steps: int = 256, iterations: int = 1, weight: float = 1.0,
                 **shared: Unpack[SharedSettings]) -> None:
        super().__init__(prior, steps, **shared)
        require_positive(weight=weight, iterations=iterations)
        self.iterations, self.weight = iterations, weight

    def _paper(self, scene: Scaled) -> Tensor:
        first, last = _LEVELS
        levels = [first * (last / first) ** (k / (self.steps - 1)) for k in range(self.steps)]
        x = first * scene.noise()
        for level, after in itertools.pairwise(levels):
            share = 1 - (after / level) ** 2
            x = x - share * (x - self._denoise(scene, x, level)) + after * math.sqrt(share) * scene.noise()
        return self._denoise(scene, x, last)

    def _denoise(self, scene: Scaled, x: Tensor, level: float) -> Tensor:
        """Mean of the image given its noisy version and the measurement."""
        if scene.rows.blank:
            return scene.denoise(x, level)
        leaf = x.detach().requires_grad_()
        with torch.enable_grad():
            denoised = scene.denoise(leaf, level)

        def pull_back(v: Tensor) -> Tensor:
            return torch.autograd.grad(denoised, leaf, scene.adjoint(v), retain_graph=True)[0]

        def covariance(v: Tensor) -> Tensor:
            return column(scene.sigma**2, v) * v + level**2 * scene.forward(pull_back(v))

        residual = scene.residual(denoised.detach())
        # a tolerance of 0, so that the number of iterations does not depend on the other rows
        found = solve(covariance, residual, None, self.iterations, 0.0)[0]
        return denoised.detach() + self.weight * level**2 * pull_back(found)

    def _deepinv(self, rows: Rows) -> Tensor:
        from deepinv.sampling import MomentMatchingDataFidelity

        from invflow.solvers.field.bridge import guided_diffusion

        fidelity = MomentMatchingDataFidelity(weight=self.weight, cg_max_iter=self.iterations, cg_tol=0.0)
        return self._from_unit(guided_diffusion(self.prior, rows, self.value_range, self.steps, fidelity))
