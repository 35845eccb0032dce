"""Training of a prior: MeanFlow and flow matching with noise that is independent of the data."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from invflow._core.random import draw_noise
from invflow.linear.spectral import Spectrum
from invflow.models.neural import NeuralFlowMap
from invflow.training.loop import LoopSettings, Objective, Sampler, batches_of, fit, seeded, speaks_for_all
from invflow.training.losses import meanflow_loss, normalise, sample_between, sample_times

SAMPLE = 16384  # number of draws from a data function for its statistics

__all__ = ["MeanFlowObjective", "data_statistics", "train_prior"]


class MeanFlowObjective(Objective):
    """MeanFlow loss on a share of the rows, flow matching on the others; with noise independent of the data.

    Args:
        prior: The map to train.
        distinct: Share of rows with s < t.
        one_step: Share of those with (s, t) = (0, 1).
        tangent: Tangent of the MeanFlow loss, ``"path"``, ``"map"`` or ``"semigroup"``; see
            :func:`~invflow.training.losses.meanflow_loss`.
    """

    def __init__(self, prior: NeuralFlowMap, distinct: float = 0.5, one_step: float = 1 / 3,
                 tangent: str = "path") -> None:
        super().__init__()
        self.prior = prior
        self.distinct, self.one_step, self.tangent = distinct, one_step, tangent

    def trained(self) -> dict[str, nn.Module]:
        """The map."""
        return {"map": self.prior}

    def forward(self, data: Tensor, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of a batch of images ``(n, *image_shape)``, and its two parts per value of the state."""
        states = self.prior.encode(data)
        noise = draw_noise(tuple(states.shape), generator).to(states)
        s, t, k = sample_times(len(states), distinct=self.distinct, one_step=self.one_step, generator=generator,
                               device=states.device)
        middle = (sample_between(s, t, generator),) if self.tangent == "semigroup" else ()
        losses = meanflow_loss(self.prior.average_velocity, noise, states, s, t, k, *middle, tangent=self.tangent)
        per_value = losses.detach() / self.prior.dimension
        parts = {"flow_matching": per_value[k:], "meanflow": per_value[:k]}
        return normalise(losses.mean()), {name: part.mean() for name, part in parts.items() if len(part)}


