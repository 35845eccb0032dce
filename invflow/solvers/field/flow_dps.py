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

    With the paper's :math:`\sigma_t = 1 - t` (noise at 1), the velocity splits a state into a clean and a noisy part,

    .. math:: \hat z_0 = z_t - \sigma_t v, \qquad \hat z_1 = z_t + (1 - \sigma_t) v .

    A few gradient steps on :math:`\|y - A(\hat z_0)\|` give :math:`\hat z_0(y)`, which is mixed with the estimate,
    :math:`(1 - \sigma_t) \hat z_0 + \sigma_t \hat z_0(y)`. The noisy part is mixed with fresh noise,
    :math:`\sqrt{\sigma_{t'}} \hat z_1 + \sqrt{1 - \sigma_{t'}} \epsilon`. The two are combined into the state at the
    next time. The method does not use the noise level, and the spread of its samples is not that of the posterior.

    Args:
        prior: A flow map; only its velocity is used, so noise coupled to the data is allowed.
        steps: Number of network calls; 28 in the paper.
        data_steps: Number of gradient steps after each network call.
        step_size: Length of the gradient steps, in units of states. The gradient is that of the norm, not of its
            square, so the length does not depend on the misfit. The authors use 15 for latents of large images; tune
            it for yours.
        shift: s, the shift of the noise levels, s sigma / (1 + (s - 1) sigma) (Esser et al. 2024). The authors use 4;
            1 spaces them evenly.
        chunk_size: Same as in :class:`DiffusionSampler`.

    Raises:
        TypeError, ValueError: If the prior or a setting does not fit; in ``sample``, if the likelihood is not
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
        """The noise levels sigma_t, from 1 to 0, one more than the number of steps."""
        even = [1 - k / self.steps for k in range(self.steps + 1)]
        return [self.shift * s / (1 + (self.shift - 1) * s) for s in even]

    def _run(self, rows: Rows) -> Tensor:
        prior, levels = self.prior, self.levels()
        z = rows.noise(torch.zeros(len(rows.likelihood.y), *prior.state_shape, device=prior.device, dtype=prior.dtype))
        for sigma, after in itertools.pairwise(levels):
            v = prior.velocity(z, 1 - sigma)  # towards the data, since time runs from noise to data here
            clean, noisy = z + sigma * v, z - (1 - sigma) * v
            mixed = (1 - sigma) * clean + sigma * self._consistent(rows, clean)
            fresh = math.sqrt(after) * noisy + math.sqrt(1 - after) * rows.noise(z)
            z = (1 - after) * mixed + after * fresh
        return prior.decode(z)[:, None]

    def _consistent(self, rows: Rows, x: Tensor) -> Tensor:
        """Gradient steps on the norm of the residual, each ``step_size`` times the gradient of the norm."""
        check_gradients("FlowDPS")
        likelihood = rows.likelihood
        for _ in range(self.data_steps):
            with torch.enable_grad():
                state = x.detach().requires_grad_()
                clean = observed_forward(likelihood, self.prior.decode(state))
                square = (clean - likelihood.y.to(clean)).flatten(1).square().sum(1)
                # the square root has no gradient where the residual is zero
                norm = torch.where(square > 0, square, torch.ones_like(square)).sqrt()
                gradient = torch.autograd.grad(torch.where(square > 0, norm, square).sum(), state)[0]
            x = x - self.step_size * gradient
        return x
