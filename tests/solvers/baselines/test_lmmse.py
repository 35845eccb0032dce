"""The linear estimate: against conjugate formulas, the exact mixture posterior, and its own samples."""

from __future__ import annotations

import math

import pytest
import torch

import invflow
from invflow import metrics
from invflow.operators import BoxInpainting, Denoising, MatrixOperator, RandomInpainting, SuperResolution
from invflow.solvers.baselines.lmmse import LinearMMSE

F64 = torch.float64


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=F64)


def spd(size: int, seed: int = 0) -> torch.Tensor:
    root = randn(size, size, seed=seed)
    return root @ root.mT / size + 0.05 * torch.eye(size, dtype=F64)


def conjugate(mean, covariance, matrix, sigma, y):
    """Posterior mean, covariance and log evidence in information form: another route than the solver's."""
    precision = torch.linalg.inv(covariance) + matrix.mT @ matrix / sigma**2
    posterior = torch.linalg.inv(precision)
    shift = torch.linalg.solve(covariance, mean) + matrix.mT @ y / sigma**2
    spread = matrix @ covariance @ matrix.mT + sigma**2 * torch.eye(len(y), dtype=F64)
    evidence = torch.distributions.MultivariateNormal(matrix @ mean, spread).log_prob(y)
    return posterior @ shift, posterior, evidence


@pytest.mark.parametrize("shared", [True, False])
def test_mean_std_and_evidence_are_the_conjugate_ones(shared):
    mean, covariance, y = randn(6, seed=1), spd(6), randn(5, 3, seed=3)
    matrices = randn(3, 6, seed=2) if shared else randn(5, 3, 6, seed=2)
    sigma = torch.full((5,), 0.3, dtype=F64) if shared else torch.linspace(0.1, 0.9, 5, dtype=F64)
    likelihood = invflow.GaussianLikelihood(MatrixOperator(matrices, image_shape=(6,)), y, sigma)
    posterior = LinearMMSE(mean, covariance, chunk_size=2).sample(likelihood, 3, generator=generator())
    for b in range(5):
        matrix = matrices if shared else matrices[b]
        expected, variance, evidence = conjugate(mean, covariance, matrix, float(sigma[b]), y[b])
        torch.testing.assert_close(posterior.diagnostics["mean"][b], expected)
        torch.testing.assert_close(posterior.diagnostics["std"][b], variance.diagonal().sqrt())
        torch.testing.assert_close(posterior.log_evidence[b], evidence)


def test_samples_have_the_posterior_law():
    mean, covariance, matrix, y = randn(4, seed=1), spd(4), randn(2, 4, seed=2), randn(1, 2, seed=3)
    likelihood = invflow.GaussianLikelihood(MatrixOperator(matrix, image_shape=(4,)), y, 0.2)
    count = 40000
    samples = LinearMMSE(mean, covariance).sample(likelihood, count, generator=generator()).samples[0]
    expected, variance, _ = conjugate(mean, covariance, matrix, 0.2, y[0])
    z = (samples - expected) @ torch.linalg.inv(torch.linalg.cholesky(variance)).mT
    assert z.mean(0).abs().max() < 4.5 / math.sqrt(count)
    assert (z.mT.cov() - torch.eye(4)).abs().max() < 4.5 * math.sqrt(2 / count)
    kurtosis = z.pow(4).mean(0)
    assert (kurtosis - 3).abs().max() < 4.5 * math.sqrt(96 / count)


def test_it_agrees_with_the_exact_posterior_of_one_gaussian():
    prior = invflow.GaussianMixtureFlow(0.3 * torch.ones(1, 1, 8, 8, dtype=F64), std=0.4)
    operator = BoxInpainting((1, 8, 8), box=(3, 4))
    y = operator(0.3 + 0.4 * randn(3, 1, 8, 8)) + 0.1 * randn(3, 1, 8, 8, seed=1)
    likelihood = invflow.GaussianLikelihood(operator, y, 0.1)
    exact = invflow.ExactPosterior(prior).sample(likelihood, 2, generator=generator(2))
    solver = LinearMMSE(prior.means[0], 0.16 * torch.eye(64, dtype=F64))
    found = solver.sample(likelihood, 2, generator=generator(2))
    # unobserved pixels count for nothing in either
    torch.testing.assert_close(found.log_evidence, exact.log_evidence, rtol=1e-6, atol=1e-6)
    hidden = ~operator.observed()[0]
    torch.testing.assert_close(found.diagnostics["mean"][:, hidden], torch.full((3, 12), 0.3, dtype=F64))
    torch.testing.assert_close(found.diagnostics["std"][:, hidden], torch.full((3, 12), 0.4, dtype=F64))


