"""Diffusion posterior sampling."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from invflow.flowmap import FlowMap
from invflow.solvers.field.diffusion import (
    TRAINED_STEPS,
    DiffusionSampler,
    Scaled,
    SharedSettings,
    alpha_bars,
    require_positive,
)
from invflow.solvers.field.rows import Rows

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["DPS"]


class DPS(DiffusionSampler):
    r"""Diffusion posterior sampling (Chung, Kim, McCann, Klasky and Ye 2023, algorithm 1).

    After each ancestral step the image moves by :math:`-\zeta \nabla \|y - A(\hat x_0(x_t))\|`. The method replaces the
    likelihood of a noisy image by that of the denoised image, and its width by a fixed step length. This step is not
    the gradient of any log likelihood, so the posterior is wrong even for a Gaussian prior. The step length is chosen
    for the paper's 1,000 steps; with fewer steps, the measurement has less influence.

    deepinv's form multiplies the gradient by the noise of each step, so its ``weight`` is a few hundred where zeta is
    about 1. It also offers ``guidance="annealed"``, the gradient for a Gaussian of variance
    :math:`\sigma^2 + \sigma_t^2`.

    Args:
        prior: Same as in :class:`DiffusionSampler`, as are the settings not listed here.
        steps: Number of network calls, each with a backward pass.
        zeta: :math:`\zeta`, the step length, 0.1 to 1 in the paper; default 1.
        clip: Whether to clip denoised images to [-1, 1], as the authors' code does but their algorithm does not.
        weight: For deepinv's form only: factor of the gradient; default 1.
        guidance: For deepinv's form only: ``"norm"`` or ``"annealed"``.

    Example:
        >>> import torch, invflow
        >>> from invflow.operators import Denoising
        >>> prior = invflow.GaussianMixtureFlow(torch.full((1, 1, 4, 4), 0.5), std=0.1)
        >>> likelihood = invflow.GaussianLikelihood(Denoising((1, 4, 4)), torch.full((2, 1, 4, 4), 0.7), sigma=0.1)
        >>> posterior = invflow.DPS(prior, steps=50).sample(likelihood, 8)
        >>> posterior.samples.shape, posterior.nfe.forward
        (torch.Size([2, 8, 1, 4, 4]), 50.0)
    """

    linear_only = False

    def __init__(self, prior: FlowMap, *, steps: int = 1000, zeta: float | None = None, clip: bool = False,
                 weight: float | None = None, guidance: str | None = None, **shared: Unpack[SharedSettings]) -> None:
        super().__init__(prior, steps, **shared)
        if guidance not in (None, "norm", "annealed"):
            raise ValueError(f"there is no guidance {guidance!r}: choose 'norm' or 'annealed'")
        require_positive(zeta=1.0 if zeta is None else zeta, weight=1.0 if weight is None else weight)
        self._only_deepinv("pass zeta, the paper's step, 0.1 to 1", weight=weight, guidance=guidance)
        self._only_paper(zeta=zeta, clip=clip or None)
        self.zeta, self.clip, self.weight, self.guidance = zeta, clip, weight, guidance

    def _paper(self, scene: Scaled) -> Tensor:
        bars = [alpha_bars()[t] for t in spaced(self.steps)]
        x = scene.noise()
        for k in reversed(range(self.steps)):
            bar, after = bars[k], bars[k - 1] if k else 1.0
            denoised, gradient = self._look(scene, x, bar)
            beta = 1 - bar / after
            x = (math.sqrt(after) * beta * denoised + math.sqrt(1 - beta) * (1 - after) * x) / (1 - bar)
            if k:
                x = x + math.sqrt(beta * (1 - after) / (1 - bar)) * scene.noise()
            x = x - (1.0 if self.zeta is None else self.zeta) * gradient
        return x

    def _look(self, scene: Scaled, x: Tensor, bar: float) -> tuple[Tensor, Tensor | float]:
        """The denoised image, and the gradient of |y - A of it|."""
        if scene.rows.blank:
            denoised = scene.denoise(x / math.sqrt(bar), math.sqrt((1 - bar) / bar))
            return (denoised.clamp(-1, 1) if self.clip else denoised), 0.0
        leaf, denoised = scene.tweedie(x, bar)
        with torch.enable_grad():
            denoised = denoised.clamp(-1, 1) if self.clip else denoised
            misfit = torch.linalg.vector_norm(scene.residual(denoised).flatten(1), dim=1).sum()
        return denoised.detach(), torch.autograd.grad(misfit, leaf)[0]

    def _deepinv(self, rows: Rows) -> Tensor:
        from deepinv.sampling import DPSDataFidelity

        from invflow.solvers.field.bridge import guided_diffusion

        fidelity = DPSDataFidelity(weight=1.0 if self.weight is None else self.weight,
                                   guidance=self.guidance or "norm")
        return self._from_unit(guided_diffusion(self.prior, rows, self.value_range, self.steps, fidelity))


def spaced(steps: int) -> list[int]:
    """Integer times from 0 to 999, both included, as evenly spaced as rounding allows."""
    return [round(k * (TRAINED_STEPS - 1) / (steps - 1)) for k in range(steps)]
