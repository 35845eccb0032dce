"""Shapes that broadcast: one number for each row, the three axes of a picture, and what was not observed."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["as_pictures", "column", "only_observed"]


def column(values: Tensor, like: Tensor) -> Tensor:
    """One number a row, ``(n,)``, shaped and typed to multiply ``(n, ...)``."""
    return values.to(like).reshape(-1, *[1] * (like.ndim - 1))


def only_observed(values: Tensor, observed: Tensor | None) -> Tensor:
    """The values with zeros where nothing was observed; None observes all."""
    return values if observed is None else torch.where(observed, values, 0.0)


def as_pictures(image_shape: tuple[int, ...]) -> tuple[int, int, int]:
    """(C, H, W) of a picture; a vector is a picture of one row, an array (H, W) has one channel.

    Raises:
        ValueError: for more than three axes.
    """
    if len(image_shape) > 3:
        raise ValueError(f"images have shape {image_shape}: expected (C, H, W), or fewer axes")
    channels, height, width = (1,) * (3 - len(image_shape)) + tuple(image_shape)
    return channels, height, width
