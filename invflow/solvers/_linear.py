"""Linear problems on pictures: their normal equations, and what kind of operator one has."""

from __future__ import annotations

import torch
from torch import Tensor

from invflow._linear_solve import Map
from invflow.reward import GaussianLikelihood
from invflow.solvers.point import as_pictures

__all__ = ["normal_operator", "observed_residual", "passed_share", "transfer_function"]


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
