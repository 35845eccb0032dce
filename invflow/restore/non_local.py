"""Non-local means: denoising of pictures with repeated structure, without a network."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

__all__ = ["non_local_means"]

#: side of the compared patches, and the largest distance between them, in pixels
PATCH, REACH = 5, 5
#: pixels that are worked on at a time, so that they stay in the processor's cache
STRIP = 2**16


def non_local_means(y: Tensor, sigma: float, strength: float = 0.6) -> Tensor:
    """Average pixels with similar neighbourhoods (Buades, Coll and Morel 2005).

    The difference of two patches is compared with the difference expected from noise, as in scikit-image. Each pair of
    pixels is compared once. This takes as long as filtering the picture a hundred times.

    Args:
        y: Noisy picture ``(1, C, H, W)``.
        sigma: Its noise level.
        strength: Multiple of the noise level above which the difference of two patches lowers their weight.

    Returns:
        ``(1, C, H, W)``.
    """
    height, width = y.shape[-2:]
    reach = min(REACH, height - 1, width - 1)
    total, weights = y.clone(), torch.ones_like(y[:, :1])
    rows = max(16, STRIP // width)
    for top in range(0, height, rows):
        for down in range(min(reach, height - 1 - top) + 1):
            stop = min(top + rows, height - down)  # only rows that have another this far below
            # a strip's patches reach beyond it, except at the border of all pairs, where they are reflected
            margin = PATCH // 2 if height - down > PATCH // 2 else 0
            low, high = max(0, top - margin), min(height - down, stop + margin)
            for right in range(-reach if down else 1, reach + 1):
                columns = slice(max(0, -right), width - max(0, right))
                others = slice(max(0, right), width - max(0, -right))
                apart = (y[..., low:high, columns] - y[..., low + down : high + down, others]).square_()
                apart = apart.mean(1, keepdim=True)
                if margin and apart.shape[-1] > PATCH // 2:
                    apart = _patch_means(apart, low == top, high == height - down)[..., : stop - top, :]
                else:
                    apart = apart[..., top - low : stop - low, :]
                weight = apart.sub_(2 * sigma**2).clamp_(min=0).mul_(-((strength * sigma) ** -2)).exp_()
                first, other = slice(top, stop), slice(top + down, stop + down)
                total[..., first, columns].addcmul_(weight, y[..., other, others])
                total[..., other, others].addcmul_(weight, y[..., first, columns])
                weights[..., first, columns] += weight
                weights[..., other, others] += weight
    return total.div_(weights)


def _patch_means(values: Tensor, above: bool, below: bool) -> Tensor:
    """Means over patches; rows are reflected at the top or bottom where asked, and otherwise have to be there."""
    side = PATCH // 2
    values = pad(values, (side, side, side * above, side * below), mode="reflect")
    height, width = values.shape[-2] - 2 * side, values.shape[-1] - 2 * side
    down = values[..., :height, :].clone()  # sums of a few shifted copies: much faster than pooling
    for k in range(1, PATCH):
        down += values[..., k : k + height, :]
    both = down[..., :width].clone()
    for k in range(1, PATCH):
        both += down[..., k : k + width]
    return both.div_(PATCH**2)
