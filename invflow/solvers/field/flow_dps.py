"""FlowDPS: flow-driven posterior sampling."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from invflow._core.watch import check_gradients
from invflow.flowmap import FlowMap
from invflow.linear.structure import observed_forward
from invflow.solvers.field.rows import Rows, RowSampler

__all__ = ["FlowDPS"]


class FlowDPS(RowSampler):
    r"""Flow-driven posterior sampling (Kim, Kim and Ye 2025, arXiv 2503.08136), an Euler method with data consistency.

    With the paper's :math:`\sigma_t = 1 - t` (noise at 1): the velocity splits a state into a clean and a noisy part,

    .. math:: \hat z_0 = z_t - \sigma_t v, \qquad \hat z_1 = z_t + (1 - \sigma_t) v .

    A few gradient steps on :math:`\|y - A(\hat z_0)\|` give :math:`\hat z_0(y)`, which is mixed with the estimate,
    :math:`(1 - \sigma_t) \hat z_0 + \sigma_t \hat z_0(y)`; the noisy part is mixed with fresh noise,
    :math:`\sqrt{\sigma_{t'}} \hat z_1 + \sqrt{1 - \sigma_{t'}} \epsilon`; and both go back to the path at the next
    time. The noise level enters nowhere, and the spread of the samples is no posterior's.

    Args:
        prior: a flow map; its velocity is used, so that noise coupled to the data will do.
        steps: network calls; the paper takes 28.
        data_steps: gradient steps at each of them.
        step_size: of these, in units of states. The gradient is that of the norm, not of its square: a step is as long
            as that, whatever the misfit. The authors take 15 for latents of large images: tune it.
        shift: of the noise levels, s sigma / (1 + (s - 1) sigma) (Esser et al. 2024); the authors take 4, 1 is even.
        chunk_size: rows through the network at a time; None for 256 on a CPU, and as many as fit on a GPU. Samples
            do not depend on it beyond rounding.

    Raises:
        TypeError, ValueError: for a prior or a setting that does not fit; in ``sample``, for a likelihood that is not
            Gaussian.

    Example:
        >>> import torch, invflow
        >>> from invflow.operators import Denoising
        >>> prior = invflow.GaussianMixtureFlow(torch.full((1, 1, 4, 4), 0.5), std=0.1)
        >>> likelihood = invflow.GaussianLikelihood(Denoising((1, 4, 4)), torch.full((2, 1, 4, 4), 0.7), sigma=0.1)
        >>> invflow.FlowDPS(prior, step_size=0.1).sample(likelihood, 3).nfe.forward
        28.0
    """

    linear_only = False
    affine_only = False
    needs = "velocity"

    def __init__(self, prior: FlowMap, *, steps: int = 28, data_steps: int = 3, step_size: float = 15.0,
                 shift: float = 4.0, chunk_size: int | None = None) -> None:
        super().__init__(prior, chunk_size)
        if steps < 1 or data_steps < 0 or not step_size > 0 or not shift > 0:
            raise ValueError(f"steps={steps} must be at least 1, data_steps={data_steps} at least 0, "
                             f"step_size={step_size} and shift={shift} over 0")
        self.steps, self.data_steps, self.step_size, self.shift = steps, data_steps, step_size, shift

    def levels(self) -> list[float]:
        """The noise levels sigma_t, from 1 to 0: one more than there are steps."""
        even = [1 - k / self.steps for k in range(self.steps + 1)]
        return [self.shift * s / (1 + (self.shift - 1) * s) for s in even]

    def _run(self, rows: Rows) -> Tensor:
        prior, levels = self.prior, self.levels()
        z = rows.noise(torch.zeros(len(rows.likelihood.y), *prior.state_shape, device=prior.device, dtype=prior.dtype))
        for sigma, after in itertools.pairwise(levels):
            v = prior.velocity(z, 1 - sigma)  # towards the data, as time runs here
            clean, noisy = z + sigma * v, z - (1 - sigma) * v
            mixed = (1 - sigma) * clean + sigma * self._consistent(rows, clean)
            fresh = math.sqrt(after) * noisy + math.sqrt(1 - after) * rows.noise(z)
            z = (1 - after) * mixed + after * fresh
        return prior.decode(z)[:, None]

    def _consistent(self, rows: Rows, x: Tensor) -> Tensor:
        """Gradient steps on the norm of the residual, each of them ``step_size`` times the gradient of the norm."""
        check_gradients("FlowDPS")
        likelihood = rows.likelihood
        for _ in range(self.data_steps):
            with torch.enable_grad():
                state = x.detach().requires_grad_()
                clean = observed_forward(likelihood, self.prior.decode(state))
                square = (clean - likelihood.y.to(clean)).flatten(1).square().sum(1)
                # the root has no gradient where nothing is missed
                norm = torch.where(square > 0, square, torch.ones_like(square)).sqrt()
                gradient = torch.autograd.grad(torch.where(square > 0, norm, square).sum(), state)[0]
            x = x - self.step_size * gradient
        return x
