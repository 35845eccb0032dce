"""PnP-Flow: plug-and-play restoration with the denoiser of a flow."""

from __future__ import annotations

import torch
from torch import Tensor

from invflow._core.watch import check_gradients
from invflow.flowmap import FlowMap
from invflow.linear.structure import observed_forward
from invflow.solvers.field.rows import Rows, RowSampler

__all__ = ["PnPFlow"]


class PnPFlow(RowSampler):
    r"""PnP-Flow (Martin, Gagneux, Hagemann and Steidl 2025, arXiv 2410.02423): restoration, not sampling.

    For t = 0, 1/K, ..., 1 - 1/K, the method takes a gradient step on the data term,
    :math:`z = x - \gamma (1 - t)^\alpha A^T (A x - y)`, and then the mean of D_t((1 - t) xi + t z) over a few draws of
    noise xi. It looks for one good image. Its only randomness is the noise, and the mean removes most of it, so the
    spread of its samples is far smaller than that of the posterior. The method does not use the noise level, so tune
    ``gamma`` for each problem.

    With ``look_ahead`` the denoiser is that of a flow map (arXiv 2606.19802), the average velocity up to a later time
    extrapolated to the end,

    .. math:: x + (1 - t) u(x, t, t'), \qquad t' = t + \ell (1 - t), \quad u(x, t, t') = (X_{t,t'}(x) - x) / (t' - t).

    At 0 this is the mean D_t(x), at 1 a sharp image X_{t,1}(x).

    Args:
        prior: A flow map; noise coupled to the data is allowed, as in optimal transport.
        steps: K, the number of steps.
        gamma: Step size of the data term, in units of images; stable below 2 / |A|^2.
        alpha: Exponent of its decay, at least 0.
        average: Number of noise draws at each step, each one network call; 5 in the paper.
        look_ahead: l, in [0, 1], how far the denoiser looks ahead. Above 0 each call is one jump of the map.
        chunk_size: Same as in :class:`DiffusionSampler`.

    Raises:
        TypeError, ValueError: If the prior or a setting does not fit.

    Example:
        >>> import torch, invflow
        >>> from invflow.operators import Denoising
        >>> prior = invflow.GaussianMixtureFlow(torch.full((1, 1, 4, 4), 0.5), std=0.1)
        >>> likelihood = invflow.GaussianLikelihood(Denoising((1, 4, 4)), torch.full((2, 1, 4, 4), 0.7), sigma=0.1)
        >>> invflow.PnPFlow(prior, steps=20).sample(likelihood, 3).nfe.forward
        100.0
    """

    linear_only = False
    affine_only = False
    needs = "velocity"

    def __init__(self, prior: FlowMap, *, steps: int = 100, gamma: float = 1.0, alpha: float = 1.0, average: int = 5,
                 look_ahead: float = 0.0, chunk_size: int | None = None) -> None:
        super().__init__(prior, chunk_size)
        if steps < 1 or average < 1 or not gamma > 0 or not alpha >= 0:
            raise ValueError(f"steps={steps} and average={average} must be at least 1, gamma={gamma} over 0, "
                             f"alpha={alpha} at least 0")
        if not 0 <= look_ahead <= 1:
            raise ValueError(f"look_ahead={look_ahead} must be in [0, 1]: 0 for the mean, 1 for a sharp image")
        self.steps, self.gamma, self.alpha, self.average = steps, gamma, alpha, average
        self.look_ahead = look_ahead

    def _run(self, rows: Rows) -> Tensor:
        prior, likelihood = self.prior, rows.likelihood
        x = torch.zeros(len(likelihood.y), *prior.state_shape, device=prior.device, dtype=prior.dtype)
        for k in range(self.steps):
            t = k / self.steps
            z = x - self.gamma * (1 - t) ** self.alpha * self._gradient(rows, x)
            x = torch.zeros_like(z)
            for _ in range(self.average):
                x += self._denoise((1 - t) * rows.noise(z) + t * z, t) / self.average
        return prior.decode(x)[:, None]

    def _denoise(self, x: Tensor, t: float) -> Tensor:
        if self.look_ahead == 0:
            return self.prior.denoise(x, t)
        # (1 - t) / (t' - t) is 1 / look_ahead
        return x + (self.prior.jump(x, t, t + self.look_ahead * (1 - t)) - x) / self.look_ahead

    def _gradient(self, rows: Rows, x: Tensor) -> Tensor:
        """Gradient of |A(decode(x)) - y|^2 / 2 in x, scaled so that a step size in units of images moves states."""
        affine = self.prior.decode_affine
        scale = 1.0 if affine is None else affine[0]
        check_gradients("PnP-Flow")
        with torch.enable_grad():
            state = x.detach().requires_grad_()
            clean = observed_forward(rows.likelihood, self.prior.decode(state))
            misfit = 0.5 * (clean - rows.likelihood.y.to(clean)).square().sum()
            return torch.autograd.grad(misfit, state)[0] / scale**2
