"""Blurs: convolution with a kernel, shared by all images or one for each."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from invflow.operator import Operator
from invflow.plugins import as_generator, as_shape
from invflow_operators._transfer import transfer_summary

__all__ = ["Blur", "GaussianBlur", "MotionBlur"]

#: an image with sides of at least this many pixels counts as a photograph. Its default kernels are like those that
#: adapters for photographs are trained on; kernels that grow with the image would be far outside that range
_PHOTOGRAPH = 64
_PADDINGS = ("circular", "reflect", "zeros")


def _is_round(kernel: Tensor) -> bool:
    """Whether a quarter turn about the origin changes each kernel by less than a tenth of its norm."""
    side = max(kernel.shape[-2:]) // 2  # in a square with the origin at its centre
    across = [(side - n // 2, side - (n - 1 - n // 2)) for n in (kernel.shape[-1], kernel.shape[-2])]
    kernel = F.pad(kernel, (*across[0], *across[1]))
    apart = (kernel - kernel.rot90(1, (-2, -1))).flatten(1).norm(dim=1)
    return bool((apart < 0.1 * kernel.flatten(1).norm(dim=1)).all())


class Blur(Operator):
    """Convolution with a given kernel; the measurement has the image's shape.

    One pair of Fourier transforms serves all images, for any number of kernels. With the default border, "circular",
    the Fourier transform diagonalises the operator: its adjoint, its pseudo-inverse and the inputs of an adapter are
    exact and cheap. In a photograph, the blur mixes in what lies outside the frame, so "reflect" is the better model.
    "zeros" treats the outside as black.

    Args:
        kernel: ``(h, w)`` or ``(C, h, w)`` for all images, or ``(n, 1 or C, h, w)``, one for each. Its origin
            is the pixel (h // 2, w // 2). It is not normalised: divide by its sum to preserve
            brightness.
        image_shape: (C, H, W).
        padding: "circular", "reflect" or "zeros".
        problem_class: Class of the kernel for adapters, "gaussian-blur" or "motion-blur". None, the default, is for a
            kernel that may be neither: an adapter then treats it, with a warning, as "gaussian-blur" if a quarter turn
            leaves it nearly unchanged, else as "motion-blur".

    Raises:
        ValueError: For a kernel of the wrong shape, larger than the image, or not finite.

    Example:
        >>> import torch
        >>> from invflow.operators import Blur
        >>> Blur(torch.ones(3, 3) / 9, (1, 28, 28)).measurement_shape
        (1, 28, 28)
    """

    kernel: Tensor
    transfer: Tensor

    def __init__(self, kernel: Tensor, image_shape: Sequence[int], padding: str = "circular",
                 problem_class: str | None = None) -> None:
        super().__init__()
        kernel, shape = torch.as_tensor(kernel), as_shape(image_shape, "Blur(kernel, (1, 28, 28))")
        if not kernel.is_floating_point():
            kernel = kernel.to(torch.get_default_dtype())
        if padding not in _PADDINGS:
            raise ValueError(f"unknown padding {padding!r}: pass one of {', '.join(map(repr, _PADDINGS))}")
        sets = kernel[(None,) * (4 - kernel.ndim)] if kernel.ndim in (2, 3) else kernel
        if len(shape) != 3 or sets.ndim != 4 or sets.shape[1] not in (1, shape[0]) or 0 in sets.shape:
            raise ValueError(
                f"the kernel has shape {tuple(kernel.shape)}, the images {shape}: pass a kernel (h, w), "
                "(C, h, w) or (n, C, h, w) with the images' C or 1, and image_shape=(C, H, W)"
            )
        if sets.shape[2] > shape[1] or sets.shape[3] > shape[2]:
            raise ValueError(f"the kernel has {tuple(sets.shape[2:])} pixels, the images only {shape[1:]}")
        if not bool(torch.isfinite(sets).all()):
            raise ValueError("the kernel has entries that are NaN or infinite")
        self.image_shape = self.measurement_shape = shape
        self.padding, self.problem_class = padding, problem_class
        self.register_sets(**self._sets(sets))
        if problem_class is None:
            self.stand_ins = ("gaussian-blur",) if _is_round(sets) else ("motion-blur",)

    #: problem class of a kernel from a file; a subclass without this attribute takes the file as its own ``kernel``
    #: argument
    _file_class: str | None = None
    _for_photographs: Mapping[str, Any] = {}

    @classmethod
    def file_parameters(cls) -> tuple[str, ...]:
        """Accept a kernel file, also in classes that draw or compute their kernel."""
        return ("kernel",) if "_file_class" in vars(cls) else super().file_parameters()

    @classmethod
    def from_files(cls, image_shape: tuple[int, ...], files: Mapping[str, Tensor], settings: Mapping[str, Any],
                   say: Callable[[str], None]) -> Blur:
        """Build the operator from a kernel file, treated as a kernel of this class, so that an adapter accepts it."""
        if "_file_class" not in vars(cls):
            return super().from_files(image_shape, files, settings, say)
        beside = sorted(set(settings) - {"padding"})
        if beside:
            raise ValueError(f"--operator-set {beside[0]}=... conflicts with --kernel, which sets the whole kernel; "
                             "only padding=... can be combined with it")
        return Blur(files["kernel"], image_shape, problem_class=cls._file_class, **settings)

    @classmethod
    def assumptions(cls, image_shape: tuple[int, ...], given: Mapping[str, Any], *,
                    observed: bool) -> list[tuple[dict[str, Any], str]]:
        """Defaults for photographs: kernels, and the border of an unknown blur."""
        found: list[tuple[dict[str, Any], str]] = super().assumptions(image_shape, given, observed=observed)
        has, usual = inspect.signature(cls).parameters, dict(cls._for_photographs)
        if usual and set(usual) <= set(has) and not set(given) - {"padding"} and min(image_shape[1:]) >= _PHOTOGRAPH:
            what = ", ".join(f"{name} {value:g}" for name, value in usual.items())
            found = [(usual, f"assumed {cls._file_class} with {what} in pixels: change it with --operator-set "
                             "NAME=VALUE, or pass a kernel with --kernel FILE")]
        if observed and "padding" in has and "padding" not in given:
            # a camera's blur mixes in what lies outside the frame, so a circular model rings far into the image
            found.append(({"padding": "reflect"}, "assumed that the image is reflected at its border; for a blur that "
                          "wraps around, pass --operator-set padding=circular"))
        return found

    def _sets(self, kernel: Tensor) -> dict[str, Tensor]:
        """The kernels ``(n, 1 or C, h, w)``, and their transfer functions on the padded grid as pairs of reals."""
        h, w = kernel.shape[2:]
        # pairs of reals, because Module.to(torch.float64) would drop the imaginary parts of a complex buffer
        height, width = self._grid(h, w)
        placed = F.pad(kernel, (0, width - w, 0, height - h)).roll((-(h // 2), -(w // 2)), (2, 3))
        return {"kernel": kernel, "transfer": torch.view_as_real(torch.fft.rfft2(placed))}

    def _grid(self, h: int, w: int) -> tuple[int, int]:
        """Height and width of the padded image."""
        height, width = self.image_shape[1:]
        return (height, width) if self.padding == "circular" else (height + h - 1, width + w - 1)

    def _transfer(self, x: Tensor) -> Tensor:
        return torch.view_as_complex(self.transfer.to(x.dtype))

    def forward(self, x: Tensor) -> Tensor:
        """``(n, C, H, W)`` to the same."""
        if self.padding == "circular":
            result: Tensor = torch.fft.irfft2(torch.fft.rfft2(x) * self._transfer(x), s=x.shape[2:])
            return result
        (h, w), (height, width) = self.kernel.shape[2:], x.shape[2:]
        before, after = ((h - 1) // 2, (w - 1) // 2), (h // 2, w // 2)
        mode = "reflect" if self.padding == "reflect" else "constant"
        grid = F.pad(x, (before[1], after[1], before[0], after[0]), mode=mode)
        blurred = torch.fft.irfft2(torch.fft.rfft2(grid) * self._transfer(x), s=grid.shape[2:])
        cut: Tensor = blurred[:, :, before[0]:before[0] + height, before[1]:before[1] + width]
        return cut

    def adjoint(self, y: Tensor) -> Tensor:
        """Correlation with the kernel; for other borders than "circular", the vector-Jacobian product."""
        if self.padding != "circular":
            return super().adjoint(y)
        result: Tensor = torch.fft.irfft2(torch.fft.rfft2(y) * self._transfer(y).conj(), s=y.shape[2:])
        return result

    def pseudo_inverse(self, y: Tensor) -> Tensor:
        """Inverse filter, zero where the transfer function is zero up to rounding; it amplifies noise.

        Other borders than "circular" use conjugate gradients up to rounding, with a warning if 1,000 steps do not
        suffice.
        """
        if self.padding != "circular":
            return super().pseudo_inverse(y)
        transfer = self._transfer(y)
        power = transfer.abs().square()
        kept = power > torch.finfo(y.dtype).eps * power.amax((2, 3), keepdim=True)
        inverse = torch.where(kept, transfer.conj() / power.clamp(min=torch.finfo(y.dtype).tiny), 0.0)
        result: Tensor = torch.fft.irfft2(torch.fft.rfft2(y) * inverse, s=y.shape[2:])
        return result

    def embed(self, y: Tensor) -> Tensor:
        """The measurement itself, already an image."""
        return y.clone()

    def context(self) -> tuple[Tensor, Tensor]:
        """Ones, and the transfer function at low frequencies."""
        maps, _ = super().context()
        h, w = self.kernel.shape[2:]
        return maps, transfer_summary(self.kernel, (h // 2, w // 2), self.image_shape)


class GaussianBlur(Blur):
    """Blur with a Gaussian kernel that sums to 1.

    Args:
        image_shape: (C, H, W).
        std: Standard deviation in pixels; default a ninth of ``kernel_size`` (1 pixel at 28 x 28).
        kernel_size: Side of the kernel in pixels; default about a third of the image's side, odd, at most 61.
        std_range: Range from which :meth:`randomize` draws the standard deviation, uniformly; default 1/18 to 2/9
            of ``kernel_size`` (0.5 to 2 pixels at 28 x 28).
        padding: Same as in :class:`Blur`.

    Raises:
        ValueError: For a standard deviation that is not positive or a kernel larger than the image.

    Example:
        >>> import torch
        >>> from invflow.operators import GaussianBlur
        >>> GaussianBlur((1, 28, 28), std=1.5).randomize(8, torch.Generator().manual_seed(0)).num_sets
        8
    """

    _for_photographs = {"std": 2.0, "kernel_size": 25}
    _file_class = "gaussian-blur"

    def __init__(self, image_shape: Sequence[int], std: float | None = None, kernel_size: int | None = None,
                 std_range: tuple[float, float] | None = None, padding: str = "circular") -> None:
        image_shape = as_shape(image_shape, "GaussianBlur((1, 28, 28), std=2.0)")
        size = default_kernel_size(image_shape) if kernel_size is None else kernel_size
        std = size / 9 if std is None else std
        std_range = (size / 18, 2 * size / 9) if std_range is None else std_range
        if not (size >= 1 and std > 0 and 0 < std_range[0] <= std_range[1]):
            raise ValueError(
                f"std={std}, std_range={std_range}, kernel_size={size}: pass std > 0 in pixels, std_range=(low, high) "
                "with 0 < low <= high, and kernel_size >= 1"
            )
        _check_kernel_size(size, image_shape)
        kernel = _gaussian_kernels(torch.tensor([std], dtype=torch.get_default_dtype()), size)
        super().__init__(kernel, image_shape, padding, GaussianBlur._file_class)
        self.std_range = std_range

    def randomize(self, n: int, generator: torch.Generator | None = None) -> Operator:
        """Draw Gaussian kernels of random width for n images."""
        generator = as_generator(generator)
        low, high = self.std_range
        std = low + (high - low) * torch.rand(n, generator=generator, device=generator.device)
        return self._with_sets(self._sets(_gaussian_kernels(std, self.kernel.shape[-1]).to(self.kernel)))


class MotionBlur(Blur):
    """Blur along a smooth random curve, the path of a shaking camera; the kernel sums to 1.

    The curve's coordinates are Gaussian processes with a Matern covariance (Schuler, Hirsch, Harmeling and
    Schoelkopf 2015), drawn by deepinv's ``MotionBlurGenerator``; a curve too long for the kernel is shrunk to
    fit.

    Args:
        image_shape: (C, H, W).
        kernel_size: Side of the kernel in pixels; default about a third of the image's side, odd, at most 61.
        intensity: Standard deviation of the curve in units of half the kernel's side, in (0, 1].
        generator: Source of randomness for the kernel.
        padding: Same as in :class:`Blur`.

    Raises:
        ValueError: For an intensity out of range or a kernel larger than the image.

    Example:
        >>> import torch
        >>> from invflow.operators import MotionBlur
        >>> operator = MotionBlur((1, 28, 28), generator=torch.Generator().manual_seed(0))
        >>> round(float(operator.kernel.sum()), 3)
        1.0
    """

    _for_photographs = {"kernel_size": 21}
    _file_class = "motion-blur"

    def __init__(self, image_shape: Sequence[int], kernel_size: int | None = None, intensity: float = 0.5,
                 generator: torch.Generator | None = None, padding: str = "circular") -> None:
        image_shape = as_shape(image_shape, "MotionBlur((1, 28, 28))")
        size = default_kernel_size(image_shape) if kernel_size is None else kernel_size
        if not (0 < intensity <= 1 and size >= 1):
            raise ValueError(f"intensity={intensity}, kernel_size={size}: pass 0 < intensity <= 1, size >= 1")
        _check_kernel_size(size, image_shape)
        kernel = _motion_kernels(1, size, intensity, generator).to(torch.get_default_dtype())
        super().__init__(kernel, image_shape, padding, MotionBlur._file_class)
        self.intensity = intensity

    def randomize(self, n: int, generator: torch.Generator | None = None) -> Operator:
        """Draw kernels along new curves for n images."""
        kernel = _motion_kernels(n, self.kernel.shape[-1], self.intensity, generator)
        return self._with_sets(self._sets(kernel.to(self.kernel)))


def _check_kernel_size(size: int, image_shape: Sequence[int]) -> None:
    """Raise an error for a kernel larger than the image, before computing it."""
    if size > min(image_shape[-2:]):
        raise ValueError(f"the kernel has ({size}, {size}) pixels, the images only {tuple(image_shape[-2:])}: pass "
                         f"a smaller one, such as kernel_size={default_kernel_size(image_shape)}")


def default_kernel_size(image_shape: Sequence[int]) -> int:
    """About a third of the image's shorter side, odd, from 3 to 61 pixels: 9 at 28 x 28, 61 at 256 x 256."""
    third = min(image_shape[-2:]) / 3
    return min(61, max(3, 2 * round((third - 1) / 2) + 1))


