"""Non-local means: denoising of pictures with repeated structure, without a network."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, pad

__all__ = ["non_local_means"]

#: side of the compared patches, and the largest distance between them, in pixels
PATCH, REACH = 5, 5


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
    for down in range(reach + 1):
        for right in range(-reach if down else 1, reach + 1):
            first = slice(0, height - down), slice(max(0, -right), width - max(0, right))
            other = slice(down, height), slice(max(0, right), width - max(0, -right))
            one, two = y[..., first[0], first[1]], y[..., other[0], other[1]]
            apart = (one - two).square_().mean(1, keepdim=True)
            if min(apart.shape[-2:]) > PATCH // 2:
                apart = pad(apart, [PATCH // 2] * 4, mode="reflect")
                apart = avg_pool2d(avg_pool2d(apart, (PATCH, 1), stride=1), (1, PATCH), stride=1)
            weight = apart.sub_(2 * sigma**2).clamp_(min=0).mul_(-((strength * sigma) ** -2)).exp_()
            total[..., first[0], first[1]].addcmul_(weight, two)
            total[..., other[0], other[1]].addcmul_(weight, one)
            weights[..., first[0], first[1]] += weight
            weights[..., other[0], other[1]] += weight
    return total / weights
