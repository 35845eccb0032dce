"""The plots of :mod:`benchmarks.tables.tilting_tables`, made with matplotlib's objects, without pyplot."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.tables.shared import Rows
from benchmarks.tables.tilting_budget import BUDGETS, METHODS
from benchmarks.tables.tilting_parts import choose, from_base, from_exact, mean_and_std
from benchmarks.tables.tilting_weights import DIMENSIONS, ERROR_METHODS, ERROR_SIZES, PRIORS, WEIGHT_METHODS

__all__ = ["PLOTS", "save"]

_STYLE: Any = {"font.family": "sans-serif", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
               "xtick.labelsize": 8, "ytick.labelsize": 8, "legend.fontsize": 8, "legend.frameon": False,
               "lines.markersize": 4, "lines.linewidth": 1.3}
# one colour for each look-ahead, and one for each kind of method without one
_BLUE, _ORANGE, _GREY, _RED, _PURPLE, _GREEN = "#3b4cc0", "#e0822c", "#777777", "#b40426", "#7b3fa0", "#2a8c4a"
_BUDGET_STYLES: dict[str, tuple[str, str, str]] = {
    "FMTT twisted, flow map": (_BLUE, "-", "o"), "FMTT twisted, denoiser": (_ORANGE, "-", "o"),
    "FMTT twisted, none": (_GREY, "-", "o"), "FMTT twisted, flow map, renoise": (_BLUE, "--", "s"),
    "FMTT twisted, denoiser, ancestral": (_ORANGE, "--", "s"),
    "FMTT twisted, flow map, renoise, conjugate": (_BLUE, "-.", "*"),
    "FMTT Jarzynski, flow map": (_BLUE, ":", "^"), "FMTT Jarzynski, denoiser": (_ORANGE, ":", "^"),
    "FMTT Jarzynski, none": (_GREY, ":", "^"), "FMTT unweighted, flow map": ("#9db4ff", "-", "x"),
    "TwistedDiffusion": (_PURPLE, "-", "D"), "NoiseSMC": (_RED, "-", "o"), "BestOfN": (_GREEN, "-", "v"),
    "multi-BestOfN": (_GREEN, "--", "v"), "BeamSearch": (_GREEN, ":", "v"), "TopKSearch": (_GREEN, "-.", "v"),
}
_LOOK_AHEAD_COLOURS = {"flow map": _BLUE, "denoiser": _ORANGE, "none": _GREY}


def _figure(rows: int, columns: int, size: tuple[float, float]) -> tuple[Figure, Any]:
    figure = Figure(figsize=size, dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def _draw(axes: Axes, x: Sequence[float], points: Sequence[tuple[float, float]], label: str,
          style: tuple[str, str, str]) -> None:
    colour, line, marker = style
    bars = [0 if math.isnan(std) else std for _, std in points]
    axes.errorbar(x, [mean for mean, _ in points], bars, label=label, color=colour, linestyle=line,
                  marker=marker, elinewidth=0.8, capsize=1.5)


def plot_budget(rows: Rows) -> Figure:
    """Plot mean reward and sliced W1 against calls, one row of panels per problem; bars are standard deviations."""
    problems = list(dict.fromkeys(row["problem"] for row in rows))
    with matplotlib.rc_context(_STYLE):
        figure, panels = _figure(len(problems), 2, (10, 3.4 * len(problems)))
        for problem, (left, right) in zip(problems, panels):
            for method in METHODS:
                cells = [cell for b in BUDGETS if (cell := choose(rows, problem=problem, method=method, budget=b))]
                calls = [sum(mean_and_std(cell, name)[0] for name in ("calls", "backward")) for cell in cells]
                for axes, name in ((left, "reward"), (right, "w1")):
                    _draw(axes, calls, [mean_and_std(cell, name) for cell in cells], method, _BUDGET_STYLES[method])
            for axes, name, title in ((left, "reward", "mean reward"), (right, "w1", "sliced W1 to exact draws")):
                exact = mean_and_std(choose(rows, problem=problem, method="exact"), name)[0]
                axes.axhline(exact, color="black", linewidth=1, label="exact draws")
                axes.set(xscale="log", xlabel="calls per particle, forward and backward", title=f"{problem}: {title}")
            left.set_yscale("symlog", linthresh=0.01 if "half" in problem else 1.0)
            right.set_yscale("log")
        handles = {label: handle for panel in panels[:, 1]
                   for handle, label in zip(*panel.get_legend_handles_labels())}
        order = [name for name in ("exact draws", *METHODS) if name in handles]
        figure.legend([handles[name] for name in order], order, loc="outside lower center", ncols=3)
    return figure


def plot_error(rows: Rows) -> Figure:
    """Plot the mean reward minus that of the tilted base sampler, and minus the exact one, against the error's size."""
    colours = [_LOOK_AHEAD_COLOURS[name.split(", ")[1]] for name in ERROR_METHODS]
    markers = {"twisted": ("-", "o"), "Jarzynski": (":", "^"), "unweighted": ("--", "x")}
    with matplotlib.rc_context(_STYLE):
        figure, panels = _figure(2, 2, (10, 6.4))
        for (axes, where), (judge, difference) in zip(
                zip(panels.T.flat, ("jump", "both", "jump", "both")),
                [("tilted base sampler", from_base)] * 2 + [("exact law", from_exact)] * 2):
            for method, colour in zip(ERROR_METHODS, colours):
                cells = [choose(rows, where=where, size=size, method=method) for size in ERROR_SIZES]
                if all(cells):
                    line, marker = markers[method.split(",")[0]]
                    style = (colour, line, "s" if "renoise" in method else marker)
                    _draw(axes, ERROR_SIZES, [difference(cell, "reward") for cell in cells], method, style)
            axes.axhline(0, color="black", linewidth=0.8)
            axes.set_yscale("symlog", linthresh=0.02)
            axes.set(title=f"from the {judge}, error in {'the jump alone' if where == 'jump' else 'jump and velocity'}",
                     ylabel="mean reward, difference")
        for axes in panels[1]:
            axes.set_xlabel("error of the one-step map, in the data's standard deviations")
        figure.legend(*panels[1, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def plot_dimension(rows: Rows) -> Figure:
    """Plot the log weights' variance, effective sample size, k-hat and NoiseSMC's temperatures against dimension."""
    columns = (("variance", "variance of log weights", "log"), ("ess", "effective sample size / N", "log"),
               ("k_hat", "k-hat", "linear"), ("temperatures", "temperatures of NoiseSMC", "log"))
    with matplotlib.rc_context(_STYLE):
        figure, panels = _figure(len(PRIORS), 4, (13, 2.9 * len(PRIORS)))
        for (prior, row), (column, (name, title, scale)) in itertools.product(
                zip(PRIORS, panels), enumerate(columns)):
            axes = row[column]
            for method in WEIGHT_METHODS:
                if (method == "NoiseSMC") != (name == "temperatures"):
                    continue
                cells = [choose(rows, prior=prior, d=d, method=method) for d in DIMENSIONS]
                kind, _, ahead = method.partition(", ")
                style = (_RED, "-", "o") if not ahead else (
                    _LOOK_AHEAD_COLOURS[ahead], "-" if kind == "gradient" else "--", "o" if kind == "gradient" else "s")
                points = [(d, mean_and_std(cell, name)) for d, cell in zip(DIMENSIONS, cells) if cell]
                _draw(axes, [d for d, _ in points], [point for _, point in points], method, style)
            axes.set(xscale="log", yscale=scale, title=f"{prior}: {title}", xlabel="dimension")
            axes.set_xscale("log", base=2)
            axes.set_xticks(DIMENSIONS, [str(d) for d in DIMENSIONS])
        panels[-1, 2].axhline(0.7, color="black", linewidth=0.8)
        panels[0, 2].axhline(0.7, color="black", linewidth=0.8)
        figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    return figure


def save(figure: Figure, file: Path) -> None:
    """Write a figure as a PNG of 64 colours, which has a third of the size."""
    from PIL import Image

    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    picture.seek(0)
    Image.open(picture).convert("RGB").quantize(64).save(file, optimize=True)


PLOTS: dict[str, Callable[[Rows], Figure]] = {
    "budget": plot_budget, "error": plot_error, "dimension": plot_dimension}
