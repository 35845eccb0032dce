"""Stationary Gaussian images: cosine transforms, the power spectrum of photographs, and the best linear estimate."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from invflow._core.conjugate_gradients import solve
from invflow._core.shapes import only_observed

if TYPE_CHECKING:
    from invflow.operator import Operator

__all__ = ["BLOCK", "Spectrum", "block_dct", "dct_matrix", "dct2", "gaussian_estimate", "mix_channels",
           "opponent_matrix"]

#: side of the blocks of :func:`block_dct`
BLOCK = 8
#: longest side whose cosine transform is computed as a matrix product
LARGEST_MATRIX = 256
#: decreasing noise levels, for images in [0, 1], through which the best linear estimate under a mask is continued
LEVELS = (3.0, 0.5, 0.1, 0.02, 0.0)
#: radial frequencies at which a spectrum is stored, in cycles per pixel; it is a power law in between
NUM_FREQUENCIES, LOWEST, HIGHEST = 16, 1 / 128, 0.5 * math.sqrt(2)


@functools.lru_cache(maxsize=32)
@torch.inference_mode(False)  # cached, so it must not be an inference tensor
def dct_matrix(n: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu",
               rows: int | None = None) -> Tensor:
    """The orthonormal cosine transform of length n (DCT-II; Ahmed, Natarajan and Rao 1974), ``(n, n)``.

    It diagonalises stationary covariances of images that are extended by reflection at their borders. ``rows`` selects
    the first rows, the low-frequency cosines.

    Example:
        >>> import torch
        >>> from invflow.linear.spectral import dct_matrix
        >>> c = dct_matrix(5)
        >>> torch.allclose(c @ c.T, torch.eye(5), atol=1e-6)
        True
    """
    k, i = torch.arange(rows or n, dtype=torch.float64)[:, None], torch.arange(n, dtype=torch.float64)
    matrix = torch.cos(math.pi * k * (2 * i + 1) / (2 * n)) * math.sqrt(2 / n)
    matrix[0] /= math.sqrt(2)
    return matrix.to(device, dtype)


def dct2(x: Tensor, inverse: bool = False) -> Tensor:
    """Two-dimensional orthonormal cosine transform of the last two axes; its inverse is its transpose."""
    return _dct(_dct(x, inverse).mT, inverse).mT


def _dct(x: Tensor, inverse: bool) -> Tensor:
    """Orthonormal cosine transform of the last axis, by its matrix, or by FFT if the matrix would be large."""
    n = x.shape[-1]
    if n <= LARGEST_MATRIX:
        matrix = dct_matrix(n, x.dtype, x.device)
        return x @ (matrix if inverse else matrix.mT)
    order, turn, scale = _makhoul(n, x.dtype, x.device)
    half = len(turn)  # the first half determines the transform of a real sequence
    if not inverse:
        turned = torch.fft.rfft(x[..., order]) * turn
        return torch.cat([turned.real, -turned.imag[..., 1 : n - half + 1].flip(-1)], dim=-1) * scale
    x = x / scale
    mirrored = torch.cat([torch.zeros_like(x[..., :1]), x[..., n - half + 1 :].flip(-1)], dim=-1)
    values = torch.fft.irfft(torch.complex(x[..., :half], -mirrored) * turn.conj(), n=n)
    return torch.empty_like(values).index_copy(-1, order, values)


@functools.lru_cache(maxsize=8)
@torch.inference_mode(False)
def _makhoul(n: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Order, twiddle factors and scale that turn a Fourier transform into a cosine transform (Makhoul 1980)."""
    order = torch.cat([torch.arange(0, n, 2), torch.arange(1, n, 2).flip(0)])
    angle = -math.pi * torch.arange(n // 2 + 1, dtype=torch.float64) / (2 * n)
    scale = torch.full((n,), math.sqrt(2 / n), dtype=torch.float64)
    scale[0] /= math.sqrt(2)
    turn = torch.complex(angle.cos().to(dtype), angle.sin().to(dtype))
    return order.to(device), turn.to(device), scale.to(device, dtype)


def _along(x: Tensor, axis: int, inverse: bool) -> Tensor:
    """Cosine transform of each block along one axis; the last block may be shorter."""
    x = x.movedim(axis, -1)
    whole = x.shape[-1] // BLOCK * BLOCK
    parts = []
    for part, n in ((x[..., :whole], BLOCK), (x[..., whole:], x.shape[-1] - whole)):
        if part.shape[-1]:
            matrix = dct_matrix(n, x.dtype, x.device)
            parts.append((part.unflatten(-1, (-1, n)) @ (matrix if inverse else matrix.mT)).flatten(-2))
    return torch.cat(parts, dim=-1).movedim(-1, axis)


def block_dct(x: Tensor, inverse: bool = False) -> Tensor:
    """Cosine transform of each block of 8 x 8 pixels; the coefficients take the place of the pixels.

    White noise stays white. The posterior uncertainty of a blurred or noisy photograph becomes nearly independent
    across coefficients, while it is correlated across pixels.

    Args:
        x: ``(..., H, W)``; blocks at the right and bottom border may be smaller.
        inverse: Whether to apply the inverse transform.

    Returns:
        The same shape.
    """
    return _along(_along(x, -1, inverse), -2, inverse)


@functools.lru_cache(maxsize=16)
@torch.inference_mode(False)
def opponent_matrix(channels: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Tensor:
    """Orthonormal ``(C, C)``: for three channels brightness, red - blue, green - both; otherwise the identity."""
    if channels != 3:
        return torch.eye(channels, dtype=dtype, device=device)
    rows = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, -1.0], [1.0, -2.0, 1.0]], dtype=torch.float64)
    result: Tensor = (rows / rows.norm(dim=1, keepdim=True)).to(device, dtype)
    return result


