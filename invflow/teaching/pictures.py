"""Figures of the lessons: one style, and the elements that many lessons draw."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["BLUE", "COLORS", "GREEN", "GREY", "ORANGE", "RED", "animate", "show_image", "show_plane", "show_points",
           "use_style"]

BLUE, RED, GREY, ORANGE, GREEN = "#3b4cc0", "#c0392b", "#b8b8b8", "#d97706", "#2a9d6f"
COLORS = (BLUE, ORANGE, GREEN)  #: one colour for each of three groups
_HIDDEN = (0.42, 0.53, 0.68)  # blue for unobserved pixels


def use_style(font_size: float = 9.0) -> None:
    """Set the figure style of the lessons: 110 dots per inch, no box around the axes, a layout without overlaps.

    Args:
        font_size: Font size in points.
    """
    import matplotlib.pyplot as plt

    plt.rcParams.update({"figure.dpi": 110, "savefig.dpi": 110, "font.size": font_size, "axes.spines.top": False,
                         "axes.spines.right": False, "figure.constrained_layout.use": True})


def show_image(axes: Any, image: Tensor, title: str = "", below: str = "", *, hidden: Tensor | None = None,
               cmap: str = "gray", vmax: float = 1.0) -> Any:
    """Draw one image of one channel, without ticks.

    Args:
        axes: Axes of matplotlib.
        image: Two-dimensional image, up to axes of length 1; from 0, black, to ``vmax``, white.
        title: Title above the image.
        below: Text under the image.
        hidden: Mask of the same shape, True for unobserved pixels, which are painted blue.
        cmap: Matplotlib's name of the colour map.
        vmax: Value of the last colour.

    Returns:
        Matplotlib's image, for use with ``figure.colorbar``.
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
    """Draw points in the plane.

    Args:
        axes: Axes of matplotlib.
        x: ``(n, 2)``.
        color: One colour, or one for each point.
        size: Area of a point, in square points.
        **options: Options of matplotlib's ``scatter``.

    Raises:
        ValueError: If the points are not two-dimensional.
    """
    if x.ndim != 2 or x.shape[1] != 2:
        raise ValueError(f"points have shape {tuple(x.shape)}, expected (n, 2): choose two coordinates, "
                         "x[:, [0, 1]]")
    return axes.scatter(*x.detach().cpu().T, s=size, c=color, linewidths=0, **options)


def show_plane(axes: Any, title: str = "", reach: float = 4.0, tick: float = 3.0, space: str = "") -> None:
    """Set the axes to a square around 0.

    Args:
        axes: Axes of matplotlib.
        title: Title above the axes.
        reach: Largest absolute value of each coordinate.
        tick: Position of the tick marks on both sides of 0.
        space: Letter of the points, such as ``"z"``, for the label of the first coordinate; empty for none.
    """
    axes.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal", title=title, xticks=[-tick, 0, tick],
             yticks=[-tick, 0, tick], xlabel=f"${space}_0$" if space else "")


def animate(figure: Any, update: Callable[[int], Any], frames: int, *, milliseconds: int = 150,
            last: int | None = None, dpi: int = 80, colors: int = 32) -> Any:
    """Make a GIF from an animated figure.

    Args:
        figure: Figure of matplotlib, with ``layout="none"`` so that only the intended parts move; it is closed.
        update: Function that changes the figure; called with the number of each frame, from 0.
        frames: Number of frames.
        milliseconds: Duration of each frame.
        last: Duration of the last frame in milliseconds; default ``milliseconds``.
        dpi: Dots per inch; lower than in a still figure, since every frame is stored.
        colors: Number of colours in the palette, taken from the first and the last frame, 2 to 256.

    Returns:
        An image for display in a notebook.
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
    both = Picture.new("RGB", (size[0], 2 * size[1]))  # one palette for all frames: otherwise each frame stores its own
    both.paste(pictures[0], (0, 0))
    both.paste(pictures[-1], (0, size[1]))
    palette = both.quantize(colors)
    pictures = [picture.quantize(palette=palette, dither=Picture.Dither.NONE) for picture in pictures]
    times = [milliseconds] * (frames - 1) + [milliseconds if last is None else last]
    stream = io.BytesIO()
    pictures[0].save(stream, "GIF", save_all=True, append_images=pictures[1:], duration=times, loop=0)
    image: Any = Image  # which has no types
    return image(data=stream.getvalue(), format="gif")
