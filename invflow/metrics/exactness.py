"""Distances of samples from an exact posterior in interpretable units: floors and decibels."""

from __future__ import annotations

import torch
from torch import Tensor

from invflow._core.checks import precise
from invflow.metrics.distances import sliced_wasserstein
from invflow.metrics.quality import normalised_weights

__all__ = ["floor_ratio", "mean_gap"]


def mean_gap(samples: Tensor, exact: Tensor, truth: Tensor, log_weights: Tensor | None = None) -> Tensor:
    r"""The gap between the error of a posterior mean and that of the best mean, in decibels.

    .. math:: 10 \log_{10} \frac{|\bar x - x^*|^2}{|E[x \mid y] - x^*|^2}

    It is 0 for the exact mean in the limit of many draws (Zach, Haouchat and Unser 2025, arXiv 2509.12821). For one
    observation it may be negative by chance; on average over many it is not. The mean of N exact draws itself has an
    error of 1 / N of the posterior's variance, so at 64 draws a gap of about 0.07 dB is not meaningful.

    Args:
        samples: ``(B, N, *image_shape)``.
        exact: Draws of the exact posterior, ``(B, M, *image_shape)``; the more, the better.
        truth: ``(B, *image_shape)``.
        log_weights: Log weights of the samples, ``(B, N)`` or None.

    Returns:
        ``(B,)``, in dB.

    Raises:
        ValueError: If the shapes do not fit.

    Example:
        >>> import torch
        >>> from invflow.metrics import mean_gap
        >>> mean_gap(torch.full((1, 2, 3), 2.0), torch.ones(1, 2, 3), torch.zeros(1, 3))
        tensor([6.0206], dtype=torch.float64)
    """
    if samples.shape[2:] != truth.shape[1:] or exact.shape[2:] != truth.shape[1:] or not (
            len(samples) == len(exact) == len(truth)):
        raise ValueError(f"samples {tuple(samples.shape)}, exact draws {tuple(exact.shape)} and truths "
                         f"{tuple(truth.shape)} do not fit: pass (B, N, *image_shape), (B, M, *image_shape) and "
                         "(B, *image_shape)")
    weights = precise(normalised_weights(log_weights, samples, "mean_gap"))
    means = torch.einsum("bn,bnd->bd", weights, precise(samples).flatten(2)), precise(exact).flatten(2).mean(1)
    errors = [(mean - precise(truth).flatten(1)).square().sum(1) for mean in means]
    return 10 * (errors[0] / errors[1]).log10()


def floor_ratio(samples: Tensor, exact: Tensor, log_weights: Tensor | None = None, *, num_projections: int = 200,
                generator: torch.Generator | None = None) -> Tensor:
    """Sliced Wasserstein distance to the exact posterior, in units of the distance between sets of exact draws.

    Two sets of N exact draws differ by chance, the more so the smaller N is. The floor is the mean distance of the
    three pairs among three such sets; the sampler is compared with the first set. 1 is as good as exact.

    Args:
        samples: ``(B, N, *image_shape)``.
        exact: Independent draws of the exact posterior, ``(B, 3 N, *image_shape)``.
        log_weights: Log weights of the samples, ``(B, N)`` or None.
        num_projections: Number of directions, the same for all distances.
        generator: Generator for the directions.

    Returns:
        ``(B,)``.

    Raises:
        ValueError: If there is another number of exact draws.
    """
    n = samples.shape[1]
    if exact.shape[1] != 3 * n or exact.shape[2:] != samples.shape[2:]:
        raise ValueError(f"samples {tuple(samples.shape)} need {3 * n} exact draws of the same shape for each "
                         f"observation, not {tuple(exact.shape)}")
    d = samples[0, 0].numel()
    device = generator.device if generator is not None else samples.device
    directions = torch.randn(num_projections, d, generator=generator, device=device).to(samples)
    directions = directions / directions.norm(dim=1, keepdim=True)
    first, second, third = (part.flatten(2) for part in exact.to(samples).split(n, dim=1))
    pairs = ((first, second), (first, third), (second, third))
    floor = torch.stack([sliced_wasserstein(a, b, projections=directions) for a, b in pairs]).mean(0)
    return sliced_wasserstein(samples.flatten(2), first, projections=directions, log_weights=log_weights) / floor
