"""The posterior of one picture, with a mean that is no worse than the picture itself."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import combinations
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from invflow.likelihood import GaussianLikelihood
from invflow.linear.slow import slow_cosines, with_slow_cosines
from invflow.linear.spectral import Spectrum
from invflow.restore.non_local import non_local_means

if TYPE_CHECKING:
    from invflow.operator import Operator
    from invflow.solvers.vfm import VFM

__all__ = ["best_mixture", "built_again", "fitted_wiener", "in_colour", "no_worse_than_the_picture", "posterior_of"]

#: samples for a mean, where the map is not affine and no closed form gives it
_ENOUGH = 16
#: up to how many pixels the correction is averaged over all eight symmetries; beyond, over four, and then two
_EIGHT = 2**17
#: noise that is added to a picture to judge estimates by what is left of it, in units of its own
_SPLIT = 0.5
#: groups of coefficients of nearly the same power
_BINS = 1024


def posterior_of(vfm: VFM, operator: Operator, y: Tensor, sigma: float, samples: int,
                 generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Mean ``(C, H, W)`` and samples ``(samples, C, H, W)`` of one picture, in its own channels.

    Args:
        vfm: for colour images of any size; grey pictures become three channels whose mean they are.
        operator: what the picture was seen through.
        y: ``(1, *measurement_shape)``.
        sigma: noise level; what the network is told is kept within what it was trained for.
        samples: how many.
        generator: source of randomness.
    """
    grey = y.shape[1] == 1 and vfm.prior.image_shape[0] == 3
    scale = math.sqrt(3) if grey else 1.0
    likelihood = GaussianLikelihood(operator, y, told(vfm, operator, scale * sigma) / scale)
    if grey:
        likelihood = in_colour(likelihood, built_again(operator, (3, *operator.image_shape[1:])), generator)
    pixels = math.prod(likelihood.operator.image_shape[1:])
    with _symmetries(vfm, 8 if pixels <= _EIGHT else 4 if pixels <= 4 * _EIGHT else 2):
        posterior = vfm.sample(likelihood, max(_ENOUGH if vfm.prior.network is not None else 1, samples),
                               generator=generator)
    mean, images = posterior.mean(), posterior.samples[0, :samples]
    if operator.structure == "identity":
        better = no_worse_than_the_picture(vfm, likelihood.operator, likelihood.y, scale * sigma, mean, generator, grey)
        images, mean = images + (better - mean), better
    return (mean[0].mean(0, keepdim=True), images.mean(1, keepdim=True)) if grey else (mean[0], images)


def told(vfm: VFM, operator: Operator, sigma: float) -> float:
    """The nearest noise level that the network was trained for."""
    usual = (0.01, 0.25) if operator.structure == "identity" else (0.005, 0.2)
    names = [name for name in (operator.problem_class, *operator.stand_ins) if name in vfm.adapter.classes]
    low, high = vfm.adapter.levels.get(str(names[0]) if names else "", usual)
    result: float = min(max(sigma, low), high)
    return result


@contextmanager
def _symmetries(vfm: VFM, most: int) -> Iterator[None]:
    """At most so many symmetries in the adapter's average, for a while."""
    adapter: Any = vfm.adapter
    before = getattr(adapter, "symmetries", None)
    if before is not None:
        adapter.symmetries = min(before, most)
    try:
        yield
    finally:
        if before is not None:
            adapter.symmetries = before


def no_worse_than_the_picture(vfm: VFM, operator: Operator, y: Tensor, sigma: float, mean: Tensor,
                              generator: torch.Generator, grey: bool = False) -> Tensor:
    """A mixture of estimates of a noisy picture: network, the picture's own Wiener filter, non-local means, itself.

    A network that knows smooth pictures takes the detail of a sharp one for noise. How far it does can be seen without
    the truth: noise e is added to the picture, y + a e, and taken off, y - e / a, which makes two pictures with
    independent noise (Oliveira, Lei and Tibshirani 2024). What is estimated from the first is compared with the second,
    and the mixture is that which comes closest.

    Args:
        vfm: whose adapter knows denoising.
        operator: the identity.
        y: ``(1, C, H, W)``.
        sigma: its noise.
        mean: the network's estimate of it.
        generator: draws e.
        grey: whether the mean over the channels, whose noise is independent, is all that counts.

    Returns:
        ``(1, C, H, W)``.
    """
    spectrum = getattr(vfm.adapter, "spectrum", None)
    if spectrum is None:
        return mean
    noise = sigma * torch.randn(y.shape, generator=generator).to(y)
    seen, unseen = y + _SPLIT * noise, y - noise / _SPLIT
    level = sigma * math.sqrt(1 + _SPLIT**2)
    again = GaussianLikelihood(operator, seen, told(vfm, operator, level))
    with _symmetries(vfm, 1):
        network = vfm.sample(again, 1, generator=generator).mean()
    wiener = [fitted_wiener(vfm, spectrum, image, s) for image, s in ((y, sigma), (seen, level))]

    def counted(image: Tensor) -> Tensor:
        return image.mean(1, keepdim=True) if grey else image

    own = math.sqrt(y.shape[1]) if grey else 1.0  # of a mean the noise is as much less
    repeated = [non_local_means(counted(image), s / own).expand_as(y) for image, s in ((y, sigma), (seen, level))]
    weights = best_mixture([counted(x) for x in (network, wiener[1], repeated[1], seen)], counted(unseen))
    mixed = sum((w * x for w, x in zip(weights, (mean, wiener[0], repeated[0], y), strict=True)), torch.zeros_like(y))
    return with_slow_cosines(mixed, slow_cosines(wiener[0]))  # where the noise is nothing beside the picture


