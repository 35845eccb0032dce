r"""Gibbs samplers for increments that are scale mixtures of Gaussians, measured through a matrix with Gaussian noise.

Each increment is :math:`u_i \mid w_i \sim N(0, w_i)`: Gaussian if w_i is constant, Laplace if it is exponential,
Student if it is inverse gamma. The sampler alternates between two draws: all increments given their variances, which
are jointly Gaussian, and the variances given the increments, which have known laws (Andrews and Mallows 1974; Park and
Casella 2008). Increments that may be zero (Bernoulli-Laplace) also have switches, which are drawn one by one with the
increments integrated out. Otherwise the sampler would never move, because an increment is zero if its switch is off.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Increments", "Sweep", "gibbs"]


class Increments(NamedTuple):
    """The law of independent increments.

    Attributes:
        kind: ``"gauss"``, ``"laplace"``, ``"bernoulli-laplace"`` or ``"student"``.
        scale: Variance of a Gaussian, scale b of a Laplace law, or degrees of freedom of Student's law, an integer.
        active: Probability that an increment is not zero, for ``"bernoulli-laplace"``.
    """

    kind: str
    scale: float
    active: float = 1.0

    def sample(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Independent increments, in float64."""
        device = generator.device
        normal = torch.randn(shape, generator=generator, device=device, dtype=torch.float64)
        if self.kind == "gauss":
            return normal * math.sqrt(self.scale)
        if self.kind == "student":
            return normal * (self.scale / _chi_square(shape, int(self.scale), generator)).sqrt()
        value = normal * (2 * self.scale**2 * _exponential(shape, generator)).sqrt()
        switch = torch.rand(shape, generator=generator, device=device, dtype=torch.float64) < self.active
        return torch.where(switch, value, 0.0)

    def log_prob(self, u: Tensor) -> Tensor:
        """Log density of increments ``(..., d)``, summed to ``(...)``.

        A zero with positive probability counts with the log of that probability.
        """
        scale = torch.as_tensor(self.scale, dtype=u.dtype, device=u.device)
        law: Any = {"gauss": torch.distributions.Normal(0.0, scale.sqrt()),
                    "student": torch.distributions.StudentT(scale)}.get(
                        self.kind, torch.distributions.Laplace(0.0, scale))
        log_density: Tensor = law.log_prob(u)
        if self.active < 1:
            active = torch.as_tensor(self.active, dtype=u.dtype, device=u.device)
            # after rounding of sums, the differences for zero increments are only near zero
            log_density = torch.where(u.abs() < 5e-5, (1 - active).log(), active.log() + log_density)
        return log_density.sum(-1)

    def variances(self, u: Tensor, generator: torch.Generator, *, shared: bool = False) -> Tensor:
        """Draw the variances given the increments: ``(n, d)`` to the same.

        Args:
            u: ``(n, d)``.
            generator: Source of all random numbers.
            shared: Whether to use the same random numbers for every row.
        """
        shape = (1 if shared else len(u), u.shape[1])
        if self.kind == "gauss":
            return torch.full_like(u, self.scale)
        if self.kind == "student":
            return (self.scale + u.square()) / _chi_square(shape, int(self.scale) + 1, generator).to(u)
        rate = 1 / self.scale**2
        mean = rate**0.5 / u.abs().clamp(min=1e-12)
        found = 1 / _inverse_gaussian(mean, rate, shape, generator)
        if self.active == 1:
            return found
        # the variance of an increment that is switched off comes from the prior
        return torch.where(u == 0, 2 / rate * _exponential(shape, generator).to(u), found)


class Sweep(NamedTuple):
    """One state of the chains.

    Attributes:
        u: Increments ``(n, d)``.
        mean: Mean of the increments given variances and switches, ``(n, d)``.
        gain: ``(n, d, m)``, effect of a measurement on that mean; the increments' covariance is W - gain H W.
        variance: Diagonal of W, ``(n, d)``, 0 where a switch is off.
    """

    u: Tensor
    mean: Tensor
    gain: Tensor
    variance: Tensor


