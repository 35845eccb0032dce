"""Quality of samples compared with the truth: image quality, proper scores, spread.

Samples are ``(B, N, *image_shape)`` with log weights ``(B, N)`` or None for equal ones, truths ``(B,
*image_shape)``. Log weights need not be normalised. The fair versions leave out the pairs of a sample with
itself, so that their expectation does not depend on N (Ferro 2014, "Fair scores for ensemble forecasts").

With weights w the score of the weighted law, E|X - y| - D / 2 with D = sum w_i w_j |x_i - x_j|, is too high by half of
the error of the weighted law itself. Fair scores subtract its estimate V = (sum w_i^2 e_i - D sum w^2 / 2) /
(1 - sum w^2), e_i = sum_j w_j |x_i - x_j|, the variance of a self-normalised mean with distances instead of squares.
For equal weights V is D / 2(N - 1), as without weights. If one sample has all weight, V is 0, and the score is its
absolute error. Dividing D by 1 - sum w^2 works as well for many effective samples, but for one it gives the score of
the samples without weight. Draws of N(0, I) in 10 dimensions, 64 samples of a wider Gaussian with 25 effective ones:
scores are off by -1.1% (the divisor), +3.0% (none) and -0.4% (this), and with 3.9 effective ones by -3.8%, better than
exact draws, +32% and +14%.
"""

from __future__ import annotations

import math
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor

from invflow._core.checks import precise
from invflow._core.random import as_generator
from invflow._core.shapes import with_axes
from invflow._core.weighted import pair_mass, pieces, variance_weights

__all__ = [
    "crps",
    "energy_score",
    "gaussian_crps",
    "nlpd",
    "psnr",
    "spread",
    "ssim",
]


_CRPS_VALUES = 2**18  # number of values sorted at a time; about a dozen tensors of this size are in memory


# -- one image against another -------------------------------------------------------------------------------


def psnr(x: Tensor, truth: Tensor, data_range: float = 1.0) -> Tensor:
    """Peak signal-to-noise ratio in decibels, 10 log10(data_range^2 / mean squared error), unclipped.

    Args:
        x: Images ``(n, *image_shape)``, or several for each truth, ``(n, N, *image_shape)``.
        truth: ``(n, *image_shape)``.
        data_range: Length of the range of the truth's values; 1 for images in [0, 1].

    Returns:
        ``(n,)`` or ``(n, N)``; infinite where the images agree.

    Raises:
        ValueError: If the shapes do not fit, or if they have no axis of images.

    Example:
        >>> import torch
        >>> from invflow.metrics import psnr
        >>> round(float(psnr(torch.full((1, 1, 4, 4), 0.6), torch.full((1, 1, 4, 4), 0.5))), 3)
        20.0
    """
    if x.shape == truth.shape and x.ndim == 2:  # its rows would be taken for images
        raise ValueError(f"psnr: x and truth have shape {tuple(x.shape)}, without an axis of images: pass "
                         "x[None, None] and truth[None, None] for one grey image")
    x, truth, lead = _pair(x, truth, "psnr", data_range)
    error = (x - truth).square().flatten(lead).mean(-1)
    return 10 * torch.log10(data_range**2 / error)


