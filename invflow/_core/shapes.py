"""Shapes that broadcast: one number for each row, and the three axes of a picture."""

from __future__ import annotations

from torch import Tensor

__all__ = ["as_pictures", "column", "per_particle"]


def column(values: Tensor, like: Tensor) -> Tensor:
    """One number a row, ``(n,)``, shaped and typed to multiply ``(n, ...)``."""
    return values.to(like).reshape(-1, *[1] * (like.ndim - 1))


def as_pictures(image_shape: tuple[int, ...]) -> tuple[int, int, int]:
    """(C, H, W) of a picture; a vector is a picture of one row, an array (H, W) has one channel.

    Raises:
        ValueError: for more than three axes.
    """
    if len(image_shape) > 3:
        raise ValueError(f"images have shape {image_shape}: expected (C, H, W), or fewer axes")
    channels, height, width = (1,) * (3 - len(image_shape)) + tuple(image_shape)
    return channels, height, width


def per_particle(value: Tensor, noise: Tensor) -> Tensor:
    """One value for each observation, shaped to broadcast against the noise."""
    return value.to(noise).reshape(-1, *[1] * (noise.ndim - 1))
