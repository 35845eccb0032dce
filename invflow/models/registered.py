"""Priors of other packages: by the entry points ``invflow.priors``, or by their place in Python."""

from __future__ import annotations

import os
from typing import Any

from invflow._core import plugins
from invflow.flowmap import FlowMap

__all__ = ["build_prior", "list_priors"]

GROUP = "invflow.priors"


def list_priors() -> dict[str, Any]:
    """The priors of plug-ins by name: flow maps, or functions and classes that build one without arguments.

    A plug-in registers a module under the entry-point group ``invflow.priors``; its ``__all__`` is the list, and the
    names are typed in lower case with hyphens. What is broken, or has a name that is taken, is left out with a warning.
    """
    return plugins.named(GROUP, object, lambda name, made: plugins.kebab(name) if _is_door(made) else None,
                         what="a FlowMap, or a function that builds one")


def build_prior(name: str | os.PathLike[str]) -> FlowMap | None:
    """The prior that a plug-in registered under a name, or that is at ``package.module:function``; else None.

    Raises:
        ValueError: for a module that cannot be imported, or has no such name.
        TypeError: for what is no flow map and builds none.
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
        raise TypeError(f"the prior {str(name)!r} is a {type(made).__name__}, no FlowMap: name a function without "
                        "arguments that returns one")
    return made.eval()


def _is_door(made: object) -> bool:
    return isinstance(made, FlowMap) or (issubclass(made, FlowMap) if isinstance(made, type) else callable(made))
