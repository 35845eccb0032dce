"""The conjugate proposal: the exact conditional of its surrogate, its density, and exact weights for any map."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from tilting_models import Gaussian, Row
from torch import Tensor

import invflow
from invflow import FMTT, ExactPosterior, FlowMap, FunctionReward, GaussianLikelihood, GaussianMixtureFlow, Operator
from invflow.linear import structure
from invflow.linear.spectral import gaussian_estimate
from invflow.linear.structure import dense_matrix, find_spectrum
from invflow.operators import BoxInpainting, GaussianBlur, MatrixOperator, RandomInpainting, SuperResolution
from invflow.posterior import Posterior
from invflow.solvers.tilting.conjugate import Conjugate
from invflow.solvers.tilting.proposals import Move
from invflow.solvers.tilting.schedules import logit_grid
from invflow.testing import check_solver

F64 = torch.float64
pytestmark = pytest.mark.filterwarnings("ignore:FMTT has not converged")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=F64)


SHAPE = (1, 8, 8)
OPERATORS: dict[str, Any] = {
    "box": lambda: BoxInpainting(SHAPE),
    "masks": lambda: RandomInpainting(SHAPE).randomize(2, generator()),
    "pooling": lambda: SuperResolution(SHAPE, 4),
    "bicubic": lambda: SuperResolution(SHAPE, 2, filter="bicubic"),
    "blur": lambda: GaussianBlur(SHAPE, 1.0, 5),
    "matrices": lambda: MatrixOperator(normal(2, 5, 64), SHAPE),
}


def likelihood_of(operator: Operator) -> GaussianLikelihood:
    operator = operator.double()
    y = operator(normal(2, *SHAPE, seed=3))
    return GaussianLikelihood(operator, y, sigma=torch.tensor([0.1, 0.4], dtype=F64))


@pytest.mark.parametrize("name", OPERATORS)
def test_the_spectrum_is_that_of_the_operator(name: str) -> None:
    likelihood = likelihood_of(OPERATORS[name]())
    spectrum = find_spectrum(likelihood)
    matrix = dense_matrix(likelihood)
    square = matrix @ matrix.mT
    assert spectrum is not None
    assert (spectrum.vectors is None) == (name in ("box", "masks", "pooling"))
    values, vectors = spectrum.values, torch.eye(square.shape[1], dtype=F64)
    found = torch.diag_embed(values) if spectrum.vectors is None else (
        spectrum.vectors * values[:, None]) @ spectrum.vectors.mT
    torch.testing.assert_close(found, square, rtol=1e-9, atol=1e-9)
    back = spectrum.apply(values[:, None].expand(len(square), -1, -1), vectors.expand(len(square), -1, -1))
    torch.testing.assert_close(back, square, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("gains", [(1.0, 0.3), (0.0, 1.0)])
def test_it_is_the_conditional_of_its_surrogate(name: str, gains: tuple[float, float]) -> None:
    """Mean, covariance and density against Bayes' rule for the linear look-ahead, with dense matrices."""
    likelihood, v, slope, scale, size = likelihood_of(OPERATORS[name]()), 0.3, 0.7, 0.5, 64
    matrix = dense_matrix(likelihood).expand(2, -1, -1)
    count = size + 1
    mean, predicted = (normal(2, *SHAPE, seed=s).repeat_interleave(count, 0) for s in (1, 2))
    noise = torch.cat([torch.zeros(1, size, dtype=F64), torch.eye(size, dtype=F64)]).repeat(2, 1).view(-1, *SHAPE)
    gain = torch.tensor(gains, dtype=F64)
    moved, ratio = Conjugate()(likelihood, find_spectrum(likelihood), gain, slope, mean, v, predicted, noise, scale)
    for b in range(2):
        weight, a = gain[b] / likelihood.sigma[b] ** 2, scale * slope * matrix[b]
        precision = torch.eye(size, dtype=F64) / v + weight * a.mT @ a
        covariance = torch.linalg.inv(precision)
        residual = likelihood.y[b].flatten() - matrix[b] @ predicted[b * count].flatten()
        centre = mean[b * count].flatten() + weight * covariance @ (a.mT @ residual)
        rows = moved[b * count:(b + 1) * count].flatten(1)
        torch.testing.assert_close(rows[0], centre, rtol=1e-8, atol=1e-8)
        root = rows[1:] - rows[0]
        torch.testing.assert_close(root.mT @ root, covariance, rtol=1e-8, atol=1e-8)
        base = torch.distributions.MultivariateNormal(mean[b * count].flatten(), v * torch.eye(size, dtype=F64))
        proposal = torch.distributions.MultivariateNormal(centre, precision_matrix=(precision + precision.mT) / 2)
        expected = base.log_prob(rows) - proposal.log_prob(rows)
        torch.testing.assert_close(ratio[b * count:(b + 1) * count], expected, rtol=1e-7, atol=1e-6)


