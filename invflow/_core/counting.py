"""Counting network calls in a scope, so that every sampler can state what its samples cost."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

__all__ = ["Calls", "Countable"]

C = TypeVar("C", bound="Countable")


@dataclass
class Calls:
    """Rows that went through a network inside one ``with module.count() as calls`` scope.

    Attributes:
        forward: rows evaluated.
        backward: rows differentiated (a Jacobian-vector product adds one here and one to ``forward``, by
            itself: code that takes one through a counted method records nothing more).
    """

    forward: int = 0
    backward: int = 0


@dataclass
class _Scope:
    """A scope: whose calls it counts, and whether it still does."""

    module: Countable
    calls: Calls
    open: bool = True


#: scopes of this context, in the order in which they were opened: of one thread or task, never of another
_SCOPES: ContextVar[tuple[_Scope, ...]] = ContextVar("invflow_call_scopes", default=())


class Countable(torch.nn.Module):
    """A module whose evaluations can be counted; scopes nest, and each sees what happens inside it.

    A scope belongs to the thread or task that opened it, and to one module: a copy has scopes of its own. What goes
    through a copy that shares the weights (:meth:`counted_with`) is seen by the module's scopes too.
    """

    _derived = frozenset({"_counted_with"})  # says nothing about the numbers: see invflow._core.identity
    _counted_with: tuple[Countable, ...] = ()

    @contextmanager
    def count(self) -> Iterator[Calls]:
        """Count the rows evaluated and differentiated while the scope is open.

        Yields:
            The live :class:`Calls`; its numbers stay readable after the scope has closed.
        """
        scope = _Scope(self, Calls())
        _SCOPES.set((*_SCOPES.get(), scope))
        try:
            yield scope.calls
        finally:
            # a generator that is closed elsewhere leaves its scope behind here, where the next one drops it
            scope.open = False
            _SCOPES.set(tuple(s for s in _SCOPES.get() if s.open))

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """Count nothing of what happens while the context is open, in no scope: for what no sample is made of."""
        before = _SCOPES.get()
        _SCOPES.set(tuple(s for s in before if not self._is_seen_by(s)))
        try:
            yield
        finally:
            _SCOPES.set(before)

    def counted_with(self: C, owner: Countable) -> C:
        """Let the scopes of another module see the calls of this one too: of its copy for images of another size.

        Args:
            owner: whose weights this one shares.

        Returns:
            The module itself.
        """
        if owner is not self:
            self._counted_with = (owner,)  # in a tuple, so that it does not become a part of this one
        return self

    def call_scopes(self) -> list[Calls]:
        """What counts this module's calls now, in this thread, in the order in which it was opened."""
        return [s.calls for s in _SCOPES.get() if s.open and self._is_seen_by(s)]

    def _is_seen_by(self, scope: _Scope) -> bool:
        return scope.module is self or any(owner._is_seen_by(scope) for owner in self._counted_with)

    def record(self, forward: int = 0, backward: int = 0) -> None:
        """Add rows to every open scope. Code that evaluates a network by other means calls this itself."""
        for calls in self.call_scopes():
            calls.forward += forward
            calls.backward += backward

    def record_output(self, output: Tensor, rows: int) -> Tensor:
        """Record ``rows`` evaluations that made ``output``, and as many backward where it is differentiated.

        Both ways of differentiating are seen: a Jacobian-vector product (forward mode) by the tangent that
        the output carries, reverse mode by a hook that fires once for each backward pass through the output.
        The scopes open now are the ones that a later backward pass is added to.

        Args:
            output: what the evaluations made; returned as it is.
            rows: how many were evaluated; several to a row of ``output`` where it took several velocities.

        Returns:
            ``output``.
        """
        scopes = self.call_scopes()
        if not scopes:
            return output
        differentiated = forward_ad.unpack_dual(output).tangent is not None
        self.record(forward=rows, backward=rows if differentiated else 0)
        if output.requires_grad:

            def on_backward(grad: Tensor) -> None:
                for calls in scopes:
                    calls.backward += rows

            output.register_hook(on_backward)
        return output
