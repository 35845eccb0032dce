"""Samplers of the field, run by the deepinv library on a flow map's denoiser: the other side of every comparison."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from invflow.flowmap import FlowMap
from invflow.likelihood import GaussianLikelihood
from invflow.linear.structure import SingularSystem
from invflow.solvers.field.rows import Rows, RowSampler

if TYPE_CHECKING:
    from deepinv.sampling import NoisyDataFidelity

__all__ = ["DDRM", "DPS", "DeepinvSampler", "DiffPIR", "MomentMatching", "PiGDM"]


class DeepinvSampler(RowSampler):
    """A sampler of deepinv, on images that it takes to lie in [0, 1].

    Random numbers come from the generator alone: deepinv's own arguments for seeds are left unset, because some of
    its samplers take a seed of 0 for none, and draw from the global generator.

    Args:
        prior: a flow map trained with noise independent of the data and an affine decoding.
        value_range: (low, high), what the method is to take for its [0, 1]; leave it for images.
        chunk_size: rows through the network at a time; None for 256 on a CPU, and as many as fit on a GPU.
    """

    def __init__(self, prior: FlowMap, value_range: tuple[float, float], chunk_size: int | None) -> None:
        super().__init__(prior, chunk_size)
        low, high = (float(v) for v in value_range)
        if not low < high:
            raise ValueError(f"value_range={value_range}: pass (low, high) with low under high, as (0.0, 1.0)")
        self.value_range = (low, high)

    def _from_unit(self, x: Tensor) -> Tensor:
        """Images of what deepinv made in [0, 1], one for each row: ``(n, 1, *image_shape)``."""
        return (self.value_range[0] + (self.value_range[1] - self.value_range[0]) * x.double())[:, None]


def require_positive(**values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{name}={value} must be over 0")


# -- guided diffusion --------------------------------------------------------------------------------------------------


class _GuidedDiffusion(DeepinvSampler):
    """Ancestral sampling of the variance-preserving diffusion with an approximate likelihood score."""

    uses_system = False

    def __init__(self, prior: FlowMap, steps: int, value_range: tuple[float, float], chunk_size: int | None) -> None:
        super().__init__(prior, value_range, chunk_size)
        if steps < 2:
            raise ValueError(f"steps={steps}: the diffusion takes at least 2")
        self.steps = steps

    @abstractmethod
    def _fidelity(self, rows: Rows) -> NoisyDataFidelity:
        """deepinv's approximation of the likelihood at noisy images."""

    def _run(self, rows: Rows) -> Tensor:
        from deepinv.sampling import DDPMSolver, PosteriorDiffusion, VariancePreservingDiffusion

        from invflow.solvers.field.bridge import FlowDenoiser, direct_physics, measured, spectral_physics

        device = rows.likelihood.y.device
        times = torch.linspace(1, 0, self.steps + 1, device=device, dtype=torch.float64)
        solver = DDPMSolver(timesteps=times)
        solver.randn_like = rows.noise  # in place of a generator that knows nothing of chunks
        sde = VariancePreservingDiffusion(alpha=1.0, device=device)
        sampler = PosteriorDiffusion(
            data_fidelity=None if rows.blank else self._fidelity(rows), solver=solver, sde=sde, device=device,
            denoiser=FlowDenoiser(self.prior, self.value_range))
        y, physics = None, None
        if not rows.blank:
            y, level = measured(rows, self.value_range, whiten=False)
            build = direct_physics if rows.system is None else spectral_physics
            physics = build(rows, self.value_range, level, rows.likelihood.sigma.to(y))
        like = torch.zeros(len(rows.likelihood.y), *self.prior.image_shape, device=device, dtype=torch.float64)
        start = rows.noise(like) * sde.sigma_t(times[0]) * sde.scale_t(times[0])
        return self._from_unit(sampler(y, physics, x_init=start))


