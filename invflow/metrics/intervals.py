"""Highest-density regions, and split-conformal intervals with a guarantee.

Samples are ``(B, N, *image_shape)`` with log weights ``(B, N)`` or None, truths ``(B, *image_shape)``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from invflow.metrics.quality import _check, central_interval, normalised_weights

if TYPE_CHECKING:
    from invflow.posterior import Posterior

__all__ = ["ConformalIntervals", "conformal_scale", "highest_density_coverage", "highest_density_interval"]

_KINDS = ("pixel", "average", "image")


# -- highest-density regions ------------------------------------------------------------------------------------


def highest_density_interval(samples: Tensor, level: float = 0.9,
                             log_weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Shortest interval of each pixel between two samples that holds this share of the samples' weight.

    With equal weights it spans floor(level N) gaps between neighbours (Chen and Shao 1999), so that it needs a
    fair number of samples; it suits a law with one peak.

    Args:
        samples: ``(B, N, *image_shape)``.
        level: in (0, 1).
        log_weights: ``(B, N)`` or None. A weighted interval holds at least ``level`` of the weight.

    Returns:
        ``(low, high)``, each ``(B, *image_shape)``.

    Raises:
        ValueError: for a level out of range or log weights of another shape.
    """
    if not 0 < level < 1:
        raise ValueError(f"level={level}: an interval has a level between 0 and 1, such as 0.9")
    weights = normalised_weights(log_weights, samples, "highest_density_interval")
    shape = (samples.shape[0], *samples.shape[2:])
    ordered, order = samples.reshape(*samples.shape[:2], -1).sort(1)
    count = ordered.shape[1]
    if log_weights is None:
        gaps = min(max(1, math.floor(level * count + 1e-9)), count - 1)
        best = (ordered[:, gaps:] - ordered[:, : count - gaps]).argmin(1, keepdim=True)
        return ordered.gather(1, best)[:, 0].reshape(shape), ordered.gather(1, best + gaps)[:, 0].reshape(shape)
    w = weights[:, :, None].expand_as(ordered).gather(1, order).double()
    total = w.cumsum(1)
    needed = total - w + level * total[:, -1:] * (1 - 1e-9)  # cumulative weight that an interval from here must reach
    end = torch.searchsorted(total.mT.contiguous(), needed.mT.contiguous()).mT
    length = ordered.gather(1, end.clamp(max=count - 1)) - ordered
    # where not enough weight is left above, or none lies here, no interval starts
    best = torch.where((end < count) & (w > 0), length, torch.inf).argmin(1, keepdim=True)
    high = ordered.gather(1, end.clamp(max=count - 1).gather(1, best))
    return ordered.gather(1, best)[:, 0].reshape(shape), high[:, 0].reshape(shape)


def highest_density_coverage(log_density: Tensor, truth_log_density: Tensor, level: float = 0.9,
                             log_weights: Tensor | None = None) -> Tensor:
    """Whether the truth lies in the highest-density region of the posterior, told by densities.

    The region of level p holds the points whose density is exceeded by a share of at most p of the samples
    (Hermans et al. 2022, "A trust crisis in simulation-based inference?"). Any constant in the log density
    drops out; for the exact region pass the log density of the posterior itself, up to a constant.

    Args:
        log_density: of the samples, ``(B, N)``.
        truth_log_density: ``(B,)``.
        level: in (0, 1).
        log_weights: ``(B, N)`` or None.

    Returns:
        ``(B,)`` in bool: the share of samples denser than the truth, counted so that a further sample is inside
        with probability ``level`` as nearly as N allows.

    Raises:
        ValueError: if the shapes do not fit.
    """
    weights = _check(log_density, truth_log_density, log_weights, "highest_density_coverage", fair=False)
    size = 1 / weights.square().sum(1)
    denser = (weights * (log_density > truth_log_density[:, None])).sum(1)
    # the rank of a further sample among N is uniform on N + 1 places, of which a share `level` is inside
    return (denser * size + 0.5) / (size + 1) <= level + 1e-9  # at a tie rounding, and so the order, would decide


