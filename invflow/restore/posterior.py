"""The posterior of one picture, with a mean that is at least as good as the picture itself."""

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

#: number of samples for the mean if the map is not affine, so that there is no closed form
_ENOUGH = 16
#: largest number of pixels for which the correction is averaged over all eight symmetries; above it over four, then two
_EIGHT = 2**17
#: noise added to a picture in order to compare estimates, in units of the picture's own noise
_SPLIT = 0.5
#: number of groups of coefficients with nearly the same power
_BINS = 1024


def posterior_of(vfm: VFM, operator: Operator, y: Tensor, sigma: float, samples: int,
                 generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Compute the mean ``(C, H, W)`` and samples ``(samples, C, H, W)`` of one picture, in its own channels.

    Args:
        vfm: Solver for colour images of any size; a grey picture is treated as the mean of three channels.
        operator: Forward operator of the picture.
        y: Measurement ``(1, *measurement_shape)``.
        sigma: Noise level; the value given to the network is clamped to its training range.
        samples: Number of samples.
        generator: Random generator.
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
    """Limit the number of symmetries in the adapter's average inside the ``with`` block."""
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
    """Mix estimates of a noisy picture: network, the picture's own Wiener filter, non-local means, the picture itself.

    A network trained on smooth pictures mistakes the detail of a sharp one for noise. This can be measured without
    the truth: with further noise e, the pictures y + a e and y - e / a have independent noise (Oliveira, Lei and
    Tibshirani 2024). Estimates from the first are compared with the second, and the mixture with the smallest error
    is used.

    Args:
        vfm: Solver whose adapter was trained for denoising.
        operator: The identity.
        y: Noisy picture ``(1, C, H, W)``.
        sigma: Its noise level.
        mean: The network's estimate.
        generator: Generator for e.
        grey: Whether only the mean over the channels counts; their noise is independent.

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

    own = math.sqrt(y.shape[1]) if grey else 1.0  # the noise of the mean over channels is smaller by this factor
    repeated = [non_local_means(counted(image), s / own).expand_as(y) for image, s in ((y, sigma), (seen, level))]
    weights = best_mixture([counted(x) for x in (network, wiener[1], repeated[1], seen)], counted(unseen))
    mixed = sum((w * x for w, x in zip(weights, (mean, wiener[0], repeated[0], y), strict=True)), torch.zeros_like(y))
    return with_slow_cosines(mixed, slow_cosines(wiener[0]))  # where the noise is negligible


def fitted_wiener(vfm: VFM, spectrum: Spectrum, y: Tensor, sigma: float) -> Tensor:
    """The best linear estimate of a noisy picture ``(1, C, H, W)``, after scaling the prior's spectrum to it.

    A factor for each opponent colour maximises the marginal likelihood N(y; mean, k S + sigma^2).
    """
    scale, shift = vfm.prior.decode_affine
    centre = vfm.prior.mean * scale + shift
    seen = spectrum.forward_transform(y - centre)
    power = (spectrum.scales(*y.shape[-2:]).to(y) * scale).square()
    factors = torch.linspace(math.log(0.05), math.log(60), 48).exp().double()[:, None]
    kept = []
    for c in range(y.shape[1]):
        # coefficients with nearly the same power are pooled first: the cost for every single one would take seconds
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
    """Weights of at least 0 that sum to 1 and minimise the mean squared error of the mixture to a target."""
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
        grey: Likelihood of one channel.
        operator: The same operator for three channels.
        generator: Generator for the differences between the noise of the channels.

    Raises:
        ValueError: If the operator does not measure each channel separately.
    """
    shape = tuple(grey.operator.measurement_shape)
    if tuple(operator.measurement_shape) != (3, *shape[1:]):
        raise ValueError(f"{operator} does not measure each channel separately: save the grey file as colour")
    sigma = math.sqrt(3) * grey.sigma
    noise = torch.randn((1, 3, *shape[1:]), generator=generator).to(grey.y)
    # differences between channels that make their noise independent and do not change the mean
    return GaussianLikelihood(operator, grey.y + sigma * (noise - noise.mean(1, keepdim=True)), sigma)


def built_again(operator: Operator, shape: tuple[int, ...], seen: Any = ...) -> Operator:
    """The same operator for images ``(C, H, W)`` of another size or number of channels.

    Args:
        operator: Operator that measures each channel separately.
        shape: Shape of the images.
        seen: Part of its mask to use, if it has one.
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
        made.stand_ins = of.stand_ins  # those of the whole mask
    else:
        made = kind(shape, factor=of.factor, filter=of.filter) if name == "SuperResolution" else kind(shape)
    return made
