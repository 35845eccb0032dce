r"""A funnel and a banana in noise space: two posteriors, with exact draws, for which Gaussian moves fail.

The prior is N(0, I) in the plane. Its flow is the identity, so noise space and image space coincide. Given the first
coordinate, the measurement is linear in the second, :math:`A(x) = c(x_0) x_1 + d(x_0)`:

- ``curved/funnel``: :math:`e^{-1.5 x_0} x_1` (after Neal 2003, "Slice sampling"). For large x_0, the measurement
  has no information about x_1; for small x_0, it determines x_1. No step size suits both.
- ``curved/banana``: :math:`x_1 + x_0^2`, a thin ridge along a parabola.

The density of x_0 given y is known in closed form, and x_0 is sampled by inverting its distribution function on a
grid. The law of x_1 given x_0 and y is Gaussian. Use these problems to test whether diagnostics detect failures.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from invflow.likelihood import GaussianLikelihood
from invflow.models.mixture import GaussianMixtureFlow
from invflow.operator import Operator
from invflow.plugins import as_generator
from invflow.posterior import Posterior
from invflow.problem import Problem
from invflow.reward import Reward
from invflow.solver import Solver

__all__ = ["CurvedOperator", "CurvedPosterior", "curved_banana", "curved_funnel"]

#: grid of the first coordinate: N(0, 1) has negligible mass outside it, and the density changes little within a cell
_REACH, _CELLS = 9.0, 18_000


class CurvedOperator(Operator):
    """A(x) = c(x_0) x_1 + d(x_0) for points in the plane; not linear.

    Args:
        scale: c, ``(n,)`` to ``(n,)``.
        shift: d, ``(n,)`` to ``(n,)``.

    Example:
        >>> import torch
        >>> from invflow_problems.curved import CurvedOperator
        >>> CurvedOperator(torch.ones_like, torch.square)(torch.tensor([[2.0, 1.0]]))
        tensor([[5.]])
    """

    linear = False
    image_shape, measurement_shape = (2,), (1,)

    def __init__(self, scale: Callable[[Tensor], Tensor], shift: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.scale, self.shift = scale, shift

    def forward(self, x: Tensor) -> Tensor:
        """``(n, 2)`` to ``(n, 1)``."""
        return (self.scale(x[:, 0]) * x[:, 1] + self.shift(x[:, 0]))[:, None]


class CurvedPosterior(Solver):
    """Exact posterior of N(0, I) given a measurement of :class:`CurvedOperator`: independent draws.

    Example:
        >>> import torch, invflow
        >>> problem = invflow.load_problem("curved/banana")
        >>> truth, likelihood = problem.simulate(3, generator=torch.Generator().manual_seed(0))
        >>> problem.exact_posterior().sample(likelihood, 100).samples.shape
        torch.Size([3, 100, 2])
    """

    prior: GaussianMixtureFlow

    def __init__(self, prior: GaussianMixtureFlow) -> None:
        self.prior = prior

    @torch.no_grad()
    def _sample(self, reward: Reward, n: int, generator: torch.Generator, progress: bool) -> Posterior:
        """Draw posterior samples; see :meth:`Solver.sample`.

        Returns:
            A posterior without weights, with the log evidence by the midpoint rule.

        Raises:
            TypeError: If the reward is not a Gaussian likelihood of a :class:`CurvedOperator`.
        """
        if not isinstance(reward, GaussianLikelihood) or not isinstance(reward.operator, CurvedOperator):
            raise TypeError("CurvedPosterior takes a GaussianLikelihood of a CurvedOperator: pass the likelihood from "
                            "problem.simulate, or use invflow.NoiseSMC(prior), which takes any reward")
        operator, y, noise = reward.operator, reward.y.double(), reward.sigma.double()[:, None]
        width = 2 * _REACH / _CELLS
        edges = torch.linspace(-_REACH, _REACH, _CELLS + 1, dtype=torch.float64, device=y.device)
        middle = (edges[1:] + edges[:-1])[None] / 2
        variance = operator.scale(middle).square() + noise.square()
        log_joint = -0.5 * (middle.square() + (y - operator.shift(middle)).square() / variance + variance.log())
        log_joint = log_joint - math.log(2 * math.pi)
        log_evidence = log_joint.logsumexp(1) + math.log(width)
        cumulative = (log_joint - log_joint.logsumexp(1, keepdim=True)).exp().cumsum(1)
        uniform = torch.rand(len(y), n, generator=generator, device=generator.device, dtype=torch.float64).to(y.device)
        cell = torch.searchsorted(cumulative, uniform * cumulative[:, -1:]).clamp(max=_CELLS - 1)
        place = torch.rand(len(y), n, generator=generator, device=generator.device, dtype=torch.float64).to(y.device)
        first = edges[cell] + width * place
        scale = operator.scale(first)
        precision = 1 + (scale / noise).square()
        normal = torch.randn(len(y), n, generator=generator, device=generator.device, dtype=torch.float64).to(y.device)
        mean = scale * (y - operator.shift(first)) / noise.square() / precision
        samples = torch.stack([first, mean + normal / precision.sqrt()], dim=2)
        return Posterior(samples.to(self.prior.dtype), log_evidence=log_evidence.to(self.prior.dtype))

    def prior_samples(self, n: int, *, generator: torch.Generator | int | None = None) -> Tensor:
        """Draw from N(0, I), ``(n, 2)``."""
        return self.prior.sample(n, generator=as_generator(generator))


@functools.cache
def _prior() -> GaussianMixtureFlow:
    return GaussianMixtureFlow(torch.zeros(1, 2), std=1.0)


def _sample(n: int, generator: torch.Generator) -> Tensor:
    return _prior().sample(n, generator=generator)


def _steep(x: Tensor) -> Tensor:
    return (-1.5 * x).exp()


def _problem(name: str, scale: Callable[[Tensor], Tensor], shift: Callable[[Tensor], Tensor], what: str) -> Problem:
    return Problem(f"curved/{name}", None, functools.partial(CurvedOperator, scale, shift), 0.1, sampler=_sample,
                   prior=_prior, exact=lambda: CurvedPosterior(_prior()), description=what)


curved_funnel = _problem("funnel", _steep, torch.zeros_like,
                         "a funnel: e^(-1.5 x0) x1 observed with noise 0.1, prior N(0, I)")
curved_banana = _problem("banana", torch.ones_like, torch.square,
                         "a banana: x1 + x0^2 observed with noise 0.1, prior N(0, I)")
