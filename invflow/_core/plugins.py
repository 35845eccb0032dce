"""Plug-ins found by entry point: each entry is a module, its ``__all__`` the list of names it offers.

Whatever is wrong with one of them is told in a warning, and costs nobody else anything.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import operator
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from importlib.metadata import entry_points
from typing import Any

__all__ = ["find", "is_reference", "kebab", "named", "names", "nearest", "offers", "refer"]

#: packages that come with invflow; others may be named invflow_anything
_BUILT_IN = ("invflow.", "invflow_operators.", "invflow_problems.")
#: where in Python a thing is, as in "package.module:function"
_REFERENCE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")
#: what importing somebody else's module may end with; an interruption by the user is none of it
_FAILURES = (Exception, SystemExit)


@functools.cache
def offers(group: str) -> tuple[tuple[str, Any, str], ...]:
    """What is offered under an entry-point group: name, value and the module of each, what comes with invflow first.

    A module that cannot be imported and a name that its module lacks are left out with a warning.
    """
    found: list[tuple[str, Any, str]] = []
    entries = sorted(entry_points(group=group), key=lambda e: (not e.value.startswith(_BUILT_IN), e.value))
    for value in dict.fromkeys(entry.value for entry in entries):
        try:
            module = next(entry for entry in entries if entry.value == value).load()
            listed = module.__all__
            if isinstance(listed, str) or not all(isinstance(name, str) for name in listed):
                raise TypeError(f"its __all__ is {listed!r}, no list of names")
        except _FAILURES as error:
            _leave_out(f"the plug-in {value!r} of {group}", f"its import failed with {error!r}")
            continue
        for name in listed:
            try:
                found.append((name, getattr(module, name), value))
            except _FAILURES as error:
                _leave_out(f"{name!r} of the plug-in {value!r} of {group}", f"its __all__ lists it, but {error}")
    return tuple(found)


def named(group: str, kind: type | tuple[type, ...], name_of: Callable[[str, Any], str | None], *,
          what: str = "", fold: Callable[[str], str] = str) -> dict[str, Any]:
    """What a group offers of one kind, by name, in the order of the modules.

    A second one of a name is left out with a warning, so that nothing of a plug-in's takes the place of what comes
    with invflow.

    Args:
        group: of entry points.
        kind: what is asked for.
        name_of: the name of one, of its name in the module and the thing itself; None for what is not asked for either.
        what: what the group is for, as in "a Recipe": then everything else that is offered is left out with a warning.
        fold: names that are equal after this count as one.
    """
    found: dict[str, Any] = {}
    taken: dict[str, tuple[Any, str]] = {}
    for attribute, value, module in offers(group):
        name: object = name_of(attribute, value) if isinstance(value, kind) else None
        if not isinstance(name, str) or not name:
            if (what and not _serves_several(module)) or name is not None:
                why = f"its name is {name!r}" if name is not None else f"it is {value!r}, not {what}"
                _leave_out(f"{attribute!r} of the plug-in {module!r} of {group}", why)
            continue
        other = taken.setdefault(fold(name), (value, module))
        if other[0] is value:
            found.setdefault(name, value)
        else:
            _leave_out(f"{name!r} of the plug-in {module!r} of {group}", f"{other[1]!r} has one of that name")
    return found


@functools.cache
def _serves_several(module: str) -> bool:
    """Whether a module is named under several groups, so that it lists what is not for all of them."""
    return sum(any(entry.value == module for entry in metadata.entry_points(group=f"invflow.{kind}"))
               for kind in ("operators", "priors", "solvers", "problems", "recipes")) > 1


def names(group: str) -> list[str]:
    """Names that the plug-ins of a group offer, in the order of their modules."""
    return list(dict.fromkeys(name for name, _, _ in offers(group)))


def find(group: str, name: str) -> Any:
    """What a plug-in offers under a name.

    Raises:
        KeyError: if none does.
    """
    for own, value, _ in offers(group):
        if own == name:
            return value
    raise KeyError(name)


def nearest(name: str, known: list[str]) -> str:
    """The end of an error about an unknown name: the nearest known one, else all of them."""
    folded = {k.lower(): k for k in reversed(known)}
    close = difflib.get_close_matches(name.lower(), list(folded), n=1, cutoff=0.5)
    return f"did you mean {folded[close[0]]!r}?" if close else f"known are {', '.join(known)}"


def kebab(name: str) -> str:
    """A Python name as it is typed: ``BoxInpainting`` or ``box_inpainting`` to ``box-inpainting``."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", name).lower().replace("_", "-")


def is_reference(name: object) -> bool:
    """Whether a name is a place in Python, ``package.module:function``, and no file."""
    return isinstance(name, str) and _REFERENCE.fullmatch(name) is not None and not os.path.exists(name)


def refer(name: str) -> Any:
    """What is at ``package.module:name``; modules of the current folder are found too.

    Raises:
        ValueError: if the module cannot be imported or has no such name.
    """
    place, _, attribute = name.partition(":")
    try:
        with _current_folder():
            return operator.attrgetter(attribute)(importlib.import_module(place))
    except _FAILURES as error:
        raise ValueError(f"{name!r} cannot be had: {type(error).__name__}: {error}; pass package.module:name, of a "
                         "module that is installed or lies in the current folder") from error


@contextmanager
def _current_folder() -> Iterator[None]:
    """Let imports look into the current folder, after all other places."""
    folder = os.getcwd()
    sys.path.append(folder)
    try:
        yield
    finally:
        if folder in sys.path:  # an import may have changed the list
            del sys.path[len(sys.path) - 1 - sys.path[::-1].index(folder)]


def _leave_out(what: str, why: str) -> None:
    warnings.warn(f"{what} was left out: {why}", stacklevel=3)
