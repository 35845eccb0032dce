"""Reads which pixels were observed from a painted mask."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["HIDES", "mask_of_painting"]

#: colours of paint that can mark hidden pixels
HIDES = ("white", "black")
# opacity of paint below which a pixel counts as unpainted: the fringe of a soft brush or of JPEG compression
_TOUCHED = 0.1


def mask_of_painting(grey: Tensor, alpha: Tensor | None, name: str, hides: str | None,
                     say: Callable[[str], None]) -> Tensor:
    """Compute the mask of a painted image: 1 where nothing was painted.

    Every pixel touched by a soft brush is hidden. On a transparent layer, paint of any colour hides.
    Otherwise dark pixels are hidden and light ones are not; if that hides more than half, ``hides`` must be given.

    Args:
        grey: Image ``(1, H, W)`` in [0, 1].
        alpha: Opacity ``(1, H, W)``, or None.
        name: Name of the file.
        hides: ``"white"``, ``"black"`` or None.
        say: Called with a sentence if the meaning was guessed.

    Raises:
        ValueError: If the image is a photograph, or if it hides more than half and ``hides`` is None.
    """
    if hides not in (None, *HIDES):
        raise ValueError(f"hides={hides!r}: pass 'white' or 'black', the colour of hidden pixels")
    if alpha is not None and bool((alpha < 1 - _TOUCHED).any()):
        if hides is None:
            say(f"{name} is a transparent layer: painted pixels are hidden")
            return (alpha <= _TOUCHED).float()
        grey = torch.where(alpha > _TOUCHED, grey, 0.0 if hides == "white" else 1.0)
    between = float(((grey > _TOUCHED) & (grey < 1 - _TOUCHED)).float().mean())
    if between > 0.25:
        raise ValueError(f"{name} looks like a photograph, not like a mask: {between:.0%} of it is neither black nor "
                         "white; paint the area to restore in black on a white image of the same size")
    mask = (grey < _TOUCHED if hides == "white" else grey > 1 - _TOUCHED).float()
    hidden = 1 - float(mask.mean())
    if hides is None and hidden > 0.5:
        raise ValueError(f"the mask {name} would hide {hidden:.1%} of the picture, since dark (0) hides and light (1) "
                         "does not: if white marks the area to restore, pass hides='white' (invflow restore: "
                         "--mask-hides white), else hides='black' (--mask-hides black)")
    return mask
