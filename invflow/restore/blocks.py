"""Restores large pictures in overlapping blocks, so that memory depends on the size of a block."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from invflow.restore.posterior import built_again, posterior_of

if TYPE_CHECKING:
    from invflow.operator import Operator
    from invflow.solvers.vfm import VFM

__all__ = ["posterior_in_blocks"]

#: side of a block and overlap of two blocks, in pixels; smaller pictures are one block
BLOCK, FADE = 1024, 96
#: width of the border of a block whose pixels are not used, because the block lacks their surroundings
MARGIN = 16

Tell = Callable[[int, int, float], None]


def posterior_in_blocks(vfm: VFM, operator: Operator, y: Tensor, sigma: float, samples: int,
                        generator: torch.Generator, tell: Tell | None = None,
                        block: int = BLOCK) -> tuple[Tensor, Tensor]:
    """The posterior of :func:`posterior_of` for a picture of any size, block by block.

    Overlapping blocks are blended. Means use weights that sum to 1. Deviations are drawn independently for each block
    and use weights whose squares sum to 1, so that they have the same size in overlaps as elsewhere.

    Args:
        vfm: Solver for colour images of any size.
        operator: Forward operator of the picture; each measured pixel must depend only on nearby pixels.
        y: Measurement ``(1, *measurement_shape)``.
        sigma: Noise level.
        samples: Number of samples.
        generator: Random generator.
        tell: Called after each block, if there are several, with the number of blocks done, their total number, and
            the estimated remaining seconds.
        block: Side of a block in pixels of the image.

    Returns:
        Mean ``(C, H, W)``, and the deviations of the samples from it, ``(samples, C, H, W)``, in half precision if
        there are several blocks.
    """
    shape, of = tuple(operator.image_shape), operator
    factor = shape[1] // y.shape[2]
    kernel: Tensor | None = getattr(of, "kernel", None)
    margin = MARGIN if kernel is None else MARGIN + max(kernel.shape[-2:]) // 2
    overlap = FADE + 2 * margin
    side = max(block, 2 * overlap) // factor
    if math.prod(shape[1:]) <= block**2 or max(y.shape[2:]) <= side:
        mean, images = posterior_of(vfm, operator, y, sigma, samples, generator)
        return mean, images - mean
    cuts = [_cuts(length, side, -(-overlap // factor)) for length in y.shape[2:]]
    (across, root_across), (down, root_down) = (
        _shares([(factor * a, factor * b) for a, b in along], factor * length, margin)
        for along, length in zip(cuts, y.shape[2:], strict=True))
    mean, away = torch.zeros(shape), torch.zeros(samples, *shape, dtype=torch.float16)
    start, total, done = time.perf_counter(), len(cuts[0]) * len(cuts[1]), 0
    for i, (top, bottom) in enumerate(cuts[0]):
        for j, (left, right) in enumerate(cuts[1]):
            rows, columns = slice(factor * top, factor * bottom), slice(factor * left, factor * right)
            centre, images = _of_a_block(vfm, operator, y, (..., slice(top, bottom), slice(left, right)), sigma,
                                         samples, generator)
            mean[..., rows, columns] += across[i, rows, None] * down[j, columns] * centre
            away[..., rows, columns] += root_across[i, rows, None] * root_down[j, columns] * (images - centre)
            done += 1
            if tell is not None:
                tell(done, total, (time.perf_counter() - start) / done * (total - done))
    return mean, away


def _cuts(length: int, side: int, overlap: int) -> list[tuple[int, int]]:
    """Start and end of evenly spaced blocks of at most this side, with at least this overlap."""
    if length <= side:
        return [(0, length)]
    steps = math.ceil((length - side) / (side - overlap))
    side = math.ceil((length + steps * overlap) / (steps + 1))
    return [(start, start + side) for start in (round(k * (length - side) / steps) for k in range(steps + 1))]


def _shares(cuts: list[tuple[int, int]], length: int, margin: int) -> tuple[Tensor, Tensor]:
    """Weights of each block in each row or column, ``(blocks, length)``: with sum 1, and with squares of sum 1."""
    place, rising = torch.arange(length), torch.zeros(len(cuts), length)
    for k, (start, stop) in enumerate(cuts):
        own = torch.ones(length)
        if start > 0:
            own = ((place - start - margin + 0.5) / FADE).clamp(0, 1)
        if stop < length:
            own = torch.minimum(own, ((stop - margin - place - 0.5) / FADE).clamp(0, 1))
        rising[k] = own
    return rising / rising.sum(0), rising / rising.square().sum(0).sqrt()


def _of_a_block(vfm: VFM, operator: Operator, y: Tensor, seen: Any, sigma: float, samples: int,
                generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Mean and samples of one block."""
    mask: Tensor | None = getattr(operator, "mask", None)
    part, scale = y[seen], operator.image_shape[1] // y.shape[2]
    shape = (part.shape[1], part.shape[2] * scale, part.shape[3] * scale)
    if mask is not None and not bool(mask[seen].any()):  # a hole larger than a block, with nothing observed in it
        grey = (y.sum((2, 3)) / mask.expand_as(y).sum((2, 3)).clamp(min=1))[0, :, None, None].expand(shape)
        drawn = vfm.prior_samples(max(1, samples), (3, *shape[1:]), generator=generator)[:samples]
        drawn = drawn if len(grey) == 3 else drawn.mean(1, keepdim=True)
        return grey, grey + drawn - drawn.mean((2, 3), keepdim=True)
    return posterior_of(vfm, built_again(operator, shape, seen), part, sigma, samples, generator)
