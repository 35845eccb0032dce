"""Flow maps from models of the diffusers library: velocity in this library's time, on the model's own grid."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from invflow._core.ode import Time, expand_time
from invflow.flowmap import FlowMap
from invflow.models.average_velocity import AverageVelocityFlow
from invflow.models.consistency import ConsistencyFlow
from invflow.models.decoded import PathFlow
from invflow.models.diffusers.consistency import consistency_path, jumps_to_data, kind_of
from invflow.models.diffusers.networks import Codec, Network, load_pipeline, split_pipeline
from invflow.models.diffusers.paths import is_flow_matching, make_path, scheduled_shift
from invflow.models.latent import LatentFlowMap

__all__ = ["DiffusersConsistency", "DiffusersFlow", "DiffusersMap", "from_diffusers"]

#: timesteps at pure noise of known flow-matching models; None: the scheduler's number of training steps
CLOCKS: dict[str, float | None] = {
    "SD3Transformer2DModel": None, "DiTTransformer2DModel": None, "UNet2DModel": None, "UNet2DConditionModel": None,
    "HunyuanImageTransformer2DModel": None, "AnyFlowTransformer3DModel": None, "CogView4Transformer2DModel": None,
    "SanaTransformer2DModel": None, "FluxTransformer2DModel": 1.0, "Flux2Transformer2DModel": 1.0,
    "AuraFlowTransformer2DModel": 1.0, "Lumina2Transformer2DModel": 1.0,
}
#: models whose pipeline multiplies the timestep by a factor from their configuration
SCALED = {"SanaTransformer2DModel"}
#: models whose timestep runs from 0 at the noise to 1 at the data
REVERSED = {"Lumina2Transformer2DModel"}


def full_precision(dtype: torch.dtype) -> torch.dtype:
    """Dtype of states: float32 for half-precision models, whose states need more digits than their weights."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


class _OfDiffusers(FlowMap):
    """A flow map with a diffusers model, a :class:`Network`."""

    @property
    def dtype(self) -> torch.dtype:
        """The model's dtype, float32 for half-precision models."""
        return full_precision(super().dtype)

    def predict(self, x: Tensor, *times: Tensor) -> Tensor:
        """The model's prediction; two calls with guidance."""
        return self.record_output(self.network(x, *times), self.network.calls * x.shape[0])


class DiffusersFlow(_OfDiffusers, PathFlow):
    """A flow map whose jump solves the ODE of a diffusers model; built by :func:`from_diffusers`."""


class DiffusersMap(_OfDiffusers, AverageVelocityFlow):
    """A flow map that jumps with the average velocity of a diffusers model; built by :func:`from_diffusers`.

    Args:
        network: The model with its conditions.
        scale: The model's timestep at pure noise.
        state_shape: Shape of one state.
        decode: (scale, shift) of the decoding.
    """

    def __init__(self, network: Network, scale: float, state_shape: tuple[int, ...], *,
                 decode: tuple[float, float] = (0.5, 0.5)) -> None:
        super().__init__(network, state_shape, second="r", convention="data-at-0", decode=decode)
        self.scale = scale

    def average_velocity(self, x: Tensor, s: Time, t: Time) -> Tensor:
        """Average velocity from s to t: ``(n, *state_shape)`` to the same."""
        start, end = expand_time(s, x).flatten(), expand_time(t, x).flatten()
        return -self.predict(x, self.scale * (1 - start), self.scale * (1 - end))


class DiffusersConsistency(_OfDiffusers, ConsistencyFlow):
    """A map to data only, from a diffusers model; built by :func:`from_diffusers`."""


