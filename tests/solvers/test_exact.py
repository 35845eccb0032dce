"""The exact posterior, against quadrature, importance sampling and dense matrices; and the solver check."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from invflow import ExactPosterior, FlowMap, FunctionReward, GaussianLikelihood, GaussianMixtureFlow, Operator
from invflow.posterior import Posterior
from invflow.reward import Reward
from invflow.solvers import exact as exact_module
from invflow.testing import check_solver

F64 = torch.float64


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=F64)


class Dense(Operator):
    matrix: Tensor

    def __init__(self, matrix: Tensor, image_shape: tuple[int, ...] | None = None) -> None:
        super().__init__()
        self.register_sets(matrix=matrix.reshape(-1, *matrix.shape[-2:]))
        self.measurement_shape = (matrix.shape[-2],)
        self.image_shape = image_shape or (matrix.shape[-1],)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("smd,sd->sm", self.matrix.expand(len(x), -1, -1), x.flatten(1))


class Masked(Dense):
    """Some entries are not observed, which ones may differ; what forward says of them is to be ignored."""

    mask: Tensor

    def __init__(self, matrix: Tensor, mask: Tensor) -> None:
        super().__init__(matrix.expand(len(mask), -1, -1).clone())
        self.register_sets(mask=mask)

    def observed(self) -> Tensor:
        return self.mask


def prior_in(d: int, count: int = 3, seed: int = 1) -> GaussianMixtureFlow:
    std = 0.4 + torch.rand(count, generator=generator(seed), dtype=F64)
    return GaussianMixtureFlow(1.5 * randn(count, d, seed=seed), std, torch.arange(1, count + 1))


def problem(d: int, m: int, observations: int = 2,
            seed: int = 2) -> tuple[GaussianMixtureFlow, GaussianLikelihood]:
    prior, matrix = prior_in(d), randn(m, d, seed=seed)
    sigma = torch.linspace(0.3, 0.9, observations, dtype=F64)
    y = prior.sample(observations, generator=generator(seed)) @ matrix.T
    y = y + sigma[:, None] * randn(observations, m, seed=seed)
    return prior, GaussianLikelihood(Dense(matrix), y, sigma)


def dense_answer(prior: GaussianMixtureFlow, matrix: Tensor, y: Tensor,
                 sigma: float) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, covariance and log evidence of one observation, component by component with dense matrices."""
    d, m = prior.dimension, len(matrix)
    log_joint, means, covariances = [], [], []
    for log_weight, mean, std in zip(prior.log_weights, prior.means, prior.std):
        marginal = std**2 * matrix @ matrix.T + sigma**2 * torch.eye(m, dtype=F64)
        log_joint.append(log_weight + MultivariateNormal(matrix @ mean, marginal).log_prob(y))
        covariance = torch.linalg.inv(torch.eye(d, dtype=F64) / std**2 + matrix.T @ matrix / sigma**2)
        means.append(covariance @ (mean / std**2 + matrix.T @ y / sigma**2))
        covariances.append(covariance)
    evidence = torch.stack(log_joint).logsumexp(0)
    weights = (torch.stack(log_joint) - evidence).exp()
    mean = weights @ torch.stack(means)
    second = sum(w * (c + torch.outer(u, u)) for w, c, u in zip(weights, covariances, means))
    return mean, second - torch.outer(mean, mean), evidence


# -- the closed form ------------------------------------------------------------------------------------


