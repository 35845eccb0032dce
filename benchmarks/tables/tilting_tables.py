"""Tables on tilted sampling: ``python -m benchmarks.tables.tilting_tables OUTPUT [--only NAME ...]``.

There are four tables. Each has a CSV with one row per replicate, a markdown table of means and, except for the last, a
plot:

- ``budget``: reward, and distance from the exact law, against calls of the map, for every sampler and search.
- ``error``: effect of an error of the map on each kind of weights, compared with the tilted law of the sampler's own
  base dynamics and with the exact law.
- ``dimension``: variance of the log weights, effective sample size and k-hat against the dimension.
- ``digits``: the MNIST prior tilted to each digit, at equal calls for every look-ahead. ``--judge`` is the folder of a
  second classifier, made by ``python -m benchmarks.release.train_classifier mnist --output FOLDER --epochs 2 --seed
  1``.

Rows are written as they are computed, so a stopped run can be resumed.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.tables.shared import Rows, append_rows, head, line, parser, plus_minus, read_rows
from benchmarks.tables.tilting_budget import BUDGET_FIELDS, BUDGETS, CASES, METHODS, evaluate_budget, takes
from benchmarks.tables.tilting_digits import DIGIT_FIELDS, LOOK_AHEADS, PARTICLES, evaluate_digits
from benchmarks.tables.tilting_parts import choose, from_base, from_exact, mean_and_std
from benchmarks.tables.tilting_weights import (
    DIMENSIONS,
    ERROR_FIELDS,
    ERROR_METHODS,
    ERROR_SIZES,
    PRIORS,
    WEIGHT_FIELDS,
    WEIGHT_METHODS,
    evaluate_dimension,
    evaluate_error,
    sees_error,
)
from invflow.nets.classifier import Classifier
from invflow.plugins import write_text

__all__ = ["TABLES", "Table", "fill", "main"]
#: number of rows of each cell: replicates, or digits
ROWS = 10


def _with_std(rows: Rows, name: str, digits: int) -> str:
    return plus_minus(*mean_and_std(rows, name), digits)


# -- the tables in markdown --------------------------------------------------------------------------------------------


def format_budget(rows: Rows, budgets: Sequence[int] = BUDGETS) -> str:
    """Means and standard deviations over replicates, problem by problem and method by method."""
    lines: list[str] = []
    for problem in dict.fromkeys(row["problem"] for row in rows):
        lines += [f"{problem}:", "", head("method", "calls", "backward among them", "mean reward", "W1",
                                           "error of shares", "modes")]
        for method, budget in (("exact", BUDGETS[0]), *itertools.product(METHODS, budgets)):
            chosen = choose(rows, problem=problem, method=method, budget=budget)
            if not chosen:
                continue
            forward, backward = (mean_and_std(chosen, name)[0] for name in ("calls", "backward"))
            lines.append(line(method, f"{forward + backward:.0f}", f"{backward:.0f}", _with_std(chosen, "reward", 3),
                              _with_std(chosen, "w1", 2), _with_std(chosen, "mode_error", 3),
                              f"{mean_and_std(chosen, 'modes')[0]:.1f}"))
        lines.append("")
    return "\n".join(lines).rstrip()


def format_error(rows: Rows) -> str:
    """Differences of share and reward, with their distance in standard errors."""
    lines: list[str] = []
    for (judge, difference), name in itertools.product(
            (("tilted base sampler", from_base), ("exact law", from_exact)), ("share", "reward")):
        lines += [f"{name}, minus that of the {judge} (in standard errors):", "",
                  head("error in", "weights, look-ahead", *ERROR_SIZES)]
        for where, method in itertools.product(("jump", "both"), ERROR_METHODS):
            chosen = {size: choose(rows, where=where, size=size, method=method) for size in ERROR_SIZES}
            if any(chosen.values()):
                cells = [difference(found, name) if found else None for found in chosen.values()]
                shown = ("" if cell is None else f"{cell[0]:+.3f} ({abs(cell[0] / cell[1]):.1f})" for cell in cells)
                lines.append(line(where, method, *shown))
        lines.append("")
    return "\n".join(lines).rstrip()


def format_dimension(rows: Rows) -> str:
    """Variance of the log weights, effective sample size and k-hat; temperatures and calls of NoiseSMC."""
    lines = ["variance of the log weights / effective sample size in percent / k-hat, means over replicates:", "",
             head("prior", "proposal, look-ahead", *(f"d = {d}" for d in DIMENSIONS))]
    for prior, method in itertools.product(PRIORS, WEIGHT_METHODS):
        cells = [choose(rows, prior=prior, d=d, method=method) for d in DIMENSIONS]
        if method != "NoiseSMC" and any(cells):
            lines.append(line(prior, method, *(_cell(cell) for cell in cells)))
    lines += ["", "NoiseSMC, temperatures (calls forward and backward; error of the log evidence, mean ± std):", "",
              head("prior", *(f"d = {d}" for d in DIMENSIONS))]
    for prior in PRIORS:
        cells = [choose(rows, prior=prior, d=d, method="NoiseSMC") for d in DIMENSIONS]
        lines.append(line(prior, *(_tempered(cell) for cell in cells)))
    return "\n".join(lines)


def _cell(rows: Rows) -> str:
    if not rows:
        return ""
    variance, ess, k_hat = (mean_and_std(rows, name)[0] for name in ("variance", "ess", "k_hat"))
    return f"{variance:.3g} / {100 * ess:.2g} / {k_hat:.2f}"


def _tempered(rows: Rows) -> str:
    if not rows:
        return ""
    calls = sum(mean_and_std(rows, name)[0] for name in ("calls", "backward"))
    return (f"{mean_and_std(rows, 'temperatures')[0]:.1f} ({calls:.0f}; "
            f"{_with_std(rows, 'log_evidence_error', 2)})")


def format_digits(rows: Rows) -> str:
    """Means over digits with the standard deviation between seeds, and the accuracy digit by digit."""
    seeds = sorted({row["seed"] for row in rows})
    judged = "accuracy" if any(row["accuracy"] for row in rows) else "accuracy_of_reward"
    names = ("accuracy", "accuracy_of_reward", "reward", "length", "discrepancy", "ess", "ancestors")
    lines = [head("look-ahead", "steps", "calls", "backward among them", "accuracy, second classifier",
                  "accuracy, the reward's", "mean reward", "thermodynamic length", "total discrepancy", "ESS",
                  "distinct ancestors")]
    for name in LOOK_AHEADS:
        chosen = choose(rows, look_ahead=name)
        if not chosen:
            continue
        cells = []
        for column, digits in zip(names, (3, 3, 3, 2, 2, 1, 1)):
            means = torch.tensor([mean_and_std(choose(chosen, seed=seed), column)[0] for seed in seeds])
            cells.append(f"{float(means.mean()):.{digits}f} ± {float(means.std()):.{digits}f}"
                         if not bool(means.isnan().any()) else "")
        forward, backward = (float(chosen[0][column]) for column in ("calls", "backward"))
        lines.append(line(name, chosen[0]["steps"], f"{forward + backward:.0f}", f"{backward:.0f}", *cells))
    lines += ["", f"{judged}, digit by digit:", "", head("look-ahead", *range(10))]
    for name in LOOK_AHEADS:
        lines.append(line(name, *(f"{mean_and_std(choose(rows, look_ahead=name, digit=digit), judged)[0]:.2f}"
                                  for digit in range(10))))
    return "\n".join(lines)


# -- the tables --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Table:
    """One table.

    Attributes:
        fields: Columns of its CSV. The first ``keys`` columns name a cell; the next one names a row of the cell.
        keys: Number of columns that name a cell.
        cells: All cells.
        run: Function from a cell to its rows, :data:`ROWS` of them.
        markdown: Function from rows to a table of means.
        plot: Name of the figure, if it has one.
    """

    fields: tuple[str, ...]
    keys: int
    cells: tuple[tuple[Any, ...], ...]
    run: Callable[..., list[dict[str, Any]]]
    markdown: Callable[[Rows], str]
    plot: str | None = None


def fill(table: Table, file: Path, run: Callable[..., list[dict[str, Any]]] | None = None) -> Rows:
    """Compute the cells that are missing from a CSV, each as a whole, and append the missing rows.

    Args:
        table: Table with its cells.
        file: The CSV.
        run: Function to use instead of the table's own.

    Returns:
        All rows, in the order of the file.
    """
    names = table.fields[:table.keys + 1]
    done = {tuple(row[name] for name in names) for row in read_rows(file)}
    found = [key[:-1] for key in done]
    for cell in table.cells:
        if found.count(tuple(str(value) for value in cell)) == ROWS:
            continue
        rows = (run or table.run)(*cell)
        append_rows(file, [row for row in rows if tuple(str(row[name]) for name in names) not in done], table.fields)
    return read_rows(file)


TABLES: dict[str, Table] = {
    "budget": Table(BUDGET_FIELDS, 3, tuple(
        (problem, method, budget) for problem, budget, method in itertools.product(CASES, BUDGETS, ("exact", *METHODS))
        if takes(problem, method) and (method != "exact" or budget == BUDGETS[0])),
        evaluate_budget, format_budget, "reward_against_calls"),
    "error": Table(ERROR_FIELDS, 3, tuple(
        (where, size, method) for where, size, method in itertools.product(("jump", "both"), ERROR_SIZES, ERROR_METHODS)
        if sees_error(where, method)), evaluate_error, format_error, "error_of_map"),
    "dimension": Table(WEIGHT_FIELDS, 3, tuple(itertools.product(PRIORS, DIMENSIONS, WEIGHT_METHODS)),
                       evaluate_dimension, format_dimension, "weights_against_dimension"),
    "digits": Table(DIGIT_FIELDS, 2, tuple((name, seed) for seed in range(3) for name in LOOK_AHEADS),
                    evaluate_digits, format_digits),
}


def main(arguments: list[str] | None = None, say: Callable[[str], None] = print) -> None:
    """Fill the tables, write each as CSV, markdown and plot, and print them."""
    command = parser("tilting_tables", __doc__, threads=1)
    command.add_argument("output", type=Path, help="folder of the tables and plots")
    command.add_argument("--only", nargs="+", choices=list(TABLES), default=list(TABLES), metavar="NAME",
                        help=f"one or more of {', '.join(TABLES)}; default: all")
    command.add_argument("--judge", type=Path, help="folder of a second MNIST classifier, for the digits")
    command.add_argument("--particles", type=int, default=PARTICLES, help="particles for each digit; not in the CSV")
    options = command.parse_args(arguments)
    torch.set_num_threads(options.threads)
    judge = None if options.judge is None else Classifier.load(options.judge)
    for name in options.only:
        table = TABLES[name]
        digits = functools.partial(evaluate_digits, judge=judge, particles=options.particles)
        run = digits if name == "digits" else None
        rows = fill(table, options.output / f"{name}.csv", run)
        text = table.markdown(rows)
        write_text(options.output / f"{name}.md", text + "\n")
        say(f"## {name}\n\n{text}\n")
        if table.plot is not None:
            from benchmarks.tables import tilting_plots

            tilting_plots.save(tilting_plots.PLOTS[name](rows), options.output / f"{table.plot}.png")


if __name__ == "__main__":
    main()
