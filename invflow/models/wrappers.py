"""Flow maps made of what others have trained: a velocity function, or a denoiser of the deepinv library."""

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
    """A flow map whose jump solves the ODE of somebody's velocity; made by :func:`from_velocity`.

    Args:
        velocity: see :func:`from_velocity`. A torch module becomes a submodule and moves with the map.
        state_shape: see :func:`from_velocity`; the same for the rest.
        steps: steps of one jump.
        image_shape: shape of an image.
        decode: (scale, shift), or a pair of functions.
        independent_noise: whether the velocity was trained with noise independent of the data.
        convention: where the velocity's own time has the data.
        path: on which the velocity was trained.
        method: Runge-Kutta method.
        order: of the network's arguments.
        condition: its other arguments.
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
        """dx/dt as the network has it, in its own time: ``(n, *state_shape), (n,)`` to ``(n, *state_shape)``."""
        out = self.network(x, time)
        if not isinstance(out, Tensor) or out.shape != x.shape:
            made = tuple(out.shape) if isinstance(out, Tensor) else f"a {type(out).__name__}"
            raise ValueError(
                f"the velocity function made {made} of states {tuple(x.shape)} and times "
                f"{tuple(time.shape)}: it must return dx/dt in the shape of the states"
            )
        return out


class DenoiserFlow(FlowMap):
    """A flow map whose jump solves the ODE of a denoiser; made by :func:`from_deepinv`.

    Args:
        denoiser: see :func:`from_deepinv`; the same for the rest.
        image_shape: shape of an image and of a state.
        steps: steps of one jump.
        sigma_max: largest noise level that the denoiser is asked for.
        sigma_min: smallest noise level that the denoiser is asked for.
        method: Runge-Kutta method.
        order: of the denoiser's arguments.
        condition: its other arguments.
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
        """The denoiser's estimate of the data state, at a level that it knows; one call.

        Args:
            x: ``(n, *state_shape)``.
            t: a float or ``(n,)``, in [0, 1].

        Returns:
            ``(n, *state_shape)``.
        """
        time = expand_time(t, x)
        known = time.clamp(self.first_time, self.last_time)
        # before the first time known to the denoiser, give the noise in x the standard deviation it has then
        noisy = torch.where(time < known, x * (1 - known) / (1 - time).clamp(min=1e-12), x) / known
        level = (1 - known) / (2 * known)
        clean = 2 * self.network((noisy + 1) / 2, level.flatten()) - 1
        if clean.shape != x.shape:
            raise ValueError(
                f"the denoiser made {tuple(clean.shape)} of images {tuple(x.shape)}: it must keep the shape"
            )
        return self.record_output(clean, x.shape[0])

    def velocity(self, x: Tensor, t: Time) -> Tensor:
        """Velocity (D_t(x) - x) / (1 - t), with t held at the last level that the denoiser knows."""
        # so close to the data the velocity no longer changes, while the quotient turns to 0 / 0
        time = expand_time(t, x).clamp(max=self.last_time)
        return (self.denoise(x, time.flatten()) - x) / (1 - time)

    def jump(self, x: Tensor, s: Time, t: Time) -> Tensor:
        """The ODE from s to t in ``ode_steps`` steps of ``method``: ``(n, *state_shape)`` to the same."""
        return integrate(self.velocity, x, s, t, self.ode_steps, self.method)


