"""Cached digests for use at each sample. They are kept as long as tensors are not written to."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn

from invflow._core.identity import Reader, UnidentifiedError
from invflow._core.watch import version

__all__ = ["quick_identity", "remembered", "trusting"]


@dataclasses.dataclass
class _Trust:
    """State of :func:`trusting`: the objects that were checked, by id, if one check is enough."""

    once: bool
    looked: dict[int, object] = dataclasses.field(default_factory=dict)


_TRUST: ContextVar[_Trust | None] = ContextVar("invflow_trust_versions", default=None)


@contextmanager
def trusting(*, once: bool = False) -> Iterator[None]:
    """Cache digests as long as the versions of tensors do not change, for digests needed at each sample.

    Args:
        once: Whether nothing changes inside, so that each object is checked only once.
    """
    before = _TRUST.set(_Trust(once))
    try:
        yield
    finally:
        _TRUST.reset(before)


def quick_identity(value: object) -> str | None:
    """Same as ``identity``, but None for objects that cannot be identified, and fast inside :func:`trusting`.

    There the content is read again only if one of its tensors was written to or replaced, or an attribute of the object
    itself was set. Writes through ``tensor.data`` and attributes set on a part are not detected. Objects with their own
    ``fingerprint()`` are asked each time.
    """
    reader = Reader(exact=_TRUST.get() is None)

    def read() -> str | None:
        try:
            return reader.read(value).hex()
        except UnidentifiedError:
            return None

    return _remembered(value, "identity", read, reader)


def remembered(module: nn.Module, digest: Callable[[nn.Module], str]) -> str:
    """Digest of a module's weights; inside :func:`trusting`, recomputed only if one was written to or replaced.

    Args:
        module: Module with the weights.
        digest: Function of a module that depends only on its weights.
    """
    found = _remembered(module, digest, lambda: digest(module), None)
    assert found is not None
    return found


def _remembered(value: object, key: object, compute: Callable[[], str | None], reader: Reader | None) -> str | None:
    """Digest from the cache, inside :func:`trusting` and if the object has not changed; computed otherwise."""
    trust = _TRUST.get()
    # tensors compare element by element, even as keys; objects without hashes or weak references are not cached
    if trust is None or isinstance(value, Tensor):
        return compute()
    try:
        known = _SEEN.get(value)
    except TypeError:
        return compute()
    if known is not None and id(value) not in trust.looked and not known.holds(value):
        known = None
    if known is None or key not in known.digests:
        found = compute()
        if reader is not None and reader.asked:
            return found
        # an object may hold tensors that are not its parameters: both are watched
        read = [] if reader is None else reader.tensors
        known = _Seen(value, read, {} if known is None else known.digests, [] if known is None else known.tensors())
        known.digests[key] = found
        try:
            _SEEN[value] = known
        except TypeError:
            return found
    if trust.once:
        trust.looked[id(value)] = value  # holds the object, so that its id is not reused
    return known.digests[key]


class _Seen:
    """Digests of an object, and the information that shows whether they are still valid."""

    def __init__(self, value: object, read: Iterable[Tensor], digests: dict[object, str | None],
                 before: Iterable[Tensor]) -> None:
        self.digests = digests
        own = (*value.parameters(), *value.buffers()) if isinstance(value, nn.Module) else ()
        watched = list({id(x): x for x in (*own, *read, *before)}.values())
        self._tensors, self._versions = [weakref.ref(x) for x in watched], [version(x) for x in watched]
        # some are enough: moving a module or changing its type gives all of its tensors new addresses
        self._places = [(weakref.ref(x), x.data_ptr()) for x in watched[:1] + watched[-1:]]
        self._surface = _surface(value)
        # the ids of numbers and strings stay valid as long as these are held
        self._kept = [item for item in getattr(value, "__dict__", {}).values()
                      if isinstance(item, (bool, int, float, str, tuple))]

    def tensors(self) -> list[Tensor]:
        """Tensors that are watched."""
        return [x for x in (reference() for reference in self._tensors) if x is not None]

    def holds(self, value: object) -> bool:
        """Whether no tensor was written to or replaced (and thereby deleted), and no attribute was set."""
        try:
            return (all(x().data_ptr() == place for x, place in self._places)  # type: ignore[union-attr]
                    and [x()._version for x in self._tensors] == self._versions  # type: ignore[union-attr]
                    and _surface(value) == self._surface)
        except (AttributeError, RuntimeError):  # the tensor is gone, or was made in inference mode
            return False


_SEEN: weakref.WeakKeyDictionary[Any, _Seen] = weakref.WeakKeyDictionary()


def _surface(value: object) -> tuple[list[str], list[int]]:
    """Names and ids of an object's own attributes and a module's parts."""
    parts = getattr(value, "__dict__", {})
    if isinstance(value, nn.Module):
        parts = {**parts, **value._modules}
    return list(parts), list(map(id, parts.values()))
