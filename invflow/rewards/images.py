"""Rewards of images: the class given by a classifier, agreement inside a mask, symmetries."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from invflow._core.networks import settle
from invflow.nets.classifier import Classifier
from invflow.reward import Reward

__all__ = ["ClassReward", "MaskMatchReward", "MirrorReward", "RotationReward"]


class _ImageReward(Reward):
    """Base of rewards that score images one by one: checks shapes and flattens ``(B, N, C, H, W)`` to rows."""

    def score(self, x: Tensor) -> Tensor:
        """Images ``(n, *image_shape)`` to ``(n,)``."""
        raise NotImplementedError

    def __call__(self, x: Tensor) -> Tensor:
        """Score images: ``(B, N, C, H, W)`` to ``(B, N)``.

        Raises:
            ValueError: For other shapes.
        """
        if x.ndim != 5:
            raise ValueError(f"x has shape {tuple(x.shape)}, expected images (B, N, C, H, W): pass x[None] for n "
                             "images of one observation")
        result: Tensor = self.score(x.flatten(0, 1)).to(x.dtype).unflatten(0, x.shape[:2])
        return result


class ClassReward(_ImageReward):
    r"""Log probability that a classifier gives to one class, :math:`r(x) = \log p(\text{label} \mid x)`.

    At most 0. Tilting a prior by it gives the prior's images of that class, according to the classifier.

    Args:
        classifier: Classifier from images in [0, 1] to logits; or a name for :meth:`Classifier.load`, such as
            ``"mnist"``.
        label: Index of the class.

    Raises:
        ValueError: For a label that the classifier does not have.

    Example:
        >>> import torch
        >>> from invflow.rewards.images import ClassReward
        >>> ClassReward("mnist", 3)(torch.zeros(2, 5, 1, 28, 28)).shape
        torch.Size([2, 5])
    """

    def __init__(self, classifier: Classifier | str | os.PathLike[str], label: int) -> None:
        self.classifier = classifier if isinstance(classifier, Classifier) else Classifier.load(classifier)
        count = len(self.classifier.classes)
        if not 0 <= label < count:
            raise ValueError(f"label={label}: this classifier has the labels 0 to {count - 1}, which are "
                             f"{', '.join(self.classifier.classes)}")
        self.label = label
        settle(self.classifier)

    def score(self, x: Tensor) -> Tensor:
        """Log probability of the class, ``(n,)``, in the dtype of the images."""
        weight = next(self.classifier.parameters())
        if self.classifier.training:
            self.classifier.eval()
        result: Tensor = self.classifier(x.to(weight.dtype)).log_softmax(1)[:, self.label].to(x.dtype)
        return result

    def predicted(self, x: Tensor) -> Tensor:
        """Label predicted by the classifier: ``(n, C, H, W)`` to ``(n,)`` int64."""
        return self.classifier.probabilities(x).argmax(1)

    def to(self, *args: Any, **kwargs: Any) -> Reward:
        """Copy on another device or with another dtype."""
        other = copy.copy(self)
        other.classifier = copy.deepcopy(self.classifier).to(*args, **kwargs)
        return other

    def __repr__(self) -> str:
        return f"ClassReward({self.classifier.classes[self.label]!r})"


class MaskMatchReward(_ImageReward):
    r"""Agreement with a target inside a mask, :math:`r(x) = -\|M (x - t)\|^2 / (2 s^2)`; no constraint outside.

    Args:
        target: t, ``(C, H, W)``, or a number for a plain area.
        mask: M, ``(H, W)`` or ``(C, H, W)``, 1 or True where the image should match the target; at least one pixel.
        scale: s > 0: a deviation of one pixel by s costs half a unit.

    Raises:
        ValueError: For an empty mask, a scale that is not positive, or shapes that do not match.

    Example:
        >>> import torch
        >>> from invflow.rewards.images import MaskMatchReward
        >>> corner = torch.zeros(8, 8)
        >>> corner[:2, :2] = 1
        >>> MaskMatchReward(1.0, corner, scale=0.5)(torch.zeros(1, 3, 1, 8, 8))
        tensor([[-8., -8., -8.]])
    """

    def __init__(self, target: Tensor | float, mask: Tensor, scale: float) -> None:
        mask = torch.as_tensor(mask)
        mask = (mask if mask.ndim == 3 else mask[None]).to(torch.get_default_dtype())
        target = torch.as_tensor(target, dtype=mask.dtype)
        if mask.ndim != 3 or not bool((mask != 0).any()):
            raise ValueError(f"mask has shape {tuple(mask.shape)} and {int((mask != 0).sum())} pixels: pass (H, W) or "
                             "(C, H, W) with at least one pixel")
        if target.ndim not in (0, 3) or (target.ndim == 3 and target.shape[1:] != mask.shape[1:]):
            raise ValueError(f"target {tuple(target.shape)} and mask {tuple(mask.shape)} do not match: pass a target "
                             "(C, H, W) of the mask's size, or a number")
        self.target, self.mask, self.scale = target, mask, _positive(scale)

    def score(self, x: Tensor) -> Tensor:
        """Squared distance inside the mask, divided by -2 s^2: ``(n,)``."""
        if x.shape[2:] != self.mask.shape[1:]:
            raise ValueError(f"images {tuple(x.shape)} and mask {tuple(self.mask.shape)} differ in size")
        difference = self.mask.to(x) * (x - self.target.to(x))
        return -difference.square().flatten(1).sum(1) / (2 * self.scale**2)

    def __repr__(self) -> str:
        return f"MaskMatchReward({int(self.mask.sum())} pixels, scale={self.scale})"


class _InvarianceReward(_ImageReward):
    r"""Closeness to the images that are invariant under a finite group, :math:`r(x) = -\|x - P x\|^2 / (2 s^2)`.

    P x, the mean of x over the group, is the nearest invariant image: P is the orthogonal projection.
    """

    def __init__(self, scale: float) -> None:
        self.scale = _positive(scale)

    def orbit(self, x: Tensor) -> Sequence[Tensor]:
        """Images ``(n, C, H, W)`` under each element of the group except the identity."""
        raise NotImplementedError

    def project(self, x: Tensor) -> Tensor:
        """P x, the nearest invariant images: ``(n, C, H, W)`` to the same."""
        moved = self.orbit(x)
        return (x + sum(moved)) / (1 + len(moved))

    def score(self, x: Tensor) -> Tensor:
        """Squared distance from the nearest invariant image, divided by -2 s^2: ``(n,)``."""
        return -(x - self.project(x)).square().flatten(1).sum(1) / (2 * self.scale**2)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(scale={self.scale})"


class MirrorReward(_InvarianceReward):
    r"""Left-right symmetry, :math:`r(x) = -\|x - P x\|^2 / (2 s^2)`, with P x the mean of x and its mirror image.

    Args:
        scale: s, over 0.

    Example:
        >>> import torch
        >>> from invflow.rewards.images import MirrorReward
        >>> x = torch.rand(1, 2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> bool((MirrorReward(1.0)(0.5 * (x + x.flip(-1))) == 0).all())
        True
    """

    def orbit(self, x: Tensor) -> Sequence[Tensor]:
        """The mirror images."""
        return [x.flip(-1)]


class RotationReward(_InvarianceReward):
    r"""Invariance under quarter turns, :math:`r(x) = -\|x - P x\|^2 / (2 s^2)`, with P x the mean over the four turns.

    Args:
        scale: s, > 0. Images must be square.

    Example:
        >>> import torch
        >>> from invflow.rewards.images import RotationReward
        >>> RotationReward(1.0)(torch.ones(1, 2, 1, 8, 8)).abs()
        tensor([[0., 0.]])
    """

    def orbit(self, x: Tensor) -> Sequence[Tensor]:
        """The images after one, two and three quarter turns."""
        if x.shape[-1] != x.shape[-2]:
            raise ValueError(f"images {tuple(x.shape)} are not square: quarter turns need square images")
        return [x.rot90(k, (-2, -1)) for k in (1, 2, 3)]


def _positive(scale: float) -> float:
    if not 0 < scale < float("inf"):
        raise ValueError(f"scale={scale}: pass a number over 0, the deviation that costs half a unit")
    return float(scale)
