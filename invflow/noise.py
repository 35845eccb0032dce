"""The noise level of a measurement, estimated from the measurement alone."""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["estimate_sigma"]

# second differences along both axes, then a diagonal difference where the mask leaves no larger window
_STENCILS = (
    torch.tensor([[1.0, -2.0, 1.0], [-2.0, 4.0, -2.0], [1.0, -2.0, 1.0]]) / 6,
    torch.tensor([[1.0, -1.0], [-1.0, 1.0]]) / 2,
)


# side of the patches, and how many of them for each of their values
_PATCH, _PATCHES = 8, 100

# ITU-R BT.601, as JPEG has it
_LUMINANCE = (0.299, 0.587, 0.114)


def estimate_sigma(y: Tensor, observed: Tensor | None = None) -> Tensor:
    """Noise standard deviation of pictures, by the median absolute fine-scale difference over 0.6745.

    Donoho and Johnstone (1994) with the second difference of Immerkaer (1996), which annihilates edges along
    the axes and smooth shading. It takes fine texture for noise. Of a photograph, where there are enough patches of
    8 x 8 pixels for it, the covariance of patches is asked too (Chen, Zhu and Heng 2015), whose small eigenvalues
    are the noise's where texture fills some directions only; the smaller of the two estimates is given, with a
    warning where they differ by a factor of two. Colour of a lower resolution, as in most JPEG files, has few
    directions with noise: the patches are then those of the luminance.

    On photographs with noise of 0.025 or more added it was within a tenth, on a page of print a quarter too
    high; at 0.01 up to a quarter too high (the page: two thirds), for photographs have some noise of their own. Noise
    of 0.05 that was then saved as JPEG of quality 95, colour at half the resolution, was found within a tenth.

    Noise that is correlated from pixel to pixel is taken for less than it is: after demosaicing or scaling by
    interpolation for a third or less, or none at all, and for a third where JPEG of quality 75 rounded it away.
    Pass sigma=... for such pictures.

    Args:
        y: ``(B, C, H, W)``, with independent noise.
        observed: ``(1 or B, C, H, W)`` bool, or None: all of it.

    Returns:
        ``(B,)``.

    Raises:
        ValueError: for measurements that are no pictures, see no noise, or are observed in too few places.

    Warns:
        UserWarning: where the two estimates differ by more than a factor of two, with both.

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
    patches = _patch_noise(y, valid)
    if y.shape[1] == len(_LUMINANCE):
        patches = _without_coarse_colour(patches, sigma, y, valid)
    _warn_of_disagreement(sigma, patches)
    sigma = torch.fmin(sigma, patches)
    if not bool((sigma > 0).all()):
        raise ValueError(
            f"the noise cannot be estimated from y (estimates {sigma.tolist()[:4]}): too few neighbouring "
            "entries are observed, or over half of them carry no noise; pass sigma=..."
        )
    return sigma


def _without_coarse_colour(patches: Tensor, differences: Tensor, y: Tensor, valid: Tensor) -> Tensor:
    """Estimates ``(B,)`` from patches, taken from the luminance where most directions of colour have no noise.

    Independent noise has the same level in all directions. Texture, which fills the luminance more than the colours,
    raises the luminance's estimate up to threefold; colour at half the resolution lowers the other to a tenth of it.
    """
    weights = y.new_tensor(_LUMINANCE)[:, None, None]
    luminance = _patch_noise((y * weights).sum(1, keepdim=True), valid.amin(1, keepdim=True)) / weights.norm()
    return torch.where((patches < luminance / 8) | (patches < differences / 2), luminance, patches)


def _warn_of_disagreement(differences: Tensor, patches: Tensor) -> None:
    ratio = patches / differences
    apart = ((ratio < 0.5) | (ratio > 2)) & (torch.fmin(differences, patches) > 0)  # no noise is an error already
    for one, two in zip(differences[apart][:1].tolist(), patches[apart][:1].tolist()):
        warnings.warn(f"the noise of {int(apart.sum())} of {len(apart)} pictures is uncertain: {one:.2g} by fine-scale "
                      f"differences, {two:.2g} by the covariance of patches. Correlated noise (JPEG, demosaicing, "
                      "scaling) lowers either, texture raises either. The smaller is taken: pass sigma=... if you "
                      "know it", stacklevel=3)


def _patch_noise(y: Tensor, valid: Tensor) -> Tensor:
    """Noise level ``(B,)`` from the eigenvalues of the covariance of observed patches; NaN where there are too few."""
    batch, channels, height, width = y.shape
    size = channels * _PATCH**2
    places = (height - _PATCH + 1) * (width - _PATCH + 1)
    found = y.new_full((batch,), torch.nan)
    if height < _PATCH or width < _PATCH or places < _PATCHES * size:
        return found
    stride = max(1, int((places / (3 * _PATCHES * size)) ** 0.5))
    for b in range(batch):
        patches = F.unfold(y[b : b + 1], _PATCH, stride=stride)[0]
        if not bool(valid[b].all()):
            patches = patches[:, F.unfold(valid[b : b + 1], _PATCH, stride=stride)[0].amin(0) > 0.5]
        if patches.shape[1] < _PATCHES * size:
            continue
        patches = (patches - patches.mean(1, keepdim=True)).to("cpu", torch.float64)
        values = torch.linalg.eigvalsh(patches @ patches.T / patches.shape[1])
        # directions that carry texture make the mean of the eigenvalues exceed their median: leave them out
        mean = values.cumsum(0) / torch.arange(1, size + 1)
        count = torch.arange(1, size + 1)
        median = 0.5 * (values[(count - 1) // 2] + values[count // 2])
        kept = int((mean <= median).nonzero().max())
        found[b] = mean[kept].clamp(min=0).sqrt().to(y)
    return found
