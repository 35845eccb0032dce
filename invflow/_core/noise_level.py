"""The noise level of pictures, from cosines of small blocks, and how far it can be trusted."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["NoiseLevel", "estimate_sigma", "noise_level", "noise_levels", "trusted"]

_SIDE = 8
#: at most so many blocks are looked at, and at least so many are needed
_MOST, _LEAST = 20000, 64
#: sums of the two frequencies of a block's cosines: what says how busy a block is, and where noise is looked for
_SLOW, _MIDDLE, _FAST = (1, 4), (5, 7), (10, 14)
# second differences along both axes, then a diagonal difference where the mask leaves no larger window
_STENCILS = (
    torch.tensor([[1.0, -2.0, 1.0], [-2.0, 4.0, -2.0], [1.0, -2.0, 1.0]]) / 6,
    torch.tensor([[1.0, -1.0], [-1.0, 1.0]]) / 2,
)
#: brightness and two differences of colours, orthonormal
_OPPONENT = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, -1.0], [1.0, -2.0, 1.0]])
_OPPONENT = _OPPONENT / _OPPONENT.norm(dim=1, keepdim=True)
#: noise of an entry, over that of the brightness at fine scales, where colour was averaged over 2 x 2 pixels: only
#: the luminance of ITU-R BT.601 keeps its noise at the three quarters of finer cosines
_COARSE_COLOUR = 0.66


@dataclass(frozen=True)
class NoiseLevel:
    """An estimated noise level, and what is known of its error.

    Attributes:
        sigma: standard deviation of an entry.
        low: the least that the estimates allow.
        high: the most.
        doubt: why they differ, as a sentence; empty where they agree.
        known: False where no single value can be given.
    """

    sigma: float
    low: float
    high: float
    doubt: str = ""
    known: bool = True


@dataclass(frozen=True)
class _Channel:
    """Levels of one channel: in the calmest blocks at middle and fine scales, and where texture would end."""

    middle: float
    fast: float
    without_texture: float
    slope: float
    error: float  # relative, of the first two, by chance

    @property
    def white(self) -> bool:
        """Whether noise is as strong at middle scales as at fine ones."""
        return self.middle <= 1.25 * (1 + 2 * self.error) * self.fast

    @property
    def textured(self) -> bool:
        """Whether what middle scales hold more falls from busy to calm blocks as texture does."""
        return self.slope > 0.05 and self.middle < 3 * self.fast and self.without_texture >= 0.75 * self.fast

    @property
    def level(self) -> float:
        """The level without texture, where noise is white."""
        return min(max(self.without_texture, 0.8 * self.fast), 1.05 * self.fast)

    def coarser_than(self, other: _Channel) -> bool:
        """Whether the channel has lost its noise to a lower resolution, where another has kept it."""
        return self.middle < 0.3 * other.middle and (not self.white or self.fast < 0.2 * other.fast)


def noise_levels(y: Tensor, observed: Tensor | None = None) -> list[NoiseLevel]:
    """Noise levels of pictures with what is known of their error; see :func:`estimate_sigma`.

    Args:
        y: ``(B, C, H, W)``.
        observed: ``(1 or B, C, H, W)`` bool, or None: all of it.

    Raises:
        ValueError: for measurements that are no pictures, too small, without noise, or observed in too few places.
    """
    if y.ndim != 4 or min(y.shape[2:]) < 3:
        raise ValueError(
            f"sigma=None estimates the noise of pictures (B, C, H, W), but y has shape {tuple(y.shape)}: "
            "pass sigma=..."
        )
    valid = torch.ones_like(y) if observed is None else observed.to(y).expand_as(y)
    found = [noise_level(picture, mask) for picture, mask in zip(y, valid, strict=True)]
    if any(level is None for level in found):
        raise ValueError(
            f"the noise cannot be estimated from y of shape {tuple(y.shape)}: fewer than 15 x 15 pixels, or too few "
            "neighbouring entries are observed, or most of them carry no noise (a constant ground, black or white that "
            "is cut off); pass sigma=..."
        )
    return [level for level in found if level is not None]


def estimate_sigma(y: Tensor, observed: Tensor | None = None) -> Tensor:
    """Noise standard deviation of pictures, from cosines of their calm blocks of 8 x 8 pixels.

    Independent noise is as strong at middle scales as at fine ones. Where it is not, the picture is textured even in
    its calmest blocks, or its noise is correlated from pixel to pixel: how the two scales fall together from busy to
    calm blocks says which, and of a picture in colour so do brightness and colours apart. Texture is then left out, and
    the level of correlated noise is that of middle scales; where neither is sure, that is an error: no smaller
    estimate is ever taken because it is smaller.

    Of fourteen photographs with independent noise of 0.01 to 0.1, halved or not, it was off by 3 to 4% in the geometric
    mean (the wavelets of scikit-image: 18 to 28%), of measurements under four-fold super-resolution by 5%, where a
    level was given at all; grass with noise of 0.025 was found at 1.26 times that, with 0.01 not at all. Noise that was
    saved as JPEG of quality 95, 85 or 75 at half the resolution of colour: off by 7, 19 and 44%; after bilinear
    demosaicing a fifth too low. ``benchmarks.tables.noise_table`` measures it.

    Args:
        y: ``(B, C, H, W)``.
        observed: ``(1 or B, C, H, W)`` bool, or None: all of it. Where no block of 8 x 8 pixels is whole, differences
            of neighbours have to do, which take fine texture for noise.

    Returns:
        ``(B,)``; :func:`noise_levels` gives the range with it.

    Raises:
        ValueError: as :func:`noise_levels`, and where texture and correlated noise cannot be told apart.

    Warns:
        UserWarning: where the level is in doubt, with its range and the reason.

    Example:
        >>> import torch
        >>> from invflow.likelihood import estimate_sigma
        >>> y = 0.5 + 0.1 * torch.randn(1, 1, 64, 64, generator=torch.Generator().manual_seed(0))
        >>> round(float(estimate_sigma(y)), 1)
        0.1
    """
    return y.new_tensor([level.sigma for level in trusted(noise_levels(y, observed))])


def trusted(levels: list[NoiseLevel]) -> list[NoiseLevel]:
    """The same, once each is known; a warning where one is in doubt."""
    for level in levels:
        if not level.known:
            raise ValueError(f"the noise of a picture is between {level.low:.2g} and {level.high:.2g}: "
                             f"{level.doubt}; pass sigma=...")
    doubtful = [level for level in levels if level.doubt]
    for level in doubtful[:1]:
        warnings.warn(f"the noise of {len(doubtful)} of {len(levels)} pictures is uncertain: {level.sigma:.2g}, "
                      f"between {level.low:.2g} and {level.high:.2g}, for {level.doubt}; pass sigma=... if you know it",
                      stacklevel=3)
    return levels


def noise_level(y: Tensor, observed: Tensor) -> NoiseLevel | None:
    """The noise level of one picture; None where it is too small, or shows no noise.

    Cosines of blocks of 8 x 8 pixels are compared at middle and fine scales, in the tenth of the blocks with the least
    at slow ones: independent noise is as strong at both. Where middle scales hold more, it is either texture, of which
    fine scales hold a fixed share: then the two fall together from busy to calm blocks, and the line meets the noise
    where they are equal; or noise that is correlated from pixel to pixel, where the line leads to none. Brightness and
    two differences of colours are looked at each by itself, for texture is mostly brightness, and colours of
    most JPEG files have half the resolution.

    Args:
        y: ``(C, H, W)``.
        observed: ``(C, H, W)``, 1 where it was.
    """
    if y.shape[1] < 3 or y.shape[2] < 3:
        return None
    blocks = _blocks(y, observed)
    if blocks is None:
        return None if bool(observed.all()) else _by_differences(y, observed)
    return _judged([_channel(blocks[:, c]) for c in range(blocks.shape[1])])


def _blocks(y: Tensor, observed: Tensor) -> Tensor | None:
    """Cosines ``(n, C, 64)`` of whole blocks that nothing clips; None where there are too few."""
    if min(y.shape[1:]) < _SIDE:
        return None
    places = (y.shape[1] - _SIDE + 1) * (y.shape[2] - _SIDE + 1)
    stride = max(1, int((places / _MOST) ** 0.5))
    stride += 1 - stride % 2  # an odd one meets all places of an 8 x 8 grid, as JPEG has it
    y = y.float().cpu()
    # noise that black or white has cut off, or a constant ground, says nothing
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
    if float(a.max()) < 2 * float(a.min()):  # as calm everywhere: what is left of a slope is chance
        slope, end = 0.0, float(fast[:calm].mean())
    # overlapping blocks share pixels: of n in a row of 8 pixels there is about one by itself
    alone = max(calm * min(1.0, 1 / 9), 1.0) * 15
    return _Channel(float(middle[:calm].mean().sqrt()), float(fast[:calm].mean().sqrt()), max(end, 0.0) ** 0.5,
                    slope, (0.5 / alone) ** 0.5)


def _judged(channels: list[_Channel]) -> NoiseLevel | None:
    """One level from those of the brightness and, of a picture in colour, two differences of colours."""
    brightness, colours = channels[0], channels[1:]
    if brightness.fast <= 1e-7:
        return None
    by_chance = 1 + 2 * max(channel.error for channel in channels)
    if colours and all(channel.coarser_than(brightness) for channel in colours):
        level = _COARSE_COLOUR * max(brightness.middle, brightness.fast)
        return NoiseLevel(level, level / 1.3, level * (1.3 if brightness.white else 3), "its colours are coarser than "
                          "its brightness, as in most JPEG files, whose noise is not independent from pixel to pixel")
    if colours and all(channel.white for channel in colours):
        # texture is least there: what the brightness has more is texture
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
        return NoiseLevel(level, 0.9 * level, 1.5 * level, "its noise is correlated from pixel to pixel, as after "
                          "demosaicing, scaling or JPEG")
    return NoiseLevel(brightness.middle, min(brightness.without_texture, brightness.fast), brightness.middle,
                      "texture and noise that is correlated from pixel to pixel cannot be told apart", known=False)


def _by_differences(y: Tensor, observed: Tensor) -> NoiseLevel | None:
    """The median absolute fine-scale difference over 0.6745 (Donoho and Johnstone 1994), where no block is whole.

    The differences are Immerkaer's (1996), which annihilate edges along the axes and smooth shading, not texture.
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
