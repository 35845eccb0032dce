"""Flower: posterior sampling by alternating a flow's denoiser, a Gaussian correction and fresh noise."""

from __future__ import annotations

import torch
from torch import Tensor

from invflow._core.shapes import column
from invflow.flowmap import FlowMap
from invflow.linear.structure import observed_forward, regularised_solution
from invflow.solvers.field.rows import Rows, RowSampler

__all__ = ["Flower"]


class Flower(RowSampler):
    r"""Flower (Pourya, El Rawas and Unser 2025, arXiv 2509.26287), a flow-matching solver for linear inverse problems.

    Each step models the data point at the end of the path by a Gaussian around the denoised state D_t(x), with variance

    .. math:: \nu_t^2 = s^2 (1 - t)^2 / ((1 - t)^2 + s^2 t^2).

    It conditions that Gaussian on the measurement, draws from the result (``sampling=True``) or takes its mean, and
    returns to the path by adding fresh noise. If the data are white and Gaussian with standard deviation s, drawing is
    exact at any number of steps. The paper uses s = 1 and recommends the mean. For other data the variance is a guess.

    Args:
        prior: A flow map with affine decoding; noise coupled to the data is allowed.
        steps: Number of network calls.
        sampling: Whether to draw from the conditioned Gaussian; False takes its mean.
        spread: s, the standard deviation of the data, in units of states.
        chunk_size: Same as in :class:`DiffusionSampler`.

    Raises:
        TypeError, ValueError: If the prior or a setting does not fit; in ``sample``, if the operator is not linear.

    Example:
        >>> import torch, invflow
        >>> from invflow.operators import Denoising
        >>> prior = invflow.GaussianMixtureFlow(torch.full((1, 1, 4, 4), 0.5), std=0.1)
        >>> likelihood = invflow.GaussianLikelihood(Denoising((1, 4, 4)), torch.full((2, 1, 4, 4), 0.7), sigma=0.1)
        >>> invflow.Flower(prior, steps=20).sample(likelihood, 3).nfe.forward
        20.0
    """

    uses_system = True
    needs = "velocity"

    def __init__(self, prior: FlowMap, *, steps: int = 100, sampling: bool = True, spread: float = 1.0,
                 chunk_size: int | None = None) -> None:
        super().__init__(prior, chunk_size)
        if steps < 1 or not spread > 0:
            raise ValueError(f"steps={steps} must be at least 1, spread={spread} over 0")
        self.steps, self.sampling, self.spread = steps, sampling, spread

    def _run(self, rows: Rows) -> Tensor:
        prior, likelihood = self.prior, rows.likelihood
        assert prior.decode_affine is not None
        scale = prior.decode_affine[0]
        x = rows.noise(torch.zeros(len(likelihood.y), *prior.state_shape, device=prior.device, dtype=prior.dtype))
        # y = A(scale m + shift) + noise, as a measurement of the state m alone
        y = likelihood.y.to(x)
        y = y - observed_forward(likelihood, prior.decode(torch.zeros_like(x))).to(x)
        sigma = column(likelihood.sigma, y)
        for k in range(self.steps):
            t, after = k / self.steps, (k + 1) / self.steps
            mean = prior.denoise(x, t)
            variance = (self.spread * (1 - t)) ** 2 / ((1 - t) ** 2 + (self.spread * t) ** 2)
            data = y
            if self.sampling:  # the minimiser of a perturbed problem is a draw of the Gaussian
                mean, data = mean + variance**0.5 * rows.noise(mean), y + sigma * rows.noise(y)
            point = self._image_of(rows, mean, data, variance, scale)
            x = (1 - after) * rows.noise(x) + after * point
        return prior.decode(x)[:, None]

    def _image_of(self, rows: Rows, target: Tensor, y: Tensor, variance: float, scale: float) -> Tensor:
        shaped = target.reshape(len(target), *self.prior.image_shape)
        found = regularised_solution(rows.likelihood, rows.system, shaped, y, variance, scale)
        return found.reshape_as(target)
