"""What a Variational Flow Map is trained for: the problems that it is to solve, and how the terms are weighed."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from invflow.models.adapter import KNEE, operator_traits
from invflow.operator import Operator

__all__ = ["ObjectiveSettings", "TrainingProblem"]


@dataclass(frozen=True)
class TrainingProblem:
    """One problem class that an adapter learns.

    Attributes:
        operator: its ``randomize`` draws fresh parameters for each image; its ``problem_class`` names the class.
        sigma: noise level, or a range (low, high) to draw from uniformly in the logarithm; from low = 0 on, in the
            logarithm of 0.01 more.
        share: rows of a batch, relative to those of the other problems: harder classes can be given more.
    """

    operator: Operator
    sigma: float | tuple[float, float]
    share: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.share < math.inf:
            raise ValueError(f"share={self.share} must be a positive number, such as 2.0 for twice as many rows")
        if not 0 <= self.levels[0] <= self.levels[1] < math.inf:
            raise ValueError(f"sigma={self.sigma}: pass a noise level of at least 0, or a range (low, high) of them")

    def draw_sigma(self, n: int, generator: torch.Generator) -> Tensor:
        """``(n,)`` noise levels."""
        low, high = self.levels
        knee = KNEE if low == 0 else 0.0  # a logarithm has no 0
        ratio = (high + knee) / (low + knee)
        return (low + knee) * ratio ** torch.rand(n, generator=generator, device=generator.device) - knee

    @property
    def levels(self) -> tuple[float, float]:
        """Lowest and highest noise level."""
        return self.sigma if isinstance(self.sigma, tuple) else (self.sigma, self.sigma)

    def traits(self, generator: torch.Generator, draws: int = 256) -> list[tuple[float, float]]:
        """Lowest and highest of each of :func:`~invflow.models.adapter.operator_traits` among fresh operators."""
        found = operator_traits(self.operator.randomize(draws, generator))
        return [(round(float(column.min()), 4), round(float(column.max()), 4)) for column in found.unbind(1)]


@dataclass(frozen=True)
class ObjectiveSettings:
    """What is weighed how in a VFM's training: settings of :class:`VFMObjective`.

    Attributes:
        tau: scale of the MeanFlow term, of the order of the data's standard deviation. Where it is too small, noise
            that pins the data down is rewarded and the adapter collapses.
        alpha: share of rows whose path starts from the adapter's noise. The others keep the unconditional samples, and
            hold the map to the pairing of data with independent noise, from which it has to turn away to meet an
            adapter of diagonal covariance. On the checkerboard the posterior at 0.9 is much better than at 0.5.
        frozen: train the adapter alone, on a fixed map and without the MeanFlow term.
        level_power: rows weigh on the adapter by sigma to this power, relative to the highest level.
        model_error: whether to count on the map's own error, as a large network on images needs.
        distinct: share of rows with s < t.
        one_step: share of those with (s, t) = (0, 1).
        tangent: of the MeanFlow loss, ``"path"``, ``"map"`` or ``"semigroup"``; see
            :func:`~invflow.training.losses.meanflow_loss`.
        misfit: weight of the observation term. With 0 a score alone leads to the data, which costs one call of the map
            less for each row where ``joint``.
        score: weight of a proper score of the samples against the truth, the fair CRPS of two samples summed over
            pixels. The other terms lead to the posterior of the prior that the map holds; where a small map holds a
            poor one (photographs), the score leads to margins that are right for the images trained on. It costs a
            second call of the map for each row. Of the order of one over the posterior's standard deviation in image
            units.
        patches: whether the score is the energy score over patches and scales
            (:func:`~invflow.training.losses.patch_score`) in place of the CRPS, which leaves it open what pixels go
            together.
        joint: whether the score's gradient reaches the map as well as the adapter. The MeanFlow term beside it keeps
            the map a flow map.
        consistency: whether the score is of samples as ``VFM(..., consistency=...)`` corrects them, so that map,
            adapter and the deviations of the correction are trained for what is used; for an adapter that says
            deviations (``Adapter.grown``). An adapter that has fitted factors already is corrected by them, the classes
            without any not at all: a class that was trained for a correction which it does not get in the end becomes
            worse. The deviations are also drawn towards the spread of the samples, by the
            likelihood of the difference of two: where the score asks for no correction at all, they stay something to
            go on from.
        deviations_alone: train nothing but the adapter's deviations, by the score of corrected samples: map, and what
            the adapter says of the noise, stay as they are (with a ``weight_decay`` of 0), and so do uncorrected
            samples.
    """

    tau: float = 1.0
    alpha: float = 0.5
    frozen: bool = False
    level_power: float = 1.0
    model_error: bool = False
    distinct: float = 0.5
    one_step: float = 1 / 3
    tangent: str = "path"
    misfit: float = 1.0
    score: float = 0.0
    patches: bool = False
    joint: bool = False
    consistency: bool = False
    deviations_alone: bool = False

    def __post_init__(self) -> None:
        if self.tau <= 0 or not 0 <= self.alpha <= 1:
            raise ValueError(f"tau={self.tau} must be positive and alpha={self.alpha} a share in [0, 1]")
        idle = [name for name in ("patches", "joint", "consistency") if getattr(self, name)]
        if idle and not self.score:
            raise ValueError(f"{idle[0]}=True is a property of the score, whose weight is 0: pass score=100.0")
        if not (self.misfit >= 0 and self.score >= 0):
            raise ValueError(f"misfit={self.misfit} and score={self.score} are weights: pass numbers of at least 0")
        if not (self.misfit or self.score):
            raise ValueError("misfit=0 leaves it to a score to lead to the data, but score=0 too: pass score=100.0")
        if self.joint and self.frozen:
            raise ValueError("joint=True lets the score reach the map, which frozen=True keeps as it is")
        if self.deviations_alone and not (self.frozen and self.consistency):
            raise ValueError("deviations_alone=True trains for corrected samples of a map as it is: pass frozen=True "
                             "and consistency=True too")
