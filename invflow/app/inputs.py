"""Input from the page: a painted canvas, and errors shown as one sentence."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from invflow.app import sources
from invflow.app.damage import HOLE, hole_of
from invflow.app.pictures import to_pil, zoom_of
from invflow.app.state import View

__all__ = ["PRIVATE", "QUIET", "Chosen", "canvas", "friendly"]

#: options of handlers that follow a control: no blinking, only the last value counts, not callable by other programs
QUIET: dict[str, Any] = {"show_progress": "hidden", "trigger_mode": "always_last", "api_visibility": "private"}
PRIVATE: dict[str, Any] = {"api_visibility": "private"}


def canvas(image: Tensor | None) -> Any:
    """An image as a canvas; None: an empty black square."""
    image = torch.zeros(1, 28, 28) if image is None else image
    return {"background": to_pil(image, zoom_of(image.shape)), "layers": [], "composite": None}


def painted(value: Any) -> Tensor | None:
    """Opacity of the paint on a canvas, ``(H, W)`` in [0, 1]; None if there is no layer."""
    layers = [] if not value else [layer for layer in value.get("layers") or [] if layer is not None]
    if not layers:
        return None
    opacity = torch.stack([torch.as_tensor(layer[..., 3].copy() if layer.ndim == 3 and layer.shape[2] == 4
                                           else layer.any(-1) * 255) for layer in layers])
    return opacity.float().amax(0) / 255


@dataclass
class Chosen:
    """Current values of the page's controls."""

    source: str
    own: Tensor | None
    editor: Any
    prior: str
    damage: str
    parameter: float
    sigma: float
    seed: float
    samples: float

    def view(self, solver: str) -> View:
        """The view that they describe.

        Raises:
            ValueError: For values that cannot be combined.
        """
        paint = painted(self.editor)
        if self.source == sources.DRAWN:
            if self.damage == HOLE:
                raise ValueError("here the paint is the digit itself, not a hole: choose another damage")
            image = sources.drawn_digit(torch.zeros(28, 28) if paint is None else paint)
        elif self.source == sources.OWN:
            if self.own is None:
                raise ValueError("upload a file first")
            image = self.own
        else:
            image = sources.sample_picture(self.source)
        if self.prior == "mnist" and tuple(image.shape) != (1, 28, 28):
            raise ValueError("the prior mnist needs digits of 28 x 28 pixels: choose photos, or upload the file again "
                             "with mnist chosen")
        if self.prior == "photos" and len(image) == 1:
            image = image.expand(3, -1, -1).contiguous()
        hole = None if paint is None or self.damage != HOLE else hole_of(paint, (image.shape[1], image.shape[2]))
        return View(image, self.prior, self.damage, float(self.parameter or 0), hole, float(self.sigma),
                    int(self.seed or 0), int(self.samples), solver)


def friendly(handler: Callable[..., Any]) -> Callable[..., Any]:
    """A handler whose errors appear on the page as one sentence; the program continues."""
    import gradio as gr

    def sentence(error: Exception) -> gr.Error:
        text = " ".join(str(error).split()) or type(error).__name__
        known = isinstance(error, (ValueError, TypeError, OSError, ArithmeticError))
        return gr.Error(text if known else f"{type(error).__name__}: {text}", print_exception=not known)

    if inspect.isgeneratorfunction(handler):

        @functools.wraps(handler)
        def each(*values: Any) -> Iterator[Any]:
            try:
                yield from handler(*values)
            except Exception as error:
                raise sentence(error) from error

        return each

    @functools.wraps(handler)
    def once(*values: Any) -> Any:
        try:
            return handler(*values)
        except Exception as error:
            raise sentence(error) from error

    return once
