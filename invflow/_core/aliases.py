"""Old names of modules: an import finder that resolves them from one table, so that old imports keep working."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

__all__ = ["install"]


class _Alias(Loader):
    """Loader for a module that has the names of other modules, looked up on access."""

    def __init__(self, places: Sequence[str]) -> None:
        self.places = places

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return ModuleType(spec.name, f"Another name of {' and '.join(self.places)}.")

    def exec_module(self, module: ModuleType) -> None:
        _lend(module, self.places)


def _lend(module: ModuleType, places: Sequence[str]) -> None:
    """Let a module look up the names that it lacks in other modules."""

    def lookup(name: str) -> Any:
        for place in () if name.startswith("__") and name != "__all__" else places:
            other = importlib.import_module(place)
            if hasattr(other, name):
                return getattr(other, name)
        raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")

    module.__getattr__ = lookup  # type: ignore[method-assign]


class _Finder(MetaPathFinder):
    def __init__(self, moved: Mapping[str, Sequence[str]], lent: Mapping[str, Sequence[str]]) -> None:
        self.moved, self.lent = moved, lent

    def find_spec(self, fullname: str, path: Sequence[str] | None,
                  target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname in self.moved:
            return ModuleSpec(fullname, _Alias(self.moved[fullname]))
        if fullname not in self.lent:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            execute, places = spec.loader.exec_module, self.lent[fullname]

            def exec_module(module: ModuleType) -> None:
                execute(module)
                _lend(module, places)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def install(moved: Mapping[str, Sequence[str]], lent: Mapping[str, Sequence[str]]) -> None:
    """Resolve imports of old names from now on.

    Args:
        moved: Removed modules, by their old dotted names, each with the modules that have its names now.
        lent: Existing modules that have moved some of their names, each with the modules that have them now.
    """
    sys.meta_path.insert(0, _Finder(moved, lent))
