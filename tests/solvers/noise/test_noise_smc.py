"""NoiseSMC against closed forms: its moves, its evidence, its samples, and its errors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from noise_tools import F64, MATRIX, GaussianProposal, gaussian, generator, measured, quiet, randn, within
from torch.distributions import MultivariateNormal

import invflow
from invflow import Adapter, ExactPosterior, FunctionReward, GaussianLikelihood, GaussianMixtureFlow, NoiseSMC
from invflow.operators import MatrixOperator
from invflow.smc import pareto_k_hat
from invflow.solvers.noise.hamiltonian import MOVES
from invflow.solvers.noise.target import NoiseTarget
from invflow.testing import check_solver

NAMES = list(MOVES)
OFF_CENTRE = GaussianProposal(torch.tensor([0.6, -0.2], dtype=F64), torch.tensor([0.7, 1.3], dtype=F64))


def ring() -> GaussianMixtureFlow:
    angle = torch.arange(5, dtype=F64) * 2 * math.pi / 5
    return GaussianMixtureFlow(2 * torch.stack([angle.cos(), angle.sin()], dim=1), 0.6,
                               torch.arange(1, 6), steps=6)


# -- the contract -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("moves", NAMES)
def test_contract(moves: str) -> None:
    """The contract includes the closed form of the conjugate Gaussian: mean, variance and evidence."""
    num_moves = 5 if moves.startswith("crank") else 2
    check_solver(lambda prior: NoiseSMC(prior, moves=moves, num_moves=num_moves, leapfrog_steps=3, chunk_size=10_000))


@pytest.mark.filterwarnings("ignore:not converged")  # without moves, and rightly
@pytest.mark.parametrize("options", [{"resampling": "ssp"}, {"num_moves": 0}, {"temperatures": [0.1, 1.0]}])
def test_contract_with_a_proposal(options: dict[str, Any]) -> None:
    check_solver(lambda prior: NoiseSMC(prior, proposal=OFF_CENTRE, chunk_size=10_000, **options))


# -- the moves ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("proposal", [None, OFF_CENTRE], ids=["prior", "proposal"])
@pytest.mark.parametrize("moves", NAMES)
def test_a_move_leaves_its_target_as_it_is(moves: str, proposal: GaussianProposal | None) -> None:
    """From exact draws of the Gaussian target at two temperatures, at large steps, to draws of the same."""
    prior, sigma, move = gaussian(), 0.5, MOVES[moves]
    likelihood = measured([0.9, -1.4], sigma)
    gaussians = None if proposal is None else proposal.propose(likelihood)
    target = NoiseTarget(prior, likelihood, gaussians, gradient=move.uses_gradient, chunk_size=100_000)
    temperature = torch.tensor([0.3, 1.0], dtype=F64)
    rows = torch.arange(2)
    # the target: reference precision plus lambda times that of the likelihood, pulled back through f
    reference_mean, reference_std = target.reference(temperature, rows)
    precision = torch.diag_embed(reference_std.expand(2, 1, 2)[:, 0] ** -2)
    pull = (precision @ reference_mean.expand(2, 1, 2).mT)[..., 0]
    slope = 0.8 * MATRIX
    precision = precision + temperature[:, None, None] * slope.mT @ slope / sigma**2
    residual = likelihood.y - prior.means @ MATRIX.mT
    pull = pull + temperature[:, None] * residual @ slope / sigma**2
    covariance = torch.linalg.inv(precision)
    mean = (covariance @ pull[..., None])[..., 0]

    n = 30_000
    draws = mean[:, None] + randn(2, n, 2, seed=1) @ torch.linalg.cholesky(covariance).mT
    particles = target.evaluate(draws, rows)
    step_size = torch.tensor([0.9, 0.8], dtype=F64)
    for k in range(2):
        random = move.draw((2, n, 2), generator(10 + k)).to(draws)
        particles, accepted = move(target, particles, rows, temperature, step_size, random)
        assert bool(((accepted > 0.1) & (accepted < 0.98)).all())
    assert float((particles.noise == draws).all(2).double().mean()) < 0.5  # most have moved
    centered = particles.noise - mean[:, None]
    products = torch.cat([centered, torch.einsum("bni,bnj->bnij", centered, centered).flatten(2)], dim=2)
    expected = torch.cat([torch.zeros(2, 2, dtype=F64), covariance.flatten(1)], dim=1)
    for b in range(2):
        within(products[b], expected[b])
    # what is carried along belongs to the particles
    again = target.evaluate(particles.noise, rows)
    torch.testing.assert_close(again.images, particles.images)
    torch.testing.assert_close(again.log_reward, particles.log_reward)
    if move.uses_gradient:
        torch.testing.assert_close(again.gradient, particles.gradient)


def test_reference_is_the_tempered_gaussian() -> None:
    """log q^(1 - lambda) N(0, I)^lambda and log N(mu_lambda, S_lambda) differ by a constant."""
    likelihood, z = measured([0.0, 1.0]), randn(2, 20, 2)
    target = NoiseTarget(gaussian(), likelihood, OFF_CENTRE.propose(likelihood))
    temperature = torch.tensor([0.2, 0.9], dtype=F64)
    mean, std = target.reference(temperature, torch.arange(2))
    normal = torch.distributions.Normal
    tempered = ((1 - temperature)[:, None] * normal(OFF_CENTRE.mean, OFF_CENTRE.std).log_prob(z).sum(2)
                + temperature[:, None] * normal(0.0, 1.0).log_prob(z).sum(2))
    difference = tempered - normal(mean, std).log_prob(z).sum(2)
    torch.testing.assert_close(difference, difference[:, :1].expand_as(difference))
    # and the importance weight is reward and prior over proposal
    particles = target.evaluate(z, torch.arange(2))
    expected = (likelihood(particles.images) + normal(0.0, 1.0).log_prob(z).sum(2)
                - normal(OFF_CENTRE.mean, OFF_CENTRE.std).log_prob(z).sum(2))
    torch.testing.assert_close(target.log_ratio(particles), expected)


# -- the answer ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("proposal", [None, OFF_CENTRE], ids=["prior", "proposal"])
def test_mixture_posterior_and_evidence(proposal: GaussianProposal | None) -> None:
    """Several modes; runs side by side as observations of one call."""
    prior, runs, n = ring(), 24, 300
    likelihood, exact = measured([0.4], 0.3), ExactPosterior(ring())
    mean, covariance = exact.moments(likelihood)
    solver = NoiseSMC(prior, proposal=proposal, chunk_size=10_000, num_moves=3)
    posterior = quiet(solver, likelihood.select([0] * runs), n, generator=generator(1))
    assert posterior.ess() is None
    within(posterior.mean(), mean[0])
    centered = posterior.samples - mean
    within(torch.einsum("bni,bnj->bij", centered, centered) / n, covariance[0])
    assert posterior.log_evidence is not None
    within((posterior.log_evidence - exact.log_evidence(likelihood)).exp(), torch.ones((), dtype=F64), 3.0)


@pytest.mark.parametrize("moves", ["crank-nicolson-langevin", "elliptical-slice"])
def test_evidence_is_unbiased_with_few_particles(moves: str) -> None:
    """Where nothing is adapted the estimate is exactly unbiased, however few particles."""
    prior, likelihood = gaussian(), measured([1.8], 0.3)
    solver = NoiseSMC(prior, moves=moves, temperatures=[0.02, 0.1, 0.4, 1.0], acceptance=None, step_size=0.4,
                      num_moves=1, chunk_size=10_000)
    posterior = quiet(solver, likelihood.select([0] * 1500), 6, generator=generator())
    assert posterior.log_evidence is not None
    ratio = (posterior.log_evidence - ExactPosterior(prior).log_evidence(likelihood)).exp()
    assert float(ratio.std()) > 0.3  # far from exact run by run
    within(ratio, torch.ones((), dtype=F64), 3.5)


def test_error_falls_as_the_root_of_the_particles() -> None:
    prior, likelihood = gaussian(), measured([1.5], 0.3)
    truth = ExactPosterior(prior).moments(likelihood)[0]
    counts, errors = [32, 128, 512], []
    for n in counts:
        solver = NoiseSMC(prior, moves="crank-nicolson", num_moves=3, chunk_size=20_000)
        posterior = quiet(solver, likelihood.select([0] * 48), n, generator=generator(n))
        errors.append(float((posterior.mean() - truth).square().mean().sqrt()))
    x = torch.tensor(counts, dtype=F64).log()
    x, y = x - x.mean(), torch.tensor(errors, dtype=F64).log()
    # the logarithm of each error has a standard error near 1 / sqrt(2 * 48 * 2)
    assert float(x @ y / (x @ x)) == pytest.approx(-0.5, abs=4 * 0.072 / float(x.norm()))


def test_black_box_reward() -> None:
    """Half of a Gaussian, by a reward of minus infinity: 0.5 of evidence, a mean of sqrt(2 / pi)."""
    prior = GaussianMixtureFlow(torch.zeros(1, 2, dtype=F64), std=1.0)
    reward = FunctionReward(lambda x: torch.where(x[:, 0] > 0, 0.0, -torch.inf), differentiable=False)
    assert reward.num_observations is None
    posterior = NoiseSMC(prior, num_moves=4, chunk_size=4000).sample(reward, 4000, generator=generator())
    assert posterior.log_evidence is not None
    assert float(posterior.log_evidence.exp()) == pytest.approx(0.5, abs=4.5 * 0.5 / math.sqrt(4000))
    assert bool((posterior.samples[..., 0] > 0).all())
    # resampled particles that did not move count twice: twice the standard error of independent ones
    bound = 2 * 4.5 / math.sqrt(4000)
    assert float(posterior.mean()[0, 0]) == pytest.approx(math.sqrt(2 / math.pi), abs=bound)
    assert float(posterior.mean()[0, 1]) == pytest.approx(0.0, abs=bound)
    assert posterior.nfe.backward == 0
    assert "residual" not in posterior.diagnostics
    with pytest.raises(ValueError, match='moves="crank-nicolson" or moves="elliptical-slice"'):
        NoiseSMC(prior, moves="crank-nicolson-langevin").sample(reward, 10)


def test_prior_samples_are_those_of_one_step() -> None:
    x = NoiseSMC(ring()).prior_samples(6, generator=generator())
    torch.testing.assert_close(x, ring().generate(6, 1, generator=generator()))


# -- importance sampling ------------------------------------------------------------------------------------------


def test_without_moves_it_is_importance_sampling() -> None:
    likelihood = measured([0.9, -0.5], 0.6)
    solver = NoiseSMC(gaussian(), proposal=OFF_CENTRE, num_moves=0)
    state, last = list(solver.iterate(likelihood, 200, generator=generator(3)))
    posterior = solver.sample(likelihood, 200, generator=generator(3))
    z = state.particles.noise
    proposal = MultivariateNormal(OFF_CENTRE.mean, torch.diag(OFF_CENTRE.std**2))
    standard = MultivariateNormal(torch.zeros(2, dtype=F64), torch.eye(2, dtype=F64))
    weights = likelihood(posterior.samples) + standard.log_prob(z) - proposal.log_prob(z)
    torch.testing.assert_close(posterior.log_weights, weights.log_softmax(1))
    torch.testing.assert_close(posterior.log_evidence, weights.logsumexp(1) - math.log(200))
    torch.testing.assert_close(posterior.diagnostics["k_hat"], pareto_k_hat(weights))
    torch.testing.assert_close(posterior.diagnostics["least_ess"], posterior.ess())
    torch.testing.assert_close(last.particles.images, posterior.samples)
    assert (posterior.nfe.forward, posterior.nfe.backward) == (1.0, 0.0)
    assert posterior.diagnostics["distinct_ancestors"].tolist() == [200, 200]
    assert bool(posterior.diagnostics["converged"].all())


@pytest.mark.parametrize("steps", [1, 2])
def test_importance_weights_of_vfm(steps: int) -> None:
    options = {"width": 16, "depth": 2}
    prior = invflow.NeuralFlowMap((2,), network="mlp", options=options, generator=generator())
    adapter = Adapter((2,), classes=["gaussian"], network="mlp", options=options, generator=generator(1))
    with torch.no_grad():  # away from N(0, I), where every adapter starts
        for parameter in adapter.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator(2)))
    operator = MatrixOperator(MATRIX.float(), image_shape=(2,))
    operator.problem_class = "gaussian"
    likelihood = GaussianLikelihood(operator, torch.tensor([[0.3], [-0.8]]), sigma=0.7)
    mean, std = (value.detach() for value in adapter.propose(likelihood))
    assert float((std - 1).abs().max()) > 0.05

    plain = invflow.VFM(prior, adapter, steps=steps, chunk_size=30).sample(likelihood, 50, generator=generator(4))
    vfm = invflow.VFM(prior, adapter, steps=steps, chunk_size=30, importance=True)
    posterior = vfm.sample(likelihood, 50, generator=generator(4))
    assert plain.log_evidence is None
    assert plain.ess() is None
    assert torch.equal(plain.samples, posterior.samples)
    assert plain.nfe == posterior.nfe
    z = mean[:, None] + std[:, None] * torch.randn(2, 50, 2, generator=generator(4))
    normal = torch.distributions.Normal
    images = prior.decode(prior.flow(z.flatten(0, 1), steps)).unflatten(0, (2, 50))
    weights = likelihood(images) + normal(0.0, 1.0).log_prob(z).sum(2)
    weights = (weights - normal(mean[:, None], std[:, None]).log_prob(z).sum(2)).detach().double()
    torch.testing.assert_close(posterior.log_weights.double(), weights.log_softmax(1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(posterior.log_evidence, weights.logsumexp(1) - math.log(50), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(posterior.diagnostics["k_hat"], pareto_k_hat(weights), rtol=1e-2, atol=1e-2)
    if steps == 1:
        same = quiet(NoiseSMC(prior, proposal=adapter, num_moves=0), likelihood, 50, generator=generator(4))
        torch.testing.assert_close(same.samples, posterior.samples)
        torch.testing.assert_close(same.log_evidence, posterior.log_evidence, rtol=1e-4, atol=1e-4)
        assert same.nfe == posterior.nfe  # one call of the map for each, the adapter's beside them

    adapter.trained_for = "another map"
    with pytest.raises(ValueError, match="another map"):
        NoiseSMC(prior, proposal=adapter)


# -- what it refuses ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("options", "match"), [
    ({"moves": "langevin"}, "langevin"), ({"resampling": "sistematic"}, "systematic"), ({"num_moves": -1}, "-1"),
    ({"chunk_size": 0}, "chunk_size=0"), ({"ess_threshold": 1.0}, "ess_threshold=1.0"),
    ({"acceptance": 1.5}, "acceptance=1.5"), ({"step_size": 0.0}, "step_size=0.0"),
    ({"temperatures": [0.5, 0.4, 1.0]}, "ascending"), ({"temperatures": [0.5]}, "ascending"),
    ({"temperatures": [0.5, 1.0], "num_moves": 0}, "without moves"),
    ({"proposal": GaussianProposal(torch.zeros(3), torch.ones(3))}, "another map"),
])
def test_settings_out_of_range(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        NoiseSMC(gaussian(), **options)


def test_refuses() -> None:
    likelihood = measured([0.9])
    with pytest.raises(TypeError, match="FlowMap"):
        NoiseSMC(lambda z: z)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="Adapter"):
        NoiseSMC(gaussian(), proposal=torch.zeros(2))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least one sample"):
        NoiseSMC(gaussian()).sample(likelihood, 0)

    with pytest.raises(ValueError, match="gives no gradient"):
        NoiseSMC(gaussian()).sample(FunctionReward(lambda x: x.detach()[:, 0]), 5)
    with pytest.raises(ValueError, match=r"observation 0.*-inf"):
        NoiseSMC(gaussian()).sample(FunctionReward(lambda x: x[:, 0] * torch.nan), 5)
    thin = GaussianProposal(torch.zeros(2, dtype=F64), torch.tensor([0.0, 1.0], dtype=F64))
    with pytest.raises(ValueError, match="least std is 0"):
        NoiseSMC(gaussian(), proposal=thin).sample(likelihood, 5)
    short = GaussianProposal(torch.zeros(2), torch.ones(2))
    short.propose = lambda reward: (torch.zeros(3, 2), torch.ones(3, 2))  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"\(3, 2\).*\(1, 2\)"):
        NoiseSMC(gaussian(), proposal=short).sample(likelihood, 5)