def from_velocity(velocity: _Velocity, state_shape: tuple[int, ...], *, steps: int,
                  image_shape: tuple[int, ...] | None = None, decode: Decode = (1.0, 0.0),
                  independent_noise: bool = True, coupling: str | None = None, convention: str = "data-at-1",
                  path: str | tuple[Schedule, Schedule] = "linear", method: str = "midpoint", order: str | None = None,
                  **condition: Any) -> VelocityFlow:
    r"""Make a flow map of a velocity function; its jump solves the ODE.

    The network, where there is one, is put into evaluation mode and stays there.

    Args:
        velocity: ``(n, *state_shape), (n,) -> (n, *state_shape)``, a function or a module.
        state_shape: shape of one state, without the batch.
        steps: equal steps of one jump, whatever its length; each costs 1 (Euler), 2 (midpoint, Heun), 4
            (rk4) or 6 (dopri5) velocities.
        image_shape: shape of one image. Default: the state's.
        decode: ``(scale, shift)`` of an affine decoding, image = scale state + shift: (0.5, 0.5) for states
            in [-1, 1]; or two functions (decode, encode), for a latent model, as
            :class:`~invflow.LatentFlowMap` takes them for any flow.
        independent_noise: whether the velocity was trained with noise independent of the data. Else there is
            no score, and samplers that follow one refuse the map; its denoiser, and what is made of that, remains.
        coupling: the same by name: ``"independent"``, ``"optimal-transport"`` (noises and images paired in each batch,
            OT-CFM), or ``"joint"`` (noise from an adapter).
        convention: ``"data-at-1"`` for this library's time, x_t = (1 - t) z + t m and velocity m - z;
            ``"data-at-0"`` for the reverse, x_t = (1 - t) m + t z and velocity z - m (MeanFlow; flow matching
            in diffusers, whose own timesteps are 1000 t: :func:`~invflow.from_diffusers` knows them).
        path: on which the network was trained, with velocity :math:`\alpha' m + \sigma' z`: ``"linear"``; ``"cosine"``,
            with shares sin and cos of a quarter turn (stochastic interpolants, "GVP"); ``"vp"``, the diffusion of Song
            et al. (2021) with beta from 0.1 to 20; or (alpha, sigma), the shares of data and noise as functions of
            tensors of the network's own time, smooth. Time and scale are changed into this library's, exactly; the
            steps are equal in the network's time.
        method: ``"euler"``, ``"midpoint"``, ``"heun"``, ``"rk4"`` or ``"dopri5"``.
        order: ``"x, t"`` or ``"t, x"``, where the names of the arguments do not tell.
        **condition: the network's other arguments, held fixed: tensors of one row, (1, ...), or numbers.

    Returns:
        A :class:`~invflow.FlowMap` on the device and in the type of the velocity's own parameters; for a
        plain function on the CPU, in torch's default type, until moved with ``.to()``.

    Raises:
        ValueError: for an unknown convention, path, coupling or method, under 1 step, or shapes that an affine decoding
            cannot link.
        TypeError: for a velocity that is not callable or whose arguments are not understood, or a decode that is
            neither.

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
    """Make a flow map of a denoiser D(x, sigma) of images in [0, 1], as in the deepinv library.

    States lie in [-1, 1], ``decode`` is (m + 1) / 2. Since x_t / t = m + ((1 - t) / t) z, the state at time t
    is an image at noise level (1 - t) / (2 t) (on images in [0, 1]), and the velocity is (D - x) / (1 - t).

    The level is infinite at t = 0. Where it exceeds ``sigma_max``, before t = 1 / (1 + 2 sigma_max), the
    denoiser is asked at ``sigma_max`` instead, for the state rescaled to that much noise. This is harmless
    where the data are invisible at ``sigma_max`` (10 or more, as for denoisers trained for diffusion). A
    denoiser trained for small noise only (DRUNet: up to 0.2) says nothing about the first part of the path,
    up to t = 0.71 at 0.2, and what it makes of pure noise is then no sample of any image distribution; it
    still serves from its own noise level on. Near t = 1, below ``sigma_min``, the velocity is that at
    ``sigma_min``.

    Args:
        denoiser: ``D(x, sigma)``, x ``(n, *image_shape)`` in [0, 1] plus noise, sigma ``(n,)``. Only one that
            estimates the mean E[image | x] gives the flow of a distribution.
        image_shape: (C, H, W).
        steps: equal steps of one jump, each of 1, 2, 2, 4 or 6 denoiser calls by ``method``.
        sigma_max: largest noise level that the denoiser was trained for, on images in [0, 1].
        sigma_min: smallest noise level that it is asked for, > 0.
        method: ``"euler"``, ``"midpoint"``, ``"heun"``, ``"rk4"`` or ``"dopri5"``.
        order: ``"x, t"`` or ``"t, x"``, t the noise level, where the names of the arguments do not tell.
        **condition: the denoiser's other arguments, held fixed: ``class_labels=...``, tensors of one row or numbers.

    Returns:
        A :class:`~invflow.FlowMap`.

    Raises:
        ValueError: for levels out of order, an unknown method or under 1 step.
        TypeError: for a denoiser that is not callable or whose arguments are not understood.

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
