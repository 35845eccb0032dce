r"""Signals with independent increments, after the benchmark of Zach, Haouchat and Unser 2025 (arXiv 2509.12821).

Signals of length 64 are sums :math:`m_j = u_1 + \ldots + u_j` of independent increments: Gaussian with variance 0.25,
Laplace with scale 1, Bernoulli-Laplace (one in ten is nonzero, with scale 1), Student with 1, 2 or 3 degrees of
freedom. They are measured directly, through a circular convolution (13 taps, standard deviation 2), at a random 40% of
their samples, or at a part of their frequencies (the five lowest, and 12 of the others). The noise is 25 dB below the
median power of the measurements. The samples and frequencies are drawn here, not taken from the authors.

The reference posterior is a Gibbs sampler (:mod:`invflow_problems.levy_gibbs`). The denoiser of the prior uses the same
sampler: it averages a few sweeps, with fixed random numbers, so that it is a deterministic function. It is exact for
Gaussian increments and approximate for others. Each velocity takes a few milliseconds. Two metrics are from the
authors: the gap in dB between the error of a sampler's mean and that of the best mean
(:func:`invflow.metrics.mean_gap`), and highest-density coverage with the posterior's own density
(:func:`invflow.metrics.highest_density_coverage`).
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from invflow.flowmap import FlowMap, Time, expand_time
from invflow.likelihood import GaussianLikelihood, Likelihood
from invflow.operator import Operator
from invflow.plugins import as_generator
from invflow.posterior import Posterior
from invflow.problem import Problem
from invflow.reward import Reward
from invflow.solver import Solver
from invflow_problems.levy_gibbs import Increments, gibbs

__all__ = ["LENGTH", "LevyFlow", "LevyPosterior", "levy_sigma"]

LENGTH, DECIBELS = 64, 25.0
INCREMENTS = {
    "gauss": Increments("gauss", 0.25), "laplace": Increments("laplace", 1.0),
    "bernoulli-laplace": Increments("bernoulli-laplace", 1.0, 0.1), "student-1": Increments("student", 1),
    "student-2": Increments("student", 2), "student-3": Increments("student", 3),
}
OPERATORS = ("identity", "convolution", "sampling", "fourier")


class LevyFlow(FlowMap):
    """The flow of signals with independent increments; its denoiser is the mean of a Gibbs sampler.

    Args:
        law: Law of the increments.
        sweeps: Number of sweeps that the denoiser averages, after discarding half as many. One is exact for Gaussian
            increments.
        length: Length of a signal.

    Example:
        >>> import torch
        >>> from invflow_problems.levy import INCREMENTS, LevyFlow
        >>> prior = LevyFlow(INCREMENTS["laplace"], sweeps=4)
        >>> prior.denoise(torch.zeros(2, 64), 0.9).shape
        torch.Size([2, 64])
    """

    def __init__(self, law: Increments, *, sweeps: int = 20, length: int = LENGTH) -> None:
        super().__init__()
        if sweeps < 1:
            raise ValueError(f"sweeps={sweeps}: the denoiser averages at least one sweep; pass sweeps >= 1")
        self.law, self.sweeps, self.length = law, sweeps, length
        self.state_shape = self.image_shape = (length,)

    def velocity(self, x: Tensor, t: Time) -> Tensor:
        """Velocity E[m - z | x_t = x], ``(n, d)`` to the same; its gradient uses the Gibbs sampler's covariance."""
        time = expand_time(t, x)
        late, early = 1 - 1e-4, 1e-4
        mean = _Mean.apply(x, time.clamp(early, late), self.law, self.sweeps)
        inside = (mean - x) / (1 - time.clamp(max=late))
        # E[m] = 0 at pure noise, and no noise is left at the end
        return torch.where(time < early, -x, torch.where(time > late, x, inside))

    def sample(self, n: int, *, generator: torch.Generator) -> Tensor:
        """Draw signals from the law itself, ``(n, d)``."""
        return self.law.sample((n, self.length), generator).cumsum(1).to(self.dtype)

    def log_prob(self, x: Tensor) -> Tensor:
        """Log density of signals, ``(n, d)`` to ``(n,)``.

        An increment that is zero with positive probability counts with the log of that probability.
        """
        increments = x.double().diff(dim=-1, prepend=x.new_zeros(*x.shape[:-1], 1).double())
        return self.law.log_prob(increments)


