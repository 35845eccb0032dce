"""Networks of a Gaussian prior in all conventions, and its exact posterior, for the tests of priors."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from invflow import FlowMap, GaussianLikelihood, Solver
from invflow.operators import Denoising

F64 = torch.float64
DIM = 3
MEAN, STD = 0.3, 0.3  # of the data
NOISE, Y = 0.3, 0.9
#: of N(0.3, 0.3^2) given y = 0.9 with noise 0.3
POSTERIOR_MEAN, POSTERIOR_STD = 0.6, 0.3 / math.sqrt(2)
SHAPE = (DIM,)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def column(t: Tensor, x: Tensor) -> Tensor:
    return t.reshape(-1, *[1] * (x.ndim - 1))


def means(alpha: Tensor, sigma: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """E[m | y] and E[z | y] of y = alpha m + sigma z."""
    off = (y - alpha * MEAN) / ((alpha * STD) ** 2 + sigma**2)
    return MEAN + alpha * STD**2 * off, sigma * off


def velocity_on(alpha: Callable[[Tensor], Tensor], sigma: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """E[alpha' m + sigma' z | y], the velocity of that path in its own time; derivatives by autograd."""
    def network(x: Tensor, t: Tensor) -> Tensor:
        with torch.enable_grad():
            time = t.detach().requires_grad_()
            a, s = alpha(time) + 0 * time, sigma(time) + 0 * time
            da, ds = (torch.autograd.grad(share.sum(), time, retain_graph=True)[0] for share in (a, s))
        m, z = means(column(a.detach(), x), column(s.detach(), x), x)
        return column(da, x) * m + column(ds, x) * z

    return network


def exact_jump(x: Tensor, s: Tensor, t: Tensor) -> Tensor:
    """X_{s,t}(x) in the library's time."""
    g_s, g_t = (torch.sqrt((1 - time) ** 2 + (time * STD) ** 2) for time in (s, t))
    return t * MEAN + g_t / g_s * (x - s * MEAN)


def likelihood(copies: int = 16) -> GaussianLikelihood:
    """The same observation many times, so that runs side by side give a standard error."""
    return GaussianLikelihood(Denoising(SHAPE), torch.full((copies, DIM), Y, dtype=F64), sigma=NOISE)


def assert_posterior(solver: Solver, samples: int = 250, copies: int = 16, standard_errors: float = 3.0) -> None:
    """Mean and standard deviation of the posterior at the closed form, by the spread over independent runs."""
    posterior = solver.sample(likelihood(copies), samples, generator=torch.Generator().manual_seed(0))
    for found, exact in ((posterior.mean(), POSTERIOR_MEAN), (posterior.std().square(), POSTERIOR_STD**2)):
        runs = found.double().mean(1)
        error = float(runs.std()) / math.sqrt(copies)
        # what N particles lose to their own mean, of order 1 / N, is not what is tested
        allowed = standard_errors * error + 2 * POSTERIOR_STD**2 / samples
        assert abs(float(runs.mean()) - exact) <= allowed, (float(runs.mean()), exact, error)


def assert_samples(prior: FlowMap, steps: int = 1, count: int = 4000, standard_errors: float = 3.0) -> None:
    """Mean and standard deviation of draws of the prior."""
    x = prior.generate(count, steps, generator=torch.Generator().manual_seed(1)).double()
    values = x.numel()
    assert abs(float(x.mean()) - MEAN) <= standard_errors * STD / math.sqrt(values)
    assert abs(float(x.std()) - STD) <= standard_errors * STD / math.sqrt(2 * values)
