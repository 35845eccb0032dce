"""Super-resolution: the measurement has fewer pixels than the image."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from invflow.operator import Operator
from invflow.plugins import as_shape
from invflow_operators._banded import FILTERS, downsampling, taps
from invflow_operators._transfer import transfer_summary

__all__ = ["SuperResolution"]


class SuperResolution(Operator):
    r"""Downsampling by an integer factor with an antialiasing filter, A(x) = R x C'.

    All filters are separable, so the operator consists of two matrices R, (ceil(H / f), H), and
    C, (ceil(W / f), W). Its adjoint is R' y C and its pseudo-inverse R^+ y (C^+)', both exact. For long sides, the
    matrices are stored as pixel blocks ("average") or as a band around the diagonal (the other filters).

    Args:
        image_shape: (C, H, W).
        factor: Integer factor; if it does not divide H or W, the last row or column averages over the remaining pixels.
        filter: "average" pools over blocks of factor x factor pixels. The other filters are stretched by the factor,
            with weights normalised at the border, as in Pillow: "bilinear" is a triangle, "bicubic" is Keys's
            kernel (1981, a = -1/2; also in ``torch.nn.functional.interpolate(..., antialias=True)``), "lanczos" is
            Lanczos's kernel with three lobes (Duchon 1979), and "gaussian" is a Gaussian with a standard deviation of
            0.4 times the factor, in pixels of the image.

    Raises:
        ValueError: If the factor is not an integer or exceeds a side, or for an unknown filter.

    Example:
        >>> from invflow.operators import SuperResolution
        >>> SuperResolution((3, 256, 256), factor=4, filter="bicubic").measurement_shape
        (3, 64, 64)
    """

    row_sizes: Tensor
    column_sizes: Tensor

    def __init__(self, image_shape: Sequence[int], factor: int = 4, filter: str = "average") -> None:
        super().__init__()
        shape = as_shape(image_shape, "SuperResolution((1, 28, 28), factor=4)")
        whole = isinstance(factor, (int, float)) and factor == int(factor)
        if len(shape) != 3 or not whole or not 1 <= factor <= min(shape[1:]):
            raise ValueError(
                f"super-resolution by {factor!r} of images {shape}: pass image_shape=(C, H, W) and an integer factor"
                + (f" from 1 to {min(shape[1:])}" if len(shape) == 3 else "")
            )
        if filter not in ("average", *FILTERS):
            raise ValueError(f"unknown filter {filter!r}: pass one of {', '.join(map(repr, ('average', *FILTERS)))}")
        self.factor, self.filter = int(factor), filter
        self.image_shape = shape
        self.measurement_shape = (shape[0], -(-shape[1] // self.factor), -(-shape[2] // self.factor))
        self.problem_class = f"super-resolution-x{self.factor}"
        if filter != "average":
            self.rows, self.rows_inverse = downsampling(shape[1], self.factor, filter)
            self.columns, self.columns_inverse = downsampling(shape[2], self.factor, filter)
        for name, side, count in zip(("row", "column"), shape[1:], self.measurement_shape[1:], strict=True):
            sizes = torch.full((count,), float(self.factor))
            sizes[-1] = side - (count - 1) * self.factor  # the last block holds the remaining pixels
            self.register_buffer(f"{name}_sizes", sizes.to(torch.get_default_dtype()))

    @classmethod
    def image_size(cls, size: tuple[int, int], settings: Mapping[str, Any]) -> tuple[int, int]:
        """Size of the image, from that of the measurement."""
        default = inspect.signature(cls).parameters.get("factor")
        factor = settings.get("factor", 1 if default is None else default.default)
        return (size[0] * factor, size[1] * factor)

    @classmethod
    def assumptions(cls, image_shape: tuple[int, ...], given: Mapping[str, Any], *,
                    observed: bool) -> list[tuple[dict[str, Any], str]]:
        """Filter used to downsample a file."""
        found: list[tuple[dict[str, Any], str]] = super().assumptions(image_shape, given, observed=observed)
        if observed and "filter" in inspect.signature(cls).parameters and "filter" not in given:
            found.append(({"filter": "bicubic"}, "assumed bicubic downsampling of the file, as in most programs; "
                          f"--filter sets another filter: average, {', '.join(FILTERS)}"))
        return found

    def forward(self, x: Tensor) -> Tensor:
        """``(n, C, H, W)`` to ``(n, C, ceil(H / f), ceil(W / f))``."""
        if self.filter != "average":
            result: Tensor = self.rows(self.columns(x).mT).mT
            return result
        return F.avg_pool2d(x, self.factor, ceil_mode=True)

    def adjoint(self, y: Tensor) -> Tensor:
        """``(n, C, ceil(H / f), ceil(W / f))`` to ``(n, C, H, W)``."""
        if self.filter != "average":
            return self.rows.transpose(self.columns.transpose(y).mT).mT
        return self._repeat(y / torch.outer(self.row_sizes, self.column_sizes).to(y.dtype))

    def pseudo_inverse(self, y: Tensor) -> Tensor:
        """``(n, C, ceil(H / f), ceil(W / f))`` to ``(n, C, H, W)``; for "average", each pixel fills its block."""
        if self.filter != "average":
            result: Tensor = self.rows_inverse(self.columns_inverse(y).mT).mT
            return result
        return self._repeat(y)

    def embed(self, y: Tensor) -> Tensor:
        """The pseudo-inverse, well conditioned for all filters."""
        return self.pseudo_inverse(y)

    def context(self) -> tuple[Tensor, Tensor]:
        """Ones, and the transfer function of the filter at the centre of the image."""
        maps, _ = super().context()
        profiles, center = zip(*(self._profile(side) for side in self.image_shape[1:]), strict=True)
        kernel = torch.outer(*profiles).to(maps)[None, None]
        return maps, transfer_summary(kernel, (center[0], center[1]), self.image_shape)

    def extra_repr(self) -> str:
        """Shapes, factor and filter."""
        return f"{super().extra_repr()}, factor={self.factor}, filter={self.filter!r}"

    def _profile(self, side: int) -> tuple[Tensor, float]:
        """Weights of the central filter along one side, and the position of its centre."""
        if self.filter == "average":
            return torch.full((self.factor,), 1 / self.factor), (self.factor - 1) / 2
        weights, first = taps(side, self.factor, self.filter)
        middle = len(weights) // 2
        return weights[middle], (middle + 0.5) * side / len(weights) - 0.5 - float(first[middle])

    def _repeat(self, y: Tensor) -> Tensor:
        """Repeat each pixel over its block: ``(n, C, h, w)`` to ``(n, C, H, W)``."""
        f = self.factor
        blocks = y[:, :, :, None, :, None].expand(-1, -1, -1, f, -1, f).flatten(4).flatten(2, 3)
        return blocks[:, :, : self.image_shape[1], : self.image_shape[2]]
