r"""The benchmark of 25 Gaussians in 8, 80 and 800 dimensions, observed through 1, 2 or 4 numbers.

From Cardoso, Janati El Idrissi, Le Corff and Moulines 2023, "Monte Carlo guided diffusion for Bayesian linear
inverse problems". The means are (8 i, 8 j) for i and j in -2..2, repeated d / 2 times; the covariance is the identity;
the weights are proportional to squares of standard normal numbers. The operator is A = U diag(s) V with orthogonal U
and V, where s is uniform in [0, 1], in descending order. The noise level is uniform in [0, 1] times the largest entry
of s. Each seed draws new weights, operator and noise level. The posterior is known in closed form
(:class:`invflow.ExactPosterior`).
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from invflow.models.mixture import GaussianMixtureFlow
from invflow.operator import Operator
from invflow.problem import Problem

__all__ = ["SETTINGS", "draw_problem", "mixture25", "mixture25_8_1", "mixture25_8_2", "mixture25_8_4", "mixture25_80_1",
           "mixture25_80_2", "mixture25_80_4", "mixture25_800_1", "mixture25_800_2", "mixture25_800_4"]

#: (d, m), the dimensions of state and measurement
SETTINGS = tuple((d, m) for d in (8, 80, 800) for m in (1, 2, 4))


class _Draw:
    """Random parts of one seed: small numbers are drawn at once, matrices on demand."""

    def __init__(self, d: int, m: int, seed: int, steps: int) -> None:
        if d < 2 or d % 2 or not 1 <= m <= d:
            raise ValueError(f"d={d}, m={m}: the benchmark takes an even dimension d and 1 <= m <= d measurements")
        self.d, self.m, self.seed, self.steps = d, m, seed, steps
        generator = self._generator(0)
        self.singular = torch.rand(m, generator=generator, dtype=torch.float64).sort(descending=True).values
        self.sigma = float(torch.rand((), generator=generator, dtype=torch.float64) * self.singular[0])

    def _generator(self, part: int) -> torch.Generator:
        # one random stream for each part, so that results do not depend on the order of requests
        return torch.Generator().manual_seed(((self.seed * 1009 + self.d) * 1009 + self.m) * 1009 + part)

    def operator(self) -> Operator:
        from invflow_operators.linear import MatrixOperator

        generator = self._generator(1)
        left, right = (_orthonormal(torch.randn(rows, self.m, generator=generator, dtype=torch.float64))
                       for rows in (self.m, self.d))
        matrix = left @ (self.singular[:, None] * right.T)
        return MatrixOperator(matrix.float(), image_shape=(self.d,))

    @functools.cached_property
    def mixture(self) -> GaussianMixtureFlow:
        generator = self._generator(2)
        weights = torch.randn(25, generator=generator, dtype=torch.float64).square()
        side = 8.0 * torch.arange(-2, 3)
        means = torch.cartesian_prod(side, side).repeat(1, self.d // 2)
        return GaussianMixtureFlow(means, std=1.0, weights=weights, steps=self.steps)

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        return self.mixture.sample(n, generator=generator)

    def prior(self) -> GaussianMixtureFlow:
        return self.mixture


def _orthonormal(gaussian: Tensor) -> Tensor:
    """Columns of a Haar-distributed orthogonal matrix (Mezzadri 2007): QR, with the signs of R's diagonal."""
    q, r = torch.linalg.qr(gaussian)
    result: Tensor = q * r.diagonal().sign()
    return result


def draw_problem(d: int, m: int, seed: int = 0, *, steps: int = 16, name: str | None = None) -> Problem:
    """Build one problem of the benchmark; the seed determines its weights, operator and noise level.

    Args:
        d: Dimension of the state, even.
        m: Number of measurements, at most d.
        seed: Random seed of the problem; :meth:`Problem.simulate` draws the truth and the noise.
        steps: Number of steps of the prior's jump, see :class:`~invflow.GaussianMixtureFlow`. Few steps make samples
            cheap and slightly inaccurate; the exact posterior does not depend on them.
        name: Name of the problem; default: ``"mixture/25-{d}-{m}"``.

    Returns:
        An inverse problem with an exact posterior.

    Raises:
        ValueError: For invalid dimensions.

    Example:
        >>> import torch
        >>> from invflow_problems.mixture25 import draw_problem
        >>> problem = draw_problem(8, 1, seed=3)
        >>> truth, likelihood = problem.simulate(2, generator=torch.Generator().manual_seed(0))
        >>> problem.exact_posterior().sample(likelihood, 10).samples.shape
        torch.Size([2, 10, 8])
    """
    draw = _Draw(d, m, seed, steps)
    numbers = "one number" if m == 1 else f"{m} numbers"
    return Problem(name or f"mixture/25-{d}-{m}", None, draw.operator, draw.sigma, sampler=draw.sample,
                   prior=draw.prior, description=f"25 Gaussians in {d} dimensions, observed through {numbers}")


mixture25 = draw_problem(8, 1, name="mixture/25")
(mixture25_8_1, mixture25_8_2, mixture25_8_4, mixture25_80_1, mixture25_80_2, mixture25_80_4, mixture25_800_1,
 mixture25_800_2, mixture25_800_4) = (draw_problem(d, m) for d, m in SETTINGS)
