"""Flow maps from existing models: a velocity function, or a denoiser of the deepinv library."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from invflow._core.networks import Network
from invflow._core.ode import Time, expand_time, integrate
from invflow.flowmap import FlowMap
from invflow.models.decoded import Decode, PathFlow, check_solver_settings, is_independent
from invflow.models.named_paths import Schedule
from invflow.models.paths import make_path

__all__ = ["DenoiserFlow", "VelocityFlow", "from_deepinv", "from_velocity"]

_Velocity: TypeAlias = Callable[..., Tensor]


class VelocityFlow(PathFlow):
    """A flow map whose jump solves the ODE of a given velocity; built by :func:`from_velocity`.

    Args:
        velocity: Same as in :func:`from_velocity`. A torch module becomes a submodule and moves with the map.
        state_shape: Same as in :func:`from_velocity`, like the arguments below.
        steps: Number of steps of one jump.
        image_shape: Shape of an image.
        decode: (scale, shift), or a pair of functions.
        independent_noise: Whether the velocity was trained with noise independent of the data.
        convention: Which end of the velocity's own time is the data.
        path: Path on which the velocity was trained.
        method: Runge-Kutta method.
        order: Order of the network's arguments.
        condition: Other arguments of the network.
    """

    def __init__(self, velocity: _Velocity, state_shape: tuple[int, ...], *, steps: int,
                 image_shape: tuple[int, ...] | None = None, decode: Decode = (1.0, 0.0),
                 independent_noise: bool = True, convention: str = "data-at-1",
                 path: str | tuple[Schedule, Schedule] = "linear", method: str = "midpoint", order: str | None = None,
                 condition: Mapping[str, Any] | None = None) -> None:
        if not callable(velocity):
            raise TypeError(f"velocity is a {type(velocity).__name__}: pass a function (x, t) -> dx/dt")
        super().__init__(Network(velocity, condition, order, call="from_velocity(..."), make_path(path, convention),
                         state_shape, steps=steps, method=method, image_shape=image_shape, decode=decode,
                         independent_noise=independent_noise)
        self.convention, self.path_name = convention, path if isinstance(path, str) else "custom"

    def predict(self, x: Tensor, time: Tensor) -> Tensor:
        """dx/dt from the network, in its own time: ``(n, *state_shape), (n,)`` to ``(n, *state_shape)``."""
        out = self.network(x, time)
        if not isinstance(out, Tensor) or out.shape != x.shape:
            made = tuple(out.shape) if isinstance(out, Tensor) else f"a {type(out).__name__}"
            raise ValueError(
                f"the velocity function returned {made} for states {tuple(x.shape)} and times "
                f"{tuple(time.shape)}: it must return dx/dt in the shape of the states"
            )
        return out


class DenoiserFlow(FlowMap):
    """A flow map whose jump solves the ODE of a denoiser; built by :func:`from_deepinv`.

    Args:
        denoiser: Same as in :func:`from_deepinv`, like the arguments below.
        image_shape: Shape of an image and of a state.
        steps: Number of steps of one jump.
        sigma_max: Largest noise level at which the denoiser is called.
        sigma_min: Smallest noise level at which the denoiser is called.
        method: Runge-Kutta method.
        order: Order of the denoiser's arguments.
        condition: Other arguments of the denoiser.
    """

    def __init__(self, denoiser: _Velocity, image_shape: tuple[int, ...], *, steps: int, sigma_max: float,
                 sigma_min: float = 1e-3, method: str = "midpoint", order: str | None = None,
                 condition: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        if not callable(denoiser):
            raise TypeError(f"denoiser is a {type(denoiser).__name__}: pass a denoiser D(x, sigma)")
        check_solver_settings(steps, method)
        if not 0 < sigma_min < sigma_max:
            raise ValueError(
                f"noise levels must satisfy 0 < sigma_min < sigma_max, on images in [0, 1]; these are "
                f"sigma_min={sigma_min}, sigma_max={sigma_max}"
            )
        self.state_shape = self.image_shape = tuple(image_shape)
        self.ode_steps, self.method = steps, method
        # the level at time t is (1 - t) / (2 t)
        self.first_time, self.last_time = 1 / (1 + 2 * sigma_max), 1 / (1 + 2 * sigma_min)
        self.network = Network(denoiser, condition, order, call="from_deepinv(...")
        self.register_buffer("_anchor", torch.empty(0), persistent=False)

    @property
    def decode_affine(self) -> tuple[float, float]:
        """(1/2, 1/2): states in [-1, 1] to images in [0, 1]."""
        return (0.5, 0.5)

    def denoise(self, x: Tensor, t: Time) -> Tensor:
        """The denoiser's estimate of the data state, within its range of noise levels; one call.

        Args:
            x: ``(n, *state_shape)``.
            t: Time, a float or ``(n,)``, in [0, 1].

        Returns:
            ``(n, *state_shape)``.
        """
        time = expand_time(t, x)
        known = time.clamp(self.first_time, self.last_time)
        # before the denoiser's first time, rescale the noise in x to its standard deviation at that time
        noisy = torch.where(time < known, x * (1 - known) / (1 - time).clamp(min=1e-12), x) / known
        level = (1 - known) / (2 * known)
        clean = 2 * self.network((noisy + 1) / 2, level.flatten()) - 1
        if clean.shape != x.shape:
            raise ValueError(
                f"the denoiser returned {tuple(clean.shape)} for images {tuple(x.shape)}: it must keep the shape"
            )
        return self.record_output(clean, x.shape[0])

    def velocity(self, x: Tensor, t: Time) -> Tensor:
        """Velocity (D_t(x) - x) / (1 - t), with t clamped to the denoiser's last level."""
        # this close to the data the velocity is constant, but the quotient would become 0 / 0
        time = expand_time(t, x).clamp(max=self.last_time)
        return (self.denoise(x, time.flatten()) - x) / (1 - time)

    def jump(self, x: Tensor, s: Time, t: Time) -> Tensor:
        """Solve the ODE from s to t in ``ode_steps`` steps of ``method``: ``(n, *state_shape)`` to the same."""
        return integrate(self.velocity, x, s, t, self.ode_steps, self.method)


