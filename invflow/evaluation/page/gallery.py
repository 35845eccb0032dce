"""The gallery of a report: truth and observation, and each solver's samples, mean, deviations and coverage map."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import matplotlib
import torch
from torch import Tensor

from invflow.evaluation.page.pictures import curves, image_uri, plane
from invflow.views.figure import UNOBSERVED, as_picture, rms_over_channels

if TYPE_CHECKING:
    from invflow.evaluation.results.results import Results

__all__ = ["Extent", "choose_extent", "gallery", "palette"]

#: limit on the number of values in all pictures of a page
_BUDGET = 8_000_000
#: colours of the coverage map: truth inside the interval in all channels, in some channels, in none
_COVERED = ((216, 220, 230), (246, 178, 107), (205, 70, 20))


@dataclass(frozen=True)
class Extent:
    """Size of the gallery.

    Attributes:
        observations: Largest number of observations per problem.
        samples: Largest number of samples per observation.
    """

    observations: int
    samples: int


def palette(levels: int = 32) -> list[tuple[int, int, int]]:
    """Colours of standard deviations, from zero to the largest."""
    colours = matplotlib.colormaps["magma"](torch.linspace(0, 1, levels).numpy())
    return [(round(255 * r), round(255 * g), round(255 * b)) for r, g, b, _ in colours.tolist()]


def choose_extent(examples: list[dict[str, Tensor]]) -> Extent:
    """Choose a size that keeps the page small: at most 4 observations and 16 samples each, fewer for large images."""
    for extent in (Extent(4, 16), Extent(4, 8), Extent(3, 8), Extent(2, 8), Extent(2, 4)):
        total = 0
        for found in examples:
            shape = found["samples"].shape
            total += min(shape[0], extent.observations) * (min(shape[1], extent.samples) + 2) * math.prod(shape[2:])
        if total <= _BUDGET:
            return extent
    return Extent(1, 4)


def gallery(comparison: Results, problem: str, examples: dict[str, dict[str, Tensor]],
            extent: Extent) -> dict[str, Any]:
    """The gallery of one problem, for the template of the page.

    Args:
        comparison: Comparison of solvers.
        problem: Name of the problem.
        examples: :meth:`Results.examples` by solver, for the solvers that have any.
        extent: Size of the gallery.

    Returns:
        Cards with pictures for each observation: truth and observation first, then each solver's results.
    """
    some = next(iter(examples.values()))
    observations = min(extent.observations, *(len(found["samples"]) for found in examples.values()))
    highest = _highest_deviation(examples, observations)
    shown = []
    for b in range(observations):
        given = {key: value[b] for key, value in some.items()}
        cards = [{"title": "given", "figures": _given(given, f"{problem}-{b}")}]
        for solver, found in examples.items():
            own = {key: value[b] for key, value in found.items()}
            values = comparison.values[problem].get(solver, {})
            psnr = values["psnr"][b] if "psnr" in values and math.isfinite(values["psnr"][b]) else None
            cards.append({"title": solver, "figures": _solved(own, solver, psnr, extent.samples, highest,
                                                              f"{problem}-{b}-{solver}")})
        shown.append(cards)
    most = max(found["samples"].shape[1] for found in examples.values())
    return {"observations": shown, "samples": min(extent.samples, most),
            "pictures": as_picture(some["mean"][0]) is not None, "highest": f"{highest:.2g}", "scale": palette(9),
            "covered": _COVERED}


def _highest_deviation(examples: dict[str, dict[str, Tensor]], observations: int) -> float:
    """Upper end of the colour scale: the largest deviation, unless one solver's would make all others look dark."""
    peaks = torch.tensor([float(found["std"][:observations].nan_to_num(0.0).max()) for found in examples.values()])
    return max(1e-6, min(float(peaks.max()), 3 * float(peaks.median())))


# -- figures: a caption with an image, a stack of images, a drawing or text --------------------------------------------


def _given(found: dict[str, Tensor], name: str) -> list[dict[str, Any]]:
    figures = []
    if "truth" in found:
        figures.append({"caption": "truth", **_show(found["truth"], f"{name}-truth")})
    if "observation" in found:
        figures.append({"caption": "observation", **_show(found["observation"], f"{name}-observation", True,
                                                          found.get("observed"))})
    return figures


def _solved(found: dict[str, Tensor], solver: str, psnr: float | None, most: int, highest: float,
            name: str) -> list[dict[str, Any]]:
    samples, mean, covered = found["samples"][:most], found["mean"], found.get("covered")
    share = None if covered is None else float(covered.double().mean())
    if as_picture(mean) is None:
        draw = plane if mean.numel() == 2 and mean.ndim == 1 else curves
        facts = [] if share is None else [f"90% intervals contain {share:.0%} of the truth's coordinates"]
        caption = "; ".join(["samples, mean and standard deviation, truth", *facts])
        return [{"caption": caption, "drawing": draw(samples, mean, found["std"], found.get("truth"), name)}]
    stack = [{"uri": _prepared(sample), "words": f"sample {k + 1} of {solver}"} for k, sample in enumerate(samples)]
    figures = [{"caption": "samples", "stack": stack},
               {"caption": "mean" if psnr is None else f"mean, {psnr:.1f} dB", **_show(mean, name)},
               {"caption": "standard deviation", "uri": _deviation(found["std"], highest),
                "words": "standard deviation of each pixel"}]
    if covered is not None:
        figures.append({"caption": f"coverage {share:.0%}", "uri": _coverage_map(covered),
                        "words": "where the 90% interval contains the truth"})
    return figures


def _show(image: Tensor, name: str, measurement: bool = False, observed: Tensor | None = None) -> dict[str, Any]:
    if image.is_complex():
        image = torch.view_as_real(image).movedim(-1, 0).flatten(0, 1)  # as channels, whose magnitude is shown
    if as_picture(image) is not None:
        return {"uri": _prepared(image, measurement, observed), "words": "observation" if measurement else "image"}
    if image.numel() <= 12:
        return {"text": "(" + ", ".join(f"{float(v):.3g}" for v in image.flatten()) + ")"}
    return {"drawing": curves(image.flatten()[None], None, None, None, name)}


def _prepared(image: Tensor, measurement: bool = False, observed: Tensor | None = None) -> str:
    """A picture as a data URI; measurements that are not intensities are scaled to [0, 1]."""
    picture = as_picture(image.detach().cpu().double())
    assert picture is not None
    low, high = float(picture.min()), float(picture.max())
    if measurement and (low < -0.5 or high > 1.5):
        picture = (picture - low) / (high - low)
    if observed is not None and observed.ndim == 3 and not bool(observed.all()):
        colours = picture if picture.ndim == 3 else picture.unsqueeze(-1).expand(-1, -1, 3)
        picture = torch.where(observed.cpu().any(0).unsqueeze(-1), colours, colours.new_tensor(UNOBSERVED))
    return image_uri(picture)


def _deviation(std: Tensor, highest: float) -> str:
    colours = palette()
    picture = as_picture(rms_over_channels(std.detach().cpu().double()))
    assert picture is not None
    levels = (picture.nan_to_num(0.0) / highest).clamp(0, 1) * (len(colours) - 1)
    return image_uri(levels.round(), colours)


def _coverage_map(covered: Tensor) -> str:
    share = covered.cpu().double().mean(0) if covered.ndim == 3 else covered.cpu().double()
    levels = torch.where(share == 1, 0, torch.where(share == 0, 2, 1))
    return image_uri(levels, list(_COVERED))
