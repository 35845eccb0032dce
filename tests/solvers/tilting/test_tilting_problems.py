"""Problems with a reward, and the results of the tilting solvers on them: closed forms, quadrature, rates."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tilting_models import Gaussian
from torch import Tensor
from typer.testing import CliRunner

import invflow
from invflow import FMTT, ExactPosterior, FunctionReward, GaussianMixtureFlow, NoiseSMC
from invflow.problem import Problem
from invflow.reward import RepeatedReward
from invflow.testing import check_problem, check_reward
from invflow_problems import half_plane, mixture25, ring
from invflow_problems.rejection import rejection_sample

F64 = torch.float64
LOOK_AHEADS = ("flow_map", "denoiser", "none")
pytestmark = pytest.mark.filterwarnings("ignore:(FMTT|NoiseSMC) has not converged")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def grid(low: float, high: float, cells: int) -> Tensor:
    """Midpoints of the cells of a square, ``(cells^2, 2)``."""
    side = low + (high - low) * (torch.arange(cells, dtype=F64) + 0.5) / cells
    return torch.cartesian_prod(side, side)


# -- the truths --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mixture/half-plane", "ring/wavy", "mixture/25", "mixture/25-800-4", "mnist/tilt-7",
                                  "mnist/mirror", "mnist/rotation", "mnist/open-centre"])
def test_problems_keep_the_contract(name: str) -> None:
    check_problem(invflow.load_problem(name))


@pytest.mark.parametrize("offset", [0.0, math.pi / 8])
def test_half_plane_closed_form_against_quadrature(offset: float) -> None:
    prior = half_plane.ring_of_gaussians(offset, dtype=F64)
    points = grid(-9, 9, 900)  # the edge of the half-plane is an edge of cells
    log_mass = prior.log_prob(points) + half_plane.left_penalty(points)
    mass = log_mass.softmax(0)
    found = half_plane.tilted_expectations(prior)
    assert found["share x0 > 0"] == pytest.approx(float((mass * (points[:, 0] > 0)).sum()), abs=1e-5)
    assert found["reward"] == pytest.approx(float((mass * half_plane.left_penalty(points)).sum()), abs=1e-5)
    assert found["log evidence"] == pytest.approx(float(log_mass.logsumexp(0) + 2 * math.log(18 / 900)), abs=1e-5)
    # the sampler, against the same quadrature: both coordinates' distribution functions, and a joint moment
    draws = half_plane.tilted_sample(40_000, generator(), prior)
    for axis in (0, 1):
        for cut in (-5.0, -3.5, -1.0, -0.5, 0.0, 0.5, 3.0, 4.5):
            share = float((mass * (points[:, axis] < cut)).sum())
            error = math.sqrt(share * (1 - share) / 40_000) + 1e-5
            assert abs(float((draws[:, axis] < cut).double().mean()) - share) < 4 * error + 2e-4
    product = (mass * points.square().prod(1)).sum()
    found_product = draws.square().prod(1)
    assert abs(found_product.mean() - product) < 4 * found_product.std() / 200


def test_half_plane_numbers() -> None:
    found = half_plane.tilted_expectations()
    assert found["share x0 > 0"] == pytest.approx(0.84897, abs=2e-5)
    assert found["reward"] == pytest.approx(-0.04049, abs=2e-5)


def test_wavy_ring_rejection_against_quadrature() -> None:
    problem = invflow.load_problem("ring/wavy")
    assert isinstance(problem.prior, GaussianMixtureFlow)
    prior = GaussianMixtureFlow(problem.prior.means.double(), std=ring.THICKNESS)
    points = grid(-3.4, 3.4, 500)
    mass = (prior.log_prob(points) + ring.wavy_reward(points)).softmax(0)
    draws, _ = problem.simulate(20_000, generator=generator())
    functions: list[Any] = [*problem.quantities.values(), ring.wavy_reward, lambda x: x.norm(dim=1), lambda x: x[:, 0],
                            lambda x: (3 * torch.atan2(x[:, 1], x[:, 0])).cos().abs(), lambda x: x[:, 1].square()]
    for function in functions:
        values = function(draws.double())
        truth = (mass * function(points)).sum()
        assert abs(values.mean() - truth) < 4 * values.std() / 20_000**0.5 + 1e-3
    for name, function in (*problem.quantities.items(), ("reward", ring.wavy_reward)):
        assert problem.expectations[name] == pytest.approx(float((mass * function(points)).sum()), abs=2e-3)


def test_rejection_has_the_tilted_law_and_says_when_it_cannot() -> None:
    def normal(n: int, generator: torch.Generator) -> Tensor:
        return torch.randn(n, 1, generator=generator)

    # N(0, 1) e^{-(x - 1)^2 / 2} is N(1/2, 1/2)
    x = rejection_sample(normal, lambda x: 3 - 0.5 * (x[:, 0] - 1) ** 2, 20_000, generator(), bound=3.0)
    assert abs(float(x.mean()) - 0.5) < 4 * math.sqrt(0.5 / 20_000)
    assert abs(float(x.var()) - 0.5) < 4 * 0.5 * math.sqrt(2 / 20_000)
    with pytest.raises(ValueError, match="exceeds the bound 0"):
        rejection_sample(normal, lambda x: x[:, 0], 10, generator())
    with pytest.raises(RuntimeError, match="too sharp"):
        rejection_sample(normal, lambda x: x[:, 0] * 0 - 50, 10, generator(), max_proposals=10_000)


# -- the benchmark of 25 Gaussians -------------------------------------------------------------------------------------


def test_mixture25_is_as_published() -> None:
    problem = mixture25.draw_problem(80, 4, seed=2)
    prior = problem.prior
    assert isinstance(prior, GaussianMixtureFlow)
    assert prior.means.shape == (25, 80)
    assert torch.equal(prior.means[:, :2].repeat(1, 40), prior.means)
    assert {tuple(row) for row in prior.means[:, :2].tolist()} == {(8.0 * i, 8.0 * j) for i in range(-2, 3)
                                                                  for j in range(-2, 3)}
    assert (prior.std == 1).all()
    matrix = problem.operator(torch.eye(80)).T.double()
    singular = torch.linalg.svdvals(matrix)
    assert 0 < singular[-1] <= singular[0] <= 1
    assert isinstance(problem.sigma, float)
    assert 0 < problem.sigma < singular[0]
    again, other = (mixture25.draw_problem(80, 4, seed=seed) for seed in (2, 3))
    assert torch.equal(again.operator(torch.eye(80)).T.double(), matrix)
    assert isinstance(other.prior, GaussianMixtureFlow)
    assert not torch.equal(other.prior.weights, prior.weights)
    names = {f"mixture/25-{d}-{m}" for d, m in mixture25.SETTINGS}
    assert len(names) == 9
    assert {"mixture/25", *names} <= set(invflow.problem.list_problems())
    first = invflow.load_problem("mixture/25")
    assert first.image_shape == (8,)
    assert first.operator.measurement_shape == (1,)
    with pytest.raises(ValueError, match="even dimension"):
        mixture25.draw_problem(7, 1)


def test_singular_vectors_have_no_preferred_direction() -> None:
    rows = torch.stack([mixture25.draw_problem(8, 1, seed).operator(torch.eye(8))[:, 0] for seed in range(400)])
    directions = rows / rows.norm(dim=1, keepdim=True)
    assert directions.mean(0).abs().max() < 4 / math.sqrt(8 * 400)
    assert (directions.square().mean(0) - 1 / 8).abs().max() < 4 * math.sqrt(2 / 8**2 / 400)


@pytest.mark.parametrize("m", [1, 4])
def test_mixture25_exact_posterior_against_importance(m: int) -> None:
    problem = mixture25.draw_problem(8, m, seed=1)
    _, likelihood = problem.simulate(3, generator=generator(m))
    draws = problem.prior.decode(problem.prior.sample(400_000, generator=generator(1)))  # type: ignore[operator]
    weights = likelihood(draws.expand(3, -1, -1)).double().softmax(1)
    exact = ExactPosterior(problem.prior)  # type: ignore[arg-type]
    mean, covariance = exact.moments(likelihood)
    for power, truth in ((1, mean), (2, covariance.diagonal(dim1=1, dim2=2) + mean.square())):
        values = draws.double() ** power
        found = weights @ values
        error = (weights.square()[..., None] * (values - found[:, None]).square()).sum(1).sqrt()
        assert ((found - truth).abs() < 4.5 * error + 1e-3).all()


def test_truths_of_a_digit_are_the_weighted_prior() -> None:
    """Draws by rejection from the one-step law against importance weights on other draws of it."""
    problem = invflow.load_problem("mnist/tilt-1")
    truth, reward = problem.simulate(120, generator=generator())
    base = problem.prior.generate(600, generator=generator(1))
    weights = problem.reward(base[None])[0].double().softmax(0)
    for function in (lambda x: x.flatten(1).mean(1), lambda x: x[:, 0, :, 14].mean(1),
                     lambda x: problem.reward(x[None])[0]):
        values, weighted = function(truth).double(), function(base).double()
        mean = (weights * weighted).sum()
        error = (weights.square() * (weighted - mean).square()).sum() + values.var() / 120
        assert abs(values.mean() - mean) < 4 * error.sqrt()
    assert reward.num_observations == 120


# -- the solvers on the half-plane -------------------------------------------------------------------------------------


def values_of(x: Tensor) -> Tensor:
    """Share of the right half-plane and reward, ``(..., 2)``."""
    return torch.stack([(x[..., 0] > 0).double(), -x[..., 0].double().clamp(max=0) ** 2], dim=-1)


@functools.cache
def posed(repeats: int = 16, steps: int = 4) -> tuple[GaussianMixtureFlow, RepeatedReward]:
    problem = invflow.load_problem("mixture/half-plane")
    return half_plane.ring_of_gaussians(steps=steps), problem.simulate(repeats, generator=generator())[1]


def estimates(solver: Any, reward: Any, particles: int, seed: int = 1) -> Tensor:
    """Weighted means of each repeat, ``(B, 2)``."""
    posterior = solver.sample(reward, particles, generator=generator(seed))
    return (posterior.weights.double()[..., None] * values_of(posterior.samples)).sum(1)


def exact_values() -> Tensor:
    truth = half_plane.tilted_expectations()
    return torch.tensor([truth["share x0 > 0"], truth["reward"]], dtype=F64)


def worst(each: Tensor, truth: Tensor, error: Tensor | float = 0.0) -> float:
    """Largest difference of the mean over repeats from the truth, in standard errors of both."""
    return float(((each.mean(0) - truth).abs() / (each.var(0) / len(each) + error**2).sqrt()).max())


@pytest.mark.parametrize("look_ahead", LOOK_AHEADS)
def test_twisted_weights_tilt_the_base_sampler(look_ahead: str) -> None:
    prior, reward = posed()
    solver = FMTT(prior, steps=10, look_ahead=look_ahead, chunk_size=10**6)
    x = solver.prior_samples(60_000, generator=generator(2))
    weights = half_plane.left_penalty(x).double().softmax(0)
    base = (weights[:, None] * values_of(x)).sum(0)
    error = (weights.square()[:, None] * (values_of(x) - base).square()).sum(0).sqrt()
    assert worst(estimates(solver, reward, 300), base, error) < 3


@pytest.mark.parametrize("look_ahead", LOOK_AHEADS)
def test_renoising_tilts_the_ring_itself(look_ahead: str) -> None:
    prior, reward = posed(steps=6)
    solver = FMTT(prior, steps=6, look_ahead=look_ahead, kernel="renoise", chunk_size=10**6)
    assert worst(estimates(solver, reward, 250), exact_values()) < 3


def test_jarzynski_weights_with_the_flow_map_at_many_steps() -> None:
    prior, reward = posed()
    solver = FMTT(prior, steps=100, weights="jarzynski", chunk_size=10**6)
    assert worst(estimates(solver, reward, 120), exact_values()) < 3


def test_noise_smc_and_the_closed_form() -> None:
    prior, reward = posed(steps=6)
    solver = NoiseSMC(prior, num_moves=2, chunk_size=10**6)
    # 64 repeats: the standard error of 16 is itself so uncertain that three of them are passed every fiftieth time
    each = torch.cat([estimates(solver, reward, 500, seed) for seed in (1, 2, 3, 4)])
    assert worst(each, exact_values()) < 3
    evidence = solver.sample(reward, 500, generator=generator(2)).log_evidence
    assert evidence is not None
    ratio = (evidence - half_plane.tilted_expectations()["log evidence"]).exp()
    assert abs(ratio.mean() - 1) < 3 * ratio.std() / 4


def test_an_annealed_schedule_starts_at_a_weight() -> None:
    """With g(0) > 0 the weights start at g(0) r: forgotten, the posterior and its evidence are off."""
    problem = invflow.load_problem("gaussian/linear")
    assert isinstance(problem.prior, GaussianMixtureFlow)
    prior = GaussianMixtureFlow(problem.prior.means, std=0.5, weights=problem.prior.weights, steps=6)
    _, likelihood = problem.simulate(1, generator=generator(4))
    repeats = likelihood.select([0] * 24)
    solver = FMTT(prior, steps=5, schedule="annealed", kernel="renoise", look_ahead="denoiser", chunk_size=10**6)
    posterior = solver.sample(repeats, 300, generator=generator())
    exact = ExactPosterior(problem.prior)
    mean = exact.moments(likelihood)[0]
    assert worst(posterior.mean(), mean[0]) < 3.5
    assert posterior.log_evidence is not None
    ratio = (posterior.log_evidence - exact.log_evidence(likelihood)).exp()
    assert abs(ratio.mean() - 1) < 3 * ratio.std() / 24**0.5


# -- rates -------------------------------------------------------------------------------------------------------------


def slope(x: list[float], y: list[float]) -> float:
    """Least-squares slope in logarithms."""
    a, b = torch.tensor(x, dtype=F64).log(), torch.tensor(y, dtype=F64).log()
    a = a - a.mean()
    return float((a * b).sum() / a.square().sum())


@pytest.mark.parametrize("weights", ["twisted", "jarzynski"])
def test_error_falls_as_the_root_of_the_particles(weights: str) -> None:
    """Root-mean-square error over 64 repeats, against the closed form; the slope's own error is about 0.04."""
    prior, reward = Gaussian(), RepeatedReward(FunctionReward(lambda x: -0.5 * (x - 1).square().sum(1)), 64)
    counts = [32, 128, 512, 2048]
    errors = []
    for count in counts:
        solver = FMTT(prior, steps=5 if weights == "twisted" else 60, weights=weights, chunk_size=10**6,
                      kernel="renoise" if weights == "twisted" else "sde")
        posterior = solver.sample(reward, count, generator=generator(count))
        errors.append(float((posterior.mean() - 0.5).square().mean().sqrt()))  # N(1/2, I/2)
    assert abs(slope([float(c) for c in counts], errors) + 0.5) < 0.1