def gibbs(law: Increments, matrix: Tensor, y: Tensor, sigma: Tensor, generator: torch.Generator, *,
          shared: bool = False) -> Iterator[Sweep]:
    """Run Gibbs sweeps without end, one chain for each row, for y = H u + sigma e.

    Args:
        law: Law of the increments.
        matrix: H, ``(m, d)``, float64.
        y: ``(n, m)``, float64.
        sigma: ``(n,)``, float64.
        generator: Source of all random numbers.
        shared: Whether to use the same random numbers for all rows, so that the result for a row does not depend on
            the others.

    Yields:
        The state after each sweep.
    """
    n, d = len(y), matrix.shape[1]
    rows = 1 if shared else n
    noise = sigma.square()[:, None, None] * torch.eye(len(matrix), dtype=y.dtype, device=y.device)

    def normal(*shape: int) -> Tensor:
        return torch.randn(rows, *shape, generator=generator, device=generator.device, dtype=torch.float64).to(y)

    # start from the ridge estimate, with the variance of a typical increment
    w = torch.full((n, d), {"gauss": law.scale, "student": 1.0}.get(law.kind, 2 * law.scale**2), dtype=y.dtype,
                   device=y.device)
    switch = torch.ones_like(w)
    while True:
        if law.active < 1:
            switch = _switches(law.active, switch, w, matrix, y, noise, generator, rows)
        variance = w * switch
        spread = variance[:, :, None] * matrix.T  # W H^T
        factor = torch.linalg.cholesky(matrix @ spread + noise)
        gain = torch.cholesky_solve(spread.mT, factor).mT  # W H^T (H W H^T + sigma^2 I)^-1
        mean = torch.einsum("ndm,nm->nd", gain, y)
        # a prior draw, corrected by the difference between y and its own measurement
        start = variance.sqrt() * normal(d)
        missed = y - start @ matrix.T - sigma[:, None] * normal(len(matrix))
        u = start + torch.einsum("ndm,nm->nd", gain, missed)
        u = torch.where(switch > 0, u, 0.0)
        yield Sweep(u, mean, gain, variance)
        w = law.variances(u, generator, shared=shared)


def _switches(active: float, switch: Tensor, w: Tensor, matrix: Tensor, y: Tensor, noise: Tensor,
              generator: torch.Generator, rows: int) -> Tensor:
    """Draw each switch once, given the other switches and the variances, with the increments integrated out."""
    n, d = w.shape
    uniform = torch.rand(d, rows, generator=generator, device=generator.device, dtype=torch.float64).to(y)
    threshold = (uniform.log() - torch.log1p(-uniform)).expand(d, n)
    prior = torch.as_tensor(active / (1 - active), dtype=y.dtype).log().to(y)
    spread = (w * switch)[:, :, None] * matrix.T
    precision = torch.cholesky_inverse(torch.linalg.cholesky(matrix @ spread + noise))  # (n, m, m), of y
    switch = switch.clone()
    for i, column in enumerate(matrix.T):
        seen = precision @ column  # (n, m)
        own = seen @ column
        data = (seen * y).sum(1)
        # both without the increment itself
        left = 1 - switch[:, i] * w[:, i] * own
        own_without, data_without = own / left, data / left
        total = 1 + w[:, i] * own_without
        log_odds = prior - 0.5 * total.log() + 0.5 * w[:, i] * data_without.square() / total
        new = (log_odds > threshold[i]).to(y)
        # (S^-1 + c h h^T)^-1 = S - c S h h^T S / (1 + c h^T S h), c the change of the increment's variance
        change = (new - switch[:, i]) * w[:, i]
        factor = change / (1 + change * own)
        precision = precision - factor[:, None, None] * seen[:, :, None] * seen[:, None, :]
        switch[:, i] = new
    return switch


def _chi_square(shape: tuple[int, ...], degrees: int, generator: torch.Generator) -> Tensor:
    normal = torch.randn(*shape, degrees, generator=generator, device=generator.device, dtype=torch.float64)
    return normal.square().sum(-1)


def _exponential(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return 0.5 * _chi_square(shape, 2, generator)


def _inverse_gaussian(mean: Tensor, shape: float, size: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Inverse Gaussian draws with given means and shape (Michael, Schucany and Haas 1976), without cancellation."""
    square = torch.randn(size, generator=generator, device=generator.device, dtype=torch.float64).to(mean).square()
    uniform = torch.rand(size, generator=generator, device=generator.device, dtype=torch.float64).to(mean)
    a = mean * square / shape
    ratio = 1 + a / 2 + (a + a.square() / 4).sqrt()  # mean over the smaller root
    return torch.where(uniform <= ratio / (1 + ratio), mean / ratio, mean * ratio)
