"""The figure of a posterior. It uses matplotlib's objects, not pyplot, and works without a screen and in notebooks.

This is the only module that imports matplotlib at the top; it is itself imported only when a figure is made.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import interpolate

from invflow._core.checks import to_tensor_hint
from invflow.views.draws import Draws

__all__ = ["STYLE", "UNOBSERVED", "PosteriorFigure", "as_picture", "posterior_figure", "rms_over_channels"]

_INK, _FAINT, _CURVE = "#222222", "#666666", "#3b4cc0"
UNOBSERVED = (0.42, 0.53, 0.68)  # a blue that is neither an image's black nor its white
STYLE: Any = {"font.family": "sans-serif", "font.size": 9, "text.color": _INK, "axes.edgecolor": _FAINT,
          "xtick.color": _FAINT, "ytick.color": _FAINT, "xtick.labelsize": 8, "ytick.labelsize": 8}


class PosteriorFigure(Figure):
    """A matplotlib figure that notebooks show by itself."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        FigureCanvasAgg(self)

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png")
        return buffer.getvalue()


def posterior_figure(posterior: Draws, truth: Tensor | None = None, observation: Tensor | None = None, *,
                     observed: Tensor | None = None, rows: int = 4, samples: int = 5, cell: float = 1.2,
                     title: str | None = None) -> PosteriorFigure:
    """Plot a row for each observation: truth, observation, samples, mean, standard deviation.

    A single photograph of over 64 pixels a side is shown with larger panels on several lines.

    Images are clipped to [0, 1] here and only here. A measurement is shown at its own resolution, or as a curve if it
    is not a picture. All standard deviations share one colour bar. Below the mean is its PSNR
    against the truth, computed without clipping. The samples of a weighted posterior are resampled by their
    weights, always with the same seed. Points in the plane are shown as a scatter plot.

    Args:
        posterior: Posterior of B observations.
        truth: Truths ``(B, *image_shape)`` or None.
        observation: Measurements ``(B, *measurement_shape)`` or None.
        observed: Mask ``(1 or B, *measurement_shape)`` in bool, from ``operator.observed()``: unobserved pixels are
            painted blue.
        rows: Number of observations shown, starting with the first.
        samples: Number of samples shown for each.
        cell: Side of one image, in inches; for images that are not square, the side of the square of the same area.
            For a photograph it is 2.6 times as long.
        title: Title of the figure.

    Returns:
        A matplotlib figure with 150 dots per inch; ``figure.savefig("figure.png")`` writes it.

    Raises:
        ValueError: If a shape does not fit.
    """
    _check(posterior, truth, observation)
    with matplotlib.rc_context(STYLE):
        shown = posterior.select(slice(min(rows, len(posterior))))
        if posterior.image_shape == (2,):
            return _scatter_figure(shown, truth, title, cell)
        if len(shown) == 1 and len(posterior.image_shape) == 3 and min(posterior.image_shape[1:]) > 64:
            return _photograph_figure(shown, truth, observation, observed, samples, title, 2.6 * cell)
        return _grid_figure(shown, truth, observation, observed, samples, title, cell)


def _check(posterior: Draws, truth: Tensor | None, observation: Tensor | None) -> None:
    batch, shape = len(posterior), posterior.image_shape
    for name, value in (("truth", truth), ("observation", observation)):
        if value is not None and (not isinstance(value, Tensor) or value.dtype == torch.uint8):
            raise TypeError(to_tensor_hint(value, name))
    if truth is not None and tuple(truth.shape) != (batch, *shape):
        single = batch == 1 and tuple(truth.shape) == shape
        raise ValueError(
            f"truth has shape {tuple(truth.shape)}, but the posterior's images are {(batch, *shape)}: pass "
            f"{'truth[None]' if single else 'the truths of just these observations'}"
        )
    if observation is not None and (observation.ndim < 2 or len(observation) != batch):
        raise ValueError(
            f"observation has shape {tuple(observation.shape)}, but the posterior has {batch} observations: "
            f"pass ({batch}, *measurement_shape)"
        )


# -- a grid of images -------------------------------------------------------------------------------------


