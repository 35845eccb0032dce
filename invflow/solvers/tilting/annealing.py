"""A schedule for linear-Gaussian rewards from the covariance of the data, and the diffusion that goes with it."""

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

#: entries of the operator's dense matrices, all parameter sets together
_MOST_ENTRIES = 20_000_000


@dataclass(frozen=True)
class ReversalDiffusion:
    r"""The diffusion eps(t) = c (1 - t) / t; with c = 1 that of the time reversal of noising.

    A step from t to t' then adds about the same share of fresh noise wherever it lies in log t / (1 - t): v is close to
    2 c (1 - t)^2 times the step's length there. With the default eps = 1 - t there is almost none at small t, where
    well-separated modes in many dimensions part, and particles stay in the modes that their first noise chose. It is
    infinite at t = 0, which renoising takes (the first step draws all of its noise anew), and the SDE does not.

    Args:
        scale: c, over 0.

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

    Were the data N(mu, Sigma), a state at time t would leave them the covariance :math:`\Sigma_t = (\Sigma^{-1} +
    t^2 / (1 - t)^2 I)^{-1}`, and the look-ahead's measurement the covariance :math:`\sigma^2 I + A \Sigma_t A^T`
    (Rozet, Andry, Lanusse, Louppe 2024, have it per state). The likelihood that is as wide as its widest direction is

    .. math:: g(t) = \sigma^2 / (\sigma^2 + \lambda_{\max}(A \Sigma_t A^T))

    of the log likelihood. Against :class:`~invflow.solvers.tilting.schedules.AnnealedVariance`, which is this for
    :math:`\Sigma = s^2 I`, it knows two scales: that of well-separated modes, which are decided early, and that within
    a mode. Particles then feel the measurement while they can still change modes, and no sooner than it can tell.

    Args:
        variances: ``(k,)``, of the data in state space along the directions, over 0.
        directions: ``(k, *state_shape)``, orthonormal.
        rest: variance along all others, at least 0.

    Raises:
        ValueError: for variances that are not positive, directions that are not orthonormal.

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
            raise ValueError("the directions are not orthonormal: pass those of a singular value decomposition")

    @classmethod
    def from_samples(cls, samples: Tensor, count: int) -> AnnealedCovariance:
        """The principal directions of draws of the prior, the variance left spread evenly over the rest.

        Args:
            samples: ``(n, *state_shape)``, n > 1.
            count: directions to be kept, under n.

        Raises:
            ValueError: for fewer samples than that takes.
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
        """A time at which nothing has parted yet: the largest of the scales is 0.3 of the noise, t s = 0.3 (1 - t)."""
        scale = math.sqrt(max(float(self.variances.max()), self.rest))
        return 0.3 / (0.3 + scale)

    def unknown(self, t: float) -> tuple[Tensor, float]:
        """Sigma_t: ``(k,)`` along the directions, and along all others."""
        if t == 1:
            return torch.zeros_like(self.variances), 0.0
        known = (t / (1 - t)) ** 2
        return self.variances / (1 + self.variances * known), self.rest / (1 + self.rest * known)

    @torch.no_grad()
    def values(self, times: Sequence[float], reward: Reward, scale: float = 1.0, known: float = 1.0) -> Tensor:
        """g at each time.

        Args:
            times: in [0, 1].
            reward: a Gaussian likelihood of B observations with a linear operator.
            scale: of the decoding.
            known: the time from which the look-ahead knows all, see
                :class:`~invflow.solvers.tilting.schedules.AnnealedVariance`.

        Returns:
            ``(B, len(times))`` in float64 on the CPU; nondecreasing in time.

        Raises:
            TypeError: for any other reward.
            ValueError: for directions of another shape than the operator's images, or an operator too large.
        """
        if not isinstance(reward, GaussianLikelihood) or not reward.operator.linear:
            raise TypeError(f"this schedule needs a GaussianLikelihood with a linear operator, not a "
                            f"{type(reward).__name__}: pass schedule='linear' or 'annealed'")
        shape, flat = matrix_shape(reward.operator), self.directions.flatten(1).cpu().double()
        entries, size = math.prod(shape), shape[2]
        if flat.shape[1] != size or entries > _MOST_ENTRIES:
            raise ValueError(f"directions of {flat.shape[1]} values for images of {size}, and matrices of {entries} "
                             f"entries, of which at most {_MOST_ENTRIES} are made: pass directions of the states' "
                             "shape, or schedule='annealed'")
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
