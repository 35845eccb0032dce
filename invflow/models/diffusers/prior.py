"""Flow maps made of models of the diffusers library: their velocity in this library's time, on their own grid."""

from __future__ import annotations

import os
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from invflow._core.ode import TABLEAUS, Time, expand_time, runge_kutta_step
from invflow.flowmap import FlowMap
from invflow.models.diffusers.networks import Codec, Network, load_pipeline, split_pipeline
from invflow.models.diffusers.paths import Path, is_flow_matching, make_path
from invflow.models.latent import LatentFlowMap

__all__ = ["DiffusersFlow", "from_diffusers"]

#: flow-matching models whose clock is known: timesteps at pure noise; None: the scheduler's number of training steps
CLOCKS: dict[str, float | None] = {
    "SD3Transformer2DModel": None, "DiTTransformer2DModel": None, "UNet2DModel": None, "UNet2DConditionModel": None,
    "FluxTransformer2DModel": 1.0,
}


class DiffusersFlow(FlowMap):
    """A flow map whose jump solves the ODE of a model of diffusers; made by :func:`from_diffusers`.

    Args:
        network: the model with its conditions.
        path: what its scheduler says.
        state_shape: shape of one state.
        steps: steps of one jump.
        method: Runge-Kutta method.
        decode_affine: (scale, shift) of the decoding.
    """

    def __init__(self, network: Network, path: Path, state_shape: tuple[int, ...], *, steps: int,
                 method: str = "midpoint", decode_affine: tuple[float, float] = (0.5, 0.5)) -> None:
        super().__init__()
        if method not in TABLEAUS:
            raise ValueError(f"no integration method is called {method!r}: choose one of {', '.join(TABLEAUS)}")
        if steps < 1:
            raise ValueError(f"a jump takes at least 1 step, not steps={steps}")
        self.network, self.path = network, path
        self.state_shape = self.image_shape = tuple(state_shape)
        self.ode_steps, self.method = steps, method
        self._affine = decode_affine
        self.register_buffer("_anchor", torch.empty(0), persistent=False)

    @property
    def decode_affine(self) -> tuple[float, float]:
        """(1/2, 1/2) for pixels; the identity for codes."""
        return self._affine

    @property
    def dtype(self) -> torch.dtype:
        """The model's type; float32 for half-precision models, whose states need more digits than their weights."""
        dtype = super().dtype
        return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype

    def velocity(self, x: Tensor, t: Time) -> Tensor:
        """The model's velocity in this library's time: ``(n, *state_shape)`` to the same."""
        out = self.path.velocity(self.network, x, expand_time(t, x))
        return self.record_output(out, self.network.calls * x.shape[0])

    def jump(self, x: Tensor, s: Time, t: Time) -> Tensor:
        """The ODE from s to t, in ``ode_steps`` steps that are equal on the scheduler's grid."""
        start, end = expand_time(s, x), expand_time(t, x)
        first, last = self.path.to_position(start), self.path.to_position(end)
        inner = [self.path.to_time(torch.lerp(first, last, i / self.ode_steps)) for i in range(1, self.ode_steps)]
        # the ends as they were given: to a position and back would round them
        times = [start, *inner, end]
        for now, then in pairwise(times):
            x = runge_kutta_step(lambda state, at: self.velocity(state, at.flatten()), x, now, then,
                                 TABLEAUS[self.method])
        return x


