"""Deviation of samples from their mean at low frequencies: as large as the data allow, consistent across blocks."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, max_pool2d

from invflow.linear.spectral import Spectrum, dct_matrix, gaussian_estimate, mix_channels, opponent_matrix
from invflow.operator import Operator

__all__ = ["draw_slow_cosines", "hides_blocks", "slow_cosines", "with_slow_cosines"]

#: cosines below 1 / (2 * SIDE) cycles per pixel count as slow
SIDE = 8
#: side of the square around an observed pixel in which others count as observed at low frequencies
NEAR = 5


def draw_slow_cosines(spectrum: Spectrum, scale: float, operator: Operator, sigma: float, n: int,
                      generator: torch.Generator) -> Tensor | None:
    """Draw the deviation of slow cosines from their mean, from the posterior of a stationary Gaussian image.

    An adapter whose Gaussian is diagonal in blocks of 8 x 8 pixels has one standard deviation for everything slower
    than a block, and draws it independently for each block. Sums over many blocks then vary far more than the data
    allow, and each sample has a tint. At low frequencies photographs vary much more than noise, so a Gaussian prior
    determines the posterior uncertainty: separately for each cosine for noise, blur and super-resolution, and for a
    mask by the best linear estimate of a draw on a lattice that is eight times coarser.

    Args:
        spectrum: Spectrum of the prior, in units of the state.
        scale: Image units per unit of the state.
        operator: A, with one parameter set. If it observes no pixels directly, it must act equally at all positions.
        sigma: Noise level.
        n: Number of samples.
        generator: Source of randomness.

    Returns:
        Coefficients ``(n, C, h, w)`` for :func:`with_slow_cosines`; None for images that are too small to have any.
    """
    channels, *size = operator.image_shape
    height, width = (math.ceil(side / SIDE) for side in size)
    if min(height, width) < 2:
        return None
    noise = torch.randn((n, channels, height, width), generator=generator).to(spectrum.log_std)
    if operator.observed() is not None:
        return SIDE * spectrum.forward_transform(_under_a_mask(spectrum, scale, operator, sigma, noise, generator))
    power = (spectrum.scales(*size)[:, :height, :width] * scale).square()
    return noise / (1 / power + _information(operator, height, width).to(noise) / sigma**2).sqrt()


def with_slow_cosines(images: Tensor, coefficients: Tensor) -> Tensor:
    """Replace the slow cosines of images ``(n, C, H, W)``.

    Args:
        images: Images, or their deviations from a mean.
        coefficients: ``(n, C, h, w)``, of opponent colours.
    """
    number = (coefficients.shape[-2], coefficients.shape[-1])
    change = coefficients.to(images) - slow_cosines(images, number)
    rows, columns = _cosines(images, number)
    colours = opponent_matrix(images.shape[1], images.dtype, images.device)
    return images + rows.mT @ (mix_channels(colours.mT, change) @ columns)


def slow_cosines(images: Tensor, number: tuple[int, int] | None = None) -> Tensor:
    """The slow cosines ``(n, C, h, w)`` of images ``(n, C, H, W)``, in opponent colours; or a given number of them."""
    height, width = images.shape[-2:]
    rows, columns = _cosines(images, number or (math.ceil(height / SIDE), math.ceil(width / SIDE)))
    return mix_channels(opponent_matrix(images.shape[1], images.dtype, images.device), rows @ images @ columns.mT)


def _cosines(images: Tensor, number: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The first rows of the orthonormal cosine transforms of height and width."""
    rows, columns = (dct_matrix(side, images.dtype, images.device, count)
                     for side, count in zip(images.shape[-2:], number, strict=True))
    return rows, columns


def _information(operator: Operator, height: int, width: int) -> Tensor:
    """Information of a measurement with unit noise about each slow cosine, ``(height, width)``."""
    size, measured = operator.image_shape[1:], operator.measurement_shape
    device = next((buffer.device for buffer in operator.buffers()), None)
    unit = torch.zeros(1, *measured, device=device)
    unit[0, 0, measured[1] // 2, measured[2] // 2] = 1.0
    kernel = operator.adjoint(unit)[0, 0]  # response of the central pixel
    waves = [torch.exp(-1j * math.pi * torch.arange(n)[:, None] * torch.arange(side) / side).to(kernel.device)
             for n, side in zip((height, width), size, strict=True)]
    passed: Tensor = waves[0] @ kernel.to(waves[0]) @ waves[1].mT
    return passed.abs().square() * (math.prod(measured[1:]) / math.prod(size))


class _Lattice(Operator):
    """Operator that observes some positions of a lattice, ``(1, 1, h, w)`` bool."""

    def __init__(self, seen: Tensor, image_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.image_shape = self.measurement_shape = image_shape
        self.register_buffer("seen", seen.expand(1, *image_shape))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.observed()

    def adjoint(self, y: Tensor) -> Tensor:
        return y * self.observed()

    def observed(self) -> Tensor:
        seen: Tensor = self.seen
        return seen


def hides_blocks(operator: Operator) -> bool:
    """Whether a mask has holes at least as large as the blocks of slow cosines."""
    seen = operator.observed()
    return seen is not None and not bool(_seen_blocks(seen.float()).all())


def _seen_blocks(seen: Tensor) -> Tensor:
    """Blocks observed at low frequencies, ``(1, 1, h, w)``; a pixel between observed ones counts as observed."""
    near = max_pool2d(seen.mean(1, keepdim=True), NEAR, stride=1, padding=NEAR // 2)
    share = avg_pool2d(near, SIDE, ceil_mode=True)
    return share > min(0.5, 0.999 * float(share.max()))


def _under_a_mask(spectrum: Spectrum, scale: float, operator: Operator, sigma: float, noise: Tensor,
                  generator: torch.Generator) -> Tensor:
    """Draws of the deviation on the coarser lattice: a prior draw minus its estimate from its own measurement."""
    seen = operator.observed()
    assert seen is not None
    shown, inside = seen.to(noise).mean(1, keepdim=True), _seen_blocks(seen.to(noise))
    share = float(avg_pool2d(shown, SIDE, ceil_mode=True)[inside].mean())
    coarse, level = _Lattice(inside, tuple(noise.shape[1:])), sigma / SIDE / math.sqrt(share)
    prior = _coarser(spectrum)
    x = scale * prior.colour(noise)
    y = coarse(x) + level * torch.randn(x.shape, generator=generator).to(x)
    centre = torch.zeros(noise.shape[1], 1, 1).to(noise)
    known = gaussian_estimate(prior, centre, (scale, 0.0), coarse, y, torch.full((len(y),), level).to(noise))
    return x - scale * known


def _coarser(spectrum: Spectrum) -> Spectrum:
    """Spectrum of a smoothed image on a lattice that is eight times coarser."""
    grid, values = Spectrum.frequencies().log().to(spectrum.log_std), spectrum.log_std
    place = grid - math.log(SIDE)
    after = torch.searchsorted(grid, place.contiguous()).clamp(1, len(grid) - 1)
    share = (place - grid[after - 1]) / (grid[1] - grid[0])
    kept = values[:, after - 1] + share * (values[:, after] - values[:, after - 1])
    return Spectrum(len(values), kept - math.log(SIDE))
