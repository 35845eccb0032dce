"""Parts of :func:`invflow.from_diffusers`: conditions, one call of a model, autoencoders, pipelines."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from invflow._core.networks import Condition

__all__ = ["Codec", "Condition", "Network", "load_pipeline", "split_pipeline"]

PACKED = "img_ids"  # argument of models that take latents as a sequence of 2 x 2 patches
SECONDS = ("r_timestep", "timestep_r")  # names of the end time of a jump in average-velocity models


class Network(nn.Module):
    """A model of diffusers as a function of states and timesteps, with all other arguments fixed.

    Args:
        model: Called with keyword arguments, the first of which is the state.
        condition: Its other arguments.
        unconditional: Arguments for the unconditional call of classifier-free guidance; None for no guidance.
        guidance_scale: w in v_unconditional + w (v_condition - v_unconditional).

    Every call puts the model into evaluation mode and disables gradients of its weights.

    Raises:
        TypeError: If the model does not take timesteps, or an argument of a given name.
    """

    def __init__(self, model: nn.Module, condition: Mapping[str, Any], unconditional: Mapping[str, Any] | None,
                 guidance_scale: float | None) -> None:
        super().__init__()
        parameters = inspect.signature(model.forward).parameters
        names = list(parameters)
        anything = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        if not names or "timestep" not in names:
            raise TypeError(f"{type(model).__name__}.forward takes {names}, no 'timestep': from_diffusers cannot wrap "
                            "this model: wrap its velocity with invflow.from_velocity")
        self.packed = PACKED in names
        axes = getattr(getattr(model, "config", None), "axes_dims_rope", None)
        self.axes = 3 if axes is None else len(axes)
        if self.packed and self.axes not in (3, 4):
            raise TypeError(f"{type(model).__name__} takes img_ids of {self.axes} axes, a layout that from_diffusers "
                            "does not know (Flux has 3, Flux.2 has 4): wrap its velocity with invflow.from_velocity")
        second = next((name for name in SECONDS if name in names), None)
        #: argument for the end time of a jump, in an average-velocity model
        self.second = second if getattr(getattr(model, "config", None), "use_meanflow", True) else None
        made = {names[0], "timestep", "return_dict"} | ({"img_ids", "txt_ids"} if self.packed else set())
        made |= {second} if second else set()
        for name in {**condition, **(unconditional or {})}:
            if name in made:
                raise TypeError(f"{name} is set by from_diffusers: leave it out")
            if name not in names and not anything:
                free = [n for n in names if n not in made]
                raise TypeError(f"{type(model).__name__} takes no argument {name!r}: its conditions are {free}")
        if (unconditional is None) != (guidance_scale is None):
            raise ValueError("classifier-free guidance needs both guidance_scale and unconditional={...}, the "
                             "arguments without the condition, such as encoder_hidden_states of an empty text")
        self.model, self.first, self.guidance_scale = model, names[0], guidance_scale
        self.returns_dict = "return_dict" in names or anything
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        missing = [name for name, p in parameters.items()
                   if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
                   and name not in made and name not in condition]
        if missing:
            raise TypeError(f"{type(model).__name__} also takes {', '.join(missing)}: pass from_diffusers(..., "
                            f"{', '.join(f'{name}=...' for name in missing)}), one row of each tensor")
        self.condition = Condition(condition).to(device)
        self.unconditional = None if unconditional is None else Condition({**condition, **unconditional}).to(device)

    @property
    def calls(self) -> int:
        """Number of model calls for one row of states."""
        return 1 if self.unconditional is None else 2

    def train(self, mode: bool = True) -> Network:
        """Stay in evaluation mode for either ``mode``."""
        super().train(False)
        return self

    def forward(self, x: Tensor, timestep: Tensor, then: Tensor | None = None) -> Tensor:
        """The prediction: states ``(n, *shape)`` and timesteps ``(n,)`` to ``(n, *shape)``, in the dtype of x."""
        if self.model.training:
            self.model.eval()
        out = self._predict(x, timestep, then, self.condition)
        if self.unconditional is None or self.guidance_scale is None:
            return out
        other = self._predict(x, timestep, then, self.unconditional)
        return other + self.guidance_scale * (out - other)

    def _predict(self, x: Tensor, timestep: Tensor, then: Tensor | None, condition: Condition) -> Tensor:
        dtype = next((p.dtype for p in self.model.parameters() if p.is_floating_point()), x.dtype)
        arguments = condition.rows(len(x), dtype)
        state = x.to(dtype)
        if self.packed:
            state = pixel_unshuffle(state, 2).flatten(2).transpose(1, 2)
            height, width = x.shape[2] // 2, x.shape[3] // 2
            grid = torch.cartesian_prod(torch.arange(height), torch.arange(width)).to(state)
            ids = torch.cat([torch.zeros_like(grid[:, :1]), grid], dim=1)
            text = arguments.get("encoder_hidden_states")
            words = state.new_zeros(0 if text is None else text.shape[1], self.axes)
            if self.axes == 4:  # Flux.2: words are numbered along the fourth axis
                ids = torch.cat([ids, torch.zeros_like(grid[:, :1])], dim=1)
                words[:, 3] = torch.arange(len(words)).to(state)
            arguments |= {"img_ids": ids, "txt_ids": words}
        if self.returns_dict:
            arguments["return_dict"] = False
        times = {"timestep": timestep, **({self.second: timestep if then is None else then} if self.second else {})}
        if x.ndim == 5 and self.second == "r_timestep":  # (n, F, C, H, W), and times for each frame
            times = {name: time[:, None].expand(-1, x.shape[1]) for name, time in times.items()}
        arguments |= {self.first: state, **times}
        if forward_ad.unpack_dual(state).tangent is None:
            out = self.model(**arguments)
        else:  # fused attention kernels have no forward-mode derivative
            with sdpa_kernel(SDPBackend.MATH):
                out = self.model(**arguments)
        out = out[0] if isinstance(out, (tuple, list)) else getattr(out, "sample", out)
        if self.packed:
            out = pixel_shuffle(out.transpose(1, 2).unflatten(2, (height, width)), 2)
        elif out.shape[1] == 2 * x.shape[1] and out.shape[2:] == x.shape[2:]:
            out = out[:, :x.shape[1]]  # the other half is a learned variance
        if out.shape != x.shape:
            raise ValueError(f"{type(self.model).__name__} returned {tuple(out.shape)} for {tuple(x.shape)}: "
                             "from_diffusers takes models that keep the shape (or add a learned variance)")
        result: Tensor = out.to(x.dtype)
        return result


class Codec(nn.Module):
    """An autoencoder of diffusers between codes of unit scale and images in [0, 1].

    Args:
        vae: Autoencoder. Its ``config`` may have ``scaling_factor`` and ``shift_factor``, or ``latents_mean`` and
            ``latents_std``: code = (mean of the posterior - shift) * scaling.
    """

    def __init__(self, vae: nn.Module) -> None:
        super().__init__()
        config: Any = getattr(vae, "config", None)
        self.vae = vae
        scaling = float(getattr(config, "scaling_factor", None) or 1.0)
        shift = getattr(config, "latents_mean", None)
        spread = getattr(config, "latents_std", None)
        if shift is None or spread is None:
            shift, spread = [float(getattr(config, "shift_factor", None) or 0.0)], [1.0]
        normalised = getattr(vae, "bn", None)  # Flux.2: statistics of 2 x 2 patches of codes
        self.patched = isinstance(normalised, nn.BatchNorm2d)
        if isinstance(normalised, nn.BatchNorm2d):
            mean, variance = normalised.running_mean, normalised.running_var
            assert mean is not None
            assert variance is not None
            eps = float(getattr(config, "batch_norm_eps", normalised.eps))
            shift, spread = mean.tolist(), (variance + eps).sqrt().tolist()
        self.register_buffer("shift", torch.tensor(shift, dtype=torch.get_default_dtype())[:, None, None], False)
        self.register_buffer("scale", torch.tensor(spread, dtype=torch.get_default_dtype())[:, None, None] / scaling,
                             False)

    def train(self, mode: bool = True) -> Codec:
        """Stay in evaluation mode for either ``mode``."""
        super().train(False)
        return self

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the autoencoder."""
        return next((p.dtype for p in self.vae.parameters()), torch.get_default_dtype())

    def decode(self, state: Tensor) -> Tensor:
        """Decode a code to an image in [0, 1]; differentiable."""
        if self.vae.training:
            self.vae.eval()
        code: Any = pixel_unshuffle(state, 2) if self.patched else state
        code = code * self.scale.to(state) + self.shift.to(state)  # type: ignore[operator]
        code = pixel_shuffle(code, 2) if self.patched else code
        image: Tensor = self.vae.decode(code.to(self.dtype), return_dict=False)[0]  # type: ignore[operator]
        return image.to(state.dtype) / 2 + 0.5

    def encode(self, image: Tensor) -> Tensor:
        """Code of an image in [0, 1]: the mean of the encoder's posterior."""
        if self.vae.training:
            self.vae.eval()
        out: Any = self.vae.encode((2 * image - 1).to(self.dtype))  # type: ignore[operator]
        if hasattr(out, "latent_dist"):
            code = out.latent_dist.mode()
        else:
            code = out.latents if hasattr(out, "latents") else out.latent
        code = code.to(image.dtype)
        code = pixel_unshuffle(code, 2) if self.patched else code
        code = (code - self.shift.to(image)) / self.scale.to(image)  # type: ignore[operator]
        return pixel_shuffle(code, 2) if self.patched else code