def test_without_a_spectrum_the_mean_is_found_by_conjugate_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    likelihood = likelihood_of(OPERATORS["blur"]())
    arguments = (torch.ones(2, dtype=F64), 0.7, normal(6, *SHAPE), 0.3, normal(6, *SHAPE, seed=1))
    zeros, noise = torch.zeros(6, *SHAPE, dtype=F64), normal(6, *SHAPE, seed=2)
    exact, _ = Conjugate()(likelihood, find_spectrum(likelihood), *arguments, zeros, 0.5)
    monkeypatch.setattr(structure, "_MOST_DENSE", 0)
    assert find_spectrum(likelihood) is None
    assert find_spectrum(likelihood_of(OPERATORS["masks"]())) is not None  # which needs no matrix
    found, _ = Conjugate(iterations=60)(likelihood, None, *arguments, zeros, 0.5)
    torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-6)
    moved, ratio = Conjugate(iterations=3)(likelihood, None, *arguments, noise, 0.5)
    centre, _ = Conjugate(iterations=3)(likelihood, None, *arguments, zeros, 0.5)
    torch.testing.assert_close(moved - centre, math.sqrt(0.3) * noise)
    change = (moved - arguments[2]).flatten(1)
    torch.testing.assert_close(ratio, 0.5 * (noise.flatten(1).square() - change.square() / 0.3).sum(1))


# -- exact weights -----------------------------------------------------------------------------------------------------

MEANS = torch.tensor([[0.0, 1.5, 0.3], [1.5, 0.0, -0.5], [-1.0, -1.0, 0.0]], dtype=F64)
MATRIX = torch.tensor([[1.0, 0.5, 0.2], [0.0, 1.0, -1.0]], dtype=F64)


def mixture() -> GaussianMixtureFlow:
    return GaussianMixtureFlow(MEANS, std=0.5, weights=torch.tensor([0.5, 0.3, 0.2]), steps=3)


class Skewed(FlowMap):
    """A map that was learned badly: its velocity is off, and its look-ahead in another way."""

    state_shape = image_shape = (3,)

    def velocity(self, x: Tensor, t: Any) -> Tensor:
        return mixture().velocity(x, t) + 0.4 * torch.sin(x.flip(1)) + torch.tensor([0.5, 0.0, -0.3], dtype=x.dtype)

    def jump(self, x: Tensor, s: Any, t: Any) -> Tensor:
        return 0.7 * x + 0.2

    @property
    def dtype(self) -> torch.dtype:
        return F64


def compare(solver: FMTT, sigma: float = 0.3, replicates: int = 24) -> float:
    """Distance of the mean, the second moment and the evidence from the tilted base sampler, in standard errors."""
    y = torch.tensor([[0.6, 0.2]], dtype=F64).expand(replicates, 2)
    likelihood = GaussianLikelihood(MatrixOperator(MATRIX), y, sigma=sigma)
    base = FMTT.prior_samples(solver, 30_000, generator=generator(3))
    score = likelihood.select([0])(base[None])[0].exp()
    weights = score / score.sum()
    posterior = solver.sample(likelihood, 200, generator=generator(1))
    assert posterior.log_evidence is not None
    apart = []
    for power in (1, 2):
        exact = (weights[:, None] * base**power).sum(0)
        error = (weights[:, None] * (base**power - exact)).square().sum(0).sqrt()
        found = (posterior.weights[..., None] * posterior.samples**power).sum(1)
        apart.append((found.mean(0) - exact) / (found.var(0) / replicates + error**2).sqrt())
    ratio = posterior.log_evidence.exp() / score.mean()
    spread = (ratio.var() / replicates + (score.std() / score.mean()) ** 2 / len(score)).sqrt()
    return float(torch.cat([*apart, (ratio.mean() - 1)[None] / spread]).abs().max())


@pytest.mark.parametrize("settings", [
    {"kernel": "ancestral", "look_ahead": "denoiser"}, {"look_ahead": "denoiser"},
    {"kernel": "ancestral", "look_ahead": "none"}, {"kernel": "renoise", "look_ahead": "flow_map", "steps": 5},
    {"kernel": "ancestral", "look_ahead": "denoiser", "proposal": Conjugate(spread=0.3)},
    {"kernel": "ancestral", "look_ahead": "denoiser", "proposal": "gradient"},
], ids=["ancestral", "sde", "none", "renoise", "wrong slope", "gradient"])
def test_twisted_weights_are_exact(settings: dict[str, Any]) -> None:
    solver = FMTT(mixture(), **{"steps": 8, "proposal": "conjugate", "schedule": "annealed", "chunk_size": 10**6,
                                **settings})
    assert compare(solver) < 3.5


