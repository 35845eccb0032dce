"""What solvers share that give one image for each observation: the checks, the copies, and how they look at A."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from invflow._core.chunks import ChunkSize
from invflow.likelihood import GaussianLikelihood
from invflow.posterior import Posterior
from invflow.reward import Reward
from invflow.solver import Solver
from invflow.solvers.finite import check_finite

__all__ = ["PointEstimator"]


class PointEstimator(Solver):
    """A solver that restores: one image for each observation, without a word about how far to trust it.

    Its posterior holds N equal copies of the image, which take the memory of one, and says so in
    ``diagnostics["point_estimate"]``. The CRPS of a point estimate is its mean absolute error; a coverage it has not,
    and comparisons leave it out. A subclass writes :meth:`_estimate`.

    Args:
        chunk_size: observations at a time; the estimates do not depend on it.

    Raises:
        ValueError: for a chunk size under 1.
    """

    def __init__(self, *, chunk_size: int = 8) -> None:
        if chunk_size < 1:
            raise ValueError(f"chunk_size={chunk_size}: at least 1 observation at a time")
        self.chunk_size = chunk_size

    @abstractmethod
    def _estimate(self, likelihood: GaussianLikelihood) -> tuple[Tensor, dict[str, Tensor]]:
        """Images ``(B, *image_shape)``, and diagnostics with a row for each observation."""

    @torch.no_grad()
    def _sample(self, reward: Reward, n: int, generator: torch.Generator, progress: bool) -> Posterior:
        """Restore each observation; see :meth:`Solver.sample`.

        Args:
            reward: a Gaussian likelihood of B observations.
            n: N, copies of each estimate.
            generator: not used: nothing is drawn.
            progress: Whether to show a progress bar.

        Returns:
            A posterior without weights or evidence, all samples of an observation equal.

        Raises:
            TypeError: for anything but a Gaussian likelihood.
            ValueError: for an operator that the method cannot take.
        """
        from tqdm import tqdm

        name, likelihood = type(self).__name__, self._supported(reward)
        batch = len(likelihood.y)
        pieces = ChunkSize(self.chunk_size, name).over(
            batch, lambda part: self._estimate(likelihood.select(part)))
        found = [piece for _, piece in tqdm(pieces, total=-(-batch // self.chunk_size), disable=not progress, desc=name,
                                            unit="chunk", delay=2)]
        estimate = torch.cat([image.detach() for image, _ in found])
        check_finite(name, "its end", 1, estimate)
        diagnostics: dict[str, Any] = {"point_estimate": True}
        diagnostics |= {key: torch.cat([kept[key] for _, kept in found]) for key in found[0][1]}
        return Posterior(estimate[:, None].expand(batch, n, *estimate.shape[1:]), diagnostics=diagnostics)

    def _supported(self, reward: Reward) -> GaussianLikelihood:
        name = type(self).__name__
        if not isinstance(reward, GaussianLikelihood):
            raise TypeError(f"{name} takes a GaussianLikelihood, not a {type(reward).__name__}: invflow.FMTT(prior) "
                            "and invflow.NoiseSMC(prior) take any reward")
        if not reward.operator.linear:
            raise ValueError(f"{name} takes linear operators, and {type(reward.operator).__name__} is not linear: "
                             "invflow.DPS(prior) takes any operator that can be differentiated")
        return reward
