"""Learned flow maps: a network that predicts the average velocity between two times."""

from __future__ import annotations

import math
import os
from typing import Any

import torch
from torch import Tensor, nn

from invflow._core.explained import explained
from invflow._core.folders import CONFIG, SHIPPED, load_built, read_config, resolve_folder, save_module
from invflow._core.records import fingerprint
from invflow.flowmap import FlowMap, Time, expand_time
from invflow.linear.spectral import Spectrum
from invflow.models.registered import build_prior
from invflow.nets.embedding import TimeEmbedding
from invflow.nets.mlp import MLP
from invflow.nets.unet import UNet

__all__ = ["NeuralFlowMap", "load_prior", "load_trainable"]

NETWORKS = ("unet", "mlp", "none")
SKIPS = ("flow", "denoiser", "spectral")
#: scale of the network's output in a spectral map, small against the spread of the data. At full scale the first
#: hundred steps of training add low-frequency errors, which an adapter then learns to undo
RESIDUAL = 0.2
MOST_LAYERS = 200


class NeuralFlowMap(FlowMap):
    r"""A flow map X_{s,t}(x) = x + (t - s) u(x, s, t), with a network for the average velocity u.

    On the diagonal, u(x, t, t) = b_t(x) is the velocity (Geng et al. 2025, "Mean flows"; their time runs from data
    to noise, time here from noise to data). The network only learns the deviation from a Gaussian: u is the average
    velocity of the flow of N(mean, diag std^2), in closed form, plus the network's output, scaled to unit
    size (the preconditioning of Karras et al. 2022, for average velocities). There are two such forms, which agree
    on the diagonal. ``skip="flow"`` uses the Gaussian's average velocity from s to t. It suits few dimensions, where
    the first guess has the data's spread. ``skip="denoiser"`` uses its velocity at s. A jump from pure noise is then
    mean + std * network: it carries over no noise, and constant pixels cost nothing. For images this
    turned noisy one-step samples into clean ones. ``skip="spectral"`` is the first form with a stationary Gaussian that
    has the data's spectrum, instead of independent pixels: the noise has the colour of photographs, and the posterior
    of a linear problem starts from the best linear estimate. With this form, a U-Net without attention, and one mean
    and std for each channel, the map takes images of any size (:meth:`resized`).

    Args:
        state_shape: ``(C, H, W)`` for a U-Net, ``(d,)`` for a perceptron.
        network: ``"unet"``, ``"mlp"``, or ``"none"`` for the skip alone, the exact flow of a Gaussian.
        options: Settings of the network, such as ``{"channels": [32, 128], "blocks": 2}``.
        decode_affine: (scale, shift) with image = scale * state + shift; ``(0.5, 0.5)`` for states in [-1, 1].
        mean: Mean of the data states, broadcastable to ``state_shape``; default 0.
        std: Standard deviation of the data states, also broadcastable; default 1.
        skip: ``"flow"``, ``"denoiser"`` or ``"spectral"``; None means the first for vectors, the second for images.
        spectrum: For ``"spectral"``: spectrum of the data states; default white.
        independent_noise: False for a map trained jointly with an adapter.
        generator: Source of the initial weights; None draws them from the operating system's randomness.

    Raises:
        ValueError: For an unknown network, or a mean or std that does not broadcast to the state.

    Example:
        >>> import torch, invflow
        >>> prior = invflow.NeuralFlowMap((1, 28, 28), options={"channels": [8, 16], "blocks": 1})
        >>> prior.generate(2, steps=1, generator=torch.Generator().manual_seed(0)).shape
        torch.Size([2, 1, 28, 28])
    """

    mean: Tensor
    std: Tensor

    def __init__(self, state_shape: tuple[int, ...], *, network: str = "unet", options: dict[str, Any] | None = None,
                 decode_affine: tuple[float, float] = (0.5, 0.5), mean: Tensor | None = None,
                 std: Tensor | None = None, skip: str | None = None, spectrum: Spectrum | None = None,
                 independent_noise: bool = True,
                 generator: torch.Generator | None = None) -> None:
        super().__init__()
        if network not in NETWORKS:
            raise ValueError(f"network={network!r} is unknown: choose one of {NETWORKS}")
        self.state_shape = self.image_shape = tuple(state_shape)
        self.network_name, self.options = network, dict(options or {})
        self.skip = skip or ("denoiser" if len(state_shape) == 3 else "flow")
        if self.skip not in SKIPS or (self.skip == "spectral" and len(state_shape) != 3):
            raise ValueError(f"skip={skip!r} for states {tuple(state_shape)}: choose one of {SKIPS}, the last "
                             "for images only")
        self.independent_noise = independent_noise
        self._decode_affine = (float(decode_affine[0]), float(decode_affine[1]))
        if not (all(map(math.isfinite, self._decode_affine)) and self._decode_affine[0] != 0):
            raise ValueError(f"decode_affine is {self._decode_affine}: pass a finite (scale, shift), the scale not 0")
        for name, value, default in (("mean", mean, 0.0), ("std", std, 1.0)):
            tensor = torch.full((1,) * len(state_shape), default) if value is None else value.float()
            if tensor.ndim != len(state_shape) or torch.broadcast_shapes(tensor.shape, state_shape) != self.state_shape:
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}, which does not broadcast to {state_shape}")
            self.register_buffer(name, tensor.clone())
        if not self.std.is_meta and bool((self.std <= 0).any()):
            raise ValueError("std must be positive: it is the scale of the data states")
        width = int(self.options.get("embedding", 128))
        with torch.random.fork_rng(devices=[]):
            self.times = TimeEmbedding(width)
            self.gate = nn.Linear(width, 1) if self.skip == "denoiser" else None
        self.spectrum = (spectrum or Spectrum(state_shape[0])) if self.skip == "spectral" else None
        # the network of a spectral map also sees the end of the Gaussian's flow from the state
        seen = state_shape[0] * (2 if self.spectrum is not None else 1)
        self.network = None if network == "none" else build_network(
            network, self.state_shape, seen, self.state_shape[0], {**self.options, "embedding": width})
        initialise(self, generator)
        if self.gate is not None:
            nn.init.zeros_(self.gate.weight)
            nn.init.ones_(self.gate.bias)

    @property
    def decode_affine(self) -> tuple[float, float]:
        """``(scale, shift)`` of the decoding."""
        return self._decode_affine

    def average_velocity(self, x: Tensor, s: Time, t: Time) -> Tensor:
        """Average velocity u(x, s, t) from s to t: ``(n, *state_shape)`` to the same."""
        s_column, t_column = expand_time(s, x), expand_time(t, x)
        embedding = self.times(s_column.flatten(), t_column.flatten() - s_column.flatten())
        g_s = ((1 - s_column) ** 2 + (s_column * self.std) ** 2).sqrt()
        if self.spectrum is not None:
            return self._spectral_velocity(self.spectrum, x, s_column, t_column, g_s, embedding)
        out = 0.0 if self.network is None else self.network(x, embedding).to(x.dtype)
        if self.gate is None:
            # X_{s,t}(x) = t mean + (g_t / g_s)(x - s mean); dividing X - x by t - s analytically gives an expression
            # that is not 0 / 0 at s = t
            g_t = ((1 - t_column) ** 2 + (t_column * self.std) ** 2).sqrt()
            slope = (self.std**2 * (s_column + t_column) - (2 - s_column - t_column)) / (g_s * (g_s + g_t))
        else:
            # the Gaussian's denoiser keeps a share of the noisy state. A small network cannot estimate the noise of
            # every value well enough to remove it: a learned gate, which depends only on the times, does
            gate = self.gate(embedding).to(x.dtype).view_as(s_column) / (1.1 - s_column)
            slope = (s_column * self.std**2 * (1 - gate) - (1 - s_column)) / g_s**2
        return self.mean + slope * (x - s_column * self.mean) + self.std / g_s * out

    def _spectral_velocity(self, spectrum: Spectrum, x: Tensor, s: Tensor, t: Tensor, g: Tensor,
                           embedding: Tensor) -> Tensor:
        """Average velocity of a stationary Gaussian: the formula for independent pixels, for each coefficient."""
        with torch.autocast(x.device.type, enabled=False):  # bf16 would round the transforms to three digits
            scale = spectrum.scales(*x.shape[-2:]).to(x.dtype)
            coefficients = spectrum.forward_transform(x - s * self.mean)
            g_s = ((1 - s) ** 2 + (s * scale) ** 2).sqrt()
            g_t = ((1 - t) ** 2 + (t * scale) ** 2).sqrt()
            slope = (scale**2 * (s + t) - (2 - s - t)) / (g_s * (g_s + g_t))
            linear = self.mean + spectrum.inverse_transform(slope * coefficients)
            if self.network is None:
                return linear
            end = spectrum.inverse_transform(scale / g_s * coefficients)
        seen = torch.cat([(x - s * self.mean) / g, end / self.std], dim=1)
        result: Tensor = linear + RESIDUAL * self.std / g * self.network(seen, embedding).to(x.dtype)
        return result

    @property
    def resizable(self) -> bool:
        """Whether the map takes images of any size: no part of it depends on the position or number of pixels."""
        local = self.network is None or (self.network_name == "unet" and not self.options.get("attention", True))
        return len(self.state_shape) == 3 and local and self.mean.shape[1:] == self.std.shape[1:] == (1, 1)

    def velocity(self, x: Tensor, t: Time) -> Tensor:
        """Velocity b_t(x) = u(x, t, t)."""
        return self.average_velocity(x, t, t)

    def jump(self, x: Tensor, s: Time, t: Time) -> Tensor:
        """Flow map X_{s,t}(x) = x + (t - s) u(x, s, t), one network call."""
        return x + (expand_time(t, x) - expand_time(s, x)) * self.average_velocity(x, s, t)

    def forward(self, x: Tensor, s: Time, t: Time) -> Tensor:
        """Same as :meth:`jump`, for use with ``torch.func.functional_call`` and other weights."""
        return self.jump(x, s, t)

    def fingerprint(self) -> str:
        """Digest of the weights, by which an adapter recognises its map."""
        return fingerprint(self)

    def config(self) -> dict[str, Any]:
        """Everything that :meth:`from_pretrained` needs to rebuild the map, in addition to the weights."""
        return {
            "kind": "flow-map", "state_shape": list(self.state_shape), "network": self.network_name,
            "options": self.options, "decode_affine": list(self._decode_affine),
            "mean_shape": list(self.mean.shape), "std_shape": list(self.std.shape),
            "skip": self.skip, "independent_noise": self.independent_noise,
        }

    def save_pretrained(self, folder: str | os.PathLike[str], dtype: torch.dtype | None = None) -> None:
        """Write ``config.json`` and ``model.safetensors`` into a folder, atomically.

        Args:
            folder: Folder; created if it does not exist.
            dtype: Type to store, such as ``torch.float16``; None keeps the type of the weights.
        """
        save_module(self, folder, self.config(), dtype)

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike[str]) -> NeuralFlowMap:
        """Load a map from a folder, a shipped model's name, or a Hub repository ``owner/name``.

        Raises:
            ValueError: If it is missing or not a flow map, or its files are damaged or inconsistent.
        """
        folder = resolve_folder(name, "flow-map")
        config = read_config(folder, "flow-map")

        def build() -> NeuralFlowMap:
            if not isinstance(config["independent_noise"], bool):
                raise TypeError(f"independent_noise is {config['independent_noise']!r}: expected true or false")
            return cls(tuple(config["state_shape"]), network=config["network"], options=config["options"],
                       decode_affine=config["decode_affine"], mean=torch.zeros(config["mean_shape"]),
                       std=torch.ones(config["std_shape"]), skip=config["skip"],
                       independent_noise=config["independent_noise"])

        prior = load_built(build, folder, config, "flow map")
        if bool((prior.std <= 0).any()):
            raise ValueError(f"{folder}: std must be positive: it is the scale of the data states")
        return prior.eval().requires_grad_(False)


