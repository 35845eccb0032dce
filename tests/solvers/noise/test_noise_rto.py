"""NoiseRTO against closed forms: exact in the linear case, weighted otherwise, and its diagnostics."""

from __future__ import annotations

import itertools
import math
import warnings
from typing import Any

import pytest
import torch
from noise_tools import F64, GaussianProposal, generator, randn, within
from torch import Tensor

import invflow
from invflow import ExactPosterior, FlowMap, FunctionReward, GaussianLikelihood, GaussianMixtureFlow, NoiseRTO
from invflow.operators import MatrixOperator
from invflow.registry import solver_by_name
from invflow.solvers.noise.lbfgs import BatchedLBFGS
from invflow.testing import check_solver


class Bent(FlowMap):
    """f(z) = (z0, z1 + a (z0^2 - 1) + b sin z1): smooth, nonlinear, its posterior known by quadrature."""

    state_shape = image_shape = (2,)

    def __init__(self, a: float = 0.3, b: float = 0.4) -> None:
        super().__init__()
        self.a, self.b = a, b
        self.register_buffer("one", torch.ones((), dtype=F64))

    def velocity(self, x: Tensor, t: Any) -> Tensor:
        return torch.zeros_like(x)

    def jump(self, x: Tensor, s: Any, t: Any) -> Tensor:
        first, second = x.unbind(1)
        return torch.stack([first, second + self.a * (first.square() - 1) + self.b * second.sin()], dim=1)


def quadrature(prior: FlowMap, likelihood: GaussianLikelihood) -> tuple[Tensor, Tensor]:
    """Moments E[x0, x1, x0^2, x1^2, x0 x1] ``(B, 5)`` and log evidence ``(B,)`` of a two-dimensional posterior."""
    axis = torch.linspace(-7, 7, 701, dtype=F64)
    z = torch.cartesian_prod(axis, axis)
    x = prior.one_step(z)
    log_prior = -0.5 * z.square().sum(1) - math.log(2 * math.pi) + 2 * math.log(float(axis[1] - axis[0]))
    log_joint = log_prior + likelihood(x.expand(len(likelihood.y), -1, -1))
    weights = log_joint.softmax(1)
    return weights @ features(x), log_joint.logsumexp(1)


def features(x: Tensor) -> Tensor:
    first, second = x.unbind(-1)
    return torch.stack([first, second, first.square(), second.square(), first * second], dim=-1)


# -- the optimiser ------------------------------------------------------------------------------------------------


