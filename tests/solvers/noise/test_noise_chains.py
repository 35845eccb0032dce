"""Hamiltonian moves, the metric of the likelihood, and chains that start from draws of randomise-then-optimise."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from noise_tools import F64, MATRIX, generator, randn
from torch import Tensor

from invflow import ExactPosterior, FlowMap, FunctionReward, GaussianLikelihood, GaussianMixtureFlow, NoiseRTO, NoiseSMC
from invflow.operators import MatrixOperator
from invflow.solvers.noise.hamiltonian import Hamiltonian
from invflow.solvers.noise.metric import Metric, Preconditioner
from invflow.solvers.noise.target import NoiseTarget
from invflow.testing import check_solver


class Bent(FlowMap):
    """f(z) = (z0, z1 + a (z0^2 - 1)): smooth and nonlinear."""

    state_shape = image_shape = (2,)

    def __init__(self, a: float = 0.8) -> None:
        super().__init__()
        self.a = a
        self.register_buffer("one", torch.ones((), dtype=F64))

    def velocity(self, x: Tensor, t: Any) -> Tensor:
        return torch.zeros_like(x)

    def jump(self, x: Tensor, s: Any, t: Any) -> Tensor:
        first, second = x.unbind(1)
        return torch.stack([first, second + self.a * (first.square() - 1)], dim=1)


def ring() -> GaussianMixtureFlow:
    angle = torch.arange(5, dtype=F64) * 2 * math.pi / 5
    return GaussianMixtureFlow(2 * torch.stack([angle.cos(), angle.sin()], dim=1), 0.6,
                               torch.arange(1, 6), steps=4)


def measured(y: list[float], sigma: float | Tensor = 0.4, matrix: Tensor = MATRIX) -> GaussianLikelihood:
    operator = MatrixOperator(matrix, image_shape=(matrix.shape[1],))
    return GaussianLikelihood(operator, torch.tensor(y, dtype=F64)[:, None].expand(-1, len(matrix)), sigma)


def within(estimates: Tensor, truth: Tensor, standard_errors: float = 4.5) -> None:
    error = estimates.std(0) / math.sqrt(len(estimates))
    distance = (estimates.mean(0) - truth).abs()
    assert bool((distance <= standard_errors * error).all()), (distance / error).tolist()


def features(z: Tensor) -> Tensor:
    first, second = z.unbind(-1)
    return torch.stack([first, second, first.square(), second.square(), first * second, first**3, first**2 * second,
                        (2 * first).sin() * second], dim=-1)


def turned(shrink: list[float], angle: float = 0.7) -> Metric:
    """A metric of two directions, at an angle with the axes, for two observations."""
    basis = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]], dtype=F64)
    return Metric(basis.expand(2, 2, 2), torch.tensor(shrink, dtype=F64).expand(2, 2))


# -- moves --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prior", [ring(), Bent()], ids=["mixture", "bent"])
@pytest.mark.parametrize("shrink", [None, [0.4, 1.0], [0.9, 0.25]], ids=["plain", "oneway", "anotherway"])
def test_hamiltonian_moves_leave_a_nonlinear_target_as_it_is(prior: FlowMap, shrink: list[float] | None) -> None:
    """From exact draws at two temperatures, by rejection from the prior, to draws of the same, in any metric."""
    likelihood, temperature = measured([0.9, -1.4], 0.6), torch.tensor([0.3, 1.0], dtype=F64)
    rows, n = torch.arange(2), 3000
    target = NoiseTarget(prior, likelihood, gradient=True, chunk_size=200_000)
    z = randn(10 * n, 2, seed=1)
    with torch.no_grad():
        score = likelihood(prior.one_step(z).expand(2, -1, -1))
    keep = torch.rand(2, 10 * n, generator=generator(2), dtype=F64).log() < temperature[:, None] * (
        score - score.max(1, keepdim=True).values)
    count = min(n, int(keep.sum(1).min()))
    assert count > 1000
    draws = torch.stack([z[k][:count] for k in keep])
    particles, move = target.evaluate(draws, rows), Hamiltonian(steps=3, preconditioned=shrink is not None)
    preconditioner = Preconditioner(2)
    preconditioner.metric = None if shrink is None else turned(shrink)
    for k in range(2):
        random = move.draw((2, count, 2), generator(10 + k)).to(draws)
        particles, accepted = move(target, particles, rows, temperature, torch.tensor([0.6, 0.5], dtype=F64), random,
                                   preconditioner)
        assert bool(((accepted > 0.3) & (accepted < 0.995)).all()), accepted
    change = features(particles.noise) - features(draws)  # paired: most of the noise of the draws cancels
    for b in range(2):
        within(change[b], torch.zeros(8, dtype=F64))
    again = target.evaluate(particles.noise, rows)
    torch.testing.assert_close(again.log_reward, particles.log_reward)
    torch.testing.assert_close(again.gradient, particles.gradient)


def test_one_step_of_a_gaussian_is_exact_without_a_reward() -> None:
    """Rotations leave N(0, I) as it is at any step: nothing is rejected, in the metric of nothing."""
    reward = FunctionReward(lambda x: 0.0 * x.sum(1))
    target = NoiseTarget(Bent(), reward, gradient=True)
    particles = target.evaluate(randn(1, 500, 2), torch.arange(1))
    move = Hamiltonian(steps=4)
    one = torch.ones(1, dtype=F64)
    moved, accepted = move(target, particles, torch.arange(1), one, 0.9 * one, move.draw((1, 500, 2), generator()).to(
        particles.noise))
    assert float(accepted) == 1.0
    assert float((moved.noise - particles.noise).abs().mean()) > 0.3


@pytest.mark.parametrize("dimension", [20, 2000])
def test_acceptance_does_not_fall_with_the_dimension(dimension: int) -> None:
    prior = GaussianMixtureFlow(torch.zeros(1, dimension, dtype=F64), std=1.0)
    matrix = torch.zeros(3, dimension, dtype=F64)
    matrix[:, :3] = torch.diag(torch.tensor([1.0, 2.0, 4.0], dtype=F64))
    likelihood = measured([0.5], 0.2, matrix)
    rows, one = torch.arange(1), torch.ones(1, dtype=F64)
    target = NoiseTarget(prior, likelihood, gradient=True)
    precision = 1 + (matrix[:, :3].diag() / 0.2) ** 2
    z = randn(1, 200, dimension)
    z[..., :3] = z[..., :3] / precision.sqrt() + (0.5 * matrix[:, :3].diag() / 0.04) / precision
    basis = torch.zeros(1, dimension, 3, dtype=F64)
    basis[0, :3] = torch.eye(3, dtype=F64)
    preconditioner = Preconditioner(1)
    preconditioner.metric = Metric(basis, precision.rsqrt()[None])
    for move, step, low, high in ((Hamiltonian(8, True), 0.8, 0.75, 1.0), (Hamiltonian(8), 0.8, 0.0, 0.05),
                                  (Hamiltonian(8), 0.04, 0.7, 1.0)):
        random = move.draw((1, 200, dimension), generator()).to(z)
        _, accepted = move(target, target.evaluate(z, rows), rows, one, step * one, random,
                           preconditioner if move.preconditioned else None)
        assert low <= float(accepted) <= high, (move.preconditioned, step)


# -- the metric -----------------------------------------------------------------------------------------------------


def test_metric_is_a_linear_map_and_its_excess_the_difference_of_energies() -> None:
    basis = torch.linalg.qr(randn(2, 7, 3)).Q
    metric = Metric(basis, torch.tensor([[0.2, 0.5, 1.0], [0.9, 0.1, 0.3]], dtype=F64))
    w = randn(2, 4, 7, seed=1).requires_grad_()
    torch.testing.assert_close(metric.whiten(metric.stretch(w)), w)
    half, slope = metric.excess(w)
    expected = 0.5 * (metric.stretch(w).square().sum(2) - w.square().sum(2))
    torch.testing.assert_close(half, expected)
    torch.testing.assert_close(slope, torch.autograd.grad(expected.sum(), w)[0])
    torch.testing.assert_close(metric.select(torch.tensor([1])).stretch(w[1:]), metric.stretch(w)[1:])


def test_metric_learnt_from_gradients_whitens_a_gaussian_posterior() -> None:
    """In units w the posterior of a linear problem is N(., I), to the error of so many gradients."""
    matrix = randn(3, 6) * torch.tensor([[1.0], [3.0], [10.0]], dtype=F64)
    information = matrix.T @ matrix / 0.25
    rows, level = torch.arange(2), torch.tensor([0.3, 1.0], dtype=F64)
    preconditioner = Preconditioner(2, power=1.0)
    # gradients of a posterior at the temperature 0.6: their covariance is F / 0.6
    root = torch.linalg.cholesky(information + 1e-12 * torch.eye(6, dtype=F64)) / math.sqrt(0.6)
    for k in range(40):
        preconditioner.see(rows, randn(2, 400, 6, seed=k) @ root.T)
    preconditioner.fit(rows, torch.full((2,), 0.6, dtype=F64), level, torch.ones((), dtype=F64))
    assert preconditioner.metric is not None
    for b in range(2):
        unit = torch.eye(6, dtype=F64)
        k = preconditioner.metric.select(rows[b:b + 1]).stretch(unit[None])[0]
        whitened = torch.linalg.eigvalsh(k @ (unit + level[b] * information) @ k)
        # 512 gradients: an eigenvalue is known to 1 +- 2 sqrt(6 / 512), and the metric has its inverse
        assert float(whitened.min()) > 0.75
        assert float(whitened.max()) < 1.35
    kept = preconditioner.metric
    preconditioner.recording = False
    preconditioner.forget()
    preconditioner.see(rows, randn(2, 4, 6))
    preconditioner.fit(rows, level, level, torch.ones((), dtype=F64))
    assert preconditioner.metric is kept
    # another fit of one observation leaves the other's metric as it is
    preconditioner.recording = True
    preconditioner.see(rows[:1], randn(1, 30, 6))
    preconditioner.fit(rows[:1], level[:1], level[:1], torch.ones((), dtype=F64))
    w = randn(2, 3, 6, seed=5)
    torch.testing.assert_close(preconditioner.metric.stretch(w)[1], kept.stretch(w)[1])
    assert not torch.allclose(preconditioner.metric.stretch(w)[0], kept.stretch(w)[0])


# -- chains from randomise-then-optimise ----------------------------------------------------------------------------


OPTIONS: dict[str, Any] = {"leapfrog_steps": 4, "num_moves": 3, "num_adaptations": 3}


@pytest.mark.filterwarnings("ignore:not converged")  # Langevin moves are too few, and say so
@pytest.mark.parametrize("options", [{}, {"moves": "crank-nicolson-langevin"}, {"weights": True}], ids=str)
def test_contract(options: dict[str, Any]) -> None:
    weights = options.pop("weights", False) if "weights" in options else False
    moves = dict(options)

    def build(prior: FlowMap) -> NoiseSMC:
        start = NoiseRTO(prior, weights=weights, tolerance=1e-3, chunk_size=10_000)
        return NoiseSMC(prior, start=start, chunk_size=10_000, **OPTIONS, **moves)

    check_solver(build, num_samples=64, replicates=8)


def test_moves_correct_what_randomise_then_optimise_gets_wrong() -> None:
    """A bent posterior: the draws' moments are off, those of the chains that start in them are not."""
    prior, likelihood = Bent(), measured([0.6], 0.3, torch.tensor([[0.3, 1.0]], dtype=F64))
    axis = torch.linspace(-6, 6, 801, dtype=F64)
    grid = torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        weights = (likelihood(prior.one_step(grid)[None])[0] - 0.5 * grid.square().sum(1)).softmax(0)
    truth = weights @ features(grid)
    n = 4000
    solver = NoiseSMC(prior, start=NoiseRTO(prior, tolerance=1e-3, chunk_size=n), num_moves=60, leapfrog_steps=5,
                      chunk_size=n)
    states = list(solver.iterate(likelihood, n, generator=generator()))
    first, last = features(states[0].particles.noise[0]), features(states[-1].particles.noise[0])
    assert float(((first.mean(0) - truth) / (first.std(0) / math.sqrt(n))).abs().max()) > 10
    within(last, truth)
    assert len(states) == 1 + 3 + 60
    assert [state.adapting for state in states] == [True] * 4 + [False] * 60
    steps = torch.stack([state.step_size for state in states[4:]])
    assert bool((steps == steps[0]).all())  # frozen
    acceptance = torch.stack([state.acceptance for state in states[4:]])
    assert 0.6 < float(acceptance.mean()) < 0.99


