"""DiffPIR: restoration by alternating a diffusion model's denoiser and a proximal step."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from invflow.flowmap import FlowMap
from invflow.linear.structure import regularised_solution
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

__all__ = ["DiffPIR"]


class DiffPIR(DiffusionSampler):
    r"""Denoising diffusion models for plug-and-play restoration (Zhu et al. 2023, algorithm 1).

    Each step denoises, clips to [-1, 1], moves the image to the minimum of
    :math:`\|y - A x\|^2 + \rho_t \|x - \hat x_0\|^2` with :math:`\rho_t = \lambda \sigma^2 / \bar\sigma_t^2`, and adds
    noise back, a share zeta of which is new. As in the authors' code, :math:`\sigma` is the noise on images in [0, 1]
    and :math:`\bar\sigma_t` the noise on images in [-1, 1]. A lambda of 4 gives both terms the weights of the model; a
    larger one smooths. In deepinv's form the proximal step is for :math:`2 \rho_t`, so the paper's lambda is twice
    deepinv's.

    Args:
        prior: Same as in :class:`DiffusionSampler`, as are the settings not listed here.
        steps: Number of noise levels, with one network call for each except the last (in deepinv's form, for each).
        lambda_: :math:`\lambda`.
        zeta: Share of new noise, in [0, 1].
        regularisation: Former setting, half of the paper's lambda; raises an error.

    Example:
        >>> import torch, invflow
        >>> from invflow.operators import Denoising
        >>> prior = invflow.GaussianMixtureFlow(torch.full((1, 1, 4, 4), 0.5), std=0.1)
        >>> likelihood = invflow.GaussianLikelihood(Denoising((1, 4, 4)), torch.full((2, 1, 4, 4), 0.7), sigma=0.1)
        >>> invflow.DiffPIR(prior, steps=10).sample(likelihood, 3).nfe.forward
        9.0
    """

    uses_system = True

    def __init__(self, prior: FlowMap, *, steps: int = 100, lambda_: float = 7.0, zeta: float = 0.1,
                 regularisation: float | None = None, **shared: Unpack[SharedSettings]) -> None:
        super().__init__(prior, steps, **shared)
        if regularisation is not None:
            raise ValueError(f"regularisation={regularisation} was half of the paper's lambda: pass lambda_="
                             f"{2 * regularisation}")
        require_positive(lambda_=lambda_)
        if steps > TRAINED_STEPS or not 0 <= zeta <= 1:
            raise ValueError(f"steps={steps} must be at most {TRAINED_STEPS}, zeta={zeta} lie in [0, 1]")
        self.lambda_, self.zeta = lambda_, zeta

    def _paper(self, scene: Scaled) -> Tensor:
        times = quadratic(self.steps)
        x = scene.noise()
        for time, following in itertools.pairwise(times):
            bar, after = alpha_bars()[time], alpha_bars()[following]
            level = math.sqrt((1 - bar) / bar)
            denoised = scene.denoise(x / math.sqrt(bar), level).clamp(-1, 1)
            # for images of the library: rho / sigma^2 = lambda / level^2 in units of [0, 1]
            variance = level**2 / self.lambda_ * (2 * scene.half) ** 2
            likelihood = scene.rows.likelihood
            fitted = regularised_solution(likelihood, scene.rows.system, scene.image(denoised), likelihood.y.to(x),
                                          variance)
            fitted = (fitted - scene.mid) / scene.half
            kept = (x - math.sqrt(bar) * fitted) / math.sqrt(1 - bar)
            noise = math.sqrt(1 - self.zeta) * kept + math.sqrt(self.zeta) * scene.noise()
            x = math.sqrt(after) * fitted + math.sqrt(1 - after) * noise
        return x

    def _deepinv(self, rows: Rows) -> Tensor:
        from deepinv.optim.data_fidelity import L2
        from deepinv.sampling import DiffPIR as Method

        from invflow.solvers.field.bridge import FlowDenoiser, NoiseFrom, measured, physics_of

        y, level = measured(rows, self.value_range, whiten=True)
        method = Method(FlowDenoiser(self.prior, self.value_range), L2(), max_iter=self.steps, zeta=self.zeta,
                        lambda_=self.lambda_, device=y.device)
        grey = torch.full((len(y), *self.prior.image_shape), 0.5, device=y.device)
        with NoiseFrom(rows.noise):
            return self._from_unit(method(y, physics_of(rows, self.value_range, level, 1.0), x_init=grey))


def quadratic(steps: int) -> list[int]:
    """Decreasing times from 999 to 0, at shrinking distances; fewer than ``steps`` where rounding makes some equal."""
    passed = [min(int(TRAINED_STEPS * math.sqrt(k / (steps - 1))), TRAINED_STEPS - 1) for k in range(steps)]
    return [TRAINED_STEPS - 1 - k for k in dict.fromkeys(passed)]
