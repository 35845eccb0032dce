"""Banded matrices, for resampling along one axis of an image."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

__all__ = ["FILTERS", "Banded", "downsampling", "taps"]

#: rows of R in one block; a matrix with at most this many rows is stored in full
BLOCK = 64
#: entries of the inverse of R R' further than this from the diagonal are under 1e-16 of the diagonal
MARGIN = 40


class Banded(nn.Module):
    """A banded matrix ``(m, n)``, stored as blocks of rows over windows of columns; it acts on the last axis.

    Args:
        blocks: ``(k, b, w)``, blocks of b rows; the last block may have surplus rows.
        starts: ``(k,)``, first column of each block's window of w columns.
        shape: (m, n).
    """

    blocks: Tensor
    index: Tensor

    def __init__(self, blocks: Tensor, starts: Tensor, shape: tuple[int, int]) -> None:
        super().__init__()
        self.shape = shape
        self.register_buffer("blocks", blocks.to(torch.get_default_dtype()))
        self.register_buffer("index", starts[:, None] + torch.arange(blocks.shape[2]), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Product with each vector, ``(..., n)`` to ``(..., m)``."""
        out = torch.einsum("...kw,kbw->...kb", x[..., self.index], self.blocks.to(x.dtype))
        return out.flatten(-2)[..., : self.shape[0]]

    def transpose(self, y: Tensor) -> Tensor:
        """Product of the transpose with each vector, ``(..., m)`` to ``(..., n)``."""
        count, size, _ = self.blocks.shape
        padded = nn.functional.pad(y, (0, count * size - self.shape[0]))
        windows = torch.einsum("...kb,kbw->...kw", padded.unflatten(-1, (count, size)), self.blocks.to(y.dtype))
        out = y.new_zeros(*y.shape[:-1], self.shape[1])
        return out.index_add(-1, self.index.flatten(), windows.flatten(-2))


def _bicubic(d: Tensor) -> Tensor:
    inner, outer = 1.5 * d**3 - 2.5 * d**2 + 1, -0.5 * d**3 + 2.5 * d**2 - 4 * d + 2
    return torch.where(d < 1, inner, torch.where(d < 2, outer, 0.0))


#: each filter as a function of the distance to its centre, in pixels of the smaller image, and its radius: those of
#: Pillow (a triangle, Keys 1981 with a = -1/2, Lanczos with three lobes), and a Gaussian of standard deviation 0.4
FILTERS: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "bilinear": (lambda d: (1 - d).clamp(min=0), 1.0),
    "bicubic": (_bicubic, 2.0),
    "lanczos": (lambda d: torch.where(d < 3, torch.sinc(d) * torch.sinc(d / 3), 0.0), 3.0),
    "gaussian": (lambda d: torch.exp(-(d**2) / (2 * 0.4**2)), 4.0),
}


def taps(side: int, factor: int, filter: str) -> tuple[Tensor, Tensor]:
    """Weights ``(m, taps)`` in float64 and first columns ``(m,)`` of downsampling to m = ceil(side / factor).

    The filter, one of :data:`FILTERS`, is stretched by side / m, cut off and normalised at the border, as in Pillow.
    """
    weight, reach = FILTERS[filter]
    m = -(-side // factor)
    scale = side / m
    centre = (torch.arange(m, dtype=torch.float64) + 0.5) * scale
    first = (centre - reach * scale + 0.5).floor().clamp(min=0)
    last = (centre + reach * scale + 0.5).floor().clamp(max=side)
    column = first[:, None] + torch.arange(int((last - first).max()), dtype=torch.float64)
    weights = weight(((column + 0.5 - centre[:, None]) / scale).abs()) * (column < last[:, None])
    return weights / weights.sum(1, keepdim=True), first.long()


def downsampling(side: int, factor: int, filter: str) -> tuple[Banded, Banded]:
    """The matrix R of downsampling with a filter, ``(m, side)``, and its pseudo-inverse R' (R R')^-1.

    R R' has a bandwidth of a few pixels and is well conditioned, so the entries of its inverse shrink by more than half
    from each diagonal to the next. Up to rounding, its rows therefore follow from the inverse of a local block.
    """
    weights, first = taps(side, factor, filter)
    m, across = weights.shape
    count = math.ceil(m / BLOCK)

    def part(low: int, high: int, begin: int, end: int) -> Tensor:
        """Rows ``low`` to ``high`` of R between the columns ``begin`` and ``end``, outside which they are zero."""
        out = torch.zeros(high - low, side + across, dtype=torch.float64)
        column = first[low:high, None] + torch.arange(across)
        return out.scatter_(1, column, weights[low:high])[:, begin:end]

    rows = [(k * BLOCK, min((k + 1) * BLOCK, m)) for k in range(count)]
    width = min(side, max(int(first[high - 1] - first[low]) + across for low, high in rows))
    starts = torch.tensor([min(int(first[low]), side - width) for low, _ in rows])
    forward = torch.zeros(count, BLOCK if count > 1 else m, width, dtype=torch.float64)
    for k, (low, high) in enumerate(rows):
        forward[k, : high - low] = part(low, high, int(starts[k]), int(starts[k]) + width)

    # cut the image's rows into the same number of pieces; only nearby rows of R overlap a piece
    size = math.ceil(side / count)
    reach = math.ceil(size * m / side) + 2 * MARGIN + 6
    seen = min(m, reach)
    begin = [min(max(int(k * size * m / side) - MARGIN - 3, 0), m - seen) for k in range(count)]
    inverse = torch.zeros(count, size, seen, dtype=torch.float64)
    for k, low in enumerate(begin):
        outer = max(low - MARGIN, 0), min(low + seen + MARGIN, m)
        around = int(first[outer[0]]), min(int(first[outer[1] - 1]) + across, side)
        near = part(*outer, *around)
        here = slice(k * size - around[0], min((k + 1) * size, side) - around[0])
        solved = torch.linalg.solve(near @ near.mT, near[:, here]).mT  # (piece, outer)
        inverse[k, : solved.shape[0]] = solved[:, low - outer[0] : low - outer[0] + seen]
    return Banded(forward, starts, (m, side)), Banded(inverse, torch.tensor(begin), (side, m))
