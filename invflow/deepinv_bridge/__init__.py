"""Bridge to the deepinv library: a solver as a deepinv reconstructor, and a deepinv metric as a metric of invflow.

See also :class:`invflow.operators.DeepinvOperator`, for its physics, and :func:`invflow.from_deepinv`, for its
denoisers. deepinv is imported when one of these is used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from invflow.operator import Operator
from invflow.reward import Reward
from invflow.solver import Solver

if TYPE_CHECKING:
    from invflow.deepinv_bridge.reconstructor import SolverReconstructor

__all__ = ["as_reconstructor", "metric_from_deepinv"]


def as_reconstructor(solver: Solver, *, sigma: float | Tensor | None = None, num_samples: int = 64,
                     estimate: str = "mean", per_set: Sequence[str] = (),
                     likelihood: Callable[[Operator, Tensor], Reward] | None = None,
                     seed: int = 0) -> SolverReconstructor:
    """Build a deepinv reconstructor from a solver: ``model(y, physics)`` returns images.

    It works wherever deepinv accepts a ``Reconstructor``: in ``deepinv.test``, with its metrics, next to its models.

    Args:
        solver: Any solver of this library; it runs on its prior's device.
        sigma: Standard deviation of the noise in the units of y; None: that of the physics' Gaussian noise.
        num_samples: N, posterior samples for each measurement.
        estimate: ``"mean"``, the posterior mean, best by squared error; ``"sample"``, one posterior sample.
        per_set: Names of the physics' tensors with one set of parameters for each measurement of a batch, such as
            ("mask",); see :class:`invflow.operators.DeepinvOperator`.
        likelihood: For noise that is not Gaussian: a function of the operator and y ``(B, *measurement_shape)``, such
            as ``lambda operator, y: PoissonLikelihood(operator, y / gain, 1 / gain)``.
        seed: Random seed, the same in every call: a measurement always gives the same image.

    Returns:
        A ``deepinv.models.Reconstructor``; its ``posterior(y, physics)`` returns the whole :class:`~invflow.Posterior`.

    Raises:
        TypeError: If ``solver`` is not a solver.
        ValueError: For an unknown estimate, or fewer than 1 sample; in a call, if the noise level is unknown.

    Example:
        >>> import deepinv, torch, invflow
        >>> from invflow.deepinv_bridge import as_reconstructor
        >>> prior = invflow.GaussianMixtureFlow(torch.full((1, 1, 8, 8), 0.5), std=0.2)
        >>> model = as_reconstructor(invflow.ExactPosterior(prior), num_samples=100)
        >>> physics = deepinv.physics.Denoising(deepinv.physics.GaussianNoise(sigma=0.1))
        >>> model(physics(torch.full((2, 1, 8, 8), 0.6)), physics).shape
        torch.Size([2, 1, 8, 8])
    """
    if not isinstance(solver, Solver):
        raise TypeError(f"solver is a {type(solver).__name__}: pass an invflow solver, such as "
                        "invflow.VFM.load('mnist')")
    if estimate not in ("mean", "sample"):
        raise ValueError(f"estimate={estimate!r}: pass 'mean' for the posterior mean, or 'sample' for one sample")
    if num_samples < 1:
        raise ValueError(f"num_samples={num_samples}: pass at least one")
    from invflow.deepinv_bridge.reconstructor import SolverReconstructor

    return SolverReconstructor(solver, sigma, num_samples, estimate, tuple(per_set), likelihood, seed)


def metric_from_deepinv(metric: Callable[..., Any]) -> Callable[[Tensor, Tensor], Tensor]:
    """Convert a deepinv metric to a metric as in :mod:`invflow.metrics`.

    Args:
        metric: A ``deepinv.loss.metric.Metric`` without reduction, or any function of images and truths, each
            ``(n, *image_shape)``, to ``(n,)``.

    Returns:
        A function ``(x, truth)``: x ``(n, *image_shape)`` such as ``posterior.mean()``, or ``(n, N, *image_shape)``
        such as ``posterior.samples``, truth ``(n, *image_shape)``; it returns ``(n,)`` or ``(n, N)``, and raises
        ValueError for other shapes.

    Example:
        >>> import deepinv, torch
        >>> from invflow.deepinv_bridge import metric_from_deepinv
        >>> psnr = metric_from_deepinv(deepinv.loss.metric.PSNR())
        >>> psnr(torch.full((2, 5, 1, 8, 8), 0.6), torch.full((2, 1, 8, 8), 0.5)).shape
        torch.Size([2, 5])
    """
    def measure(x: Tensor, truth: Tensor) -> Tensor:
        several = x.ndim == truth.ndim + 1
        expected = (*truth.shape[:1], *x.shape[1:2], *truth.shape[1:]) if several else tuple(truth.shape)
        if tuple(x.shape) != tuple(expected):
            raise ValueError(f"x has shape {tuple(x.shape)}, truth {tuple(truth.shape)}: pass images of the truth's "
                             "shape (n, *image_shape), or several for each truth, (n, N, *image_shape)")
        rows, truths = (x.flatten(0, 1), truth.repeat_interleave(x.shape[1], 0)) if several else (x, truth)
        values = torch.as_tensor(metric(rows, truths))
        if tuple(values.shape) != (len(rows),):
            raise ValueError(f"the metric returned shape {tuple(values.shape)} for {len(rows)} images, expected "
                             f"({len(rows)},): build it without reduction, as in "
                             "deepinv.loss.metric.PSNR(reduction=None)")
        return values.unflatten(0, x.shape[:2]) if several else values

    return measure
