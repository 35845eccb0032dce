"""Where code comes from: packages that are known by their version, and a user's own, which its content tells."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator

from invflow._core.version import VERSION

__all__ = [
    "CLASS_NOISE", "DATACLASS_METHODS", "DESCRIPTORS", "by_version", "cell_of", "generated", "globals_of", "installed",
    "is_known", "version_of",
]

#: packages whose code is known by its version
_KNOWN = {*sys.stdlib_module_names, "builtins", "torch", "torchvision", "numpy", "scipy", "PIL", "deepinv",
          "safetensors"}
_OURS = {"invflow", "invflow_operators", "invflow_problems"}

#: of a class: what says nothing about its numbers, or follows from the rest
CLASS_NOISE = frozenset({
    "__module__", "__doc__", "__dict__", "__weakref__", "__qualname__", "__annotations__", "__annotate__",
    "__annotate_func__", "__annotations_cache__", "__abstractmethods__", "_abc_impl", "__parameters__",
    "__orig_bases__", "__slots__", "__match_args__", "__static_attributes__", "__firstlineno__",
    "__slotnames__", "__dataclass_fields__", "__dataclass_params__", "__protocol_attrs__", "_is_protocol",
    "_is_runtime_protocol",
})
DATACLASS_METHODS = frozenset({
    "__init__", "__repr__", "__eq__", "__hash__", "__setattr__", "__delattr__", "__lt__", "__le__", "__gt__", "__ge__",
    "__replace__",
})
DESCRIPTORS = (types.MemberDescriptorType, types.GetSetDescriptorType, types.WrapperDescriptorType)


def package_of(module: str | None) -> str:
    """The first part of a module's name."""
    return (module or "").split(".")[0]


def is_known(module: str | None) -> bool:
    """Whether a module is of Python or of a package that the library stands on, whose code changes with its version."""
    return package_of(module) in _KNOWN


def by_version(module: str | None) -> bool:
    """Whether code of a module is known by the version of its package."""
    return is_known(module) or package_of(module) in _OURS


def version_of(module: str | None) -> str:
    """The version of the package that a module belongs to, where it says one."""
    if package_of(module) in _OURS:
        return VERSION
    if package_of(module) in sys.stdlib_module_names:
        return ""
    return str(getattr(sys.modules.get(package_of(module)), "__version__", ""))


def installed(module: str | None) -> bool:
    """Whether a module was installed, so that its helpers change with its version alone."""
    file = getattr(sys.modules.get(module or ""), "__file__", None) or ""
    return "site-packages" in file or "dist-packages" in file


def cell_of(cell: types.CellType) -> object:
    """What a function closes over; None where it is not filled yet."""
    try:
        return cell.cell_contents
    except ValueError:
        return None


def generated(item: object) -> bool:
    """Whether a method was made by a decorator of dataclasses."""
    while hasattr(item, "__wrapped__"):
        item = item.__wrapped__
    return item is None or getattr(getattr(item, "__code__", None), "co_filename", "") == "<string>"


def globals_of(function: types.FunctionType) -> Iterator[tuple[str, object]]:
    """The globals that a function reads, with what it reads of modules that were not installed."""
    names, codes = set[str](), [function.__code__]
    while codes:
        code = codes.pop()
        names |= set(code.co_names)
        codes += [c for c in code.co_consts if isinstance(c, types.CodeType)]
    for name in sorted(names):
        if name not in function.__globals__:
            continue
        item = function.__globals__[name]
        if isinstance(item, types.ModuleType) and not by_version(item.__name__) and not installed(item.__name__):
            yield name, item.__name__
            yield from ((f"{name}.{inner}", vars(item)[inner]) for inner in sorted(names & vars(item).keys()))
        else:
            yield name, item