@dataclass
class _Layout:
    """Where the cells are, in inches from the left and from the top."""

    names: list[str]  # of the columns
    rows: int
    width: float  # of a cell
    cell: float  # height of a cell
    caption: float  # under each row
    heading: float  # above the names of the columns
    bar: float  # to the right of the last column

    gap, group, margin, top = 0.05, 0.2, 0.1, 0.27

    def left(self, column: int) -> float:
        """Left edge of a column; columns with different names have a wider gap between them."""
        pairs = zip(self.names[:column], self.names[1 : column + 1], strict=True)
        return self.margin + sum(self.width + (self.gap if a == b else self.group) for a, b in pairs)

    @property
    def size(self) -> tuple[float, float]:
        """Width and height of the figure."""
        height = self.heading + self.top + self.rows * (self.cell + self.caption) + self.margin - 0.04
        return self.left(len(self.names) - 1) + self.width + self.bar, height

    def rectangle(self, row: int, column: int) -> tuple[float, float, float, float]:
        """Left, bottom, width and height in shares of the figure."""
        width, height = self.size
        bottom = self.heading + self.top + row * (self.cell + self.caption) + self.cell
        return self.left(column) / width, 1 - bottom / height, self.width / width, self.cell / height


def _grid_figure(posterior: Draws, truth: Tensor | None, observation: Tensor | None,
                 observed: Tensor | None, samples: int, title: str | None, cell: float) -> PosteriorFigure:
    columns, mean, std = _columns(posterior, truth, observation, samples)
    pictures = as_picture(std[0]) is not None and not bool(std.isnan().all())
    width, height = _cell(posterior.image_shape, cell)
    layout = _Layout([name for name, _ in columns], len(posterior), width, height, bar=0.62 if pictures else 0.1,
                     caption=0.06 if truth is None else 0.2, heading=0.0 if title is None else 0.3)
    # all cells are placed explicitly: constrained layout, which a style may enable, would only warn
    figure = PosteriorFigure(figsize=layout.size, dpi=150, facecolor="white", layout="none")
    deviations = torch.stack([rms_over_channels(image) for image in std]).nan_to_num(0.0)
    scale = Normalize(0.0, max(float(deviations.max()), 1e-3))
    for row in range(len(posterior)):
        for column, (name, images) in enumerate(columns):
            axes = figure.add_axes(layout.rectangle(row, column), xticks=[], yticks=[])
            masked = name == "observation" and observed is not None
            mask = observed[row % len(observed)].cpu() if masked and observed is not None else None
            _draw(axes, images[row].detach().cpu().double(), name, mask, scale, round(150 * max(width, height)))
            if name == "mean" and truth is not None and mean.ndim == 4:
                value = _psnr(mean[row], truth[row].to(mean))
                axes.set_xlabel(f"{value:.1f} dB", fontsize=8, color=_FAINT, labelpad=2)
    _write_headings(figure, layout, title)
    if pictures:
        _add_colour_bar(figure, layout, scale)
    return figure


def _columns(posterior: Draws, truth: Tensor | None, observation: Tensor | None,
             samples: int) -> tuple[list[tuple[str, Tensor]], Tensor, Tensor]:
    """Names and images ``(B, ...)`` of the columns, including mean and standard deviation."""
    samples = min(samples, posterior.num_samples)
    draws = posterior
    if posterior.weighted:
        draws = posterior.resample(samples, generator=torch.Generator().manual_seed(0))
    mean, std = posterior.mean().cpu(), posterior.std().cpu()
    columns = [] if truth is None else [("truth", truth)]
    columns += [] if observation is None else [("observation", observation)]
    columns += [("posterior samples", draws.samples[:, i]) for i in range(samples)]
    columns += [("mean", mean), ("standard deviation", std)]
    return columns, mean, std


