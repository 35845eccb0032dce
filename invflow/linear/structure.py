"""Structure of a linear operator: diagonal, circular convolution, or small matrix; and closed forms from it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from invflow._core.conjugate_gradients import Map, solve
from invflow._core.shapes import as_pictures, column, only_observed
from invflow.likelihood import GaussianLikelihood
from invflow.operator import Operator

__all__ = [
    "dense_matrix", "diagonal_values", "find_spectrum", "find_system", "matrix_shape", "normal_operator",
    "observed_forward", "observed_residual", "passed_share", "regularised_solution", "SingularSystem", "Spectrum",
    "transfer_function", "zero_unobserved",
]

#: total number of entries of the dense factors of all parameter sets
_MOST_SINGULAR = 50_000_000
#: same for the factors of A A^T
_MOST_DENSE = 20_000_000
_ROWS_AT_A_TIME = 1024
_ENTRYWISE = ("identity", "diagonal")


def _probe(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """A fixed image of noise."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(like)


def _agree(found: Tensor, wanted: Tensor) -> bool:
    scale = wanted.abs().max().clamp(min=torch.finfo(wanted.dtype).tiny)
    return bool((found - wanted).abs().max() <= 100 * torch.finfo(wanted.dtype).eps * scale)


def _diagonal_of(apply: Map, shape: tuple[int, ...], like: Tensor, known: bool = False) -> Tensor | None:
    """Factor of each entry under a map ``(1, *shape)`` to ``(S, *shape)``; None if it mixes entries."""
    diagonal, probe = apply(torch.ones(1, *shape).to(like)), _probe((1, *shape), like)
    return diagonal if known or _agree(diagonal * probe, apply(probe)) else None


@torch.no_grad()
def diagonal_values(likelihood: GaussianLikelihood) -> Tensor | None:
    """Factor of each entry if the operator acts entry by entry, 0 where nothing was observed; else None.

    An operator may declare this (``structure`` of ``"identity"`` or ``"diagonal"``); otherwise a measurement of ones
    gives the values, and one of noise confirms them.

    Args:
        likelihood: Likelihood with a linear operator of S parameter sets.

    Returns:
        ``(S, *image_shape)``.
    """
    operator, shape = likelihood.operator, tuple(likelihood.operator.image_shape)
    if tuple(operator.measurement_shape) != shape or operator.structure in ("circular", "dense"):
        return None

    def apply(x: Tensor) -> Tensor:
        return zero_unobserved(operator, operator(x.expand(operator.num_sets, *shape)))

    return _diagonal_of(apply, shape, likelihood.y, operator.structure in _ENTRYWISE)


@torch.no_grad()
def transfer_function(likelihood: GaussianLikelihood) -> Tensor | None:
    """The transfer function of an operator that is a circular convolution, channel by channel; else None.

    It is the response to an impulse and, unless ``structure`` is ``"circular"``, is confirmed on noise.

    Args:
        likelihood: Likelihood with a linear operator of S parameter sets.

    Returns:
        ``(S, C, H, W)``, complex: the factor of :func:`torch.fft.fft2` of an image.
    """
    operator, like = likelihood.operator, likelihood.y
    shape, observed = tuple(operator.image_shape), operator.observed()
    if tuple(operator.measurement_shape) != shape or operator.structure == "dense" or (
            observed is not None and not bool(observed.all())):
        return None
    picture = as_pictures(shape)

    def apply(x: Tensor) -> Tensor:
        return operator(x.reshape(1, *shape).expand(operator.num_sets, *shape)).reshape(-1, *picture)

    impulse = torch.zeros(picture).to(like)
    impulse[:, 0, 0] = 1
    transfer: Tensor = torch.fft.fft2(apply(impulse))
    if operator.structure == "circular":
        return transfer
    noise = _probe(picture, like)
    return transfer if _agree(torch.fft.ifft2(torch.fft.fft2(noise) * transfer).real, apply(noise)) else None


def matrix_shape(operator: Operator) -> tuple[int, int, int]:
    """Shape of the operator's matrices, (sets, m, d): the caller decides whether they are small enough."""
    return operator.num_sets, math.prod(operator.measurement_shape), math.prod(operator.image_shape)


def dense_matrix(likelihood: GaussianLikelihood) -> Tensor:
    """The operator's matrices ``(sets, m, d)``, by its action on the identity; unobserved rows are zero."""
    operator: Operator = likelihood.operator
    size = matrix_shape(operator)[2]
    tensors = (*operator.buffers(), *operator.parameters())
    like = next((t for t in tensors if t.is_floating_point()), likelihood.y)
    singles = [operator.select(i) for i in range(operator.num_sets)]
    columns: list[list[Tensor]] = [[] for _ in singles]
    for start in range(0, size, _ROWS_AT_A_TIME):
        count = min(_ROWS_AT_A_TIME, size - start)
        rows = torch.zeros(count, size, dtype=like.dtype, device=likelihood.y.device)
        rows.diagonal(start).fill_(1)
        for single, found in zip(singles, columns):
            found.append(single(rows.unflatten(1, operator.image_shape)).flatten(1).double())
    matrix = torch.stack([torch.cat(found) for found in columns]).mT
    observed = operator.observed()
    return matrix if observed is None else matrix * observed.flatten(1).to(matrix)[..., None]


