"""Embeds pictures and figures in a page: images as PNG data URIs, matplotlib figures as SVG elements."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable

import matplotlib
import torch
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

__all__ = ["curves", "data_uri", "drawing", "image_uri", "plane", "svg"]

#: colours in figures, which the colours of the page replace; the page may be dark
INK, FAINT, FRONT, TRUTH = "#222222", "#999999", "#3b4cc0", "#b3470a"
_THEME = {INK: "ink", FAINT: "faint", FRONT: "accent", TRUTH: "worse", "#000000": "ink"}
#: largest number of points drawn on a curve
_MOST = 160


def data_uri(content: bytes) -> str:
    """A PNG as a data URI."""
    return f"data:image/png;base64,{base64.b64encode(content).decode('ascii')}"


def image_uri(picture: Tensor, palette: list[tuple[int, int, int]] | None = None) -> str:
    """A picture as a PNG data URI at its own resolution.

    Args:
        picture: Picture ``(H, W)`` or ``(H, W, 3)`` in [0, 1], clipped to it; with a palette, integers ``(H, W)``.
        palette: Colours of the integers, at most 256.
    """
    from PIL import Image

    options = {}
    if palette is not None:
        image = Image.fromarray(picture.to(torch.uint8).contiguous().numpy(), mode="P")
        image.putpalette([level for colour in palette for level in colour])
        options["bits"] = next(bits for bits in (1, 2, 4, 8) if len(palette) <= 2**bits)
    else:
        levels = (picture.double().nan_to_num(0.0).clamp(0, 1) * 255).round().to(torch.uint8).contiguous()
        image = Image.fromarray(levels.numpy())
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True, **options)
    return data_uri(buffer.getvalue())


def svg(figure: Figure, words: str, name: str) -> Markup:
    """A figure as an SVG element in the colours and fonts of the page.

    Args:
        figure: Figure in the colours :data:`INK`, :data:`FAINT`, :data:`FRONT` and :data:`TRUTH`, which the colours of
            the page replace.
        words: Text alternative for screen readers.
        name: Name of the figure, unique on the page.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True)
    _, _, text = buffer.getvalue().partition("<svg ")
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->|<style.*?</style>", "", text, flags=re.DOTALL)
    head, _, body = text.partition(">")
    box = re.search(r'viewBox="[^"]*"', head)
    for colour, variable in _THEME.items():
        body = body.replace(colour, f"var(--{variable})")
    body = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", re.sub(r"font-family: [^;\"]*;", "", body))
    return Markup('<svg {} role="img" aria-label="{}">').format(Markup(box[0] if box else ""), words) + Markup(body)


def drawing(draw: Callable[[Axes], str], name: str, size: tuple[float, float]) -> Markup:
    """A figure without axes: ``draw`` draws it and returns its text alternative."""
    figure = Figure(figsize=size)
    axes = figure.add_axes((0.02, 0.02, 0.96, 0.96))
    axes.set_axis_off()
    return svg(figure, draw(axes), name)


def plane(samples: Tensor, mean: Tensor, std: Tensor, truth: Tensor | None, name: str) -> Markup:
    """Points in the plane, with the mean as a cross whose arms are one standard deviation long.

    Args:
        samples: ``(n, 2)``.
        mean, std: ``(2,)``.
        truth: ``(2,)`` or None.
        name: Name of the figure.
    """
    def draw(axes: Axes) -> str:
        x, centre, arms = _numbers(samples), _numbers(mean), _numbers(std)
        axes.scatter(x[:, 0].tolist(), x[:, 1].tolist(), s=30, color=FRONT, alpha=0.7, linewidths=0)
        axes.errorbar(*centre.tolist(), *arms.flip(0).tolist(), color=INK)
        if truth is not None:
            axes.plot(*_numbers(truth).tolist(), "D", markersize=8, markerfacecolor="none", color=TRUTH)
        axes.set_aspect("equal", "datalim")
        (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
        return (f"{len(x)} samples in the plane, horizontally {left:.3g} to {right:.3g}, vertically {low:.3g} to "
                f"{high:.3g}")

    return drawing(draw, name, (3.4, 3.4))


def curves(samples: Tensor, mean: Tensor | None, std: Tensor | None, truth: Tensor | None, name: str) -> Markup:
    """Vectors as curves over their entries.

    Args:
        samples: ``(n, ...)``, flattened.
        mean: ``(...)`` or None.
        std: ``(...)`` or None; drawn as a band of one standard deviation on both sides of the mean.
        truth: ``(...)`` or None.
        name: Name of the figure.
    """
    def draw(axes: Axes) -> str:
        size = samples[0].numel()
        stride = -(-size // _MOST)
        lines = [_numbers(s).flatten()[::stride] for s in samples]
        for line in lines:
            axes.plot(line.tolist(), color=INK if len(lines) == 1 else FAINT, linewidth=0.8)
        if mean is not None and std is not None:
            centre, band = (_numbers(v).flatten()[::stride] for v in (mean, std))
            axes.fill_between(range(len(centre)), (centre - band).tolist(), (centre + band).tolist(), color=FRONT,
                              alpha=0.2, linewidth=0)
            axes.plot(centre.tolist(), color=FRONT)
        if truth is not None:
            axes.plot(_numbers(truth).flatten()[::stride].tolist(), color=TRUTH)
        low, high = axes.get_ylim()
        return f"{size} numbers from {low:.3g} to {high:.3g}" + (f", one in {stride} drawn" if stride > 1 else "")

    return drawing(draw, name, (3.4, 2.0))


def _numbers(values: Tensor) -> Tensor:
    return values.detach().cpu().double().nan_to_num(0.0)
