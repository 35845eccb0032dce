"""Formats a comparison as markdown."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING

from invflow.evaluation.measures import METRICS
from invflow.evaluation.summary import COLLAPSED

if TYPE_CHECKING:
    from invflow.evaluation.results.results import Results

__all__ = ["COLLAPSE_NOTE", "cells", "in_a_cell", "markdown", "with_error"]

COLLAPSE_NOTE = (f"Collapsed: under {COLLAPSED} effective samples in half of the observations or more; the numbers "
                 "come from only a few samples and are never marked as best.")


def with_error(mean: float, error: float) -> str:
    """Format a number with as many digits as its standard error allows: ``0.1234 ± 0.0012``, ``8.1e8 ± 8.1e8``."""
    if not math.isfinite(mean):
        return "—" if math.isnan(mean) else str(mean)
    if not (math.isfinite(error) and error > 0):
        return f"{mean:.4g}"
    if error >= 1e4:
        return re.sub(r"e\+?(-?)0?(\d)", r"e\1\2", f"{mean:.1e} ± {error:.1e}")
    digits = min(6, max(0, 1 - math.floor(math.log10(error))))
    return f"{mean:.{digits}f} ± {error:.{digits}f}"


def in_a_cell(text: str) -> str:
    """Escape text so that it ends neither a cell of a markdown table nor its row."""
    return " ".join(text.split()).replace("|", "\\|")


def cells(comparison: Results, problem: str, metrics: list[str] | None) -> list[list[str]]:
    """Rows of text of one problem's table, the header first; the leaders are in asterisks."""
    names = [m for m in (comparison.metrics(problem) if metrics is None else metrics)
             if m in comparison.metrics(problem)]
    rows = [["solver", *(METRICS[m].title if m in METRICS else m for m in names), "calls forward", "backward",
             "seconds", "memory"]]
    leaders = {metric: comparison.leaders(problem, metric) for metric in names}
    for solver in comparison.solvers:
        if solver in comparison.failures[problem]:
            rows.append([solver, *["—"] * (len(names) + 4)])
            continue
        row = [f"{solver} (collapsed)" if comparison.collapsed(problem, solver) else solver]
        for metric in names:
            try:
                text = with_error(*comparison.mean(problem, solver, metric))
            except KeyError:
                text = "—"
            row.append(f"**{text}**" if solver in leaders[metric] else text)
        costs = comparison.costs[problem][solver]
        memory = costs["memory"]
        row += [f"{costs['forward']:.4g}", f"{costs['backward']:.4g}", f"{costs['seconds']:.3g}",
                "—" if memory is None else f"{memory / 1e6:.0f} MB"]
        rows.append(row)
    return rows


def markdown(comparison: Results, metrics: list[str] | None) -> str:
    """All tables, and the meaning of their columns."""
    settings = comparison.settings
    lines = []
    for problem in comparison.problems:
        head, *body = cells(comparison, problem, metrics)
        lines += [f"### {in_a_cell(problem)}", "", "| " + " | ".join(map(in_a_cell, head)) + " |",
                  "|" + "---|" * len(head)]
        lines += ["| " + " | ".join(map(in_a_cell, row)) + " |" for row in body]
        lines += [f"\n{in_a_cell(solver)}: {why}" for solver, why in comparison.failures[problem].items()]
        lines += [f"\n{in_a_cell(solver)} {comparison.gap(problem, solver)}"
                  for solver in comparison.missing.get(problem, {})]
        lines.append("")
    shown = [m for m in METRICS if any(m in comparison.metrics(p) for p in comparison.problems)]
    shown = [m for m in shown if metrics is None or m in metrics]
    notes = [f"{METRICS[m].title}: {METRICS[m].note}" for m in shown]
    truths = f"{settings.get('split')} images" if settings.get("source") == "data" else "draws of the prior"
    if any(comparison.collapsed(problem, solver) for problem in comparison.problems for solver in comparison.solvers):
        notes.append(COLLAPSE_NOTE.removesuffix("."))
    lines.append(
        f"{settings.get('num_observations')} observations ({truths} where the problem has images) x "
        f"{settings.get('num_samples')} samples, seed {settings.get('seed')}; means ± standard errors over "
        "observations. Bold: the best solver, and those whose paired difference to it is within two standard errors. "
        "Calls are network calls for each sample; seconds are for each observation with all its samples; memory is the "
        "peak beyond the memory of the solver itself. " + "; ".join(notes) + ".")
    return "\n".join(lines)
