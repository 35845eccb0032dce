"""Tables of a comparison for the page: means, standard errors, paired differences to a chosen reference."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from invflow.evaluation.measures import METRICS
from invflow.evaluation.results.text import COLLAPSE_NOTE, with_error

if TYPE_CHECKING:
    from invflow.evaluation.results.results import Results

__all__ = ["column_notes", "problem_table", "signed"]

_COSTS = {
    "forward": ("calls forward", "forward network calls for each sample"),
    "backward": ("backward", "backward network calls for each sample"),
    "seconds": ("seconds", "time for each observation with all its samples"),
    "memory": ("memory", "peak memory beyond that of the solver itself, the largest over all parts"),
}
_ARROWS = {"low": "↓", "high": "↑"}


def signed(difference: float, error: float) -> str:
    """Format a difference with its sign and as many digits as its standard error allows."""
    if math.isnan(difference):
        return "—"
    return ("−" if difference < 0 else "+") + with_error(abs(difference), error)


def problem_table(comparison: Results, problem: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The table of one problem, for the template of the page: column groups, headers and cells with their attributes.

    Args:
        comparison: Comparison of solvers.
        problem: Name of the problem.
        rows: Rows of :meth:`Results.rows`, whose values the cells hold unchanged.
    """
    numbers = {(row["solver"], row["metric"]): row for row in rows if row["problem"] == problem}
    groups = _groups(comparison.metrics(problem))
    metrics, solvers = [m for own in groups.values() for m in own], list(comparison.solvers)
    leaders = {metric: comparison.leaders(problem, metric) for metric in metrics}
    heads = [_head(comparison, problem, metric, solvers) for metric in metrics]
    heads += [{"title": title, "note": note, "attributes": {"data-metric": cost}}
              for cost, (title, note) in _COSTS.items()]
    body = []
    for solver in solvers:
        if solver in comparison.failures[problem]:
            cells = [{"text": "—"}] * len(heads)
        else:
            cells = [_metric_cell(comparison, problem, metric, numbers.get((solver, metric)), leaders[metric])
                     for metric in metrics]
            cells += [_cost_cell(cost, numbers[solver, cost]["mean"]) for cost in _COSTS]
        name = f"{solver} (collapsed)" if comparison.collapsed(problem, solver) else solver
        body.append({"solver": solver, "name": name, "index": solvers.index(solver), "cells": cells})
    failures = list(comparison.failures[problem].items())
    failures += [(name, comparison.gap(problem, name)) for name in comparison.missing.get(problem, {})]
    return {"groups": [(name, len(own)) for name, own in [*groups.items(), ("cost", list(_COSTS))] if own],
            "heads": heads, "rows": body, "failures": failures, "pairs": _pair_errors(comparison, problem, metrics),
            "left_out": [(METRICS[m].title, METRICS[m].needs) for m in METRICS if m not in metrics]}


def _groups(metrics: list[str]) -> dict[str, list[str]]:
    """Metrics by group; a problem's own quantities count as quality, since estimating them is the task."""
    groups: dict[str, list[str]] = {"quality": [], "honesty": []}
    for metric in metrics:
        groups[METRICS[metric].group if metric in METRICS else "quality"].append(metric)
    return groups


def _head(comparison: Results, problem: str, metric: str, solvers: list[str]) -> dict[str, Any]:
    shown, best = METRICS.get(metric), comparison.best(problem, metric)
    better = shown.better if shown else None
    return {"title": shown.title if shown else metric, "note": shown.note if shown else None,
            "arrow": _ARROWS[better] if isinstance(better, str) else "" if better is None else f"→ {better:g}",
            "attributes": {"data-metric": metric, "data-better": better,
                           "data-best": None if best is None else solvers.index(best),
                           "data-default": solvers.index(comparison.reference(problem, metric)),
                           "data-first": "descending" if better == "high" else None}}


def _metric_cell(comparison: Results, problem: str, metric: str, row: dict[str, Any] | None,
                 leaders: list[str]) -> dict[str, Any]:
    if row is None:
        needs = METRICS[metric].needs if metric in METRICS else ""
        return {"text": "—", "attributes": {"data-metric": metric, "title": f"needs {needs}" if needs else None}}
    mean, error = float(row["mean"]), float(row["standard_error"])
    cell: dict[str, Any] = {"text": with_error(mean, error), "leads": row["solver"] in leaders, "attributes": {
        "data-metric": metric, "data-error": repr(error), "data-value": None if math.isnan(mean) else _exact(mean)}}
    # other metrics have no value per observation and therefore no paired difference
    if "observations" in row and comparison.complete(problem, row["solver"]):
        cell["attributes"]["data-paired"] = ""
        cell["under"] = _difference(row, metric, cell["attributes"])
    return cell


def _difference(row: dict[str, Any], metric: str, attributes: dict[str, Any]) -> dict[str, Any]:
    """The text below a number; the difference and its standard error are written into the cell's attributes."""
    if "reference" not in row:
        return {"text": ""}
    if row["reference"] == row["solver"]:
        return {"text": "reference", "kind": "own"}
    difference, error = row["difference"], row["difference_error"]
    attributes |= {"data-difference": repr(difference), "data-difference-error": repr(error)}
    better = METRICS[metric].better if metric in METRICS else None
    kind = None
    if isinstance(better, str) and abs(difference) > 2 * error > 0:
        kind = "better" if (difference < 0) == (better == "low") else "worse"
    return {"text": signed(difference, error), "kind": kind}


def _cost_cell(cost: str, value: float | None) -> dict[str, Any]:
    if value is None:
        return {"text": "—", "attributes": {"data-metric": cost}}
    text = f"{value / 1e6:.0f} MB" if cost == "memory" else f"{value:.3g}" if cost == "seconds" else f"{value:.4g}"
    return {"text": text, "attributes": {"data-metric": cost, "data-value": _exact(float(value))}}


def _exact(value: float) -> str:
    """All digits, in JavaScript's notation."""
    return repr(value).replace("inf", "Infinity")


def _pair_errors(comparison: Results, problem: str, metrics: list[str]) -> dict[str, list[float | None]]:
    """Standard errors of the differences of all pairs of solvers, row by row above the diagonal; None if unknown.

    The page computes the differences from the means, but their standard errors do not follow from the means.
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


def column_notes(comparison: Results) -> list[tuple[str, str]]:
    """Explanations of the columns, by title."""
    used = {m for p in comparison.problems for m in comparison.metrics(p)}
    notes = [(METRICS[m].title, METRICS[m].note) for m in METRICS if m in used] + list(_COSTS.values())
    if any(comparison.collapsed(p, s) for p in comparison.problems for s in comparison.solvers):
        notes.append(("collapsed", COLLAPSE_NOTE))
    return notes
