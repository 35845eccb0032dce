"""Digests of everything that determines an object's numbers: objects with equal digests give equal numbers."""

from __future__ import annotations

import dataclasses
import enum
import functools
import hashlib
import pathlib
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from invflow._core.provenance import (
    CLASS_NOISE,
    DATACLASS_METHODS,
    DESCRIPTORS,
    by_version,
    cell_of,
    generated,
    globals_of,
    installed,
    is_known,
    version_of,
)
from invflow._core.watch import version

__all__ = ["Reader", "UnidentifiedError", "identity"]

_MODULE_STATE = frozenset(vars(nn.Module())) - {"training"} | {"_compiled_call_impl"}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


class UnidentifiedError(TypeError):
    """Raised for an object whose content cannot be read, and which therefore has no digest."""


def identity(value: object) -> str:
    """Digest of an object's content, the same in every process: 32 hexadecimal digits.

    Two objects with the same digest give the same numbers. The digest covers:

    - numbers, strings and containers by value;
    - tensors and arrays by type, shape and bytes, on any device;
    - modules by all their parameters and buffers, stored or not, and by their attributes;
    - functions and classes by name, bytecode, defaults and closure, and those of a user's own code also by the globals
      that they read;
    - classes of this library, and everything in its dependencies, by name and version;
    - other objects by class and attributes.

    A class may define its own ``fingerprint()``: the string that it returns replaces the content. Attributes named in
    the class's ``_derived`` (caches) are left out. A class of this library with attributes that do not all matter may
    define ``_identified()``: the object that it returns is read instead.

    Args:
        value: Any object.

    Raises:
        UnidentifiedError: For an object that cannot be read, such as an open file, a socket or a lock, with the path
            of attributes that leads to it.

    Example:
        >>> import torch
        >>> from invflow._core.identity import identity
        >>> layer = torch.nn.Linear(2, 1)
        >>> before = identity(layer)
        >>> with torch.no_grad():
        ...     _ = layer.weight.add_(1)
        >>> identity(layer) == before
        False
    """
    return Reader().read(value).hex()


# -- tensors -----------------------------------------------------------------------------------------------------------

#: digests of tensors that still exist, by id
_TENSORS: dict[int, tuple[weakref.ref[Tensor], int, int, bytes]] = {}


def _tensor_bytes(x: Tensor, exact: bool) -> bytes:
    """Digest of a tensor. Unless ``exact``, the last digest is reused if the tensor has not been written to since."""
    written, key = version(x), id(x)
    known = _TENSORS.get(key)
    if not exact and known is not None and known[0]() is x and known[1:3] == (written, x.data_ptr()):
        return known[3]
    found = hashlib.blake2b(f"{x.dtype} {tuple(x.shape)}".encode(), digest_size=16)
    if x.numel():
        plain = x.detach().cpu().resolve_conj().resolve_neg().contiguous()
        # along a dimension of size 1 a contiguous tensor may have any stride, which flattening would keep
        flat = plain.as_strided((plain.numel(),), (1,), plain.storage_offset())
        found.update(flat.view(torch.uint8).numpy().data)
    digest = found.digest()
    if written is not None:
        reference = weakref.ref(x, lambda gone: _TENSORS.pop(key, None) if _is(key, gone) else None)
        _TENSORS[key] = (reference, written, x.data_ptr(), digest)
    return digest


def _is(key: int, reference: weakref.ref[Tensor]) -> bool:
    """Whether an entry still belongs to the deleted tensor, not to a later one with the same id."""
    known = _TENSORS.get(key)
    return known is not None and known[0] is reference


# -- everything else ---------------------------------------------------------------------------------------------------