@dataclass(frozen=True)
class SingularSystem(ABC):
    r"""A = U diag(s) V^T with V orthogonal, for S parameter sets; coefficients are vectors ``(n, d)``.

    U^T is padded with zeros, or cut, to d rows. Singular values, coefficients of images and coefficients of
    measurements then all have d entries. Each row has its own set, or all rows share one set.

    Attributes:
        values: ``(S, d)``, nonnegative.
        image_shape: Shape of one image, with d values.
        measurement_shape: Shape of one measurement.
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

    def select(self, index: Tensor) -> SingularSystem:
        """Select sets, with repeats allowed; returns itself if all rows share one set."""
        if len(self.values) == 1:
            return self
        rows: dict[str, Any] = {name: value[index.to(value.device)] for name, value in vars(self).items()
                                if isinstance(value, Tensor)}
        return replace(self, **rows)


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


@dataclass(frozen=True)
class _Circular(SingularSystem):
    r"""Circular convolution, channel by channel.

    With its transfer function T = |T| e^{i phi}, A = P Z, where P is the filter e^{i phi}, which is orthogonal, and Z
    is the filter |T|. Since |T| is even, the Hartley transform H (real, symmetric, its own inverse) diagonalises Z.
    Therefore A = (P H) diag(|T|) H in real numbers.
    """

    phase: Tensor  # (S, C, H, W), complex of modulus 1

    def _hartley(self, x: Tensor) -> Tensor:
        spectrum = torch.fft.fft2(x, norm="ortho")
        result: Tensor = spectrum.real - spectrum.imag
        return result

    def _filter(self, x: Tensor, phase: Tensor) -> Tensor:
        turn = phase.to(torch.promote_types(x.dtype, torch.complex64))
        result: Tensor = torch.fft.ifft2(torch.fft.fft2(x) * turn).real
        return result

    def v(self, z: Tensor) -> Tensor:
        return self._hartley(z.reshape(-1, *self.image_shape))

    def v_adjoint(self, x: Tensor) -> Tensor:
        return self._hartley(x).flatten(1)

    def u(self, z: Tensor) -> Tensor:
        return self._filter(self.v(z), self.phase)

    def u_adjoint(self, y: Tensor) -> Tensor:
        return self.v_adjoint(self._filter(y, self.phase.conj()))


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


def _times(rows: Tensor, matrices: Tensor) -> Tensor:
    """Multiply each row ``(n, a)`` by its matrix, ``(n, a, b)`` or ``(1, a, b)``, to ``(n, b)``."""
    return rows @ matrices[0] if len(matrices) == 1 else torch.einsum("na,nab->nb", rows, matrices)


@torch.no_grad()
def find_system(likelihood: GaussianLikelihood, largest: int | None = None) -> SingularSystem | None:
    """Singular system of a likelihood's operator, without unobserved entries.

    Args:
        likelihood: Likelihood with a linear operator of S parameter sets.
        largest: Largest number of values in an image for which a matrix is decomposed, if it fits into memory.

    Returns:
        The system of S sets; None for a large operator that is neither diagonal nor circular.
    """
    operator, like = likelihood.operator, likelihood.y
    shape, measured = tuple(operator.image_shape), tuple(operator.measurement_shape)
    diagonal = diagonal_values(likelihood)
    if diagonal is not None:
        sign = torch.where(diagonal < 0, -1.0, 1.0).to(like).flatten(1)
        return _Diagonal(diagonal.abs().flatten(1), shape, shape, sign)
    transfer = transfer_function(likelihood) if len(shape) == 3 else None
    if transfer is not None:
        modulus = transfer.abs()
        phase = torch.where(modulus > 0, transfer / modulus.clamp(min=1e-30), torch.ones_like(transfer))
        return _Circular(modulus.flatten(1), shape, shape, phase)
    sets, rows, size = matrix_shape(operator)
    if sets * size * max(size, rows) > _MOST_SINGULAR or (largest is not None and size > largest):
        return None
    left, values, right = torch.linalg.svd(dense_matrix(likelihood), full_matrices=rows < size)
    rank = min(rows, size)
    values = torch.nn.functional.pad(values, (0, size - rank)).to(like)
    return _Dense(values, shape, measured, left[:, :, :rank].to(like), right.to(like))


def regularised_solution(likelihood: GaussianLikelihood, system: SingularSystem | None, target: Tensor, y: Tensor,
                         variance: float, scale: float = 1.0, iterations: int = 50) -> Tensor:
    r"""Minimiser of |x - target|^2 / (2 variance) + |y - scale A x|^2 / (2 sigma^2), row by row.

    This is the posterior mean for a Gaussian prior N(target, variance I).

    Args:
        likelihood: Likelihood of n observations, for its operators and noise levels.
        system: Its singular system; None solves by conjugate gradients.
        target: ``(n, *image_shape)``.
        y: ``(n, *measurement_shape)``.
        variance: Prior variance, > 0.
        scale: Factor of the operator.
        iterations: Number of conjugate gradient iterations.

    Returns:
        ``(n, *image_shape)``.
    """
    sigma = likelihood.sigma.to(target)
    if system is not None:
        weight = (scale * variance / sigma**2)[:, None]
        values = system.values.to(target)
        fitted = system.v_adjoint(target) + weight * values * system.u_adjoint(y)
        return system.v(fitted / (1 + scale * weight * values**2))
    operator, weight = likelihood.operator, column(scale * variance / sigma**2, target)

    def pull_back(values: Tensor) -> Tensor:
        return weight * operator.adjoint(zero_unobserved(operator, values))

    # the same number of steps, independent of the other rows
    right = pull_back(y) - scale * pull_back(operator(target))
    return target + solve(lambda x: x + scale * pull_back(operator(x)), right, None, iterations, 0.0)[0]


def zero_unobserved(operator: Operator, y: Tensor) -> Tensor:
    """A measurement with zeros where nothing was observed."""
    return only_observed(y, operator.observed())


def observed_forward(likelihood: GaussianLikelihood, x: Tensor) -> Tensor:
    """A x of one image for each observation, zero where nothing was observed: ``(n, *measurement_shape)``."""
    return zero_unobserved(likelihood.operator, likelihood.operator(x))


def normal_operator(likelihood: GaussianLikelihood) -> Map:
    """A' A without unobserved entries: ``(n, *image_shape)`` to the same."""
    return lambda x: likelihood.operator.adjoint(observed_forward(likelihood, x))


