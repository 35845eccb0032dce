"""Shapes that broadcast: one number for each row, the three axes of a picture, and what was not observed."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["as_pictures", "column", "only_observed", "with_axes"]


def column(values: Tensor, like: Tensor) -> Tensor:
    """One number a row, ``(n,)``, shaped and typed to multiply ``(n, ...)``."""
    return with_axes(values.to(like), like.ndim)


def with_axes(values: Tensor, ndim: int) -> Tensor:
    """The values with further axes of length 1 at the end, so that they have ``ndim``."""
    return values.reshape(*values.shape, *[1] * (ndim - values.ndim))


def only_observed(values: Tensor, observed: Tensor | None) -> Tensor:
    """Values ``(B, *shape)`` or ``(B, N, *shape)`` with zeros where nothing was observed; None observes all.

    Args:
        values: of measurements.
        observed: ``(1 or B, *shape)`` bool.
    """
    if observed is None:
        return values
    return torch.where(observed if observed.ndim == values.ndim else observed[:, None], values, 0.0)


def as_pictures(image_shape: tuple[int, ...]) -> tuple[int, int, int]:
    """(C, H, W) of a picture; a vector is a picture of one row, an array (H, W) has one channel.

    Raises:
        ValueError: for more than three axes.
    """
    if len(image_shape) > 3:
        raise ValueError(f"images have shape {image_shape}: expected (C, H, W), or fewer axes")
    channels, height, width = (1,) * (3 - len(image_shape)) + tuple(image_shape)
    return channels, height, width
