"""Problems with noise that is not Gaussian, and with measured data without known truths."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import invflow
from invflow.operators import Denoising

F64 = torch.float64
SHAPE = (2,)


class Laplace(invflow.Likelihood):
    """Noise of Laplace's density with scale 0.2."""

    def log_density(self, y: Tensor, clean: Tensor) -> Tensor:
        return -(y - clean).abs() / 0.2 - math.log(0.4)

    def draw(self, clean: Tensor, generator: torch.Generator | None) -> Tensor:
        u = torch.rand(clean.shape, generator=generator, dtype=torch.float64) - 0.5
        return clean - 0.2 * u.sign() * (1 - 2 * u.abs()).log().to(clean)


def prior() -> invflow.GaussianMixtureFlow:
    return invflow.GaussianMixtureFlow(torch.full((1, *SHAPE), 0.5, dtype=F64), 0.2)


def truths(n: int, generator: torch.Generator) -> Tensor:
    return 0.5 + 0.2 * torch.randn(n, *SHAPE, generator=generator, dtype=F64)


def problem_of(likelihood: Any, **options: Any) -> invflow.Problem:
    return invflow.Problem("test", None, Denoising(SHAPE), likelihood=likelihood, sampler=truths, prior=prior,
                           **options)


def poisson(operator: invflow.Operator, y: Tensor) -> invflow.Likelihood:
    return invflow.PoissonLikelihood(operator, y, gain=50.0)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_truths_are_measured_with_the_likelihood_s_noise() -> None:
    truth, likelihood = problem_of(Laplace).simulate(4000, generator=seeded())
    assert isinstance(likelihood, Laplace)
    noise = (likelihood.y - truth).flatten()
    # E|e| = 0.2 and its deviation is 0.2 too; variance 2 * 0.2^2
    assert abs(float(noise.abs().mean()) - 0.2) < 3 * 0.2 / math.sqrt(len(noise))
    truth, counts = problem_of(poisson).simulate(4000, generator=seeded())
    scaled = (counts.y - 50 * truth.clamp(min=0)) / (50 * truth.clamp(min=0.02)).sqrt()
    assert abs(float(scaled.mean())) < 3 / math.sqrt(scaled.numel())
    again = problem_of(poisson).simulate(4000, generator=seeded())[1]
    assert torch.equal(again.y, counts.y)


def test_calibration_of_laplace_noise_and_of_the_wrong_scale() -> None:
    # whose one step from noise is m = 0.5 + 0.2 z, the same law at the cost of a line
    line = invflow.from_average_velocity(lambda x, t, r: 0.5 - 0.8 * x, SHAPE, coupling="optimal-transport").double()
    solver = invflow.NoiseSMC(line, num_moves=3)
    settings: dict[str, Any] = dict(num_simulations=50, num_samples=19, num_particles=100)
    right = invflow.calibrate(solver, problem_of(Laplace), generator=seeded(1), **settings)
    assert right.verdict != "fails", str(right)

    class Sharp(Laplace):
        def log_density(self, y: Tensor, clean: Tensor) -> Tensor:
            return super().log_density(y, clean) * 25

    wrong = invflow.calibrate(solver, problem_of(Sharp), generator=seeded(1), **settings)
    assert wrong.verdict == "fails", str(wrong)


def test_measured_data_without_truths() -> None:
    y = torch.tensor([[0.3, 0.6], [0.8, 0.1], [0.4, 0.4]], dtype=F64)
    data = invflow.GaussianLikelihood(Denoising(SHAPE), y, sigma=torch.tensor([0.1, 0.2, 0.3], dtype=F64))
    problem = invflow.Problem("measured", None, likelihood=data, prior=prior)
    assert problem.is_measured
    assert "measured data" in repr(problem)
    truth, found = problem.simulate(3, shuffle=False)
    assert truth is None
    assert torch.equal(found.y, y)
    _, some = problem.simulate(2, generator=seeded())
    rows = [y.tolist().index(row) for row in some.y.tolist()]
    assert some.sigma.tolist() == [data.sigma.tolist()[row] for row in rows]
    with pytest.raises(ValueError, match="has 3 measurements, but 4"):
        problem.simulate(4)
    # as many simulated ones as one likes, with the levels of the data in turn
    truth, like = problem.simulate(3000, generator=seeded(), source="prior")
    noise = (like.y - truth).reshape(1000, 3, 2)
    for k, sigma in enumerate((0.1, 0.2, 0.3)):
        assert abs(float(noise[:, k].std()) / sigma - 1) < 3 / math.sqrt(2 * 2000)
    with pytest.raises(ValueError, match="measured data without truths"):
        problem.images()


def test_measured_data_in_a_comparison() -> None:
    y = torch.tensor([[0.3, 0.6], [0.8, 0.1]], dtype=F64)
    problem = invflow.Problem("measured", None, likelihood=invflow.GaussianLikelihood(Denoising(SHAPE), y, sigma=0.1),
                              prior=prior)
    comparison = invflow.compare(problem, {"exact": invflow.ExactPosterior(prior())}, num_observations=2,
                                 num_samples=50, seed=0)
    text = str(comparison)
    assert "exact" in text


@pytest.mark.parametrize(("options", "error", "words"), [
    ({"sigma": 0.1, "likelihood": Laplace}, ValueError, "both define the noise"),
    ({"likelihood": 3.0}, TypeError, "a function"),
    ({"likelihood": invflow.GaussianLikelihood(Denoising(SHAPE), torch.zeros(1, 2), sigma=1.0)}, ValueError,
     "has its own operator"),
    ({}, ValueError, "or a likelihood"),
])
def test_refusals(options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        invflow.Problem("test", None, Denoising(SHAPE), sampler=truths, **options)


def test_a_likelihood_that_is_none_is_named() -> None:
    with pytest.raises(TypeError, match=r"returned a float, expected an invflow.Likelihood"):
        problem_of(lambda operator, y: 3.0).simulate(2)


# -- messages -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("gain", "warned"), [(20.0, False), (0.05, True), (20000.0, True), (15.0, False)])
def test_a_reciprocal_gain_is_noticed(gain: float, warned: bool) -> None:
    operator = Denoising((1, 16, 16))
    image = torch.rand(1, 1, 16, 16, generator=seeded())
    y = torch.poisson(20 * image, generator=seeded())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        invflow.PoissonLikelihood(operator, y, gain)
    said = [str(w.message) for w in caught if "reciprocal" in str(w.message)]
    assert bool(said) == warned, said


def test_complex_measurements_are_told_what_to_pass() -> None:
    y = torch.zeros(1, 2, dtype=torch.complex64)
    with pytest.raises(ValueError, match=r"torch.view_as_real\(y\).*sigma = s / 2\*\*0.5"):
        invflow.GaussianLikelihood(Denoising(SHAPE), y, sigma=0.1)
    physics = pytest.importorskip("deepinv.physics")
    mri = physics.MRI(mask=torch.ones(1, 1, 8, 8), img_size=(2, 8, 8))
    operator = invflow.operators.DeepinvOperator(mri, (2, 8, 8))
    with pytest.raises(ValueError, match=r"DeepinvOperator.as_measurement\(y\)"):
        invflow.GaussianLikelihood(operator, torch.zeros(1, 1, 8, 8, dtype=torch.complex64), sigma=0.1)
