"""Test quantities of calibration: functions of an image by which the truth is ranked among the samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TypeAlias

import torch
from torch import Tensor

from invflow._core.random import draw_noise
from invflow.likelihood import Likelihood
from invflow.linear.structure import zero_unobserved
from invflow.reward import Reward

__all__ = ["Quantity", "default_quantities", "evaluate", "total_variation"]

#: images ``(B, N, *image_shape)`` and the reward of the B observations, to numbers ``(B, N)``
Quantity: TypeAlias = Callable[[Tensor, Reward], Tensor]


def default_quantities(pilot: Tensor, generator: torch.Generator, *, num_pixels: int = 4,
                       num_projections: int = 4, num_blocks: int = 4) -> dict[str, Quantity]:
    """Random pixels and projections, means over blocks of pixels, squared residual, log likelihood, total variation.

    If the pixels of samples are correlated too weakly or too strongly, the intervals of single pixels can be right
    while the intervals of a region are wrong. Means over blocks, whose sides are a quarter or half of the image's,
    detect this.

    The last three depend on the measurement or on all pixels (Modrak et al. 2023 show that quantities that
    depend on the likelihood detect posteriors that ignore the data). For Gaussian noise the residual and the log
    likelihood order images in the same way, and their ranks are mirror images.

    Args:
        pilot: Truths ``(n, *image_shape)`` that are not among the simulations. Pixels are drawn with
            probabilities proportional to their variance over these truths, so that no constant border is chosen.
        generator: Generator for pixels and directions.
        num_pixels: Largest number of pixels; none appears twice.
        num_projections: Number of projections onto random unit vectors, for images of more than one pixel.
        num_blocks: Largest number of blocks, for pictures (C, H, W), each around a random pixel, drawn as above.

    Returns:
        Quantities by name.
    """
    shape = tuple(pilot.shape[1:])
    variance = pilot.flatten(1).double().var(0, unbiased=False).cpu()
    chances = variance if float(variance.sum()) > 0 else torch.ones_like(variance)
    count = min(num_pixels, int((chances > 0).sum()))
    pixels = torch.multinomial(chances, count, generator=generator).sort().values.tolist()
    found: dict[str, Quantity] = {}
    for pixel in pixels:
        place = [int(i) for i in torch.unravel_index(torch.tensor(pixel), shape)]
        found[f"pixel {place[0] if len(place) == 1 else tuple(place)}"] = _pixel(pixel)
    size = math.prod(shape)
    for k in range(num_projections if size > 1 else 0):
        direction = draw_noise((size,), generator)
        found[f"projection {k + 1}"] = _projection(direction / torch.linalg.vector_norm(direction))
    if len(shape) == 3:
        blocks = min(num_blocks, int((chances > 0).sum()))
        for k, pixel in enumerate(torch.multinomial(chances, blocks, generator=generator).tolist()):
            rows, columns = (_around(int(i), side, 4 if k % 2 == 0 else 2)
                             for i, side in zip(torch.unravel_index(torch.tensor(pixel), shape)[1:], shape[1:]))
            if len(rows) * len(columns) > 1:
                found[f"mean of rows {_span(rows)}, columns {_span(columns)}"] = _block(rows, columns)
    found["residual |y - Ax|^2"] = _residual
    found["log likelihood"] = _log_likelihood
    if size > 1:
        found["total variation"] = total_variation
    return found


def _pixel(index: int) -> Quantity:
    return lambda x, _: x.reshape(*x.shape[:2], -1)[:, :, index]


def _projection(direction: Tensor) -> Quantity:
    return lambda x, _: x.reshape(*x.shape[:2], -1) @ direction.to(x)


def _around(place: int, side: int, share: int) -> range:
    """Range around a place, of length side / share, inside the image."""
    length = max(1, side // share)
    first = min(max(0, place - length // 2), side - length)
    return range(first, first + length)


def _span(places: range) -> str:
    return f"{places[0]}-{places[-1]}"


def _block(rows: range, columns: range) -> Quantity:
    return lambda x, _: x[..., rows.start : rows.stop, columns.start : columns.stop].flatten(2).double().mean(2)


def _residual(x: Tensor, reward: Reward) -> Tensor:
    if not isinstance(reward, Likelihood):
        raise TypeError(f"the residual needs a likelihood, not a {type(reward).__name__}")
    residual = zero_unobserved(reward.operator, reward.y[:, None].to(x) - reward.predict(x))
    return residual.double().square().flatten(2).sum(2)


def _log_likelihood(x: Tensor, reward: Reward) -> Tensor:
    return reward(x)


def total_variation(x: Tensor, reward: Reward | None = None) -> Tensor:
    """Anisotropic total variation, the sum of absolute differences of neighbours, ``(B, N)``.

    Images are ``(B, N, *image_shape)``. Neighbours are taken along the last two axes of pictures (C, H, W), and along
    the last axis otherwise.
    """
    total = x.diff(dim=-1).abs().flatten(2).sum(2)
    return total + x.diff(dim=-2).abs().flatten(2).sum(2) if x.ndim == 5 else total


@torch.no_grad()
def evaluate(quantities: Mapping[str, Quantity], x: Tensor, reward: Reward) -> Tensor:
    """Evaluate all quantities on images ``(B, N, *image_shape)``: ``(B, N, Q)`` in double precision.

    Raises:
        ValueError: If a quantity returns another shape, or NaN.
    """
    columns = []
    for name, quantity in quantities.items():
        values = quantity(x, reward)
        if not isinstance(values, Tensor) or tuple(values.shape) != tuple(x.shape[:2]):
            got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise ValueError(f"the quantity {name!r} returned {got} for images {tuple(x.shape)}, expected one number "
                             f"for each, {tuple(x.shape[:2])}: reduce the image axes, as in x.flatten(2).mean(2)")
        if bool(values.isnan().any()):
            raise ValueError(f"the quantity {name!r} returned NaN, which has no rank")
        columns.append(values.double())
    return torch.stack(columns, 2)
