"""Counting network calls in a scope, so that every sampler can state what its samples cost."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Calls", "Countable"]


@dataclass
class Calls:
    """Rows that went through a network inside one ``with module.count() as calls`` scope.

    Attributes:
        forward: rows evaluated.
        backward: rows differentiated (a Jacobian-vector product adds one here and one to ``forward``).
    """

    forward: int = 0
    backward: int = 0


class Countable(torch.nn.Module):
    """A module whose evaluations can be counted; scopes nest, and each sees what happens inside it."""

    def __init__(self) -> None:
        super().__init__()
        self._call_scopes: list[Calls] = []

    @contextmanager
    def count(self) -> Iterator[Calls]:
        """Count the rows evaluated and differentiated while the scope is open.

        Yields:
            The live :class:`Calls`; its numbers stay readable after the scope has closed.
        """
        calls = Calls()
        self._call_scopes.append(calls)
        try:
            yield calls
        finally:
            # by identity: two scopes with equal counts compare equal
            self._call_scopes = [c for c in self._call_scopes if c is not calls]

    def record(self, forward: int = 0, backward: int = 0) -> None:
        """Add rows to every open scope. Code that evaluates a network by other means calls this itself."""
        for calls in self._call_scopes:
            calls.forward += forward
            calls.backward += backward

    def record_output(self, output: Tensor, rows: int) -> Tensor:
        """Record ``rows`` evaluations that made ``output``, and as many backward ones if it is differentiated."""
        scopes = list(self._call_scopes)
        if not scopes:
            return output
        self.record(forward=rows)
        if output.requires_grad:

            def on_backward(grad: Tensor) -> None:
                for calls in scopes:
                    calls.backward += rows

            output.register_hook(on_backward)
        return output
