"""Solvers by name, for the command line and for tables of results."""

from __future__ import annotations

import inspect
import os
from typing import TYPE_CHECKING, Any, TypeAlias

from invflow._core import plugins
from invflow._core.checks import check_setting
from invflow.flowmap import FlowMap
from invflow.models.neural import load_prior
from invflow.plugins import SolverEntry
from invflow.problem import Problem, list_problems
from invflow.solver import Solver

if TYPE_CHECKING:
    from collections.abc import Callable

    Source: TypeAlias = Problem | FlowMap | str | os.PathLike[str]

__all__ = ["find_solver", "list_solvers", "solver_by_name"]

GROUP = "invflow.solvers"


def list_solvers() -> dict[str, SolverEntry]:
    """All solvers by name, built-in ones first.

    Plug-ins register a module under the entry-point group ``invflow.solvers``. Its ``__all__`` lists solver classes,
    which are named by their class name in lower case with hyphens, and :class:`~invflow.plugins.SolverEntry` objects
    for other names. A solver that is broken, or whose name is taken, is skipped with a warning.
    """
    found = plugins.named(GROUP, (SolverEntry, type), _name_of, what="a Solver or a SolverEntry", fold=str.lower)
    return {name: _entry(name, offered) for name, offered in found.items()}


def find_solver(name: str) -> SolverEntry:
    """Find a solver's entry by its name.

    Args:
        name: A key of :func:`list_solvers`, or ``package.module:Name`` for a solver class, or a function that builds
            a solver, in a module that is installed or in the current folder.

    Raises:
        ValueError: If the name is unknown (the message names the nearest known one) or the module cannot be imported.
        TypeError: If the name refers to neither a class nor a function.
    """
    if plugins.is_reference(name):
        offered = plugins.refer(name)
        if not callable(offered) or isinstance(offered, Solver):
            raise TypeError(f"{name!r} is a {type(offered).__name__}: expected a solver class, or a function that "
                            "builds a solver, such as package.module:MySolver")
        return _entry(name, offered)
    known = list_solvers()
    if not known:
        raise ValueError(f"no solver is registered under {GROUP!r}: install the package, pip install -e .")
    entry = known.get(name.lower().replace("_", "-"))
    if entry is None:
        several = [part.strip() for part in name.split(",") if part.strip() in known]
        if len(several) > 1:
            options = " ".join(f"--solver {part}" for part in several)
            raise ValueError(f"solver {name!r}: name one at a time, {options}, in Python {several}")
        if name in list_problems():
            raise ValueError(f"{name!r} is a problem, not a solver: solvers are {', '.join(known)}")
        raise ValueError(f"there is no solver {name!r}: {plugins.nearest(name, list(known))}")
    return entry


def _name_of(attribute: str, offered: SolverEntry | type) -> str | None:
    if isinstance(offered, SolverEntry):
        return offered.name
    return plugins.kebab(attribute) if issubclass(offered, Solver) else None


def _entry(name: str, offered: SolverEntry | Callable[..., Any]) -> SolverEntry:
    """Make the entry of a class. Its first parameter is the prior or problem if it is required or has such a name."""
    if isinstance(offered, SolverEntry):
        return offered
    words = (inspect.getdoc(offered) or "").split("\n")[0].replace("``", "")
    first = next(iter(inspect.signature(offered).parameters.values()), None)
    takes = first is not None and first.kind in (first.POSITIONAL_ONLY, first.POSITIONAL_OR_KEYWORD) and (
        first.default is first.empty or first.name == "prior")
    if first is not None and first.name == "problem":
        return SolverEntry(name, words, offered, "source")
    return SolverEntry(name, words, offered, "prior" if takes else "nothing")


def _settings(target: Any) -> list[str]:
    """Names of the settings: keyword-only parameters and parameters with defaults."""
    parameters = list(inspect.signature(target).parameters.values())
    return [p.name for p in parameters
            if p.kind is p.KEYWORD_ONLY or (p.kind is p.POSITIONAL_OR_KEYWORD and p.default is not p.empty)]


def _name(source: Source) -> str | os.PathLike[str]:
    if isinstance(source, Problem):
        if source.prior_name is None:
            raise ValueError(f"no solver was trained for the problem {source.name!r}: use --solver exact, "
                             "fmtt or noise-smc")
        source = source.prior_name
    if isinstance(source, FlowMap) or plugins.is_reference(source):
        kind = type(source).__name__ if isinstance(source, FlowMap) else f"function, {source}"
        raise ValueError(
            f"a trained solver is found by the name of its prior, not by a {kind}: pass "
            "a name such as 'mnist', or a folder"
        )
    return source


def _prior(source: Source) -> FlowMap:
    if isinstance(source, Problem):
        return source.prior
    return source if isinstance(source, FlowMap) else load_prior(source)


def solver_by_name(name: str, source: Source, **settings: Any) -> Solver:
    """Build a solver by its name.

    Args:
        name: Name for :func:`find_solver`, such as ``"vfm"`` or ``"package.module:MySolver"``.
        source: The problem to solve, or the prior: its name, its folder, or the flow map itself.
        **settings: Settings of the solver, such as ``steps=4``.

    Returns:
        The solver, on the CPU.

    Raises:
        ValueError: If the name is unknown (the message names the nearest known one), or if the solver lacks a setting.
        TypeError: If a plug-in does not build a solver.

    Example:
        >>> from invflow.problem import load_problem
        >>> from invflow.registry import solver_by_name
        >>> solver_by_name("exact", load_problem("gaussian/linear"))  # doctest: +SKIP
    """
    entry = find_solver(name)
    target = entry.load()
    arguments: tuple[Any, ...] = ()
    if entry.takes == "prior":
        arguments = (_prior(source),)
    elif entry.takes == "name":
        arguments = (_name(source),)
    elif entry.takes == "source":
        arguments = (source if isinstance(source, Problem) else _prior(source),)
    parameters = inspect.signature(target).parameters
    known = [key for key in _settings(target) if not (arguments and key == "prior")]
    unknown = sorted(set(settings) - set(known))
    if unknown:
        knows = f"it has {', '.join(known)}" if known else "it has none"
        raise ValueError(f"the solver {name!r} has no setting {unknown[0]!r}: {knows}")
    checked = {key: check_setting(f"the solver {name!r}", key, value, parameters[key])
               for key, value in settings.items()}
    solver = target(*arguments, **checked)
    if not isinstance(solver, Solver):
        raise TypeError(f"the solver {name!r} of {entry.target!r} is a {type(solver).__name__}, not an invflow.Solver")
    return solver
