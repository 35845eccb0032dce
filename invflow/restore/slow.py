"""How far samples lie from their mean at slow scales: as far as the data allow, and no block by itself."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from invflow.linear.spectral import Spectrum, gaussian_estimate

if TYPE_CHECKING:
    from invflow.operator import Operator

__all__ = ["with_slow_cosines", "with_slow_deviations"]

#: cosines of fewer cycles a pixel than 1 / (2 * SIDE) are slow
SIDE = 8


def with_slow_deviations(spectrum: Spectrum, scale: float, operator: Operator, sigma: float, away: Tensor,
                         generator: torch.Generator) -> Tensor:
    """Deviations of samples whose slow cosines are drawn from the posterior of a stationary Gaussian image.

    An adapter whose Gaussian is diagonal in blocks of 8 x 8 pixels has one deviation for all that is slower than a
    block, and draws it for each block by itself: sums over many of them vary far more than the data allow, and each
    sample has a tint. At slow scales photographs vary much more than noise, so that a Gaussian knows what the data
    leave open: of noise, blur and enlargement for each cosine by itself, of a mask by the best linear estimate of a
    draw on a lattice eight times coarser.

    Args:
        spectrum: of the prior, in units of the state.
        scale: image units of one of those.
        operator: A, with one set.
        sigma: noise level.
        away: ``(n, C, H, W)``, samples minus their mean.
        generator: draws the slow cosines.

    Returns:
        The same shape; its other cosines are those of ``away``.
    """
    height, width = (math.ceil(side / SIDE) for side in away.shape[-2:])
    if min(height, width) < 2 or not len(away):
        return away
    coefficients = spectrum.forward_transform(away)
    noise = torch.randn((len(away), away.shape[1], height, width), generator=generator).to(away)
    if operator.observed() is None:
        power = (spectrum.scales(*away.shape[-2:])[:, :height, :width].to(away) * scale).square()
        variance = 1 / (1 / power + _information(operator, height, width).to(away) / sigma**2)
        slow = variance.sqrt() * noise
    else:
        slow = SIDE * spectrum.forward_transform(_under_a_mask(spectrum, scale, operator, sigma, noise, generator))
    coefficients[..., :height, :width] = slow
    return spectrum.inverse_transform(coefficients)


def with_slow_cosines(spectrum: Spectrum, image: Tensor, other: Tensor) -> Tensor:
    """An image ``(n, C, H, W)`` with the slow cosines of another."""
    coefficients = spectrum.forward_transform(other - image)
    height, width = (math.ceil(side / SIDE) for side in image.shape[-2:])
    coefficients[..., height:, :] = 0
    coefficients[..., :, width:] = 0
    return image + spectrum.inverse_transform(coefficients)


def _information(operator: Operator, height: int, width: int) -> Tensor:
    """What a measurement with unit noise tells of the square of each slow cosine, ``(height, width)``."""
    factor = operator.image_shape[1] // operator.measurement_shape[1]
    kernel: Tensor = getattr(operator, "kernel", torch.full((1, 1), 1.0) if factor == 1
                             else torch.full((factor, factor), factor**-2.0))
    kernel = kernel.reshape(kernel.shape[-2:])
    waves = [torch.exp(-1j * math.pi * torch.arange(n)[:, None] * torch.arange(size) / side)
             for n, size, side in zip((height, width), kernel.shape, operator.image_shape[1:], strict=True)]
    passed: Tensor = waves[0] @ kernel.cpu().to(waves[0]) @ waves[1].mT
    return (passed.abs() / factor).square()


def _under_a_mask(spectrum: Spectrum, scale: float, operator: Operator, sigma: float, noise: Tensor,
                  generator: torch.Generator) -> Tensor:
    """Draws of the deviation on the coarser lattice: a draw from the prior less what its measurement tells of it."""
    from invflow.operators import MaskInpainting

    seen = operator.observed()
    assert seen is not None
    share = avg_pool2d(seen.float().mean(1, keepdim=True), SIDE, ceil_mode=True)
    mask = (share > min(0.5, 0.999 * float(share.max())))[0]
    coarse, level = MaskInpainting(mask, tuple(noise.shape[1:])), sigma / SIDE
    prior = _coarser(spectrum).to(noise.device)
    x = scale * prior.colour(noise)
    y = coarse(x) + level * torch.randn(x.shape, generator=generator).to(x)
    centre = torch.zeros(noise.shape[1], 1, 1).to(noise)
    known = gaussian_estimate(prior, centre, (scale, 0.0), coarse, y, torch.full((len(y),), level).to(noise))
    return x - scale * known


def _coarser(spectrum: Spectrum) -> Spectrum:
    """The spectrum of what is left of an image on a lattice that is eight times coarser, its detail taken off."""
    grid, values = Spectrum.frequencies().log().to(spectrum.log_std), spectrum.log_std
    place = grid - math.log(SIDE)
    after = torch.searchsorted(grid, place.contiguous()).clamp(1, len(grid) - 1)
    share = (place - grid[after - 1]) / (grid[1] - grid[0])
    kept = values[:, after - 1] + share * (values[:, after] - values[:, after - 1])
    return Spectrum(len(values), kept - math.log(SIDE))
