"""Plug-ins found by entry points: each entry is a module whose ``__all__`` lists the names that it offers.

A broken plug-in gives a warning and does not affect the others.
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

#: packages that come with invflow; other packages may also be named invflow_anything
_BUILT_IN = ("invflow.", "invflow_operators.", "invflow_problems.")
#: a reference to a Python object, as in "package.module:function"
_REFERENCE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")
#: exceptions to expect when importing a third-party module; an interruption by the user is not among them
_FAILURES = (Exception, SystemExit)


@functools.cache
def offers(group: str) -> tuple[tuple[str, Any, str], ...]:
    """Everything offered under an entry-point group: name, value and module of each; those of invflow come first.

    Modules that cannot be imported, and names that their module lacks, are left out with a warning.
    """
    found: list[tuple[str, Any, str]] = []
    entries = sorted(entry_points(group=group), key=lambda e: (not e.value.startswith(_BUILT_IN), e.value))
    for value in dict.fromkeys(entry.value for entry in entries):
        try:
            module = next(entry for entry in entries if entry.value == value).load()
            listed = module.__all__
            if isinstance(listed, str) or not all(isinstance(name, str) for name in listed):
                raise TypeError(f"its __all__ is {listed!r}, not a list of names")
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
    """Objects of one kind that a group offers, by name, in the order of the modules.

    If a name occurs again, the later object is left out with a warning, so that no plug-in can replace a part of
    invflow.

    Args:
        group: Entry-point group.
        kind: Type of the objects.
        name_of: Function that returns an object's name, given its name in the module and the object. None leaves the
            object out.
        what: Purpose of the group, as in "a Recipe". If given, everything else is left out with a warning.
        fold: Function that normalises names before they are compared.
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
            _leave_out(f"{name!r} of the plug-in {module!r} of {group}", f"{other[1]!r} already offers that name")
    return found


@functools.cache
def _serves_several(module: str) -> bool:
    """Whether a module is registered under several groups, so that not all of its names are meant for each of them."""
    return sum(any(entry.value == module for entry in metadata.entry_points(group=f"invflow.{kind}"))
               for kind in ("operators", "priors", "solvers", "problems", "recipes")) > 1


def names(group: str) -> list[str]:
    """Names that the plug-ins of a group offer, in the order of their modules."""
    return list(dict.fromkeys(name for name, _, _ in offers(group)))


def find(group: str, name: str) -> Any:
    """The object that a plug-in offers under a name.

    Raises:
        KeyError: If no plug-in offers the name.
    """
    for own, value, _ in offers(group):
        if own == name:
            return value
    raise KeyError(name)


def nearest(name: str, known: list[str]) -> str:
    """End of an error about an unknown name: the nearest known name, or else all of them."""
    folded = {k.lower(): k for k in reversed(known)}
    close = difflib.get_close_matches(name.lower(), list(folded), n=1, cutoff=0.5)
    return f"did you mean {folded[close[0]]!r}?" if close else f"known are {', '.join(known)}"


def kebab(name: str) -> str:
    """Convert a Python name to its command-line form: ``BoxInpainting`` or ``box_inpainting`` to ``box-inpainting``."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", name).lower().replace("_", "-")


def is_reference(name: object) -> bool:
    """Whether a name is a Python reference, ``package.module:function``, and not a file."""
    return isinstance(name, str) and _REFERENCE.fullmatch(name) is not None and not os.path.exists(name)


def refer(name: str) -> Any:
    """Import the object ``package.module:name``. Modules in the current folder are found too.

    Raises:
        ValueError: If the module cannot be imported or has no such name.
    """
    place, _, attribute = name.partition(":")
    try:
        with _current_folder():
            return operator.attrgetter(attribute)(importlib.import_module(place))
    except _FAILURES as error:
        raise ValueError(f"{name!r} cannot be imported: {type(error).__name__}: {error}; pass package.module:name, "
                         "where the module is installed or in the current folder") from error


@contextmanager
def _current_folder() -> Iterator[None]:
    """Let imports search the current folder, after all other places."""
    folder = os.getcwd()
    sys.path.append(folder)
    try:
        yield
    finally:
        if folder in sys.path:  # the import may have changed the list
            del sys.path[len(sys.path) - 1 - sys.path[::-1].index(folder)]


def _leave_out(what: str, why: str) -> None:
    warnings.warn(f"{what} was left out: {why}", stacklevel=3)
