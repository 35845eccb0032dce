"""Metric of the likelihood in noise space, learnt from gradients that are computed anyway."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from invflow.smc import precise

__all__ = ["Metric", "Preconditioner"]

_MAX_RANK = 256
_MAX_VECTORS = 512  # gradients used for a metric: their Gram matrix is decomposed
_LEAST_INFORMATION = 0.01  # information of a direction relative to the reference; with less it is left unchanged


@dataclass(frozen=True)
class Metric:
    r"""Coordinates w in which a density is closer to N(0, I): u = K w, with one linear map per observation.

    K = I + V diag(c - 1) V^T shrinks k directions and leaves all others unchanged, so that nothing depends on the
    dimension (likelihood-informed subspaces: Cui, Law, Marzouk 2016). u is noise in units of the reference.

    Attributes:
        basis: V with orthonormal columns, ``(b, d, k)``.
        shrink: c in (0, 1], ``(b, k)``.
    """

    basis: Tensor
    shrink: Tensor

    def select(self, rows: Tensor) -> Metric:
        """Metrics of some observations."""
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
    r"""Learner of each observation's metric from the gradients at its particles.

    At a temperature lambda the score of the likelihood, lambda grad r, has the covariance
    :math:`\lambda F`, where F is the expected Gauss-Newton curvature :math:`E[J^T A^T A J] / \sigma^2` of a Gaussian
    likelihood (Fisher's identity; as a preconditioner, Titsias 2023, "Optimal preconditioning and Fisher adaptive
    Langevin sampling"). F is estimated in z-space from gradients that earlier moves computed anyway. The metric for the
    next moves has :math:`c = (1 + \lambda F)^{-p/2}` along the eigenvectors of F.

    A metric is fitted between moves and held fixed while they run: each move leaves its target invariant whatever the
    metric. Choosing it from the past of the same particles is the usual adaptation of sequential Monte Carlo, which is
    consistent as the number of particles grows (Beskos, Jasra, Kantas, Thiery 2016). Chains freeze the metric.

    Args:
        num_observations: Number of observations B.
        power: p, in (0, 1]. With 1 a Gaussian posterior becomes N(., I). But all particles of an observation share one
            metric, and on images each particle has its own sharp directions: a direction that is sharp on average is
            flat at most particles, and with 1 they cross it too slowly. With 0.7, trajectories on MNIST stayed as
            stable, and the residual settled within one trajectory.

    Attributes:
        metric: Metric of all B observations; None before the first fit.
        recording: Whether gradients are kept.
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
            rows: Indices of the observations, ``(b,)``.
            gradient: Gradients, ``(b, N, *state_shape)``.
            trusted: Mask of the gradients to keep, ``(b, N)``. A trajectory that has left the bulk of the target has
                gradients so steep that they would dominate the metric. None keeps all.
        """
        if not self.recording:
            return
        if self._rows is None or not (rows is self._rows or torch.equal(rows, self._rows)):
            self._seen = []
        self._rows = rows  # kept for the next call: comparing the object avoids a GPU synchronisation
        gradient = gradient.flatten(2)
        # a row of zeros counts as no gradient
        self._seen.append(gradient if trusted is None else torch.where(trusted[..., None], gradient, 0.0))

    def forget(self) -> None:
        """Drop the gradients kept so far, but not the metric."""
        self._seen = []

    def fit(self, rows: Tensor, seen_at: Tensor, temperature: Tensor, std: Tensor) -> None:
        """Fit the metric of some observations to the gradients that were kept.

        Args:
            rows: Indices of the observations, ``(b,)``. Each must have gradients.
            seen_at: Temperature at which the gradients were computed, ``(b,)``.
            temperature: Temperature of the next moves, ``(b,)``.
            std: Standard deviation of the reference at that temperature, broadcastable to ``(b, N, *state_shape)``.
        """
        if not self._seen or self._rows is None:
            return
        place = torch.searchsorted(self._rows, rows)
        vectors = torch.cat([seen[place] for seen in self._seen], dim=1)
        level = (seen_at * temperature).sqrt().to(vectors)[:, None, None]
        scale = std.expand(len(rows), 1, *std.shape[2:]).flatten(2) if std.ndim > 2 else std
        vectors = vectors * scale * level
        for b, gradients in zip(rows.tolist(), vectors):
            # the number of gradients decides how they are thinned out: this synchronises with the GPU
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
        """Replace the metric of one observation. Missing directions are zero and not shrunk."""
        dimension, rank = basis.shape
        old = self.metric
        if old is None:
            old = Metric(basis.new_zeros(self.num_observations, dimension, 0),
                         shrink.new_ones(self.num_observations, 0))
        more = max(rank - old.shrink.shape[1], 0)
        new = Metric(torch.nn.functional.pad(old.basis, (0, more)), torch.nn.functional.pad(old.shrink, (0, more),
                                                                                           value=1.0))
        if more == 0:
            new = Metric(old.basis.clone(), old.shrink.clone())  # a metric that is in use must not change
        new.basis[b], new.shrink[b] = 0.0, 1.0
        new.basis[b, :, :rank], new.shrink[b, :rank] = basis, shrink
        self.metric = new