@pytest.mark.parametrize("look_ahead", LOOK_AHEADS)
def test_error_of_jarzynski_weights_is_of_first_order_in_the_step(look_ahead: str) -> None:
    """The tilted mean of N(0, I) with r = -|x - 1|^2 / 2 is 1/2: the bias that is left falls with the step."""
    reward = RepeatedReward(FunctionReward(lambda x: -0.5 * (x - 1).square().sum(1)), 10)
    steps, biases = [4, 8, 16], []
    for count in steps:
        solver = FMTT(Gaussian(), steps=count, weights="jarzynski", look_ahead=look_ahead, chunk_size=10**6,
                      resample_threshold=0.0)
        biases.append(float(0.5 - solver.sample(reward, 8000, generator=generator(7)).mean().mean()))
    # measured with 200,000 particles: 0.07 at 4 steps, then half as much for each doubling (errors of 0.0016 here)
    assert biases[0] > biases[1] > biases[2] > 0
    assert -1.25 < slope([float(count) for count in steps], biases) < -0.75


# -- the interface -----------------------------------------------------------------------------------------------------


def test_simulating_a_tilt() -> None:
    problem = invflow.load_problem("mixture/half-plane")
    assert problem.tilts
    assert problem.image_shape == (2,)
    assert problem.problem_class is None
    assert problem.sigma is None
    truth, reward = problem.simulate(5, generator=generator())
    assert truth.shape == (5, 2)
    assert isinstance(reward, RepeatedReward)
    assert reward.num_observations == 5
    assert invflow.load_problem("mnist/mirror").simulate(2)[0] is None
    exact = problem.exact_posterior()
    samples = exact.sample(reward, 400, generator=generator()).samples
    assert samples.shape == (5, 400, 2)
    assert worst(values_of(samples).mean(1), exact_values()) < 4
    assert exact.prior_samples(3, generator=generator()).shape == (3, 2)
    with pytest.raises(ValueError, match="no operator"):
        problem.operator  # noqa: B018
    with pytest.raises(ValueError, match="source='data'"):
        problem.simulate(2, source="prior")
    with pytest.raises(TypeError, match="scores its draws differently"):
        exact.sample(FunctionReward(lambda x: x[:, 0]), 4)
    with pytest.raises(TypeError, match="no exact sampler"):
        invflow.load_problem("mnist/mirror").exact_posterior()
    with pytest.raises(ValueError, match="is an inverse problem"):
        invflow.load_problem("gaussian/linear").reward  # noqa: B018