def _photograph_figure(posterior: Draws, truth: Tensor | None, observation: Tensor | None,
                       observed: Tensor | None, samples: int, title: str | None, side: float) -> PosteriorFigure:
    """Plot one observation, its pictures side by side on as many lines as needed."""
    columns, mean, std = _columns(posterior, truth, observation, samples)
    width, height = _cell(posterior.image_shape, side)
    gap, caption, margin, bar = 0.12, 0.34, 0.1, 0.62
    across = min(len(columns), max(1, int(13 / (width + gap))))
    lines = -(-len(columns) // across)
    heading = 0.0 if title is None else 0.3
    size = (2 * margin + across * (width + gap) + bar, 2 * margin + heading + lines * (height + caption))
    figure = PosteriorFigure(figsize=size, dpi=150, facecolor="white", layout="none")
    spread = rms_over_channels(std[0]).nan_to_num(0.0)
    scale = Normalize(0.0, max(float(spread.flatten().sort().values[int(0.999 * (spread.numel() - 1))]), 1e-3))
    for i, (name, images) in enumerate(columns):
        line, column = divmod(i, across)
        left = margin + column * (width + gap)
        bottom = size[1] - margin - heading - line * (height + caption) - caption + 0.05 - height
        place = (left / size[0], bottom / size[1], width / size[0], height / size[1])
        axes = figure.add_axes(place, xticks=[], yticks=[])
        mask = observed[0].cpu() if name == "observation" and observed is not None else None
        _draw(axes, images[0].detach().cpu().double(), name, mask, scale, round(150 * max(width, height)))
        label = name.removesuffix("s") if name == "posterior samples" else name
        if name == "mean" and truth is not None:
            label += f", {_psnr(mean[0], truth[0].to(mean)):.1f} dB"
        axes.set_title(label, fontsize=9.5, color=_INK, pad=3)
        if name == "standard deviation" and not bool(std.isnan().all()):
            _bar(figure, scale, (place[0] + place[2] + 0.07 / size[0], place[1], 0.1 / size[0], place[3]))
    if title is not None:
        figure.text(margin / size[0], 1 - 0.1 / size[1], title, ha="left", va="top", fontsize=10.5)
    return figure


def _cell(image_shape: tuple[int, ...], side: float) -> tuple[float, float]:
    """Width and height of a cell in inches: the proportions of the image, but for extremely long ones."""
    if len(image_shape) not in (2, 3):
        return side, side
    ratio = min(max(image_shape[-1] / image_shape[-2], 0.125), 8.0) ** 0.5
    return side * ratio, side / ratio


def _fewer_pixels(image: Tensor, most: int) -> Tensor:
    """An image ``(..., H, W)`` scaled down to so many pixels along its longer side; matplotlib would skip pixels."""
    height, width = image.shape[-2:]
    if max(height, width) <= most:
        return image
    size = [max(1, round(side * most / max(height, width))) for side in (height, width)]
    return interpolate(image.reshape(1, -1, height, width), size, mode="bilinear",
                       antialias=True).reshape(*image.shape[:-2], *size)


def as_picture(image: Tensor) -> Tensor | None:
    """Picture ``(H, W)`` or ``(H, W, 3)``, the magnitude if there are other channels; None if it is not a picture."""
    if image.ndim == 3 and image.shape[0] == 3:
        return image.permute(1, 2, 0)
    if image.ndim == 3:
        return image[0] if image.shape[0] == 1 else image.square().sum(0).sqrt()
    return image if image.ndim == 2 else None


def rms_over_channels(std: Tensor) -> Tensor:
    """One standard deviation for each pixel, root mean square over the channels."""
    return std.square().mean(0).sqrt() if std.ndim == 3 else std


def _psnr(image: Tensor, truth: Tensor) -> float:
    """Peak signal-to-noise ratio in dB, with a range of 1."""
    return float(-10 * (image - truth).square().mean().log10())


def _draw(axes: Axes, image: Tensor, name: str, observed: Tensor | None, scale: Normalize, pixels: int) -> None:
    deviation = name == "standard deviation"
    for spine in axes.spines.values():
        spine.set(linewidth=0.4, color="#999999")
    if deviation and bool(image.isnan().any()):
        axes.text(0.5, 0.5, "one sample\nhas no spread", ha="center", va="center", transform=axes.transAxes,
                  fontsize=8, color=_FAINT)
        return
    if observed is not None and observed.ndim == image.ndim == 3:
        seen = observed.any(0, keepdim=True).double()
        image = _fewer_pixels(image.where(observed, 0.0), pixels)
        share = _fewer_pixels(seen, pixels)
    else:
        share, image = None, rms_over_channels(image) if deviation else image
        image = _fewer_pixels(image, pixels) if image.ndim > 1 else image
    picture = as_picture(image)
    if picture is None:
        axes.plot(image.flatten().numpy(), color=_CURVE, linewidth=0.8)
        return
    if deviation:
        axes.imshow(picture.numpy(), cmap="magma", norm=scale, interpolation="nearest")
        return
    low, high = float(picture.min()), float(picture.max())
    if name == "observation" and (low < -0.5 or high > 1.5):  # no intensities: counts, Fourier coefficients
        picture = (picture - low) / (high - low)
    if picture.ndim == 2:
        picture = picture.unsqueeze(-1).expand(-1, -1, 3)
    picture = picture.clamp(0, 1)
    if share is not None:  # where pixels were put together, some of them observed, the colours mix
        picture = picture + (1 - share[0]).unsqueeze(-1) * picture.new_tensor(UNOBSERVED)
    axes.imshow(picture.clamp(0, 1).numpy(), interpolation="nearest")  # noise above white, put together with it


def _write_headings(figure: Figure, layout: _Layout, title: str | None) -> None:
    width, height = layout.size
    y = 1 - (layout.heading + layout.top - 0.08) / height
    for name in dict.fromkeys(layout.names):
        first = layout.names.index(name)
        last = len(layout.names) - 1 - layout.names[::-1].index(name)
        centre = (layout.left(first) + layout.left(last) + layout.width) / 2
        figure.text(centre / width, y, name, ha="center", va="bottom", fontsize=9.5)
    if title is not None:
        figure.text(layout.margin / width, 1 - 0.1 / height, title, ha="left", va="top", fontsize=10.5)


def _add_colour_bar(figure: Figure, layout: _Layout, scale: Normalize) -> None:
    left, _, cell, height = layout.rectangle(0, len(layout.names) - 1)
    _, bottom, _, _ = layout.rectangle(layout.rows - 1, 0)
    _, top, _, _ = layout.rectangle(0, 0)
    width = layout.size[0]
    _bar(figure, scale, (left + cell + 0.07 / width, bottom, 0.1 / width, top + height - bottom))


def _bar(figure: Figure, scale: Normalize, place: tuple[float, float, float, float]) -> None:
    bar = figure.colorbar(ScalarMappable(scale, "magma"), cax=figure.add_axes(place))
    bar.outline.set_visible(False)  # type: ignore[operator]
    bar.locator = matplotlib.ticker.MaxNLocator(5)
    bar.ax.tick_params(length=2, width=0.5, pad=2)


# -- points in the plane ----------------------------------------------------------------------------------


def _scatter_figure(posterior: Draws, truth: Tensor | None, title: str | None,
                    cell: float) -> PosteriorFigure:
    draws = posterior
    if posterior.weighted:
        draws = posterior.resample(posterior.num_samples, generator=torch.Generator().manual_seed(0))
    count, side = len(posterior), 2 * cell
    size = (count * side + 0.2, side + (0.5 if title else 0.2))
    figure = PosteriorFigure(figsize=size, dpi=150, facecolor="white", layout="constrained")
    low, high = (float(v) for v in (posterior.samples.min(), posterior.samples.max()))
    margin = 0.05 * max(high - low, 1e-3)
    for row in range(count):
        axes = figure.add_subplot(1, count, row + 1, aspect="equal")
        axes.set(xlim=(low - margin, high + margin), ylim=(low - margin, high + margin))
        points = draws.samples[row, :2000].cpu()
        axes.scatter(points[:, 0], points[:, 1], s=4, alpha=0.4, linewidths=0, color=_CURVE, label="samples")
        if truth is not None:
            x, y = truth[row].tolist()
            axes.scatter([x], [y], s=60, marker="*", color="#d1352b", label="truth")
        if row == 0:
            axes.legend(fontsize=7, frameon=False, loc="upper left")
    if title is not None:
        figure.suptitle(title, fontsize=10.5, x=0.02, ha="left")
    return figure