def from_diffusers(model: Any, scheduler: Any = None, vae: Any = None, *, steps: int,
                   state_shape: tuple[int, ...] | None = None, image_shape: tuple[int, ...] | None = None,
                   method: str = "midpoint", shift: float | None = None, timestep_scale: float | None = None,
                   guidance_scale: float | None = None, unconditional: Mapping[str, Any] | None = None,
                   **condition: Any) -> DiffusersFlow | LatentFlowMap:
    r"""Make a flow map of a model of the diffusers library, with its scheduler and its autoencoder.

    **Flow matching** (FlowMatchEulerDiscreteScheduler and its kin; SD3, Flux, or a U-Net trained so). There sigma runs
    from 1 at the noise to 0 at the data and the model predicts noise - data: here t = 1 - sigma and b = -prediction.
    The scheduler's shift only moves the steps of the ODE: sigma = shift u / (1 + (shift - 1) u), u from 1 to 0.
    ``method="euler"`` repeats the scheduler's own steps at the sigmas ``linspace(1, 1/steps, steps)`` before the shift.

    **Diffusion** (any scheduler with ``alphas_cumprod``: DDPM, DDIM; predicting epsilon, v or the sample). The state
    alpha_k m + sigma_k z of step k is (alpha_k + sigma_k) x_t at t = alpha_k / (alpha_k + sigma_k), exactly: time and
    scale change, the law does not. ``method="euler"`` is deterministic DDIM. Clipping and thresholding, which some
    schedulers do, belong to no flow and are left out.

    **Latent models**: with a ``vae`` the flow is of its codes, rewards see decoded images, and the result is a
    :class:`~invflow.LatentFlowMap`: code = (posterior mean - shift_factor) * scaling_factor, and back.

    The model and the autoencoder are used as they are, no copies: they are put into evaluation mode and their weights
    stop asking for gradients. Texts are not encoded here: pass what the pipeline's ``encode_prompt`` returns.

    Args:
        model: a transformer or U-Net; or a pipeline, whose parts are taken; or a folder or Hub repository of one.
        scheduler: the scheduler; None takes the pipeline's.
        vae: the autoencoder, such as AutoencoderKL; None takes the pipeline's, if it has one.
        steps: steps of one jump, whatever its length; each costs 1 (Euler), 2 (midpoint, Heun), 4 (rk4) or 6 (dopri5)
            velocities.
        state_shape: (C, H, W) of a state. Default: from ``image_shape`` through the autoencoder, else from the
            model's ``config.in_channels`` and ``config.sample_size``.
        image_shape: (C, H, W) of an image; default what ``state_shape`` gives.
        method: ``"euler"``, ``"midpoint"``, ``"heun"``, ``"rk4"`` or ``"dopri5"``.
        shift: of a flow-matching grid; None takes the scheduler's (by the size of the state where that is dynamic).
        timestep_scale: the model's timestep at pure noise, for flow-matching models of classes not known here: 1000
            for most, 1 where sigma itself is passed.
        guidance_scale: w of classifier-free guidance, v_0 + w (v - v_0), at two calls for each velocity. The guided
            field is no velocity of a path between noise and any data: solvers tilt the law that it makes, and
            weights that assume the score of a path are approximate.
        unconditional: arguments that replace the condition in v_0, such as ``{"class_labels": 1000}``.
        **condition: the model's other arguments, held fixed: tensors of one row, (1, ...), or numbers:
            ``class_labels=3``, ``encoder_hidden_states=...``, ``pooled_projections=...``.

    Returns:
        A :class:`~invflow.FlowMap` where the model is; states are float32 for half-precision models.

    Raises:
        TypeError: for arguments that the model does not take.
        ValueError: for a scheduler of another kind, an unknown clock, conditions of several rows, or shapes that
            cannot be told or do not fit.
        ImportError: if a pipeline is to be loaded and diffusers is not installed.

    Example:
        >>> import torch, invflow
        >>> from diffusers import DDPMScheduler, UNet2DModel
        >>> unet = UNet2DModel(sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 8),
        ...                    norm_num_groups=4, down_block_types=("DownBlock2D", "DownBlock2D"),
        ...                    up_block_types=("UpBlock2D", "UpBlock2D"))
        >>> prior = invflow.from_diffusers(unet, DDPMScheduler(), steps=3)
        >>> prior.generate(2, generator=torch.Generator().manual_seed(0)).shape
        torch.Size([2, 1, 8, 8])
    """
    if isinstance(model, (str, os.PathLike)):
        model = load_pipeline(model)
    if not isinstance(model, nn.Module):
        model, own_scheduler, own_vae = split_pipeline(model)
        scheduler, vae = scheduler or own_scheduler, own_vae if vae is None else vae
    if scheduler is None:
        raise ValueError(f"{type(model).__name__} does not say what its timesteps mean: pass its scheduler, "
                         "from_diffusers(model, scheduler)")
    for part in (model, vae):
        if part is not None:
            part.eval().requires_grad_(False)
    network = Network(model, condition, unconditional, guidance_scale)
    codec = None if vae is None else Codec(vae).eval()
    shape = _state_shape(model, codec, network.packed, state_shape, image_shape)
    flow = DiffusersFlow(network, _path_of(model, scheduler, network, shape, timestep_scale, shift), shape, steps=steps,
                         method=method, decode_affine=(0.5, 0.5) if codec is None else (1.0, 0.0))
    if codec is None:
        return flow
    return LatentFlowMap(flow, codec.decode, codec.encode, image_shape=image_shape)


def _path_of(model: nn.Module, scheduler: Any, network: Network, shape: tuple[int, ...], scale: float | None,
             shift: float | None) -> Path:
    patch = 2 if network.packed else getattr(getattr(model, "config", None), "patch_size", None)
    tokens = shape[1] * shape[2] // (patch if isinstance(patch, int) else 1) ** 2
    if is_flow_matching(scheduler) and scale is None:
        known = next((c.__name__ for c in type(model).__mro__ if c.__name__ in CLOCKS), None)
        if known is None:
            raise ValueError(
                f"the clock of {type(model).__name__} is not known here (only {', '.join(CLOCKS)}): pass "
                "timestep_scale, the timestep that it is given at pure noise: 1000 for most models, 1 where its "
                "pipeline passes sigma itself"
            )
        scale = CLOCKS[known]
    return make_path(scheduler, scale=scale, shift=shift, tokens=tokens)


def _state_shape(model: nn.Module, codec: Codec | None, packed: bool, state_shape: tuple[int, ...] | None,
                 image_shape: tuple[int, ...] | None) -> tuple[int, ...]:
    """What was asked for, else what the configuration says."""
    if state_shape is None and image_shape is not None:
        if codec is None:
            state_shape = image_shape
        else:
            device = next((p.device for p in codec.vae.parameters()), torch.device("cpu"))
            with torch.no_grad():
                state_shape = tuple(codec.encode(torch.zeros((1, *image_shape), device=device)).shape[1:])
    config = getattr(model, "config", None)
    size, channels = getattr(config, "sample_size", None), getattr(config, "in_channels", None)
    if state_shape is None and size is not None and channels is not None:
        height, width = (size, size) if isinstance(size, int) else size
        state_shape = (channels, height, width)
    if state_shape is None:
        raise ValueError(f"{type(model).__name__} has no config.sample_size: pass state_shape=(C, H, W)"
                         f"{' or image_shape' if codec else ''}")
    state_shape = tuple(int(k) for k in state_shape)
    if len(state_shape) != 3 or (packed and (state_shape[1] % 2 or state_shape[2] % 2)):
        raise ValueError(f"state_shape {state_shape}: pass (C, H, W){', H and W even' if packed else ''}")
    if codec is None and image_shape is not None and tuple(image_shape) != state_shape:
        raise ValueError(f"image_shape {tuple(image_shape)} and state_shape {state_shape} differ, but there is no vae "
                         "between them: pass one of the two, or the vae")
    return state_shape
