"""Central intervals and their coverage, and split-conformal intervals with a guarantee.

Samples are ``(B, N, *image_shape)`` with log weights ``(B, N)`` or None, truths ``(B, *image_shape)``.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from invflow._core.checks import precise
from invflow._core.shapes import with_axes
from invflow._core.weighted import effective_size, least_samples, pieces, quantiles, rank_window
from invflow.metrics.quality import _check, normalised_weights

if TYPE_CHECKING:
    from invflow.posterior import Posterior

__all__ = ["ConformalIntervals", "central_interval", "conformal_scale", "coverage"]

_KINDS = ("pixel", "average", "image")


# -- central intervals -------------------------------------------------------------------------------------------


def central_interval(samples: Tensor, level: float = 0.9,
                     log_weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Central interval of each pixel, as :meth:`invflow.Posterior.interval` gives it.

    The i-th of N ordered samples is used as the quantile i / (N + 1), since a further draw falls below it
    with exactly that probability; the usual i / N would make calibrated samples look too narrow. With weights, N is
    the effective sample size, and samples of weight zero are ignored.

    Args:
        samples: ``(B, N, *image_shape)``.
        level: in (0, 1).
        log_weights: ``(B, N)`` or None.

    Returns:
        ``(low, high)``, each ``(B, *image_shape)``. NaN, with a warning, for observations with too few effective
        samples.

    Raises:
        ValueError: If N is too small for the level: its outermost samples leave 2 / (N + 1) outside.
    """
    few = too_few(samples, level, log_weights, "central_interval")
    low, high = _interval(samples, level, log_weights)
    few = with_axes(few, low.ndim)
    return torch.where(few, torch.nan, low), torch.where(few, torch.nan, high)


def coverage(samples: Tensor, truth: Tensor, level: float = 0.9, log_weights: Tensor | None = None) -> Tensor:
    """Whether each pixel's truth lies in its central interval; the mean estimates the coverage.

    The value is deterministic, and 0 or 1 except for truths at the edges: N samples leave N + 1 places for the truth,
    and the ends of an interval fall within a place unless level (N + 1) / 2 is an integer. Such a place counts by its
    share inside, so an exact posterior has coverage ``level`` in expectation, for any N and any law (the interpolated
    ends of :func:`central_interval` hold .909 of Gaussian draws for .9 at 32 samples). Ties are split evenly.

    Args:
        samples: ``(B, N, *image_shape)``.
        truth: ``(B, *image_shape)``.
        level: Nominal level in (0, 1); the expected coverage of a calibrated posterior.
        log_weights: ``(B, N)`` or None. N is then the effective sample size, and samples of weight zero are ignored.

    Returns:
        ``(B, *image_shape)``, from 0 to 1. NaN, with a warning, for observations with too few effective samples: 19 for
        90%.

    Raises:
        ValueError: If the shapes do not fit or N is too small for the level.

    Example:
        >>> import torch
        >>> from invflow.metrics import coverage
        >>> samples = torch.arange(19.0).reshape(1, 19, 1)
        >>> coverage(samples, torch.tensor([[9.0]])), coverage(samples, torch.tensor([[30.0]]))
        (tensor([[1.]]), tensor([[0.]]))
    """
    weights = _check(samples, truth, log_weights, "coverage", fair=False)
    few = too_few(samples, level, log_weights, "coverage")
    size = sample_sizes(weights, log_weights)
    x, y = samples.reshape(*samples.shape[:2], -1), truth.reshape(len(truth), -1)
    inside = torch.empty_like(y, dtype=x.dtype)
    for rows, part in pieces(len(y), y.shape[1], x.shape[1]):
        values, at, w = x[rows, :, part], y[rows, None, part], precise(weights[rows])
        below, equal = (torch.einsum("bn,bnp->bp", w, found.to(w)) for found in (values < at, values == at))
        inside[rows, part] = share_inside(below, equal, size[rows, None], (1 - level) / 2, (1 + level) / 2).to(inside)
    inside[few] = torch.nan
    return inside.reshape(truth.shape)


def share_inside(below: Tensor, equal: Tensor, size: Tensor, first: float, last: float) -> Tensor:
    """Probability that a randomised rank is between two levels; see :func:`~invflow._core.weighted.rank_window`."""
    low, high = rank_window(below, equal, size)
    inside = (high.clamp(max=last) - low.clamp(min=first)) / (high - low)
    return inside.clamp(0, 1).round(decimals=6)  # an end that equals a level can differ from it by rounding