def from_velocity(velocity: _Velocity, state_shape: tuple[int, ...], *, steps: int,
                  image_shape: tuple[int, ...] | None = None, decode: Decode = (1.0, 0.0),
                  independent_noise: bool = True, coupling: str | None = None, convention: str = "data-at-1",
                  path: str | tuple[Schedule, Schedule] = "linear", method: str = "midpoint", order: str | None = None,
                  **condition: Any) -> VelocityFlow:
    r"""Build a flow map from a velocity function; its jump solves the ODE.

    A network is put into evaluation mode and stays there.

    Args:
        velocity: ``(n, *state_shape), (n,) -> (n, *state_shape)``, a function or a module.
        state_shape: Shape of one state, without the batch.
        steps: Number of equal steps of one jump of any length; each costs 1 (Euler), 2 (midpoint, Heun), 4
            (rk4) or 6 (dopri5) velocities.
        image_shape: Shape of one image. Default: the state's.
        decode: ``(scale, shift)`` of an affine decoding, image = scale state + shift: (0.5, 0.5) for states
            in [-1, 1]; or two functions (decode, encode), for a latent model; see also
            :class:`~invflow.LatentFlowMap`.
        independent_noise: Whether the velocity was trained with noise independent of the data. If not, the map has
            no score, and samplers that need one refuse it; the denoiser and everything built on it remain.
        coupling: The same setting by name: ``"independent"``, ``"optimal-transport"`` (noise and images paired in each
            batch, OT-CFM), or ``"joint"`` (noise from an adapter).
        convention: ``"data-at-1"`` for this library's time, x_t = (1 - t) z + t m and velocity m - z;
            ``"data-at-0"`` for the reverse, x_t = (1 - t) m + t z and velocity z - m (MeanFlow; flow matching
            in diffusers, whose own timesteps are 1000 t: :func:`~invflow.from_diffusers` handles them).
        path: Path on which the network was trained, with velocity :math:`\alpha' m + \sigma' z`: ``"linear"``;
            ``"cosine"``, with shares sin and cos of a quarter turn (stochastic interpolants, "GVP"); ``"vp"``, the
            diffusion of Song et al. (2021) with beta from 0.1 to 20; or (alpha, sigma), the shares of data and noise
            as smooth functions of tensors of the network's own time. Time and scale are converted to this library's,
            exactly; the steps are equal in the network's time.
        method: ``"euler"``, ``"midpoint"``, ``"heun"``, ``"rk4"`` or ``"dopri5"``.
        order: ``"x, t"`` or ``"t, x"``, if the argument names do not make it clear.
        **condition: Other arguments of the network, held fixed: tensors of one row, (1, ...), or numbers.

    Returns:
        A :class:`~invflow.FlowMap` with the device and dtype of the velocity's own parameters; for a
        plain function on the CPU, in torch's default dtype, until moved with ``.to()``.

    Raises:
        ValueError: For an unknown convention, path, coupling or method, fewer than 1 step, or different shapes with an
            affine decoding.
        TypeError: If the velocity is not callable or its signature is not recognised, or for any other kind of
            decode.

    Example:
        >>> import torch, invflow
        >>> prior = invflow.from_velocity(lambda x, t: -x / (2 - t[:, None]), (2,), steps=20)
        >>> prior.generate(3, generator=torch.Generator().manual_seed(0)).shape
        torch.Size([3, 2])
    """
    return VelocityFlow(velocity, state_shape, steps=steps, image_shape=image_shape, decode=decode,
                        independent_noise=is_independent(coupling, independent_noise), convention=convention, path=path,
                        method=method, order=order, condition=condition)