def fitted_wiener(vfm: VFM, spectrum: Spectrum, y: Tensor, sigma: float) -> Tensor:
    """The best linear estimate of a noisy picture ``(1, C, H, W)``, once the prior's spectrum is scaled for it.

    A factor for each opponent colour maximises the marginal likelihood N(y; mean, k S + sigma^2).
    """
    scale, shift = vfm.prior.decode_affine
    centre = vfm.prior.mean * scale + shift
    seen = spectrum.forward_transform(y - centre)
    power = (spectrum.scales(*y.shape[-2:]).to(y) * scale).square()
    factors = torch.linspace(math.log(0.05), math.log(60), 48).exp().double()[:, None]
    kept = []
    for c in range(y.shape[1]):
        # coefficients of nearly the same power are summed first: as many costs of all of them would take seconds
        place = power[c].log()
        least = place.min()
        place = ((place - least) * (_BINS - 1) / (place.max() - least)).round().long().flatten()
        number = torch.bincount(place, minlength=_BINS)
        square, s = (torch.bincount(place, x.flatten().double(), minlength=_BINS) / number.clamp(min=1)
                     for x in (seen[0, c].square(), power[c]))
        variance = factors * s + sigma**2
        k = float(factors[((square / variance + variance.log()) * number).sum(1).argmin()])
        kept.append(k * power[c] / (k * power[c] + sigma**2))
    return centre + spectrum.inverse_transform(torch.stack(kept) * seen)


def best_mixture(estimates: list[Tensor], target: Tensor) -> list[float]:
    """Weights of at least 0 that sum to 1, with which estimates come closest to a target in the mean square."""
    errors = torch.stack([(x - target).flatten().double() for x in estimates])
    gram, n = (errors @ errors.T) / errors.shape[1], len(estimates)
    best, found = math.inf, [1.0] + [0.0] * (n - 1)
    for size in range(1, n + 1):
        for members in combinations(range(n), size):
            part = gram[list(members)][:, list(members)]
            w = torch.linalg.lstsq(part, torch.ones(size, dtype=torch.float64)).solution
            w = w / w.sum()
            if bool((w >= 0).all()) and float(w @ part @ w) < best:
                best, found = float(w @ part @ w), [0.0] * n
                for i, value in zip(members, w.tolist(), strict=True):
                    found[i] = value
    return found


def in_colour(grey: GaussianLikelihood, operator: Operator, generator: torch.Generator) -> GaussianLikelihood:
    """The likelihood of colour images whose mean over channels was measured, with independent noise in each.

    Args:
        grey: of one channel.
        operator: the same one for three channels.
        generator: draws the differences between the channels' noises.

    Raises:
        ValueError: for an operator that does not measure each channel by itself.
    """
    shape = tuple(grey.operator.measurement_shape)
    if tuple(operator.measurement_shape) != (3, *shape[1:]):
        raise ValueError(f"{operator} does not measure each channel by itself: save the grey file as colour")
    sigma = math.sqrt(3) * grey.sigma
    noise = torch.randn((1, 3, *shape[1:]), generator=generator).to(grey.y)
    # differences between channels that make the three noises independent, and leave their mean alone
    return GaussianLikelihood(operator, grey.y + sigma * (noise - noise.mean(1, keepdim=True)), sigma)


def built_again(operator: Operator, shape: tuple[int, ...], seen: Any = ...) -> Operator:
    """The same operator for images ``(C, H, W)`` of another size or number of channels.

    Args:
        operator: that sees each channel by itself.
        shape: of the images.
        seen: which part of its mask is taken, where it has one.
    """
    from invflow import operators

    name = type(operator).__name__
    kind: Any = operators.find(name)
    of: Any = operator
    made: Operator
    if name == "Blur":
        made = kind(of.kernel, shape, padding=of.padding, problem_class=of.problem_class)
    elif name == "MaskInpainting":
        made = kind(of.mask[seen], shape, of.problem_class)
        made.stand_ins = of.stand_ins  # of the whole mask
    else:
        made = kind(shape, factor=of.factor, filter=of.filter) if name == "SuperResolution" else kind(shape)
    return made