def data_statistics(images: Tensor, decode_affine: tuple[float, float], floor: float = 0.1) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each value of the data states, for :class:`~invflow.NeuralFlowMap`.

    Args:
        images: ``(n, *image_shape)``, floats in [0, 1] or bytes.
        decode_affine: (scale, shift) of the decoding.
        floor: Smallest standard deviation, in units of the state: constant pixels need a positive one.

    Returns:
        Mean and standard deviation, each with the shape of an image.
    """
    scale = 255.0 if images.dtype == torch.uint8 else 1.0
    total = images.sum(dim=0, dtype=torch.float64)
    square = sum((chunk.double().square().sum(dim=0) for chunk in images.split(4096)), torch.zeros_like(total))
    mean = total / len(images)
    std = (square / len(images) - mean.square()).clamp(min=0).sqrt()
    gain, shift = decode_affine
    return ((mean / scale - shift) / gain).float(), (std / scale / gain).clamp(min=floor).float()


def stationary_statistics(images: Tensor, decode_affine: tuple[float, float]) -> tuple[Tensor, Tensor, Spectrum]:
    """Mean and standard deviation of each channel of the data states, ``(C, 1, 1)``, and their spectrum.

    Args:
        images: ``(n, C, H, W)``, floats in [0, 1] or bytes.
        decode_affine: (scale, shift) of the decoding.
    """
    values = images[:16384].float() / (255 if images.dtype == torch.uint8 else 1)
    states = (values - decode_affine[1]) / decode_affine[0]
    mean = states.mean(dim=(0, 2, 3), keepdim=True)
    return mean[0], states.std(dim=(0, 2, 3))[:, None, None], Spectrum.estimate(states - mean)


def gaussian_map(images: Tensor, decode_affine: tuple[float, float] = (0.5, 0.5),
                 generator: torch.Generator | None = None) -> NeuralFlowMap:
    """The exact flow of the stationary Gaussian with the mean and the spectrum of images ``(n, C, H, W)``.

    Args:
        images: Floats in [0, 1] or bytes.
        decode_affine: (scale, shift) of the decoding.
        generator: Source of the unused weights, which enter the map's fingerprint.
    """
    mean, std, spectrum = stationary_statistics(images, decode_affine)
    return NeuralFlowMap(tuple(images.shape[1:]), network="none", skip="spectral", decode_affine=decode_affine,
                         mean=mean, std=std, spectrum=spectrum, generator=generator)


def train_prior(data: Tensor | Sampler, settings: LoopSettings, folder: str | os.PathLike[str], *,
                network: str = "unet", options: dict[str, Any] | None = None,
                decode_affine: tuple[float, float] = (0.5, 0.5), start: NeuralFlowMap | None = None,
                skip: str | None = None, distinct: float = 0.5, one_step: float = 1 / 3, tangent: str = "path",
                progress: bool = True, stop_at: int | None = None) -> NeuralFlowMap:
    """Train a prior; resumes if the folder holds a checkpoint.

    Args:
        data: Images ``(n, *image_shape)``, floats in [0, 1] or bytes; or a function ``(n, generator)`` that makes them.
        settings: Settings of the loop.
        folder: Folder for the checkpoint, the metrics and, when done, the map (``folder/prior``).
        network: ``"unet"`` or ``"mlp"``.
        options: Options of the network.
        decode_affine: (scale, shift) of the decoding; ``(0.5, 0.5)`` for states in [-1, 1].
        start: Map to start from, which is not changed (a copy is trained); its network, decoding, mean and standard
            deviation are kept. None starts from random weights.
        skip: Form of the map; see :class:`~invflow.NeuralFlowMap`. For ``"spectral"``, mean and standard deviation are
            those of each channel, and the spectrum is estimated too.
        distinct: Share of rows with s < t.
        one_step: Share of those with (s, t) = (0, 1).
        tangent: ``"path"``, ``"map"`` or ``"semigroup"``; see :func:`~invflow.training.losses.meanflow_loss`.
        progress: Whether to show a progress bar.
        stop_at: Step at which to stop, with a checkpoint.

    Returns:
        The map with averaged weights, in evaluation mode.

    Raises:
        ValueError: If ``start`` takes images of another shape, or was trained jointly with an adapter.
    """
    sample = data if isinstance(data, Tensor) else data(SAMPLE, seeded(settings.seed, 0, -3))
    if start is None:
        mean, std = data_statistics(sample, decode_affine)
        spectrum = None
        if skip == "spectral":
            mean, std, spectrum = stationary_statistics(sample, decode_affine)
        prior = NeuralFlowMap(tuple(sample.shape[1:]), network=network, options=options, decode_affine=decode_affine,
                              mean=mean, std=std, skip=skip, spectrum=spectrum, generator=seeded(settings.seed, 0, -2))
    elif start.image_shape != tuple(sample.shape[1:]):
        raise ValueError(f"the map to start from takes images {start.image_shape}, but the data are "
                         f"{tuple(sample.shape[1:])}: leave out start to train a new one")
    elif not start.independent_noise:
        raise ValueError("the map to start from was trained jointly with an adapter, and its noise is not independent "
                         "of the data: pass a prior, or continue with train_vfm")
    else:
        prior = copy.deepcopy(start).requires_grad_(True)
    prior.train()
    objective = MeanFlowObjective(prior, distinct, one_step, tangent)
    done = fit(objective, batches_of(data, settings), settings, folder, progress=progress, stop_at=stop_at)
    if done and speaks_for_all():
        prior.save_pretrained(Path(folder) / "prior")
    return prior.cpu().eval().requires_grad_(False)
