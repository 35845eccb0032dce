"""A dense matrix as an operator, and compositions of operators."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from invflow.operator import ComposedOperator, Operator
from invflow.plugins import as_shape

__all__ = ["ComposedOperator", "MatrixOperator"]


class MatrixOperator(Operator):
    """Multiplication of the flattened image with a matrix.

    Args:
        matrix: ``(m, d)`` for all images, or ``(n, m, d)``, one for each.
        image_shape: Shape of one image, of d values; default (d,).
        problem_class: Name of the operator's problem class, for adapters.

    Raises:
        ValueError: For a matrix of the wrong shape, or with entries that are not finite.

    Example:
        >>> import torch
        >>> from invflow.operators import MatrixOperator
        >>> first = MatrixOperator(torch.tensor([[1.0, 0.0]]), image_shape=(2,))
        >>> first(torch.tensor([[3.0, 4.0]]))
        tensor([[3.]])
    """

    matrix: Tensor

    def __init__(self, matrix: Tensor, image_shape: Sequence[int] | None = None,
                 problem_class: str | None = None) -> None:
        super().__init__()
        matrix = torch.as_tensor(matrix)
        if not matrix.is_floating_point():
            matrix = matrix.to(torch.get_default_dtype())
        image_shape = matrix.shape[-1:] if image_shape is None else image_shape
        shape = as_shape(image_shape, "MatrixOperator(matrix, image_shape=(784,))")
        if matrix.ndim not in (2, 3) or 0 in matrix.shape or math.prod(shape) != matrix.shape[-1]:
            raise ValueError(
                f"the matrix has shape {tuple(matrix.shape)}, but images {shape} have {math.prod(shape)} values: "
                "pass a matrix (m, d) or (n, m, d), where d is the number of values of an image"
            )
        if not bool(torch.isfinite(matrix).all()):
            raise ValueError("the matrix has entries that are NaN or infinite")
        self.image_shape, self.measurement_shape = shape, (matrix.shape[-2],)
        self.problem_class = problem_class
        self.register_sets(matrix=matrix if matrix.ndim == 3 else matrix[None])

    def forward(self, x: Tensor) -> Tensor:
        """``(n, *image_shape)`` to ``(n, m)``."""
        return _multiply(self.matrix.to(x.dtype), x.flatten(1))

    def adjoint(self, y: Tensor) -> Tensor:
        """Multiplication with the transposed matrix."""
        result: Tensor = _multiply(self.matrix.to(y.dtype).mT, y).unflatten(1, self.image_shape)
        return result

    def pseudo_inverse(self, y: Tensor) -> Tensor:
        """Multiplication with the Moore-Penrose inverse."""
        result: Tensor = _multiply(torch.linalg.pinv(self.matrix.to(y.dtype)), y).unflatten(1, self.image_shape)
        return result

    def embed(self, y: Tensor) -> Tensor:
        """The pseudo-inverse."""
        return self.pseudo_inverse(y)


def _multiply(matrices: Tensor, rows: Tensor) -> Tensor:
    """Multiply each row ``(n, d)`` by its matrix, ``(n, m, d)`` or ``(1, m, d)``, to ``(n, m)``."""
    return rows @ matrices[0].mT if len(matrices) == 1 else torch.einsum("nmd,nd->nm", matrices, rows)
