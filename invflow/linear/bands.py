"""Bands of frequency of cosine coefficients, for factors of standard deviations."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from invflow.linear.spectral import BLOCK

__all__ = ["NUM_BANDS", "bands_of", "checked_bands"]

#: upper ends of the bands of radial frequency in cycles per pixel; the last band is open
ENDS = (3 / 32, 5 / 32, 1 / 4, 3 / 8, 1 / 2)
NUM_BANDS = len(ENDS) + 1


@functools.lru_cache(maxsize=16)
@torch.inference_mode(False)  # cached, so it must not be an inference tensor
def bands_of(height: int, width: int, block: int | None = BLOCK) -> Tensor:
    """Band of each coefficient of :func:`~invflow.linear.spectral.block_dct`, ``(height, width)``, from 0 to 5.

    ``block=None`` gives those of the cosines of the whole image.
    """
    rows, columns = (_frequencies(side, block or side) for side in (height, width))
    return torch.bucketize(torch.hypot(rows[:, None], columns), rows.new_tensor(ENDS), right=True)


def checked_bands(name: str, factors: Sequence[Sequence[float]], channels: int) -> list[list[float]]:
    """The factors of a problem class as lists, one row for each opponent colour.

    Raises:
        ValueError: Unless there are ``channels`` rows of six positive numbers.
    """
    rows = [[float(value) for value in row] for row in factors]
    if [len(row) for row in rows] != [NUM_BANDS] * channels or not all(0 < v < math.inf for r in rows for v in r):
        raise ValueError(f"bands[{name!r}]={factors!r}: pass {channels} rows, one for each opponent colour, of "
                         f"{NUM_BANDS} positive numbers, one for each band, such as 1.1 for samples with 10% more "
                         "spread there")
    return rows


def _frequencies(side: int, block: int) -> Tensor:
    """Frequency of each coefficient along one axis in cycles per pixel; the last block may be shorter."""
    place, rest = torch.arange(side, dtype=torch.float64), side % block
    short = place >= side - rest
    return torch.where(short, (place - (side - rest)) / (2 * max(rest, 1)), place % block / (2 * block))