def ssim(x: Tensor, truth: Tensor, data_range: float = 1.0) -> Tensor:
    """Structural similarity (Wang, Bovik, Sheikh, Simoncelli 2004), mean over positions and channels.

    Gaussian window 11 x 11 with standard deviation 1.5, constants 0.01 and 0.03, at the positions where the
    window lies within the image.

    Args:
        x: Images ``(n, C, H, W)``, or several for each truth, ``(n, N, C, H, W)``; H and W at least 11.
        truth: ``(n, C, H, W)``.
        data_range: Length of the range of the values; 1 for images in [0, 1].

    Returns:
        ``(n,)`` or ``(n, N)``, at most 1.

    Raises:
        ValueError: If the shapes do not fit, or the images are smaller than the window.
    """
    x, truth, lead = _pair(x, truth, "ssim", data_range)
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

    Computed by sorting in O(N log N) (Gneiting and Raftery 2007), in chunks of pixels.

    Args:
        samples: ``(B, N, *image_shape)``.
        truth: ``(B, *image_shape)``.
        log_weights: ``(B, N)`` or None.
        fair: Whether to leave out the pairs of a sample with itself; requires N >= 2. The docstring of this module
            describes the correction for weighted samples; if one has all the weight, the score is that of a point mass,
            its absolute error. ``fair=False`` scores the weighted empirical law itself.

    Returns:
        ``(B, *image_shape)``, in the units of the image.

    Raises:
        ValueError: If the shapes do not fit, or ``fair`` with fewer than two samples.

    Example:
        >>> import torch
        >>> from invflow.metrics import crps
        >>> crps(torch.tensor([[[0.0], [1.0]]]), torch.tensor([[0.5]]))  # errors of 0.5, less half of a distance of 1
        tensor([[0.]])
    """
    weights = _check(samples, truth, log_weights, "crps", fair)
    x, y = samples.reshape(*samples.shape[:2], -1), truth.reshape(len(truth), -1)
    score = torch.empty_like(y, dtype=x.dtype)
    for rows, part in pieces(len(y), y.shape[1], x.shape[1], _CRPS_VALUES):
        w = None if log_weights is None else weights[rows]
        score[rows, part] = _crps(x[rows, :, part], y[rows, part], w, fair)
    return score.reshape(truth.shape)


def _crps(x: Tensor, y: Tensor, weights: Tensor | None, fair: bool) -> Tensor:
    """The score of samples ``(b, N, p)`` and truths ``(b, p)``: ``(b, p)``."""
    count = x.shape[1]
    # sum_{i<j} w_i w_j (x_j - x_i): each gap between neighbours counts (weight below) x (weight above) times
    if weights is None:
        below = torch.arange(1, count, dtype=x.dtype, device=x.device)
        pairs = count * (count - 1 if fair else count)
        half = torch.einsum("bnp,n->bp", x.sort(1).values.diff(dim=1), below * (count - below) / pairs)
        return (x - y[:, None]).abs().mean(1) - half
    ordered, order = x.sort(1)
    gaps = ordered.diff(dim=1)
    w = weights[:, :, None].expand_as(x).gather(1, order)
    error = (w * (ordered - y[:, None]).abs()).sum(1)
    below, above = w.cumsum(1)[:, :-1], w.flip(1).cumsum(1).flip(1)[:, 1:]
    half = (gaps * below * above).sum(1)
    if fair:
        square = w.square()
        below_square, above_square = square.cumsum(1)[:, :-1], square.flip(1).cumsum(1).flip(1)[:, 1:]
        own = (gaps * (below_square * above + below * above_square)).sum(1)  # sum of w_i^2 e_i
        half = half + _law_error(own, 2 * half, weights)
    return error - half


def gaussian_crps(mean: Tensor, std: Tensor, truth: Tensor) -> Tensor:
    """Continuous ranked probability score of N(mean, std^2) in closed form (Gneiting et al. 2005).

    Args:
        mean: Mean, of any shape.
        std: Standard deviation, at least 0, broadcast against ``mean``; 0 is a point mass.
        truth: Truth, broadcast against ``mean``.

    Returns:
        The score of each entry, in the units of the truth.

    Raises:
        ValueError: If a standard deviation is negative.
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
                 max_pairs: int = 1 << 21, max_entries: int = 1 << 20,
                 generator: torch.Generator | None = None) -> Tensor:
    """Energy score with the Euclidean norm, E|X - truth| - E|X - X'| / 2 (Gneiting and Raftery 2007).

    For one-pixel images it is the CRPS. ``fair=False`` keeps the N zero distances of samples to themselves,
    as some published code does; the score is then larger by E|X - X'| / 2N in expectation.

    If there are at most ``max_pairs`` distances between samples, all N^2 are computed. Otherwise only distances within
    random groups are, with groups as large as ``max_pairs`` allows. Any two samples are equally likely to share a
    group, so the score keeps its expectation. At 2^21 pairs, which is all pairs of 1,448 samples, the error from this
    is far below that of the samples themselves.

    Args:
        samples: ``(B, N, *image_shape)``.
        truth: ``(B, *image_shape)``.
        log_weights: ``(B, N)`` or None.
        fair: Whether to leave out the pairs of a sample with itself; requires N >= 2. For weights see the docstring of
            this module.
        max_pairs: Largest number of distances between samples of an observation; at least 2 N are computed.
        max_entries: Number of distances in memory at a time.
        generator: Generator for the groups; used only if there are more than ``max_pairs`` distances.

    Returns:
        ``(B,)``.

    Raises:
        ValueError: If the shapes do not fit, or ``fair`` with fewer than two samples.
    """
    weights = _check(samples, truth, log_weights, "energy_score", fair)
    x, y = samples.reshape(*samples.shape[:2], -1), truth.reshape(len(truth), -1)
    count, scores = x.shape[1], []
    met, order = max(2, max_pairs // count), None  # size of the groups within which all distances are computed
    if met < count:
        source = as_generator(generator)
        order = torch.randperm(count, generator=source, device=source.device).to(x.device)
    for samples_of, truth_of, w in zip(x, y, weights, strict=True):
        mean = _mean_distances(samples_of, w, order, met, max_entries)  # e_i
        pairs, score = w @ mean, w @ torch.linalg.vector_norm(samples_of - truth_of, dim=1)
        score = score - 0.5 * pairs
        if fair:
            score = score - _law_error(w.square() @ mean, pairs, w[None])[0]
        scores.append(score)
    return torch.stack(scores)


def _mean_distances(x: Tensor, weights: Tensor, order: Tensor | None, met: int, max_entries: int) -> Tensor:
    """Weighted mean distance of each sample ``(N, d)`` to all others ``(N,)``.

    With a random order, an estimate from groups of ``met`` samples: any two share a group with the same probability.
    """
    if order is None:
        rows = x.split(max(1, max_entries // len(x)))
        return torch.cat([exact_distances(part[None], x[None])[0] @ weights for part in rows])
    found, pairs = torch.zeros_like(weights), 0
    for group in order.split(met):
        for part in group.split(max(1, max_entries // len(group))):
            found[part] = exact_distances(x[part][None], x[group][None])[0] @ weights[group]
        pairs += len(group) * (len(group) - 1)
    return found * (len(x) * (len(x) - 1) / pairs)


def nlpd(log_likelihood: Tensor, log_weights: Tensor | None = None) -> Tensor:
    """Negative log predictive density of a second measurement of the same truth, -log sum_i w_i p(y' | x_i).

    It detects errors where the data are informative, and hardly any elsewhere. Read it together with the CRPS and the
    spread.

    Args:
        log_likelihood: ``(B, N)``, log p(y' | x_i), the values of a likelihood of y' for the samples.
        log_weights: ``(B, N)`` or None.

    Returns:
        ``(B,)``, in nats.

    Raises:
        ValueError: If the shapes differ.
    """
    if log_likelihood.ndim != 2:
        raise ValueError(f"nlpd takes log likelihoods (B, N), not {tuple(log_likelihood.shape)}")
    weights = normalised_weights(log_weights, log_likelihood, "nlpd")
    return -torch.logsumexp(log_likelihood + weights.log(), 1)


# -- spread ------------------------------------------------------------------------------------


def spread(samples: Tensor, log_weights: Tensor | None = None) -> Tensor:
    """Standard deviation of each pixel over the samples, from the unbiased variance.

    Args:
        samples: ``(B, N, *image_shape)``, N >= 2.
        log_weights: ``(B, N)`` or None.

    Returns:
        ``(B, *image_shape)``; 0 if one sample has all the weight. With weights, the variance is the weighted variance
        plus the variance of the weighted mean, by which the former is too small; see :meth:`invflow.Posterior.std`.

    Raises:
        ValueError: If there are fewer than two samples, or the log weights have another shape.
    """
    if samples.ndim < 2 or samples.shape[1] < 2:
        raise ValueError(f"spread takes samples (B, N, ...) with N >= 2, not {tuple(samples.shape)}")
    weights = normalised_weights(log_weights, samples, "spread")
    return weighted_variances(samples, weights)[0].sqrt()


# -- shared with the distances -------------------------------------------------------------------------------


def normalised_weights(log_weights: Tensor | None, samples: Tensor, name: str) -> Tensor:
    """Weights ``(B, N)`` that sum to 1 over N, for samples ``(B, N, ...)``; equal ones for None."""
    shape = tuple(samples.shape[:2])
    if log_weights is None:
        return samples.new_full(shape, 1 / shape[1])
    if tuple(log_weights.shape) != shape:
        raise ValueError(
            f"{name}: log_weights has shape {tuple(log_weights.shape)}, but samples {tuple(samples.shape)} "
            f"need {shape}: pass posterior.log_weights, or None for equal weights"
        )
    return precise(log_weights).softmax(1).to(samples)


def weighted_variances(samples: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Variance of each pixel and that of its weighted mean, unbiased for equal weights: ``(B, *image_shape)`` each."""
    x, wide = samples.reshape(*samples.shape[:2], -1), variance_weights(weights)
    found = [torch.empty_like(x[:, 0]) for _ in wide]
    for rows, part in pieces(len(x), x.shape[2], x.shape[1]):
        values = x[rows, :, part]
        square = (values - torch.einsum("bn,bnp->bp", weights[rows], values)[:, None]).square()
        for out, w in zip(found, wide, strict=True):
            out[rows, part] = torch.einsum("bn,bnp->bp", w[rows], square)
    whole, mean = (out.reshape(len(x), *samples.shape[2:]) for out in found)
    return whole, mean


def _law_error(own: Tensor, pairs: Tensor, weights: Tensor) -> Tensor:
    """V of the module's docstring from sum w_i^2 e_i and D, ``(B, ...)`` each; 0 if one sample has all the weight."""
    mass, square = with_axes(pair_mass(weights), own.ndim), with_axes(weights.square().sum(1), own.ndim)
    return torch.where(mass > 0, (own - 0.5 * square * pairs) / mass.clamp(min=torch.finfo(mass.dtype).tiny), 0.0)


def exact_distances(x: Tensor, y: Tensor) -> Tensor:
    """Euclidean distances ``(B, N, M)`` from differences, since the faster expansion is inaccurate for small ones."""
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")


def _pair(x: Tensor, truth: Tensor, name: str, data_range: float = 1.0) -> tuple[Tensor, Tensor, int]:
    """``x``, the truth with the axes to broadcast against it, and the number of leading axes of the result."""
    if data_range == 1 and x.numel() and truth.numel():
        # in one copy, which waits for the GPU only once
        ends = torch.stack([end.to(x) for images in (x, truth) for end in images.aminmax()]).tolist()
        for argument, low, high in (("x", *ends[:2]), ("truth", *ends[2:])):
            if high > 30 and low >= 0:
                warnings.warn(f"{name}: {argument} has values up to {high:.4g}, which looks like [0, 255]: images are "
                              f"in [0, 1], so pass {argument} / 255, or data_range=255", stacklevel=4)
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
