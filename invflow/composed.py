"""Operators one after another."""

from __future__ import annotations

import torch
from torch import Tensor

from invflow._checks import Index
from invflow.operator import Operator

__all__ = ["ComposedOperator"]


class ComposedOperator(Operator):
    """One operator after another, A(x) = outer(inner(x)); written ``outer @ inner``.

    Args:
        outer: applied second; its ``image_shape`` is the inner one's ``measurement_shape``.
        inner: applied first.
        problem_class: the name under which an adapter was trained for the composition.

    Raises:
        ValueError: if the shapes or the numbers of parameter sets do not fit.

    Example:
        >>> import torch
        >>> from invflow.operators import GaussianBlur, SuperResolution
        >>> (SuperResolution((1, 28, 28), factor=4) @ GaussianBlur((1, 28, 28))).measurement_shape
        (1, 7, 7)
    """

    def __init__(self, outer: Operator, inner: Operator, problem_class: str | None = None) -> None:
        super().__init__()
        if tuple(outer.image_shape) != tuple(inner.measurement_shape):
            raise ValueError(
                f"{type(outer).__name__} takes {outer.image_shape}, but {type(inner).__name__} gives "
                f"{inner.measurement_shape}: outer @ inner applies inner first, so the two shapes must agree"
            )
        if outer.num_sets != inner.num_sets and 1 not in (outer.num_sets, inner.num_sets):
            raise ValueError(
                f"{type(outer).__name__} has {outer.num_sets} parameter sets and {type(inner).__name__} has "
                f"{inner.num_sets}: give both the same number, or one of them a single shared set"
            )
        self.outer, self.inner = outer, inner
        self.image_shape, self.measurement_shape = inner.image_shape, outer.measurement_shape
        self.linear = outer.linear and inner.linear
        self.problem_class = problem_class
        self.num_sets = max(outer.num_sets, inner.num_sets)

    def forward(self, x: Tensor) -> Tensor:
        """``(n, *inner.image_shape)`` to ``(n, *outer.measurement_shape)``."""
        return self.outer(self.inner(x))

    def adjoint(self, y: Tensor) -> Tensor:
        """The two adjoints in turn."""
        return self.inner.adjoint(self.outer.adjoint(y)) if self.linear else super().adjoint(y)

    def embed(self, y: Tensor) -> Tensor:
        """The two embeddings in turn."""
        return self.inner.embed(self.outer.embed(y))

    def observed(self) -> Tensor | None:
        """What the outer operator observes."""
        observed = self.outer.observed()
        return observed if observed is None else observed.expand(self.num_sets, *self.measurement_shape)

    def context(self) -> tuple[Tensor, Tensor]:
        """The inner operator's, which acts on the image itself."""
        maps, vector = self.inner.context()
        return maps.expand(self.num_sets, *maps.shape[1:]), vector.expand(self.num_sets, -1)

    def randomize(self, n: int, generator: torch.Generator | None = None) -> Operator:
        """Fresh parameters for both."""
        return self._compose(self.outer.randomize(n, generator), self.inner.randomize(n, generator))

    def expand(self, k: int) -> Operator:
        """Each set of both k times."""
        if self.num_sets == 1:
            return self
        return self._compose(self.outer.expand(k), self.inner.expand(k))

    def select(self, index: Index) -> Operator:
        """Some sets of both."""
        if self.num_sets == 1:
            return self
        return self._compose(self.outer.select(index), self.inner.select(index))

    def _compose(self, outer: Operator, inner: Operator) -> Operator:
        return ComposedOperator(outer, inner, self.problem_class)
