"""A schedule for linear-Gaussian rewards based on the covariance of the data, and the diffusion to use with it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from invflow.likelihood import GaussianLikelihood
from invflow.linear.structure import dense_matrix, matrix_shape
from invflow.models.mixture import GaussianMixtureFlow
from invflow.reward import Reward

__all__ = ["AnnealedCovariance", "ReversalDiffusion"]

#: largest number of entries of the operator's dense matrices, over all parameter sets
_MOST_ENTRIES = 20_000_000


@dataclass(frozen=True)
class ReversalDiffusion:
    r"""The diffusion eps(t) = c (1 - t) / t; with c = 1 it is that of the time reversal of noising.

    Steps of equal length in log t / (1 - t) then add about the same share of fresh noise: v is close to
    2 c (1 - t)^2 times that length. With the default eps = 1 - t, steps at small t add almost no noise. There
    well-separated modes in many dimensions separate, so particles stay in the modes that their first noise chose. The
    diffusion is infinite at t = 0. Renoising accepts this (the first step replaces all of its noise); the SDE does not.

    Args:
        scale: c, above 0.

    Example:
        >>> from invflow.solvers.tilting.annealing import ReversalDiffusion
        >>> ReversalDiffusion(0.5)(0.25)
        1.5
    """

    scale: float = 1.0

    def __post_init__(self) -> None:
        if not (self.scale > 0 and math.isfinite(self.scale)):
            raise ValueError(f"scale={self.scale} must be over 0 and finite")

    def __call__(self, t: float) -> float:
        """eps(t); infinite at t = 0."""
        return math.inf if t == 0 else self.scale * (1 - t) / t


@dataclass(frozen=True, eq=False)
class AnnealedCovariance:
    r"""Schedule of a linear-Gaussian likelihood whose variance shrinks to sigma^2 as fast as the data become known.

    If the data were N(mu, Sigma), their covariance given a state at time t would be :math:`\Sigma_t = (\Sigma^{-1} +
    t^2 / (1 - t)^2 I)^{-1}`, and that of the look-ahead's measurement :math:`\sigma^2 I + A \Sigma_t A^T` (Rozet,
    Andry, Lanusse, Louppe 2024, compute it for each state). An isotropic likelihood as wide as the widest direction of
    this covariance is the fraction

    .. math:: g(t) = \sigma^2 / (\sigma^2 + \lambda_{\max}(A \Sigma_t A^T))

    of the log likelihood. :class:`~invflow.solvers.tilting.schedules.AnnealedVariance` is the special case
    :math:`\Sigma = s^2 I`. The covariance adds a second scale: one is the distance of well-separated modes, which are
    decided early, the other the width of a mode. The measurement then acts on particles while they can still change
    modes, and not before it can tell modes apart.

    Args:
        variances: ``(k,)``, variances of the data in state space along the directions, above 0.
        directions: ``(k, *state_shape)``, orthonormal directions.
        rest: Variance along all other directions, at least 0.

    Raises:
        ValueError: If a variance is not positive, or the directions are not orthonormal.

    Example:
        >>> import torch, invflow
        >>> from invflow.operators import MatrixOperator
        >>> from invflow.solvers.tilting.annealing import AnnealedCovariance
        >>> prior = invflow.GaussianMixtureFlow(torch.tensor([[-8.0, 0.0], [8.0, 0.0]]), std=1.0)
        >>> operator = MatrixOperator(torch.tensor([[1.0, 0.0]]), image_shape=(2,))
        >>> likelihood = invflow.GaussianLikelihood(operator, torch.tensor([[7.0]]), sigma=1.0)
        >>> schedule = AnnealedCovariance.of_mixture(prior)
        >>> schedule.values([0.0, 0.5, 1.0], likelihood).round(decimals=3).tolist()
        [[0.015, 0.504, 1.0]]
    """

    variances: Tensor
    directions: Tensor = field(repr=False)
    rest: float = 0.0

    def __post_init__(self) -> None:
        flat = self.directions.double().flatten(1)
        if self.variances.shape != (len(flat),) or not bool((self.variances > 0).all()) or not self.rest >= 0:
            raise ValueError(f"variances of shape {tuple(self.variances.shape)} and rest={self.rest} for "
                             f"{len(flat)} directions: pass one variance over 0 for each, and a rest of at least 0")
        if not torch.allclose(flat @ flat.mT, torch.eye(len(flat)).to(flat), atol=1e-4):
            raise ValueError("the directions are not orthonormal: pass the singular vectors of a decomposition by "
                             "torch.linalg.svd")

    @classmethod
    def from_samples(cls, samples: Tensor, count: int) -> AnnealedCovariance:
        """The principal directions of draws from the prior; the remaining variance is spread evenly over the rest.

        Args:
            samples: ``(n, *state_shape)``, n > 1.
            count: Number of directions to keep, less than n.

        Raises:
            ValueError: If there are too few samples for so many directions.
        """
        if not 0 < count < len(samples):
            raise ValueError(f"{len(samples)} samples show {len(samples) - 1} directions at most, not {count}")
        flat = samples.double().flatten(1)
        _, singular, directions = torch.linalg.svd(flat - flat.mean(0), full_matrices=False)
        variances = singular.square() / (len(samples) - 1)
        others = flat.shape[1] - count
        rest = float(variances[count:].sum() / others) if others > 0 else 0.0
        return cls(variances[:count].clamp(min=1e-30), directions[:count].unflatten(1, samples.shape[1:]), rest)

    @classmethod
    def of_mixture(cls, prior: GaussianMixtureFlow) -> AnnealedCovariance:
        """The covariance of a Gaussian mixture, in closed form."""
        weights, coordinates = prior.weights.double(), prior.coordinates.double()
        within = float(weights @ prior.std.double().square())
        between, turn = torch.linalg.eigh(coordinates.mT @ (weights[:, None] * coordinates))
        directions = (turn.mT @ prior.basis.double()).unflatten(1, prior.state_shape)
        return cls(between.clamp(min=0) + within, directions, within)

    @property
    def first_time(self) -> float:
        """A time before any modes separate: the largest scale s is 0.3 of the noise there, t s = 0.3 (1 - t)."""
        scale = math.sqrt(max(float(self.variances.max()), self.rest))
        return 0.3 / (0.3 + scale)

    def unknown(self, t: float) -> tuple[Tensor, float]:
        """Sigma_t: variances ``(k,)`` along the directions, and the variance along all others."""
        if t == 1:
            return torch.zeros_like(self.variances), 0.0
        known = (t / (1 - t)) ** 2
        return self.variances / (1 + self.variances * known), self.rest / (1 + self.rest * known)

    @torch.no_grad()
    def values(self, times: Sequence[float], reward: Reward, scale: float = 1.0, known: float = 1.0) -> Tensor:
        """g at each time.

        Args:
            times: Times in [0, 1].
            reward: Gaussian likelihood of B observations with a linear operator.
            scale: Factor of the affine decoding.
            known: Time from which the look-ahead is taken to know the image, see
                :class:`~invflow.solvers.tilting.schedules.AnnealedVariance`.

        Returns:
            ``(B, len(times))`` in float64 on the CPU; nondecreasing in time.

        Raises:
            TypeError: If the reward is of another kind.
            ValueError: If the directions differ in shape from the operator's images, or the operator is too large.
        """
        if not isinstance(reward, GaussianLikelihood) or not reward.operator.linear:
            raise TypeError(f"this schedule needs a GaussianLikelihood with a linear operator, not a "
                            f"{type(reward).__name__}: pass schedule='linear' or 'annealed'")
        shape, flat = matrix_shape(reward.operator), self.directions.flatten(1).cpu().double()
        entries, size = math.prod(shape), shape[2]
        if flat.shape[1] != size or entries > _MOST_ENTRIES:
            raise ValueError(f"the directions have {flat.shape[1]} values and the images {size}, and the operator's "
                             f"matrices have {entries} entries (at most {_MOST_ENTRIES}): pass directions of the "
                             "states' shape, or schedule='annealed'")
        matrix = scale * dense_matrix(reward).cpu()
        seen, all_seen = matrix @ flat.mT, matrix @ matrix.mT
        last, last_rest = self.unknown(known)
        noise = reward.sigma.detach().cpu().double().square()
        columns = []
        for t in times:
            variances, rest = self.unknown(t)
            extra = (variances - last - (rest - last_rest)).cpu().double().clamp(min=-(rest - last_rest))
            covariance = (rest - last_rest) * all_seen + (seen * extra) @ seen.mT
            widest = torch.linalg.eigvalsh(covariance)[:, -1].clamp(min=0)
            columns.append(noise / (noise + widest) if t < known else torch.ones_like(noise))
        return torch.stack(columns, dim=1)
