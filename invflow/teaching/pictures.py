"""Figures of the lessons: one style, and the few things that lesson after lesson draws."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["BLUE", "COLORS", "GREEN", "GREY", "ORANGE", "RED", "animate", "show_image", "show_plane", "show_points",
           "use_style"]

BLUE, RED, GREY, ORANGE, GREEN = "#3b4cc0", "#c0392b", "#b8b8b8", "#d97706", "#2a9d6f"
COLORS = (BLUE, ORANGE, GREEN)  #: one for each of three groups
_HIDDEN = (0.42, 0.53, 0.68)  # blue of a pixel that nobody measured


def use_style(font_size: float = 9.0) -> None:
    """Draw figures as the lessons do: 110 dots an inch, no box around the axes, a layout without overlaps.

    Args:
        font_size: in points.
    """
    import matplotlib.pyplot as plt

    plt.rcParams.update({"figure.dpi": 110, "savefig.dpi": 110, "font.size": font_size, "axes.spines.top": False,
                         "axes.spines.right": False, "figure.constrained_layout.use": True})


def show_image(axes: Any, image: Tensor, title: str = "", below: str = "", *, hidden: Tensor | None = None,
               cmap: str = "gray", vmax: float = 1.0) -> Any:
    """Draw one image of one channel, without ticks.

    Args:
        axes: of matplotlib.
        image: of two dimensions, others having length 1; from 0, black, to ``vmax``, white.
        title: above the image.
        below: under the image.
        hidden: of the same shape, True where nothing was measured: those pixels are painted blue.
        cmap: matplotlib's name of the colours.
        vmax: the value of the last colour.

    Returns:
        matplotlib's picture, from which ``figure.colorbar`` makes a scale.
    """
    drawn = axes.imshow(image.detach().squeeze().cpu(), cmap=cmap, vmin=0, vmax=vmax, interpolation="nearest")
    if hidden is not None:
        mask = hidden.squeeze().cpu()
        paint = torch.tensor([*_HIDDEN, 0.0]).repeat(*mask.shape, 1)
        paint[..., 3] = mask.float()
        axes.imshow(paint, interpolation="nearest")
    axes.set(xticks=[], yticks=[], title=title, xlabel=below)
    return drawn


def show_points(axes: Any, x: Tensor, color: Any = BLUE, size: float = 5.0, **options: Any) -> Any:
    """Draw points of the plane.

    Args:
        axes: of matplotlib.
        x: ``(n, 2)``.
        color: one colour, or one for each point.
        size: area of a point, in square points.
        **options: of matplotlib's ``scatter``.

    Raises:
        ValueError: for points that are not in a plane.
    """
    if x.ndim != 2 or x.shape[1] != 2:
        raise ValueError(f"points of a plane have shape (n, 2), not {tuple(x.shape)}: choose two coordinates, "
                         "x[:, [0, 1]]")
    return axes.scatter(*x.detach().cpu().T, s=size, c=color, linewidths=0, **options)


def show_plane(axes: Any, title: str = "", reach: float = 4.0, tick: float = 3.0, space: str = "") -> None:
    """Make the axes a square of the plane around 0.

    Args:
        axes: of matplotlib.
        title: above it.
        reach: of each coordinate, to both sides.
        tick: where the marks stand beside 0.
        space: letter of the points, such as ``"z"``, for the label of the first coordinate; empty for none.
    """
    axes.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal", title=title, xticks=[-tick, 0, tick],
             yticks=[-tick, 0, tick], xlabel=f"${space}_0$" if space else "")


def animate(figure: Any, update: Callable[[int], Any], frames: int, *, milliseconds: int = 150,
            last: int | None = None, dpi: int = 80, colors: int = 32) -> Any:
    """Make a GIF of a figure that changes.

    Args:
        figure: of matplotlib, with ``layout="none"`` so that nothing moves but what shall; it is closed.
        update: called with the number of each frame, from 0; changes the figure.
        frames: how many.
        milliseconds: that each is shown.
        last: milliseconds for the last one; default ``milliseconds``.
        dpi: dots an inch: fewer than in a picture, since every frame is stored.
        colors: of the palette, which the first and the last frame decide, 2 to 256.

    Returns:
        An image that a notebook shows.
    """
    import matplotlib.pyplot as plt
    from IPython.display import Image
    from PIL import Image as Picture

    figure.set_dpi(dpi)
    pictures = []
    for k in range(frames):
        update(k)
        figure.canvas.draw()
        size, pixels = figure.canvas.get_width_height(), bytes(figure.canvas.buffer_rgba())
        pictures.append(Picture.frombuffer("RGBA", size, pixels).convert("RGB"))
    plt.close(figure)
    both = Picture.new("RGB", (size[0], 2 * size[1]))  # one palette for all: without it each frame stores its own
    both.paste(pictures[0], (0, 0))
    both.paste(pictures[-1], (0, size[1]))
    palette = both.quantize(colors)
    pictures = [picture.quantize(palette=palette, dither=Picture.Dither.NONE) for picture in pictures]
    times = [milliseconds] * (frames - 1) + [milliseconds if last is None else last]
    stream = io.BytesIO()
    pictures[0].save(stream, "GIF", save_all=True, append_images=pictures[1:], duration=times, loop=0)
    image: Any = Image  # which has no types
    return image(data=stream.getvalue(), format="gif")
