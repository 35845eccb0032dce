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
    r"""Twisted diffusion sampler (Wu, Trippe, Naesseth, Blei and Cunningham 2023).

    This is FMTT with the denoiser as look-ahead and the ancestral kernel of diffusion models. The twisting function is
    the likelihood of the denoised image at all times, :math:`r_t(x) = r(D_t(x))`, so the schedule is g = 1. The mean of
    a step uses the denoised image :math:`D_t(x) + ((1 - t)^2 / t) \nabla r_t(x)`, which follows from adding the
    gradient of the twisting function to the score. The weights are FMTT's twisted weights: as the number of particles
    grows, the samples converge to e^r times the law of :meth:`prior_samples`, for any number of steps.

    Args:
        prior: A flow map trained with noise independent of the data.
        steps: Number of steps from noise to data.
        resample_threshold: Resample when the effective sample size is below this share of N.
        resampling: Same as in :class:`~invflow.FMTT`.
        schedule: g(t); ``"constant"`` as in the paper, ``"annealed"`` and ``"linear"`` as in FMTT. With the constant
            schedule, a sharp likelihood shifts the particles out of the data's range in the first steps.
        time_grid: Same as in :class:`~invflow.FMTT`.
        max_shift: Same as in :class:`~invflow.FMTT`, but infinite by default, as in the paper.
        chunk_size: Same as in :class:`~invflow.FMTT`.

    Raises:
        TypeError, ValueError: Same as in :class:`~invflow.FMTT`.

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
        """The shift divided by v; zero at t = 0, where the state is noise and does not depend on the image."""
        return step.end * ((1 - step.start) / (1 - step.end)) ** 2 / step.start if step.start else 0.0


def constant(t: float) -> float:
    """The schedule g(t) = 1."""
    return 1.0