def test_lbfgs_finds_the_minimum_of_each_row_and_costs_nothing_after_it() -> None:
    condition = torch.tensor([1.0, 1e2, 1e4], dtype=F64)
    target, calls = randn(3, 6), torch.zeros(3, dtype=torch.long)

    def objective(point: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        calls[rows] += 1
        stretch = condition[rows, None] ** torch.linspace(0, 1, 6, dtype=F64)
        offset = point - target[rows]
        return 0.5 * (stretch * offset.square()).sum(1), stretch * offset

    optimiser = BatchedLBFGS(objective, torch.zeros(3, 6, dtype=F64), tolerance=1e-12, memory=8)
    alone = BatchedLBFGS(lambda p, r: objective(p, r + 1), torch.zeros(1, 6, dtype=F64), tolerance=1e-12, memory=8)
    calls.zero_()
    while bool(optimiser.active.any()):
        optimiser.step()
    assert bool(optimiser.levelled.all())
    torch.testing.assert_close(optimiser.point, target, rtol=0, atol=1e-5)
    assert calls[0] < calls[2]
    assert bool((calls <= 1.6 * optimiser.iterations + 2).all())
    while bool(alone.active.any()):
        alone.step()
    torch.testing.assert_close(alone.point[0], optimiser.point[1])


def test_lbfgs_on_a_bent_valley() -> None:
    """Rosenbrock's function, from places that differ; quicker than 100 iterations."""

    def objective(point: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            x = point.detach().requires_grad_()
            value = (1 - x[:, 0]).square() + 100 * (x[:, 1] - x[:, 0].square()).square()
            gradient, = torch.autograd.grad(value.sum(), x)
        return value.detach(), gradient

    start = torch.tensor([[-1.2, 1.0], [2.0, 2.0], [0.0, -1.0]], dtype=F64)
    optimiser = BatchedLBFGS(objective, start, tolerance=1e-10)
    for _ in range(100):
        optimiser.step()
    assert not bool(optimiser.active.any())
    torch.testing.assert_close(optimiser.point, torch.ones_like(start), rtol=0, atol=1e-4)
    assert float((optimiser.value - objective(optimiser.point, torch.arange(3))[0]).abs().max()) == 0


# -- without weights ------------------------------------------------------------------------------------------------


OFF_CENTRE = GaussianProposal(torch.tensor([0.6, -0.2], dtype=F64), torch.tensor([0.7, 1.3], dtype=F64))


@pytest.mark.parametrize("options", [
    {}, {"proposal": OFF_CENTRE}, {"weights": True}, {"weights": True, "proposal": OFF_CENTRE},
])
def test_contract(options: dict[str, Any]) -> None:
    """The contract includes the closed form of the conjugate Gaussian: mean, variance, and evidence if there is one."""
    check_solver(lambda prior: NoiseRTO(prior, tolerance=1e-3, chunk_size=10_000, **options), num_samples=64,
                 replicates=8)


@pytest.mark.parametrize("weights", [False, True])
def test_exact_where_all_is_linear(weights: bool) -> None:
    """Mean and covariance of 8 dimensions of which 5 combinations are measured, sharply."""
    prior = GaussianMixtureFlow(randn(1, 8), std=0.8)
    operator = MatrixOperator(randn(5, 8, seed=1), image_shape=(8,))
    likelihood = GaussianLikelihood(operator, randn(2, 5, seed=2), torch.tensor([0.05, 0.5], dtype=F64))
    posterior = NoiseRTO(prior, weights=weights, tolerance=1e-6, chunk_size=3000).sample(
        likelihood, 3000, generator=generator())
    mean, covariance = _closed_form(prior, likelihood)
    for b in range(2):
        centred = posterior.samples[b] - mean[b]
        within(centred, torch.zeros(8, dtype=F64))
        within(torch.einsum("ni,nj->nij", centred, centred), covariance[b])
    assert bool(posterior.diagnostics["converged"].all())
    assert weights or float(posterior.diagnostics["bend"].max()) < 1e-9
    assert posterior.diagnostics["approximate"] is not weights
    if weights:  # where the linearisation is exact, so is the density: all weights are equal
        torch.testing.assert_close(posterior.ess(), torch.full((2,), 3000.0, dtype=F64))
        torch.testing.assert_close(posterior.log_evidence, ExactPosterior(prior).log_evidence(likelihood))
    else:
        assert posterior.ess() is None
        assert posterior.log_evidence is None


def _closed_form(prior: GaussianMixtureFlow, likelihood: GaussianLikelihood) -> tuple[Tensor, Tensor]:
    """Mean ``(B, d)`` and covariance ``(B, d, d)`` for one Gaussian and a matrix."""
    matrix, unit = likelihood.operator(torch.eye(8, dtype=F64)).T, torch.eye(8, dtype=F64)
    precision = unit / 0.8**2 + matrix.T @ matrix / likelihood.sigma[:, None, None] ** 2
    covariance = torch.linalg.inv(precision)
    pull = prior.means[0] / 0.8**2 + likelihood.y @ matrix / likelihood.sigma[:, None] ** 2
    return (covariance @ pull[..., None])[..., 0], covariance


def test_cost_is_counted_and_a_proposal_changes_the_cost_alone() -> None:
    prior = GaussianMixtureFlow(randn(1, 8), std=0.8)
    likelihood = GaussianLikelihood(MatrixOperator(randn(5, 8, seed=1), image_shape=(8,)), randn(1, 5, seed=2), 0.02)
    std = torch.linspace(0.3, 1.0, 8, dtype=F64)
    far = NoiseRTO(prior, tolerance=1e-6).sample(likelihood, 40, generator=generator())
    near = NoiseRTO(prior, tolerance=1e-6, proposal=GaussianProposal(randn(8), std)).sample(
        likelihood, 40, generator=generator())
    torch.testing.assert_close(near.samples, far.samples, rtol=0, atol=1e-2)
    iterations = float(far.diagnostics["iterations"][0])
    # one call forward and backward for each iteration, a few for shortened steps, one to start, one for the image
    # and one between two draws
    assert iterations + 1 <= far.nfe.backward <= 1.8 * iterations + 1
    assert far.nfe.forward == pytest.approx(far.nfe.backward + 2)
    assert far.nfe != near.nfe


# -- with weights -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("matrix", [[[0.4, 1.0]], [[1.0, 0.0], [0.3, 1.0]]], ids=["one value", "two values"])
def test_weights_against_quadrature(matrix: list[list[float]]) -> None:
    """A nonlinear map: the weighted draws have the posterior's moments and evidence, the plain ones have not."""
    prior, operator = Bent(), MatrixOperator(torch.tensor(matrix, dtype=F64), image_shape=(2,))
    y = torch.tensor([[0.9], [-0.4]], dtype=F64).expand(-1, len(matrix))
    likelihood = GaussianLikelihood(operator, y, sigma=0.4)
    truth, evidence = quadrature(prior, likelihood)
    runs = 24
    solver = NoiseRTO(prior, weights=True, chunk_size=100_000)
    posterior = solver.sample(likelihood.select([0, 1] * runs), 1500, generator=generator())
    assert bool(posterior.diagnostics["converged"].all())
    estimates = (posterior.weights[..., None] * features(posterior.samples)).sum(1).view(runs, 2, 5)
    within(estimates, truth)
    within((posterior.log_evidence.view(runs, 2) - evidence).exp(), torch.ones(2, dtype=F64))
    # the test has the power to tell: without the weights the same draws miss
    plain = features(posterior.samples).mean(1).view(runs, 2, 5)
    error = plain.std(0) / math.sqrt(runs)
    assert float(((plain.mean(0) - truth).abs() / error).max()) > 8


def test_weights_against_a_mixture() -> None:
    """Three Gaussians in a row, close to one another: the exact posterior is known."""
    means = torch.tensor([[-0.7, 0.2], [0.0, -0.2], [0.8, 0.1]], dtype=F64)
    prior = GaussianMixtureFlow(means, 0.8, torch.tensor([2.0, 1.0, 1.0]), steps=8)
    likelihood = GaussianLikelihood(MatrixOperator(torch.tensor([[1.0, 0.5]], dtype=F64), image_shape=(2,)),
                                    torch.tensor([[0.5]], dtype=F64), 0.5)
    runs = 16
    posterior = NoiseRTO(prior, weights=True, chunk_size=100_000).sample(
        likelihood.select([0] * runs), 500, generator=generator())
    exact = ExactPosterior(prior).sample(likelihood, 40_000, generator=generator(1))
    truth = features(exact.samples[0])
    estimates = (posterior.weights[..., None] * features(posterior.samples)).sum(1)
    error = (estimates.var(0) / runs + truth.var(0) / len(truth)).sqrt()
    distance = ((estimates.mean(0) - truth.mean(0)).abs() / error)
    assert bool((distance < 4.5).all()), distance.tolist()
    evidence = ExactPosterior(prior).log_evidence(likelihood)
    within((posterior.log_evidence - evidence).exp()[:, None], torch.ones(1, dtype=F64))


@pytest.mark.filterwarnings("ignore:not converged")  # of 200 draws the tail of the weights says little
def test_weights_with_a_mask() -> None:
    """Entries that were not observed change nothing, whatever other observations see of them."""
    from invflow.operators import MaskInpainting

    class Line(FlowMap):
        state_shape = image_shape = (1, 1, 3)

        def velocity(self, x: Tensor, t: Any) -> Tensor:
            return torch.zeros_like(x)

        def jump(self, x: Tensor, s: Any, t: Any) -> Tensor:
            return x + 0.2 * x.roll(1, 3).tanh()

    prior = Line().double()
    prior.register_buffer("one", torch.ones((), dtype=F64))
    masks = torch.tensor([[1, 0, 1], [0, 1, 1]]).view(2, 1, 1, 3)
    y = randn(2, 1, 1, 3)
    both = GaussianLikelihood(MaskInpainting(masks, (1, 1, 3)), y, 0.5)
    alone = GaussianLikelihood(MaskInpainting(masks[:1], (1, 1, 3)), y[:1], 0.5)
    options: dict[str, Any] = {"generator": generator()}
    first = NoiseRTO(prior, weights=True).sample(both, 200, **options)
    options = {"generator": generator()}
    second = NoiseRTO(prior, weights=True).sample(alone.select([0, 0]), 200, **options)
    torch.testing.assert_close(first.samples[0], second.samples[0])
    torch.testing.assert_close(first.log_evidence[0], second.log_evidence[0])


# -- what it says of itself, and what it refuses ----------------------------------------------------------------------


def test_it_says_when_it_has_not_converged() -> None:
    prior = GaussianMixtureFlow(randn(1, 8), std=0.8)
    likelihood = GaussianLikelihood(MatrixOperator(randn(200, 8, seed=1), image_shape=(8,)), randn(1, 8) @ randn(
        200, 8, seed=1).T, 0.01)
    with pytest.warns(UserWarning, match=r"1 of 1 observations.*0% of the draws.*residual") as seen:
        posterior = NoiseRTO(prior, max_iterations=2).sample(likelihood, 30, generator=generator())
    assert seen[0].filename == __file__
    assert posterior.diagnostics["converged"].tolist() == [False]
    assert posterior.diagnostics["solved"].tolist() == [0.0]


def test_wrong_shares_of_modes_are_found_without_the_truth() -> None:
    """Two islands, both within reach of the measurement: a share of 0.99 is drawn as one of 0.93, every draw solved."""
    means = torch.tensor([[-1.5, 0.0], [1.5, 0.0]], dtype=F64)
    prior = GaussianMixtureFlow(means, 0.4, torch.tensor([0.5, 0.5]), steps=8)
    likelihood = GaussianLikelihood(MatrixOperator(torch.tensor([[1.0, 0.0]], dtype=F64), image_shape=(2,)),
                                    torch.tensor([[0.3], [1.5]], dtype=F64), 0.2)
    with pytest.warns(UserWarning, match=r"observations: in observation 0, A f bends by .* shares") as seen:
        posterior = NoiseRTO(prior, chunk_size=10_000).sample(likelihood, 400, generator=generator())
    assert "weights=True" in str(seen[0].message)
    exact = ExactPosterior(prior).sample(likelihood, 1).diagnostics["component_weights"][0, 1]
    share = (posterior.samples[0, :, 0] > 0).double().mean()
    assert float(exact - share) > 5 * math.sqrt(float(exact * (1 - exact)) / 400)  # it is wrong
    assert float(posterior.diagnostics["solved"][0]) > 0.9  # though every optimiser is content
    assert float(posterior.diagnostics["bend"][0]) > 0.3
    assert not bool(posterior.diagnostics["converged"][0])


def test_bend_is_the_second_difference() -> None:
    """For x0 = z0 + c z0^2: c (z0 - z0')^2 / 4 between two draws, in noise levels; none where unobserved."""
    class Curved(Bent):
        def jump(self, x: Tensor, s: Any, t: Any) -> Tensor:
            return torch.stack([x[:, 0] + 0.3 * x[:, 0].square(), 5 * x[:, 1].square()], dim=1)

    sigma = torch.tensor([0.5, 2.0], dtype=F64)
    likelihood = GaussianLikelihood(MatrixOperator(torch.tensor([[1.0, 0.0]], dtype=F64), image_shape=(2,)),
                                    torch.zeros(2, 1, dtype=F64), sigma)
    noise, prior = randn(2, 5, 2), Curved()
    images = prior.one_step(noise.flatten(0, 1)).view(2, 5, 2)
    pairs = noise[..., 0] - noise[..., 0].roll(1, 1)
    expected = (0.3 * pairs.square() / 4).square().mean(1).sqrt() / sigma
    torch.testing.assert_close(NoiseRTO(prior, chunk_size=3).bend(noise, images, likelihood), expected)
    single = NoiseRTO(prior).bend(noise[:, :1], images[:, :1], likelihood)
    assert bool(single.isnan().all())
    with pytest.warns(UserWarning, match="bends by nan"):
        assert not bool(NoiseRTO(Bent()).sample(likelihood, 1, generator=generator()).diagnostics["converged"].any())


@pytest.mark.parametrize(("bend", "converged"), [(0.08, True), (0.12, False)])
def test_a_bend_of_a_tenth_of_the_noise_is_the_limit(bend: float, converged: bool) -> None:
    """For z0 + c sqrt(1 + z0^2) at y = c, it is about c sqrt(3) s^2 / (4 sigma), with s^2 = sigma^2 / (1 + sigma^2)."""
    sigma = 0.4
    curvature = bend * 4 * (1 + sigma**2) / (sigma * math.sqrt(3))

    class Hyperbola(Bent):
        def jump(self, x: Tensor, s: Any, t: Any) -> Tensor:
            return torch.stack([x[:, 0] + curvature * (1 + x[:, 0].square()).sqrt(), x[:, 1]], dim=1)

    likelihood = GaussianLikelihood(MatrixOperator(torch.tensor([[1.0, 0.0]], dtype=F64), image_shape=(2,)),
                                    torch.full((1, 1), curvature, dtype=F64), sigma)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = NoiseRTO(Hyperbola(), tolerance=1e-4).sample(likelihood, 1000, generator=generator()).diagnostics
    assert abs(float(found["bend"][0]) - bend) < 0.015
    assert found["converged"].tolist() == [converged]
    assert len(said) == (0 if converged else 1)
    assert all("A f bends by 0.1" in str(warning.message) for warning in said)


def test_states_lead_to_the_samples() -> None:
    likelihood = GaussianLikelihood(MatrixOperator(torch.tensor([[1.0, 0.5]], dtype=F64), image_shape=(2,)),
                                    torch.tensor([[0.9], [0.1]], dtype=F64), 0.4)
    solver = NoiseRTO(Bent(), chunk_size=7)
    states = list(solver.iterate(likelihood, 10, generator=generator()))
    posterior = solver.sample(likelihood, 10, generator=generator())
    last = {state.rows.start: state for state in states}
    assert sorted(last) == [0, 7, 14]
    noise = torch.cat([last[k].noise for k in sorted(last)])
    torch.testing.assert_close(Bent().one_step(noise).view(2, 10, 2), posterior.samples)
    falls = [a.objective >= b.objective for a, b in itertools.pairwise(states) if a.rows == b.rows]
    assert bool(torch.cat(falls).all())
    images = Bent().generate(5, generator=generator())
    torch.testing.assert_close(solver.prior_samples(5, generator=generator()), images)


def test_single_precision_files_and_registry(tmp_path: Any) -> None:
    prior = GaussianMixtureFlow(torch.tensor([[0.5, -0.3], [1.0, 1.0]]), std=0.8, steps=4)
    likelihood = GaussianLikelihood(MatrixOperator(torch.tensor([[1.0, 0.5]]), image_shape=(2,)),
                                    torch.tensor([[0.9], [0.1]]), 0.4)
    for weights in (False, True):
        posterior = solver_by_name("noise-rto", prior, weights=weights).sample(
            likelihood, 64, generator=generator(), progress=True)
        assert posterior.samples.dtype == torch.float32
        assert float(posterior.diagnostics["solved"].min()) == 1.0
        posterior.save(tmp_path / "p.safetensors")
        loaded = invflow.Posterior.load(tmp_path / "p.safetensors")
        assert loaded.diagnostics["approximate"] is not weights
        assert loaded.settings["weights"] is weights


@pytest.mark.parametrize(("options", "match"), [
    ({"max_iterations": 0}, "max_iterations=0"), ({"memory": 0}, "memory=0"), ({"tolerance": 0.0}, "tolerance=0"),
    ({"chunk_size": 0}, "chunk_size=0"), ({"proposal": GaussianProposal(torch.zeros(3), torch.ones(3))}, "another map"),
])
def test_settings_out_of_range(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        NoiseRTO(Bent(), **options)


def test_refuses() -> None:
    with pytest.raises(TypeError, match="FlowMap"):
        NoiseRTO(lambda z: z)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="NoiseSMC"):
        NoiseRTO(Bent()).sample(FunctionReward(lambda x: x[:, 0]), 4)
    likelihood = GaussianLikelihood(MatrixOperator(torch.zeros(300, 2, dtype=F64), image_shape=(2,)),
                                    0.4 * randn(1, 300), 0.4)
    with pytest.raises(ValueError, match="at least one sample"):
        NoiseRTO(Bent()).sample(likelihood, 0)
    with pytest.raises(ValueError, match=r"300.*start='rto'"):
        NoiseRTO(Bent(), weights=True).sample(likelihood, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        NoiseRTO(Bent()).sample(likelihood, 30, generator=generator())
