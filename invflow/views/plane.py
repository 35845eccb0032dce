"""The figure of samples in the plane next to exact draws. Imported only when a figure is made."""

from __future__ import annotations

from typing import Any

import matplotlib
import torch
from torch import Tensor

from invflow.views.draws import Draws
from invflow.views.figure import PosteriorFigure

__all__ = ["plane_figure"]

_SAMPLES, _EXACT, _PRIOR = "#3b4cc0", "#c05a2b", "#b8b8b8"
_POINTS = 2000


def plane_figure(posterior: Draws, *, exact: Tensor | None = None, prior: Tensor | None = None, repeats: int = 3,
                 side: float = 2.4, title: str | None = None) -> PosteriorFigure:
    """Plot samples of a tilted law in the plane over draws of the prior, one panel per repeat, next to exact draws.

    Weighted samples are resampled by their weights, always with the same seed.

    Args:
        posterior: Posterior of B repeats, with images of shape ``(2,)``.
        exact: Draws of the tilted law itself, ``(n, 2)``, or None if unavailable.
        prior: Draws of the prior, ``(n, 2)``, shown in grey.
        repeats: Largest number of panels of samples.
        side: Side of a panel, in inches.
        title: Title of the figure.

    Returns:
        A matplotlib figure with 150 dots per inch.

    Raises:
        ValueError: If the samples are not in the plane.
    """
    if posterior.image_shape != (2,):
        raise ValueError(f"plane_figure draws points of shape (2,), not {posterior.image_shape}: see posterior.plot")
    shown = posterior.select(slice(min(repeats, len(posterior))))
    count = min(shown.num_samples, _POINTS)
    draws = shown.resample(count, generator=torch.Generator().manual_seed(0)).samples.cpu()
    name = "samples" if len(shown) == 1 else "repeat {}"
    panels = [(name.format(b + 1), draws[b], _SAMPLES) for b in range(len(shown))]
    if exact is not None:
        panels.append(("exact draws", exact[:count].cpu(), _EXACT))
    everything = torch.cat([points for _, points, _ in panels] + ([] if prior is None else [prior.cpu()]))
    low, high = float(everything.min()), float(everything.max())
    limits = (low - 0.05 * (high - low), high + 0.05 * (high - low))
    style: Any = {"font.family": "sans-serif", "font.size": 9}
    with matplotlib.rc_context(style):
        size = (len(panels) * side + 0.2, side + (0.6 if title else 0.3))
        figure = PosteriorFigure(figsize=size, dpi=150, facecolor="white", layout="constrained")
        for i, (label, points, color) in enumerate(panels):
            axes = figure.add_subplot(1, len(panels), i + 1, aspect="equal", xlim=limits, ylim=limits)
            axes.set_title(label, fontsize=9)
            axes.tick_params(labelsize=7, labelleft=i == 0)
            if prior is not None:
                x, y = prior[:_POINTS].cpu().unbind(1)
                axes.scatter(x, y, s=2, color=_PRIOR, linewidths=0, alpha=0.5, label="prior")
            x, y = points.unbind(1)
            axes.scatter(x, y, s=4, color=color, linewidths=0, alpha=0.6)
            if prior is not None and i == 0:
                axes.legend(fontsize=7, frameon=False, loc="upper left", markerscale=3)
        if title is not None:
            figure.suptitle(title, fontsize=10.5, x=0.02, ha="left")
    return figure
