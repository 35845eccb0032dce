"""Singular systems A = U diag(s) V^T of linear operators, found by probing: diagonal, circular, or small and dense."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from invflow._core.conjugate_gradients import Map
from invflow._core.shapes import as_pictures
from invflow.likelihood import GaussianLikelihood
from invflow.operator import Operator

__all__ = [
    "dense_matrix", "find_spectrum", "find_system", "normal_operator", "observed_residual", "passed_share",
    "regularised_solution", "SingularSystem", "Spectrum", "transfer_function",
]

#: entries of the dense factors of all parameter sets together
_MOST_SINGULAR = 50_000_000


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

    operator = likelihood.operator
    size, rows = math.prod(operator.image_shape), math.prod(operator.measurement_shape)
    if operator.num_sets * size * max(size, rows) > _MOST_SINGULAR:
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


def normal_operator(likelihood: GaussianLikelihood) -> Map:
    """A' A without unobserved entries: ``(n, *image_shape)`` to the same."""
    operator, observed = likelihood.operator, likelihood.operator.observed()

    def apply(x: Tensor) -> Tensor:
        clean = operator(x)
        return operator.adjoint(clean if observed is None else torch.where(observed, clean, 0.0))

    return apply


def passed_share(likelihood: GaussianLikelihood) -> Tensor:
    """Mean eigenvalue of A' A, estimated with one noise image, ``(B,)``: 1 for denoising, what a mask leaves of it."""
    noise = torch.randn(tuple(likelihood.operator.image_shape), generator=torch.Generator().manual_seed(0))
    noise = noise.to(likelihood.y).expand(len(likelihood.y), *noise.shape)
    return (normal_operator(likelihood)(noise) * noise).flatten(1).sum(1) / noise.square().flatten(1).sum(1)


def observed_residual(likelihood: GaussianLikelihood, x: Tensor) -> Tensor:
    """y - A x, zero where nothing was observed: ``(n, *image_shape)`` to ``(n, *measurement_shape)``."""
    residual = likelihood.y.to(x) - likelihood.operator(x)
    observed = likelihood.operator.observed()
    return residual if observed is None else torch.where(observed, residual, 0.0)


@torch.no_grad()
def transfer_function(likelihood: GaussianLikelihood) -> Tensor | None:
    """The transfer function of an operator that is a circular convolution, channel by channel; else None.

    Found by what the operator does to an impulse, and confirmed on noise.

    Args:
        likelihood: with a linear operator of S parameter sets.

    Returns:
        ``(S, C, H, W)``, complex: what :func:`torch.fft.fft2` of an image is multiplied by.
    """
    operator, like = likelihood.operator, likelihood.y
    shape = tuple(operator.image_shape)
    observed = operator.observed()
    if tuple(operator.measurement_shape) != shape or (observed is not None and not bool(observed.all())):
        return None
    picture = as_pictures(shape)
    impulse = torch.zeros(picture).to(like)
    impulse[:, 0, 0] = 1
    noise = torch.randn(picture, generator=torch.Generator().manual_seed(0)).to(like)
    answers = [operator(x.reshape(1, *shape).expand(operator.num_sets, *shape)).reshape(-1, *picture)
               for x in (impulse, noise)]
    transfer = torch.fft.fft2(answers[0])
    expected = torch.fft.ifft2(torch.fft.fft2(noise) * transfer).real
    error, scale = (expected - answers[1]).abs().max(), answers[1].abs().max()
    return transfer if bool(error <= 100 * torch.finfo(like.dtype).eps * scale) else None

_ROWS_AT_A_TIME = 1024


def dense_matrix(likelihood: GaussianLikelihood) -> Tensor:
    """The operator's matrices ``(sets, m, d)``, by its action on the identity; unobserved rows are zero."""
    operator: Operator = likelihood.operator
    size = math.prod(operator.image_shape)
    tensors = [t for t in (*operator.buffers(), *operator.parameters()) if t.is_floating_point()]
    like = tensors[0] if tensors else likelihood.y
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

#: entries of the operator's dense matrices, all parameter sets together, up to which they are decomposed
_MOST_DENSE = 20_000_000


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues and eigenvectors of A A^T of S parameter sets, in the m values of a measurement.

    Attributes:
        values: ``(S, m)``, at least 0; zero for what was not observed.
        vectors: ``(S, m, m)``, in columns; None where A A^T is diagonal.
    """

    values: Tensor
    vectors: Tensor | None = None

    def select(self, part: slice) -> Spectrum:
        """Those of some observations; itself if one set is shared by all."""
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

    Two measurements tell whether it is diagonal, as for masks and for averages over separate blocks; otherwise it is
    decomposed, where the operator is small enough.

    Args:
        likelihood: with a linear operator.

    Returns:
        The spectrum; None for a large operator whose A A^T is not diagonal.
    """
    operator, like = likelihood.operator, likelihood.y
    sets, shape = operator.num_sets, tuple(operator.measurement_shape)

    def square(y: Tensor) -> Tensor:
        rows = y.expand(sets, *shape)
        return zero_unobserved(operator, operator(operator.adjoint(zero_unobserved(operator, rows)))).flatten(1)

    probe = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0)).to(like)
    diagonal, seen = square(torch.ones_like(probe)), square(probe)
    if bool((diagonal * probe.flatten(1) - seen).abs().max() <= 100 * torch.finfo(like.dtype).eps * seen.abs().max()):
        return Spectrum(diagonal.clamp(min=0))
    entries = sets * math.prod(shape) * max(math.prod(shape), math.prod(operator.image_shape))
    if entries > _MOST_DENSE:
        return None
    matrix = dense_matrix(likelihood)
    values, vectors = torch.linalg.eigh(matrix @ matrix.mT)
    return Spectrum(values.clamp(min=0).to(like), vectors.to(like))


def zero_unobserved(operator: Operator, y: Tensor) -> Tensor:
    """A measurement with zeros where nothing was observed."""
    observed = operator.observed()
    return y if observed is None else torch.where(observed, y, 0.0)
