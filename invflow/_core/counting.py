"""Counting network calls in a scope, so that every sampler can state what its samples cost."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import forward_ad

__all__ = ["Calls", "Countable"]


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

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """Count nothing of what happens while the context is open, in no scope: for what no sample is made of."""
        scopes, self._call_scopes = self._call_scopes, []
        try:
            yield
        finally:
            self._call_scopes = scopes

    def record(self, forward: int = 0, backward: int = 0) -> None:
        """Add rows to every open scope. Code that evaluates a network by other means calls this itself."""
        for calls in self._call_scopes:
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
        scopes = list(self._call_scopes)
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
