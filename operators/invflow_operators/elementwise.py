"""Operators that act on each pixel separately."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from invflow.operator import Operator
from invflow.plugins import as_shape

__all__ = ["Denoising"]


class Denoising(Operator):
    """The identity, A(x) = x: the measurement is the image with noise.

    Args:
        image_shape: (C, H, W), or any other shape.

    Example:
        >>> from invflow.operators import Denoising
        >>> Denoising((1, 28, 28)).measurement_shape
        (1, 28, 28)
    """

    problem_class = "denoising"
    structure = "identity"

    def __init__(self, image_shape: Sequence[int]) -> None:
        super().__init__()
        self.image_shape = self.measurement_shape = as_shape(image_shape, "Denoising((1, 28, 28))")

    def forward(self, x: Tensor) -> Tensor:
        """The images themselves, as a copy: ``(n, *image_shape)`` to the same."""
        return x.clone()

    def adjoint(self, y: Tensor) -> Tensor:
        """The measurements themselves."""
        return y.clone()

    def pseudo_inverse(self, y: Tensor) -> Tensor:
        """The measurements themselves."""
        return y.clone()

    def embed(self, y: Tensor) -> Tensor:
        """The measurements themselves."""
        return y.clone()
