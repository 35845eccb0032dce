"""Base class of solvers that give one image per observation: checks, copies, and the structure of A."""

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
    """Base class of restoration solvers: one image per observation, without any uncertainty.

    The posterior holds N equal copies of the image, which take the memory of one, and marks this in
    ``diagnostics["point_estimate"]``. The CRPS of a point estimate is its mean absolute error. It has no coverage, and
    comparisons leave coverage out. A subclass defines :meth:`_estimate`.

    Args:
        chunk_size: Number of observations at a time. The estimates do not depend on it.

    Raises:
        ValueError: For a chunk size under 1.
    """

    def __init__(self, *, chunk_size: int = 8) -> None:
        if chunk_size < 1:
            raise ValueError(f"chunk_size={chunk_size}: pass at least 1 observation at a time")
        self.chunk_size = chunk_size

    @abstractmethod
    def _estimate(self, likelihood: GaussianLikelihood) -> tuple[Tensor, dict[str, Tensor]]:
        """Return images ``(B, *image_shape)``, and diagnostics with a row for each observation."""

    @torch.no_grad()
    def _sample(self, reward: Reward, n: int, generator: torch.Generator, progress: bool) -> Posterior:
        """Restore each observation; see :meth:`Solver.sample`. Nothing is drawn.

        Returns:
            A posterior without weights or evidence, in which all samples of an observation are equal.

        Raises:
            TypeError: For anything but a Gaussian likelihood.
            ValueError: For an operator that the method cannot take.
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
            raise TypeError(f"{name} takes a GaussianLikelihood, not a {type(reward).__name__}: use "
                            "invflow.FMTT(prior) or invflow.NoiseSMC(prior), which take any reward")
        if not reward.operator.linear:
            raise ValueError(f"{name} takes linear operators, but {type(reward.operator).__name__} is not linear: "
                             "use invflow.DPS(prior), which takes any differentiable operator")
        return reward
