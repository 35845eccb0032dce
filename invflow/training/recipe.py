"""Training recipes: everything that ``invflow train NAME`` needs to reproduce the shipped weights."""

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
        settings: Settings of the loop, with the user's changes.
        folder: Folder for all output.
        data: The user's data folder, or a name to download; None if the recipe generates its own data.
        prior: Name or folder of the prior to start from; None uses the recipe's.
        progress: Whether to show progress bars.
        stop_at: Step at which to stop, with a checkpoint.
        size: Side to which the user's images are resized; None uses the recipe's.
        operators: Names of the operators to train for; none uses the recipe's.
        say: Function called with a sentence for each assumption or change.
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
    """A named training recipe.

    Attributes:
        name: Name that the user types.
        description: Description in one line.
        settings: Settings of the loop.
        run: Function that runs the training and returns the trained object.
        data: Default data, a name that can be downloaded, or None.
        takes: Which of ``"data"``, ``"prior"``, ``"size"`` and ``"operators"`` it uses; others are rejected.
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
            folder: Folder for checkpoint, metrics and result; a folder with a checkpoint is resumed.
            data: Folder of the data set; default :attr:`data`.
            prior: Prior to start from, if the recipe starts from one.
            progress: Whether to show progress bars.
            stop_at: Step at which to stop, with a checkpoint.
            size: Side to which images are resized, if the recipe supports any size.
            operators: Names of operators to train for, if the recipe supports any.
            say: Function called with a sentence for each assumption or change.
            **changes: Fields of :class:`LoopSettings` to change, such as ``steps`` or ``seed``.

        Returns:
            The trained prior or solver.

        Raises:
            TypeError: For a change that is not a field of the settings.
            ValueError: For a size or operators that the recipe does not use.
        """
        for option, value in (("size", size), ("operators", operators)):
            if value and option not in self.takes:
                raise ValueError(f"the training {self.name!r} takes no --{option}: leave it out; "
                                 f"{'invflow train prior' if option == 'size' else 'invflow train vfm'} takes any")
        known = {f.name for f in dataclasses.fields(LoopSettings)}
        unknown = sorted(set(changes) - known)
        if unknown:
            raise TypeError(f"unknown settings {unknown}: known are {', '.join(sorted(known))}")
        settings = dataclasses.replace(self.settings, **changes)
        return self.run(Run(settings, Path(folder), data or self.data, prior, progress, stop_at, size,
                            tuple(operators), say))


def list_recipes() -> dict[str, Recipe]:
    """All recipes by name, from the entry points ``invflow.recipes``; each is a module whose ``__all__`` lists them.

    Broken entries and names that are already used are skipped with a warning.
    """
    found = plugins.named(GROUP, Recipe, lambda _, recipe: recipe.name, what="a Recipe")
    return dict(sorted(found.items()))


def load_recipe(name: str) -> Recipe:
    """Find a recipe by name.

    Raises:
        ValueError: For an unknown name; the message gives the nearest known one.
    """
    known = list_recipes()
    if name not in known:
        raise ValueError(f"there is no training {name!r}: {plugins.nearest(name, list(known))}")
    return known[name]
