"""Helpers for plug-ins, in addition to the six nouns; the built-in operators, problems and tables use them too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from invflow._core.checks import Index, as_index, as_shape
from invflow._core.counting import Calls, Countable
from invflow._core.files import write_atomically, write_text
from invflow._core.folders import SHIPPED, kind_of
from invflow._core.plugins import refer
from invflow._core.random import as_generator

__all__ = [
    "SHIPPED", "Calls", "Countable", "Index", "SolverEntry", "as_generator", "as_index", "as_shape", "kind_of",
    "write_atomically", "write_text",
]


@dataclass(frozen=True)
class SolverEntry:
    """Registers a solver under a chosen name, in a module that the entry point ``invflow.solvers`` points to.

    A class whose own name is good enough (``MySolver``, typed ``my-solver``) needs no entry: the module lists the class
    itself.

    Attributes:
        name: Name as typed by the user, such as ``"noise-smc"``.
        description: One line.
        target: The class, or the function that builds a solver; or its location, ``"package.module:Name"``, imported
            when a solver is first built. Its keyword-only parameters are the settings.
        takes: First argument: ``"prior"``, a :class:`~invflow.FlowMap`; ``"name"``, the name or folder of a prior, by
            which the solver finds its own weights; ``"source"``, the problem if there is one, else the prior; or
            ``"nothing"``.

    Example:
        >>> from invflow.plugins import SolverEntry
        >>> SolverEntry("euler", "FMTT in ten steps", "invflow.solvers.tilting.fmtt:FMTT").load().__name__
        'FMTT'
    """

    name: str
    description: str
    target: Callable[..., Any] | str
    takes: Literal["prior", "name", "source", "nothing"] = "prior"

    def load(self) -> Callable[..., Any]:
        """Import and return the class or function."""
        return refer(self.target) if isinstance(self.target, str) else self.target
