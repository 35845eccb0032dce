"""The summary of a kernel, an input of neural adapters."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from invflow.operator import SUMMARY_LATTICE

__all__ = ["transfer_summary"]


def transfer_summary(kernels: Tensor, center: tuple[float, float], image_shape: tuple[int, ...]) -> Tensor:
    """Transfer functions of kernels at 16 low frequencies.

    The frequencies are multiples, up to fourfold, of three periods per image side (per 64 pixels if the image is
    larger). This spacing separates kernels of up to a third of the image, the usual size here. A kernel has the same
    summary in a large photograph as in the crops that an adapter was trained on.

    Args:
        kernels: ``(n, channels, h, w)``; channels are averaged.
        center: Pixel coordinates of the origin, possibly between two pixels.
        image_shape: (C, H, W).

    Returns:
        ``(n, 32)``: real parts, then imaginary parts. All real parts are 1 for the identity.
    """
    kernels = kernels.mean(1)
    lattice = torch.tensor(SUMMARY_LATTICE, device=kernels.device).to(kernels.dtype) * 3
    angles = []
    for axis in (0, 1):
        offset = torch.arange(kernels.shape[1 + axis], device=kernels.device).to(kernels.dtype) - center[axis]
        angles.append(2 * math.pi * lattice[:, axis, None] * offset / min(image_shape[1 + axis], 64))
    phase = angles[0][:, :, None] + angles[1][:, None, :]
    real = torch.einsum("nhw,fhw->nf", kernels, phase.cos())
    imaginary = -torch.einsum("nhw,fhw->nf", kernels, phase.sin())
    return torch.cat([real, imaginary], dim=1)
