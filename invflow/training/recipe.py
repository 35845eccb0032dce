"""Named trainings: everything that ``invflow train NAME`` needs to repeat what made the shipped weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from invflow._core import plugins
from invflow.training.loop import LoopSettings

__all__ = ["Recipe", "Run", "list_recipes", "load_recipe"]

GROUP = "invflow.recipes"


@dataclass(frozen=True)
class Run:
    """One execution of a recipe.

    Attributes:
        settings: of the loop, after the user's changes.
        folder: where everything is written.
        data: the user's data folder, or a name to download; None where the recipe makes its own.
        prior: name or folder of the prior to start from; None takes the recipe's.
        progress: show progress bars.
        stop_at: stop at this step, with a checkpoint.
        size: side to which the user's images are brought; None takes the recipe's.
        operators: names of those to train for; none takes the recipe's.
        say: called with a sentence for each thing assumed or changed.
    """

    settings: LoopSettings
    folder: Path
    data: str | None = None
    prior: str | None = None
    progress: bool = True
    stop_at: int | None = None
    size: int | None = None
    operators: tuple[str, ...] = ()
    say: Callable[[str], None] = print


@dataclass(frozen=True)
class Recipe:
    """A named training.

    Attributes:
        name: what the user types.
        description: one line.
        settings: of the loop.
        run: does it, and returns what was trained.
        data: default data, a name that can be downloaded, or None.
        takes: which of ``"data"``, ``"prior"``, ``"size"`` and ``"operators"`` it looks at; others are refused.
    """

    name: str
    description: str
    settings: LoopSettings
    run: Callable[[Run], Any]
    data: str | None = None
    takes: tuple[str, ...] = ("data", "prior")

    def __call__(self, folder: str | Path, *, data: str | None = None, prior: str | None = None, progress: bool = True,
                 stop_at: int | None = None, size: int | None = None, operators: Sequence[str] = (),
                 say: Callable[[str], None] = print, **changes: Any) -> Any:
        """Train.

        Args:
            folder: where checkpoint, metrics and result are written; a folder with a checkpoint is resumed.
            data: folder of the data set; default :attr:`data`.
            prior: the prior to start from, where the recipe starts from one.
            progress: show progress bars.
            stop_at: stop at this step, with a checkpoint.
            size: side to which images are brought, where the recipe takes images of any size.
            operators: names of those to train for, where the recipe takes any.
            say: called with a sentence for each thing assumed or changed.
            **changes: fields of :class:`LoopSettings` to change, such as ``steps`` or ``seed``.

        Returns:
            The trained prior or solver.

        Raises:
            TypeError: for a change that is no field of the settings.
            ValueError: for a size or operators that the recipe does not look at.
        """
        for option, value in (("size", size), ("operators", operators)):
            if value and option not in self.takes:
                raise ValueError(f"the training {self.name!r} has its own {option}: leave out --{option}; "
                                 f"{'invflow train prior' if option == 'size' else 'invflow train vfm'} takes any")
        known = {f.name for f in dataclasses.fields(LoopSettings)}
        unknown = sorted(set(changes) - known)
        if unknown:
            raise TypeError(f"unknown settings {unknown}: known are {', '.join(sorted(known))}")
        settings = dataclasses.replace(self.settings, **changes)
        return self.run(Run(settings, Path(folder), data or self.data, prior, progress, stop_at, size,
                            tuple(operators), say))


def list_recipes() -> dict[str, Recipe]:
    """All recipes by name, from the entry points ``invflow.recipes``; each entry is a module, ``__all__`` its list.

    What is broken, or has a name that is taken, is left out with a warning.
    """
    found = plugins.named(GROUP, Recipe, lambda _, recipe: recipe.name, what="a Recipe")
    return dict(sorted(found.items()))


def load_recipe(name: str) -> Recipe:
    """Find a recipe by name.

    Raises:
        ValueError: for an unknown name, with the nearest known one.
    """
    known = list_recipes()
    if name not in known:
        raise ValueError(f"there is no training {name!r}: {plugins.nearest(name, list(known))}")
    return known[name]
