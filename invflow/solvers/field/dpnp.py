"""DPnP: diffusion plug-and-play, a split Gibbs sampler."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from invflow._core.shapes import column
from invflow.flowmap import FlowMap
from invflow.linear.structure import observed_forward, regularised_solution
from invflow.solvers.field.rows import Rows, RowSampler

__all__ = ["DPnP"]


class DPnP(RowSampler):
    r"""Diffusion plug-and-play (Xu and Chi 2024, arXiv 2403.17042), a split Gibbs sampler.

    Each iteration draws twice, at a falling level :math:`\eta_k`. The first draw is from the likelihood times a
    Gaussian,

    .. math:: z \sim p(y \mid z) \, e^{-|z - x|^2 / (2 \eta^2)}.

    The second is from the prior given its noisy version z, :math:`x \sim p(x) \, e^{-|x - z|^2 / (2 \eta^2)}`, by the
    reverse diffusion from noise level eta down to 0. If both draws were exact and eta fixed, the chain would converge
    to the posterior with a likelihood blurred by eta. The sampler therefore converges to the posterior in the limit of
    slow annealing to 0 and fine diffusion steps (Vono, Dobigeon and Chainais 2019 for split Gibbs; Wu et al. 2024,
    arXiv 2405.18782 for the same with diffusions). For linear operators, as here, the first draw is exact up to the
    accuracy of the linear solver; the second is approximate at any finite number of diffusion steps.

    With few diffusion steps the draws from the prior are too narrow, and this error adds up over the iterations.

    The levels (1 to 0.1 in 40 iterations, the first fifth at 1) are those of the benchmark of arXiv 2509.12821. The
    authors run the diffusion of their network, with up to a thousand steps; here its levels are evenly spaced in their
    seventh root.

    Args:
        prior: A flow map with affine decoding.
        iterations: K, the number of iterations.
        eta_first: eta_0, the first level, in units of states; kept for the first fifth of the iterations.
        eta_last: Level at the last iteration; geometric in between.
        diffusion_steps: Number of network calls for each draw from the prior.
        chunk_size: Same as in :class:`DiffusionSampler`.

    Raises:
        TypeError, ValueError: If the prior or a setting does not fit; in ``sample``, if the operator is not linear.

    Example:
        >>> import torch, invflow
        >>> from invflow.operators import Denoising
        >>> prior = invflow.GaussianMixtureFlow(torch.full((1, 1, 4, 4), 0.5), std=0.1)
        >>> likelihood = invflow.GaussianLikelihood(Denoising((1, 4, 4)), torch.full((2, 1, 4, 4), 0.7), sigma=0.1)
        >>> invflow.DPnP(prior, iterations=5, diffusion_steps=4).sample(likelihood, 3).nfe.forward
        20.0
    """

    uses_system = True
    needs = "velocity"

    def __init__(self, prior: FlowMap, *, iterations: int = 40, eta_first: float = 1.0, eta_last: float = 0.1,
                 diffusion_steps: int = 20, chunk_size: int | None = None) -> None:
        super().__init__(prior, chunk_size)
        if iterations < 1 or diffusion_steps < 1 or not 0 < eta_last <= eta_first:
            raise ValueError(f"iterations={iterations} and diffusion_steps={diffusion_steps} must be at least 1, and "
                             f"0 < eta_last={eta_last} <= eta_first={eta_first}")
        self.iterations, self.eta_first, self.eta_last = iterations, eta_first, eta_last
        self.diffusion_steps = diffusion_steps

    def etas(self) -> list[float]:
        """The levels eta_k, one for each iteration."""
        held = self.iterations // 5
        ratio = self.eta_last / self.eta_first
        rest = max(1, self.iterations - 1 - held)
        return [self.eta_first * (1.0 if k < held else ratio ** ((k - held) / rest)) for k in range(self.iterations)]

    def _run(self, rows: Rows) -> Tensor:
        prior, likelihood = self.prior, rows.likelihood
        assert prior.decode_affine is not None
        scale = prior.decode_affine[0]
        x = torch.zeros(len(likelihood.y), *prior.state_shape, device=prior.device, dtype=prior.dtype)
        # y = A(scale m + shift) + noise, as a measurement of the state m alone
        y = likelihood.y.to(x) - observed_forward(likelihood, prior.decode(x)).to(x)
        sigma = column(likelihood.sigma, y)
        x = self.eta_first / 2 * rows.noise(x)
        for eta in self.etas():
            # the minimiser of a perturbed problem is a draw of the Gaussian
            target = (x + eta * rows.noise(x)).reshape(len(x), *prior.image_shape)
            data = y + sigma * rows.noise(y)
            z = regularised_solution(likelihood, rows.system, target, data, eta**2, scale).reshape_as(x)
            x = self._reverse(rows, z, eta)
        return prior.decode(x)[:, None]

    def _reverse(self, rows: Rows, x: Tensor, eta: float) -> Tensor:
        """Reverse diffusion from noise level eta to 0; each step would be exact if the image were the denoised one."""
        roots = [(1 - k / self.diffusion_steps) * eta ** (1 / 7) for k in range(self.diffusion_steps + 1)]
        levels = [root**7 for root in roots]
        for level, after in itertools.pairwise(levels):
            t = 1 / (1 + level)
            clean = self.prior.denoise(t * x, t)
            ratio = (after / level) ** 2
            x = ratio * x + (1 - ratio) * clean + after * (1 - ratio) ** 0.5 * rows.noise(x)
        return x