class Reader:
    """One traversal of an object. Parts that occur twice are read once."""

    def __init__(self, exact: bool = True) -> None:
        self.exact, self.tensors, self.asked = exact, list[Tensor](), False
        self._done: dict[int, tuple[object, bytes]] = {}  # holds the object too, so that its id is not reused
        self._open: dict[int, int] = {}
        self._way: list[str] = []

    def read(self, value: object) -> bytes:
        """Digest of a value."""
        if value is None or (isinstance(value, (bool, int, float, complex, str, bytes)) and type(value) in _PLAIN):
            return _hash(type(value).__name__, repr(value).encode())
        key = id(value)
        if key in self._done:
            return self._done[key][1]
        if key in self._open:  # a reference back to an enclosing object
            return _hash("back", str(len(self._open) - self._open[key]).encode())
        self._open[key] = len(self._open)
        try:
            found = self._content(value)
        finally:
            del self._open[key]
        self._done[key] = (value, found)
        return found

    @contextmanager
    def _at(self, step: str) -> Iterator[None]:
        self._way.append(step)
        yield
        self._way.pop()

    def _fail(self, value: object, why: str = "its content cannot be read") -> UnidentifiedError:
        way = "".join(self._way).lstrip(".") or "the object"
        return UnidentifiedError(f"{way} is a {type(value).__module__}.{type(value).__qualname__}, which cannot be "
                                 f"identified: {why}. Define fingerprint() in its class: a string that changes with "
                                 "everything that determines its numbers")

    def _all(self, kind: str, parts: Iterable[tuple[str, object]]) -> bytes:
        """Digest of named parts in their order."""
        found = []
        for name, part in parts:
            with self._at(name):
                found.append(_hash(name, self.read(part)))
        return _hash(kind, *found)

    def _content(self, value: Any) -> bytes:
        own = _own_fingerprint(value)
        if own is not None:
            self.asked = True
            return _hash("own", self.read(type(value)), str(own()).encode())
        stated = getattr(type(value), "_identified", None)
        if stated is not None:
            return _hash("stated", self.read(type(value)), self.read(stated(value)))
        for kinds, method in _READERS:
            if isinstance(value, kinds):
                found: bytes = getattr(self, method)(value)
                return found
        return self._object(value)

    def _tensor(self, value: Tensor) -> bytes:
        if value.is_meta:
            raise self._fail(value, "a tensor on the meta device holds no numbers")
        if value.layout is not torch.strided:
            return _hash("tensor", str(value.layout).encode(), self.read(value.to_dense()))
        self.tensors.append(value)
        return _hash("tensor", _tensor_bytes(value, self.exact))

    def _array(self, value: np.ndarray) -> bytes:
        if value.dtype.hasobject:
            return self._all("array", [(".shape", value.shape), (".items", value.ravel().tolist())])
        return _hash("array", f"{value.dtype.str} {value.shape}".encode(), np.ascontiguousarray(value).tobytes())

    def _module(self, value: nn.Module) -> bytes:
        original = vars(value).get("_modules", {}).get("_orig_mod")
        if original is not None:  # what torch.compile wraps
            return self.read(original)
        parts = {**_attributes(value, _MODULE_STATE), **value._parameters, **value._buffers, **value._modules}
        hooks = [(f".{name}", list(vars(value)[name].values())) for name in _HOOKS if vars(value).get(name)]
        with self._at(".__class__"):
            kind = self.read(type(value))
        return _hash("module", kind, self._all("state", [*((f".{k}", parts[k]) for k in sorted(parts)), *hooks]))

    def _mapping(self, value: Mapping[Any, Any]) -> bytes:
        items = []
        for key, item in value.items():
            with self._at(f"[{key!r}]"):
                items.append(_hash("item", self.read(key), self.read(item)))
        return _hash("mapping", self._named(value, dict, types.MappingProxyType), *sorted(items))

    def _sequence(self, value: Any) -> bytes:
        named = self._named(value, list, tuple, deque, torch.Size)
        items = self._all("items", ((f"[{i}]", item) for i, item in enumerate(value)))
        return _hash(type(value).__name__, named, items)

    def _set(self, value: AbstractSet[Any]) -> bytes:
        return _hash("set", self._named(value, set, frozenset), *sorted(self.read(item) for item in value))

    def _named(self, value: object, *plain: type) -> bytes:
        """Digest of a container's class and attributes; empty for Python's own containers."""
        if type(value) in plain:
            return b""
        return _hash("container", self.read(type(value)),
                     self._all("state", ((f".{k}", v) for k, v in sorted(_attributes(value).items()))))

    def _partial(self, value: functools.partial[Any]) -> bytes:
        return self._all("partial", [(".func", value.func), (".args", value.args), (".keywords", value.keywords)])

    def _method(self, value: types.MethodType) -> bytes:
        return self._all("method", [(f".{value.__name__}", value.__func__), (".__self__", value.__self__)])

    def _builtin(self, value: Any) -> bytes:
        owner = getattr(value, "__self__", None)
        name = f"{getattr(value, '__module__', None)}.{value.__qualname__}"
        if owner is None or isinstance(owner, types.ModuleType):
            return _hash("builtin", name.encode())
        return _hash("builtin", name.encode(), self.read(owner))

    def _function(self, value: types.FunctionType) -> bytes:
        parts: list[tuple[str, object]] = [
            ("(defaults)", value.__defaults__), ("(defaults by name)", value.__kwdefaults__),
            *((f"({name})", cell_of(cell)) for name, cell in
              zip(value.__code__.co_freevars, value.__closure__ or (), strict=True)),
            *((f".{name}", item) for name, item in sorted(vars(value).items())),
        ]
        place = version_of(value.__module__)
        found = [f"{value.__module__}.{value.__qualname__}".encode(), place.encode()]
        if not is_known(value.__module__):
            found.append(self._code(value.__code__))  # also for our own code: two lambdas may have the same name
        if not by_version(value.__module__) and not installed(value.__module__):
            parts += [(f"({name})", item) for name, item in globals_of(value)]
        with self._at(f".{value.__name__}"):
            return _hash("function", *found, self._all("parts", parts))

    def _code(self, code: types.CodeType) -> bytes:
        constants = [self._code(c) if isinstance(c, types.CodeType) else self.read(c) for c in code.co_consts]
        names = repr((code.co_names, code.co_varnames, code.co_freevars, code.co_argcount, code.co_kwonlyargcount,
                      code.co_flags))
        return _hash("code", code.co_code, names.encode(), *constants)

    def _class(self, value: type) -> bytes:
        name = f"{value.__module__}.{value.__qualname__}".encode()
        place = version_of(value.__module__).encode()
        if by_version(value.__module__):
            return _hash("class", name, place)
        if issubclass(value, enum.Enum):
            return self._all("enum", [(f".{m.name}", m.value) for m in value])
        written = dataclasses.is_dataclass(value)
        parts = [(f".{key}", item) for key, item in sorted(vars(value).items())
                 if key not in CLASS_NOISE and not isinstance(item, DESCRIPTORS)
                 and not (written and key in DATACLASS_METHODS and generated(item))
                 and not (issubclass(value, tuple) and hasattr(value, "_fields") and key.startswith("_"))]
        with self._at(f"{value.__qualname__}"):
            bases = [self.read(base) for base in value.__bases__]
            return _hash("class", name, place, *bases, self._all("body", parts))

    def _static(self, value: Any) -> bytes:
        return _hash(type(value).__name__, self.read(value.__func__))

    def _property(self, value: property) -> bytes:
        return self._all("property", [(".fget", value.fget), (".fset", value.fset)])

    def _cached_property(self, value: functools.cached_property[Any]) -> bytes:
        return _hash("cached_property", self.read(value.func))

    def _enum(self, value: enum.Enum) -> bytes:
        return _hash("enum", self.read(type(value)), value.name.encode())

    def _library(self, value: types.ModuleType) -> bytes:
        """Digest of a Python module: by version if it was installed, by its content if it is the user's own."""
        name = f"module {value.__name__}".encode()
        if by_version(value.__name__) or installed(value.__name__):
            return _hash("name", name, version_of(value.__name__).encode())
        own = sorted((key, item) for key, item in vars(value).items() if not (key[:2] == key[-2:] == "__"))
        return _hash("library", name, self._all("names", ((f".{key}", item) for key, item in own)))

    def _by_text(self, value: Any) -> bytes:
        return _hash("text", f"{type(value).__qualname__} {value}".encode())

    def _object(self, value: object) -> bytes:
        if hasattr(value, "__dict__") or any("__slots__" in vars(kind) for kind in type(value).__mro__[:-1]):
            with self._at(".__class__"):
                kind = self.read(type(value))
            attributes = sorted(_attributes(value).items())
            wrapped = getattr(value, "__wrapped__", None)
            if not attributes and wrapped is not None:
                attributes = [("__wrapped__", wrapped)]
            hidden = self._reduced(value) if _holds_more(type(value)) else b""
            return _hash("object", kind, self._all("state", ((f".{k}", v) for k, v in attributes)), hidden)
        return self._reduced(value)

    def _reduced(self, value: object) -> bytes:
        """Digest of what a pickle would contain, for objects whose attributes do not hold all of their content."""
        try:
            reduced: Any = value.__reduce_ex__(2)
        except Exception as error:
            raise self._fail(value) from error
        if isinstance(reduced, str):
            return _hash("name", f"{type(value).__module__}.{reduced}".encode())
        return self._all("reduced", ((f"(part {i})", list(part) if i > 2 and part is not None else part)
                                     for i, part in enumerate(reduced)))


