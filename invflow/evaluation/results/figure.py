"""Quality against calls, as a figure."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import matplotlib

from invflow.evaluation.summary import METRICS
from invflow.views.figure import PosteriorFigure

if TYPE_CHECKING:
    from invflow.evaluation.results.results import Results

__all__ = ["pareto_figure", "plotted_metrics", "points_of"]

_INK, _FAINT, _FRONT = "#222222", "#999999", "#3b4cc0"


def pareto_figure(comparison: Results, metric: str = "crps", columns: int = 3) -> PosteriorFigure:
    """Mean of a metric with its standard error against calls for each sample, forward and backward together.

    On the front are the solvers that no other beats at as few calls. Solvers without any network call stand at the left
    edge.

    Args:
        comparison: of solvers.
        metric: such as ``"crps"``.
        columns: panels side by side.

    Raises:
        ValueError: if no problem has the metric.
    """
    problems = [p for p in comparison.problems if metric in comparison.metrics(p)]
    if not problems:
        known = sorted({m for p in comparison.problems for m in comparison.metrics(p)})
        raise ValueError(f"no problem has the metric {metric!r}: choose one of {', '.join(known)}")
    columns = min(columns, len(problems))
    count = math.ceil(len(problems) / columns)
    style = {"font.family": "sans-serif", "font.size": 8, "text.color": _INK, "axes.edgecolor": _FAINT,
             "xtick.color": _INK, "ytick.color": _INK, "axes.spines.top": False, "axes.spines.right": False}
    with matplotlib.rc_context(style):  # type: ignore[arg-type]
        figure = PosteriorFigure(figsize=(3.6 * columns, 2.9 * count), dpi=150, facecolor="white", layout="constrained")
        for i, problem in enumerate(problems):
            axes = figure.add_subplot(count, columns, i + 1)
            _panel(axes, comparison, problem, metric)
    return figure


def _panel(axes: matplotlib.axes.Axes, comparison: Results, problem: str, metric: str) -> None:
    points = points_of(comparison, problem, metric)
    front = comparison.pareto(problem, metric)
    called = [calls for calls, _, _ in points.values() if calls > 0]
    edge = min([1.0, *called]) / 3  # where no call is drawn
    place = {solver: max(calls, edge) for solver, (calls, _, _) in points.items()}
    axes.step([place[s] for s in front], [points[s][1] for s in front], where="post", color=_FRONT, linewidth=1,
              alpha=0.6, zorder=1)
    for solver, (_, mean, error) in points.items():
        best = solver in front
        axes.errorbar([place[solver]], [mean], yerr=[error], fmt="o" if best else "s", markersize=5 if best else 3.5,
                      color=_FRONT if best else _FAINT, linewidth=0.8, capsize=1.5, zorder=2)
        axes.annotate(solver, (place[solver], mean), xytext=(4, 3), textcoords="offset points", fontsize=6.5,
                      color=_FRONT if best else _INK)
    shown = METRICS.get(metric)
    axes.set_xscale("log")
    axes.set_xlim(edge / 1.6, max([*place.values(), 1.0]) * 6)
    axes.set_title(problem, fontsize=9, loc="left")
    axes.set_xlabel("network calls for each sample" + (" (none: left edge)" if len(called) < len(points) else ""))
    direction = {"low": ", lower is better", "high": ", higher is better"}.get(str(shown.better) if shown else "", "")
    axes.set_ylabel((shown.title if shown else metric) + direction)


def plotted_metrics(comparison: Results, problem: str, most: int = 4) -> list[str]:
    """Metrics that are worth a drawing, the most telling first."""
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
