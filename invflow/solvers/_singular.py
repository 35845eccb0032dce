"""Singular systems A = U diag(s) V^T of linear operators, found by probing: diagonal, circular, or small and dense."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from invflow.reward import GaussianLikelihood

__all__ = ["SingularSystem", "find_system", "regularised_solution"]

#: entries of the dense factors of all parameter sets together
_MOST_ENTRIES = 50_000_000


@dataclass(frozen=True)
class SingularSystem(ABC):
    r"""A = U diag(s) V^T with V orthogonal, for S parameter sets; coefficients are vectors ``(n, d)``.

    U^T is padded with zeros, or cut, to d rows, so that singular values, coefficients of images and coefficients of
    measurements all have d entries. Rows and sets belong together one by one, or all rows share one set.

    Attributes:
        values: ``(S, d)``, nonnegative.
        image_shape: of one image, with d values.
        measurement_shape: of one measurement.
    """

    values: Tensor
    image_shape: tuple[int, ...]
    measurement_shape: tuple[int, ...]

    @abstractmethod
    def v(self, z: Tensor) -> Tensor:
        """V z: coefficients ``(n, d)`` to images ``(n, *image_shape)``."""

    @abstractmethod
    def v_adjoint(self, x: Tensor) -> Tensor:
        """V^T x: images to coefficients ``(n, d)``."""

    @abstractmethod
    def u(self, z: Tensor) -> Tensor:
        """U z: coefficients ``(n, d)`` to measurements ``(n, *measurement_shape)``."""

    @abstractmethod
    def u_adjoint(self, y: Tensor) -> Tensor:
        """U^T y: measurements to coefficients ``(n, d)``; a new tensor."""

    @abstractmethod
    def select(self, index: Tensor) -> SingularSystem:
        """Some of the sets, repeats allowed; itself if one is shared by all."""


@dataclass(frozen=True)
class _Diagonal(SingularSystem):
    """A(x) = a x, entry by entry."""

    sign: Tensor  # (S, d)

    def v(self, z: Tensor) -> Tensor:
        return z.reshape(-1, *self.image_shape)

    def v_adjoint(self, x: Tensor) -> Tensor:
        return x.flatten(1)

    def u(self, z: Tensor) -> Tensor:
        return (self.sign.to(z) * z).reshape(-1, *self.measurement_shape)

    def u_adjoint(self, y: Tensor) -> Tensor:
        return self.sign.to(y) * y.flatten(1)

    def select(self, index: Tensor) -> SingularSystem:
        if len(self.values) == 1:
            return self
        rows = index.to(self.values.device)
        return _Diagonal(self.values[rows], self.image_shape, self.measurement_shape, self.sign[rows])


@dataclass(frozen=True)
class _Circular(SingularSystem):
    r"""Circular convolution, channel by channel.

    Its transfer function T = |T| e^{i phi} makes A = P Z, with P the filter e^{i phi}, which is orthogonal, and Z the
    filter |T|. Since |T| is even, the Hartley transform H (real, symmetric, its own inverse) diagonalises Z. So
    A = (P H) diag(|T|) H in real numbers.
    """

    phase: Tensor  # (S, C, H, W), complex of modulus 1

    def _hartley(self, x: Tensor) -> Tensor:
        spectrum = torch.fft.fft2(x, norm="ortho")
        return spectrum.real - spectrum.imag

    def _filter(self, x: Tensor, phase: Tensor) -> Tensor:
        return torch.fft.ifft2(torch.fft.fft2(x) * phase.to(torch.promote_types(x.dtype, torch.complex64))).real

    def v(self, z: Tensor) -> Tensor:
        return self._hartley(z.reshape(-1, *self.image_shape))

    def v_adjoint(self, x: Tensor) -> Tensor:
        return self._hartley(x).flatten(1)

    def u(self, z: Tensor) -> Tensor:
        return self._filter(self.v(z), self.phase)

    def u_adjoint(self, y: Tensor) -> Tensor:
        return self.v_adjoint(self._filter(y, self.phase.conj()))

    def select(self, index: Tensor) -> SingularSystem:
        if len(self.values) == 1:
            return self
        rows = index.to(self.values.device)
        return _Circular(self.values[rows], self.image_shape, self.measurement_shape, self.phase[rows])


@dataclass(frozen=True)
class _Dense(SingularSystem):
    """Matrices with their singular value decompositions."""

    left: Tensor  # (S, m, r), r at most d
    right: Tensor  # (S, d, d), rows are right singular vectors

    def v(self, z: Tensor) -> Tensor:
        return _times(z, self.right.to(z)).reshape(-1, *self.image_shape)

    def v_adjoint(self, x: Tensor) -> Tensor:
        return _times(x.flatten(1), self.right.to(x).mT)

    def u(self, z: Tensor) -> Tensor:
        rank = self.left.shape[2]
        return _times(z[:, :rank], self.left.to(z).mT).reshape(-1, *self.measurement_shape)

    def u_adjoint(self, y: Tensor) -> Tensor:
        inside = _times(y.flatten(1), self.left.to(y))
        return torch.nn.functional.pad(inside, (0, self.values.shape[1] - inside.shape[1]))

    def select(self, index: Tensor) -> SingularSystem:
        if len(self.values) == 1:
            return self
        rows = index.to(self.values.device)
        return _Dense(self.values[rows], self.image_shape, self.measurement_shape, self.left[rows], self.right[rows])


def _times(rows: Tensor, matrices: Tensor) -> Tensor:
    """Each row ``(n, a)`` times its matrix, ``(n, a, b)`` or ``(1, a, b)``, to ``(n, b)``."""
    return rows @ matrices[0] if len(matrices) == 1 else torch.einsum("na,nab->nb", rows, matrices)


@torch.no_grad()
def find_system(likelihood: GaussianLikelihood) -> SingularSystem | None:
    """The singular system of a likelihood's operator, without unobserved entries.

    What the operator does to a few images tells its structure: entry by entry (masks, denoising), a circular
    convolution with one kernel for each parameter set and channel, or else a matrix, if it is small enough.

    Args:
        likelihood: with a linear operator of S parameter sets.

    Returns:
        The system of S sets; None for a large operator without such structure.
    """
    operator = likelihood.operator
    sets, shape = operator.num_sets, tuple(operator.image_shape)
    like, observed = likelihood.y, operator.observed()

    def measure(x: Tensor) -> Tensor:
        clean = operator(x.expand(sets, *shape))
        return clean if observed is None else torch.where(observed, clean, 0.0)

    probe = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0)).to(like)
    if tuple(operator.measurement_shape) == shape:
        measured = measure(probe)
        diagonal = measure(torch.ones_like(probe))
        if _agree(diagonal * probe, measured):
            sign = torch.where(diagonal < 0, -1.0, 1.0).to(like).flatten(1)
            return _Diagonal(diagonal.abs().flatten(1), shape, shape, sign)
        if len(shape) == 3:
            impulse = torch.zeros_like(probe)
            impulse[..., 0, 0] = 1
            transfer = torch.fft.fft2(measure(impulse))
            if _agree(torch.fft.ifft2(torch.fft.fft2(probe) * transfer).real, measured):
                modulus = transfer.abs()
                phase = torch.where(modulus > 0, transfer / modulus.clamp(min=1e-30), torch.ones_like(transfer))
                return _Circular(modulus.flatten(1), shape, shape, phase)
    return _dense_system(likelihood)


def _agree(found: Tensor, wanted: Tensor) -> bool:
    scale = wanted.abs().max().clamp(min=torch.finfo(wanted.dtype).tiny)
    return bool((found - wanted).abs().max() <= 100 * torch.finfo(wanted.dtype).eps * scale)


def _dense_system(likelihood: GaussianLikelihood) -> SingularSystem | None:
    from invflow.solvers.exact import dense_matrix

    operator = likelihood.operator
    size, rows = math.prod(operator.image_shape), math.prod(operator.measurement_shape)
    if operator.num_sets * size * max(size, rows) > _MOST_ENTRIES:
        return None
    matrix = dense_matrix(likelihood)
    left, values, right = torch.linalg.svd(matrix, full_matrices=rows < size)
    rank = min(rows, size)
    values = torch.nn.functional.pad(values, (0, size - rank)).to(likelihood.y)
    return _Dense(values, tuple(operator.image_shape), tuple(operator.measurement_shape),
                  left[:, :, :rank].to(likelihood.y), right.to(likelihood.y))


def regularised_solution(likelihood: GaussianLikelihood, system: SingularSystem | None, target: Tensor, y: Tensor,
                         variance: float, scale: float = 1.0, iterations: int = 50) -> Tensor:
    r"""Minimiser of |x - target|^2 / (2 variance) + |y - scale A x|^2 / (2 sigma^2), row by row.

    The mean of the posterior of a Gaussian prior N(target, variance I).

    Args:
        likelihood: of n observations, for their operators and noise levels.
        system: its singular system; None solves by conjugate gradients.
        target: ``(n, *image_shape)``.
        y: ``(n, *measurement_shape)``.
        variance: over 0.
        scale: multiplies the operator.
        iterations: of conjugate gradients.

    Returns:
        ``(n, *image_shape)``.
    """
    sigma = likelihood.sigma.to(target)
    if system is not None:
        weight = (scale * variance / sigma**2)[:, None]
        values = system.values.to(target)
        fitted = system.v_adjoint(target) + weight * values * system.u_adjoint(y)
        return system.v(fitted / (1 + scale * weight * values**2))
    operator, observed = likelihood.operator, likelihood.operator.observed()
    column = (-1, *[1] * (target.ndim - 1))
    weight = (scale * variance / sigma**2).reshape(column)

    def pull_back(values: Tensor) -> Tensor:
        return weight * operator.adjoint(values if observed is None else torch.where(observed, values, 0.0))

    def apply(x: Tensor) -> Tensor:
        return x + scale * pull_back(operator(x))

    def dot(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).flatten(1).sum(1).reshape(column)

    x = target
    residual = pull_back(y) - scale * pull_back(operator(x))  # of the normal equations, at x = target
    direction, size = residual, dot(residual, residual)
    tiny = torch.finfo(x.dtype).tiny
    for _ in range(iterations):  # always as many, so that a row does not depend on the others
        moved = apply(direction)
        step = size / dot(direction, moved).clamp(min=tiny)
        x, residual = x + step * direction, residual - step * moved
        new = dot(residual, residual)
        direction, size = residual + new / size.clamp(min=tiny) * direction, new
    return x
