"""Denoising diffusion restoration models."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from invflow._core.shapes import column
from invflow.flowmap import FlowMap
from invflow.likelihood import GaussianLikelihood
from invflow.linear.structure import SingularSystem
from invflow.solvers.field.diffusion import DiffusionSampler, Scaled, SharedSettings, evenly
from invflow.solvers.field.rows import Rows

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["DDRM"]


class DDRM(DiffusionSampler):
    r"""Denoising diffusion restoration models (Kawar, Elad, Ermon and Song 2022, equations 7 and 8).

    The method works on the coefficients of the operator's singular value decomposition, each with its own noise
    level. It therefore needs operators with a known decomposition: entry-by-entry ones (masks, denoising),
    circular convolutions, and dense matrices of up to a few thousand values. deepinv's form divides all noise by the
    square root of two, which makes the samples too narrow, and uses levels that fall evenly from ``sigma_max`` to 0.

    Args:
        prior: Same as in :class:`DiffusionSampler`, as are the settings not listed here.
        steps: Number of network calls.
        eta: Share of new noise where the measurement has no new information, in [0, 1].
        eta_observed: :math:`\eta_b`, the degree to which coefficients noisier than the measurement are set to it, in
            [0, 1].
        sigma_max: For deepinv's form only: first noise level, for images in [0, 1], at least 1; default 1.

    Example:
        >>> import torch, invflow
        >>> from invflow.operators import Denoising
        >>> prior = invflow.GaussianMixtureFlow(torch.full((1, 1, 4, 4), 0.5), std=0.1)
        >>> likelihood = invflow.GaussianLikelihood(Denoising((1, 4, 4)), torch.full((2, 1, 4, 4), 0.7), sigma=0.1)
        >>> invflow.DDRM(prior, steps=10).sample(likelihood, 3).samples.shape
        torch.Size([2, 3, 1, 4, 4])
    """

    uses_system = True

    def __init__(self, prior: FlowMap, *, steps: int = 20, eta: float = 0.85, eta_observed: float = 1.0,
                 sigma_max: float | None = None, **shared: Unpack[SharedSettings]) -> None:
        super().__init__(prior, steps, **shared)
        if not 0 <= eta <= 1 or not 0 <= eta_observed <= 1 or (sigma_max is not None and not sigma_max >= 1):
            raise ValueError(f"eta={eta} and eta_observed={eta_observed} must lie in [0, 1], sigma_max={sigma_max} be "
                             "at least 1")
        self._only_deepinv("leave it out, since the paper's levels are those of the diffusion", sigma_max=sigma_max)
        self.eta, self.eta_observed, self.sigma_max = eta, eta_observed, sigma_max

    def _check_system(self, likelihood: GaussianLikelihood, system: SingularSystem | None) -> None:
        if system is None:
            size = math.prod(likelihood.operator.image_shape)
            raise ValueError(
                f"DDRM needs the singular values of {type(likelihood.operator).__name__}, which acts neither entry by "
                f"entry nor as a circular convolution, and is too large as matrices of {size} columns: use "
                "invflow.DPS(prior), invflow.PiGDM(prior), invflow.DiffPIR(prior) or invflow.FMTT(prior)"
            )

    def _paper(self, scene: Scaled) -> Tensor:
        system = scene.rows.system
        assert system is not None
        origin = scene.zeros()
        values = system.values.to(origin)
        observed = system.u_adjoint(scene.residual(origin))  # U^T y
        sigma = column(scene.sigma, values)
        seen = values > 0
        data = torch.where(seen, observed / values.clamp(min=torch.finfo(values.dtype).tiny), 0.0)
        blur = torch.where(seen, sigma / values.clamp(min=torch.finfo(values.dtype).tiny), torch.inf)
        kept = math.sqrt(1 - self.eta**2)

        def noise() -> Tensor:
            return system.v_adjoint(scene.noise())

        levels = [math.sqrt((1 - bar) / bar) for bar in reversed(evenly(self.steps))]
        clear = blur < levels[0]
        state = torch.where(clear, data, 0.0) + (levels[0]**2 - torch.where(clear, blur, 0.0) ** 2).sqrt() * noise()
        for level, after in itertools.pairwise(levels):
            denoised = system.v_adjoint(scene.denoise(system.v(state), level))
            fresh = noise()
            hidden = denoised + after * (kept * (state - denoised) / level + self.eta * fresh)
            finer = denoised + after * (kept * (data - denoised) / blur + self.eta * fresh)
            spread = (after**2 - (self.eta_observed * blur) ** 2).clamp(min=0).sqrt()
            coarser = denoised + self.eta_observed * (data - denoised) + spread * fresh
            state = torch.where(~seen, hidden, torch.where(blur > after, finer, coarser))
        return scene.denoise(system.v(state), levels[-1])

    def _deepinv(self, rows: Rows) -> Tensor:
        import numpy as np
        from deepinv.sampling import DDRM as Method

        from invflow.solvers.field.bridge import FlowDenoiser, NoiseFrom, TogetherPhysics, measured

        y, level = measured(rows, self.value_range, whiten=True)
        denoiser = FlowDenoiser(self.prior, self.value_range, rows=len(y))
        first = 1.0 if self.sigma_max is None else self.sigma_max
        method = Method(denoiser, sigmas=np.linspace(first, 0, self.steps), eta=self.eta, etab=self.eta_observed)
        with NoiseFrom(rows.noise, rows=len(y)):
            out = method(y[None], TogetherPhysics(rows, self.value_range, level))
        return self._from_unit(out[0])
