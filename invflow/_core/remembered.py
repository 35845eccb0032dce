"""Digests that are asked for at each sample: remembered as long as tensors are not written to."""

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
    """That versions of tensors are trusted; and the objects that were looked at, by their ids, if once is enough."""

    once: bool
    looked: dict[int, object] = dataclasses.field(default_factory=dict)


_TRUST: ContextVar[_Trust | None] = ContextVar("invflow_trust_versions", default=None)


@contextmanager
def trusting(*, once: bool = False) -> Iterator[None]:
    """Let digests be remembered as long as the versions of tensors stay: for what is asked at each sample.

    Args:
        once: whether nothing changes inside, so that each object is looked at once.
    """
    before = _TRUST.set(_Trust(once))
    try:
        yield
    finally:
        _TRUST.reset(before)


def quick_identity(value: object) -> str | None:
    """As ``identity``, but None for what cannot be identified, and quick inside :func:`trusting`.

    The content is then read anew only where one of its tensors was written to or replaced, or an attribute of the
    object itself was set. Writing through ``tensor.data`` and setting an attribute of a part are not seen. What answers
    by a ``fingerprint()`` of its own is asked each time.
    """
    reader = Reader(exact=_TRUST.get() is None)

    def read() -> str | None:
        try:
            return reader.read(value).hex()
        except UnidentifiedError:
            return None

    return _remembered(value, "identity", read, reader)


def remembered(module: nn.Module, digest: Callable[[nn.Module], str]) -> str:
    """A digest of a module's weights; inside :func:`trusting`, found anew only where one was written to or replaced.

    Args:
        module: whose weights.
        digest: of a module, a function that depends on its weights alone.
    """
    found = _remembered(module, digest, lambda: digest(module), None)
    assert found is not None
    return found


def _remembered(value: object, key: object, compute: Callable[[], str | None], reader: Reader | None) -> str | None:
    """A digest as it was found before, inside :func:`trusting` and where the object has not changed since."""
    trust = _TRUST.get()
    # tensors are compared number by number, also as keys; what cannot be hashed or referred to weakly is none
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
        # by one digest an object may hold more tensors than are its parameters: both are watched
        read = [] if reader is None else reader.tensors
        known = _Seen(value, read, {} if known is None else known.digests, [] if known is None else known.tensors())
        known.digests[key] = found
        try:
            _SEEN[value] = known
        except TypeError:
            return found
    if trust.once:
        trust.looked[id(value)] = value  # itself, so that its id is not given away
    return known.digests[key]


class _Seen:
    """Digests of an object, and what tells whether they still hold."""

    def __init__(self, value: object, read: Iterable[Tensor], digests: dict[object, str | None],
                 before: Iterable[Tensor]) -> None:
        self.digests = digests
        own = (*value.parameters(), *value.buffers()) if isinstance(value, nn.Module) else ()
        watched = list({id(x): x for x in (*own, *read, *before)}.values())
        self._tensors, self._versions = [weakref.ref(x) for x in watched], [version(x) for x in watched]
        # of some: what moves a module, or changes its type, gives all of its tensors another place
        self._places = [(weakref.ref(x), x.data_ptr()) for x in watched[:1] + watched[-1:]]
        self._surface = _surface(value)
        # the ids of numbers and words are theirs as long as these are held
        self._kept = [item for item in getattr(value, "__dict__", {}).values()
                      if isinstance(item, (bool, int, float, str, tuple))]

    def tensors(self) -> list[Tensor]:
        """Those that are watched."""
        return [x for x in (reference() for reference in self._tensors) if x is not None]

    def holds(self, value: object) -> bool:
        """Whether no tensor was written to, none replaced (so that it is gone), and no attribute set."""
        try:
            return (all(x().data_ptr() == place for x, place in self._places)  # type: ignore[union-attr]
                    and [x()._version for x in self._tensors] == self._versions  # type: ignore[union-attr]
                    and _surface(value) == self._surface)
        except (AttributeError, RuntimeError):  # a tensor that is gone, or of inference mode
            return False


_SEEN: weakref.WeakKeyDictionary[Any, _Seen] = weakref.WeakKeyDictionary()


def _surface(value: object) -> tuple[list[str], list[int]]:
    """An object's own attributes, and a module's parts: by name, and by which they are."""
    parts = getattr(value, "__dict__", {})
    if isinstance(value, nn.Module):
        parts = {**parts, **value._modules}
    return list(parts), list(map(id, parts.values()))