def _gaussian_kernels(std: Tensor, size: int) -> Tensor:
    """Kernels ``(n, 1, size, size)`` of standard deviations ``(n,)`` in pixels, each with sum 1."""
    offset = torch.arange(size, device=std.device, dtype=std.dtype) - size // 2
    profile = torch.softmax(-0.5 * (offset / std[:, None]).square(), dim=1)
    return (profile[:, :, None] * profile[:, None, :])[:, None]


def _motion_kernels(n: int, size: int, intensity: float, generator: torch.Generator | None) -> Tensor:
    """Kernels ``(n, 1, size, size)``, the histograms of n curves, each with sum 1."""
    from deepinv.physics.generator import MotionBlurGenerator

    generator = as_generator(generator)
    # deepinv draws all curves at once but bins them one by one; this bins them all together
    curves = MotionBlurGenerator((size, size), rng=generator, device=str(generator.device), sigma=intensity)
    path = torch.stack([curves.f_matern(n), curves.f_matern(n)], dim=2)
    path = path - path.mean(1, keepdim=True)
    path = path / path.abs().amax((1, 2), keepdim=True).clamp(min=1)
    cell = ((path + 1) / 2 * size).long().clamp(max=size - 1)
    flat = cell[:, :, 0] * size + cell[:, :, 1]
    share = torch.full_like(path[:, :, 0], 1 / flat.shape[1])
    kernels = path.new_zeros(n, size * size).scatter_add_(1, flat, share)
    return kernels.reshape(n, 1, size, size)
