"""Twisted diffusion sampling: particles on the ancestral diffusion kernel, a special case of FMTT's twisted weights."""

from __future__ import annotations

import math

from invflow.flowmap import FlowMap
from invflow.solvers.tilting.fmtt import FMTT
from invflow.solvers.tilting.proposals import GradientShift
from invflow.solvers.tilting.schedules import Grid, Schedule

__all__ = ["TwistedDiffusion"]


class TwistedDiffusion(FMTT):
    r"""Twisted diffusion sampler (Wu, Trippe, Naesseth, Blei and Cunningham 2023), exact as particles grow.

    FMTT with the denoiser for look-ahead, the ancestral kernel of diffusion models, a shift of v (not v / 2) times the
    gradient of the twisting function, and that function the likelihood of the denoised image at all times,
    :math:`r_t(x) = r(D_t(x))`, the schedule g = 1. The weights are FMTT's twisted ones: with many particles the samples
    are those of e^r times the law of :meth:`prior_samples`, whatever the steps.

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
                         proposal=GradientShift(strength=1.0, max_shift=max_shift), chunk_size=chunk_size)


def constant(t: float) -> float:
    """The schedule g(t) = 1."""
    return 1.0
