"""``invflow list``: list priors, operators, problems, solvers and trainings, one line each."""

from __future__ import annotations

import inspect
import json
from typing import Annotated

import typer

__all__ = ["list_names"]


def list_names(kind: Annotated[str | None, typer.Argument(
    help="priors, operators, problems, solvers or trainings [default: all].")] = None) -> None:
    """List all priors, operators, problems, solvers and trainings, one line each."""
    from invflow._core.plugins import nearest

    kinds = {"priors": _priors, "operators": _operators, "problems": _problems, "solvers": _solvers,
             "trainings": _trainings}
    if kind is not None and kind not in kinds:
        raise ValueError(f"there is no kind {kind!r} to list: {nearest(kind, list(kinds))}")
    for i, name in enumerate(kinds if kind is None else [kind]):
        lines = kinds[name]()
        width = max((len(key) for key in lines), default=0)
        typer.echo(("\n" if i else "") + name)
        for key, description in lines.items():
            typer.echo(f"  {key.ljust(width)}  {description}".rstrip())
        if not lines:
            typer.echo("  none")


def _priors() -> dict[str, str]:
    from invflow._core.folders import SHIPPED, shipped_names
    from invflow.models.registered import list_priors

    lines = {}
    for name in shipped_names():
        config = json.loads((SHIPPED / name / "config.json").read_text(encoding="utf-8"))
        if config.get("kind") == "vfm":
            adapter = json.loads((SHIPPED / name / "adapter" / "config.json").read_text(encoding="utf-8"))
            lines[name] = "flow map with its adapter (VFM) for " + ", ".join(adapter["classes"])
        elif config.get("kind") == "flow-map":
            lines[name] = "flow map, states " + " x ".join(str(n) for n in config.get("state_shape", []))
    from invflow.models.downloads import DOWNLOADS

    lines |= {name: _first_line(made) for name, made in list_priors().items() if name not in lines}
    return lines | {name: entry.describe() for name, entry in DOWNLOADS.items()}


def _first_line(thing: object) -> str:
    return (inspect.getdoc(thing) or "").split("\n")[0].replace("``", "")


def _operators() -> dict[str, str]:
    from invflow import operators
    from invflow._core.plugins import kebab

    return {kebab(name): _first_line(operators.find(name)) for name in operators.names()}


def _problems() -> dict[str, str]:
    from invflow.problem import list_problems

    return {name: problem.description for name, problem in list_problems().items()}


def _solvers() -> dict[str, str]:
    from invflow.registry import list_solvers

    return {name: entry.description for name, entry in list_solvers().items()}


def _trainings() -> dict[str, str]:
    from invflow.training.recipe import list_recipes

    return {name: recipe.description for name, recipe in list_recipes().items()}
