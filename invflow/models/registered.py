"""Priors of other packages: by the entry point group ``invflow.priors``, or by their Python path."""

from __future__ import annotations

import os
from typing import Any

from invflow._core import plugins
from invflow.flowmap import FlowMap

__all__ = ["build_prior", "list_priors"]

GROUP = "invflow.priors"


def list_priors() -> dict[str, Any]:
    """The priors of plug-ins by name: flow maps, or functions and classes that build one without arguments.

    A plug-in registers a module under the entry-point group ``invflow.priors``; its ``__all__`` is the list. Names
    are typed in lower case with hyphens. Broken entries and names that are already used are skipped with a warning.
    """
    return plugins.named(GROUP, object, lambda name, made: plugins.kebab(name) if _is_door(made) else None,
                         what="a FlowMap, or a function that builds one")


def build_prior(name: str | os.PathLike[str]) -> FlowMap | None:
    """Return the prior registered under a name, or at ``package.module:function``; else None.

    Raises:
        ValueError: If the module cannot be imported or has no such name.
        TypeError: For an object that is not a flow map and builds none.
    """
    made: Any
    if plugins.is_reference(name):
        made = plugins.refer(str(name))
    else:
        made = list_priors().get(str(name))
    if made is None:
        return None
    if not isinstance(made, FlowMap) and callable(made):
        made = made()
    if not isinstance(made, FlowMap):
        raise TypeError(f"the prior {str(name)!r} is a {type(made).__name__}, not a FlowMap: name a function without "
                        "arguments that returns one")
    return made.eval()


def _is_door(made: object) -> bool:
    return isinstance(made, FlowMap) or (issubclass(made, FlowMap) if isinstance(made, type) else callable(made))