class DPS(_GuidedDiffusion):
    r"""Diffusion posterior sampling (Chung et al. 2023), through deepinv.

    The likelihood at a noisy image is that of the denoised one. With ``guidance="norm"`` the score is
    :math:`-\lambda \nabla \|y - A D(x)\|`, as published: no likelihood has it as its gradient, and its weight must be
    tuned for each operator and noise level. With ``"annealed"`` it is that of a Gaussian with variance
    :math:`\sigma^2 + \sigma_t^2`. Both neglect what the denoiser does not know, so that the posterior is wrong also for
    a Gaussian prior. Steps, weight and guidance are deepinv's by default.

    Args:
        prior: a flow map trained with noise independent of the data, whose decoding is affine.
        steps: network calls, each with a backward pass.
        weight: :math:`\lambda`.
        guidance: ``"norm"`` or ``"annealed"``.
        value_range: (low, high) of images, which the method takes for its [0, 1].
        chunk_size: rows through the network at a time; None for 256 on a CPU, and as many as fit on a GPU. Samples
            do not depend on it beyond rounding.

    Raises:
        TypeError, ValueError: for a prior or a setting that does not fit.

    Example:
        >>> import torch, invflow
        >>> from invflow.operators import Denoising
        >>> prior = invflow.GaussianMixtureFlow(torch.full((1, 1, 4, 4), 0.5), std=0.1)
        >>> likelihood = invflow.GaussianLikelihood(Denoising((1, 4, 4)), torch.full((2, 1, 4, 4), 0.7), sigma=0.1)
        >>> posterior = invflow.DPS(prior, steps=50, guidance="annealed").sample(likelihood, 8)
        >>> posterior.samples.shape, posterior.nfe.forward
        (torch.Size([2, 8, 1, 4, 4]), 50.0)
    """

    linear_only = False

    def __init__(self, prior: FlowMap, *, steps: int = 1000, weight: float = 1.0, guidance: str = "norm",
                 value_range: tuple[float, float] = (0.0, 1.0), chunk_size: int | None = None) -> None:
        super().__init__(prior, steps, value_range, chunk_size)
        if guidance not in ("norm", "annealed"):
            raise ValueError(f"there is no guidance {guidance!r}: choose 'norm' or 'annealed'")
        require_positive(weight=weight)
        self.weight, self.guidance = weight, guidance

    def _fidelity(self, rows: Rows) -> NoisyDataFidelity:
        from deepinv.sampling import DPSDataFidelity

        return DPSDataFidelity(weight=self.weight, guidance=self.guidance)


class PiGDM(_GuidedDiffusion):
    r"""Pseudoinverse-guided diffusion (Song et al. 2023), through deepinv.

    The image given its noisy version is taken for a Gaussian around the denoised image with variance
    :math:`\sigma_t^2 / (1 + \sigma_t^2)`, which is right for white data of unit variance and too wide for any other.

    Args:
        prior: as for :class:`DPS`.
        steps: network calls, each with a backward pass.
        weight: of the likelihood's score.
        value_range: as for :class:`DPS`.
        chunk_size: as for :class:`DPS`.

    Raises:
        TypeError, ValueError: for a prior or a setting that does not fit; in ``sample``, for an operator that is not
            linear.

    Example:
        >>> import torch, invflow
        >>> from invflow.operators import Denoising
        >>> prior = invflow.GaussianMixtureFlow(torch.full((1, 1, 4, 4), 0.5), std=0.1)
        >>> likelihood = invflow.GaussianLikelihood(Denoising((1, 4, 4)), torch.full((2, 1, 4, 4), 0.7), sigma=0.1)
        >>> invflow.PiGDM(prior, steps=10).sample(likelihood, 3).samples.shape
        torch.Size([2, 3, 1, 4, 4])
    """

    uses_system = True

    def __init__(self, prior: FlowMap, *, steps: int = 1000, weight: float = 1.0,
                 value_range: tuple[float, float] = (0.0, 1.0), chunk_size: int | None = None) -> None:
        super().__init__(prior, steps, value_range, chunk_size)
        require_positive(weight=weight)
        self.weight = weight

    def _fidelity(self, rows: Rows) -> NoisyDataFidelity:
        from deepinv.sampling import PiGDMDataFidelity

        return PiGDMDataFidelity(weight=self.weight, cg_max_iter=20, cg_tol=0.0)


