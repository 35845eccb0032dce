"""Free-form masks: a mix of brush strokes, scratches, captions, boxes and lost pixels."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["draw_free_form"]

#: share of the masks that contain each kind of damage; every mask has at least one kind
SHARE = 0.4
#: rows and columns of a letter's bitmap; the last row and column are a gap
LETTER = (6, 5)


def draw_free_form(n: int, size: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Draw masks that mix five kinds of damage: brush strokes, scratches, captions, boxes, scattered pixels.

    Lengths grow with the shorter side, so masks look similar at every size; scratches stay a few pixels wide.

    Args:
        n: Number of masks.
        size: (H, W).
        generator: Source of randomness; the masks are on its device.

    Returns:
        ``(n, 1, H, W)`` bool, True where a pixel is observed. Each mask hides and shows at least one pixel.
    """
    kinds = (_lines_of_a_brush, _scratches, _captions, _boxes, _scattered)
    draws = _uniform(generator, n, len(kinds))
    present = (draws < SHARE) | (draws == draws.amin(1, keepdim=True))
    hidden = torch.zeros(n, *size, dtype=torch.bool, device=generator.device)
    for kind, own in zip(kinds, present.unbind(1)):
        hidden |= kind(n, size, generator) & own[:, None, None]
    # a stroke may miss the image, and boxes may cover it: fix one hidden and one observed pixel
    number = _uniform(generator, n, *size)
    hidden |= (number == number.amin((1, 2), keepdim=True)) & ~hidden.any(2, keepdim=True).any(1, keepdim=True)
    hidden &= (number < number.amax((1, 2), keepdim=True)) | ~hidden.all(2, keepdim=True).all(1, keepdim=True)
    return ~hidden[:, None]


def _uniform(generator: torch.Generator, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
    return low + (high - low) * torch.rand(*shape, generator=generator, device=generator.device)


def _grid(size: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Centres of rows ``(H, 1)`` and columns ``(1, W)``, in pixels."""
    return torch.arange(size[0], device=device)[:, None] + 0.5, torch.arange(size[1], device=device)[None] + 0.5


def _some(n: int, most: int, generator: torch.Generator) -> Tensor:
    """Random ``(n, most)`` bool: the first 1 to ``most`` entries of each row are True."""
    count = 1 + (most * _uniform(generator, n, 1)).long()
    return torch.arange(most, device=generator.device) < count


def _near_paths(size: tuple[int, int], points: Tensor, radius: Tensor, drawn: Tensor) -> Tensor:
    """Pixels ``(n, H, W)`` whose centre lies within a radius ``(n, S)`` of a path through points ``(n, S, P, 2)``."""
    row, column = _grid(size, points.device)
    near = torch.zeros(len(points), *size, dtype=torch.bool, device=points.device)
    for s in range(points.shape[1]):  # one segment of all masks at a time, to save memory
        for p in range(points.shape[2] - 1):
            start, end = points[:, s, p, :, None, None], points[:, s, p + 1, :, None, None]
            along = end - start
            y, x = row - start[:, 0], column - start[:, 1]
            share = (y * along[:, 0] + x * along[:, 1]) / along.square().sum(1).clamp(min=1e-6)
            share = share.clamp(0, 1)
            square = (y - share * along[:, 0]).square() + (x - share * along[:, 1]).square()
            near |= (square <= radius[:, s, None, None].square()) & drawn[:, s, None, None]
    return near


def _paths(n: int, number: int, steps: int, size: tuple[int, int], length: tuple[float, float], turn: float,
           generator: torch.Generator) -> Tensor:
    """Random walks ``(n, number, steps + 1, 2)`` that start in the image; lengths in shares of its shorter side."""
    side = torch.tensor(size, dtype=torch.float32, device=generator.device)
    start = _uniform(generator, n, number, 1, 2) * side
    heading = 2 * math.pi * _uniform(generator, n, number, 1)
    heading = heading + _uniform(generator, n, number, steps, low=-turn, high=turn).cumsum(2)
    stride = min(size) * _uniform(generator, n, number, steps, low=length[0], high=length[1])
    moves = torch.stack([heading.sin(), heading.cos()], dim=3) * stride[..., None]
    return torch.cat([start, start + moves.cumsum(2)], dim=2)


def _lines_of_a_brush(n: int, size: tuple[int, int], generator: torch.Generator) -> Tensor:
    points = _paths(n, 4, 5, size, (0.05, 0.25), 1.2, generator)
    radius = min(size) * _uniform(generator, n, 4, low=0.02, high=0.08)
    return _near_paths(size, points, radius.clamp(min=0.6), _some(n, 4, generator))


def _scratches(n: int, size: tuple[int, int], generator: torch.Generator) -> Tensor:
    points = _paths(n, 6, 2, size, (0.2, 0.7), 0.15, generator)
    radius = 0.5 + (0.2 + 0.008 * min(size)) * _uniform(generator, n, 6)
    return _near_paths(size, points, radius, _some(n, 6, generator))


def _captions(n: int, size: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Up to two lines of letters, each a small random bitmap."""
    lines = 2
    row, column = _grid(size, generator.device)
    height = (min(size) * _uniform(generator, n, lines, low=0.1, high=0.25)).clamp(min=LETTER[0])
    width = 0.8 * height
    most = math.ceil(size[1] / (0.8 * min(LETTER[0], float(height.min()))))
    letters = _uniform(generator, n, lines, most, *LETTER) < 0.6
    letters[..., -1, :] = letters[..., -1] = False
    top = _uniform(generator, n, lines) * (size[0] - height).clamp(min=0)
    left = _uniform(generator, n, lines, low=-0.2, high=0.5) * size[1]
    count = _uniform(generator, n, lines, low=2, high=most + 1).floor()
    shown, hidden = _some(n, lines, generator), torch.zeros(n, *size, dtype=torch.bool, device=generator.device)
    for k in range(lines):
        down = (row - top[:, k, None, None]) / height[:, k, None, None] * LETTER[0]
        across = (column - left[:, k, None, None]) / width[:, k, None, None]
        inside = (down >= 0) & (down < LETTER[0]) & (across >= 0) & (across < count[:, k, None, None].clamp(max=most))
        letter = across.floor().long().clamp(0, most - 1)
        pixel = ((across - across.floor()) * LETTER[1]).long().clamp(0, LETTER[1] - 1)
        place = (letter * LETTER[0] + down.long().clamp(0, LETTER[0] - 1)) * LETTER[1] + pixel
        bits = letters[:, k].flatten(1).gather(1, place.flatten(1)).view_as(place)
        hidden |= bits & inside & shown[:, k, None, None]
    return hidden


def _boxes(n: int, size: tuple[int, int], generator: torch.Generator) -> Tensor:
    row, column = _grid(size, generator.device)
    side = torch.tensor(size, dtype=torch.float32, device=generator.device)
    lengths = _uniform(generator, n, 3, 2, low=0.08, high=0.35) * side
    start = _uniform(generator, n, 3, 2) * (side - lengths)
    from_top, from_left = row - start[..., :1, None], column - start[..., 1:, None]
    inside = ((from_top >= 0) & (from_top < lengths[..., :1, None])
              & (from_left >= 0) & (from_left < lengths[..., 1:, None]))
    return (inside & _some(n, 3, generator)[..., None, None]).any(1)


def _scattered(n: int, size: tuple[int, int], generator: torch.Generator) -> Tensor:
    return _uniform(generator, n, *size) < _uniform(generator, n, 1, 1, low=0.02, high=0.6)
