"""Metrics of regions: coverage near ink, energy score of patches, means over blocks of pixels.

A background that every sample reproduces is always covered, and scores of single pixels do not detect how pixels depend
on each other. Samples are ``(B, N, C, H, W)`` with log weights ``(B, N)`` or None, truths ``(B, C, H, W)``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from invflow.metrics.intervals import coverage
from invflow.metrics.quality import _check, energy_score

__all__ = ["block_means", "coverage_near_ink", "near_ink", "patch_energy_score"]


def near_ink(truth: Tensor, threshold: float = 0.1, distance: int = 2) -> Tensor:
    """Pixels within a distance of a value above a threshold, determined by the truth and not by any solver.

    Args:
        truth: ``(B, C, H, W)``; a pixel is ink if any channel is above the threshold.
        threshold: Threshold for the truth's values.
        distance: Distance in pixels along each axis; at 2, the 5 x 5 pixels around a pixel are near it.

    Returns:
        ``(B, C, H, W)`` in bool, the same for all channels.

    Raises:
        ValueError: If the truth is not a picture or the distance is below 0.

    Example:
        >>> import torch
        >>> from invflow.metrics import near_ink
        >>> int(near_ink(torch.eye(9)[None, None, :1].expand(1, 1, 9, 9)).sum())  # ink down the left edge: 3 columns
        27
    """
    if truth.ndim != 4 or distance < 0:
        raise ValueError(f"near_ink takes pictures (B, C, H, W) and a distance of at least 0, not {tuple(truth.shape)} "
                         f"and {distance}")
    ink = (truth > threshold).any(1, keepdim=True).float()
    return F.max_pool2d(ink, 2 * distance + 1, stride=1, padding=distance).bool().expand_as(truth)


def coverage_near_ink(samples: Tensor, truth: Tensor, level: float = 0.9, log_weights: Tensor | None = None, *,
                      threshold: float = 0.1, distance: int = 2) -> Tensor:
    """Mean :func:`coverage` of the pixels that are :func:`near_ink`.

    The pixels depend only on the truth. Because the threshold selects truths that were bright by chance, the coverage
    of an exact posterior can differ from the level. Compare solvers with each other, or with exact draws.

    Args:
        samples: ``(B, N, C, H, W)``.
        truth: ``(B, C, H, W)``.
        level: Nominal level in (0, 1).
        log_weights: ``(B, N)`` or None.
        threshold, distance: Same as in :func:`near_ink`.

    Returns:
        ``(B,)``; NaN for a truth without ink, and, with a warning, for too few effective samples.

    Raises:
        ValueError: If the shapes do not fit or N is too small for the level.
    """
    near = near_ink(truth, threshold, distance)
    inside = coverage(samples, truth, level, log_weights)
    total = torch.where(near, inside, 0.0).flatten(1).sum(1)
    return total / near.flatten(1).sum(1)


def patch_energy_score(samples: Tensor, truth: Tensor, log_weights: Tensor | None = None, *, size: int = 7,
                       stride: int | None = None, fair: bool = True, max_pairs: int = 1 << 21,
                       generator: torch.Generator | None = None) -> Tensor:
    """Mean :func:`energy_score` of patches, which detects how neighbouring pixels depend on each other.

    The energy score of a whole image is mostly the error of its mean, increasingly so for larger images (Pinson and
    Tastu 2013). That of small patches distinguishes laws that differ in their correlations.

    Args:
        samples: ``(B, N, C, H, W)``.
        truth: ``(B, C, H, W)``.
        log_weights: ``(B, N)`` or None.
        size: Side of the square patches, at most that of the image.
        stride: Distance between patches; None for ``size``, so that none overlap. Pixels beyond the last whole patch
            are left out.
        fair: Same as in :func:`energy_score`.
        max_pairs, generator: Same as in :func:`energy_score`.

    Returns:
        ``(B,)``, in the units of the image times the root of a patch's number of values.

    Raises:
        ValueError: If the shapes do not fit or the image is smaller than a patch.
    """
    _check(samples, truth, log_weights, "patch_energy_score", fair)
    _check_picture(truth, size, "patch_energy_score")
    step, scores = size if stride is None else stride, []
    for i in range(0, truth.shape[2] - size + 1, step):
        for j in range(0, truth.shape[3] - size + 1, step):
            x, y = (images[..., i : i + size, j : j + size] for images in (samples, truth))
            scores.append(energy_score(x, y, log_weights, fair=fair, max_pairs=max_pairs, generator=generator))
    return torch.stack(scores).mean(0)


def block_means(images: Tensor, size: int = 4) -> Tensor:
    """Means over square blocks of pixels, for use in place of pixels in :func:`crps` or :func:`coverage`.

    Intervals of single pixels can have the right coverage although sums over a region are always or never covered.

    Args:
        images: ``(..., C, H, W)``, samples or truths.
        size: Side of a block, at most that of the image. Pixels beyond the last whole block are left out.

    Returns:
        ``(..., C, H // size, W // size)``.

    Raises:
        ValueError: If the images are smaller than a block.
    """
    _check_picture(images, size, "block_means")
    result: Tensor = F.avg_pool2d(images.flatten(0, -4), size).unflatten(0, images.shape[:-3])
    return result


def _check_picture(images: Tensor, size: int, name: str) -> None:
    if images.ndim < 4 or not 1 <= size <= min(images.shape[-2:]):
        raise ValueError(f"{name} takes pictures of at least size x size pixels, not {tuple(images.shape)} with "
                         f"size={size}")
