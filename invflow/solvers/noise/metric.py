"""What the likelihood knows of each direction of the noise, learnt from gradients that were computed anyway."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from invflow.smc import precise

__all__ = ["Metric", "Preconditioner"]

_MAX_RANK = 256
_MAX_VECTORS = 512  # gradients from which a metric is made: their Gram matrix is decomposed
_LEAST_INFORMATION = 0.01  # of a direction over the reference's: below, the direction is the reference's


@dataclass(frozen=True)
class Metric:
    r"""Coordinates w in which a density is closer to N(0, I): u = K w, one linear map for each observation.

    K = I + V diag(c - 1) V^T shrinks k directions and leaves all others as they are, so that nothing depends on the
    dimension (likelihood-informed subspaces: Cui, Law, Marzouk 2016). u is noise in units of the reference.

    Attributes:
        basis: ``(b, d, k)``, V, orthonormal columns.
        shrink: ``(b, k)``, c in (0, 1].
    """

    basis: Tensor
    shrink: Tensor

    def select(self, rows: Tensor) -> Metric:
        """Those of some observations."""
        return Metric(self.basis[rows], self.shrink[rows])

    def stretch(self, w: Tensor) -> Tensor:
        """K w, for ``(b, N, d)``."""
        return self._scale(w, self.shrink)

    def whiten(self, u: Tensor) -> Tensor:
        """K^-1 u, for ``(b, N, d)``."""
        return self._scale(u, 1 / self.shrink)

    def excess(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """(|K w|^2 - |w|^2) / 2, ``(b, N)`` in float64, and its gradient in w, ``(b, N, d)``."""
        inside = w @ self.basis
        change = self.shrink.square() - 1
        half = 0.5 * (precise(change[:, None]) * precise(inside).square()).sum(2)
        return half, (inside * change[:, None]) @ self.basis.mT

    def _scale(self, values: Tensor, factors: Tensor) -> Tensor:
        return values + ((values @ self.basis) * (factors - 1)[:, None]) @ self.basis.mT


class Preconditioner:
    r"""Learns the metric of each observation from the gradients at the particles.

    At a temperature lambda the score of the likelihood, lambda grad r, has the covariance
    :math:`\lambda F`, where F is the expected Gauss-Newton curvature :math:`E[J^T A^T A J] / \sigma^2` of a Gaussian
    likelihood (Fisher's identity; as a preconditioner, Titsias 2023, "Optimal preconditioning and Fisher adaptive
    Langevin sampling"). F is estimated from gradients that earlier moves computed anyway, in z-space, and the metric
    for the moves to come has :math:`c = (1 + \lambda F)^{-p/2}` along its eigenvectors.

    A metric is fitted between moves and held fixed while they run: each of them leaves its target invariant whatever
    the metric. That it is chosen by looking at the same particles' past is the usual adaptation of sequential Monte
    Carlo, consistent as the particles grow (Beskos, Jasra, Kantas, Thiery 2016); chains freeze it.

    Args:
        num_observations: B.
        power: p, in (0, 1]. At 1 a Gaussian posterior becomes N(., I). But one metric serves all particles of an
            observation, and on images the sharp directions of each are its own: what is sharp on average is flat at
            most of them, and is crossed too slowly at 1. At 0.7 trajectories of MNIST stayed as stable, and the
            residual came to rest within one of them.

    Attributes:
        metric: of all B observations; None before the first fit.
        recording: whether gradients are kept.
    """

    def __init__(self, num_observations: int, power: float = 0.7) -> None:
        self.num_observations, self.power = num_observations, power
        self.metric: Metric | None = None
        self.recording = True
        self._seen: list[Tensor] = []
        self._rows: Tensor | None = None

    def see(self, rows: Tensor, gradient: Tensor, trusted: Tensor | None = None) -> None:
        """Keep gradients of r at particles of the observations ``rows``.

        Args:
            rows: ``(b,)``.
            gradient: ``(b, N, *state_shape)``.
            trusted: ``(b, N)``, where to keep them: a trajectory that has left the target's bulk sees gradients so
                steep that nothing else would be left in the metric; None: everywhere.
        """
        if not self.recording:
            return
        if self._rows is None or not (rows is self._rows or torch.equal(rows, self._rows)):
            self._seen = []
        self._rows = rows  # for the next time: a GPU need not be asked whether a tensor equals itself
        gradient = gradient.flatten(2)
        # a row of zeros is none
        self._seen.append(gradient if trusted is None else torch.where(trusted[..., None], gradient, 0.0))

    def forget(self) -> None:
        """Drop the gradients kept so far, not the metric."""
        self._seen = []

    def fit(self, rows: Tensor, seen_at: Tensor, temperature: Tensor, std: Tensor) -> None:
        """Make the metric of some observations from what was seen.

        Args:
            rows: ``(b,)``, which observations; all of them must have been seen.
            seen_at: ``(b,)``, the temperature at which the gradients were seen.
            temperature: ``(b,)``, of the moves to come.
            std: of the reference at that temperature, to broadcast against ``(b, N, *state_shape)``.
        """
        if not self._seen or self._rows is None:
            return
        place = torch.searchsorted(self._rows, rows)
        vectors = torch.cat([seen[place] for seen in self._seen], dim=1)
        level = (seen_at * temperature).sqrt().to(vectors)[:, None, None]
        scale = std.expand(len(rows), 1, *std.shape[2:]).flatten(2) if std.ndim > 2 else std
        vectors = vectors * scale * level
        for b, gradients in zip(rows.tolist(), vectors):
            # how many there are decides how they are thinned out: a GPU is waited for
            kept = gradients[(gradients != 0).any(1) & gradients.isfinite().all(1)]
            count = min(len(kept), _MAX_VECTORS)
            if count == 0:
                continue
            kept = kept[torch.arange(count, device=rows.device) * len(kept) // count]
            basis, singular, _ = torch.linalg.svd(kept.T / count**0.5, full_matrices=False)
            information = singular.square()[:_MAX_RANK]
            information = torch.where(information > _LEAST_INFORMATION, information, 0.0)
            self._put(b, basis[:, :_MAX_RANK], (1 + information) ** (-0.5 * self.power))

    def _put(self, b: int, basis: Tensor, shrink: Tensor) -> None:
        """Replace the metric of one observation; directions that it lacks are zero and not shrunk."""
        dimension, rank = basis.shape
        old = self.metric
        if old is None:
            old = Metric(basis.new_zeros(self.num_observations, dimension, 0),
                         shrink.new_ones(self.num_observations, 0))
        more = max(rank - old.shrink.shape[1], 0)
        new = Metric(torch.nn.functional.pad(old.basis, (0, more)), torch.nn.functional.pad(old.shrink, (0, more),
                                                                                           value=1.0))
        if more == 0:
            new = Metric(old.basis.clone(), old.shrink.clone())  # a metric in use never changes
        new.basis[b], new.shrink[b] = 0.0, 1.0
        new.basis[b, :, :rank], new.shrink[b, :rank] = basis, shrink
        self.metric = new
