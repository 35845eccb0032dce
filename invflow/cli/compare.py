"""``invflow compare``: solvers against each other on problems."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from invflow.cli.options import MOST_SEED, PRIOR_HELP

if TYPE_CHECKING:
    from invflow.problem import Problem
    from invflow.solver import Solver

__all__ = ["compare", "parse_solver"]


def compare(
    problems: Annotated[list[str], typer.Argument(help="Problems, such as mnist/box-inpainting gaussian/linear.")],
    solver: Annotated[list[str] | None, typer.Option(
        "--solver", help="A solver, such as vfm, vfm:steps=4, label=vfm:steps=4, or one of your own, "
                         "label=package.module:Class; repeat it for several.")] = None,
    prior: Annotated[str | None, typer.Option(help=PRIOR_HELP)] = None,
    observations: Annotated[int, typer.Option(min=1, help="Observations of each problem.")] = 32,
    samples: Annotated[int, typer.Option(min=1, help="Posterior samples for each observation.")] = 64,
    seed: Annotated[int, typer.Option(min=0, max=MOST_SEED, help="Of all random numbers.")] = 0,
    split: Annotated[str, typer.Option(help="Images: test, or validation for choosing settings.")] = "test",
    device: Annotated[str, typer.Option(help="Where to run: cpu, cuda, cuda:1, mps.")] = "cpu",
    timeout: Annotated[float | None, typer.Option(
        help="Seconds for each part, eight observations [default: no limit].")] = None,
    output: Annotated[Path, typer.Option(
        help="Folder for the results; one that was started is gone on with.")] = Path("invflow-comparison"),
) -> None:
    """Compare solvers on the same observations: quality, honesty and cost, with standard errors.

    Writes report.html, one page with everything, and table.csv, table.md, observations.csv, comparison.json and
    pareto.png. The same command resumes a killed run; on two processes:
    torchrun --nproc_per_node 2 -m invflow compare ...

    The exit status is 1 if every solver failed.
    """
    import invflow
    from invflow.cli.options import check_device
    from invflow.problem import load_problem

    if not solver:
        raise ValueError("pass at least one --solver, such as --solver vfm --solver dps:steps=100; invflow list "
                         "solvers shows the names")
    sources: dict[str, Any] = {}
    for text in solver:
        label, source = parse_solver(text)
        if label in sources:
            raise ValueError(f"two solvers are called {label!r}: name one of them, as in --solver other={text}")
        sources[label] = source
    place = check_device(device)
    posed = [load_problem(name) for name in problems]
    posed = posed if prior is None else [problem.with_prior(prior) for problem in posed]
    comparison = invflow.compare(posed, sources, num_observations=observations, num_samples=samples, seed=seed,
                                 output=output, split=split, progress=True, timeout=timeout,
                                 device=place if place.type != "cpu" else None)
    if os.environ.get("RANK", "0") == "0":  # one of several processes speaks for all
        words = ["invflow", "compare", *problems, *(word for text in solver for word in ("--solver", text)),
                 "--observations", observations, "--samples", samples, "--seed", seed, "--split", split,
                 *(() if prior is None else ("--prior", prior)), "--device", device, "--output", output]
        comparison.report(output / "report.html", command=shlex.join(map(str, words)))
        typer.echo(comparison.to_markdown())
        typer.echo(f"\nwrote {output}; open {output / 'report.html'}")
    if not any(comparison.values.values()):
        raise typer.Exit(1)


def parse_solver(text: str) -> tuple[str, Any]:
    """A solver as it is typed: ``[label=]name[:setting=value,...]``; the name may be ``package.module:Name``.

    Returns:
        The label, and a function of a problem that builds the solver.

    Raises:
        ValueError: for an unknown name, or a setting without a value.
    """
    from invflow.cli.options import parse_settings
    from invflow.registry import find_solver, list_solvers, solver_by_name

    label, equals, rest = text.partition("=")
    if not equals or ":" in label:  # a setting's
        label, rest = "", text
    name, _, tail = rest.partition(":")
    reference = re.match(r"[\w.]+:[A-Za-z_][\w.]*(?=:|$)", rest)
    if reference is not None and name not in list_solvers():
        name, tail = reference[0], rest[reference.end() + 1:]
    find_solver(name)
    settings = parse_settings(None, [pair for pair in tail.split(",") if pair])

    def build(problem: Problem) -> Solver:
        return solver_by_name(name, problem, **settings)

    return label or text, build
