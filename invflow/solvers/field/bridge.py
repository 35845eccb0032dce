"""A flow map and a likelihood as deepinv objects. Imports deepinv, so import this module only where it is used."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from deepinv.models import Denoiser
from deepinv.physics import DecomposablePhysics, GaussianNoise, LinearPhysics, Physics
from torch import Tensor
from torch.overrides import TorchFunctionMode

from invflow._core.shapes import column
from invflow.flowmap import FlowMap
from invflow.linear.structure import observed_forward, zero_unobserved
from invflow.solvers.field.rows import RowNoise, Rows

if TYPE_CHECKING:
    from deepinv.sampling import NoisyDataFidelity

__all__ = ["FlowDenoiser", "NoiseFrom", "TogetherPhysics", "direct_physics", "guided_diffusion", "measured",
           "physics_of", "spectral_physics"]


class FlowDenoiser(Denoiser):  # type: ignore[misc]  # deepinv has no types
    r"""The denoiser of a flow map, D(x, sigma) for images x plus noise of standard deviation sigma.

    With images decode(m) = scale m + shift, the state x_t = (1 - t) z + t m divided by t is m + ((1 - t) / t) z: an
    image at noise level sigma = |scale| (1 - t) / t, so that t = 1 / (1 + sigma / |scale|).

    Args:
        prior: A flow map with affine decoding.
        value_range: (low, high), the range of images that deepinv sees as [0, 1].
        rows: Number of images n if they are passed as one batch entry ``(1, n, ...)``; None for ``(n, ...)``.
    """

    def __init__(self, prior: FlowMap, value_range: tuple[float, float], rows: int | None = None) -> None:
        super().__init__()
        # in a tuple, so that the map is not registered as a submodule, which would be moved and counted with this one
        self._prior = (prior,)
        self.low, self.span, self.rows = value_range[0], value_range[1] - value_range[0], rows

    def forward(self, x: Tensor, sigma: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Denoised images in the shape and type of ``x``; sigma a number, or one for each image."""
        prior = self._prior[0]
        assert prior.decode_affine is not None
        shape = x.shape
        if self.rows is not None:
            x = x.reshape(self.rows, *prior.image_shape)
        level = torch.as_tensor(sigma, device=x.device).to(prior.dtype).reshape(-1).expand(len(x))
        t = 1 / (1 + level * self.span / abs(prior.decode_affine[0]))
        image = self.low + self.span * x.to(prior.dtype)
        state = column(t, image) * prior.encode(image)
        denoised = (prior.decode(prior.denoise(state, t)) - self.low) / self.span
        return denoised.reshape(shape).to(x.dtype)


class NoiseFrom(TorchFunctionMode):
    """Context in which ``torch.randn_like`` draws from the noise of the rows, not from the global generator.

    Some of deepinv's samplers draw only from the global generator, and do not even seed it when the seed is 0.
    """

    def __init__(self, noise: RowNoise, rows: int | None = None) -> None:
        super().__init__()
        self.noise, self.rows = noise, rows

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.randn_like:
            return func(*args, **(kwargs or {}))
        like = args[0]
        flat = like if self.rows is None else like.reshape(self.rows, -1)
        return self.noise(flat).reshape(like.shape)


def measured(rows: Rows, value_range: tuple[float, float], whiten: bool) -> tuple[Tensor, Tensor]:
    """Measurements of images in units of [0, 1], in float32, and the level that they are divided by.

    Returns:
        y: ``(n, *measurement_shape)``; for a linear operator, minus the measurement of the lower end of the range.
        level: ``(n,)``, sigma if the measurement is whitened, otherwise ones.
    """
    likelihood = rows.likelihood
    y = likelihood.y.float()
    if value_range[0] != 0 and likelihood.operator.linear:
        dark = torch.full((1, *likelihood.operator.image_shape), value_range[0], device=y.device)
        y = y - observed_forward(likelihood, dark.expand(len(y), *dark.shape[1:])).to(y)
    level = likelihood.sigma.to(y) if whiten else torch.ones_like(likelihood.sigma).to(y)
    return y / column(level, y), level