class MomentMatching(_GuidedDiffusion):
    r"""Moment matching posterior sampling (Rozet et al. 2024), through deepinv.

    As :class:`PiGDM`, with the covariance that the denoiser itself implies, :math:`\sigma_t^2 J_D`: right for every
    Gaussian prior. Its linear systems take further passes backwards through the network.

    Args:
        prior: as for :class:`DPS`.
        steps: steps of the diffusion.
        weight: of the likelihood's score.
        iterations: conjugate gradient steps for each linear system; a step of the diffusion costs one call forward
            and ``iterations + 2`` backward.
        value_range: as for :class:`DPS`.
        chunk_size: as for :class:`DPS`.

    Raises:
        TypeError, ValueError: for a prior or a setting that does not fit; in ``sample``, for an operator that is not
            linear.

    Example:
        >>> import torch, invflow
        >>> from invflow.operators import Denoising
        >>> prior = invflow.GaussianMixtureFlow(torch.full((1, 1, 4, 4), 0.5), std=0.1)
        >>> likelihood = invflow.GaussianLikelihood(Denoising((1, 4, 4)), torch.full((2, 1, 4, 4), 0.7), sigma=0.1)
        >>> posterior = invflow.MomentMatching(prior, steps=10, iterations=3).sample(likelihood, 2)
        >>> posterior.nfe
        NFE(forward=10.0, backward=50.0)
    """


    def __init__(self, prior: FlowMap, *, steps: int = 1000, weight: float = 1.0, iterations: int = 3,
                 value_range: tuple[float, float] = (0.0, 1.0), chunk_size: int | None = None) -> None:
        super().__init__(prior, steps, value_range, chunk_size)
        require_positive(weight=weight, iterations=iterations)
        self.weight, self.iterations = weight, iterations

    def _fidelity(self, rows: Rows) -> NoisyDataFidelity:
        from deepinv.sampling import MomentMatchingDataFidelity

        # a tolerance of 0: the same number of iterations whatever the other rows do
        return MomentMatchingDataFidelity(weight=self.weight, cg_max_iter=self.iterations, cg_tol=0.0)


# -- restoration by alternating steps ----------------------------------------------------------------------------------


class DiffPIR(DeepinvSampler):
    r"""Denoising diffusion models for plug-and-play restoration (Zhu et al. 2023), through deepinv.

    Each step denoises, moves the denoised image towards the measurement by a proximal step, and adds noise back. The
    denoised image is clipped to [0, 1], so images elsewhere need ``value_range``.

    Args:
        prior: as for :class:`DPS`.
        steps: network calls.
        regularisation: :math:`\lambda`, the weight of the denoised image against the measurement.
        zeta: share of fresh noise, in [0, 1].
        value_range: as for :class:`DPS`.
        chunk_size: as for :class:`DPS`.

    Raises:
        TypeError, ValueError: for a prior or a setting that does not fit; in ``sample``, for an operator that is not
            linear.

    Example:
        >>> import torch, invflow
        >>> from invflow.operators import Denoising
        >>> prior = invflow.GaussianMixtureFlow(torch.full((1, 1, 4, 4), 0.5), std=0.1)
        >>> likelihood = invflow.GaussianLikelihood(Denoising((1, 4, 4)), torch.full((2, 1, 4, 4), 0.7), sigma=0.1)
        >>> invflow.DiffPIR(prior, steps=10).sample(likelihood, 3).nfe.forward
        10.0
    """

    uses_system = True

    def __init__(self, prior: FlowMap, *, steps: int = 100, regularisation: float = 7.0, zeta: float = 0.1,
                 value_range: tuple[float, float] = (0.0, 1.0), chunk_size: int | None = None) -> None:
        super().__init__(prior, value_range, chunk_size)
        require_positive(regularisation=regularisation)
        if not 2 <= steps <= 1000 or not 0 <= zeta <= 1:
            raise ValueError(f"steps={steps} must lie in 2 to 1000, zeta={zeta} in [0, 1]")
        self.steps, self.regularisation, self.zeta = steps, regularisation, zeta

    def _run(self, rows: Rows) -> Tensor:
        from deepinv.optim.data_fidelity import L2
        from deepinv.sampling import DiffPIR as Method

        from invflow.solvers.field.bridge import FlowDenoiser, NoiseFrom, direct_physics, measured, spectral_physics

        y, level = measured(rows, self.value_range, whiten=True)
        build = direct_physics if rows.system is None else spectral_physics
        physics = build(rows, self.value_range, level, 1.0)
        method = Method(FlowDenoiser(self.prior, self.value_range), L2(), max_iter=self.steps, zeta=self.zeta,
                        lambda_=self.regularisation, device=y.device)
        grey = torch.full((len(y), *self.prior.image_shape), 0.5, device=y.device)
        with NoiseFrom(rows.noise):
            return self._from_unit(method(y, physics, x_init=grey))


