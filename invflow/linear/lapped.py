"""A lapped cosine transform: orthonormal, with the frequencies of blocks of 8 x 8 pixels, without their borders."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from invflow.linear.spectral import BLOCK, block_dct, dct_matrix

__all__ = ["TRANSFORMS", "lapped_dct"]


@functools.lru_cache(maxsize=32)
@torch.inference_mode(False)  # cached, so it must not be an inference tensor
def _filter(half: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Orthonormal filter of the pixels on both sides of a border between blocks, ``(2 * half, 2 * half)``."""
    k = torch.arange(half, dtype=torch.float64) + 0.5
    fourth = torch.cos(math.pi * k[:, None] * k / half) * math.sqrt(2 / half)  # cosine transform of the fourth kind
    one = torch.eye(half, dtype=torch.float64)
    turn = (dct_matrix(half, torch.float64).mT @ fourth).flip(0, 1)
    fold = torch.cat([torch.cat([one, one.flip(0)], 1), torch.cat([one.flip(0), -one], 1)]) / math.sqrt(2)
    turned: Tensor = torch.block_diag(one, turn)
    return (fold @ turned @ fold).to(device, dtype)


def _filtered(x: Tensor, axis: int, inverse: bool) -> Tensor:
    """Filter across each border between two blocks along one axis; the last block may be shorter."""
    x = x.movedim(axis, -1)
    whole, half = x.shape[-1] // BLOCK * BLOCK, BLOCK // 2
    rest = x.shape[-1] - whole
    inner = max(whole - half, 0)  # the last border between whole blocks ends here
    if whole > BLOCK:
        matrix = _filter(half, x.dtype, x.device)
        middle = x[..., half:inner].unflatten(-1, (-1, BLOCK)) @ (matrix if inverse else matrix.mT)
        x = torch.cat([x[..., :half], middle.flatten(-2), x[..., inner:]], dim=-1)
    if whole and rest:
        half = min(half, rest)
        matrix = _filter(half, x.dtype, x.device)
        middle = x[..., whole - half : whole + half] @ (matrix if inverse else matrix.mT)
        x = torch.cat([x[..., : whole - half], middle, x[..., whole + half :]], dim=-1)
    return x.movedim(-1, axis)


def lapped_dct(x: Tensor, inverse: bool = False) -> Tensor:
    """Lapped cosine transform; the coefficients take the place of the pixels, as in :func:`block_dct`.

    It is the lapped orthogonal transform (Malvar and Staelin 1989) as a filter across the borders of the blocks,
    followed by the cosines of each block (Tran, Liang and Tu 2003). Each basis function covers up to 16 x 16 pixels
    and ends smoothly, so a Gaussian that is diagonal in the coefficients has no steps at the borders of blocks. The
    coefficients have the frequencies of :func:`block_dct`, and a constant image has only coefficients of frequency
    zero. At the border of the image nothing overlaps.

    Args:
        x: ``(..., H, W)``; blocks at the right and bottom border may be smaller.
        inverse: Whether to apply the inverse transform, which is the transpose.

    Returns:
        The same shape.

    Example:
        >>> import torch
        >>> from invflow.linear.lapped import lapped_dct
        >>> x = torch.randn(20, 30)
        >>> torch.allclose(lapped_dct(lapped_dct(x), inverse=True), x, atol=1e-5)
        True
    """
    if inverse:
        return _filtered(_filtered(block_dct(x, inverse=True), -1, True), -2, True)
    return block_dct(_filtered(_filtered(x, -1, False), -2, False))


#: transforms by name, for configurations
TRANSFORMS = {"block": block_dct, "lapped": lapped_dct}