# -- split conformal ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ConformalIntervals:
    """Per-pixel intervals, widened or narrowed by what a calibration set asked for; see :func:`conformal_scale`.

    Attributes:
        scale: by which the half width of each central interval is multiplied: ``(*image_shape)`` for the kind
            ``"pixel"``, else a single number ``()``. Over 1: the posterior's own intervals were too narrow.
        level: nominal level of the intervals, before and after.
        kind: ``"pixel"``, ``"average"`` or ``"image"``.
        floor: least half width before scaling, in the units of the image.
        num_calibration: observations in the calibration set.
    """

    scale: Tensor
    level: float
    kind: str
    floor: float
    num_calibration: int

    @property
    def guarantee(self) -> str:
        """What is guaranteed, in a sentence."""
        what = {
            "pixel": f"each pixel's interval holds the truth with probability at least {self.level:g}",
            "average": f"the expected share of pixels whose interval holds the truth is at least {self.level:g}",
            "image": f"with probability at least {self.level:g} the intervals of all pixels hold the truth at once",
        }[self.kind]
        return (f"For a further observation exchangeable with the {self.num_calibration} of the calibration set, "
                f"{what}, on average over calibration sets and observations; not for each observation, nor for other "
                "problems.")

    def interval(self, posterior: Posterior | Tensor, log_weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Intervals of further observations.

        Args:
            posterior: from the same solver with the same settings and number of samples; or samples ``(B, N,
                *image_shape)``.
            log_weights: ``(B, N)`` or None, of samples.

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
    r"""Rescale per-pixel intervals on a calibration set so that they cover, whatever the samples are worth.

    The score of a pixel is \|truth - centre\| / (half width) of its :func:`central_interval`. ``"pixel"``: the scale
    of each pixel is the ceil((B + 1) level)-th smallest of its B scores (split conformal prediction; Papadopoulos,
    Proedrou, Vovk, Gammerman 2002; Lei, G'Sell, Rinaldo, Tibshirani, Wasserman 2018). ``"image"``: the same of
    each image's largest score. ``"average"``: the least scale at which (misses + 1) / (B + 1) is at most
    1 - level, misses being the sum over images of the share of pixels outside (conformal risk control;
    Angelopoulos, Bates, Fisch, Lei, Schuster 2024).

    Args:
        samples: ``(B, N, *image_shape)`` for the calibration set.
        truth: ``(B, *image_shape)``; not used for anything else.
        level: in (0, 1).
        log_weights: ``(B, N)`` or None.
        kind: which coverage is guaranteed, ``"pixel"``, ``"average"`` or ``"image"``.
        floor: least half width, for pixels whose samples all agree; at least 0.

    Returns:
        Intervals for further observations, with their ``guarantee`` in a sentence.

    Raises:
        ValueError: if the shapes do not fit, the kind is unknown, or the set is too small for the level.

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
    # the epsilon keeps rounding of the level from asking for one more
    rank = math.ceil((count + 1) * level - 1e-9)
    if rank > count:
        needed = math.ceil(level / (1 - level) - 1e-9)
        raise ValueError(f"a calibration set of {count} observations is too small for level {level}: it takes {needed}")
    centre, half = _centre_and_half(samples, level, log_weights, floor)
    # 0 / 0: a pixel that is right with any width
    scores = ((truth - centre).abs() / half).nan_to_num(nan=0.0, posinf=torch.inf)
    if kind == "pixel":
        scale = scores.kthvalue(rank, 0).values
    elif kind == "image":
        scale = scores.reshape(count, -1).amax(1).kthvalue(rank).values
    else:
        # misses, in pixels of all images, of which (B + 1)(1 - level) - 1 images' worth may lie outside
        pixels = scores[0].numel()
        allowed = math.floor(((count + 1) * (1 - level) - 1) * pixels + 1e-6)
        scale = scores.flatten().sort(descending=True).values[allowed]
    return ConformalIntervals(scale, level, kind, floor, count)


def _centre_and_half(samples: Tensor, level: float, log_weights: Tensor | None, floor: float) -> tuple[Tensor, Tensor]:
    low, high = central_interval(samples, level, log_weights)
    return 0.5 * (low + high), (0.5 * (high - low)).clamp(min=floor)
