"""Plug-ins found by entry point: each entry is a module, its ``__all__`` the list of names it offers."""

from __future__ import annotations

import difflib
import functools
import warnings
from importlib.metadata import entry_points
from types import ModuleType
from typing import Any

__all__ = ["find", "modules", "names", "nearest"]

#: packages that come with invflow; others may be named invflow_anything
_BUILT_IN = ("invflow_operators.", "invflow_problems.")


@functools.cache
def modules(group: str) -> tuple[ModuleType, ...]:
    """Modules registered under an entry-point group, those that come with invflow first.

    An entry that cannot be imported is left out with a warning: one broken package must not take the rest
        along.
    """
    found = []
    entries = sorted(entry_points(group=group), key=lambda e: (not e.value.startswith(_BUILT_IN), e.value))
    for entry in entries:
        try:
            module = entry.load()
        except Exception as error:
            warnings.warn(f"the plug-in {entry.name} = {entry.value!r} of {group} was left out: its import "
                          f"failed with {error!r}", stacklevel=2)
            continue
        if module not in found:
            found.append(module)
    return tuple(found)


def names(group: str) -> list[str]:
    """Names that the plug-ins of a group offer, in the order of their modules."""
    return list(dict.fromkeys(name for module in modules(group) for name in getattr(module, "__all__", ())))


def find(group: str, name: str) -> Any:
    """What a plug-in offers under a name.

    Raises:
        KeyError: if none does.
    """
    for module in modules(group):
        if name in getattr(module, "__all__", ()):
            return getattr(module, name)
    raise KeyError(name)


def nearest(name: str, known: list[str]) -> str:
    """The end of an error about an unknown name: the nearest known one, else all of them."""
    folded = {k.lower(): k for k in reversed(known)}
    close = difflib.get_close_matches(name.lower(), list(folded), n=1, cutoff=0.5)
    return f"did you mean {folded[close[0]]!r}?" if close else f"known are {', '.join(known)}"