def mix_channels(matrix: Tensor, x: Tensor) -> Tensor:
    """Apply a ``(C, C)`` matrix to the channels of ``(n, C, H, W)``."""
    return (matrix @ x.flatten(2)).view_as(x)


class Spectrum(nn.Module):
    r"""The covariance S of a stationary Gaussian image, diagonal in cosines and in opponent colours.

    The standard deviations are stored at 16 radial frequencies for each opponent colour. They follow a power law
    between and beyond them, nearly as in photographs (Field 1987), so the spectrum applies to images of any size.

    Args:
        channels: C.
        log_std: Log standard deviations of the orthonormal coefficients, ``(C, 16)``; None means white.

    Example:
        >>> import torch
        >>> from invflow.linear.spectral import Spectrum
        >>> spectrum = Spectrum.estimate(torch.rand(64, 3, 32, 32) * 2 - 1)
        >>> x = torch.randn(2, 3, 20, 30)
        >>> torch.allclose(spectrum.whiten(spectrum.colour(x)), x, atol=1e-4)
        True
    """

    log_std: Tensor

    def __init__(self, channels: int, log_std: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("log_std", torch.zeros(channels, NUM_FREQUENCIES) if log_std is None else log_std.clone())

    @staticmethod
    def frequencies() -> Tensor:
        """The radial frequencies in cycles per pixel, ``(16,)``, evenly spaced in the logarithm."""
        return torch.logspace(math.log10(LOWEST), math.log10(HIGHEST), NUM_FREQUENCIES, dtype=torch.float64)

    @classmethod
    def estimate(cls, states: Tensor, floor: float = 1e-3) -> Spectrum:
        """Estimate the spectrum from data states ``(n, C, H, W)`` with their mean subtracted.

        Args:
            states: Crops of photographs, at least as large as the detail of interest.
            floor: Smallest standard deviation, in units of the state.
        """
        colours = opponent_matrix(states.shape[1], states.dtype, states.device)
        power = torch.stack([dct2(mix_channels(colours, part)).square().mean(0) for part in states.split(256)]).mean(0)
        radius = _radius(*states.shape[-2:]).flatten().clamp(min=1e-9)
        grid, log_power = cls.frequencies().log(), power.double().cpu().flatten(1).clamp(min=floor**2).log()
        # a local power law around each frequency, by least squares (Cleveland 1979): bin means would be noisy where
        # coefficients are few, and biased where they are on one side
        distance = radius.log()[None] - grid[:, None]
        near = torch.exp(-0.5 * (distance / 0.35).square()) + 1e-9
        near[:, 0] = 0.0  # the mean of a crop is not a sample of frequency zero
        total, first, second = near.sum(1), (near * distance).sum(1), (near * distance.square()).sum(1)
        values, slopes = log_power @ near.T, log_power @ (near * distance).T
        smooth = (second * values - first * slopes) / (total * second - first.square())
        return cls(states.shape[1], (0.5 * smooth).float())

    def scales(self, height: int, width: int) -> Tensor:
        """Standard deviations of the cosine coefficients of an image, ``(C, H, W)`` in opponent colours."""
        key = (height, width, self.log_std.dtype, self.log_std.device, self.log_std._version)
        kept: dict[object, Tensor] = self.__dict__.setdefault("_kept", {})
        if key not in kept:
            if len(kept) > 8:
                kept.clear()
            grid = self.frequencies().log().to(self.log_std)
            radius = _radius(height, width).to(self.log_std)
            # frequency zero represents all frequencies below one period per image
            radius[0, 0] = 0.25 / max(height, width)
            place = radius.log()
            index = torch.searchsorted(grid, place.contiguous()).clamp(1, NUM_FREQUENCIES - 1)
            share = (place - grid[index - 1]) / (grid[1] - grid[0])  # beyond the ends: extrapolates the last power law
            low, high = self.log_std[:, index - 1], self.log_std[:, index]
            kept[key] = (low + share * (high - low)).exp()
        return kept[key]

    def forward_transform(self, x: Tensor) -> Tensor:
        """Coefficients ``(n, C, H, W)`` of images: cosine transform of opponent colours."""
        return dct2(mix_channels(opponent_matrix(x.shape[1], x.dtype, x.device), x))

    def inverse_transform(self, coefficients: Tensor) -> Tensor:
        """Images from coefficients, the transpose of :meth:`forward_transform`."""
        colours = opponent_matrix(coefficients.shape[1], coefficients.dtype, coefficients.device)
        return mix_channels(colours.mT, dct2(coefficients, inverse=True))

    def colour(self, z: Tensor) -> Tensor:
        """S^{1/2} z: turn white noise ``(n, C, H, W)`` into a Gaussian image."""
        return self.inverse_transform(self.scales(*z.shape[-2:]).to(z.dtype) * self.forward_transform(z))

    def whiten(self, x: Tensor) -> Tensor:
        """S^{-1/2} x, the inverse of :meth:`colour`."""
        return self.inverse_transform(self.forward_transform(x) / self.scales(*x.shape[-2:]).to(x.dtype))


def _radius(height: int, width: int) -> Tensor:
    """Radial frequency of each cosine in cycles per pixel, ``(H, W)`` float64."""
    rows = torch.arange(height, dtype=torch.float64)[:, None] / (2 * height)
    columns = torch.arange(width, dtype=torch.float64) / (2 * width)
    return torch.hypot(rows, columns)


@torch.no_grad()
def gaussian_estimate(spectrum: Spectrum, mean: Tensor, affine: tuple[float, float], operator: Operator, y: Tensor,
                      sigma: Tensor, iterations: int = 24) -> Tensor:
    r"""The best linear estimate of an image under a stationary Gaussian prior, by a few conjugate gradient steps.

    With prior N(m, S) of the image, the posterior mean m + x solves

    .. math:: (S^{-1} + A^T A / \sigma^2) x = A^T (y - A m) / \sigma^2.

    The preconditioner is the inverse of this matrix with A'A replaced by a multiple of the identity, diagonal in
    cosines: for denoising, one step is exact. For masks it gets worse as the noise decreases. There the noise level
    is lowered to sigma in stages, each started from the previous estimate: the first stages fill large
    holes, the last ones scratches. The same number of steps at sigma alone leaves both grey. For a nonlinear operator,
    the result is :meth:`~invflow.Operator.embed`, without solving.

    Args:
        spectrum: S, in units of the state.
        mean: Mean of the state, ``(C, 1, 1)``.
        affine: (scale, shift) of the decoding, image = scale * state + shift.
        operator: A, with one parameter set or one for each row.
        y: ``(n, *measurement_shape)``.
        sigma: ``(n,)``, noise levels.
        iterations: Number of conjugate gradient steps; a third of them at each of the five levels for a mask, and two
            for denoising.

    Returns:
        ``(n, C, H, W)``, the state, in the dtype of ``y``.
    """
    if not operator.linear:
        return (operator.embed(y) - affine[1]) / affine[0]
    observed = operator.observed()
    power = (spectrum.scales(*operator.image_shape[-2:]).to(y) * affine[0]).square()
    if observed is not None and operator.measurement_shape == operator.image_shape:
        share = observed.to(y).flatten(1).mean(1).view(-1, 1, 1, 1)
    else:
        share = torch.tensor(math.prod(operator.measurement_shape) / math.prod(operator.image_shape)).to(y).clamp(max=1)
    grey = (mean * affine[0] + affine[1]).to(y).expand(len(y), *operator.image_shape)
    difference = y - operator(grey)

    # prior and preconditioner are diagonal in the coefficients, so a step costs a transform and its inverse
    def improved(start: Tensor | None, steps: int, level: float) -> Tensor:
        precision = sigma.to(y).clamp(min=level).view(-1, 1, 1, 1) ** -2

        def pull_back(difference: Tensor) -> Tensor:
            return spectrum.forward_transform(operator.adjoint(only_observed(difference, observed))) * precision

        def normal(coefficients: Tensor) -> Tensor:
            return coefficients / power + pull_back(operator(spectrum.inverse_transform(coefficients)))

        diagonal = 1 / (1 / power + share * precision)
        return solve(normal, pull_back(difference), lambda x: diagonal * x, steps, tolerance=0.0, start=start)[0]

    if operator.structure == "identity":
        noise = sigma.to(y).view(-1, 1, 1, 1).square()
        found = power / (power + noise) * spectrum.forward_transform(difference)
    elif observed is None:
        found = improved(None, iterations, 0.0)
    else:
        found = improved(None, iterations // 3, LEVELS[0])
        for level in LEVELS[1:]:
            found = improved(found, iterations // 3, level)
    return (grey + spectrum.inverse_transform(found) - affine[1]) / affine[0]
