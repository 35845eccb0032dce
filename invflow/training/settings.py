"""Settings of VFM training: the problem classes, and the weights of the terms."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from invflow.models.adapter import KNEE, operator_traits
from invflow.operator import Operator

__all__ = ["ObjectiveSettings", "TrainingProblem"]

#: number of random operators that identify a problem class
IDENTIFYING_DRAWS = 16


@dataclass(frozen=True)
class TrainingProblem:
    """One problem class that an adapter learns.

    Attributes:
        operator: Operator whose ``randomize`` draws new parameters for each image; its ``problem_class`` names the
            class.
        sigma: Noise level, or a range (low, high) to draw from uniformly in the logarithm; for low = 0, uniformly in
            the logarithm of (level + 0.01).
        share: Number of rows in a batch, relative to the other problems: harder classes can get more.
    """

    operator: Operator
    sigma: float | tuple[float, float]
    share: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.share < math.inf:
            raise ValueError(f"share={self.share} must be a positive number, such as 2.0 for twice as many rows")
        if not 0 <= self.levels[0] <= self.levels[1] < math.inf:
            raise ValueError(f"sigma={self.sigma}: pass a noise level of at least 0, or a range (low, high) of them")

    def _identified(self) -> object:
        """Everything that determines the training: operators drawn with a fixed seed, noise levels, share.

        An operator that draws its own parameters was built with parameters that no batch uses. Without a generator they
        differ from process to process, and a training could not be resumed.
        """
        operator = self.operator
        if type(operator).randomize is not Operator.randomize:
            operator = operator.randomize(IDENTIFYING_DRAWS, torch.Generator().manual_seed(0))
        return operator, self.sigma, self.share

    def draw_sigma(self, n: int, generator: torch.Generator) -> Tensor:
        """``(n,)`` noise levels."""
        low, high = self.levels
        knee = KNEE if low == 0 else 0.0  # the logarithm of 0 is undefined
        ratio = (high + knee) / (low + knee)
        return (low + knee) * ratio ** torch.rand(n, generator=generator, device=generator.device) - knee

    @property
    def levels(self) -> tuple[float, float]:
        """Lowest and highest noise level."""
        return self.sigma if isinstance(self.sigma, tuple) else (self.sigma, self.sigma)

    def traits(self, generator: torch.Generator, draws: int = 256) -> list[tuple[float, float]]:
        """Lowest and highest of each of :func:`~invflow.models.adapter.operator_traits` among random operators."""
        found = operator_traits(self.operator.randomize(draws, generator))
        return [(round(float(column.min()), 4), round(float(column.max()), 4)) for column in found.unbind(1)]


@dataclass(frozen=True)
class ObjectiveSettings:
    """Weights of the terms in VFM training: settings of :class:`VFMObjective`.

    Attributes:
        tau: Scale of the MeanFlow term, of the order of the data's standard deviation. If it is too small, the
            objective rewards noise that determines the data, and the adapter collapses.
        alpha: Share of rows whose path starts from the adapter's noise. The others preserve the unconditional samples,
            and hold the map to the pairing of data with independent noise. The map has to give up this pairing to fit
            an adapter with diagonal covariance. On the checkerboard the posterior at 0.9 is much better than at 0.5.
        frozen: Whether to train only the adapter, with a fixed map and without the MeanFlow term.
        level_power: Power of sigma, relative to the highest level, by which rows are weighted in the adapter's loss.
        model_error: Whether to include the map's own error, as a large network on images needs.
        distinct: Share of rows with s < t.
        one_step: Share of those with (s, t) = (0, 1).
        tangent: Tangent of the MeanFlow loss, ``"path"``, ``"map"`` or ``"semigroup"``; see
            :func:`~invflow.training.losses.meanflow_loss`.
        misfit: Weight of the observation term. With 0, only a score leads to the data, which saves one call of the map
            for each row if ``joint``.
        score: Weight of a proper score of the samples against the truth, the fair CRPS of two samples summed over
            pixels. The other terms lead to the posterior of the prior represented by the map. If a small map represents
            a poor prior (photographs), the score leads to marginals that are right for the training images. It costs a
            second call of the map for each row. Choose it of the order of one over the posterior's standard deviation
            in image units.
        patches: Whether the score is the energy score over patches and scales
            (:func:`~invflow.training.losses.patch_score`) instead of the CRPS, which ignores dependence between
            pixels.
        joint: Whether the score's gradient reaches the map as well as the adapter. The MeanFlow term keeps
            the map a flow map.
        consistency: Whether to score samples corrected as in ``VFM(..., consistency=...)``, so that map, adapter and
            deviations are trained for this use. It needs an adapter that predicts deviations (``Adapter.grown``). If
            the adapter already has fitted factors, they are used for the correction, and classes without factors are
            not corrected: a class that is trained with a correction but used without it becomes worse. The likelihood
            of the difference of two samples also pulls the deviations towards the spread of the samples. Where the
            score favours no correction at all, the deviations thus remain a useful starting point.
        deviations_alone: Whether to train only the adapter's deviations, by the score of corrected samples. The map,
            the adapter's proposals for the noise (with a ``weight_decay`` of 0), and hence uncorrected samples, do not
            change.
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
            raise ValueError(f"{idle[0]}=True applies to the score, whose weight is 0: pass score=100.0")
        if not (self.misfit >= 0 and self.score >= 0):
            raise ValueError(f"misfit={self.misfit} and score={self.score} are weights: pass numbers of at least 0")
        if not (self.misfit or self.score):
            raise ValueError("misfit=0 and score=0 leave no term that uses the data: pass score=100.0")
        if self.joint and self.frozen:
            raise ValueError("joint=True trains the map, but frozen=True keeps it fixed: pass only one of them")
        if self.deviations_alone and not (self.frozen and self.consistency):
            raise ValueError("deviations_alone=True trains for corrected samples of a fixed map: pass frozen=True "
                             "and consistency=True too")