def build_network(name: str, shape: tuple[int, ...], in_channels: int, out_channels: int,
                  options: dict[str, Any]) -> nn.Module:
    """Build a U-Net for ``(C, H, W)`` shapes or a perceptron for ``(d,)`` shapes; raise an error for a mismatch."""
    if name == "unet" and len(shape) != 3:
        raise ValueError(f"a U-Net takes states (C, H, W), not {shape}: use network='mlp' for vectors")
    if name == "mlp" and len(shape) != 1:
        raise ValueError(f"a perceptron takes states (d,), not {shape}: use network='unet' for images")
    for count in (*(options.get(key, 1) for key in ("blocks", "depth")), len(options.get("channels", ()))):
        if count > MOST_LAYERS:  # a damaged file could ask for so many that building never ends
            raise ValueError(f"the network's options ask for {count} layers or levels, more than {MOST_LAYERS}")
    with torch.random.fork_rng(devices=[]):  # layers draw initial weights from the global generator: restore it
        build = UNet if name == "unet" else MLP
        network: nn.Module = build(in_channels, out_channels, **options)
    stride = getattr(network, "stride", 1) if options.get("attention", True) else 1
    if len(shape) == 3 and (shape[1] % stride or shape[2] % stride):
        raise ValueError(f"images are {shape[1]} x {shape[2]}, but this U-Net takes multiples of {stride}")
    return network


