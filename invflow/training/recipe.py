"""Named trainings: everything that ``invflow train NAME`` needs to repeat what made the shipped weights."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

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
    """

    settings: LoopSettings
    folder: Path
    data: str | None = None
    prior: str | None = None
    progress: bool = True
    stop_at: int | None = None


@dataclass(frozen=True)
class Recipe:
    """A named training.

    Attributes:
        name: what the user types.
        description: one line.
        settings: of the loop.
        run: does it, and returns what was trained.
        data: default data, a name that can be downloaded, or None.
    """

    name: str
    description: str
    settings: LoopSettings
    run: Callable[[Run], Any]
    data: str | None = None

    def __call__(self, folder: str | Path, *, data: str | None = None, prior: str | None = None, progress: bool = True,
                 stop_at: int | None = None, **changes: Any) -> Any:
        """Train.

        Args:
            folder: where checkpoint, metrics and result are written; a folder with a checkpoint is resumed.
            data: folder of the data set; default :attr:`data`.
            prior: the prior to start from, where the recipe starts from one.
            progress: show progress bars.
            stop_at: stop at this step, with a checkpoint.
            **changes: fields of :class:`LoopSettings` to change, such as ``steps`` or ``seed``.

        Returns:
            The trained prior or solver.

        Raises:
            TypeError: for a change that is no field of the settings.
        """
        known = {f.name for f in dataclasses.fields(LoopSettings)}
        unknown = sorted(set(changes) - known)
        if unknown:
            raise TypeError(f"unknown settings {unknown}: known are {', '.join(sorted(known))}")
        settings = dataclasses.replace(self.settings, **changes)
        return self.run(Run(settings, Path(folder), data or self.data, prior, progress, stop_at))


def list_recipes() -> dict[str, Recipe]:
    """All recipes by name, from the entry points ``invflow.recipes``; each entry is a module, ``__all__`` its list."""
    found: dict[str, Recipe] = {}
    for entry in entry_points(group=GROUP):
        module = importlib.import_module(entry.value)
        for attribute in module.__all__:
            value = getattr(module, attribute)
            if isinstance(value, Recipe):
                found[value.name] = value
    return dict(sorted(found.items()))


def load_recipe(name: str) -> Recipe:
    """Find a recipe by name.

    Raises:
        ValueError: for an unknown name, with the nearest known one.
    """
    known = list_recipes()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"no training named {name!r}.{hint} Known: {', '.join(known)}")
    return known[name]
