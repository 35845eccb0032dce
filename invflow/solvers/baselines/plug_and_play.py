"""Plug-and-play restoration: half-quadratic splitting with the flow's denoiser as the regulariser."""

from __future__ import annotations

import torch
from torch import Tensor

from invflow._core.shapes import column
from invflow.flowmap import FlowMap, check_prior
from invflow.likelihood import GaussianLikelihood
from invflow.linear.structure import SingularSystem, find_system, regularised_solution, transfer_function
from invflow.reward import Reward
from invflow.solvers.baselines.point import PointEstimator

__all__ = ["PlugAndPlay"]


class PlugAndPlay(PointEstimator):
    r"""Half-quadratic splitting with a denoiser (Zhang, Li, Zuo, Zhang, Van Gool and Timofte 2021, "DPIR").

    The noise level s falls from ``first`` to the level of the measurement, evenly in the logarithm. At each level the
    method alternates two steps:

    .. math:: x \leftarrow \arg\min_x \; |y - A x|^2 / (2 \sigma^2) + \kappa |x - z|^2 / (2 s^2), \qquad
              z \leftarrow D_s(x),

    where D_s is the prior's denoiser at the time whose noise level (1 - t) / t is s. With a denoiser that is exact for
    a Gaussian prior of covariance C, and with s held fixed, it converges to the posterior mean under a Gaussian prior
    of covariance (C + s^2 I) / kappa. White noise alone (A = I) is exactly the denoiser's task, and takes one call at
    the measurement's noise level. The image may have any size that the prior takes.

    Args:
        prior: Flow map with an affine decoding.
        steps: Number of network calls per observation.
        regularisation: kappa; the paper uses 0.23.
        first: Noise level of the first step, in units of images. The paper uses 49 / 255, which fills no large hole.
        last: Noise level of the last step. None is the level of the measurement, as in the paper.
        iterations: Number of conjugate gradient iterations in a data step whose operator is diagonal in neither pixels
            nor frequencies.
        chunk_size: Number of observations at a time. The estimates do not depend on it beyond rounding.

    Raises:
        TypeError, ValueError: For a prior or a setting that does not fit.

    Example:
        >>> import torch, invflow
        >>> from invflow.operators import BoxInpainting
        >>> prior = invflow.GaussianMixtureFlow(torch.full((1, 1, 4, 4), 0.5), std=0.1)
        >>> likelihood = invflow.GaussianLikelihood(BoxInpainting((1, 4, 4)), torch.full((1, 1, 4, 4), 0.7), sigma=0.1)
        >>> invflow.PlugAndPlay(prior, steps=8).sample(likelihood, 1).nfe.forward
        8.0
    """

    prior: FlowMap

    def __init__(self, prior: FlowMap, *, steps: int = 24, regularisation: float = 0.23, first: float = 1.0,
                 last: float | None = None, iterations: int = 20, chunk_size: int = 8) -> None:
        super().__init__(chunk_size=chunk_size)
        check_prior("PlugAndPlay", prior, "velocity", affine=True)
        if steps < 1 or iterations < 1 or not (regularisation > 0 and first > 0 and (last is None or last > 0)):
            raise ValueError(f"steps={steps} and iterations={iterations} must be at least 1, regularisation="
                             f"{regularisation}, first={first} and last={last} over 0")
        self.prior, self.steps, self.regularisation = prior, steps, regularisation
        self.first, self.last, self.iterations = first, last, iterations

    def _supported(self, reward: Reward) -> GaussianLikelihood:
        likelihood = super()._supported(reward)
        self._fitting(tuple(likelihood.operator.image_shape))
        return likelihood.to(self.prior.device)

    def _fitting(self, image_shape: tuple[int, ...]) -> FlowMap:
        """The prior for images of this shape."""
        return self.prior.resized(image_shape)

    def _estimate(self, likelihood: GaussianLikelihood) -> tuple[Tensor, dict[str, Tensor]]:
        prior = self._fitting(tuple(likelihood.operator.image_shape))
        return self._restore(prior, likelihood).to(prior.dtype), {}

    def _restore(self, prior: FlowMap, likelihood: GaussianLikelihood) -> Tensor:
        transfer = transfer_function(likelihood)
        if transfer is not None and bool((transfer - 1).abs().max() < 1e-5):
            return denoised(prior, likelihood.y.to(prior.dtype), likelihood.sigma)
        system = find_system(likelihood, largest=1024)
        z = likelihood.operator.embed(likelihood.y).to(prior.dtype)
        last = likelihood.sigma if self.last is None else torch.full_like(likelihood.sigma, self.last)
        for k in range(self.steps):
            share = k / (self.steps - 1) if self.steps > 1 else 1.0
            level = (self.first ** (1 - share) * last**share).clamp(min=last)  # never below the measurement's level
            z = denoised(prior, self._data_step(likelihood, system, z, level), level)
        return z

    def _data_step(self, likelihood: GaussianLikelihood, system: SingularSystem | None, z: Tensor,
                   level: Tensor) -> Tensor:
        """Minimiser over x for noise levels ``(B,)``."""
        # only the ratio of variance and squared noise level matters: use a variance of 1 for all rows
        ratio = (self.regularisation**0.5 / level).to(z)
        scaled = GaussianLikelihood(likelihood.operator, likelihood.y.to(z), likelihood.sigma.to(z) * ratio)
        return regularised_solution(scaled, system, z, scaled.y, 1.0, iterations=self.iterations)


def denoised(prior: FlowMap, image: Tensor, level: Tensor) -> Tensor:
    """Mean of clean images given noisy images, under the prior.

    Args:
        prior: Flow map with an affine decoding.
        image: Images with white noise, ``(n, *image_shape)``.
        level: Standard deviation of the noise, in units of images, ``(n,)``.

    Returns:
        ``(n, *image_shape)``.
    """
    affine = prior.decode_affine
    assert affine is not None
    noise = level.to(image) / abs(affine[0])
    t = 1 / (1 + noise)
    state = column(t, image) * prior.encode(image)
    return prior.decode(prior.denoise(state, t))
