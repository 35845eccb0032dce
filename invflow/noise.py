"""The noise level of a measurement, estimated from the measurement alone."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["estimate_sigma"]

# second differences along both axes, then a diagonal difference where the mask leaves no larger window
_STENCILS = (
    torch.tensor([[1.0, -2.0, 1.0], [-2.0, 4.0, -2.0], [1.0, -2.0, 1.0]]) / 6,
    torch.tensor([[1.0, -1.0], [-1.0, 1.0]]) / 2,
)


def estimate_sigma(y: Tensor, observed: Tensor | None = None) -> Tensor:
    """Noise standard deviation of pictures, by the median absolute fine-scale difference over 0.6745.

    Donoho and Johnstone (1994) with the second difference of Immerkaer (1996), which annihilates edges along
    the axes and smooth shading. It takes fine texture for noise, and correlated noise for less than it is.

    Args:
        y: ``(B, C, H, W)``, with independent noise.
        observed: ``(1 or B, C, H, W)`` bool, or None: all of it.

    Returns:
        ``(B,)``.

    Raises:
        ValueError: for measurements that are no pictures, see no noise, or are observed in too few places.

    Example:
        >>> import torch
        >>> from invflow.noise import estimate_sigma
        >>> y = 0.5 + 0.1 * torch.randn(1, 1, 64, 64, generator=torch.Generator().manual_seed(0))
        >>> round(float(estimate_sigma(y)), 1)
        0.1
    """
    if y.ndim != 4 or min(y.shape[2:]) < 3:
        raise ValueError(
            f"sigma=None estimates the noise of pictures (B, C, H, W), but y has shape {tuple(y.shape)}: "
            "pass sigma=..."
        )
    valid = torch.ones_like(y) if observed is None else observed.to(y).expand_as(y)
    flat, weight = y.flatten(0, 1)[:, None], valid.flatten(0, 1)[:, None]
    found = []
    for stencil in (s.to(y) for s in _STENCILS):
        size = stencil.numel()
        differences = F.conv2d(flat, stencil[None, None]).abs().reshape(len(y), -1)
        complete = F.conv2d(weight, torch.ones_like(stencil)[None, None]).reshape(len(y), -1) > size - 0.5
        median = torch.where(complete, differences, torch.nan).nanmedian(1).values / 0.6745
        found.append(torch.where(complete.sum(1) >= 32, median, torch.nan))
    sigma = torch.where(found[0].isnan(), found[1], found[0])
    if not bool((sigma > 0).all()):
        raise ValueError(
            f"the noise cannot be estimated from y (estimates {sigma.tolist()[:4]}): too few neighbouring "
            "entries are observed, or over half of them carry no noise; pass sigma=..."
        )
    return sigma
