"""How good samples are against the truth: image quality, proper scores, central intervals.

Samples are ``(B, N, *image_shape)`` with log weights ``(B, N)`` or None for equal ones, truths ``(B,
*image_shape)``. Log weights need not be normalised. The fair versions leave out the pair of a sample with
itself, so that their expectation does not depend on N (Ferro 2014, "Fair scores for ensemble forecasts").
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "central_interval",
    "coverage",
    "crps",
    "energy_score",
    "gaussian_crps",
    "nlpd",
    "psnr",
    "spread",
    "ssim",
]


# -- one image against another -------------------------------------------------------------------------------


def psnr(x: Tensor, truth: Tensor, data_range: float = 1.0) -> Tensor:
    """Peak signal-to-noise ratio in decibels, 10 log10(data_range^2 / mean squared error), unclipped.

    Args:
        x: images ``(n, *image_shape)``, or several for each truth, ``(n, N, *image_shape)``.
        truth: ``(n, *image_shape)``.
        data_range: the range of the truth's values; 1 for images in [0, 1].

    Returns:
        ``(n,)`` or ``(n, N)``; infinite where the images agree.

    Raises:
        ValueError: if the shapes do not fit.

    Example:
        >>> import torch
        >>> from invflow.metrics import psnr
        >>> round(float(psnr(torch.full((1, 1, 4, 4), 0.6), torch.full((1, 1, 4, 4), 0.5))), 3)
        20.0
    """
    x, truth, lead = _pair(x, truth, "psnr")
    error = (x - truth).square().flatten(lead).mean(-1)
    return 10 * torch.log10(data_range**2 / error)


def ssim(x: Tensor, truth: Tensor, data_range: float = 1.0) -> Tensor:
    """Structural similarity (Wang, Bovik, Sheikh, Simoncelli 2004), mean over positions and channels.

    Gaussian window 11 x 11 with standard deviation 1.5, constants 0.01 and 0.03, at the positions where the
    window lies within the image.

    Args:
        x: images ``(n, C, H, W)``, or several for each truth, ``(n, N, C, H, W)``; H and W at least 11.
        truth: ``(n, C, H, W)``.
        data_range: the range of the values; 1 for images in [0, 1].

    Returns:
        ``(n,)`` or ``(n, N)``, at most 1.

    Raises:
        ValueError: if the shapes do not fit, or the images are smaller than the window.
    """
    x, truth, lead = _pair(x, truth, "ssim")
    if truth.ndim != lead + 3 or min(truth.shape[-2:]) < 11:
        raise ValueError(f"ssim takes images (n, C, H, W) of 11 x 11 or more, not {tuple(truth.shape)}")
    x, truth = torch.broadcast_tensors(x, truth)
    shape = x.shape
    a, b = x.reshape(-1, 1, *shape[-2:]), truth.reshape(-1, 1, *shape[-2:])
    offset = torch.arange(11, dtype=a.dtype, device=a.device) - 5
    window = torch.softmax(-offset.square() / (2 * 1.5**2), 0)

    def smooth(image: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(image, window.reshape(1, 1, -1, 1)), window.reshape(1, 1, 1, -1))

    mean_a, mean_b = smooth(a), smooth(b)
    var_a, var_b = smooth(a * a) - mean_a**2, smooth(b * b) - mean_b**2
    covariance = smooth(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    structure = (2 * covariance + c2) / (var_a + var_b + c2)
    return (luminance * structure).mean((-3, -2, -1)).reshape(shape[:-2]).mean(-1)


# -- proper scores -------------------------------------------------------------------------------------------


def crps(samples: Tensor, truth: Tensor, log_weights: Tensor | None = None, *, fair: bool = True) -> Tensor:
    """Continuous ranked probability score of each pixel, E|X - truth| - E|X - X'| / 2; smaller is better.

    By sorting, O(N log N) (Gneiting and Raftery 2007). With weights the fair version divides the sum over
    pairs by 1 - sum w^2, as for independent weighted draws.

    Args:
        samples: ``(B, N, *image_shape)``.
        truth: ``(B, *image_shape)``.
        log_weights: ``(B, N)`` or None.
        fair: leave out the pairs of a sample with itself; N >= 2. Where one sample has all the weight there
            is no pair, and the score is that of a point mass, its absolute error. ``fair=False`` scores the
            weighted empirical law itself.

    Returns:
        ``(B, *image_shape)``, in the units of the image.

    Raises:
        ValueError: if the shapes do not fit, or ``fair`` with fewer than two samples.

    Example:
        >>> import torch
        >>> from invflow.metrics import crps
        >>> crps(torch.tensor([[[0.0], [1.0]]]), torch.tensor([[0.5]]))  # errors of 0.5, less half of a distance of 1
        tensor([[0.]])
    """
    weights = _check(samples, truth, log_weights, "crps", fair)
    error = (samples - truth[:, None]).abs()
    ordered, order = samples.sort(1)
    w = weights.reshape(*weights.shape, *([1] * (samples.ndim - 2))).expand_as(samples)
    error = (w * error).sum(1)
    if log_weights is not None:
        w = w.gather(1, order)
    # sum_{i<j} w_i w_j (x_j - x_i): each gap between neighbours counts (weight below) x (weight above) times
    below = w.cumsum(1)[:, :-1]
    above = w.flip(1).cumsum(1).flip(1)[:, 1:]
    half_sum = (ordered.diff(dim=1) * below * above).sum(1)
    if fair:
        half_mass = (w[:, 1:] * below).sum(1)  # equals (1 - sum w^2) / 2, without the cancellation
        half_sum = _ratio(half_sum, 2 * half_mass)
    return error - half_sum


def gaussian_crps(mean: Tensor, std: Tensor, truth: Tensor) -> Tensor:
    """Continuous ranked probability score of N(mean, std^2) in closed form (Gneiting et al. 2005).

    Args:
        mean: any shape.
        std: standard deviation, at least 0, broadcast against ``mean``; 0 is a point mass.
        truth: broadcast against ``mean``.

    Returns:
        The score of each entry, in the units of the truth.

    Raises:
        ValueError: if a standard deviation is negative.
    """
    if bool((std < 0).any()):
        raise ValueError("gaussian_crps takes a standard deviation, which cannot be negative")
    error = truth - mean
    z = error / std.clamp(min=torch.finfo(std.dtype).tiny)
    # z (2 Phi(z) - 1) = z erf(z / sqrt 2); multiplied by std it is the error times erf, finite also at std
    # = 0
    density = torch.exp(-0.5 * z.square()) / math.sqrt(2 * math.pi)
    return error * torch.erf(z / math.sqrt(2)) + std * (2 * density - 1 / math.sqrt(math.pi))


def energy_score(samples: Tensor, truth: Tensor, log_weights: Tensor | None = None, *, fair: bool = True,
                 max_entries: int = 1 << 24) -> Tensor:
    """Energy score with the Euclidean norm, E|X - truth| - E|X - X'| / 2 (Gneiting and Raftery 2007).

    For one-pixel images it is the CRPS. ``fair=False`` keeps the N zero distances of samples to themselves,
    as some published code does; the score is then larger by E|X - X'| / 2N in expectation.

    Args:
        samples: ``(B, N, *image_shape)``.
        truth: ``(B, *image_shape)``.
        log_weights: ``(B, N)`` or None.
        fair: leave out the pairs of a sample with itself; N >= 2.
        max_entries: distances held in memory at a time.

    Returns:
        ``(B,)``.

    Raises:
        ValueError: if the shapes do not fit, or ``fair`` with fewer than two samples.
    """
    weights = _check(samples, truth, log_weights, "energy_score", fair)
    x, y = samples.reshape(*samples.shape[:2], -1), truth.reshape(truth.shape[0], 1, -1)
    error = (weights * torch.linalg.vector_norm(x - y, dim=2)).sum(1)
    rows = max(1, max_entries // (x.shape[0] * x.shape[1]))
    pairs = torch.zeros_like(error)
    for start in range(0, x.shape[1], rows):
        distances = exact_distances(x[:, start : start + rows], x)
        pairs += torch.einsum("bi,bij,bj->b", weights[:, start : start + rows], distances, weights)
    if fair:
        pairs = _ratio(pairs, pair_mass(weights))
    return error - 0.5 * pairs


def nlpd(log_likelihood: Tensor, log_weights: Tensor | None = None) -> Tensor:
    """Negative log predictive density of a second measurement of the same truth, -log sum_i w_i p(y' | x_i).

    It sees errors where data speak and hardly any where they are silent: read it beside the CRPS and the
    spread.

    Args:
        log_likelihood: ``(B, N)``, log p(y' | x_i), what a likelihood of y' returns for the samples.
        log_weights: ``(B, N)`` or None.

    Returns:
        ``(B,)``, in nats.

    Raises:
        ValueError: if the shapes differ.
    """
    if log_likelihood.ndim != 2:
        raise ValueError(f"nlpd takes log likelihoods (B, N), not {tuple(log_likelihood.shape)}")
    weights = normalised_weights(log_weights, log_likelihood, "nlpd")
    return -torch.logsumexp(log_likelihood + weights.log(), 1)


# -- spread and intervals ------------------------------------------------------------------------------------


def spread(samples: Tensor, log_weights: Tensor | None = None) -> Tensor:
    """Standard deviation of each pixel over the samples, from the unbiased variance.

    Args:
        samples: ``(B, N, *image_shape)``, N >= 2.
        log_weights: ``(B, N)`` or None.

    Returns:
        ``(B, *image_shape)``; 0 where one sample has all the weight.

    Raises:
        ValueError: for fewer than two samples or log weights of another shape.
    """
    if samples.ndim < 2 or samples.shape[1] < 2:
        raise ValueError(f"spread takes samples (B, N, ...) with N >= 2, not {tuple(samples.shape)}")
    weights = normalised_weights(log_weights, samples, "spread")
    w = weights.reshape(*weights.shape, *([1] * (samples.ndim - 2)))
    centred = samples - (w * samples).sum(1, keepdim=True)
    mass = pair_mass(weights).reshape(-1, *([1] * (samples.ndim - 2)))
    return _ratio((w * centred.square()).sum(1), mass).sqrt()


def central_interval(samples: Tensor, level: float = 0.9,
                     log_weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Central interval of each pixel into which a further draw of the same law falls with this probability.

    The i-th of N ordered samples is taken for the quantile i / (N + 1), since a further draw falls below it
    with just that probability; the usual i / N would make honest samples look too narrow. With weights N is
    the effective sample size and a sample lies in the middle of its own weight.

    Args:
        samples: ``(B, N, *image_shape)``.
        level: in (0, 1).
        log_weights: ``(B, N)`` or None.

    Returns:
        ``(low, high)``, each ``(B, *image_shape)``.

    Raises:
        ValueError: if N is too small for the level: its outermost samples leave 2 / (N + 1) outside.
    """
    if not 0 < level < 1:
        raise ValueError(f"level={level}: a central interval has a level between 0 and 1, such as 0.9")
    needed = math.ceil(2 / (1 - level) - 1 - 1e-9)
    if samples.ndim < 2 or samples.shape[1] < needed:
        raise ValueError(f"an interval of level {level} needs {needed} samples; got {tuple(samples.shape)}")
    weights = normalised_weights(log_weights, samples, "central_interval")
    ordered, order = samples.flatten(2).sort(1) if samples.ndim > 2 else samples[:, :, None].sort(1)
    w = weights[:, :, None].expand_as(ordered).gather(1, order)
    size = 1 / weights.square().sum(1)[:, None, None]
    position = (size * (w.cumsum(1) - 0.5 * w) + 0.5) / (size + 1)
    low, high = (_interpolate(ordered, position, p) for p in ((1 - level) / 2, (1 + level) / 2))
    shape = (samples.shape[0], *samples.shape[2:])
    return low.reshape(shape), high.reshape(shape)


def coverage(samples: Tensor, truth: Tensor, level: float = 0.9, log_weights: Tensor | None = None) -> Tensor:
    """Whether each pixel's truth lies in the :func:`central_interval`; the mean estimates the coverage.

    Args:
        samples: ``(B, N, *image_shape)``.
        truth: ``(B, *image_shape)``.
        level: in (0, 1); an honest posterior has this share covered.
        log_weights: ``(B, N)`` or None.

    Returns:
        ``(B, *image_shape)`` in bool.

    Raises:
        ValueError: if the shapes do not fit or N is too small for the level.

    Example:
        >>> import torch
        >>> from invflow.metrics import coverage
        >>> samples = torch.arange(19.0).reshape(1, 19, 1)
        >>> coverage(samples, torch.tensor([[9.0]])), coverage(samples, torch.tensor([[30.0]]))
        (tensor([[True]]), tensor([[False]]))
    """
    _check(samples, truth, log_weights, "coverage", fair=False)
    low, high = central_interval(samples, level, log_weights)
    return (low <= truth) & (truth <= high)


def _ratio(numerator: Tensor, mass: Tensor) -> Tensor:
    """Divide by the mass of pairs; 0 where one sample has all the weight and there are no pairs."""
    return torch.where(mass > 0, numerator / mass.clamp(min=torch.finfo(mass.dtype).tiny), 0.0)


def _interpolate(ordered: Tensor, position: Tensor, p: float) -> Tensor:
    """Value at quantile ``p`` of samples ``(B, N, D)`` sorted over N: ``(B, D)``."""
    above = (position < p - 1e-6).sum(1, keepdim=True).clamp(1, ordered.shape[1] - 1)
    q0, q1 = position.gather(1, above - 1), position.gather(1, above)
    x0, x1 = ordered.gather(1, above - 1), ordered.gather(1, above)
    share = ((p - q0) / (q1 - q0).clamp(min=torch.finfo(q0.dtype).tiny)).clamp(0, 1)
    return (x0 + share * (x1 - x0))[:, 0]


# -- shared with the distances -------------------------------------------------------------------------------


def normalised_weights(log_weights: Tensor | None, samples: Tensor, name: str) -> Tensor:
    """Weights ``(B, N)`` that sum to 1 over N, for samples ``(B, N, ...)``; equal ones for None."""
    shape = tuple(samples.shape[:2])
    if log_weights is None:
        return samples.new_full(shape, 1 / shape[1])
    if tuple(log_weights.shape) != shape:
        raise ValueError(
            f"{name}: log_weights has shape {tuple(log_weights.shape)}, but samples {tuple(samples.shape)} "
            f"take {shape}: pass posterior.log_weights, or None for equal weights"
        )
    return torch.softmax(log_weights.to(samples), 1)


def pair_mass(weights: Tensor) -> Tensor:
    """Weight of the pairs of different samples, 1 - sum w^2, without the cancellation: (B, N) to (B,)."""
    return 2 * (weights[:, 1:] * weights.cumsum(1)[:, :-1]).sum(1)


def exact_distances(x: Tensor, y: Tensor) -> Tensor:
    """Euclidean distances ``(B, N, M)`` from differences: the faster expansion loses small distances."""
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")


def _pair(x: Tensor, truth: Tensor, name: str) -> tuple[Tensor, Tensor, int]:
    """Truth unsqueezed to meet ``x``, and the number of leading axes of the result."""
    if x.shape == truth.shape and x.ndim >= 2:
        return x, truth, 1
    if x.ndim == truth.ndim + 1 >= 3 and (x.shape[0], *x.shape[2:]) == tuple(truth.shape):
        return x, truth[:, None], 2
    raise ValueError(
        f"{name}: images {tuple(x.shape)} do not fit the truth {tuple(truth.shape)}: pass "
        "(n, *image_shape) or (n, N, *image_shape) against (n, *image_shape)"
    )


def _check(samples: Tensor, truth: Tensor, log_weights: Tensor | None, name: str, fair: bool) -> Tensor:
    """Check the shapes and return normalised weights ``(B, N)``."""
    if samples.ndim != truth.ndim + 1 or (samples.shape[0], *samples.shape[2:]) != tuple(truth.shape):
        raise ValueError(
            f"{name}: samples {tuple(samples.shape)} do not fit the truth {tuple(truth.shape)}: pass samples "
            "(B, N, *image_shape) and truth (B, *image_shape)"
        )
    if samples.shape[1] < (2 if fair else 1):
        raise ValueError(f"{name}: {samples.shape[1]} samples; fair=True takes at least 2, fair=False 1")
    return normalised_weights(log_weights, samples, name)