@pytest.mark.parametrize("look_ahead", ["denoiser", "flow_map"])
def test_twisted_weights_are_exact_with_a_wrong_map(look_ahead: str) -> None:
    solver = FMTT(Skewed(), steps=8, kernel="ancestral", look_ahead=look_ahead, proposal="conjugate",
                  schedule="annealed", chunk_size=10**6)
    assert compare(solver, replicates=100) < 3.5


def test_twisted_weights_are_exact_with_conjugate_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(structure, "_MOST_DENSE", 0)
    solver = FMTT(mixture(), steps=8, kernel="ancestral", look_ahead="denoiser", proposal=Conjugate(iterations=1),
                  schedule="annealed", chunk_size=10**6)
    assert compare(solver) < 3.5


@dataclass(frozen=True)
class ForgetfulConjugate(Conjugate):
    """The density of q has the shift, and the covariance v I of the base step."""

    def propose(self, move: Move) -> tuple[Tensor, Tensor, Tensor]:
        x, _, capped = super().propose(move)
        centre, _, _ = super().propose(replace(move, noise=torch.zeros_like(move.noise)))
        near, far = (x - centre).square().flatten(1).sum(1), (x - move.mean).square().flatten(1).sum(1)
        return x, 0.5 * (near - far) / move.step.variance, capped


def test_the_comparison_sees_a_forgotten_covariance() -> None:
    settings: dict[str, Any] = {"steps": 8, "kernel": "ancestral", "look_ahead": "denoiser", "schedule": "annealed",
                                "proposal": ForgetfulConjugate(), "chunk_size": 10**6}
    assert compare(FMTT(mixture(), **settings)) > 6


# -- stiff likelihoods -------------------------------------------------------------------------------------------------


def stiff(replicates: int = 4) -> GaussianLikelihood:
    y = torch.tensor([[0.8]]).expand(replicates, 1)
    return GaussianLikelihood(Row(torch.tensor([[0.6, 0.8, 0.0]])), y, sigma=0.002)


def solve(proposal: str, steps: int = 40, **settings: Any) -> Posterior:
    solver = FMTT(Gaussian(), steps=steps, kernel="ancestral", look_ahead="denoiser", schedule="annealed",
                  time_grid=functools.partial(logit_grid, first=0.02, last=0.95), proposal=proposal, **settings)
    return solver.sample(stiff(), 400, generator=generator())


def test_the_weights_are_all_but_equal_where_the_surrogate_is_exact() -> None:
    """For N(0, I) and one row of unit length, the tilt is exactly p(y | x_t); only the error of the steps remains."""
    conjugated, followed = solve("conjugate"), solve("gradient")
    assert (conjugated.diagnostics["total_discrepancy"] < 0.2).all()
    assert conjugated.diagnostics["converged"].all()
    assert (conjugated.diagnostics["distinct_ancestors"] == 400).all()
    residual = stiff().residual(conjugated.samples).mean(1)
    assert ((residual - 1).abs() < 0.3).all()
    assert (followed.diagnostics["total_discrepancy"] > 3).all()
    assert (stiff().residual(followed.samples).mean(1) > 10).all()
    finer = solve("conjugate", steps=80).diagnostics["total_discrepancy"].mean()
    assert finer < 0.4 * conjugated.diagnostics["total_discrepancy"].mean()


def test_draws_without_weights_say_whether_they_may_stand_alone() -> None:
    posterior = solve("conjugate", weights="none")
    assert posterior.ess() is None
    assert posterior.log_evidence is None
    assert posterior.diagnostics["converged"].all()
    assert (posterior.diagnostics["resamplings"] == 0).all()
    prior = GaussianMixtureFlow(torch.zeros(1, 3), std=1.0)
    mean, covariance = ExactPosterior(prior).moments(stiff())
    assert ((posterior.mean() - mean).abs() < 4 * covariance.diagonal(dim1=1, dim2=2).sqrt() / 20).all()
    with pytest.warns(UserWarning, match="would, if they were weighted, amount to"):
        rough = solve("gradient", weights="none", max_shift=math.inf)
    assert not rough.diagnostics["converged"].any()


# -- the contract ------------------------------------------------------------------------------------------------------


