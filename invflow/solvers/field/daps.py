"""DAPS: decoupled annealing posterior sampling."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from invflow._core.shapes import column
from invflow._core.watch import check_gradients
from invflow.flowmap import FlowMap
from invflow.linear.structure import observed_forward
from invflow.solvers.field.rows import Rows, RowSampler

__all__ = ["DAPS", "powers"]


def powers(first: float, last: float, steps: int, rho: float = 7.0) -> list[float]:
    """Noise levels evenly spaced in their rho-th root (Karras et al. 2022): ``steps`` levels and a final 0.

    The level ``last`` itself is omitted; 0 takes its place, as in the DAPS authors' code.
    """
    a, b = first ** (1 / rho), last ** (1 / rho)
    return [(a + k / steps * (b - a)) ** rho for k in range(steps)] + [0.0]


class DAPS(RowSampler):
    r"""Decoupled annealing posterior sampling (Zhang, Chu, Berner, Meng, Anandkumar and Song 2024, arXiv 2407.01521).

    The noise level :math:`\sigma_t` is annealed from 100 to 0.1. At each level the probability-flow ODE carries
    :math:`x_t = x_0 + \sigma_t \epsilon` to an estimate :math:`\hat x_0`. Langevin steps then sample

    .. math:: p(x_0 \mid x_t, y) \propto N(x_0; \hat x_0, r_t^2 I)\, p(y \mid x_0), \qquad r_t = \sigma_t,

    and new noise of the next level is added. The Gaussian around :math:`\hat x_0` only approximates the denoising
    posterior, so the samples are approximate even for a Gaussian prior.

    Levels and steps are in units of states. For priors of images these are the paper's units, images in [-1, 1]. The
    defaults are those of the authors' code, except ``tau``: they use 0.01 for noise of 0.05, which sharpens the
    likelihood.

    Args:
        prior: A flow map; only its denoiser is used, so noise coupled to the data is allowed.
        steps: N_A, the number of noise levels.
        ode_steps: N_ode, the number of Euler steps from each level to the estimate, each one network call.
        langevin_steps: N, the number of Langevin steps at each level.
        sigma_max: First noise level.
        sigma_min: Noise level at which the annealing ends.
        ode_end: Noise level at which the ODE ends before it jumps to 0.
        step_size: eta_0, the size of the Langevin steps, in squared units of states; stable below
            2 / (1 / tau^2 + 1 / sigma^2) for operators of norm 1.
        step_ratio: delta, the ratio of last to first step size; linear in between.
        tau: Standard deviation of the noise that the Langevin steps assume, in units of the measurement; None for the
            likelihood's own.
        chunk_size: Same as in :class:`DiffusionSampler`.

    Raises:
        TypeError, ValueError: If the prior or a setting does not fit; in ``sample``, if the likelihood is not
            Gaussian, or the steps are too large.

    Example:
        >>> import torch, invflow
        >>> from invflow.operators import Denoising
        >>> prior = invflow.GaussianMixtureFlow(torch.full((1, 1, 4, 4), 0.5), std=0.1)
        >>> likelihood = invflow.GaussianLikelihood(Denoising((1, 4, 4)), torch.full((2, 1, 4, 4), 0.7), sigma=0.1)
        >>> invflow.DAPS(prior, steps=20).sample(likelihood, 3).nfe.forward
        100.0
    """

    linear_only = False
    affine_only = False
    needs = "velocity"

    def __init__(self, prior: FlowMap, *, steps: int = 200, ode_steps: int = 5, langevin_steps: int = 100,
                 sigma_max: float = 100.0, sigma_min: float = 0.1, ode_end: float = 0.01, step_size: float = 1e-4,
                 step_ratio: float = 0.01, tau: float | None = None, chunk_size: int | None = None) -> None:
        super().__init__(prior, chunk_size)
        if min(steps, ode_steps, langevin_steps) < 1:
            raise ValueError(f"steps={steps}, ode_steps={ode_steps} and langevin_steps={langevin_steps} must be at "
                             "least 1")
        if not 0 < sigma_min < sigma_max or not 0 < ode_end < sigma_max:
            raise ValueError(f"sigma_min={sigma_min} and ode_end={ode_end} must be over 0 and under "
                             f"sigma_max={sigma_max}")
        if not step_size > 0 or not 0 < step_ratio <= 1 or (tau is not None and not tau > 0):
            raise ValueError(f"step_size={step_size} and tau={tau} must be over 0, step_ratio={step_ratio} in (0, 1]")
        self.steps, self.ode_steps, self.langevin_steps = steps, ode_steps, langevin_steps
        self.sigma_max, self.sigma_min, self.ode_end = sigma_max, sigma_min, ode_end
        self.step_size, self.step_ratio, self.tau = step_size, step_ratio, tau

    def _run(self, rows: Rows) -> Tensor:
        prior, levels = self.prior, powers(self.sigma_max, self.sigma_min, self.steps)
        blank = torch.zeros(len(rows.likelihood.y), *prior.state_shape, device=prior.device, dtype=prior.dtype)
        x = self.sigma_max * rows.noise(blank)
        for k, (level, after) in enumerate(itertools.pairwise(levels)):
            estimate = self._estimate(x, level)
            step = self.step_size * (1 + k / self.steps * (self.step_ratio - 1))
            x = self._langevin(rows, estimate, level, step)
            x = x + after * rows.noise(x)
        return prior.decode(x)[:, None]

    def _estimate(self, x: Tensor, level: float) -> Tensor:
        """Euler steps of dx / d sigma = (x - D(x, sigma)) / sigma down to 0."""
        levels = powers(level, min(self.ode_end, level), self.ode_steps)
        for now, after in itertools.pairwise(levels):
            # x / t is m + sigma z, at the time t of the path with sigma = (1 - t) / t
            t = 1 / (1 + now)
            x = x + (after - now) / now * (x - self.prior.denoise(t * x, t))
        return x

    def _langevin(self, rows: Rows, estimate: Tensor, level: float, step: float) -> Tensor:
        x = estimate
        for _ in range(self.langevin_steps):
            drift = (estimate - x) / level**2 - self._misfit_gradient(rows, x)
            x = x + step * drift + math.sqrt(2 * step) * rows.noise(x)
        return x

    def _misfit_gradient(self, rows: Rows, x: Tensor) -> Tensor:
        """Gradient of |y - A(decode(x))|^2 / (2 tau^2) with respect to x."""
        check_gradients("DAPS")
        likelihood = rows.likelihood
        with torch.enable_grad():
            state = x.detach().requires_grad_()
            clean = observed_forward(likelihood, self.prior.decode(state))
            sigma = likelihood.sigma.to(clean) if self.tau is None else torch.full_like(likelihood.sigma, self.tau)
            residual = (clean - likelihood.y.to(clean)) / column(sigma, clean)
            return torch.autograd.grad(0.5 * residual.square().sum(), state)[0]
