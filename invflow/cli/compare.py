"""``invflow compare``: compare solvers on problems."""

from __future__ import annotations

import os
import re
import shlex
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from invflow.cli.options import PRIOR_HELP, Device, Seed, find_problem

if TYPE_CHECKING:
    from invflow.problem import Problem
    from invflow.solver import Solver

__all__ = ["compare", "parse_solver"]


def compare(
    problems: Annotated[list[str] | None, typer.Argument(
        help="Problems, such as mnist/box-inpainting gaussian/linear.")] = None,
    suite: Annotated[str | None, typer.Option(
        help="Fixed set of problems with exact answers, solvers and sizes: quick (ten minutes) or full (a "
        "night).")] = None,
    solver: Annotated[list[str] | None, typer.Option(
        "--solver", help="A solver, such as vfm, vfm:steps=4, label=vfm:steps=4, or your own as "
                         "label=package.module:Class; may be repeated.")] = None,
    prior: Annotated[str | None, typer.Option(help=PRIOR_HELP)] = None,
    observations: Annotated[int | None, typer.Option(
        min=1, help="Observations of each problem [default: 32, or the suite's].")] = None,
    samples: Annotated[int | None, typer.Option(
        min=1, help="Posterior samples for each observation [default: 64, or the suite's].")] = None,
    seed: Seed = 0,
    split: Annotated[str, typer.Option(help="Image split: test, or validation for choosing settings.")] = "test",
    device: Device = "cpu",
    timeout: Annotated[float | None, typer.Option(
        help="Time limit for each part (eight observations), in seconds [default: no limit].")] = None,
    shard: Annotated[str | None, typer.Option(
        help="Compute only this share of the parts, such as 1/4, for cluster jobs that use the same folder.")] = None,
    output: Annotated[Path, typer.Option(
        help="Folder for the results; an interrupted run resumes from it.")] = Path("invflow-comparison"),
) -> None:
    """Compare solvers on the same observations: quality, calibration and cost, with standard errors.

    Writes report.html (a page with all results), table.csv, table.md, observations.csv, comparison.json and
    pareto.png. The same command resumes a killed run. To use two processes:
    torchrun --nproc_per_node 2 -m invflow compare ...

    With --suite, problems and solvers come from the suite; --solver adds others. With --shard k/n, each call computes
    its share of the work. The last call to finish, or a call without --shard, writes the tables.

    The exit code is 1 if every solver failed.
    """
    import invflow
    from invflow.cli.options import check_device
    from invflow.evaluation.suites import find_suite

    chosen = None if suite is None else find_suite(suite)
    if chosen is not None and problems:
        raise ValueError(f"--suite {suite} has its own problems: omit {' '.join(problems)}, or omit --suite")
    if chosen is None and not problems:
        raise ValueError("pass at least one problem, such as gaussian/linear, or --suite quick; invflow list problems "
                         "shows the names")
    problems = list(problems or ()) if chosen is None else list(chosen.problems)
    solver = [*(() if chosen is None else chosen.solvers), *(solver or ())]
    observations = observations or (32 if chosen is None else chosen.observations)
    samples = samples or (64 if chosen is None else chosen.samples)
    if not solver:
        raise ValueError("pass at least one --solver, such as --solver vfm --solver dps:steps=100; invflow list "
                         "solvers shows the names")
    sources: dict[str, Any] = {}
    for text in solver:
        label, source = parse_solver(text)
        if label in sources:
            raise ValueError(f"two solvers are called {label!r}: rename one of them, as in --solver other={text}")
        sources[label] = source if chosen is None else chosen.solver(label, source)
    place = check_device(device)
    posed = [find_problem(name) for name in problems]
    posed = posed if prior is None else [problem.with_prior(prior) for problem in posed]
    share = None if shard is None else _parse_shard(shard)
    with warnings.catch_warnings():
        if chosen is not None:  # the table lists the warnings of solvers; printing them here would hide the table
            warnings.simplefilter("ignore", UserWarning)
        comparison = invflow.compare(posed, sources, num_observations=observations, num_samples=samples, seed=seed,
                                     output=output, split=split, progress=True, timeout=timeout, shard=share,
                                     part_size=8 if chosen is None else chosen.part_size,
                                     device=place if place.type != "cpu" else None)
    waiting = comparison.waiting()
    if waiting:
        typer.echo(f"share {shard} is done; {waiting} parts of other shares are still missing")
        return
    if os.environ.get("RANK", "0") == "0":  # only one of several processes prints
        words = ["invflow", "compare", *problems, *(word for text in solver for word in ("--solver", text)),
                 "--observations", observations, "--samples", samples, "--seed", seed, "--split", split,
                 *(() if prior is None else ("--prior", prior)), "--device", device, "--output", output]
        comparison.report(output / "report.html", command=shlex.join(map(str, words)))
        typer.echo(comparison.to_markdown())
        typer.echo(f"\nwrote {output}; open {output / 'report.html'}")
    if not any(comparison.values.values()):
        raise typer.Exit(1)


def _parse_shard(text: str) -> tuple[int, int]:
    first, slash, last = text.partition("/")
    if not slash or not first.isdigit() or not last.isdigit() or not 1 <= int(first) <= int(last):
        raise ValueError(f"--shard {text}: pass k/n, such as 1/4, with k from 1 to n")
    return int(first), int(last)


def parse_solver(text: str) -> tuple[str, Any]:
    """Parse a solver as typed: ``[label=]name[:setting=value,...]``; the name may be ``package.module:Name``.

    Returns:
        The label, and a function that builds the solver from a problem.

    Raises:
        ValueError: If the name is unknown, or if a setting has no value.
    """
    from invflow.cli.options import parse_settings
    from invflow.registry import find_solver, list_solvers, solver_by_name

    label, equals, rest = text.partition("=")
    if not equals or ":" in label:  # the equals sign belongs to a setting
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