_PLAIN = {bool, int, float, complex, str, bytes}

_READERS: list[tuple[Any, str]] = [
    (Tensor, "_tensor"), (np.ndarray, "_array"), (nn.Module, "_module"), (type, "_class"), (enum.Enum, "_enum"),
    ((torch.dtype, torch.device, torch.layout, pathlib.PurePath, types.GenericAlias, types.UnionType), "_by_text"),
    (types.ModuleType, "_library"), (functools.partial, "_partial"), (types.FunctionType, "_function"),
    (types.MethodType, "_method"), ((types.BuiltinFunctionType, types.MethodDescriptorType), "_builtin"),
    ((staticmethod, classmethod), "_static"), (property, "_property"),
    (functools.cached_property, "_cached_property"),
    (Mapping, "_mapping"), ((list, tuple, deque), "_sequence"), (AbstractSet, "_set"),
]


def _hash(kind: str, *parts: bytes) -> bytes:
    """Digest of parts with their lengths, so that no two lists of parts look the same."""
    found = hashlib.blake2b(kind.encode(), digest_size=16)
    for part in parts:
        found.update(len(part).to_bytes(8, "little"))
        found.update(part)
    return found.digest()


def _attributes(value: object, without: AbstractSet[str] = frozenset()) -> dict[str, object]:
    """Attributes of an object, in its dictionary or in slots, without those derived from others."""
    kind = type(value)
    found = dict(getattr(value, "__dict__", {}))
    for base in kind.__mro__:
        for name in _slots(base):
            if name not in ("__dict__", "__weakref__") and hasattr(value, name):
                found[name] = getattr(value, name)
    derived = frozenset().union(*(vars(base).get("_derived", ()) for base in kind.__mro__))
    return {name: item for name, item in found.items() if name not in without and name not in derived
            and not isinstance(getattr(kind, name, None), functools.cached_property)}


class _Plain:
    """A class whose objects hold attributes and nothing else."""


def _slots(kind: type) -> tuple[str, ...]:
    """Names of the slots that a class itself defines."""
    slots = vars(kind).get("__slots__", ())
    return (slots,) if isinstance(slots, str) else tuple(slots)


def _holds_more(kind: type) -> bool:
    """Whether objects of a class hold more than attributes, such as the C data of files, sockets or random states."""
    slots = sum(isinstance(vars(base).get(name), types.MemberDescriptorType) for base in kind.__mro__
                for name in _slots(base))
    return bool(kind.__itemsize__) or kind.__basicsize__ > _Plain.__basicsize__ + slots * tuple.__itemsize__


def _own_fingerprint(value: object) -> Callable[[], object] | None:
    """The ``fingerprint`` method that a third-party class defines for its objects."""
    method = getattr(type(value), "fingerprint", None)
    if not isinstance(method, types.FunctionType) or by_version(method.__module__):
        return None
    return functools.partial(method, value)
