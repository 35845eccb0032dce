"""The gallery of a report: truth, observation, samples, mean, standard deviation and coverage map, solver by solver."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import matplotlib
import torch
from torch import Tensor

from invflow.evaluation.page.elements import Markup, element, image_uri
from invflow.evaluation.page.vectors import curves, numbers, plane
from invflow.views.figure import UNOBSERVED, as_picture, rms_over_channels

if TYPE_CHECKING:
    from invflow.evaluation.results.results import Results

__all__ = ["Extent", "choose_extent", "gallery", "palette"]

#: values of all pictures of a page together
_BUDGET = 8_000_000
#: in the coverage map: the truth lies inside the interval, in some channels only, outside
_COVERED = ((216, 220, 230), (246, 178, 107), (205, 70, 20))


@dataclass(frozen=True)
class Extent:
    """How much of the gallery is shown.

    Attributes:
        observations: of each problem, at most.
        samples: of each observation, at most.
    """

    observations: int
    samples: int


def palette(levels: int = 32) -> list[tuple[int, int, int]]:
    """Colours of standard deviations, from none to the most."""
    colours = matplotlib.colormaps["magma"](torch.linspace(0, 1, levels).numpy())
    return [(round(255 * r), round(255 * g), round(255 * b)) for r, g, b, _ in colours.tolist()]


def choose_extent(examples: list[dict[str, Tensor]]) -> Extent:
    """As much as keeps the page small: at most 4 observations and 16 samples each, fewer of large images."""
    for extent in (Extent(4, 16), Extent(4, 8), Extent(3, 8), Extent(2, 8), Extent(2, 4)):
        total = 0
        for found in examples:
            shape = found["samples"].shape
            total += min(shape[0], extent.observations) * (min(shape[1], extent.samples) + 2) * math.prod(shape[2:])
        if total <= _BUDGET:
            return extent
    return Extent(1, 4)


def gallery(comparison: Results, problem: str, examples: dict[str, dict[str, Tensor]], extent: Extent) -> Markup:
    """The gallery of one problem.

    Args:
        comparison: of solvers.
        problem: its name.
        examples: :meth:`Results.examples` by solver, those that have any.
        extent: how much to show.

    Returns:
        A card for each solver and observation; scripts show one observation at a time and one sample of it.
    """
    some = next(iter(examples.values()))
    observations = min(extent.observations, *(len(found["samples"]) for found in examples.values()))
    samples = min(extent.samples, max(found["samples"].shape[1] for found in examples.values()))
    pictures = as_picture(some["mean"][0]) is not None
    highest = _highest_deviation(examples, observations)
    rows = []
    for b in range(observations):
        cards = [_measured(some, b, pictures)]
        for solver, found in examples.items():
            own = {key: value[b] for key, value in found.items()}
            cards.append(_solved(comparison, problem, solver, own, b, extent.samples, highest))
        rows.append(element("div", element("h4", f"Observation {b + 1}"), element("div", *cards, class_="cards"),
                            class_="observation", data_observation=b))
    controls = element("div", *_controls(problem, observations, samples), class_="controls")
    return element("div", controls, _legend(highest) if pictures else "", *rows, class_="gallery")


def _controls(problem: str, observations: int, samples: int) -> list[Markup]:
    options = [element("option", f"{b + 1} of {observations}", value=b) for b in range(observations)]
    slider = element("input", type="range", min=1, max=samples, value=1, step=1, class_="slider",
                     aria_label=f"sample shown, {problem}")
    return [element("label", "Observation ", element("select", *options, class_="chosen"), class_="control"),
            element("label", "Sample ", slider, element("output", f"1 of {samples}"), class_="control"),
            element("label", element("input", type="checkbox", class_="together"), " all side by side",
                    class_="control")]


def _legend(highest: float) -> Markup:
    colours = ", ".join(f"rgb({r},{g},{b})" for r, g, b in palette(9))
    bar = element("span", class_="bar", style=f"background: linear-gradient(to right, {colours})")
    keys = [Markup(element("span", class_="key", style=f"background: rgb{colour}") + " " + text)
            for colour, text in zip((_COVERED[0], _COVERED[2]), ("truth inside the 90% interval", "outside"))]
    return element("p", "standard deviation 0 ", bar, f" {highest:.2g} or more ", *keys, class_="legend")


def _highest_deviation(examples: dict[str, dict[str, Tensor]], observations: int) -> float:
    """End of the colour scale: the largest deviation, unless one solver's would leave all others dark."""
    peaks = torch.tensor([float(found["std"][:observations].nan_to_num(0.0).max()) for found in examples.values()])
    return max(1e-6, min(float(peaks.max()), 3 * float(peaks.median())))


