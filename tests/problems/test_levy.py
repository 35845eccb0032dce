"""Signals with independent increments: the Gibbs sampler against quadrature, the denoiser against closed forms."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

import invflow
from invflow.testing import check_problem
from invflow_problems.levy import INCREMENTS, OPERATORS, LevyFlow, levy_sigma
from invflow_problems.levy_gibbs import Increments, gibbs

F64 = torch.float64


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sums(d: int) -> Tensor:
    return torch.ones(d, d, dtype=F64).tril()


MATRIX = torch.tensor([[1.0, 0.4], [-0.3, 0.8], [0.5, 1.0]], dtype=F64)
Y, SIGMA = torch.tensor([1.5, -0.6, 1.2], dtype=F64), 0.5


def by_quadrature(law: Increments) -> tuple[Tensor, Tensor, float]:
    """Mean and second moments of two increments given Y, and the probability that the first is not zero."""
    side = -12 + 24 * (torch.arange(1600, dtype=F64) + 0.5) / 1600
    cell = 24 / 1600
    active = Increments(law.kind, law.scale)
    spots = [torch.cartesian_prod(side, side)]
    weights = [2 * math.log(law.active * cell) + active.log_prob(spots[0])]
    if law.active < 1:  # one of them zero, or both
        zero, one = torch.zeros(1600, dtype=F64), active.log_prob(side[:, None])
        for pair in ((side, zero), (zero, side)):
            spots.append(torch.stack(pair, 1))
            weights.append(math.log(law.active * cell * (1 - law.active)) + one)
        spots.append(torch.zeros(1, 2, dtype=F64))
        weights.append(torch.full((1,), 2 * math.log(1 - law.active), dtype=F64))
    u = torch.cat(spots)
    mass = (torch.cat(weights) - 0.5 * ((Y - u @ MATRIX.T) / SIGMA).square().sum(1)).softmax(0)
    return mass @ u, mass @ torch.stack([u[:, 0] ** 2, u[:, 1] ** 2, u[:, 0] * u[:, 1]], 1), float(
        mass[u[:, 0] != 0].sum())


LAWS = {**INCREMENTS, "often zero": Increments("bernoulli-laplace", 1.0, 0.4)}


@pytest.mark.parametrize("name", LAWS)
def test_chains_have_the_moments_of_quadrature(name: str) -> None:
    law, chains, kept = LAWS[name], 400, 60
    wanted = by_quadrature(law)
    states = gibbs(law, MATRIX, Y.expand(chains, 3), torch.full((chains,), SIGMA, dtype=F64), seeded())
    # one number for each chain, so that the error is known however slowly chains mix
    u = torch.stack([state.u for state in itertools.islice(states, 60, 60 + kept)], 1)
    moments = torch.cat([u.mean(1), u.square().mean(1), (u[..., :1] * u[..., 1:]).mean(1),
                         (u[..., :1] != 0).double().mean(1)], 1)
    expected = torch.cat([wanted[0], wanted[1], torch.tensor([wanted[2]], dtype=F64)])
    error = moments.std(0) / math.sqrt(chains)
    assert bool(((moments.mean(0) - expected).abs() < 4.5 * error + 1e-9).all()), (moments.mean(0), expected, error)


@pytest.mark.parametrize("name", LAWS)
def test_increments_have_their_own_law(name: str) -> None:
    law = LAWS[name]
    u = law.sample((40_000,), seeded(1))
    density = {"gauss": torch.distributions.Normal(0.0, 0.5), "laplace": torch.distributions.Laplace(0.0, 1.0),
               "bernoulli-laplace": torch.distributions.Laplace(0.0, 1.0)}.get(law.kind)
    for edge in (0.3, 1.0, 3.0):
        if density is not None:
            inside = 2 * float(density.cdf(torch.tensor(edge))) - 1
        else:
            inside = {1: 2 / math.pi * math.atan(edge), 2: edge / math.sqrt(2 + edge**2),
                      3: 2 / math.pi * (math.atan(edge / 3**0.5) + edge / 3**0.5 / (1 + edge**2 / 3))}[int(law.scale)]
        share = 1 - law.active * (1 - inside)
        assert float((u.abs() < edge).double().mean()) == pytest.approx(share, abs=5 * 0.5 / 200)


def test_gaussian_signals_have_the_closed_form() -> None:
    problem = invflow.load_problem("levy/gauss-convolution")
    _, likelihood = problem.simulate(1, generator=seeded())
    n = 4000
    x = problem.exact_posterior().sample(likelihood, n, generator=seeded()).samples[0].double()
    matrix, covariance = likelihood.operator.matrix[0].double(), 0.25 * sums(64) @ sums(64).T
    total = matrix @ covariance @ matrix.T + likelihood.sigma.double() ** 2 * torch.eye(64, dtype=F64)
    gain = covariance @ matrix.T @ torch.linalg.inv(total)
    mean, variance = gain @ likelihood.y[0].double(), (covariance - gain @ matrix @ covariance).diagonal()
    assert bool(((x.mean(0) - mean).abs() < 5 * (variance / n).sqrt()).all())
    assert bool(((x.var(0) / variance - 1).abs() < 5 * math.sqrt(2 / n)).all())


def test_gaussian_denoiser_and_its_gradient_have_the_closed_form() -> None:
    prior = LevyFlow(INCREMENTS["gauss"])
    covariance = 0.25 * sums(64) @ sums(64).T
    x = torch.randn(3, 64, generator=seeded(), dtype=F64)
    for t in (0.2, 0.7):
        gain = t * covariance @ torch.linalg.inv(t**2 * covariance + (1 - t) ** 2 * torch.eye(64, dtype=F64))
        torch.testing.assert_close(prior.denoise(x, t), x @ gain.T)
        state = x.clone().requires_grad_()
        ahead = torch.randn(3, 64, generator=seeded(1), dtype=F64)
        (gradient,) = torch.autograd.grad((prior.denoise(state, t) * ahead).sum(), state)
        torch.testing.assert_close(gradient, ahead @ gain)


def test_denoiser_is_the_mean_of_long_chains_and_a_function_of_its_row() -> None:
    law, t = INCREMENTS["laplace"], 0.6
    x = torch.randn(2, 64, generator=seeded(), dtype=F64)
    few, many = LevyFlow(law, sweeps=20), LevyFlow(law, sweeps=1500)
    torch.testing.assert_close(few.denoise(x, t)[1:], few.denoise(x[1:], t))
    level = torch.full((80,), (1 - t) / t, dtype=F64)
    states = gibbs(law, sums(64), (x / t).repeat_interleave(40, 0), level, seeded(2))
    means = torch.stack([state.mean @ sums(64).T for state in itertools.islice(states, 50, 120)]).mean(0)
    by_chain = means.unflatten(0, (2, 40))
    error = by_chain.std(1) / math.sqrt(40)
    off = (many.denoise(x, t) - by_chain.mean(1)) / (error**2 + by_chain.var(1) * 70 / 1500).sqrt()
    assert float(off.abs().max()) < 5.5
    assert float((few.denoise(x, t) - by_chain.mean(1)).abs().max()) < 0.5


def test_gradient_of_the_denoiser_is_the_slope_that_long_chains_have() -> None:
    prior, t = LevyFlow(INCREMENTS["laplace"], sweeps=400), 0.5
    x = torch.randn(1, 64, generator=seeded(3), dtype=F64)
    ahead = torch.zeros(1, 64, dtype=F64)
    ahead[0, 20:40] = 1.0
    state = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad((prior.denoise(state, t) * ahead).sum(), state)
    step = 0.5 * torch.ones_like(x)
    slope = ((prior.denoise(x + step, t) - prior.denoise(x - step, t)) * ahead).sum()
    assert float((gradient * 2 * step).sum()) == pytest.approx(float(slope), rel=0.1)


def test_noise_is_25_decibels_below_the_measurements() -> None:
    problem = invflow.load_problem("levy/laplace-sampling")
    truth, likelihood = problem.simulate(2000, generator=seeded())
    power = problem.operator(truth).square().mean(1).median()
    level = 10 * math.log10(float(power) / levy_sigma("laplace", "sampling") ** 2)
    assert level == pytest.approx(25, abs=0.5)
    assert float(likelihood.sigma[0]) == pytest.approx(levy_sigma("laplace", "sampling"))


def test_operators_of_the_benchmark() -> None:
    x = torch.randn(1, 64, generator=seeded())
    shapes = {name: invflow.load_problem(f"levy/gauss-{name}").operator(x) for name in OPERATORS}
    assert {name: y.shape[1] for name, y in shapes.items()} == {
        "identity": 64, "convolution": 64, "sampling": 26, "fourier": shapes["fourier"].shape[1]}
    torch.testing.assert_close(shapes["identity"], x)
    kernel = torch.zeros(64, dtype=F64)
    kernel[torch.arange(-6, 7)] = (-0.5 * (torch.arange(-6, 7, dtype=F64) / 2) ** 2).exp()
    by_fft = torch.fft.ifft(torch.fft.fft(x.double()) * torch.fft.fft(kernel / kernel.sum())).real
    torch.testing.assert_close(shapes["convolution"].double(), by_fft, rtol=0, atol=1e-6)
    transform = torch.fft.rfft(x.double())[0]
    for value in shapes["fourier"][0, :5].double():
        assert float((transform.real - value).abs().min()) < 1e-4
    torch.testing.assert_close(shapes["fourier"][0, :5].double(), transform.real[:5], rtol=0, atol=1e-4)


def test_a_problem_keeps_the_contract_and_exact_its_certificate() -> None:
    check_problem(invflow.load_problem("levy/gauss-identity"))
    problem = invflow.load_problem("levy/gauss-fourier")
    certificate = invflow.calibrate(problem.exact_posterior(), problem, num_simulations=100, generator=seeded())
    assert certificate.verdict == "passes"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["levy/student-1-convolution", "levy/bernoulli-laplace-sampling"])
def test_chains_are_calibrated_where_they_mix_slowest(name: str) -> None:
    problem = invflow.load_problem(name)
    certificate = invflow.calibrate(problem.exact_posterior(), problem, num_simulations=60, num_samples=19,
                                    num_particles=19, generator=seeded())
    assert certificate.verdict != "fails"  # so few simulations certify nothing, but none of the checks rejects
    assert all(check.passed for check in certificate.checks.values())


def test_others_are_refused() -> None:
    problem = invflow.load_problem("levy/laplace-identity")
    with pytest.raises(TypeError, match="LevyPosterior takes"):
        problem.exact_posterior().sample(invflow.FunctionReward(lambda x: x[:, 0]), 2)
    with pytest.raises(ValueError, match="averages at least one"):
        LevyFlow(INCREMENTS["laplace"], sweeps=0)