def initialise(module: nn.Module, generator: torch.Generator | None) -> None:
    """Redraw all nonzero weights from an explicit generator, independent of the global seed."""
    from invflow._core.random import as_generator

    generator = as_generator(generator)
    for layer in module.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)) and not layer.weight.is_meta:
            with torch.no_grad():
                if bool((layer.weight != 0).any()):
                    noise = torch.randn(layer.weight.shape, generator=generator)
                    layer.weight.copy_(noise / layer.weight[0].numel() ** 0.5)
                if layer.bias is not None:
                    layer.bias.zero_()


@explained(like="invflow.load_prior('mnist')")
def load_prior(name: str | os.PathLike[str]) -> FlowMap:
    """Load a prior: shipped, saved, from a plug-in, or built by a function.

    In the list of ``invflow list priors``, names that begin with ``deepinv/`` are denoisers of the deepinv library,
    which downloads their weights on first use.

    Args:
        name: Name of a shipped prior or of a plug-in's, such as ``"mnist"``; a folder written by ``save_pretrained``; a
            Hub repository id ``"owner/name"``; or a function without arguments, ``"package.module:function"``.

    Returns:
        The flow map, in evaluation mode; a loaded :class:`NeuralFlowMap` is on the CPU, and its weights need no
        gradients.

    Raises:
        ValueError: For an unknown name (the message gives the nearest known one) or damaged files.

    Example:
        >>> import invflow
        >>> prior = invflow.load_prior("mnist")
        >>> prior.image_shape, prior.independent_noise
        ((1, 28, 28), True)
    """
    if isinstance(name, str) and name.startswith("deepinv/"):
        from invflow.models.downloads import load_download

        return load_download(name)
    if (SHIPPED / str(name) / CONFIG).is_file() or os.path.isdir(name):
        return NeuralFlowMap.from_pretrained(name)
    found = build_prior(name)
    return NeuralFlowMap.from_pretrained(name) if found is None else found


def load_trainable(name: str | os.PathLike[str]) -> NeuralFlowMap:
    """Load a prior that training can start from; names as in :func:`load_prior`.

    Raises:
        ValueError: For a flow map without a network of this library, and as in :func:`load_prior`.
    """
    prior = load_prior(name)
    if not isinstance(prior, NeuralFlowMap):
        raise ValueError(f"the prior {str(name)!r} is a {type(prior).__name__}, but training starts from a "
                         "NeuralFlowMap: name one, or a function that returns one; invflow train distil --prior "
                         f"{name} distils this prior into one")
    return prior