def sample_sizes(weights: Tensor, log_weights: Tensor | None) -> Tensor:
    """Number of samples of each observation, ``(B,)``; the effective one if there are weights."""
    if log_weights is None:
        return torch.full_like(precise(weights[:, 0]), weights.shape[1])
    return effective_size(weights)


def too_few(samples: Tensor, level: float, log_weights: Tensor | None, name: str, sides: int = 2) -> Tensor:
    """Whether each observation has too few effective samples for a level, ``(B,)`` in bool; warns if any has.

    Raises:
        ValueError: If there are too few samples, with or without weights, or the level is out of range.
    """
    needed = least_samples(level, sides)
    if samples.ndim < 2 or samples.shape[1] < needed:
        raise ValueError(f"an interval of level {level} needs {needed} samples; got {tuple(samples.shape)}")
    weights = normalised_weights(log_weights, samples, name)
    size = sample_sizes(weights, log_weights)
    few = size < needed * (1 - 1e-5)  # tolerance for equal weights in single precision
    if bool(few.any()):
        warnings.warn(f"{name}: a level of {level} needs {needed} effective samples, but {int(few.sum())} of "
                      f"{len(few)} observations have fewer ({float(size.min()):.3g} at least): their results are NaN",
                      stacklevel=3)
    return few


