"""Twisted diffusion sampling: particles on the ancestral diffusion kernel, a special case of FMTT's twisted weights."""

from __future__ import annotations

import math
from dataclasses import dataclass

from invflow.flowmap import FlowMap
from invflow.solvers.tilting.fmtt import FMTT
from invflow.solvers.tilting.kernels import BaseStep
from invflow.solvers.tilting.proposals import GradientShift
from invflow.solvers.tilting.schedules import Grid, Schedule

__all__ = ["TwistedDiffusion"]


class TwistedDiffusion(FMTT):
    r"""Twisted diffusion sampler (Wu, Trippe, Naesseth, Blei and Cunningham 2023), exact as particles grow.

    FMTT with the denoiser for look-ahead, the ancestral kernel of diffusion models, and the likelihood of the denoised
    image at all times for twisting function, :math:`r_t(x) = r(D_t(x))`, the schedule g = 1. A step's mean is that of
    the denoised image :math:`D_t(x) + ((1 - t)^2 / t) \nabla r_t(x)`, by the score that the twisting function adds to.
    The weights are FMTT's twisted ones: with many particles the samples are those of e^r times the law of
    :meth:`prior_samples`, whatever the steps.

    Args:
        prior: a flow map trained with noise independent of the data.
        steps: from noise to data.
        resample_threshold: share of N under which the effective sample size leads to resampling.
        resampling: as for :class:`~invflow.FMTT`.
        schedule: g(t); ``"constant"`` is the paper's, ``"annealed"`` and ``"linear"`` are FMTT's. A sharp likelihood
            with the constant schedule shifts the particles out of the data's range in the first steps.
        time_grid: as for :class:`~invflow.FMTT`.
        max_shift: as for :class:`~invflow.FMTT`; infinite, as in the paper, by default.
        chunk_size: as for :class:`~invflow.FMTT`.

    Raises:
        TypeError, ValueError: as for :class:`~invflow.FMTT`.

    Example:
        >>> import torch, invflow
        >>> prior = invflow.GaussianMixtureFlow(torch.tensor([[-2.0, 0.0], [2.0, 0.0]]), std=0.5)
        >>> tilt = invflow.FunctionReward(lambda x: -(x[:, 0] - 1) ** 2)
        >>> g = torch.Generator().manual_seed(0)
        >>> invflow.TwistedDiffusion(prior, steps=20).sample(tilt, 64, generator=g).samples.shape
        torch.Size([1, 64, 2])
    """

    name = "TwistedDiffusion"

    def __init__(self, prior: FlowMap, *, steps: int = 100, resample_threshold: float = 0.5,
                 resampling: str = "systematic", schedule: Schedule = "constant", time_grid: Grid = "uniform",
                 max_shift: float = math.inf, chunk_size: int | None = None) -> None:
        super().__init__(prior, steps=steps, look_ahead="denoiser", weights="twisted", kernel="ancestral",
                         resample_threshold=resample_threshold, resampling=resampling, time_grid=time_grid,
                         schedule=constant if schedule == "constant" else schedule, max_shift=max_shift,
                         proposal=DiffusionShift(max_shift=max_shift), chunk_size=chunk_size)


@dataclass(frozen=True)
class DiffusionShift(GradientShift):
    """The shift of twisted diffusion, t' (1 - rho) ((1 - t)^2 / t) grad r_t, in units of v = (1 - t')^2 (1 - rho)."""

    def share(self, step: BaseStep) -> float:
        """Over v; nothing at t = 0, where the state is noise, which says nothing of the image."""
        return step.end * ((1 - step.start) / (1 - step.end)) ** 2 / step.start if step.start else 0.0


def constant(t: float) -> float:
    """The schedule g(t) = 1."""
    return 1.0
