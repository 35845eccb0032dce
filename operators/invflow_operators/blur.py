"""Blurs: convolution with a kernel, one for all images or one for each."""

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

#: side in pixels from which a picture counts as a photograph, and kernels like those that adapters for photographs are
#: trained on are its defaults: a share of the image would be far out of it
_PHOTOGRAPH = 64
_PADDINGS = ("circular", "reflect", "zeros")


def _is_round(kernel: Tensor) -> bool:
    """Whether each kernel is the same after a quarter turn about its origin, to a tenth."""
    side = max(kernel.shape[-2:]) // 2  # in a square with the origin in its middle
    across = [(side - n // 2, side - (n - 1 - n // 2)) for n in (kernel.shape[-1], kernel.shape[-2])]
    kernel = F.pad(kernel, (*across[0], *across[1]))
    apart = (kernel - kernel.rot90(1, (-2, -1))).flatten(1).norm(dim=1)
    return bool((apart < 0.1 * kernel.flatten(1).norm(dim=1)).all())


class Blur(Operator):
    """Convolution with a given kernel; the measurement has the image's shape.

    All images run through one pair of Fourier transforms, whatever the number of kernels. The default border
    is "circular": then the Fourier transform diagonalises the operator, and its adjoint, its pseudo-inverse
    and what an adapter sees of it are exact and cheap. For a photograph, whose blur reaches over its frame,
    "reflect" is the closer model; "zeros" takes the world outside for black.

    Args:
        kernel: ``(h, w)`` or ``(C, h, w)`` for all images, or ``(n, 1 or C, h, w)``, one for each. Its origin
            is the pixel (h // 2, w // 2). It is used as it is: divide by its sum to keep
            brightness.
        image_shape: (C, H, W).
        padding: "circular", "reflect" or "zeros".
        problem_class: the class whose adapter serves this kernel, "gaussian-blur" or "motion-blur" for a
            kernel of that kind; None, the default, since it may be of neither: an adapter then takes it, with a note,
            for one of "gaussian-blur" where a quarter turn leaves it nearly the same, else of "motion-blur".

    Raises:
        ValueError: for a kernel of another shape, larger than the image, or not finite.

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

    #: the problem class of a kernel from a file; a subclass that says nothing of it takes such a kernel as its own
    #: ``kernel``
    _file_class: str | None = None
    _for_photographs: Mapping[str, Any] = {}

    @classmethod
    def file_parameters(cls) -> tuple[str, ...]:
        """A kernel, for those too that draw one or compute one."""
        return ("kernel",) if "_file_class" in vars(cls) else super().file_parameters()

    @classmethod
    def from_files(cls, image_shape: tuple[int, ...], files: Mapping[str, Tensor], settings: Mapping[str, Any],
                   say: Callable[[str], None]) -> Blur:
        """A kernel of a file, taken for one of the class's own kind: so it is known to an adapter."""
        if "_file_class" not in vars(cls):
            return super().from_files(image_shape, files, settings, say)
        beside = sorted(set(settings) - {"padding"})
        if beside:
            raise ValueError(f"--operator-set {beside[0]}=... does not go with --kernel, which gives the whole kernel; "
                             "only padding=... does")
        return Blur(files["kernel"], image_shape, problem_class=cls._file_class, **settings)

    @classmethod
    def assumptions(cls, image_shape: tuple[int, ...], given: Mapping[str, Any], *,
                    observed: bool) -> list[tuple[dict[str, Any], str]]:
        """Kernels for photographs, and the border of a blur that somebody else made."""
        found: list[tuple[dict[str, Any], str]] = super().assumptions(image_shape, given, observed=observed)
        has, usual = inspect.signature(cls).parameters, dict(cls._for_photographs)
        if usual and set(usual) <= set(has) and not set(given) - {"padding"} and min(image_shape[1:]) >= _PHOTOGRAPH:
            what = ", ".join(f"{name} {value:g}" for name, value in usual.items())
            found = [(usual, f"took {cls._file_class} with {what} in pixels: --operator-set NAME=VALUE takes others, "
                             "--kernel FILE any")]
        if observed and "padding" in has and "padding" not in given:
            # a camera's blur brings in what lies outside the frame: to think that it wraps around rings far into it
            found.append(({"padding": "reflect"}, "took what the blur brings in from outside the picture for its "
                          "reflection; --operator-set padding=circular is for a blur that wraps around"))
        return found

    def _sets(self, kernel: Tensor) -> dict[str, Tensor]:
        """Kernels ``(n, 1 or C, h, w)`` with their transfer functions on the padded grid, in pairs."""
        h, w = kernel.shape[2:]
        # pairs of reals, for Module.to(torch.float64) would drop the imaginary parts of a complex buffer
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
        """Correlation with the kernel; where the border is not circular, the vector-Jacobian product."""
        if self.padding != "circular":
            return super().adjoint(y)
        result: Tensor = torch.fft.irfft2(torch.fft.rfft2(y) * self._transfer(y).conj(), s=y.shape[2:])
        return result

    def pseudo_inverse(self, y: Tensor) -> Tensor:
        """Inverse filter, zero where the transfer function is within rounding of zero; it blows up noise.

        Where the border is not circular, by conjugate gradients, as far as rounding allows, with a warning where 1,000
        steps do not get there.
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
        std: standard deviation in pixels; default a ninth of ``kernel_size`` (1 pixel at 28 x 28).
        kernel_size: side of the kernel in pixels; default about a third of the image's, odd, at most 61.
        std_range: from which :meth:`randomize` draws the standard deviation, uniformly; default 1/18 to 2/9
            of ``kernel_size`` (0.5 to 2 pixels at 28 x 28).
        padding: see :class:`Blur`.

    Raises:
        ValueError: for a standard deviation that is not positive or a kernel larger than the image.

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
                f"std={std}, std_range={std_range}, kernel_size={size}: pass standard deviations over 0, in "
                "pixels and low before high, and a kernel size of at least 1"
            )
        _check_kernel_size(size, image_shape)
        kernel = _gaussian_kernels(torch.tensor([std], dtype=torch.get_default_dtype()), size)
        super().__init__(kernel, image_shape, padding, GaussianBlur._file_class)
        self.std_range = std_range

    def randomize(self, n: int, generator: torch.Generator | None = None) -> Operator:
        """Gaussian kernels of random width for n images."""
        generator = as_generator(generator)
        low, high = self.std_range
        std = low + (high - low) * torch.rand(n, generator=generator, device=generator.device)
        return self._with_sets(self._sets(_gaussian_kernels(std, self.kernel.shape[-1]).to(self.kernel)))


class MotionBlur(Blur):
    """Blur along the path of a shaken camera, a smooth random curve; the kernel sums to 1.

    The curve's coordinates are Gaussian processes with a Matern covariance (Schuler, Hirsch, Harmeling and
    Schoelkopf 2015), drawn by deepinv's ``MotionBlurGenerator``; a curve too long for the kernel is shrunk to
    fit.

    Args:
        image_shape: (C, H, W).
        kernel_size: side of the kernel in pixels; default about a third of the image's, odd, at most 61.
        intensity: standard deviation of the curve in half sides of the kernel, in (0, 1].
        generator: draws the kernel.
        padding: see :class:`Blur`.

    Raises:
        ValueError: for an intensity out of range or a kernel larger than the image.

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
        """Kernels along fresh curves for n images."""
        kernel = _motion_kernels(n, self.kernel.shape[-1], self.intensity, generator)
        return self._with_sets(self._sets(kernel.to(self.kernel)))


def _check_kernel_size(size: int, image_shape: Sequence[int]) -> None:
    """Refuse a kernel that is larger than the image before it is made."""
    if size > min(image_shape[-2:]):
        raise ValueError(f"the kernel has ({size}, {size}) pixels, the images only {tuple(image_shape[-2:])}: pass "
                         f"kernel_size={default_kernel_size(image_shape)}, say")


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
    # deepinv draws all the curves at once, but bins them one by one; binning is done here for all of them
    curves = MotionBlurGenerator((size, size), rng=generator, device=str(generator.device), sigma=intensity)
    path = torch.stack([curves.f_matern(n), curves.f_matern(n)], dim=2)
    path = path - path.mean(1, keepdim=True)
    path = path / path.abs().amax((1, 2), keepdim=True).clamp(min=1)
    cell = ((path + 1) / 2 * size).long().clamp(max=size - 1)
    flat = cell[:, :, 0] * size + cell[:, :, 1]
    share = torch.full_like(path[:, :, 0], 1 / flat.shape[1])
    kernels = path.new_zeros(n, size * size).scatter_add_(1, flat, share)
    return kernels.reshape(n, 1, size, size)