def _interval(samples: Tensor, level: float, log_weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """The interval for any number of effective samples; at worst from the smallest to the largest sample."""
    weights = None if log_weights is None else normalised_weights(log_weights, samples, "central_interval")
    low, high = quantiles(samples, weights, ((1 - level) / 2, (1 + level) / 2))
    return low, high


# -- split conformal ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ConformalIntervals:
    """Per-pixel intervals, widened or narrowed according to a calibration set; see :func:`conformal_scale`.

    Attributes:
        scale: Factor on the half width of each central interval: ``(*image_shape)`` for the kind
            ``"pixel"``, otherwise a single number ``()``. Above 1, the posterior's own intervals were too narrow.
        level: Nominal level of the intervals, before and after.
        kind: ``"pixel"``, ``"average"`` or ``"image"``.
        floor: Smallest half width before scaling, in the units of the image.
        num_calibration: Number of observations in the calibration set.
    """

    scale: Tensor
    level: float
    kind: str
    floor: float
    num_calibration: int

    @property
    def guarantee(self) -> str:
        """The guarantee in a sentence."""
        what = {
            "pixel": f"each pixel's interval holds the truth with probability at least {self.level:g}",
            "average": f"the expected share of pixels whose interval holds the truth is at least {self.level:g}",
            "image": f"with probability at least {self.level:g} the intervals of all pixels hold the truth at once",
        }[self.kind]
        return (f"For a further observation exchangeable with the {self.num_calibration} of the calibration set, "
                f"{what}, on average over calibration sets and observations; not for each observation, nor for other "
                "problems.")

    def interval(self, posterior: Posterior | Tensor, log_weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Compute intervals of further observations.

        Args:
            posterior: A posterior from the same solver with the same settings and number of samples; or samples
                ``(B, N, *image_shape)``.
            log_weights: Log weights of the samples, ``(B, N)`` or None.

        Returns:
            ``(low, high)``, each ``(B, *image_shape)``.
        """
        samples: Tensor
        if isinstance(posterior, Tensor):
            samples = posterior
        else:
            samples, log_weights = posterior.samples, posterior.log_weights if posterior.weighted else None
        centre, half = _centre_and_half(samples, self.level, log_weights, self.floor)
        if self.scale.ndim and tuple(self.scale.shape) != tuple(centre.shape[1:]):
            raise ValueError(f"the scale has shape {tuple(self.scale.shape)}, images {tuple(centre.shape[1:])}: these "
                             "intervals were calibrated for images of another shape")
        half = half * self.scale.to(half)
        return centre - half, centre + half

    def covered(self, posterior: Posterior | Tensor, truth: Tensor, log_weights: Tensor | None = None) -> Tensor:
        """Whether each pixel's truth lies inside: ``(B, *image_shape)`` in bool."""
        low, high = self.interval(posterior, log_weights)
        return (low <= truth) & (truth <= high)


def conformal_scale(samples: Tensor, truth: Tensor, level: float = 0.9, log_weights: Tensor | None = None, *,
                    kind: str = "average", floor: float = 1e-3) -> ConformalIntervals:
    r"""Rescale per-pixel intervals on a calibration set so that they have guaranteed coverage for any samples.

    The score of a pixel is \|truth - centre\| / (half width), for its interval by
    :meth:`invflow.Posterior.interval` (the guarantee needs no number of effective samples). ``"pixel"``: the scale
    of each pixel is the ceil((B + 1) level)-th smallest of its B scores (split conformal prediction; Papadopoulos,
    Proedrou, Vovk, Gammerman 2002; Lei, G'Sell, Rinaldo, Tibshirani, Wasserman 2018). ``"image"``: the same for
    each image's largest score. ``"average"``: the smallest scale at which (misses + 1) / (B + 1) is at most
    1 - level, misses being the sum over images of the share of pixels outside (conformal risk control;
    Angelopoulos, Bates, Fisch, Lei, Schuster 2024).

    Args:
        samples: ``(B, N, *image_shape)`` for the calibration set.
        truth: ``(B, *image_shape)``; not used for anything else.
        level: in (0, 1).
        log_weights: ``(B, N)`` or None. An observation with too few effective samples for the level, 19 for 90%, is
            not informative: its interval contains every value, with a warning, and the guarantee still holds.
        kind: Kind of coverage that is guaranteed, ``"pixel"``, ``"average"`` or ``"image"``.
        floor: Smallest half width, for pixels whose samples all agree; at least 0.

    Returns:
        Intervals for further observations, with their ``guarantee`` in a sentence.

    Raises:
        ValueError: If the shapes do not fit, the kind is unknown, or the set is too small for the level.

    Example:
        >>> import torch
        >>> from invflow.metrics import conformal_scale
        >>> g = torch.Generator().manual_seed(0)
        >>> truth, narrow = torch.randn(50, 8, generator=g), 0.5 * torch.randn(50, 99, 8, generator=g)
        >>> bool(conformal_scale(narrow, truth, 0.9).scale > 1.5)
        True
    """
    _check(samples, truth, log_weights, "conformal_scale", fair=False)
    if kind not in _KINDS or floor < 0:
        raise ValueError(f"kind={kind!r} must be one of {', '.join(map(repr, _KINDS))}, floor={floor} at least 0")
    count = len(truth)
    # the epsilon keeps rounding of the level from requiring one more
    rank = math.ceil((count + 1) * level - 1e-9)
    if rank > count:
        needed = math.ceil(level / (1 - level) - 1e-9)
        raise ValueError(f"a calibration set of {count} observations is too small for level {level}: pass {needed}")
    centre, half = _centre_and_half(samples, level, log_weights, floor)
    # 0 / 0 is a pixel that is right at any width
    scores = ((truth - centre).abs() / half).nan_to_num(nan=0.0, posinf=torch.inf)
    scores = torch.where(half.isinf().all(), torch.nan, scores)  # no observation is informative
    if kind == "pixel":
        scale = scores.kthvalue(rank, 0).values
    elif kind == "image":
        scale = scores.reshape(count, -1).amax(1).kthvalue(rank).values
    else:
        # misses in pixels over all images; as many pixels as (B + 1)(1 - level) - 1 images have may lie outside
        pixels = scores[0].numel()
        allowed = math.floor(((count + 1) * (1 - level) - 1) * pixels + 1e-6)
        scale = scores.flatten().sort(descending=True).values[allowed]
    return ConformalIntervals(scale, level, kind, floor, count)


def _centre_and_half(samples: Tensor, level: float, log_weights: Tensor | None, floor: float) -> tuple[Tensor, Tensor]:
    least_samples(level)  # raises an error for a level out of range
    low, high = _interval(samples, level, log_weights)
    half = (0.5 * (high - low)).clamp(min=floor)
    if log_weights is not None:
        size = effective_size(normalised_weights(log_weights, samples, "conformal_scale"))
        few = size < min(least_samples(level), samples.shape[1]) * (1 - 1e-5)
        if bool(few.any()):
            warnings.warn(f"an interval of level {level} needs {least_samples(level)} effective samples, but "
                          f"{int(few.sum())} of {len(few)} observations have fewer ({float(size.min()):.3g} at least): "
                          "their intervals contain every value", stacklevel=3)
        half = torch.where(few.reshape(-1, *[1] * (half.ndim - 1)), torch.inf, half)
    return 0.5 * (low + high), half