def from_diffusers(model: Any, scheduler: Any = None, vae: Any = None, *, steps: int | None = None,
                   state_shape: tuple[int, ...] | None = None, image_shape: tuple[int, ...] | None = None,
                   method: str = "midpoint", shift: float | None = None, timestep_scale: float | None = None,
                   guidance_scale: float | None = None, unconditional: Mapping[str, Any] | None = None,
                   **condition: Any) -> FlowMap:
    r"""Build a flow map from a model of the diffusers library, with its scheduler and its autoencoder.

    **Flow matching** (FlowMatchEulerDiscreteScheduler and similar; SD3, Flux, or a U-Net trained this way). Here sigma
    runs from 1 at the noise to 0 at the data and the model predicts noise - data, so t = 1 - sigma and b = -prediction.
    The scheduler's shift only moves the steps of the ODE: sigma = shift u / (1 + (shift - 1) u), u from 1 to 0.
    ``method="euler"`` takes Euler steps at the sigmas ``linspace(1, 0, steps + 1)`` before the shift. These equal the
    scheduler's own steps only after ``set_timesteps(sigmas=linspace(1, 1/steps, steps))``. By default, a
    scheduler ends at a different sigma, and its images differ from these.

    **Diffusion** (any scheduler with ``alphas_cumprod``: DDPM, DDIM; predicting epsilon, v or the sample). The state
    alpha_k m + sigma_k z of step k is (alpha_k + sigma_k) x_t at t = alpha_k / (alpha_k + sigma_k), exactly: time and
    scale change, the law does not. ``method="euler"`` is deterministic DDIM. Clipping and thresholding, which some
    schedulers apply, are not part of a flow and are omitted.

    **Flow maps** (FlowMapEulerDiscreteScheduler: AnyFlow; models with ``use_meanflow``: HunyuanImage): the model takes
    the end time of a jump, and one call is one jump. ``steps`` is not needed.

    **Models that jump to data** (LCMScheduler, TCDScheduler, CMStochasticIterativeScheduler, SCMScheduler,
    FlowMatchLCMScheduler): these predict the end of a jump, not a mean, so the map has no velocity and no score.
    ``steps`` is not needed either; ``generate(n, steps=4)`` renoises at the scheduler's own times. NoiseSMC, NoiseRTO
    and BestOfN accept these maps, other solvers raise an error; see :func:`~invflow.from_consistency`. Clipping is
    omitted here too, and of TCD's options to continue after a step only fresh noise is supported (its gamma 1).

    **Latent models**: with a ``vae``, the flow is one of codes, rewards are evaluated on decoded images, and the result
    is a :class:`~invflow.LatentFlowMap`: code = (posterior mean - shift_factor) * scaling_factor, and back.

    The model and the autoencoder are used directly, not copied: they are put into evaluation mode and gradients of
    their weights are disabled. Texts are not encoded here: pass the output of the pipeline's ``encode_prompt``.

    Args:
        model: A transformer or U-Net; or a pipeline, whose parts are used; or a folder or Hub repository of a pipeline.
        scheduler: The scheduler; None uses the pipeline's.
        vae: The autoencoder, such as AutoencoderKL; None uses the pipeline's, if it has one.
        steps: Number of steps of one jump of any length; each costs 1 (Euler), 2 (midpoint, Heun), 4 (rk4) or 6
            (dopri5) velocities. None for models that jump in one call.
        state_shape: (C, H, W) of a state, or the four numbers for a video model. Default: from ``image_shape``
            through the autoencoder, else from the model's ``config.in_channels`` and ``config.sample_size``.
        image_shape: (C, H, W) of an image; default: from ``state_shape``.
        method: ``"euler"``, ``"midpoint"``, ``"heun"``, ``"rk4"`` or ``"dopri5"``.
        shift: Shift of a flow-matching grid; None uses the scheduler's (which may depend on the size of the state).
        timestep_scale: The model's timestep at pure noise, for flow-matching models of unknown classes: 1000
            for most, 1 if sigma itself is passed. Sana's is read from its configuration.
        guidance_scale: w of classifier-free guidance, v_0 + w (v - v_0), with two calls for each velocity. The guided
            field is not the velocity of a path between noise and any data: solvers tilt the distribution that it
            generates, and weights that assume the score of a path are approximate.
        unconditional: Arguments that replace the condition in v_0, such as ``{"class_labels": 1000}``.
        **condition: Other arguments of the model, held fixed: tensors of one row, (1, ...), or numbers:
            ``class_labels=3``, ``encoder_hidden_states=...``, ``pooled_projections=...``.

    Returns:
        A :class:`~invflow.FlowMap` on the model's device; states are float32 for half-precision models.

    Raises:
        TypeError: For arguments that the model does not take.
        ValueError: For an unsupported scheduler, unknown timesteps, conditions of several rows, or shapes that
            are unknown or inconsistent.
        ImportError: If a pipeline is to be loaded and diffusers is not installed.

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
        raise ValueError(f"{type(model).__name__} does not define its timesteps: pass its scheduler, "
                         "from_diffusers(model, scheduler)")
    for part in (model, vae):
        if part is not None:
            part.eval().requires_grad_(False)
    network = Network(model, condition, unconditional, guidance_scale)
    codec = None if vae is None else Codec(vae)
    shape = _state_shape(model, codec, network.packed, state_shape, image_shape)
    flow = _flow_of(model, scheduler, network, shape, steps=steps, method=method, scale=timestep_scale, shift=shift,
                    decode=(0.5, 0.5) if codec is None else (1.0, 0.0))
    if codec is None:
        return flow
    return LatentFlowMap(flow, codec.decode, codec.encode, image_shape=image_shape)


def _flow_of(model: nn.Module, scheduler: Any, network: Network, shape: tuple[int, ...], *, steps: int | None,
             method: str, scale: float | None, shift: float | None, decode: tuple[float, float]) -> FlowMap:
    """Kind of the model and its scheduler: a velocity, an average velocity, or a jump to data."""
    patch = 2 if network.packed else getattr(getattr(model, "config", None), "patch_size", None)
    tokens = shape[-2] * shape[-1] // (patch if isinstance(patch, int) else 1) ** 2
    name, is_map = type(scheduler).__name__, kind_of(scheduler, ("FlowMapEulerDiscreteScheduler",)) is not None
    flows = is_map or network.second is not None or is_flow_matching(scheduler)
    reverse = kind_of(model, REVERSED) is not None
    clock = 0.0
    if flows:
        clock = _clock_of(model, scheduler) if scale is None else scale
    if jumps_to_data(scheduler):
        if not flows and not (scale is None and shift is None):
            raise ValueError(f"shift and timestep_scale apply to flow matching only: {name} has its own steps; "
                             "leave them out")
        if reverse:
            raise ValueError(f"the timesteps of {type(model).__name__} run opposite to those of {name}: wrap its "
                             "jump with invflow.from_consistency(f, state_shape, path='linear', "
                             "convention='data-at-1')")
        path, times = consistency_path(model, scheduler, clock, scheduled_shift(scheduler.config, tokens)
                                       if flows and shift is None else shift or 1.0, tokens)
        return DiffusersConsistency(network, path, shape, decode=decode, times=times)
    if network.second is not None:
        return DiffusersMap(network, clock, shape, decode=decode)
    if is_map:
        raise TypeError(f"{name} belongs to average-velocity models, but {type(model).__name__} takes no second "
                        "time (r_timestep): pass the scheduler from its training, such as "
                        "FlowMatchEulerDiscreteScheduler")
    if steps is None:
        raise TypeError(f"{type(model).__name__} with {name} predicts a velocity, so jumps solve an ODE: pass steps, "
                        "such as from_diffusers(model, scheduler, steps=20)")
    way = make_path(scheduler, scale=clock if flows else scale, shift=shift, tokens=tokens, reverse=reverse)
    return DiffusersFlow(network, way, shape, steps=steps, method=method, decode=decode)


def _clock_of(model: nn.Module, scheduler: Any) -> float:
    """The model's timestep at pure noise.

    Raises:
        ValueError: If it is not known.
    """
    known = kind_of(model, CLOCKS)
    if known is None:
        raise ValueError(
            f"the timesteps of {type(model).__name__} are unknown (known: {', '.join(CLOCKS)}): pass "
            "timestep_scale, its timestep at pure noise: 1000 for most models, 1 if its "
            "pipeline passes sigma itself"
        )
    clock = CLOCKS[known]
    if clock is None:
        clock = float(getattr(scheduler.config, "num_train_timesteps", 1000))
    return clock * float(getattr(getattr(model, "config", None), "timestep_scale", 1.0) if known in SCALED else 1.0)


def _state_shape(model: nn.Module, codec: Codec | None, packed: bool, state_shape: tuple[int, ...] | None,
                 image_shape: tuple[int, ...] | None) -> tuple[int, ...]:
    """The requested shapes, else those of the configuration."""
    if state_shape is None and image_shape is not None:
        if codec is None:
            state_shape = image_shape
        else:
            device = next((p.device for p in codec.vae.parameters()), torch.device("cpu"))
            with torch.no_grad():
                state_shape = tuple(codec.encode(torch.zeros((1, *image_shape), device=device)).shape[1:])
    config = getattr(model, "config", None)
    size, channels = getattr(config, "sample_size", None), getattr(config, "in_channels", None)
    channels = channels // 4 if packed and channels is not None else channels
    if state_shape is None and size is not None and channels is not None:
        height, width = (size, size) if isinstance(size, int) else size
        state_shape = (channels, height, width)
    if state_shape is None:
        raise ValueError(f"{type(model).__name__} has no config.sample_size: pass state_shape=(C, H, W)"
                         f"{' or image_shape' if codec else ''}")
    state_shape = tuple(int(k) for k in state_shape)
    if len(state_shape) not in (3, 4) or (packed and (state_shape[1] % 2 or state_shape[2] % 2)):
        raise ValueError(f"state_shape={state_shape}: pass (C, H, W){', H and W even' if packed else ''}")
    if codec is None and image_shape is not None and tuple(image_shape) != state_shape:
        raise ValueError(f"image_shape {tuple(image_shape)} and state_shape {state_shape} differ without a vae "
                         "between them: pass one of the two, or the vae")
    return state_shape