def from_deepinv(denoiser: _Velocity, image_shape: tuple[int, ...], *, steps: int, sigma_max: float,
                 sigma_min: float = 1e-3, method: str = "midpoint", order: str | None = None,
                 **condition: Any) -> DenoiserFlow:
    """Build a flow map from a denoiser D(x, sigma) of images in [0, 1], as in the deepinv library.

    States lie in [-1, 1], ``decode`` is (m + 1) / 2. Since x_t / t = m + ((1 - t) / t) z, the state at time t
    is an image at noise level (1 - t) / (2 t) (on images in [0, 1]), and the velocity is (D - x) / (1 - t).

    The level is infinite at t = 0. Where it exceeds ``sigma_max``, before t = 1 / (1 + 2 sigma_max), the
    denoiser is called at ``sigma_max`` instead, for the state rescaled to that noise level. This is harmless
    if the data are invisible at ``sigma_max`` (10 or more, as for denoisers trained for diffusion). A
    denoiser trained only for low noise (DRUNet: up to 0.2) has no information about the first part of the path,
    up to t = 0.71 at 0.2. Its output from pure noise is then not a sample of any image distribution, but it
    is still useful from its own noise level on. Near t = 1, below ``sigma_min``, the velocity is that at
    ``sigma_min``.

    Args:
        denoiser: ``D(x, sigma)``, x ``(n, *image_shape)`` in [0, 1] plus noise, sigma ``(n,)``. Only a denoiser that
            estimates the mean E[image | x] gives the flow of a distribution.
        image_shape: (C, H, W).
        steps: Number of equal steps of one jump, each with 1, 2, 2, 4 or 6 denoiser calls, depending on ``method``.
        sigma_max: Largest noise level that the denoiser was trained for, on images in [0, 1].
        sigma_min: Smallest noise level at which it is called, > 0.
        method: ``"euler"``, ``"midpoint"``, ``"heun"``, ``"rk4"`` or ``"dopri5"``.
        order: ``"x, t"`` or ``"t, x"``, t the noise level, if the argument names do not make it clear.
        **condition: Other arguments of the denoiser, held fixed: ``class_labels=...``, tensors of one row or numbers.

    Returns:
        A :class:`~invflow.FlowMap`.

    Raises:
        ValueError: For invalid noise levels, an unknown method or fewer than 1 step.
        TypeError: If the denoiser is not callable or its signature is not recognised.

    Example:
        >>> import torch, invflow
        >>> def denoiser(x, sigma):  # of images from N(0.5, 0.2^2)
        ...     return 0.5 + (x - 0.5) / (1 + (sigma[:, None, None, None] / 0.2) ** 2)
        >>> prior = invflow.from_deepinv(denoiser, (1, 8, 8), steps=20, sigma_max=100.0)
        >>> prior.generate(3, generator=torch.Generator().manual_seed(0)).shape
        torch.Size([3, 1, 8, 8])
    """
    return DenoiserFlow(denoiser, image_shape, steps=steps, sigma_max=sigma_max, sigma_min=sigma_min,
                        method=method, order=order, condition=condition)