def test_repeats() -> None:
    inner = FunctionReward(lambda x: x.sum(1))
    reward = RepeatedReward(inner, 3)
    check_reward(reward, (5,))
    with pytest.raises(ValueError, match="repeated for 3"):
        reward(torch.zeros(2, 4, 5))
    with pytest.raises(ValueError, match="at least once"):
        RepeatedReward(inner, 0)
    with pytest.raises(ValueError, match="observations"):
        RepeatedReward(reward, 2)


def shifted(n: int, generator: torch.Generator) -> Tensor:
    return half_plane.tilted_sample(n, generator) + 0.2


def test_the_contract_sees_a_truth_of_another_law() -> None:
    good = invflow.load_problem("mixture/half-plane")
    settings: dict[str, Any] = {"reward": good.reward, "prior": lambda: good.prior, "quantities": good.quantities}
    check_problem(Problem("fine", None, sampler=half_plane.tilted_sample, **settings))
    for sampler in (lambda n, g: half_plane.ring_of_gaussians().sample(n, generator=g), shifted):
        with pytest.raises(AssertionError, match="not the same law"):
            check_problem(Problem("bad", None, sampler=sampler, **settings))
    with pytest.raises(AssertionError, match="not the same law"):
        check_problem(Problem("bad", None, **settings, expectations=lambda: {"share x0 > 0": 0.921},
                              sampler=half_plane.tilted_sample))


