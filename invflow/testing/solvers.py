"""The contract of a solver, as one check on a small problem with a known answer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from invflow.flowmap import FlowMap
from invflow.likelihood import GaussianLikelihood, Likelihood
from invflow.models.mixture import GaussianMixtureFlow
from invflow.operator import Operator
from invflow.posterior import NFE, Posterior
from invflow.solver import Solver
from invflow.solvers.exact import ExactPosterior
from invflow.testing._tools import attempt, expect, expect_close, relative_error, rounding, watch_global_seed

__all__ = ["check_solver"]


class _Matrix(Operator):
    """A dense matrix ``(m, d)``, or ``(sets, m, d)``."""

    matrix: Tensor

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.register_sets(matrix=matrix.reshape(-1, *matrix.shape[-2:]))
        self.measurement_shape, self.image_shape = (matrix.shape[-2],), (matrix.shape[-1],)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("smd,sd->sm", self.matrix.expand(len(x), -1, -1), x)


def check_solver(make_solver: Callable[[FlowMap], Solver], *, prior: FlowMap | None = None,
                 likelihood: Likelihood | None = None, exact: bool = True, num_samples: int = 128,
                 replicates: int = 16, standard_errors: float = 5.0, seed: int = 0) -> None:
    """Check that a solver satisfies the contract: shapes, randomness, independence, cost, and the right answer.

    Checked: samples ``(B, N, *image_shape)`` in the prior's dtype; weights that sum to one; the same samples from the
    same generator, also in a second call of the same solver, other samples from another, and no use of global seeds;
    samples of one observation that are independent of other observations and (up to rounding) of ``chunk_size`` if the
    solver has one; an unmodified measurement; a stated cost of at least the counted calls of the prior;
    ``prior_samples``; and with ``exact`` the mean, the variance and, if given, the evidence against the closed
    form. In the default problem, one combination of a two-dimensional Gaussian is measured.

    The comparison with the closed form allows ``standard_errors``, estimated from ``replicates`` runs, for each of the
    values compared (15 in the default problem: 6 means, 6 variances, 3 evidences). With the defaults, Student's t with
    15 degrees of freedom exceeds five standard errors once in 6,300 values: about one in 400 seeds would raise a false
    alarm for an exact solver, and one in 3,000 with 32 replicates. A seed that passes always passes.

    Args:
        make_solver: Function from a prior to a solver.
        prior: Prior to use instead of the default; float64 if rounding can change decisions of the solver.
        likelihood: Likelihood to use instead of the default, over at least two observations. Pass both or none.
        exact: Whether to compare mean and variance with the closed form, which the prior must
            then have (:class:`~invflow.GaussianMixtureFlow`).
        num_samples: N, for each observation.
        replicates: Independent runs whose spread gives the standard error, at least 8.
        standard_errors: Allowed distance from the closed form.
        seed: Random seed.

    Raises:
        AssertionError: At the first failure; the message says what failed, by how much, and what to check.

    Example:
        >>> import invflow
        >>> from invflow.testing import check_solver
        >>> check_solver(invflow.ExactPosterior)
    """
    if (prior is None) != (likelihood is None):
        raise ValueError("pass both prior and likelihood, or neither for the default problem")
    if prior is None or likelihood is None:
        prior, likelihood = _default_problem()
    solver = make_solver(prior)
    expect(isinstance(solver, Solver), f"a {type(solver).__name__} is not a Solver: derive it from invflow.Solver, and "
           "pass a function from a prior to a solver")
    expect(len(likelihood.y) > 1, "the check needs a likelihood over at least two observations")
    posterior = _check_result(solver, prior, likelihood, num_samples, seed)
    _check_randomness(solver, make_solver, prior, likelihood, posterior, seed)
    _check_independence(solver, likelihood, posterior, seed)
    _check_prior_samples(solver, prior, seed)
    if exact:
        _check_answer(solver, prior, likelihood, num_samples, replicates, standard_errors, seed)


def _default_problem() -> tuple[GaussianMixtureFlow, GaussianLikelihood]:
    prior = GaussianMixtureFlow(torch.tensor([[0.5, -0.3]], dtype=torch.float64), std=0.8)
    y = torch.tensor([[0.9], [-0.4], [0.4]], dtype=torch.float64)
    operator = _Matrix(torch.tensor([[1.0, 0.5]], dtype=torch.float64))
    return prior, GaussianLikelihood(operator, y, sigma=0.5)


def _sample(solver: Solver, likelihood: Likelihood, num_samples: int, seed: int) -> Posterior:
    return solver.sample(likelihood, num_samples, generator=torch.Generator().manual_seed(seed))


def _check_result(solver: Solver, prior: FlowMap, likelihood: Likelihood, num_samples: int,
                  seed: int) -> Posterior:
    y = likelihood.y.clone()
    with watch_global_seed(f"{type(solver).__name__}.sample"), prior.count() as calls:
        posterior = attempt(lambda: _sample(solver, likelihood, num_samples, seed), f"{type(solver).__name__}.sample",
                            "It must accept a reward of B observations, num_samples, and generator=")
    shape = (likelihood.num_observations, num_samples, *prior.image_shape)
    expect(isinstance(posterior, Posterior), f"sample returned a {type(posterior).__name__}, not a Posterior")
    expect(tuple(posterior.samples.shape) == shape,
           f"samples have shape {tuple(posterior.samples.shape)}, expected (B, N, *image_shape) = {shape}: B "
           "observations, then N particles of each")
    total = posterior.weights.sum(1)
    off = float((total - 1).abs().max())
    expect(tuple(posterior.weights.shape) == shape[:2] and off <= 1e-4,
           f"the weights {tuple(posterior.weights.shape)} of an observation sum to {float(total.flatten()[0]):.4g}, "
           f"expected 1 over N of (B, N) = {shape[:2]}: pass log weights of any normalisation to Posterior(samples, "
           "log_weights), which normalises them, and do not change them afterwards")
    expect(posterior.samples.dtype == prior.dtype,
           f"samples are {posterior.samples.dtype}, but the prior is {prior.dtype}: keep the prior's dtype")
    expect(not posterior.samples.requires_grad, "samples carry a gradient graph: detach them")
    expect(torch.equal(y, likelihood.y), "sample modified the measurement likelihood.y: work on a copy")
    nfe = posterior.nfe
    expect(isinstance(nfe, NFE) and nfe.forward >= 0 and nfe.backward >= 0,
           f"nfe is {nfe!r}: state the calls per sample, NFE(forward=..., backward=...), counted in a scope "
           "with prior.count()")
    rows = posterior.samples.shape[0] * num_samples
    made = calls.forward / rows, calls.backward / rows
    expect(nfe.forward >= made[0] - 1e-6 and nfe.backward >= made[1] - 1e-6,
           f"nfe states {nfe}, but {made[0]:.4g} forward and {made[1]:.4g} backward calls of the prior were counted "
           "for each sample: count them in a scope, with prior.count() as calls, and divide by the samples returned")
    expect(posterior.seconds > 0, f"seconds is {posterior.seconds}: state the wall time of the call")
    spread = posterior.samples.flatten(2).std(1)
    expect(bool((spread > 0).any()), "all samples of an observation are equal: each needs its own noise")
    return posterior


def _check_randomness(solver: Solver, make_solver: Callable[[FlowMap], Solver], prior: FlowMap,
                      likelihood: Likelihood, posterior: Posterior, seed: int) -> None:
    n = posterior.num_samples
    again = _sample(solver, likelihood, n, seed)
    if not torch.equal(again.samples, posterior.samples):
        fresh = _sample(make_solver(prior), likelihood, n, seed)
        kept = torch.equal(fresh.samples, posterior.samples)
        by = relative_error(again.samples, posterior.samples)
        expect(False, f"the same seed gave other samples, by {by:.2g} of their size: " + (
            "the solver keeps state between calls, since a new one gives the same samples" if kept else
            "draw all random numbers from the generator passed to it"))
    other = _sample(make_solver(prior), likelihood, n, seed + 1)
    expect(not torch.equal(other.samples, posterior.samples),
           "another seed gave the same samples: draw from the generator passed to it")
    solver = make_solver(prior)
    if hasattr(solver, "chunk_size"):  # None, the default, lets the solver choose
        solver.chunk_size = max(1, n // 3)  # type: ignore[attr-defined]
        chunked = _sample(solver, likelihood, n, seed)
        expect_close(chunked.samples, posterior.samples, rounding(prior.dtype),
                     f"samples with chunk_size {n // 3} against the default",
                     "Draw the random numbers of a call for all (B, N) at once, before the first chunk; try "
                     "a float64 prior if rounding can change a decision.")


def _check_independence(solver: Solver, likelihood: Likelihood, posterior: Posterior,
                        seed: int) -> None:
    """Check that another measurement in the last row does not change the samples of the first."""
    other = likelihood.select(slice(None))
    other.y = other.y.clone()
    other.y[-1] = other.y[0]
    moved = _sample(solver, other, posterior.num_samples, seed)
    expect_close(moved.samples[0], posterior.samples[0], rounding(posterior.samples.dtype),
                 "samples of observation 0 before and after observation B - 1 changed",
                 "Observations must not share a step size, a temperature, a stopping rule, "
                 "resampling, or random numbers whose count depends on the data.")
    expect_close(moved.weights[0], posterior.weights[0], rounding(posterior.samples.dtype),
                 "weights of observation 0 before and after observation B - 1 changed",
                 "Weights must not be normalised, nor temperatures chosen, across observations.", floor=1e-12)
    expect(relative_error(moved.mean()[-1], posterior.mean()[-1]) > 1e-6,
           "the posterior mean of an observation did not change with its measurement: is y used?")


def _check_prior_samples(solver: Solver, prior: FlowMap, seed: int) -> None:
    with watch_global_seed("prior_samples"):
        first = solver.prior_samples(5, generator=torch.Generator().manual_seed(seed))
    expect(tuple(first.shape) == (5, *prior.image_shape),
           f"prior_samples(5) returned {tuple(first.shape)}, expected {(5, *prior.image_shape)}")
    again = solver.prior_samples(5, generator=torch.Generator().manual_seed(seed))
    expect(torch.equal(first, again), "prior_samples with the same seed returned other images")


def _check_answer(solver: Solver, prior: FlowMap, likelihood: Likelihood, num_samples: int,
                  replicates: int, standard_errors: float, seed: int) -> None:
    """Mean, variance and evidence of many independent runs, as parallel observations of one call."""
    if not isinstance(prior, GaussianMixtureFlow) or not isinstance(likelihood, GaussianLikelihood):
        raise TypeError("the answer is only known for a GaussianMixtureFlow and a GaussianLikelihood: otherwise pass "
                        "exact=False")
    if replicates < 8:
        raise ValueError(f"the standard error needs at least 8 replicates, not {replicates}")
    oracle = ExactPosterior(prior)
    mean, covariance = oracle.moments(likelihood)
    count = len(likelihood.y)
    runs = likelihood.select(torch.arange(count).repeat_interleave(replicates))
    assert isinstance(runs, GaussianLikelihood)
    posterior = _sample(solver, runs, num_samples, seed + 2)
    estimates = {
        "mean": (posterior.mean().flatten(1), mean.flatten(1)),
        "variance": (posterior.std().square().flatten(1), covariance.diagonal(dim1=1, dim2=2)),
    }
    if posterior.log_evidence is not None:
        # the estimate of Z is unbiased, its logarithm is not
        exact = oracle.log_evidence(runs)
        ratio = (posterior.log_evidence - exact).exp()[:, None]
        estimates["evidence over the exact one"] = (ratio, torch.ones_like(ratio[:count]))
    for what, (estimate, truth) in estimates.items():
        groups = estimate.double().unflatten(0, (count, replicates))
        distance = groups.mean(1) - truth.double()
        # at least rounding: an evidence in closed form has no spread
        error = (groups.std(1) / replicates**0.5).clamp(min=1e-6)
        worst = int((distance.abs() / error).argmax())
        off, se = float(distance.flatten()[worst]), float(error.flatten()[worst])
        expect(abs(off) <= standard_errors * se,
               f"posterior {what}: off by {off:.3g} (observation {worst // distance.shape[1]}, value "
               f"{worst % distance.shape[1]}), {abs(off) / se:.1f} standard errors of {se:.2g} over "
               f"{replicates} runs of {num_samples} samples, allowed {standard_errors}. Check the "
               "normalisation of the likelihood (summed, not averaged), the weights, and the noise of each "
               "step; increase N to distinguish a bias of order 1/N from an error.")