def test_contract() -> None:
    check_solver(lambda prior: FMTT(prior, steps=12, kernel="ancestral", look_ahead="denoiser", schedule="annealed",
                                    proposal="conjugate"), exact=False, num_samples=48)


@pytest.mark.parametrize("name", ["masks", "matrices", "bicubic"])
def test_chunks_change_nothing(name: str) -> None:
    likelihood = likelihood_of(OPERATORS[name]())
    prior = GaussianMixtureFlow(normal(3, *SHAPE), std=0.5, steps=3)
    results = []
    for size in (3, 11, 100):
        solver = FMTT(prior, steps=4, kernel="ancestral", look_ahead="denoiser", schedule="annealed",
                      proposal="conjugate", resample_threshold=0.9, chunk_size=size)
        results.append(solver.sample(likelihood, 5, generator=generator()))
    for other in results[1:]:
        torch.testing.assert_close(other.samples, results[0].samples, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(other.log_weights, results[0].log_weights, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(("settings", "forward"), [
    ({"kernel": "ancestral", "look_ahead": "denoiser"}, 5),  # each look is the next step, and what it leads to
    ({"kernel": "ancestral"}, 5 + 5 + 4), ({"look_ahead": "denoiser"}, 5 + 4), ({"look_ahead": "none"}, 5),
])
def test_no_gradient_is_taken(settings: dict[str, Any], forward: int) -> None:
    posterior = FMTT(Gaussian(), steps=5, proposal="conjugate", **settings).sample(stiff(2), 6, generator=generator())
    assert (posterior.nfe.forward, posterior.nfe.backward) == (forward, 0)


class Squares(Operator):
    image_shape = measurement_shape = (3,)
    linear = False

    def forward(self, x: Tensor) -> Tensor:
        return x.square()


class Latent(Gaussian):
    """Decodes as nothing affine does."""

    @property
    def decode_affine(self) -> None:
        return None

    def decode(self, state: Tensor) -> Tensor:
        return state.sin()


def test_what_it_cannot_condition_on_is_refused() -> None:
    with pytest.raises(TypeError, match=r"not on a FunctionReward: pass proposal='gradient'"):
        FMTT(Gaussian(), steps=3, proposal="conjugate").sample(FunctionReward(lambda x: x[:, 0]), 2)
    with pytest.raises(ValueError, match="Squares is not linear"):
        FMTT(Gaussian(), steps=3, proposal="conjugate").sample(
            GaussianLikelihood(Squares(), torch.ones(1, 3), sigma=0.1), 2)
    with pytest.raises(ValueError, match=r"decoding of this .* is not affine"):
        FMTT(Latent(), steps=3, proposal="conjugate").sample(stiff(1), 2)


@pytest.mark.parametrize(("make", "message"), [
    (lambda: Conjugate(spread=0.0), "over 0"), (lambda: Conjugate(iterations=0), "at least 1"),
    (lambda: FMTT(Gaussian(), proposal="exact"), "'gradient' or 'conjugate'"),
    (lambda: FMTT(Gaussian(), proposal="conjugate", weights="jarzynski"), "proposal='gradient'"),
    (lambda: FMTT(Gaussian(), kernel="ancestral", weights="jarzynski"), "kernel='sde'"),
])
def test_settings_that_make_no_sense(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_prior_of_correlated_images_is_conditioned_without_overstepping() -> None:
    """Under a Gaussian with a photograph's spectrum, beside its exact mean; a spread of 1 runs away."""
    shipped = invflow.load_prior("photos")
    assert isinstance(shipped, invflow.NeuralFlowMap)
    prior = invflow.NeuralFlowMap((3, 24, 24), network="none", skip="spectral", mean=shipped.mean,
                                  spectrum=shipped.spectrum)
    operator = BoxInpainting((3, 24, 24), box=(10, 10), sides=None)
    g = generator()
    truth = prior.generate(2, 1, generator=g)
    likelihood = GaussianLikelihood(operator, operator.measure(truth, 0.02, generator=g), 0.02)
    exact = prior.decode(gaussian_estimate(prior.spectrum, prior.mean, prior.decode_affine, operator, likelihood.y,
                                           likelihood.sigma, iterations=1000))
    hole = ~operator.mask.expand(2, 3, 24, 24)

    def error(proposal: str | Conjugate) -> float:
        solver = FMTT(prior, steps=60, look_ahead="denoiser", kernel="ancestral", proposal=proposal, weights="none",
                      time_grid="logit")
        mean = solver.sample(likelihood, 16, generator=generator(1)).samples.mean(1)
        return float((mean - exact)[hole].square().mean().sqrt() / exact[hole].std())

    assert error("conjugate") < 0.3
    assert error(Conjugate()) > 5
