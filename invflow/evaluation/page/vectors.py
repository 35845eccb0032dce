"""Samples that are no pictures, as drawings inside a page: points in the plane, curves, numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from invflow.evaluation.page.elements import Markup, element

__all__ = ["curves", "numbers", "plane"]

_SIDE, _HEIGHT, _MARGIN = 240.0, 130.0, 8.0
#: points of a curve that are drawn
_MOST = 160


def numbers(vector: Tensor) -> Markup:
    """A short vector as text."""
    return element("p", "(" + ", ".join(f"{float(v):.3g}" for v in vector.flatten()) + ")", class_="vector")


def plane(samples: Tensor, mean: Tensor, std: Tensor, truth: Tensor | None) -> Markup:
    """Points in the plane, with the mean as a cross whose arms are one standard deviation long.

    Args:
        samples: ``(n, 2)``.
        mean: ``(2,)``.
        std: ``(2,)``.
        truth: ``(2,)`` or None.
    """
    std = std.nan_to_num(0.0)
    points = torch.cat([samples, (mean - std)[None], (mean + std)[None], *([] if truth is None else [truth[None]])])
    points = points.detach().cpu().double()
    middle = (points.amin(0) + points.amax(0)) / 2
    half = max(float((points.amax(0) - points.amin(0)).max()) / 2, 1e-9)
    scale = (_SIDE / 2 - _MARGIN) / half

    def place(point: Tensor) -> tuple[float, float]:
        x, y = ((point.detach().cpu().double() - middle) * scale).tolist()
        return _SIDE / 2 + x, _SIDE / 2 - y

    parts = [element("circle", cx=f"{x:.1f}", cy=f"{y:.1f}", r=4, data_sample=k, class_="now" if k == 0 else None)
             for k, (x, y) in enumerate(map(place, samples))]
    x, y = place(mean)
    a, b = (std.double().cpu() * scale).tolist()
    parts += [element("path", d=f"M{x - a:.1f} {y:.1f}h{2 * a:.1f}M{x:.1f} {y - b:.1f}v{2 * b:.1f}", class_="mean")]
    if truth is not None:
        x, y = place(truth)
        parts.append(element("path", d=f"M{x:.1f} {y - 7:.1f}l5 7l-5 7l-5 -7z", class_="truth"))
    low, high = (middle - half).tolist(), (middle + half).tolist()
    label = (f"{len(samples)} samples in the plane, horizontally {low[0]:.3g} to {high[0]:.3g}, "
             f"vertically {low[1]:.3g} to {high[1]:.3g}")
    return element("svg", *parts, viewBox=f"0 0 {_SIDE:g} {_SIDE:g}", role="img", aria_label=label, class_="vectors")


def curves(samples: Tensor, mean: Tensor | None, std: Tensor | None, truth: Tensor | None) -> Markup:
    """Vectors as curves over their entries.

    Args:
        samples: ``(n, ...)``, flattened.
        mean: ``(...)`` or None.
        std: ``(...)`` or None; a band of one standard deviation on both sides of the mean.
        truth: ``(...)`` or None.
    """
    stride = -(-samples[0].numel() // _MOST)

    def thinned(vector: Tensor) -> Tensor:
        return vector.detach().cpu().double().flatten()[::stride]

    lines = [("sample", thinned(s)) for s in samples]
    band = None
    if mean is not None and std is not None:
        centre, spread = thinned(mean), thinned(std).nan_to_num(0.0)
        band = (centre - spread, centre + spread)
    lines += [(kind, thinned(v)) for kind, v in (("truth", truth), ("mean", mean)) if v is not None]
    every = torch.cat([v for _, v in lines] + list(band or ()))
    low, high = float(every.min()), float(every.max())
    scale = (_HEIGHT - 2 * _MARGIN) / max(high - low, 1e-9)
    step = (_SIDE - 2 * _MARGIN) / max(len(lines[0][1]) - 1, 1)

    def way(vector: Tensor, backwards: bool = False) -> str:
        points = [f"{_MARGIN + i * step:.1f} {_HEIGHT - _MARGIN - (v - low) * scale:.1f}"
                  for i, v in enumerate(vector.tolist())]
        return "L".join(points[::-1] if backwards else points)

    parts = []
    if band is not None:
        parts.append(element("path", d=f"M{way(band[0])}L{way(band[1], True)}z", class_="band"))
    alone = len(lines) == 1
    for k, (kind, vector) in enumerate(lines):
        sample = kind == "sample" and not alone
        parts.append(element("path", d=f"M{way(vector)}", class_=f"{kind} now" if sample and k == 0 else kind,
                             data_sample=k if sample else None))
    label = f"{len(samples[0].flatten())} numbers from {low:.3g} to {high:.3g}"
    label += f", every {stride}. drawn" if stride > 1 else ""
    return element("svg", *parts, viewBox=f"0 0 {_SIDE:g} {_HEIGHT:g}", role="img", aria_label=label, class_="vectors")
