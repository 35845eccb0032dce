"""Pseudoinverse-guided diffusion."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from invflow._core.conjugate_gradients import solve
from invflow._core.shapes import column
from invflow.flowmap import FlowMap
from invflow.solvers.field.diffusion import DiffusionSampler, Scaled, SharedSettings, evenly, require_positive
from invflow.solvers.field.rows import Rows

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["PiGDM"]


class PiGDM(DiffusionSampler):
    r"""Pseudoinverse-guided diffusion (Song, Vahdat, Mardani and Kautz 2023, algorithm 1).

    The method treats the image given its noisy version as a Gaussian around the denoised image with variance
    :math:`r_t^2 = 1 - \bar\alpha_t`. This is right for white data of unit variance and too wide for any other. DDIM
    steps are shifted by :math:`\sqrt{\bar\alpha_s \bar\alpha_t} r_t^2` times the gradient of the log likelihood, the
    weight that the authors' code uses at every noise level. deepinv's form uses the gradient unweighted, in an
    ancestral sampler, with variance :math:`\sigma_t^2 / (1 + \sigma_t^2)` for images in [0, 1].

    Args:
        prior: Same as in :class:`DiffusionSampler`, as are the settings not listed here.
        steps: Number of network calls, each with a backward pass.
        eta: Share of new noise in DDIM, in [0, 1]; the default 1 is the ancestral sampler.
        weight: Factor of the gradient.

    Example:
        >>> import torch, invflow
        >>> from invflow.operators import Denoising
        >>> prior = invflow.GaussianMixtureFlow(torch.full((1, 1, 4, 4), 0.5), std=0.1)
        >>> likelihood = invflow.GaussianLikelihood(Denoising((1, 4, 4)), torch.full((2, 1, 4, 4), 0.7), sigma=0.1)
        >>> invflow.PiGDM(prior, steps=10).sample(likelihood, 3).samples.shape
        torch.Size([2, 3, 1, 4, 4])
    """

    uses_system = True

    def __init__(self, prior: FlowMap, *, steps: int = 100, eta: float | None = None, weight: float = 1.0,
                 **shared: Unpack[SharedSettings]) -> None:
        super().__init__(prior, steps, **shared)
        require_positive(weight=weight)
        if eta is not None and not 0 <= eta <= 1:
            raise ValueError(f"eta={eta} must lie in [0, 1]")
        self._only_paper(eta=eta)
        self.eta, self.weight = eta, weight

    def _paper(self, scene: Scaled) -> Tensor:
        eta = 1.0 if self.eta is None else self.eta
        bars = evenly(self.steps)
        x = scene.noise()
        for k in reversed(range(self.steps)):
            bar, after = bars[k], bars[k - 1] if k else 1.0
            fresh = eta * math.sqrt((1 - bar / after) * (1 - after) / (1 - bar))
            kept = math.sqrt(max(1 - after - fresh**2, 0.0))
            denoised, gradient = self._look(scene, x, bar)
            noise = (x - math.sqrt(bar) * denoised) / math.sqrt(1 - bar)
            x = math.sqrt(after) * denoised + kept * noise + math.sqrt(after * bar) * self.weight * gradient
            if fresh:
                x = x + fresh * scene.noise()
        return x

    def _look(self, scene: Scaled, x: Tensor, bar: float) -> tuple[Tensor, Tensor | float]:
        """The denoised image, and r^2 times the gradient of the likelihood."""
        if scene.rows.blank:
            return scene.denoise(x / math.sqrt(bar), math.sqrt((1 - bar) / bar)), 0.0
        leaf, denoised = scene.tweedie(x, bar)
        pull = (1 - bar) * explained(scene, scene.residual(denoised.detach()), 1 - bar)
        return denoised.detach(), torch.autograd.grad(denoised, leaf, pull)[0]

    def _deepinv(self, rows: Rows) -> Tensor:
        from deepinv.sampling import PiGDMDataFidelity

        from invflow.solvers.field.bridge import guided_diffusion

        fidelity = PiGDMDataFidelity(weight=self.weight, cg_max_iter=20, cg_tol=0.0)
        return self._from_unit(guided_diffusion(self.prior, rows, self.value_range, self.steps, fidelity))


def explained(scene: Scaled, residual: Tensor, variance: float) -> Tensor:
    """A^T (variance A A^T + sigma^2)^-1 applied to a residual, ``(n, *image_shape)``."""
    system = scene.rows.system
    if system is not None:
        values = system.values.to(residual)
        spread = variance * values**2 + column(scene.sigma**2, values)
        return system.v(values * system.u_adjoint(residual) / spread.clamp(min=torch.finfo(spread.dtype).tiny))

    def covariance(v: Tensor) -> Tensor:
        return variance * scene.forward(scene.adjoint(v)) + column(scene.sigma**2, v) * v

    # a fixed number of iterations, so that it does not depend on the other rows
    return scene.adjoint(solve(covariance, residual, None, 20, 0.0)[0])
