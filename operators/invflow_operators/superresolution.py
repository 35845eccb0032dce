"""Super-resolution: the measurement has fewer pixels than the image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from invflow.operator import Operator
from invflow_operators._transfer import transfer_summary

__all__ = ["SuperResolution"]


class SuperResolution(Operator):
    r"""Downsampling by an integer factor with an antialiasing filter, A(x) = R x C'.

    Both filters act on rows and columns apart, so the operator is two small matrices R, (H / f, H), and
    C, (W / f, W); its adjoint is R' y C and its pseudo-inverse R^+ y (C^+)', both exact.

    Args:
        image_shape: (C, H, W).
        factor: divides H and W.
        filter: "average" pools over blocks of factor x factor pixels; "bicubic" is Keys's kernel (1981,
            a = -1/2) stretched by the factor, its weights normalised at the border, as Pillow and
            ``torch.nn.functional.interpolate(..., antialias=True)`` have it.

    Raises:
        ValueError: for a factor that does not divide the sides, or an unknown filter.

    Example:
        >>> from invflow.operators import SuperResolution
        >>> SuperResolution((3, 256, 256), factor=4, filter="bicubic").measurement_shape
        (3, 64, 64)
    """

    rows: Tensor
    columns: Tensor
    rows_inverse: Tensor
    columns_inverse: Tensor

    def __init__(self, image_shape: Sequence[int], factor: int = 4, filter: str = "average") -> None:
        super().__init__()
        shape = tuple(image_shape)
        if len(shape) != 3 or factor != int(factor) or factor < 1 or shape[1] % factor or shape[2] % factor:
            raise ValueError(
                f"super-resolution by {factor} of images {shape}: pass image_shape=(C, H, W) and a whole "
                "factor that divides H and W"
            )
        if filter not in ("average", "bicubic"):
            raise ValueError(f"unknown filter {filter!r}: pass 'average' or 'bicubic'")
        self.factor, self.filter = int(factor), filter
        self.image_shape = shape
        self.measurement_shape = (shape[0], shape[1] // self.factor, shape[2] // self.factor)
        self.problem_class = f"super-resolution-x{self.factor}"
        for name, side in (("rows", shape[1]), ("columns", shape[2])):
            matrix = _downsampling_matrix(side, self.factor, filter)
            self.register_buffer(name, matrix.to(torch.get_default_dtype()))
            self.register_buffer(f"{name}_inverse", torch.linalg.pinv(matrix).to(torch.get_default_dtype()))

    def forward(self, x: Tensor) -> Tensor:
        """``(n, C, H, W)`` to ``(n, C, H / f, W / f)``."""
        return self.rows.to(x.dtype) @ x @ self.columns.to(x.dtype).mT

    def adjoint(self, y: Tensor) -> Tensor:
        """``(n, C, H / f, W / f)`` to ``(n, C, H, W)``."""
        return self.rows.to(y.dtype).mT @ y @ self.columns.to(y.dtype)

    def pseudo_inverse(self, y: Tensor) -> Tensor:
        """``(n, C, H / f, W / f)`` to ``(n, C, H, W)``; for "average", each pixel repeated over its block."""
        return self.rows_inverse.to(y.dtype) @ y @ self.columns_inverse.to(y.dtype).mT

    def embed(self, y: Tensor) -> Tensor:
        """The pseudo-inverse, which both filters have well conditioned."""
        return self.pseudo_inverse(y)

    def context(self) -> tuple[Tensor, Tensor]:
        """Ones, and the transfer function of the filter in the middle of the image."""
        maps, _ = super().context()
        profiles = [matrix[len(matrix) // 2] for matrix in (self.rows, self.columns)]
        return maps, transfer_summary(torch.outer(*profiles)[None, None], self._center(), self.image_shape)

    def _center(self) -> tuple[float, float]:
        """Where the middle filter is centred, in pixels."""
        middle = [side // self.factor // 2 for side in self.image_shape[1:]]
        row, column = (index * self.factor + (self.factor - 1) / 2 for index in middle)
        return row, column


def _downsampling_matrix(side: int, factor: int, filter: str) -> Tensor:
    """Weights ``(side / factor, side)`` in float64, by downsampling each unit vector."""
    units = torch.eye(side, dtype=torch.float64)[None, None]
    if filter == "average":
        return F.avg_pool2d(units, (factor, 1))[0, 0]
    size = (side // factor, side)
    return F.interpolate(units, size, mode="bicubic", antialias=True, align_corners=False)[0, 0]