def test_chunks_and_shared_solves_make_no_difference():
    operator = RandomInpainting((1, 8, 8), generator=generator()).randomize(5, generator(1))
    solver = LinearMMSE(torch.full((1, 8, 8), 0.5), spd(64))
    y = operator.measure(solver.prior_samples(5, generator=generator(2)), sigma=0.1, generator=generator(3))
    likelihood = invflow.GaussianLikelihood(operator, y, 0.1)
    one = solver.sample(likelihood, 4, generator=generator(4))
    solver.chunk_size = 2
    two = solver.sample(likelihood, 4, generator=generator(4))
    torch.testing.assert_close(one.samples, two.samples)
    torch.testing.assert_close(one.log_evidence, two.log_evidence)


def test_no_affine_estimate_is_better_on_the_images_it_was_fitted_to():
    uniform = torch.rand(400, 16, generator=generator(), dtype=F64)
    images = (uniform @ randn(16, 64, seed=1)).square().reshape(400, 1, 8, 8)
    images = images / images.max()
    solver = LinearMMSE.fit(images)
    operator, sigma = SuperResolution((1, 8, 8), factor=4), 0.05
    clean = operator(images)
    y = clean + sigma * randn(*clean.shape, seed=2)
    mean = solver.sample(invflow.GaussianLikelihood(operator, y, sigma), 1, generator=generator())
    mean = mean.diagnostics["mean"].flatten(1)
    error = (mean - images.flatten(1)).square().sum(1).mean()
    # the error of a random affine change of the estimate is larger, in expectation over the noise
    inputs = torch.cat([y.flatten(1), torch.ones(400, 1, dtype=F64)], 1)
    for seed in range(5):
        changed = mean + 0.02 * inputs @ randn(5, 64, seed=10 + seed)
        assert (changed - images.flatten(1)).square().sum(1).mean() > error
    # and the error that it expects of itself is the error that it makes
    expected = solver.sample(invflow.GaussianLikelihood(operator, y, sigma), 1).diagnostics["std"]
    assert error.item() == pytest.approx(expected.square().flatten(1).sum(1).mean().item(), rel=0.05)


def test_fit_finds_mean_and_covariance_in_floats_and_bytes():
    raw = torch.randint(256, (9000, 1, 3, 2), generator=generator(), dtype=torch.uint8)
    raw[:, 0, 0, 0] = 7  # a pixel that never varies
    for images in (raw, raw.double() / 255):
        solver = LinearMMSE.fit(images)
        flat = (raw.double() / 255).flatten(1)
        torch.testing.assert_close(solver.mean.flatten(), flat.mean(0))
        torch.testing.assert_close(solver.covariance, flat.mT.cov(), atol=1e-12, rtol=1e-9)


def test_prior_samples_have_the_fitted_law():
    solver = LinearMMSE(randn(2, 2, seed=1), spd(4))
    draws = solver.prior_samples(40000, generator=generator()).flatten(1).double()
    assert draws.shape == (40000, 4)
    z = (draws - solver.mean.flatten()) @ torch.linalg.inv(torch.linalg.cholesky(solver.covariance)).mT
    assert z.mean(0).abs().max() < 4.5 / 200
    assert (z.mT.cov() - torch.eye(4)).abs().max() < 4.5 * math.sqrt(2 / 40000)


