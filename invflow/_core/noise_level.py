"""Noise levels of images, estimated from cosine transforms of small blocks, and how reliable they are."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["NoiseLevel", "estimate_sigma", "noise_level", "noise_levels", "trusted"]

_SIDE = 8
#: largest number of blocks used, and smallest number needed
_MOST, _LEAST = 20000, 64
#: sums of a cosine's two frequencies: the range that measures activity in a block, and two ranges that measure noise
_SLOW, _MIDDLE, _FAST = (1, 4), (5, 7), (10, 14)
# second differences along both axes, then a diagonal difference where the mask leaves no larger window
_STENCILS = (
    torch.tensor([[1.0, -2.0, 1.0], [-2.0, 4.0, -2.0], [1.0, -2.0, 1.0]]) / 6,
    torch.tensor([[1.0, -1.0], [-1.0, 1.0]]) / 2,
)
#: brightness and two differences of colours, orthonormal
_OPPONENT = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, -1.0], [1.0, -2.0, 1.0]])
_OPPONENT = _OPPONENT / _OPPONENT.norm(dim=1, keepdim=True)
#: noise of an entry divided by the fine-scale noise of the brightness, where colour was averaged over 2 x 2 pixels:
#: only the luminance of ITU-R BT.601 keeps its noise in the finer three quarters of the cosines
_COARSE_COLOUR = 0.66


@dataclass(frozen=True)
class NoiseLevel:
    """Estimated noise level and its uncertainty.

    Attributes:
        sigma: Standard deviation of the noise of an entry.
        low: Smallest level consistent with the estimates.
        high: Largest level consistent with the estimates.
        doubt: Reason why they differ, as a sentence. Empty if they agree.
        known: False if no single value can be given.
    """

    sigma: float
    low: float
    high: float
    doubt: str = ""
    known: bool = True


@dataclass(frozen=True)
class _Channel:
    """Noise levels of one channel: in the smoothest blocks at middle and fine scales, and extrapolated to zero texture.
    """

    middle: float
    fast: float
    without_texture: float
    slope: float
    error: float  # relative, of the first two, by chance

    @property
    def white(self) -> bool:
        """Whether noise is as strong at middle scales as at fine scales."""
        return self.middle <= 1.25 * (1 + 2 * self.error) * self.fast

    @property
    def textured(self) -> bool:
        """Whether the excess at middle scales falls from textured to smooth blocks as texture does."""
        return self.slope > 0.05 and self.middle < 3 * self.fast and self.without_texture >= 0.75 * self.fast

    @property
    def level(self) -> float:
        """Level without texture, for white noise."""
        return min(max(self.without_texture, 0.8 * self.fast), 1.05 * self.fast)

    def coarser_than(self, other: _Channel) -> bool:
        """Whether a lower resolution has removed noise from this channel but not from the other."""
        return self.middle < 0.3 * other.middle and (not self.white or self.fast < 0.2 * other.fast)


def noise_levels(y: Tensor, observed: Tensor | None = None) -> list[NoiseLevel]:
    """Noise levels of images, with their uncertainty; see :func:`estimate_sigma`.

    Args:
        y: Noisy images, ``(B, C, H, W)``.
        observed: Mask of the observed entries, ``(1 or B, C, H, W)`` bool. None: all are observed.

    Raises:
        ValueError: If ``y`` is not a batch of images, is too small, has no noise, or is observed in too few places.
    """
    if y.ndim != 4 or min(y.shape[2:]) < 3:
        raise ValueError(
            f"sigma=None estimates the noise of images (B, C, H, W), but y has shape {tuple(y.shape)}: "
            "pass sigma=..."
        )
    valid = torch.ones_like(y) if observed is None else observed.to(y).expand_as(y)
    found = [noise_level(picture, mask) for picture, mask in zip(y, valid, strict=True)]
    if any(level is None for level in found):
        raise ValueError(
            f"the noise cannot be estimated from y of shape {tuple(y.shape)}: fewer than 15 x 15 pixels, or too few "
            "neighbouring entries are observed, or most of them carry no noise (a constant background, or clipped "
            "black or white); pass sigma=..."
        )
    return [level for level in found if level is not None]


def estimate_sigma(y: Tensor, observed: Tensor | None = None) -> Tensor:
    """Estimate the noise standard deviation of images, from cosine transforms of their smooth blocks of 8 x 8 pixels.

    Independent noise is as strong at middle scales as at fine scales. If an image has more at middle scales, either it
    is textured even in its smoothest blocks, or its noise is correlated between pixels. Two comparisons distinguish the
    cases: how the two scales fall together from textured to smooth blocks, and, in colour images, brightness against
    colours. Texture is then excluded. For correlated noise, the level is that of the middle scales. If the cases cannot
    be distinguished, an error is raised; an estimate is never chosen because it is the smaller one.

    On fourteen photographs with independent noise of 0.01 to 0.1, at full or half size, the geometric mean error was 3
    to 4% (the wavelets of scikit-image: 18 to 28%). On measurements under four-fold super-resolution it was 5%, where a
    level was given at all. For grass, noise of 0.025 was estimated at 1.26 times that, and noise of 0.01 could not be
    estimated. Noise saved as JPEG of quality 95, 85 or 75 at half the resolution of colour was off by 7, 19 and 44%;
    after bilinear demosaicing it was a fifth too low. ``benchmarks.tables.noise_table`` measures this.

    Args:
        y: Noisy images, ``(B, C, H, W)``.
        observed: Mask of the observed entries, ``(1 or B, C, H, W)`` bool. None: all are observed. If no block of 8 x 8
            pixels is complete, differences of neighbours are used, which mistake fine texture for noise.

    Returns:
        Noise levels, ``(B,)``. :func:`noise_levels` also returns their ranges.

    Raises:
        ValueError: As in :func:`noise_levels`, and if texture and correlated noise cannot be distinguished.

    Warns:
        UserWarning: If the level is uncertain, with its range and the reason.

    Example:
        >>> import torch
        >>> from invflow.likelihood import estimate_sigma
        >>> y = 0.5 + 0.1 * torch.randn(1, 1, 64, 64, generator=torch.Generator().manual_seed(0))
        >>> round(float(estimate_sigma(y)), 1)
        0.1
    """
    return y.new_tensor([level.sigma for level in trusted(noise_levels(y, observed))])


def trusted(levels: list[NoiseLevel]) -> list[NoiseLevel]:
    """Return the levels if all are known; warn if some are uncertain."""
    for level in levels:
        if not level.known:
            raise ValueError(f"the noise of an image is between {level.low:.2g} and {level.high:.2g}: "
                             f"{level.doubt}; pass sigma=...")
    doubtful = [level for level in levels if level.doubt]
    for level in doubtful[:1]:
        warnings.warn(f"the noise of {len(doubtful)} of {len(levels)} images is uncertain: {level.sigma:.2g}, between "
                      f"{level.low:.2g} and {level.high:.2g}, because {level.doubt}; pass sigma=... if you know it",
                      stacklevel=3)
    return levels


def noise_level(y: Tensor, observed: Tensor) -> NoiseLevel | None:
    """Noise level of one image; None if the image is too small or shows no noise.

    The method compares cosines of blocks of 8 x 8 pixels at middle and fine scales, in the tenth of the blocks with the
    least power at coarse scales. Independent noise is as strong at both. More power at middle scales has one of two
    causes. Texture has a fixed share at fine scales, so both scales fall together from textured to smooth blocks, and
    the line reaches the noise level where they are equal. If the noise is correlated between pixels, the line leads to
    no noise. Brightness and two colour differences are analysed separately, because texture is mostly brightness, and
    most JPEG files store colours at half the resolution.

    Args:
        y: Noisy image, ``(C, H, W)``.
        observed: Mask, ``(C, H, W)``, 1 where an entry was observed.
    """
    if y.shape[1] < 3 or y.shape[2] < 3:
        return None
    blocks = _blocks(y, observed)
    if blocks is None:
        return None if bool(observed.all()) else _by_differences(y, observed)
    return _judged([_channel(blocks[:, c]) for c in range(blocks.shape[1])])


def _blocks(y: Tensor, observed: Tensor) -> Tensor | None:
    """Cosines ``(n, C, 64)`` of complete, unclipped blocks; None if there are too few."""
    if min(y.shape[1:]) < _SIDE:
        return None
    places = (y.shape[1] - _SIDE + 1) * (y.shape[2] - _SIDE + 1)
    stride = max(1, int((places / _MOST) ** 0.5))
    stride += 1 - stride % 2  # an odd stride visits all positions of an 8 x 8 grid, such as JPEG's
    y = y.float().cpu()
    # noise clipped at black or white, and constant backgrounds, carry no information
    clipped = ((y == y.amin()) | (y == y.amax())).float()
    lost = F.unfold(clipped[None], _SIDE, stride=stride)[0].sum(0) > 2 * len(y)
    whole = F.unfold(observed.float().cpu()[None], _SIDE, stride=stride)[0].amin(0) > 0.5
    if len(y) == 3:
        y = torch.einsum("dc,chw->dhw", _OPPONENT, y)
    blocks = F.unfold(y[None], _SIDE, stride=stride)[0][:, whole & ~lost].T.unflatten(1, (len(y), -1))
    if len(blocks) < _LEAST:
        return None
    k, i = torch.arange(_SIDE)[:, None], torch.arange(_SIDE)
    cosines = torch.cos(math.pi * k * (2 * i + 1) / (2 * _SIDE)) * math.sqrt(2 / _SIDE)
    cosines[0] /= math.sqrt(2)
    result: Tensor | None = blocks @ torch.kron(cosines, cosines).T
    return result


def _channel(cosines: Tensor) -> _Channel:
    """Levels of one channel from its cosines ``(n, 64)``."""
    total = (torch.arange(_SIDE)[:, None] + torch.arange(_SIDE)).flatten()

    def power(scales: tuple[int, int]) -> Tensor:
        return cosines[:, (total >= scales[0]) & (total <= scales[1])].square().mean(1)

    order = power(_SLOW).argsort()
    middle, fast = power(_MIDDLE)[order], power(_FAST)[order]
    calm = max(_LEAST // 4, len(order) // 10)
    parts = min(20, len(order) // 16)
    a, b = (torch.stack([part.mean() for part in p.tensor_split(parts)]).double() for p in (middle, fast))
    weight = 1 / (a * b).clamp(min=1e-30)
    weight = weight / weight.sum()
    da, db = a - (weight * a).sum(), b - (weight * b).sum()
    slope = float((weight * da * db).sum() / (weight * da.square()).sum().clamp(min=1e-30))
    end = float((weight * (b - slope * a)).sum() / (1 - slope)) if slope < 1 else 0.0
    if float(a.max()) < 2 * float(a.min()):  # equally smooth everywhere: any remaining slope is chance
        slope, end = 0.0, float(fast[:calm].mean())
    # overlapping blocks share pixels: the n blocks that start within 8 pixels count as about one
    alone = max(calm * min(1.0, 1 / 9), 1.0) * 15
    return _Channel(float(middle[:calm].mean().sqrt()), float(fast[:calm].mean().sqrt()), max(end, 0.0) ** 0.5,
                    slope, (0.5 / alone) ** 0.5)


def _judged(channels: list[_Channel]) -> NoiseLevel | None:
    """One level from the levels of the brightness and, for colour images, two colour differences."""
    brightness, colours = channels[0], channels[1:]
    if brightness.fast <= 1e-7:
        return None
    by_chance = 1 + 2 * max(channel.error for channel in channels)
    if colours and all(channel.coarser_than(brightness) for channel in colours):
        level = _COARSE_COLOUR * max(brightness.middle, brightness.fast)
        return NoiseLevel(level, level / 1.3, level * (1.3 if brightness.white else 3), "its colours are coarser than "
                          "its brightness, as in most JPEG files, whose noise is not independent between pixels")
    if colours and all(channel.white for channel in colours):
        # colours have the least texture: any excess of the brightness is texture
        level = math.sqrt(sum(channel.level**2 for channel in colours) / 2)
        return NoiseLevel(level, level / by_chance, level * max(by_chance, min(brightness.level / level, 1.3)))
    if brightness.white:
        level = brightness.level
        return NoiseLevel(level, min(level, brightness.fast) / by_chance, max(level, brightness.middle) * by_chance)
    if brightness.textured:
        level = brightness.without_texture
        return NoiseLevel(level, 0.7 * level, brightness.middle, "it is textured down to its finest scales")
    if colours and not any(channel.white for channel in channels):
        level = math.sqrt(sum(channel.middle**2 for channel in channels) / 3)
        return NoiseLevel(level, 0.9 * level, 1.5 * level, "its noise is correlated between pixels, as after "
                          "demosaicing, scaling or JPEG")
    return NoiseLevel(brightness.middle, min(brightness.without_texture, brightness.fast), brightness.middle,
                      "texture cannot be distinguished from noise that is correlated between pixels", known=False)


def _by_differences(y: Tensor, observed: Tensor) -> NoiseLevel | None:
    """Median absolute fine-scale difference over 0.6745 (Donoho and Johnstone 1994), for images with no complete block.

    The differences are those of Immerkaer (1996). They remove edges along the axes and smooth shading, but not texture.
    """
    y, observed = y.float().cpu()[:, None], observed.float().cpu()[:, None]
    for stencil in _STENCILS:
        complete = F.conv2d(observed, torch.ones_like(stencil)[None, None]) > stencil.numel() - 0.5
        if int(complete.sum()) >= 32:
            found = F.conv2d(y, stencil[None, None])[complete].abs()
            level = float(found.median()) / 0.6745
            by_chance = 1 + 2.5 / math.sqrt(len(found))
            return NoiseLevel(level, level / 2, level * by_chance) if level > 0 else None
    return None
