"""Output of :mod:`benchmarks.tables.compare_table`: solvers by problems, with the best ones in bold."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from benchmarks.release.tune_samplers import CANDIDATES
from invflow.evaluation.comparison import Comparison
from invflow.evaluation.measures import METRICS
from invflow.evaluation.results.text import with_error

__all__ = ["contenders", "difference", "halves", "overview", "picked"]


def halves(found: Comparison, problem: str, *solvers: str) -> tuple[list[int], list[int]]:
    """Split the observations that all solved: every other one is for selecting the best, the rest for evaluating it."""
    failed = {b for s in solvers for b in found.missing.get(problem, {}).get(s, {}).get("observations", ())}
    kept = [b for b in range(len(found.seeds[problem])) if b not in failed]
    return [b for b in kept if b % 2 == 0], [b for b in kept if b % 2]


def difference(found: Comparison, problem: str, metric: str, first: str, second: str,
               rows: Sequence[int]) -> tuple[float, float]:
    """Mean over some observations of the paired difference, and its standard error."""
    one, two = (torch.tensor(found.values[problem][s][metric], dtype=torch.float64) for s in (first, second))
    gap = (one - two)[list(rows)]
    return float(gap.mean()), float(gap.std() / len(gap) ** 0.5)


def picked(found: Comparison, problem: str, metric: str, names: Sequence[str]) -> str | None:
    """The solver with the lowest mean over the first half of the observations; None if no solver has the metric."""
    means = {}
    for name in names:
        if metric in found.values[problem].get(name, {}) and found.complete(problem, name) and not found.collapsed(
                problem, name):
            values = torch.tensor(found.values[problem][name][metric], dtype=torch.float64)
            means[name] = float(values[halves(found, problem, name)[0]].mean())
    return min(means, key=lambda name: means[name]) if means else None


def contenders(found: Comparison, problem: str, metric: str = "crps") -> set[str]:
    """Solvers within two paired standard errors of the best, which is selected on half of the observations.

    Differences are from the other half, so luck in the selection does not bias the comparison.
    """
    best = picked(found, problem, metric, list(found.solvers))
    near = {best} if best is not None else set()
    for name in found.solvers:
        if best is None or metric not in found.values[problem].get(name, {}) or found.collapsed(problem, name):
            continue
        gap, error = difference(found, problem, metric, name, best, halves(found, problem, name, best)[1])
        near |= {name} if gap <= 2 * error else set()
    return near


def overview(found: Comparison, metrics: Sequence[str] = ("crps",), first: str = "VFM, 1 step") -> str:
    """Tables in markdown that show all problems side by side.

    For each metric, there is a table of solvers by problems, with means and standard errors over observations; for
    metrics of which low values are good, the contenders are in bold. The first table also has the cost of a sample,
    averaged over problems. A last table has, for each problem, the difference of one solver from the best existing
    sampler, which is selected on half of the observations, and from NoiseSMC, paired over the other half.

    Args:
        found: Comparison on problems of one family, such as MNIST.
        metrics: Metrics of single observations; the last table is for the first one.
        first: Solver whose differences are shown.
    """
    titles = [problem.partition("/")[2] for problem in found.problems]
    lines: list[str] = []
    for metric in metrics:
        lines += _table(found, metric, titles, costs=metric == metrics[0])
    lines += [f"| {first}, minus | " + " | ".join(titles) + " |", "|---" * (len(titles) + 1) + "|"]
    field = [name for name in found.solvers if name in CANDIDATES]
    for title, names in {"the best existing sampler": field, "NoiseSMC": ["NoiseSMC"]}.items():
        shown = []
        for problem in found.problems:
            best = picked(found, problem, metrics[0], names)
            if best is None or metrics[0] not in found.values[problem].get(first, {}):
                shown.append("")
                continue
            rows = halves(found, problem, first, best)[1]
            gap, error = difference(found, problem, metrics[0], first, best, rows)
            shown.append(f"{gap:+.4f} ± {error:.4f}" + (f" ({best})" if len(names) > 1 else ""))
        lines.append(f"| {title} | " + " | ".join(shown) + " |")
    return "\n".join(lines) + "\n"


def _table(found: Comparison, metric: str, titles: list[str], costs: bool) -> list[str]:
    known = METRICS[metric]
    near = {problem: contenders(found, problem, metric) if known.better == "low" else set()
            for problem in found.problems}
    rest = " | calls forward + backward | seconds a sample |" if costs else " |"
    lines = [f"{known.title} ({known.note}):", "", "| solver | " + " | ".join(titles) + rest,
             "|---" * (len(titles) + (3 if costs else 1)) + "|"]
    for solver in found.solvers:
        shown = []
        for problem in found.problems:
            there = metric in found.values[problem].get(solver, {})
            text = with_error(*found.mean(problem, solver, metric)) if there else ""
            shown.append(f"**{text}**" if solver in near[problem] else text)
        cells = [solver, *shown, *(_costs(found, solver) if costs else [])]
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


def _costs(found: Comparison, solver: str) -> list[str]:
    spent = [found.costs[problem][solver] for problem in found.problems if solver in found.costs[problem]]
    forward, backward, seconds = (sum(float(c[key] or 0) for c in spent) / max(1, len(spent))
                                  for key in ("forward", "backward", "seconds"))
    return [f"{forward:.4g} + {backward:.4g}", f"{seconds / found.settings['num_samples']:.2g}"]