def direct_physics(rows: Rows, value_range: tuple[float, float], level: Tensor, sigma: Tensor | float) -> Physics:
    """The operator of each row, divided by its level, for images in units of [0, 1].

    Args:
        rows: Rows with their operators, linear or not.
        value_range: (low, high), the range of images that maps to [0, 1].
        level: ``(n,)``, the level of each row, from :func:`measured`.
        sigma: Standard deviation of the noise after the division, a number or ``(n,)``.
    """
    operator = rows.likelihood.operator
    low, span = value_range[0], value_range[1] - value_range[0]
    noise = GaussianNoise(sigma=sigma)

    def forward(x: Tensor, **kwargs: Any) -> Tensor:
        image = span * x if operator.linear else low + span * x
        clean = observed_forward(rows.likelihood, image).to(x.dtype)
        return clean / column(level, clean)

    def adjoint(y: Tensor, **kwargs: Any) -> Tensor:
        scaled = span * y / column(level, y)
        return operator.adjoint(zero_unobserved(operator, scaled)).to(y.dtype)

    if not operator.linear:
        return Physics(A=forward, noise_model=noise)
    return LinearPhysics(A=forward, A_adjoint=adjoint, noise_model=noise)


def spectral_physics(rows: Rows, value_range: tuple[float, float], level: Tensor,
                     sigma: Tensor | float) -> DecomposablePhysics:
    """Same as :func:`direct_physics`, built from the singular system, with which deepinv inverts in closed form."""
    system, span = rows.system, value_range[1] - value_range[0]
    assert system is not None
    values = span * system.values.float() / level.reshape(-1, 1)
    return DecomposablePhysics(U=system.u, U_adjoint=system.u_adjoint, V=system.v, V_adjoint=system.v_adjoint,
                               mask=values, noise_model=GaussianNoise(sigma=sigma), device=values.device)


def physics_of(rows: Rows, value_range: tuple[float, float], level: Tensor, sigma: Tensor | float) -> Physics:
    """The physics of the rows, built from the singular system if there is one."""
    build = direct_physics if rows.system is None else spectral_physics
    return build(rows, value_range, level, sigma)


def guided_diffusion(prior: FlowMap, rows: Rows, value_range: tuple[float, float], steps: int,
                     fidelity: NoisyDataFidelity) -> Tensor:
    """Run ancestral sampling of deepinv's variance-preserving diffusion, with its approximation of the likelihood.

    Returns:
        Images in units of [0, 1], ``(n, *image_shape)``.
    """
    from deepinv.sampling import DDPMSolver, PosteriorDiffusion, VariancePreservingDiffusion

    device = rows.likelihood.y.device
    times = torch.linspace(1, 0, steps + 1, device=device, dtype=torch.float64)
    solver = DDPMSolver(timesteps=times)
    solver.randn_like = rows.noise  # in place of a generator that knows nothing of chunks
    sde = VariancePreservingDiffusion(alpha=1.0, device=device)
    sampler = PosteriorDiffusion(data_fidelity=None if rows.blank else fidelity, solver=solver, sde=sde, device=device,
                                 denoiser=FlowDenoiser(prior, value_range))
    y, physics = None, None
    if not rows.blank:
        y, level = measured(rows, value_range, whiten=False)
        physics = physics_of(rows, value_range, level, rows.likelihood.sigma.to(y))
    like = torch.zeros(len(rows.likelihood.y), *prior.image_shape, device=device, dtype=torch.float64)
    found: Tensor = sampler(y, physics, x_init=rows.noise(like) * sde.sigma_t(times[0]) * sde.scale_t(times[0]))
    return found


class TogetherPhysics:
    """The part of a physics that DDRM uses, with all n rows as one batch entry.

    DDRM uses one set of singular values for all images. As a single entry of n d coefficients, each row keeps its own
    set.
    """

    def __init__(self, rows: Rows, value_range: tuple[float, float], level: Tensor) -> None:
        assert rows.system is not None
        self.system, self.rows = rows.system, len(level)
        values = (value_range[1] - value_range[0]) * rows.system.values.float() / level.reshape(-1, 1)
        self.mask = values.reshape(1, *values.shape)  # (1, n, d)
        self.noise_model = GaussianNoise(sigma=1.0)

    def U_adjoint(self, y: Tensor) -> Tensor:
        """``(1, n, *measurement_shape)`` to ``(1, n, d)``; a copy, since DDRM may write to it."""
        return self.system.u_adjoint(y[0])[None].clone()

    def V(self, z: Tensor) -> Tensor:
        """``(1, n, d)`` to ``(1, n, *image_shape)``."""
        return self.system.v(z[0])[None]

    def V_adjoint(self, x: Tensor) -> Tensor:
        """``(1, n, *image_shape)`` to ``(1, n, d)``."""
        return self.system.v_adjoint(x[0])[None].clone()
