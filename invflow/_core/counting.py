"""Networks of samplers: their calls are counted in scopes, and some take images of another size."""

from __future__ import annotations

import copy
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
        forward: Number of rows evaluated.
        backward: Number of rows differentiated. A Jacobian-vector product through a counted method adds one here and
            one to ``forward`` by itself; nothing more needs to be recorded.
    """

    forward: int = 0
    backward: int = 0


@dataclass
class _Scope:
    """One scope: the module whose calls it counts, and whether it is still open."""

    module: Countable
    calls: Calls
    open: bool = True


#: scopes of the current thread or task only, in the order in which they were opened
_SCOPES: ContextVar[tuple[_Scope, ...]] = ContextVar("invflow_call_scopes", default=())


class Countable(torch.nn.Module):
    """Module whose evaluations can be counted. Scopes nest, and each counts what happens inside it.

    A scope belongs to the thread or task that opened it, and to one module: a copy has its own scopes. Calls of a copy
    that shares the weights (:meth:`counted_with`) are also counted by the module's scopes.
    """

    _derived = frozenset({"_counted_with"})  # does not affect the numbers: see invflow._core.identity
    _counted_with: tuple[Countable, ...] = ()

    state_shape: tuple[int, ...]
    image_shape: tuple[int, ...]

    @property
    def resizable(self) -> bool:
        """Whether the network takes images of any size: none of its parts depends on the position or number of pixels.
        """
        return False

    def resized(self: C, image_shape: tuple[int, ...]) -> C:
        """Same network, with shared weights, for images of another size.

        Args:
            image_shape: ``(C, H, W)``, with the C of the network.

        Raises:
            ValueError: For a different number of channels, or a network of fixed size.

        Example:
            >>> import invflow
            >>> options = {"channels": [8, 16], "blocks": 1, "attention": False}
            >>> prior = invflow.NeuralFlowMap((3, 64, 64), options=options, skip="spectral")
            >>> prior.resized((3, 100, 75)).generate(1, steps=1).shape
            torch.Size([1, 3, 100, 75])
        """
        shape, own = tuple(image_shape), tuple(self.image_shape)
        if shape == own:
            return self
        if not self.resizable or len(shape) != 3 or shape[0] != own[0]:
            why = "" if self.resizable else " and has a fixed size"
            raise ValueError(f"this {type(self).__name__} takes images {own}{why}: it cannot take {shape}")
        other = copy.copy(self)
        other.state_shape = other.image_shape = shape
        return other.counted_with(self)

    @contextmanager
    def count(self) -> Iterator[Calls]:
        """Count the rows evaluated and differentiated while the scope is open.

        Yields:
            The live :class:`Calls`, which can still be read after the scope has closed.
        """
        scope = _Scope(self, Calls())
        _SCOPES.set((*_SCOPES.get(), scope))
        try:
            yield scope.calls
        finally:
            # a generator closed in another context leaves its scope here, and the next scope removes it
            scope.open = False
            _SCOPES.set(tuple(s for s in _SCOPES.get() if s.open))

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """Suspend counting in all scopes while the context is open, for work that does not contribute to samples."""
        before = _SCOPES.get()
        _SCOPES.set(tuple(s for s in before if not self._is_seen_by(s)))
        try:
            yield
        finally:
            _SCOPES.set(before)

    def counted_with(self: C, owner: Countable) -> C:
        """Let the scopes of another module count this one's calls too, for a copy that takes images of another size.

        Args:
            owner: Module whose weights this one shares.

        Returns:
            The module itself.
        """
        if owner is not self:
            self._counted_with = (owner,)  # in a tuple, so that it does not become a part of this one
        return self

    def call_scopes(self) -> list[Calls]:
        """Counts of this module's open scopes in this thread, in the order in which they were opened."""
        return [s.calls for s in _SCOPES.get() if s.open and self._is_seen_by(s)]

    def _is_seen_by(self, scope: _Scope) -> bool:
        return scope.module is self or any(owner._is_seen_by(scope) for owner in self._counted_with)

    def record(self, forward: int = 0, backward: int = 0) -> None:
        """Add rows to every open scope. Code that evaluates a network in another way must call this itself."""
        for calls in self.call_scopes():
            calls.forward += forward
            calls.backward += backward

    def record_output(self, output: Tensor, rows: int) -> Tensor:
        """Record the ``rows`` evaluations that gave ``output``, and as many backward calls if it is differentiated.

        Both kinds of differentiation are counted: a Jacobian-vector product (forward mode) through the tangent of the
        output, and reverse mode through a hook that runs once for each backward pass through the output. A later
        backward pass is added to the scopes that are open now.

        Args:
            output: Result of the evaluations; returned unchanged.
            rows: Number of rows evaluated. There are several per row of ``output`` if it took several velocities.

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
