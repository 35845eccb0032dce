"""Flow of noise to data in the plane: positions of particles over time, by jumps of the map or Euler steps."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from invflow.models.mixture import GaussianMixtureFlow

if TYPE_CHECKING:
    from invflow.flowmap import FlowMap

__all__ = ["LAWS", "WAYS", "flow_picture", "moved"]

LAWS = ("eight islands", "two moons", "chequers")
WAYS = ("jumps of the flow map", "Euler steps of the velocity")
_INK, _TRAIL = "#3b4cc0", "#b8b8b8"


@functools.lru_cache
def law(name: str) -> FlowMap:
    """A law in the plane with a known flow map: a mixture of Gaussians.

    Raises:
        ValueError: For a name not in :data:`LAWS`.
    """
    if name == "eight islands":
        angle = torch.linspace(0, 2 * math.pi, 9)[:-1]
        return GaussianMixtureFlow(2.5 * torch.stack([angle.cos(), angle.sin()], 1), 0.2)
    if name == "two moons":
        angle = torch.linspace(0, math.pi, 16)
        upper = torch.stack([angle.cos() - 0.5, angle.sin() - 0.25], 1)
        return GaussianMixtureFlow(2 * torch.cat([upper, -upper]), 0.14)
    if name == "chequers":
        row, column = torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij")
        cells = torch.stack([row, column], -1)[(row + column) % 2 == 0].float() - 1.5
        return GaussianMixtureFlow(1.4 * cells, 0.3)
    raise ValueError(f"law {name!r} is unknown: choose one of {', '.join(LAWS)}")


@torch.no_grad()
def moved(name: str, time: float, steps: int, way: str, particles: int = 600, seed: int = 0) -> Tensor:
    """Positions of particles from time 0 to a given time, at the times of the steps.

    Args:
        name: Name of the law, one of :data:`LAWS`.
        time: Final time, from 0, noise, to 1, data.
        steps: Number of steps from 0 to 1; the last one before ``time`` is shortened.
        way: One of :data:`WAYS`. Jumps are exact for any number of steps; Euler steps are not.
        particles: Number of particles.
        seed: Random seed of the noise.

    Returns:
        ``(stops, particles, 2)``, the noise first.

    Raises:
        ValueError: For values out of range.
    """
    if not (0 <= time <= 1 and 1 <= steps <= 100 and way in WAYS):
        raise ValueError(f"time={time}, steps={steps}, way={way!r}: pass a time in [0, 1], 1 to 100 steps, "
                         f"and one of {WAYS}")
    prior = law(name)
    stops = [prior.noise(particles, generator=torch.Generator().manual_seed(seed))]
    for k in range(steps):
        start, end = k / steps, min((k + 1) / steps, time)
        if end <= start:
            break
        x = stops[-1]
        stops.append(prior.jump(x, start, end) if way == WAYS[0] else x + (end - start) * prior.velocity(x, start))
    return torch.stack(stops)


def flow_picture(name: str, time: float, steps: int, way: str) -> Any:
    """Image of the particles, and of the paths of sixty of them."""
    import io

    import matplotlib
    from PIL import Image

    from invflow.views.figure import STYLE, PosteriorFigure

    stops = moved(name, time, steps, way)
    with matplotlib.rc_context(STYLE):
        figure = PosteriorFigure(figsize=(3.6, 3.8), dpi=100, facecolor="white")
        axes = figure.add_axes((0.02, 0.02, 0.96, 0.88), xlim=(-4, 4), ylim=(-4, 4), xticks=[], yticks=[])
        axes.plot(stops[:, :60, 0].numpy(), stops[:, :60, 1].numpy(), color=_TRAIL, linewidth=0.6)
        axes.scatter(stops[-1, :, 0].numpy(), stops[-1, :, 1].numpy(), s=4, color=_INK, linewidths=0)
        axes.set_title(f"t = {time:.2f}, {steps} {'step' if steps == 1 else 'steps'}", fontsize=9)
        stream = io.BytesIO()
        figure.savefig(stream, format="png")
    return Image.open(stream).convert("RGB")
