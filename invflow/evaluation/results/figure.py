"""The figure of quality against calls."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import matplotlib
from matplotlib.ticker import LogLocator, NullLocator
from matplotlib.transforms import Bbox

from invflow.evaluation.measures import METRICS
from invflow.views.figure import PosteriorFigure

if TYPE_CHECKING:
    from invflow.evaluation.results.results import Results

__all__ = ["direction", "pareto_figure", "pareto_panel", "plotted_metrics", "points_of"]

#: possible positions of a name next to its point, best first
_AROUND = ((1, 1), (1, -1), (-1, 1), (-1, -1), (0, 1), (0, -1), (1, 0), (-1, 0))
_INK, _FAINT, _FRONT = "#222222", "#999999", "#3b4cc0"
_STYLE: Any = {"font.family": "sans-serif", "font.size": 8, "text.color": _INK, "axes.edgecolor": _FAINT,
          "xtick.color": _INK, "ytick.color": _INK, "axes.labelcolor": _INK, "axes.spines.top": False,
          "axes.spines.right": False, "text.parse_math": False}  # a solver's name is not a formula


def pareto_figure(comparison: Results, metric: str = "crps", columns: int = 3) -> PosteriorFigure:
    """Plot the mean of a metric with its standard error against calls per sample, forward and backward together.

    The front connects the solvers that no other solver beats with the same number of calls or fewer. Solvers without
    network calls are at 0.

    Args:
        comparison: Comparison of solvers.
        metric: Name of the metric, such as ``"crps"``.
        columns: Number of panels in a row.

    Raises:
        ValueError: If no problem has the metric.
    """
    problems = [p for p in comparison.problems if metric in comparison.metrics(p)]
    if not problems:
        known = sorted({m for p in comparison.problems for m in comparison.metrics(p)})
        raise ValueError(f"no problem has the metric {metric!r}: choose one of {', '.join(known)}")
    columns = min(columns, len(problems))
    with matplotlib.rc_context(_STYLE):
        figure = _empty_figure(columns, math.ceil(len(problems) / columns))
        panels = figure.subplots(math.ceil(len(problems) / columns), columns, squeeze=False).flat
        for axes, problem in zip(panels, problems):
            axes.set_title(problem, fontsize=9, loc="left")
            _draw(axes, comparison, problem, metric)
        for axes in list(panels)[len(problems):]:
            axes.remove()
        _place_names(figure)
    return figure


def pareto_panel(comparison: Results, problem: str, metric: str) -> PosteriorFigure:
    """One panel of :func:`pareto_figure`, as a figure without a title."""
    with matplotlib.rc_context(_STYLE):
        figure = _empty_figure(1, 1)
        _draw(figure.add_subplot(), comparison, problem, metric)
        _place_names(figure)
    return figure


def direction(metric: str) -> str:
    """The title of a metric and its best direction or value."""
    shown = METRICS.get(metric)
    better = shown.better if shown else None
    return f"{shown.title if shown else metric}" + (
        f", {better:g} is best" if isinstance(better, float) else f", {better}er is better" if better else "")


def _empty_figure(columns: int, rows: int) -> PosteriorFigure:
    return PosteriorFigure(figsize=(3.6 * columns, 2.9 * rows), dpi=150, facecolor="white", layout="constrained")


def _draw(axes: matplotlib.axes.Axes, comparison: Results, problem: str, metric: str) -> None:
    points, front = points_of(comparison, problem, metric), comparison.pareto(problem, metric)
    called = [calls for calls, _, _ in points.values() if calls > 0]
    edge = min([1.0, *called]) / 3  # position of zero calls
    right = max([1.0, *called]) * 4
    place = {solver: max(calls, edge) for solver, (calls, _, _) in points.items()}
    better = METRICS[metric].better if metric in METRICS else None
    if isinstance(better, float):
        axes.axhline(better, color=_FAINT, linewidth=0.8, linestyle="--", zorder=0)
    lows, highs = [mean - error for _, mean, error in points.values()], [m + e for _, m, e in points.values()]
    if not isinstance(better, float) and min(lows) > 0 and max(highs) > 12 * min(lows):
        axes.set_yscale("log")  # so that one bad solver does not hide the differences between the others
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if max(highs) < 1000 * min(lows) else (1,)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter("{x:g}")
    if front:
        axes.step([*(place[s] for s in front), right], [points[s][1] for s in [*front, front[-1]]], where="post",
                  color=_FRONT, linewidth=1, alpha=0.6, zorder=1)
    for solver in [*front, *(s for s in points if s not in front)]:
        _, mean, error = points[solver]
        colour = _FRONT if solver in front else _INK
        axes.errorbar([place[solver]], [mean], yerr=[error], fmt="o" if solver in front else "s", capsize=1.5,
                      markersize=5 if solver in front else 3.5, color=_FRONT if solver in front else _FAINT,
                      linewidth=0.8, zorder=2)
        axes.annotate(solver if len(solver) <= 24 else solver[:23] + "…", (place[solver], mean), xytext=(4, 3),
                      textcoords="offset points", fontsize=7, color=colour)
    axes.set_xscale("log")
    axes.set_xlim(edge / 1.6, right)
    ticks = [10.0**k for k in range(-6, 12) if edge * 1.2 < 10.0**k <= right]
    none = [edge] if len(called) < len(points) else []
    axes.set_xticks(none + ticks, ["0"] * len(none) + [f"{tick:g}" for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("network calls for each sample")
    axes.set_ylabel(direction(metric))


def _place_names(figure: PosteriorFigure) -> None:
    """Move each name to the nearest place where it covers no point and no other name."""
    figure.draw_without_rendering()
    for axes in figure.axes:
        names: list[Any] = list(axes.texts)
        inside = axes.get_window_extent()
        taken = [Bbox.from_extents(x - 8, y - 8, x + 8, y + 8)
                 for x, y in (axes.transData.transform(name.xy) for name in names)]
        for name in names:
            for away, (x, y) in ((d, p) for d in (4, 9, 15, 22, 30) for p in _AROUND):
                name.set(position=(x * away, y * away), ha=("right", "center", "left")[x + 1],
                         va=("top", "center", "bottom")[y + 1])
                box = name.get_window_extent()
                if inside.x0 <= box.x0 and box.x1 <= inside.x1 and inside.y0 <= box.y0 and box.y1 <= inside.y1 \
                        and not any(box.overlaps(other) for other in taken):
                    taken.append(box)
                    break


def plotted_metrics(comparison: Results, problem: str, most: int = 4) -> list[str]:
    """Metrics to plot, the most informative first."""
    order = ["crps", "coverage", "psnr", "frechet", "sliced_wasserstein", "reward", "residual", "rmse"]
    having = [m for m in order if m in comparison.metrics(problem)]
    return [m for m in having if len(points_of(comparison, problem, m)) > 1][:most]


def points_of(comparison: Results, problem: str, metric: str) -> dict[str, tuple[float, float, float]]:
    """Calls, mean and standard error by solver."""
    points = {}
    for solver in comparison.solvers:
        if solver in comparison.costs[problem]:
            try:
                mean, error = comparison.mean(problem, solver, metric)
            except KeyError:
                continue
            if math.isfinite(mean):
                points[solver] = (comparison.calls(problem, solver), mean, error if math.isfinite(error) else 0.0)
    return points
