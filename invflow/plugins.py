"""What plug-ins build on beside the nouns: the helpers that the built-in operators, problems and tables use too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from invflow._core.checks import Index, as_index, as_shape
from invflow._core.counting import Calls, Countable
from invflow._core.folders import SHIPPED, kind_of
from invflow._core.plugins import refer
from invflow._core.random import as_generator
from invflow._core.records import write_atomically

__all__ = [
    "SHIPPED", "Calls", "Countable", "Index", "SolverEntry", "as_generator", "as_index", "as_shape", "kind_of",
    "write_atomically",
]


@dataclass(frozen=True)
class SolverEntry:
    """A solver under a name of its choice, for a module that the entry points ``invflow.solvers`` name.

    A class whose name will do (``MySolver``, typed ``my-solver``) needs none: its module lists the class itself.

    Attributes:
        name: as it is typed, such as ``"noise-smc"``.
        description: one line.
        target: the class, or the function that builds a solver; or its place, ``"package.module:Name"``, imported when
            it is first built. Its keyword-only parameters are the settings.
        takes: what it is given before its settings: ``"prior"``, a :class:`~invflow.FlowMap`; ``"name"``, the name or
            folder of a prior, by which it finds weights of its own; ``"source"``, the problem if there is one, else the
            prior; or ``"nothing"``.

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
        """The class or function itself."""
        return refer(self.target) if isinstance(self.target, str) else self.target