@pytest.mark.parametrize(("settings", "message"), [
    ({}, "pass an operator and sigma .*, or a reward instead of both"),
    ({"operator": 1, "sigma": 1.0, "reward": 1}, "or a reward instead"),
    ({"reward": 1}, "takes a prior or its name"), ({"reward": 1, "prior": 1, "random": True}, "no random operators"),
    ({"operator": 1, "sigma": 1.0, "sampler": 1, "quantities": {"a": 1}}, "belong to a problem with a reward"),
])
def test_problems_that_make_no_sense(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Problem("p", None, **settings)


def test_solve_on_the_command_line(tmp_path: Path) -> None:
    from invflow.cli.entry import app

    def solve(*arguments: str) -> tuple[str, dict[str, Any]]:
        result = CliRunner().invoke(app, ["solve", *arguments, "--output", str(tmp_path)])
        assert result.exit_code == 0, result.output
        return result.output, json.loads((tmp_path / "metrics.json").read_text())

    output, metrics = solve("mixture/half-plane", "--steps", "5", "--samples", "60", "--observations", "2")
    assert "share x0 > 0" in output
    assert "exact" in output
    assert metrics["settings"]["solver"] == "FMTT"  # the default where there is no measurement
    assert metrics["expected"]["share x0 > 0"] == pytest.approx(0.849, abs=1e-3)
    assert len(metrics["per_observation"]["reward"]) == 2
    assert metrics["mean"]["reward"] == pytest.approx(-0.04, abs=0.05)
    posterior = invflow.Posterior.load(tmp_path / "posterior.safetensors")
    assert posterior.samples.shape == (2, 60, 2)
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    output, metrics = solve("mnist/tilt-1", "--solver", "noise-smc", "--samples", "6", "--observations", "1",
                            "--set", "num_moves=1")
    assert "accuracy" in output
    assert "exact" not in output
    assert metrics["settings"]["problem"] == "mnist/tilt-1"
