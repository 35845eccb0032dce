"""Helpers for shapes: one number per row, the three axes of a picture, and masks of unobserved entries."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["as_pictures", "column", "only_observed", "with_axes"]


def column(values: Tensor, like: Tensor) -> Tensor:
    """One number per row, ``(n,)``, with the shape and type to multiply ``(n, ...)``."""
    return with_axes(values.to(like), like.ndim)


def with_axes(values: Tensor, ndim: int) -> Tensor:
    """Append axes of length 1 until the values have ``ndim`` axes."""
    return values.reshape(*values.shape, *[1] * (ndim - values.ndim))


def only_observed(values: Tensor, observed: Tensor | None) -> Tensor:
    """Values ``(B, *shape)`` or ``(B, N, *shape)`` with zeros at unobserved entries.

    Args:
        values: Values in the shape of measurements.
        observed: Mask of observed entries, ``(1 or B, *shape)`` bool. None: all are observed.
    """
    if observed is None:
        return values
    return torch.where(observed if observed.ndim == values.ndim else observed[:, None], values, 0.0)


def as_pictures(image_shape: tuple[int, ...]) -> tuple[int, int, int]:
    """(C, H, W) of a picture. A vector counts as a picture with one row, and an array (H, W) as one channel.

    Raises:
        ValueError: For more than three axes.
    """
    if len(image_shape) > 3:
        raise ValueError(f"images have shape {image_shape}: expected (C, H, W), or fewer axes")
    channels, height, width = (1,) * (3 - len(image_shape)) + tuple(image_shape)
    return channels, height, width