def test_weighted_start_has_evidence_and_forgets_the_proposal() -> None:
    prior = GaussianMixtureFlow(torch.tensor([[-0.7, 0.2], [0.8, 0.1]], dtype=F64), 0.8, steps=4)
    likelihood = measured([0.5, 0.1])
    start = NoiseRTO(prior, weights=True, chunk_size=10_000)
    solver = NoiseSMC(prior, start=start, chunk_size=10_000, **OPTIONS)
    posterior = solver.sample(likelihood, 1000, generator=generator())
    exact = ExactPosterior(prior)
    torch.testing.assert_close(posterior.log_evidence, exact.log_evidence(likelihood), rtol=0, atol=0.1)
    mean = exact.sample(likelihood, 20_000, generator=generator(1)).mean()
    torch.testing.assert_close(posterior.mean(), mean, rtol=0, atol=6 * 0.8 / math.sqrt(1000))
    assert bool((posterior.diagnostics["distinct_ancestors"] < 1000).all())
    assert bool(posterior.diagnostics["converged"].all())
    plain = NoiseSMC(prior, start="rto", **OPTIONS).sample(likelihood, 50, generator=generator())
    assert plain.log_evidence is None
    assert plain.diagnostics["distinct_ancestors"].tolist() == [50, 50]
    assert plain.settings["start"] == "rto"
    assert posterior.settings["start"]["weights"] is True