def test_against_quadrature_in_two_dimensions() -> None:
    prior, likelihood = problem(2, 1)
    axis = torch.linspace(-9, 9, 401, dtype=F64)
    grid = torch.cartesian_prod(axis, axis)
    cell = float(axis[1] - axis[0]) ** 2
    log_joint = prior.log_prob(grid) + likelihood(grid.expand(2, -1, -1))
    evidence = log_joint.logsumexp(1) + math.log(cell)
    solver = ExactPosterior(prior)
    torch.testing.assert_close(solver.log_evidence(likelihood), evidence, rtol=1e-8, atol=1e-8)
    density = (log_joint - evidence[:, None]).exp() * cell
    mean, covariance = solver.moments(likelihood)
    torch.testing.assert_close(mean, density @ grid, rtol=1e-7, atol=1e-7)
    centered = grid - mean[:, None]
    expected = torch.einsum("bn,bni,bnj->bij", density, centered, centered)
    torch.testing.assert_close(covariance, expected, rtol=1e-7, atol=1e-7)

    # the draws have that law: Kolmogorov-Smirnov along each axis, over 1.95 once in a thousand
    n = 4000
    samples = solver.sample(likelihood, n, generator=generator(3)).samples
    for b in range(2):
        table = density[b].reshape(401, 401)
        for i in range(2):
            below = torch.cat([torch.zeros(1, dtype=F64), table.sum(1 - i).cumsum(0)])
            place = (samples[b, :, i] - axis[0]) / (axis[1] - axis[0]) + 0.5
            left = place.long()
            uniform = torch.lerp(below[left], below[left + 1], place - left).sort().values
            steps = torch.arange(n + 1, dtype=F64) / n
            distance = torch.maximum((steps[1:] - uniform).max(), (uniform - steps[:-1]).max())
            assert distance * math.sqrt(n) < 2.0


def test_against_importance_sampling() -> None:
    prior, likelihood = problem(6, 3)
    n = 100_000
    x = prior.sample(n, generator=generator(5))
    solver = ExactPosterior(prior)
    weights = (likelihood(x.expand(2, -1, -1)) - solver.log_evidence(likelihood)[:, None]).exp()
    error = (weights.mean(1) - 1).abs() / (weights.std(1) / math.sqrt(n))
    assert error.max() < 4.5
    mean, _ = solver.moments(likelihood)
    terms = weights[..., None] * (x - mean[:, None])
    assert (terms.mean(1).abs() / (terms.std(1) / math.sqrt(n))).max() < 4.5


