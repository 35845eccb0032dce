"""Tensors as images on a screen, all with the same zoom."""

from __future__ import annotations

import io
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from invflow.app.state import Restored
from invflow.views.figure import UNOBSERVED, rms_over_channels

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["animation", "deviation", "interval_width", "mean", "observation", "sample", "to_pil", "truth", "zoom_of"]

#: screen pixels along the longer side of an image
_SIDE = 252


def zoom_of(shape: tuple[int, ...]) -> int:
    """Screen pixels per image pixel, the same for all images of a view."""
    return max(1, _SIDE // max(shape[-2:]))


def to_pil(image: Tensor, zoom: int = 1) -> Image:
    """An image ``(C, H, W)``, clipped to [0, 1], each pixel a square of ``zoom`` pixels."""
    from PIL import Image

    levels = (image.detach().clamp(0, 1) * 255).round().to(torch.uint8).cpu()
    array = levels.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy()
    picture = Image.fromarray(array)
    return picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST)


def truth(restored: Restored) -> Image:
    """The true image."""
    return to_pil(restored.view.image, zoom_of(restored.view.image.shape))


def observation(restored: Restored) -> Image:
    """The measurement, scaled to the image's size; unobserved pixels are blue."""
    view, y = restored.view, restored.likelihood.y[0]
    observed = restored.likelihood.operator.observed()
    if observed is not None:
        blue = torch.tensor(UNOBSERVED)[:, None, None]
        y = torch.where(observed[0], y.expand(3, -1, -1), blue)
    zoom = zoom_of(view.image.shape)
    picture = to_pil(y)
    height, width = view.image.shape[1:]
    return picture.resize((width * zoom, height * zoom), 0)


def sample(restored: Restored, number: int) -> Image:
    """A posterior sample, counted from 1; larger numbers give the last."""
    index = min(max(1, int(number)), len(restored.draws)) - 1
    return to_pil(restored.draws[index], zoom_of(restored.view.image.shape))


def mean(restored: Restored) -> Image:
    """The posterior mean."""
    return to_pil(restored.posterior.mean()[0], zoom_of(restored.view.image.shape))


def deviation(restored: Restored) -> tuple[Image, str]:
    """The posterior standard deviation of each pixel, and the value of white."""
    return _scaled(restored.posterior.std()[0], restored, "Standard deviation")


def interval_width(restored: Restored, level: float) -> tuple[Image, str]:
    """Width of each pixel's central credible interval, and the value of white.

    Args:
        restored: The restored view.
        level: Probability inside, in (0, 1).
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        low, high = restored.posterior.interval(level)
    few = [str(w.message) for w in caught if "allow no interval" in str(w.message)]
    picture, words = _scaled((high - low)[0], restored, f"Width of the {level:.0%} interval")
    return picture, " ".join([words, *(f"Too few samples for that level: {text}." for text in few)])


def _scaled(values: Tensor, restored: Restored, name: str) -> tuple[Image, str]:
    grey = rms_over_channels(values)[None]
    zoom = zoom_of(restored.view.image.shape)
    if not bool(grey.isfinite().all()):
        return to_pil(torch.zeros_like(grey), zoom), f"{name}: not defined for one sample."
    ordered = grey.flatten().sort().values
    white = max(float(ordered[int(0.999 * (len(ordered) - 1))]), 1e-6)
    return to_pil(grey / white, zoom), f"{name}: black is 0, white is {white:.3g}."


def animation(restored: Restored) -> bytes:
    """A GIF of the samples one after the other, four a second."""
    frames = [sample(restored, k) for k in range(1, min(len(restored.draws), 64) + 1)]
    stream = io.BytesIO()
    options: dict[str, Any] = {"append_images": frames[1:], "save_all": True, "duration": 250, "loop": 0}
    frames[0].save(stream, format="GIF", **options)
    return stream.getvalue()