def passed_share(likelihood: GaussianLikelihood) -> Tensor:
    """Mean eigenvalue of A' A, estimated with one noise image, ``(B,)``: 1 for denoising, observed share for a mask."""
    noise = _probe(tuple(likelihood.operator.image_shape), likelihood.y)
    noise = noise.expand(len(likelihood.y), *noise.shape)
    return (normal_operator(likelihood)(noise) * noise).flatten(1).sum(1) / noise.square().flatten(1).sum(1)


def observed_residual(likelihood: GaussianLikelihood, x: Tensor) -> Tensor:
    """y - A x, zero where nothing was observed: ``(n, *image_shape)`` to ``(n, *measurement_shape)``."""
    return zero_unobserved(likelihood.operator, likelihood.y.to(x) - likelihood.operator(x))


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues and eigenvectors of A A^T for S parameter sets and m values of a measurement.

    Attributes:
        values: ``(S, m)``, at least 0; zero for unobserved entries.
        vectors: ``(S, m, m)``, in columns; None where A A^T is diagonal.
    """

    values: Tensor
    vectors: Tensor | None = None

    def select(self, part: slice) -> Spectrum:
        """Select observations; returns itself if all share one set."""
        if len(self.values) == 1:
            return self
        return Spectrum(self.values[part], None if self.vectors is None else self.vectors[part])

    def apply(self, factors: Tensor, y: Tensor) -> Tensor:
        """U diag(factors) U^T y, for factors ``(b, 1, m)`` and measurements ``(b, k, m)``."""
        if self.vectors is None:
            return factors * y
        vectors = self.vectors.to(y)
        return ((y @ vectors) * factors) @ vectors.mT


@torch.no_grad()
def find_spectrum(likelihood: GaussianLikelihood) -> Spectrum | None:
    """The spectrum of A A^T, over the observed entries.

    Two measurements test whether it is diagonal, as for masks and for averages over separate blocks. Otherwise it is
    decomposed, if the operator is small enough.

    Args:
        likelihood: Likelihood with a linear operator.

    Returns:
        The spectrum; None for a large operator whose A A^T is not diagonal.
    """
    operator, like, shape = likelihood.operator, likelihood.y, tuple(likelihood.operator.measurement_shape)

    def square(y: Tensor) -> Tensor:
        rows = y.expand(operator.num_sets, *shape)
        return zero_unobserved(operator, operator(operator.adjoint(zero_unobserved(operator, rows))))

    diagonal = _diagonal_of(square, shape, like, operator.structure in _ENTRYWISE)
    if diagonal is not None:
        return Spectrum(diagonal.flatten(1).clamp(min=0))
    sets, rows, size = matrix_shape(operator)
    if sets * rows * max(rows, size) > _MOST_DENSE:
        return None
    matrix = dense_matrix(likelihood)
    values, vectors = torch.linalg.eigh(matrix @ matrix.mT)
    return Spectrum(values.clamp(min=0).to(like), vectors.to(like))