class DDRM(DeepinvSampler):
    r"""Denoising diffusion restoration models (Kawar et al. 2022), through deepinv.

    Works on the coefficients of the operator's singular value decomposition, each observed down to its own noise
    level: so it takes operators whose decomposition is at hand, which are entry-by-entry ones (masks, denoising),
    circular convolutions, and dense matrices up to a few thousand values.

    Args:
        prior: as for :class:`DPS`.
        steps: network calls; the noise level falls evenly from ``sigma_max`` to 0.
        eta: share of fresh noise where nothing is observed, in [0, 1].
        eta_observed: how far observed coefficients are set to the measurement, in [0, 1].
        sigma_max: first noise level, for images in [0, 1]; at least 1.
        value_range: as for :class:`DPS`.
        chunk_size: as for :class:`DPS`.

    Raises:
        TypeError, ValueError: for a prior or a setting that does not fit; in ``sample``, for an operator whose
            singular value decomposition is out of reach, with the samplers that do without.

    Example:
        >>> import torch, invflow
        >>> from invflow.operators import Denoising
        >>> prior = invflow.GaussianMixtureFlow(torch.full((1, 1, 4, 4), 0.5), std=0.1)
        >>> likelihood = invflow.GaussianLikelihood(Denoising((1, 4, 4)), torch.full((2, 1, 4, 4), 0.7), sigma=0.1)
        >>> invflow.DDRM(prior, steps=10).sample(likelihood, 3).samples.shape
        torch.Size([2, 3, 1, 4, 4])
    """

    uses_system = True

    def __init__(self, prior: FlowMap, *, steps: int = 100, eta: float = 0.85, eta_observed: float = 1.0,
                 sigma_max: float = 1.0, value_range: tuple[float, float] = (0.0, 1.0),
                 chunk_size: int | None = None) -> None:
        super().__init__(prior, value_range, chunk_size)
        if steps < 2 or not 0 <= eta <= 1 or not 0 <= eta_observed <= 1 or not sigma_max >= 1:
            raise ValueError(f"steps={steps} must be at least 2, eta={eta} and eta_observed={eta_observed} lie in "
                             f"[0, 1], sigma_max={sigma_max} be at least 1")
        self.steps, self.eta, self.eta_observed, self.sigma_max = steps, eta, eta_observed, sigma_max

    def _check_system(self, likelihood: GaussianLikelihood, system: SingularSystem | None) -> None:
        if system is None:
            size = math.prod(likelihood.operator.image_shape)
            raise ValueError(
                f"DDRM needs the singular values of {type(likelihood.operator).__name__}, which acts neither entry by "
                f"entry nor as a circular convolution, and is too large as matrices of {size} columns: use "
                "invflow.DPS(prior), invflow.PiGDM(prior), invflow.DiffPIR(prior) or invflow.FMTT(prior)"
            )

    def _run(self, rows: Rows) -> Tensor:
        import numpy as np
        from deepinv.sampling import DDRM as Method

        from invflow.solvers.field.bridge import FlowDenoiser, NoiseFrom, TogetherPhysics, measured

        y, level = measured(rows, self.value_range, whiten=True)
        denoiser = FlowDenoiser(self.prior, self.value_range, rows=len(y))
        method = Method(denoiser, sigmas=np.linspace(self.sigma_max, 0, self.steps), eta=self.eta,
                        etab=self.eta_observed)
        with NoiseFrom(rows.noise, rows=len(y)):
            out = method(y[None], TogetherPhysics(rows, self.value_range, level))
        return self._from_unit(out[0])