def test_cost_of_a_start() -> None:
    prior, likelihood = Bent(), measured([0.5, 0.1])
    rto = NoiseRTO(prior).sample(likelihood, 20, generator=generator())
    posterior = NoiseSMC(prior, start="rto", **OPTIONS).sample(likelihood, 20, generator=generator())
    # the draws without their images and bend; their evaluation; adaptations of 2, 3 and 4 steps; 3 moves of 4
    assert posterior.nfe.forward == pytest.approx(rto.nfe.forward - 2 + 1 + 9 + 12)
    assert posterior.nfe.backward == pytest.approx(rto.nfe.backward + 1 + 9 + 12)


def test_it_says_when_chains_have_not_gone_far_enough() -> None:
    prior, likelihood = Bent(), measured([0.5, 0.1])
    short = NoiseSMC(prior, start="rto", num_moves=1, leapfrog_steps=1, num_adaptations=0, step_size=0.05)
    with pytest.warns(UserWarning, match=r"2 of 2 observations.*quarter turns") as seen:
        posterior = short.sample(likelihood, 40, generator=generator())
    assert seen[0].filename == __file__
    assert not bool(posterior.diagnostics["converged"].any())
    stuck = NoiseSMC(prior, start="rto", num_moves=2, num_adaptations=0, step_size=1.0, moves="crank-nicolson")
    sharp = measured([0.5], 0.002)
    with pytest.warns(UserWarning, match="of the particles have moved"):
        stuck.sample(sharp, 40, generator=generator())
    # x1 is nearly 4 (x0^2 - 1) and measured: x0 has two signs, and chains keep theirs
    folded, across = Bent(a=4.0), measured([12.0], 0.3, torch.tensor([[0.0, 1.0]], dtype=F64))
    with pytest.warns(UserWarning, match="correlated with their starts"):
        posterior = NoiseSMC(folded, start="rto", num_moves=2, leapfrog_steps=5).sample(
            across, 40, generator=generator())
    assert float(posterior.diagnostics["memory"][0]) > 0.8
    # from draws that are far from any minimum the potential drifts while the chains go there
    lost = NoiseSMC(prior, start=NoiseRTO(prior, max_iterations=1), num_moves=2, leapfrog_steps=2)
    with pytest.warns(UserWarning, match="first draws reached a minimum"):
        lost.sample(measured([3.0], 0.1), 40, generator=generator())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        posterior = NoiseSMC(prior, start="rto").sample(likelihood, 100, generator=generator())
    assert bool(posterior.diagnostics["converged"].all())
    assert bool((posterior.diagnostics["drift"].abs() < 4).all())
    assert bool((posterior.diagnostics["memory"].abs() < 0.4).all())


def test_refuses() -> None:
    prior = Bent()
    for options, match in (({"start": "adapter"}, "'adapter'"), ({"start": "rto", "num_moves": 0}, "temperature 1"),
                           ({"start": NoiseRTO(Bent())}, "another prior"), ({"leapfrog_steps": 0}, "leapfrog_steps=0"),
                           ({"start": "rto", "temperatures": [1.0]}, "temperature 1"),
                           ({"acceptance": "worst"}, "worst")):
        with pytest.raises(ValueError, match=match):
            NoiseSMC(prior, **options)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="NoiseRTO"):
        NoiseSMC(prior, start=3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="Gaussian"):
        NoiseSMC(prior, start="rto").sample(FunctionReward(lambda x: x[:, 0]), 4)