def load_pipeline(name: str | os.PathLike[str], dtype: torch.dtype | None = None) -> Any:
    """Load a diffusers pipeline from a folder or a Hub repository; safetensors only, without running its code.

    Raises:
        ImportError: If diffusers is not installed.
    """
    try:
        from diffusers import DiffusionPipeline  # type: ignore[attr-defined]
    except ImportError as error:
        raise ImportError("loading a pipeline by name needs diffusers: pip install 'invflow[diffusers]'") from error
    return DiffusionPipeline.from_pretrained(name, use_safetensors=True, torch_dtype=dtype)


def split_pipeline(pipeline: Any) -> tuple[nn.Module, Any, nn.Module | None]:
    """Model, scheduler and autoencoder (or None) of a pipeline.

    Raises:
        TypeError: If it has no transformer or U-Net, or no scheduler.
    """
    model = getattr(pipeline, "transformer", None) or getattr(pipeline, "unet", None)
    if model is None or getattr(pipeline, "scheduler", None) is None:
        raise TypeError(f"{type(pipeline).__name__} has no transformer or unet with a scheduler: pass the parts, "
                        "from_diffusers(model, scheduler, vae)")
    vae = getattr(pipeline, "vae", None)
    return model, pipeline.scheduler, getattr(pipeline, "vqvae", None) if vae is None else vae
