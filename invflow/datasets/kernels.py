"""Cleans blur kernels read from files: removes a constant offset, centres them, and rejects photographs."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["clean_kernel"]


def clean_kernel(kernel: Tensor, name: str, say: Callable[[str], None], centre: bool = True) -> Tensor:
    """Remove the constant offset of a kernel, and centre it so that blurring does not shift a picture.

    Args:
        kernel: Kernel ``(h, w)`` with a positive sum.
        name: Name of the file.
        say: Called with a sentence for each change.
        centre: Whether to centre it.

    Returns:
        ``(h', w')``, summing to one, its centre of mass within half a pixel of the pixel (h' // 2, w' // 2).

    Raises:
        ValueError: If the image is a photograph, not a kernel.
    """
    kernel = _without_pedestal(kernel, name, say)
    kernel = kernel / kernel.sum()
    _refuse_photograph(kernel, name)
    return _centred(kernel, name, say) if centre else kernel


def _without_pedestal(kernel: Tensor, name: str, say: Callable[[str], None]) -> Tensor:
    """Subtract a flat border, if it is neither zero nor as high as the kernel itself (a box)."""
    if min(kernel.shape) < 5:
        return kernel
    border = _border(kernel)
    top, level = float(kernel.max()), float(border.median())
    spread = float(border.quantile(0.9) - border.quantile(0.1))
    if not 0.002 * top < level < 0.5 * top or spread > 0.5 * level:
        return kernel
    share = level * kernel.numel() / float(kernel.sum())
    if share < 0.01:
        return kernel
    say(f"the kernel {name} has a constant offset of {level / top:.1%} of its peak, {share:.0%} of its sum: removed")
    # the remaining noise of the border would add up over a large kernel
    return torch.where(kernel - level > 2 * spread, kernel - level, 0.0)


def _refuse_photograph(kernel: Tensor, name: str) -> None:
    """Reject a photograph: its many different values are spread over the whole image, unlike any useful blur."""
    spread, top = 1 / float(kernel.square().sum()) / kernel.numel(), float(kernel.max())
    if kernel.numel() > 32 * 32 and spread > 0.25 and float(kernel.median()) < 0.95 * top:
        raise ValueError(f"{name} looks like a photograph, not like a blur kernel: its {kernel.shape[0]} x "
                         f"{kernel.shape[1]} values spread over {spread:.0%} of it; a kernel is the blurred image of "
                         "a single bright pixel")


def _centred(kernel: Tensor, name: str, say: Callable[[str], None]) -> Tensor:
    moved = []
    for axis in (0, 1):
        n = kernel.shape[axis]
        moved.append(float((kernel.sum(1 - axis) * torch.arange(n)).sum()) - n // 2)
        whole = round(moved[-1])
        if whole:  # padded to an odd length with the new centre in its middle
            centre = n // 2 + whole
            reach = max(centre, n - 1 - centre)
            kernel = _padded(kernel, axis, reach - centre, reach - (n - 1 - centre))
    down, right = (round(off, 1) + 0.0 for off in moved)  # 0 for -0
    way = f"{down:g} pixels down and {right:g} to the right"
    if any(round(off) for off in moved):
        while min(kernel.shape) > 2 and not bool(_border(kernel).any()):
            kernel = kernel[1:-1, 1:-1]
        say(f"the kernel {name} would shift the picture by {way}: centred to the nearest pixel")
    elif max(map(abs, moved)) > 0.25:
        say(f"the kernel {name} shifts the picture by {way}, less than a pixel: left unchanged")
    return kernel


def _border(kernel: Tensor) -> Tensor:
    return torch.cat([kernel[0], kernel[-1], kernel[1:-1, 0], kernel[1:-1, -1]])


def _padded(kernel: Tensor, axis: int, before: int, after: int) -> Tensor:
    return F.pad(kernel, (0, 0, before, after) if axis == 0 else (before, after, 0, 0))
