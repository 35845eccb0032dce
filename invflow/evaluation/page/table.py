"""Tables of a comparison as HTML: means, standard errors, paired differences to a reference that readers choose."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from invflow.evaluation.page.elements import Cell, Markup, element, embedded_json, sortable
from invflow.evaluation.results.text import COLLAPSE_NOTE, with_error
from invflow.evaluation.summary import METRICS

if TYPE_CHECKING:
    from invflow.evaluation.results.results import Results

__all__ = ["column_notes", "problem_table", "reference_choice", "signed"]

_COSTS = {
    "forward": ("calls forward", "network rows for each sample, forward"),
    "backward": ("backward", "network rows for each sample, backward"),
    "seconds": ("seconds", "for each observation with all its samples"),
    "memory": ("memory", "peak above what the solver itself takes, the largest of any part"),
}
_ARROWS = {"low": "↓", "high": "↑"}


def signed(difference: float, error: float) -> str:
    """A difference with its sign and as many digits as its standard error allows."""
    if math.isnan(difference):
        return "—"
    return ("−" if difference < 0 else "+") + with_error(abs(difference), error)


def reference_choice(comparison: Results, reference: str | None) -> Markup:
    """The box in which readers choose what the others are compared with."""
    choices = [("default", "the first solver", reference is None),
               ("best", "best of each column (picked on the same observations)", reference == "best"),
               *((str(i), name, reference == name) for i, name in enumerate(comparison.solvers))]
    options = [element("option", name, value=value, selected=chosen) for value, name, chosen in choices]
    return element("label", "Differences to ", element("select", *options, id="reference"), class_="control")


def problem_table(comparison: Results, problem: str, rows: list[dict[str, Any]], reference: str | None) -> Markup:
    """The table of one problem.

    Args:
        comparison: of solvers.
        problem: its name.
        rows: of :meth:`Results.rows`, which the cells hold as they are.
        reference: that the differences in the rows are to.
    """
    numbers = {(row["solver"], row["metric"]): row for row in rows if row["problem"] == problem}
    metrics, solvers = comparison.metrics(problem), list(comparison.solvers)
    head = [Cell("solver", note="by name")]
    for metric in metrics:
        shown = METRICS.get(metric)
        better = shown.better if shown else None
        arrow = _ARROWS.get(better, "") if isinstance(better, str) else "" if better is None else f"→ {better:g}"
        best = comparison.best(problem, metric)
        title = Markup(f"{element('span', shown.title if shown else metric)} {element('i', arrow)}")
        head.append(Cell(title, note=shown.note if shown else None, data_metric=metric, data_better=better,
                         data_best=None if best is None else solvers.index(best),
                         data_default=solvers.index(comparison.reference(problem, metric)),
                         data_first="descending" if better == "high" else None))
    head += [Cell(title, note=note, data_metric=cost) for cost, (title, note) in _COSTS.items()]
    body = []
    for solver in solvers:
        shown_name = f"{solver} (collapsed)" if comparison.collapsed(problem, solver) else solver
        line = [Cell(shown_name, solver, data_solver=solvers.index(solver))]
        if solver in comparison.failures[problem]:
            line += [Cell("—") for _ in range(len(metrics) + len(_COSTS))]
        else:
            line += [_metric_cell(comparison, problem, metric, numbers.get((solver, metric))) for metric in metrics]
            line += [_cost_cell(cost, numbers[solver, cost]["mean"]) for cost in _COSTS]
        body.append(line)
    failures = [element("li", element("b", name), ": ", why) for name, why in comparison.failures[problem].items()]
    failures += [element("li", element("b", name), " ", comparison.gap(problem, name))
                 for name in comparison.missing.get(problem, {})]
    return Markup(
        sortable(head, body, f"Results on {problem}", data_problem=problem)
        + embedded_json(_pair_errors(comparison, problem, metrics), class_="pairs")
        + (element("ul", *failures, class_="failures") if failures else ""))


def _metric_cell(comparison: Results, problem: str, metric: str, row: dict[str, Any] | None) -> Cell:
    if row is None:
        return Cell("—", data_metric=metric)
    mean, error = float(row["mean"]), float(row["standard_error"])
    text = with_error(mean, error)
    best = comparison.best(problem, metric) == row["solver"]
    content = element("b" if best else "span", text)
    more: dict[str, Any] = {"data_metric": metric, "data_error": repr(error)}
    # others have no value for each observation, so no paired difference
    if "observations" in row and comparison.complete(problem, row["solver"]):
        more["data_paired"] = True
        content = Markup(content + _difference(row, metric, more))
    return Cell(content, None if math.isnan(mean) else mean, **more)


def _difference(row: dict[str, Any], metric: str, attributes: dict[str, Any]) -> Markup:
    """What stands under the number, and into the cell's attributes the numbers themselves."""
    if "reference" not in row:
        return element("small", "")
    if row["reference"] == row["solver"]:
        return element("small", "reference", class_="own")
    difference, error = row["difference"], row["difference_error"]
    attributes |= {"data_difference": repr(difference), "data_difference_error": repr(error)}
    better = METRICS[metric].better if metric in METRICS else None
    kind = None
    if isinstance(better, str) and abs(difference) > 2 * error > 0:
        kind = "better" if (difference < 0) == (better == "low") else "worse"
    return element("small", signed(difference, error), class_=kind)


def _cost_cell(cost: str, value: float | None) -> Cell:
    if value is None:
        return Cell("—", data_metric=cost)
    text = f"{value / 1e6:.0f} MB" if cost == "memory" else f"{value:.3g}" if cost == "seconds" else f"{value:.4g}"
    return Cell(text, float(value), data_metric=cost)


def _pair_errors(comparison: Results, problem: str, metrics: list[str]) -> dict[str, list[float | None]]:
    """Standard errors of paired differences, above the diagonal row by row; None where there is none.

    Differences themselves follow from the means; these do not.
    """
    solvers, own = list(comparison.solvers), comparison.values[problem]
    found = {}
    for metric in metrics:
        having = [i for i, solver in enumerate(solvers)
                  if metric in own.get(solver, {}) and comparison.complete(problem, solver)]
        if not having:
            continue
        values = torch.tensor([own[solvers[i]][metric] for i in having], dtype=torch.float64)
        count = values.shape[1]
        spread = (values[:, None] - values[None]).std(2) / math.sqrt(count) if count > 1 else None
        row = {i: k for k, i in enumerate(having)}
        found[metric] = [None if spread is None or i not in row or j not in row else _short(spread[row[i], row[j]])
                         for i in range(len(solvers)) for j in range(i + 1, len(solvers))]
    return found


def _short(value: torch.Tensor) -> float | None:
    number = float(value)
    return float(f"{number:.5g}") if math.isfinite(number) else None


def column_notes(comparison: Results) -> Markup:
    """What the columns mean."""
    used = {m for p in comparison.problems for m in comparison.metrics(p)}
    notes = [(METRICS[m].title, METRICS[m].note) for m in METRICS if m in used] + list(_COSTS.values())
    if any(comparison.collapsed(p, s) for p in comparison.problems for s in comparison.solvers):
        notes.append(("collapsed", COLLAPSE_NOTE))
    return element("dl", *(Markup(element("dt", title) + element("dd", note)) for title, note in notes))
