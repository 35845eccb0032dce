"""Problems whose posterior is known: atoms, a funnel and a banana, mixtures in ten dimensions; each checked twice."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import invflow
from invflow.testing import check_flow_map, check_operator, check_problem
from invflow_problems.atoms import WIDTH, atoms_prior, load_atoms
from invflow_problems.bipsda import Attenuation, Squares, _greatest, bipsda_prior
from invflow_problems.covariance_mixture import CovarianceMixtureFlow
from invflow_problems.curved import CurvedOperator

F64 = torch.float64
ATOMS = ["atoms/mnist-super-resolution", "atoms/mnist-denoising", "atoms/mnist-box-inpainting",
         "atoms/mnist-gaussian-blur"]
CURVED = ["curved/funnel", "curved/banana"]
BIPSDA = ["bipsda/inpainting", "bipsda/x-ray", "bipsda/phase-retrieval"]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", ["atoms/mnist-super-resolution", *CURVED, "bipsda/inpainting"])
def test_the_problems_keep_the_contract(name: str) -> None:
    check_problem(invflow.load_problem(name))  # with the coverage of the exact posterior's intervals


@pytest.mark.parametrize("name", [*CURVED, "bipsda/inpainting"])
def test_exact_passes_its_own_certificate(name: str) -> None:
    problem = invflow.load_problem(name)
    certificate = invflow.calibrate(problem.exact_posterior(), problem, num_simulations=200, generator=seeded())
    assert certificate.verdict == "passes"


def test_exact_passes_its_own_certificate_on_atoms() -> None:
    problem = invflow.load_problem("atoms/mnist-super-resolution")
    certificate = invflow.calibrate(problem.exact_posterior(), problem, num_simulations=200, generator=seeded())
    assert certificate.verdict == "passes"


# -- atoms -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ATOMS)
def test_five_to_fifty_atoms_count(name: str) -> None:
    problem = invflow.load_problem(name)
    _, likelihood = problem.simulate(12, generator=seeded())
    weights = problem.exact_posterior().sample(likelihood, 1, generator=seeded()).diagnostics["component_weights"]
    effective = 1 / weights.double().square().sum(1)
    assert 5 < float(effective.median()) < 50


def test_weights_of_atoms_are_those_of_the_definition() -> None:
    prior, problem = atoms_prior(count=40), invflow.load_problem("atoms/mnist-super-resolution")
    _, likelihood = problem.simulate(2, generator=seeded(1))
    found = invflow.ExactPosterior(prior).sample(likelihood, 1, generator=seeded()).diagnostics["component_weights"]
    # 4 x 4 pixels are averaged, so A A^T = I / 16
    means = load_atoms()[:40].double().reshape(40, 7, 4, 7, 4).mean((2, 4)).flatten(1)
    distance = (likelihood.y.double().flatten(1)[:, None] - means).square().sum(2)
    wanted = (-0.5 * distance / (WIDTH**2 / 16 + 0.35**2)).softmax(1)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-7)


def test_chunks_of_observations_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = invflow.load_problem("atoms/mnist-super-resolution")
    _, likelihood = problem.simulate(5, generator=seeded())
    solver = problem.exact_posterior()
    whole, evidence = solver.sample(likelihood, 3, generator=seeded()), solver.log_evidence(likelihood)
    monkeypatch.setattr("invflow.solvers.exact._VALUES_AT_A_TIME", 2 * 1000 * 49)
    parts = solver.sample(likelihood, 3, generator=seeded())
    torch.testing.assert_close(parts.samples, whole.samples)
    torch.testing.assert_close(parts.diagnostics, whole.diagnostics)
    torch.testing.assert_close(solver.log_evidence(likelihood), evidence)


def test_atoms_of_a_number_that_is_not_there() -> None:
    with pytest.raises(ValueError, match="there are 1000 images; pass count=1000"):
        atoms_prior(count=1001)


# -- the plane ---------------------------------------------------------------------------------------------------------


def agree(posterior: invflow.Posterior, likelihood: invflow.Likelihood, x: Tensor, about: Callable[[Tensor], Tensor],
          ) -> None:
    """Draws and their evidence against draws ``(n, d)`` of the prior that are weighted by the likelihood."""
    count = posterior.num_samples
    assert posterior.log_evidence is not None
    for b, own in enumerate(posterior.samples):
        one = likelihood.select(slice(b, b + 1))
        log_weight = torch.cat([one(part[None])[0] for part in x.split(2**18)]).double()
        weight = log_weight.softmax(0)
        effective = float(1 / weight.square().sum())
        assert effective > 30
        evidence = log_weight.logsumexp(0) - math.log(len(x))
        assert float(posterior.log_evidence[b] - evidence) == pytest.approx(0, abs=5 / math.sqrt(min(effective, count)))
        value, draws = about(x).double(), about(own).double()
        wanted = weight @ value
        variance = (weight.square()[:, None] * (value - wanted).square()).sum(0)
        error = (draws.var(0) / count + variance).sqrt()
        assert bool(((draws.mean(0) - wanted).abs() < 5 * error + 1 / count).all())


@pytest.mark.parametrize("name", CURVED)
def test_draws_on_the_plane_agree_with_weighted_draws_of_the_prior(name: str) -> None:
    problem = invflow.load_problem(name)
    _, likelihood = problem.simulate(3, generator=seeded(2))
    posterior = problem.exact_posterior().sample(likelihood, 5000, generator=seeded())
    x = problem.prior.sample(500_000, generator=seeded(1))
    agree(posterior, likelihood, x, lambda x: torch.cat([x, x.square(), x[:, :1] * x[:, 1:]], 1))


def test_curved_operator_is_linear_in_the_second_coordinate() -> None:
    operator = CurvedOperator(torch.exp, torch.square)
    x = torch.tensor([[0.5, -2.0], [-1.0, 3.0]], dtype=F64)
    by_hand = x[:, 0].exp() * x[:, 1] + x[:, 0] ** 2
    torch.testing.assert_close(operator(x)[:, 0], by_hand)


@pytest.mark.parametrize("name", CURVED)
def test_gaussian_moves_fail_and_the_diagnostics_notice(name: str) -> None:
    problem = invflow.load_problem(name)
    _, likelihood = problem.simulate(6, generator=seeded(3))
    with pytest.warns(UserWarning, match="not converged"):
        rto = invflow.NoiseRTO(problem.prior).sample(likelihood, 128, generator=seeded())
    exact = problem.exact_posterior()
    first, second = (exact.sample(likelihood, 128, generator=seeded(k)).samples for k in (1, 2))
    distance = invflow.metrics.sliced_wasserstein
    assert distance(rto.samples, first, generator=seeded()).mean() > 2 * distance(second, first,
                                                                                 generator=seeded()).mean()


# -- ten dimensions ----------------------------------------------------------------------------------------------------


def test_flow_of_covariances_keeps_the_contract() -> None:
    prior = bipsda_prior()
    flow = CovarianceMixtureFlow(prior.means.double(), prior.covariances.double(), prior.log_weights.double().exp())
    check_flow_map(flow)


def test_flow_of_isotropic_covariances_is_the_mixtures() -> None:
    means = 2 * torch.randn(3, 4, generator=seeded(), dtype=F64)
    weights = torch.tensor([0.2, 0.5, 0.3], dtype=F64)
    known = invflow.GaussianMixtureFlow(means, std=0.7, weights=weights, steps=64)
    found = CovarianceMixtureFlow(means, 0.49 * torch.eye(4, dtype=F64).expand(3, 4, 4), weights, steps=64)
    x = torch.randn(50, 4, generator=seeded(1), dtype=F64)
    for t in (0.0, 0.3, 0.9):
        torch.testing.assert_close(found.velocity(x, t), known.velocity(x, t))
        torch.testing.assert_close(found.log_prob(x, t), known.log_prob(x, t))
    torch.testing.assert_close(found.jump(x, 0.0, 1.0), known.jump(x, 0.0, 1.0), rtol=0, atol=1e-3)


def test_one_jump_has_the_priors_moments() -> None:
    prior = bipsda_prior()
    x = prior.generate(5_000, generator=seeded()).double()
    mean = torch.tensor(0.4 * -5 + 0.3 * 5, dtype=F64)
    error = x.std(0) / math.sqrt(len(x))
    assert bool(((x.mean(0) - mean).abs() < 5 * error).all())
    near = torch.cdist(x, prior.means.double()).argmin(1)
    share = torch.bincount(near).double() / len(x)
    torch.testing.assert_close(share, torch.tensor([0.4, 0.3, 0.3], dtype=F64), rtol=0, atol=5 * 0.007)


@pytest.mark.parametrize("operator", [Attenuation(torch.rand(3, 4, generator=seeded())),
                                      Squares(torch.randn(3, 4, generator=seeded()))])
def test_operators_of_rays_keep_the_contract(operator: invflow.Operator) -> None:
    check_operator(operator)


@pytest.mark.parametrize("name", BIPSDA)
def test_exact_draws_agree_with_weighted_draws_of_the_prior(name: str) -> None:
    problem = invflow.load_problem(name)
    _, likelihood = problem.simulate(2, generator=seeded(4))
    posterior = problem.exact_posterior().sample(likelihood, 500, generator=seeded())
    x = bipsda_prior().sample(1_000_000, generator=seeded(1))
    means = bipsda_prior().means
    # each coordinate, and which component a draw is of
    agree(posterior, likelihood, x,
          lambda x: torch.cat([x, torch.cdist(x, means).argmin(1)[:, None].eq(torch.arange(3)).to(x)], 1))


def test_no_image_is_likelier_than_the_bound() -> None:
    for name in BIPSDA[1:]:
        _, likelihood = invflow.load_problem(name).simulate(3, generator=seeded(5))
        for b in range(3):
            one = likelihood.select(slice(b, b + 1))
            x = (8 * torch.randn(1, 10, generator=seeded(b), dtype=F64)).requires_grad_()
            optimiser = torch.optim.LBFGS([x], max_iter=200, line_search_fn="strong_wolfe")

            def loss(one: invflow.Likelihood = one, x: Tensor = x, optimiser: torch.optim.LBFGS = optimiser) -> Tensor:
                optimiser.zero_grad()
                value = -one.to(F64)(x[None])[0, 0]
                value.backward()
                return value

            optimiser.step(loss)
            best = -float(loss().detach())
            bound = _greatest(one)
            assert best < bound + 1e-6
            assert name != "bipsda/x-ray" or best > bound - 0.05  # and the bound is not loose


def test_other_likelihoods_are_refused() -> None:
    problem = invflow.load_problem("bipsda/x-ray")
    with pytest.raises(TypeError, match="BipsdaPosterior takes"):
        problem.exact_posterior().sample(invflow.FunctionReward(lambda x: x[:, 0]), 2)
    with pytest.raises(TypeError, match="CurvedPosterior takes"):
        invflow.load_problem("curved/banana").exact_posterior().sample(invflow.FunctionReward(lambda x: x[:, 0]), 2)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "solver"), [
    ("curved/banana", lambda prior: invflow.NoiseSMC(prior)), ("curved/funnel", lambda prior: invflow.NoiseSMC(prior)),
    ("bipsda/inpainting", lambda prior: invflow.FMTT(prior, steps=25))])
def test_a_sampler_reaches_twice_the_floor_of_exact_draws(name: str, solver: object) -> None:
    problem = invflow.load_problem(name)
    _, likelihood = problem.simulate(6, generator=seeded(6))
    exact = problem.exact_posterior()
    first, second = (exact.sample(likelihood, 128, generator=seeded(k)).samples for k in (1, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        posterior = solver(problem.prior).sample(likelihood, 128, generator=seeded())  # type: ignore[operator]
    weights = posterior.log_weights if posterior.weighted else None
    distance = invflow.metrics.sliced_wasserstein
    reached = distance(posterior.samples, first, log_weights=weights, generator=seeded()).mean()
    assert reached < 2 * distance(second, first, generator=seeded()).mean()
