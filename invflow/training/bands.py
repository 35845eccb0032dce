"""Spread of a VFM by band of frequency: factors that give residuals and samples the same spectrum."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from invflow.likelihood import GaussianLikelihood
from invflow.linear.bands import NUM_BANDS, bands_of
from invflow.models.spectral_adapter import SpectralAdapter
from invflow.solvers.vfm import VFM
from invflow.training import TrainingProblem

__all__ = ["band_factors", "positive_solution"]

#: observations at a time
CHUNK = 8
#: limits of the factors
LIMITS = (0.2, 5.0)


@torch.no_grad()
def band_factors(vfm: VFM, images: Tensor, problems: Sequence[TrainingProblem], *, num_samples: int = 4,
                 seed: int = 0) -> dict[str, list[list[float]]]:
    """Factor of each problem class, opponent colour and band, relative to those of the adapter.

    With them, the residuals of truths and of samples have the same power in each band of the cosines of the whole
    image, in the mean over the images, each in units of its samples' power. A coefficient of a block has power in
    several bands of the image, so the factors solve a small linear problem with positive unknowns. The slow cosines
    (:mod:`invflow.linear.slow`) do not depend on the factors and are left out. Classes whose operators hide whole
    blocks have no slow cosines, and no factors are fitted: seen and hidden blocks would need different ones.

    Args:
        vfm: Solver with a :class:`~invflow.models.spectral_adapter.SpectralAdapter` and a Gaussian map, without a
            network.
        images: ``(n, C, H, W)``, held out from all training; each is observed once in each class.
        problems: Problem classes, with their ranges of operators and noise levels.
        num_samples: Samples of each posterior.
        seed: Random seed.

    Raises:
        ValueError: For another adapter or map.
    """
    adapter = vfm.adapter
    if not isinstance(adapter, SpectralAdapter) or vfm.prior.network is not None:
        raise ValueError(f"band_factors takes a VFM with a SpectralAdapter and a map without a network, whose samples "
                         f"are Gaussian, not a {type(adapter).__name__} with network={vfm.prior.network_name!r}")
    own = adapter.resized(tuple(images.shape[1:]))
    assert isinstance(own, SpectralAdapter)
    found = {str(problem.operator.problem_class): _factors(own, images, problem, num_samples,
                                                           torch.Generator().manual_seed(seed * 1000 + index))
             for index, problem in enumerate(problems)}
    return {name: factors for name, factors in found.items() if factors is not None}


def _factors(adapter: SpectralAdapter, images: Tensor, problem: TrainingProblem, num_samples: int,
             g: torch.Generator) -> list[list[float]] | None:
    """Factors of one problem class, ``C`` rows of six; None if its operators hide blocks."""
    (scale, shift), size = adapter.decode_affine, (images.shape[-2], images.shape[-1])
    spectrum, bands, of_image = adapter.spectrum, bands_of(*size), bands_of(*size, block=None)
    error = torch.zeros(images.shape[1], NUM_BANDS, dtype=torch.float64)
    parts = torch.zeros(images.shape[1], NUM_BANDS, NUM_BANDS, dtype=torch.float64)  # from the blocks' to the image's

    def image(z: Tensor) -> Tensor:
        return scale * spectrum.scales(*size) * spectrum.forward_transform(adapter.to_state(z))

    for truth in images.split(CHUNK):
        operator, sigma = problem.operator.randomize(len(truth), g), problem.draw_sigma(len(truth), g)
        likelihood = GaussianLikelihood(operator, operator.measure(truth, sigma, generator=g), sigma)
        mean, std, _ = adapter.proposal(likelihood, quiet=True)
        slow = adapter.slow_cosines(likelihood, 1, g)
        if slow is None:
            return None
        kept = torch.ones(size)
        kept[: slow.shape[-2], : slow.shape[-1]] = 0.0  # drawn by other means
        # each observation has the same weight: otherwise those with the strongest noise would decide alone
        z = std * torch.randn((num_samples, *std.shape), generator=g)
        weight = kept / (image(z[0]) * kept).square().mean((1, 2, 3), keepdim=True)
        estimate = scale * (spectrum.colour(adapter.to_state(mean)) + adapter.mean) + shift
        _add(error, weight * spectrum.forward_transform(truth - estimate).square(), of_image)
        for draw in z:
            for band in range(NUM_BANDS):
                _add(parts[:, :, band], weight * image(draw * (bands == band)).square() / num_samples, of_image)
    found = torch.stack([positive_solution(a, e) for a, e in zip(parts, error, strict=True)]).sqrt().clamp(*LIMITS)
    return [[float(f"{value:.3g}") for value in row] for row in found.tolist()]


def positive_solution(matrix: Tensor, target: Tensor, steps: int = 50) -> Tensor:
    """Positive x with ``matrix @ x`` near a positive target, in proportion, by multiplicative steps from 1.

    They minimise the Kullback-Leibler divergence, with each row divided by its target (Richardson 1972, Lucy 1974).

    Args:
        matrix: ``(m, n)``, with no negative entry.
        target: ``(m,)``, positive.
        steps: Number of steps.

    Example:
        >>> import torch
        >>> positive_solution(torch.tensor([[2.0, 0.0], [1.0, 1.0]]), torch.tensor([4.0, 5.0])).round(decimals=3)
        tensor([2., 3.])
    """
    a = matrix / target[:, None]
    x, total = torch.ones_like(a[0]), a.sum(0)
    for _ in range(steps):
        x = x * (a.mT @ (1 / (a @ x))) / total
    return x


def _add(total: Tensor, squares: Tensor, bands: Tensor) -> None:
    """Add the sums of squares ``(n, C, h, w)`` in each band to ``(C, 6)``."""
    total.index_add_(1, bands.flatten(), squares.sum(0).flatten(1).double().cpu())