@pytest.mark.parametrize(("d", "m"), [(5, 2), (4, 4), (3, 7)])
def test_against_dense_linear_algebra(d: int, m: int) -> None:
    prior, likelihood = problem(d, m, observations=3)
    solver = ExactPosterior(prior)
    means, covariances = solver.moments(likelihood)
    evidences = solver.log_evidence(likelihood)
    for b in range(3):
        matrix = likelihood.operator.matrix[0]  # type: ignore[union-attr]
        mean, covariance, evidence = dense_answer(prior, matrix, likelihood.y[b], float(likelihood.sigma[b]))
        torch.testing.assert_close(means[b], mean, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(covariances[b], covariance, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(evidences[b], evidence, rtol=1e-10, atol=1e-10)


def test_draws_have_the_exact_moments_in_many_dimensions() -> None:
    """d = 800, m = 4, 25 components: the means span a plane, the posterior keeps a few modes."""
    means = [[8.0 * i, 8.0 * j] * 400 for i in range(-2, 3) for j in range(-2, 3)]
    prior = GaussianMixtureFlow(torch.tensor(means, dtype=F64), 1.0)
    matrix = torch.linalg.qr(randn(800, 4))[0].T * torch.tensor([[0.02], [0.3], [0.5], [1.0]], dtype=F64)
    y = prior.sample(2, generator=generator()) @ matrix.T
    likelihood = GaussianLikelihood(Dense(matrix), y, sigma=0.7)
    solver, n = ExactPosterior(prior), 2000
    posterior = solver.sample(likelihood, n, generator=generator(1))
    mean, covariance = solver.moments(likelihood)
    variance = covariance.diagonal(dim1=1, dim2=2)
    z = (posterior.mean() - mean) * math.sqrt(n) / variance.sqrt()
    assert z.abs().max() < 5.5  # of 1600 correlated values
    # along what was measured, where the posterior is narrower than the prior
    along = (posterior.samples - mean[:, None]) @ matrix.T / matrix.norm(dim=1)
    expected = torch.einsum("md,bde,me->bm", matrix, covariance, matrix) / matrix.square().sum(1)
    assert ((along.square().mean(1) / expected - 1).abs() < 5 * math.sqrt(3 / n)).all()
    assert (expected[:, -1] < 0.5).all()


def test_an_almost_noiseless_measurement_is_met() -> None:
    prior, matrix, sigma = prior_in(5), randn(2, 5), 1e-7
    y = prior.sample(3, generator=generator()) @ matrix.T
    samples = ExactPosterior(prior).sample(GaussianLikelihood(Dense(matrix), y, sigma), 500).samples
    residual = (samples @ matrix.T - y[:, None]) / sigma
    assert (residual.square().mean((1, 2)) - 1).abs().max() < 5 * math.sqrt(2 / 1000)


def test_parameters_and_levels_differ_by_observation() -> None:
    prior, matrices = prior_in(4), randn(3, 2, 4)
    y, sigma = randn(3, 2, seed=1), torch.tensor([0.1, 0.5, 2.0], dtype=F64)
    likelihood, solver = GaussianLikelihood(Dense(matrices), y, sigma), ExactPosterior(prior)
    means, covariances = solver.moments(likelihood)
    posterior = solver.sample(likelihood, 5, generator=generator())
    for b in range(3):
        mean, covariance, evidence = dense_answer(prior, matrices[b], y[b], float(sigma[b]))
        torch.testing.assert_close(means[b], mean, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(covariances[b], covariance, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(posterior.log_evidence[b], evidence, rtol=1e-10, atol=1e-10)


def test_only_observed_entries_count() -> None:
    prior, matrix = prior_in(4), randn(3, 4)
    mask = torch.tensor([[True, False, True], [True, True, True], [False, True, False]])
    y = randn(3, 3, seed=1)
    likelihood = GaussianLikelihood(Masked(matrix, mask), y, sigma=0.4)
    means, covariances = ExactPosterior(prior).moments(likelihood)
    evidences = ExactPosterior(prior).log_evidence(likelihood)
    for b in range(3):
        mean, covariance, evidence = dense_answer(prior, matrix[mask[b]], y[b, mask[b]], 0.4)
        torch.testing.assert_close(means[b], mean, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(covariances[b], covariance, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(evidences[b], evidence, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("sets", [1, 5])
def test_pieces_change_nothing(monkeypatch: pytest.MonkeyPatch, sets: int) -> None:
    prior = prior_in(6)
    likelihood = GaussianLikelihood(Dense(randn(sets, 2, 6)), randn(5, 2), sigma=0.3)
    whole = ExactPosterior(prior).sample(likelihood, 20, generator=generator())
    monkeypatch.setattr(exact_module, "_VALUES_AT_A_TIME", 250)
    monkeypatch.setattr(exact_module, "_ROWS_AT_A_TIME", 4)
    parts = ExactPosterior(prior).sample(likelihood, 20, generator=generator())
    torch.testing.assert_close(parts.samples, whole.samples, rtol=1e-12, atol=1e-12)


def test_result() -> None:
    prior = GaussianMixtureFlow(torch.zeros(2, 4), 0.5, image_shape=(1, 2, 2))
    likelihood = GaussianLikelihood(Dense(torch.ones(1, 4), (1, 2, 2)), torch.ones(3, 1), sigma=0.1)
    solver = ExactPosterior(prior)
    posterior = solver.sample(likelihood, 7, generator=generator())
    assert posterior.samples.shape == (3, 7, 1, 2, 2)
    assert posterior.samples.dtype == torch.float32
    assert posterior.log_evidence.shape == (3,)
    assert (posterior.nfe.forward, posterior.nfe.backward) == (0, 0)
    assert posterior.ess() is None
    assert posterior.diagnostics["component_weights"].shape == (3, 2)
    assert solver.moments(likelihood)[0].shape == (3, 1, 2, 2)
    assert solver.prior_samples(5, generator=generator()).shape == (5, 1, 2, 2)


def test_refuses_what_has_no_closed_form() -> None:
    prior, likelihood = problem(3, 2)
    solver = ExactPosterior(prior)
    with pytest.raises(TypeError, match=r"FunctionReward.*invflow\.NoiseSMC"):
        solver.sample(FunctionReward(lambda x: x.sum(1)), 3)
    bent = Dense(randn(2, 3))
    bent.linear = False
    with pytest.raises(ValueError, match=r"not linear.*invflow\.FMTT"):
        solver.sample(GaussianLikelihood(bent, likelihood.y, 0.1), 3)
    with pytest.raises(ValueError, match=r"\(4,\).*\(3,\)"):
        solver.sample(GaussianLikelihood(Dense(randn(2, 4)), likelihood.y, 0.1), 3)
    with pytest.raises(ValueError, match="max_entries=5"):
        ExactPosterior(prior, max_entries=5).sample(likelihood, 3)
    with pytest.raises(ValueError, match="at least one sample"):
        solver.sample(likelihood, 0)
    with pytest.raises(TypeError, match="not a Other"):
        ExactPosterior(type("Other", (FlowMap,), {})())  # type: ignore[arg-type]


# -- the contract check ---------------------------------------------------------------------------------


def test_contract() -> None:
    check_solver(ExactPosterior)


def test_contract_on_another_problem() -> None:
    prior, likelihood = problem(4, 2)
    check_solver(ExactPosterior, prior=prior, likelihood=likelihood)


class Importance(ExactPosterior):
    """Exact by weights: particles from the prior. Has the settings that the check looks at."""

    temper, chunk_size, scale, level = 1.0, 1000, 1.0, 0.0

    def sample(self, reward: Reward, num_samples: int, *, generator: torch.Generator | None = None,
               progress: bool = False) -> Posterior:
        count = len(reward.y)  # type: ignore[attr-defined]
        x = self.prior.sample(count * num_samples, generator=generator)
        x = self.scale * self.prior.decode(x).unflatten(0, (count, num_samples))
        log_weights = self.temper * reward(x)
        evidence = log_weights.logsumexp(1) - math.log(num_samples) + self.level
        return Posterior(x, log_weights, evidence, seconds=1e-3)


def test_contract_of_a_weighted_solver() -> None:
    check_solver(Importance, num_samples=500)


class Tempered(Importance):
    temper = 0.5


class Wide(Importance):
    scale = 1.3


class Unnormalised(Importance):
    level = 0.3


class Blind(ExactPosterior):
    def sample(self, reward: Any, num_samples: int, **options: Any) -> Posterior:
        other = reward.select(slice(None))
        other.y = torch.zeros_like(other.y)
        return super().sample(other, num_samples, **options)


class Entangled(ExactPosterior):
    def sample(self, reward: Any, num_samples: int, **options: Any) -> Posterior:
        other = reward.select(slice(None))
        other.y = other.y + 0.01 * other.y.mean()
        return super().sample(other, num_samples, **options)


class Writing(ExactPosterior):
    def sample(self, reward: Any, num_samples: int, **options: Any) -> Posterior:
        posterior = super().sample(reward, num_samples, **options)
        reward.y *= 0.9
        return posterior


class Unseeded(ExactPosterior):
    def sample(self, reward: Any, num_samples: int, *, generator: Any = None,
               progress: bool = False) -> Posterior:
        return super().sample(reward, num_samples)


class Global(ExactPosterior):
    def sample(self, reward: Any, num_samples: int, **options: Any) -> Posterior:
        torch.rand(1)
        return super().sample(reward, num_samples, **options)


class Chunked(ExactPosterior):
    chunk_size = 1000

    def sample(self, reward: Any, num_samples: int, *, generator: Any = None,
               progress: bool = False) -> Posterior:
        pieces, left = [], num_samples
        while left:
            pieces.append(super().sample(reward, min(left, self.chunk_size), generator=generator).samples)
            left -= pieces[-1].shape[1]
        return Posterior(torch.cat(pieces, 1), seconds=1e-3)


class Flat(ExactPosterior):
    def sample(self, reward: Any, num_samples: int, **options: Any) -> Posterior:
        return Posterior(super().sample(reward, num_samples, **options).samples.transpose(0, 1), seconds=1e-3)


@pytest.mark.parametrize(("make", "words"), [
    (Tempered, "posterior mean: off by"), (Wide, "posterior (mean|variance): off by"),
    (Unnormalised, "evidence over the exact one: off by"), (Blind, "is y used"),
    (Entangled, "Observations must not share"), (Writing, "modified the measurement"),
    (Unseeded, "same seed gave other"), (Global, "global random state"),
    (Chunked, "Draw the random numbers"), (Flat, "samples have shape"),
], ids=lambda value: value.__name__ if isinstance(value, type) else None)
def test_contract_check_finds(make: type[ExactPosterior], words: str) -> None:
    with pytest.raises(AssertionError, match=words):
        check_solver(make)


def test_contract_check_refuses_what_it_cannot_judge() -> None:
    prior, likelihood = problem(2, 1)
    with pytest.raises(ValueError, match="pass both"):
        check_solver(ExactPosterior, prior=prior)
    with pytest.raises(ValueError, match="at least 8"):
        check_solver(ExactPosterior, prior=prior, likelihood=likelihood, replicates=2)