# -- cards -----------------------------------------------------------------------------------------------------------


def _measured(found: dict[str, Tensor], b: int, pictures: bool) -> Markup:
    parts = []
    if "truth" in found:
        parts.append(_figure("truth", _show(found["truth"][b])))
    if "observation" in found:
        mask = found["observed"][b] if "observed" in found else None
        parts.append(_figure("observation", _show(found["observation"][b], measurement=True, observed=mask)))
    return element("div", element("h5", "given" if pictures else "given: truth and observation"),
                   element("div", *parts, class_="images"), class_="card given")


def _solved(comparison: Results, problem: str, solver: str, found: dict[str, Tensor], b: int, most: int,
            highest: float) -> Markup:
    values, samples = comparison.values[problem].get(solver, {}), found["samples"][:most]

    def own(metric: str) -> float | None:
        return values[metric][b] if metric in values and math.isfinite(values[metric][b]) else None

    title = element("h5", solver)
    covered, psnr = found.get("covered"), own("psnr")
    share = None if covered is None else float(covered.double().mean())
    if as_picture(found["mean"]) is None:
        draw = plane if found["mean"].numel() == 2 and found["mean"].ndim == 1 else curves
        facts = [] if share is None else [f"90% intervals hold {share:.0%} of the truth's coordinates"]
        figure = _figure("; ".join(["samples, mean, standard deviation, truth", *facts]),
                         draw(samples, found["mean"], found["std"], found.get("truth")), class_="samples wide")
        return element("div", title, element("div", figure, class_="images"), class_="card")
    stack = [_image(_prepared(sample), f"sample {k + 1} of {solver}", data_sample=k, class_="now" if k == 0 else None)
             for k, sample in enumerate(samples)]
    parts = [_figure("samples", element("div", *stack, class_="stack"), class_="samples"),
             _figure("mean" if psnr is None else f"mean, {psnr:.1f} dB", _show(found["mean"])),
             _figure("std. deviation", _deviation(found["std"], highest))]
    if covered is not None:
        parts.append(_figure(f"coverage {share:.0%}", _coverage_map(covered)))
    return element("div", title, element("div", *parts, class_="images"), class_="card")


def _figure(caption: str, content: Markup, class_: str | None = None) -> Markup:
    return element("figure", content, element("figcaption", caption), class_=class_)


def _image(uri: str, description: str, **attributes: object) -> Markup:
    return element("img", src=uri, alt=description, **attributes)


def _show(image: Tensor, measurement: bool = False, observed: Tensor | None = None) -> Markup:
    if image.is_complex():
        image = torch.view_as_real(image).movedim(-1, 0).flatten(0, 1)  # channels, of which the magnitude is shown
    if as_picture(image) is None:
        return numbers(image) if image.numel() <= 12 else curves(image.flatten()[None], None, None, None)
    return _image(_prepared(image, measurement, observed), "observation" if measurement else "image")


def _prepared(image: Tensor, measurement: bool = False, observed: Tensor | None = None) -> str:
    """A picture as an address; measurements that are no intensities are stretched to the range of one."""
    picture: Tensor = as_picture(image.detach().cpu().double())  # type: ignore[assignment]
    low, high = float(picture.min()), float(picture.max())
    if measurement and (low < -0.5 or high > 1.5):
        picture = (picture - low) / (high - low)
    if observed is not None and observed.ndim == 3 and not bool(observed.all()):
        colours = picture if picture.ndim == 3 else picture.unsqueeze(-1).expand(-1, -1, 3)
        picture = torch.where(observed.cpu().any(0).unsqueeze(-1), colours, colours.new_tensor(UNOBSERVED))
    return image_uri(picture)


def _deviation(std: Tensor, highest: float) -> Markup:
    colours = palette()
    picture: Tensor = as_picture(rms_over_channels(std.detach().cpu().double()))  # type: ignore[assignment]
    levels = (picture.nan_to_num(0.0) / highest).clamp(0, 1) * (len(colours) - 1)
    return _image(image_uri(levels.round(), colours), "standard deviation of each pixel")


def _coverage_map(covered: Tensor) -> Markup:
    share = covered.cpu().double().mean(0) if covered.ndim == 3 else covered.cpu().double()
    levels = torch.where(share == 1, 0, torch.where(share == 0, 2, 1))
    return _image(image_uri(levels, list(_COVERED)), "where the 90% interval holds the truth")