class _Mean(torch.autograd.Function):
    """E[m | x_t = x] by Gibbs sampling; its Jacobian is t / (1 - t)^2 times the covariance for every law."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, t: Tensor, law: Increments, sweeps: int) -> Tensor:
        d = x.shape[1]
        sums = torch.ones(d, d, dtype=torch.float64, device=x.device).tril()
        level = ((1 - t) / t)[:, 0].double()
        generator = torch.Generator().manual_seed(0)
        burn_in = 0 if law.kind == "gauss" else sweeps // 2
        wanted = 1 if law.kind == "gauss" else sweeps
        mean = second = within = torch.zeros((), dtype=torch.float64, device=x.device)
        needs = ctx.needs_input_grad[0]
        chain = gibbs(law, sums, (x / t).double(), level, generator, shared=True)
        for state in itertools.islice(chain, burn_in, burn_in + wanted):
            signal = state.mean @ sums.T
            mean = mean + signal / wanted
            if needs:
                second = second + signal[:, :, None] * signal[:, None, :] / wanted
                within = within + (state.variance.diag_embed() - state.gain @ sums * state.variance[:, None]) / wanted
        if needs:
            covariance = sums @ within @ sums.T + second - mean[:, :, None] * mean[:, None, :]
            ctx.save_for_backward(covariance * (t / (1 - t).square()).double()[..., None])
        return mean.to(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradient,), (jacobian,) = gradients, ctx.saved_tensors
        return torch.einsum("nij,ni->nj", jacobian, gradient.double()).to(gradient), None, None, None


class LevyPosterior(Solver):
    """Reference posterior: chains of a Gibbs sampler, long enough to be treated as exact draws.

    Args:
        prior: Prior with the law of the increments.
        chains: Number of chains for each observation, at most the number of samples.
        burn_in: Number of sweeps before the first sample.
        thinning: Number of sweeps between two samples of a chain.

    Example:
        >>> import torch, invflow
        >>> problem = invflow.load_problem("levy/gauss-identity")
        >>> truth, likelihood = problem.simulate(2, generator=torch.Generator().manual_seed(0))
        >>> problem.exact_posterior().sample(likelihood, 8).samples.shape
        torch.Size([2, 8, 64])
    """

    prior: LevyFlow

    def __init__(self, prior: LevyFlow, *, chains: int = 8, burn_in: int = 300, thinning: int = 20) -> None:
        if chains < 1 or burn_in < 0 or thinning < 1:
            raise ValueError(f"chains={chains} and thinning={thinning} must be at least 1, burn_in={burn_in} at least "
                             "0")
        self.prior, self.chains, self.burn_in, self.thinning = prior, chains, burn_in, thinning

    @torch.no_grad()
    def _sample(self, reward: Reward, n: int, generator: torch.Generator, progress: bool) -> Posterior:
        """Draw posterior samples; see :meth:`Solver.sample`.

        Raises:
            TypeError: If the reward is not a Gaussian likelihood of a linear operator with one parameter set.
        """
        linear = isinstance(reward, GaussianLikelihood) and reward.operator.linear and reward.operator.num_sets == 1
        if not linear or not isinstance(reward, GaussianLikelihood):
            raise TypeError("LevyPosterior takes a GaussianLikelihood of a linear operator with one parameter set: "
                            "pass the likelihood from problem.simulate")
        d = self.prior.length
        y = reward.y.flatten(1).double()
        # columns are the measurements of unit increments
        steps = torch.ones(d, d, dtype=reward.y.dtype, device=y.device).triu()
        matrix = reward.operator(steps).flatten(1).double().T
        gaussian = self.prior.law.kind == "gauss"  # sweeps are then independent
        chains = n if gaussian else min(self.chains, n)
        burn_in, thinning = (0, 1) if gaussian else (self.burn_in, self.thinning)
        each = math.ceil(n / chains)
        rows = y.repeat_interleave(chains, 0), reward.sigma.double().repeat_interleave(chains)
        states = gibbs(self.prior.law, matrix, *rows, generator)
        kept = [state.u.cumsum(1) for state in
                itertools.islice(states, burn_in, burn_in + (each - 1) * thinning + 1, thinning)]
        samples = torch.stack(kept, 1).unflatten(0, (len(y), chains)).flatten(1, 2)[:, :n]
        return Posterior(samples.to(self.prior.dtype))

    def prior_samples(self, n: int, *, generator: torch.Generator | int | None = None) -> Tensor:
        """Draw signals from the law itself, ``(n, d)``."""
        return self.prior.sample(n, generator=as_generator(generator))


# -- operators and noise -----------------------------------------------------------------------------------------------


def _matrix(name: str) -> Tensor:
    eye = torch.eye(LENGTH, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    if name == "identity":
        return eye
    if name == "convolution":
        kernel = (-0.5 * (torch.arange(-6, 7, dtype=torch.float64) / 2).square()).exp()
        kernel = kernel / kernel.sum()
        return torch.stack([kernel[k] * eye.roll(k - 6, 1) for k in range(13)]).sum(0)
    if name == "sampling":
        return eye[torch.randperm(LENGTH, generator=generator)[:26].sort().values]
    frequency = torch.cat([torch.arange(5), 5 + torch.randperm(28, generator=generator)[:12]]).sort().values
    angle = 2 * math.pi / LENGTH * frequency[:, None] * torch.arange(LENGTH, dtype=torch.float64)
    sines = (frequency > 0) & (frequency < LENGTH // 2)  # for the others they are zero
    return torch.cat([angle.cos(), -angle.sin()[sines]])


@functools.cache
def _operator(name: str) -> Operator:
    from invflow_operators.linear import MatrixOperator

    return MatrixOperator(_matrix(name).float())


@functools.cache
def levy_sigma(increments: str, operator: str) -> float:
    """Noise level 25 dB below the median power of the measurements, computed from 4,096 signals drawn here.

    Args:
        increments: Key of ``INCREMENTS``, such as ``"student-1"``.
        operator: One of ``OPERATORS``.
    """
    signals = INCREMENTS[increments].sample((4096, LENGTH), torch.Generator().manual_seed(1)).cumsum(1)
    power = (signals @ _matrix(operator).T).square().mean(1).median()
    return math.sqrt(float(power) / 10 ** (DECIBELS / 10))


def _problem(increments: str, operator: str) -> Problem:
    @functools.cache
    def prior() -> LevyFlow:
        return LevyFlow(INCREMENTS[increments])

    def sample(n: int, generator: torch.Generator) -> Tensor:
        return prior().sample(n, generator=generator)

    def likelihood(measured: Operator, y: Tensor) -> Likelihood:
        return GaussianLikelihood(measured, y, levy_sigma(increments, operator))

    build: Callable[[], Operator] = functools.partial(_operator, operator)
    return Problem(f"levy/{increments}-{operator}", None, build, likelihood=likelihood, sampler=sample, prior=prior,
                   exact=lambda: LevyPosterior(prior()),
                   description=f"signals with {increments} increments, operator {operator}, SNR 25 dB")


for _increments, _name in itertools.product(INCREMENTS, OPERATORS):
    _variable = f"levy_{_increments}_{_name}".replace("-", "_")
    globals()[_variable] = _problem(_increments, _name)
    __all__.append(_variable)