def test_saving_keeps_the_estimate(tmp_path):
    solver = LinearMMSE.fit(torch.rand(300, 1, 8, 8, generator=generator()))
    solver.save_pretrained(tmp_path / "exact", torch.float64, images=300)
    torch.testing.assert_close(LinearMMSE.load(tmp_path / "exact").covariance, solver.covariance,
                               atol=1e-7, rtol=1e-6)
    solver.save_pretrained(tmp_path / "half")
    rounded = LinearMMSE.load(str(tmp_path / "half"))
    torch.testing.assert_close(rounded.covariance, solver.covariance, atol=1e-4, rtol=0)
    assert torch.linalg.eigvalsh(rounded.covariance).min() > 0
    (tmp_path / "half" / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="truncated"):
        LinearMMSE.load(tmp_path / "half")
    with pytest.raises(ValueError, match="no linear-mmse named 'mnst'"):
        LinearMMSE.load("mnst")


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_the_shipped_estimates_serve_the_shipped_problems(name):
    problem = invflow.load_problem(f"{name}/super-resolution")
    truth, likelihood = problem.simulate(100, generator=generator(), shuffle=False)
    posterior = LinearMMSE.load(name).sample(likelihood, 64, generator=generator())
    mean, std = posterior.diagnostics["mean"], posterior.diagnostics["std"]
    gain = metrics.psnr(mean, truth) - metrics.psnr(likelihood.operator.pseudo_inverse(likelihood.y), truth)
    assert gain.mean() > 1.5
    # the fair score of its samples is that of its Gaussian, up to what 64 samples leave to chance
    by_samples = metrics.crps(posterior.samples, truth).mean().item()
    assert by_samples == pytest.approx(metrics.gaussian_crps(mean, std, truth).mean().item(), rel=0.02)
    assert likelihood.residual(posterior.samples).mean().item() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize(("call", "error", "message"), [
    (lambda: LinearMMSE(torch.zeros(3), torch.eye(4)), ValueError, r"\(4, 4\).*\(3,\).*\(3, 3\)"),
    (lambda: LinearMMSE(torch.zeros(2), torch.tensor([[1.0, 0.5], [0.0, 1.0]])), ValueError, "not symmetric"),
    (lambda: LinearMMSE(torch.zeros(2), torch.diag(torch.tensor([1.0, -1.0]))), ValueError, "semidefinite"),
    (lambda: LinearMMSE(torch.zeros(2), torch.eye(2) * math.nan), ValueError, "symmetric"),
    (lambda: LinearMMSE(torch.zeros(2), torch.eye(2), chunk_size=0), ValueError, "chunk_size=0"),
    (lambda: LinearMMSE.fit(torch.zeros(1, 4)), ValueError, "at least two images"),
    (lambda: LinearMMSE.fit(torch.zeros(2, 3, 100, 100)), ValueError, "30000 values"),
    (lambda: LinearMMSE.fit(torch.full((3, 4), math.inf)), ValueError, "not finite"),
])
def test_errors_say_what_is_wrong(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_it_refuses_what_it_cannot_solve():
    class Square(invflow.Operator):
        image_shape = measurement_shape = (2,)
        linear = False

        def forward(self, x):
            return x.square()

    solver = LinearMMSE(torch.zeros(2), torch.eye(2))
    with pytest.raises(TypeError, match="Square, which is not linear"):
        solver.sample(invflow.GaussianLikelihood(Square(), torch.zeros(1, 2), 0.1), 2)
    with pytest.raises(TypeError, match="FunctionReward"):
        solver.sample(invflow.FunctionReward(lambda x: x.sum(1)), 2)
    with pytest.raises(ValueError, match=r"\(2,\).*\(3,\)"):
        solver.sample(invflow.GaussianLikelihood(Denoising((3,)), torch.zeros(1, 3), 0.1), 2)
    with pytest.raises(ValueError, match="num_samples is 0"):
        solver.sample(invflow.GaussianLikelihood(Denoising((2,)), torch.zeros(1, 2), 0.1), 0)


def test_one_operator_and_a_noise_level_for_each_observation() -> None:
    """Mean, deviation and evidence are those of each observation on its own."""
    g = torch.Generator().manual_seed(0)
    solver = LinearMMSE.fit(torch.rand(200, 1, 4, 4, generator=g))
    operator = SuperResolution((1, 4, 4), 2)
    y = operator.measure(torch.rand(3, 1, 4, 4, generator=g), 0.1, generator=g)
    likelihood = invflow.GaussianLikelihood(operator, y, torch.tensor([0.1, 0.3, 1.0]))
    together = solver.sample(likelihood, 8, generator=g)
    for b in range(3):
        alone = solver.sample(likelihood.select([b]), 8, generator=g)
        for name in ("mean", "std"):
            torch.testing.assert_close(together.diagnostics[name][b], alone.diagnostics[name][0])
        torch.testing.assert_close(together.log_evidence[b], alone.log_evidence[0])
