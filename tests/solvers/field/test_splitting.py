"""Restoration by splitting, total variation and plug and play, and the linear systems in them."""

from __future__ import annotations

import math

import pytest
import torch
from classical_tools import F64, dense, edges, ellipsoid, likelihood_of, operators, randn
from torch import Tensor

import invflow
from invflow._core.conjugate_gradients import solve
from invflow._core.shapes import as_pictures
from invflow.linear.structure import transfer_function
from invflow.operators import BoxInpainting, Denoising, SuperResolution
from invflow.solvers.baselines.total_variation import gradient, gradient_adjoint, total_variation

# -- total variation --------------------------------------------------------------------------------------------------


def primal_dual(matrix: Tensor, y: Tensor, strength: float, shape: tuple[int, ...], joint: bool, steps: int) -> Tensor:
    """Chambolle and Pock (2011), with both A and D in the dual: another method than the solver's, and slower."""
    size = torch.linalg.matrix_norm(matrix, 2).square() + 8
    step = float(0.99 / size.sqrt())
    x = bar = torch.zeros(1, *shape, dtype=F64)
    p, q = torch.zeros_like(gradient(x)), torch.zeros_like(y)
    for _ in range(steps):
        p = p + step * gradient(bar)
        length = torch.linalg.vector_norm(p, dim=(1, 2) if joint else 2, keepdim=True)
        p = p / (length / strength).clamp(min=1)
        q = (q + step * (matrix @ bar.flatten() - y)) / (1 + step)
        new = x - step * (gradient_adjoint(p) + (matrix.mT @ q).reshape(x.shape))
        x, bar = new, 2 * new - x
    return x


@pytest.mark.parametrize("joint", [True, False])
@pytest.mark.parametrize("name", ["denoising", "masks", "super-resolution", "blurs", "blur, reflected", "matrix"])
def test_total_variation_finds_the_minimum_that_another_method_finds(name, joint):
    shape, strength = (3, 5, 6), 0.05
    likelihood = likelihood_of(operators(shape)[name])
    solver = invflow.TotalVariation(strength=strength, joint=joint, tolerance=1e-6, iterations=1000)
    found = solver.sample(likelihood, 1)
    for b in range(2):
        matrix, y = dense(likelihood, b), likelihood.y[b].flatten()

        def objective(x: Tensor, matrix: Tensor = matrix, y: Tensor = y) -> float:
            misfit = 0.5 * (matrix @ x.flatten() - y).square().sum()
            return float(misfit + strength * total_variation(x.reshape(1, *shape), joint))

        other = primal_dual(matrix, y, strength, shape, joint, 2500)
        # seven random numbers of an image say little of it, and either method creeps towards the minimum
        slack = 5e-5 if name == "matrix" else 2e-6
        assert objective(found.samples[b, 0]) <= objective(other) + slack
        assert abs(objective(found.samples[b, 0]) - float(found.diagnostics["objective"][b])) < 1e-9
        # pixels that nothing ties down need not be unique, but what is measured of the minimisers is
        assert (matrix @ (found.samples[b, 0] - other[0]).flatten()).abs().max() < 50 * math.sqrt(slack) * strength


def test_total_variation_agrees_with_scikit_image():
    restoration = pytest.importorskip("skimage.restoration")
    y = edges(1, 1, 24, 20) + 0.1 * randn(1, 1, 24, 20)
    likelihood = invflow.GaussianLikelihood(Denoising((1, 24, 20)), y, 0.1)
    found = invflow.TotalVariation(strength=0.12, tolerance=1e-6, iterations=1000).sample(likelihood, 1)
    other = restoration.denoise_tv_chambolle(y[0, 0].numpy(), weight=0.12, eps=1e-9, max_num_iter=5000)
    torch.testing.assert_close(found.samples[0, 0, 0], torch.from_numpy(other), rtol=0, atol=1e-3)


def test_total_variation_agrees_with_deepinv():
    from deepinv.optim.prior import TVPrior

    y = edges(1, 3, 16, 16) + 0.1 * randn(1, 3, 16, 16)
    likelihood = invflow.GaussianLikelihood(Denoising((3, 16, 16)), y, 0.1)
    found = invflow.TotalVariation(strength=0.1, joint=False, tolerance=1e-6, iterations=1000).sample(likelihood, 1)
    other = TVPrior(def_crit=1e-8, n_it_max=5000).prox(y, gamma=0.1)
    torch.testing.assert_close(found.samples[:, 0], other, rtol=0, atol=5e-4)


def test_the_gradient_and_its_adjoint():
    x, p = randn(2, 3, 5, 7), randn(2, 3, 2, 5, 7, seed=1)
    assert abs(float((gradient(x) * p).sum() - (x * gradient_adjoint(p)).sum())) < 1e-10
    ramp = torch.arange(5.0)[:, None] + 2 * torch.arange(4.0)
    slope = gradient(ramp[None, None])[0, 0]
    assert (slope[0, :-1] == 1).all()
    assert (slope[1, :, :-1] == 2).all()
    assert (slope[0, -1] == 0).all()
    assert (slope[1, :, -1] == 0).all()


def test_the_weight_follows_the_stated_rule():
    likelihood = likelihood_of(SuperResolution((1, 32, 32), factor=4).double(), sigma=0.04)
    found = invflow.TotalVariation(weight=3.0, iterations=1).sample(likelihood, 1).diagnostics["strength"]
    # averages of 4 x 4 pixels: A' A has a sixteenth of its eigenvalues at a sixteenth
    expected = 3 * (1 / 256) ** 0.25 * likelihood.sigma**1.5
    assert ((found / expected).log().abs() < 0.1).all()
    with pytest.raises(ValueError, match="over 0"):
        invflow.TotalVariation(strength=0.0)


# -- plug and play ----------------------------------------------------------------------------------------------------


def gaussian_mean(likelihood: invflow.GaussianLikelihood, b: int, mean: Tensor, variance: Tensor) -> Tensor:
    matrix, y = dense(likelihood, b), likelihood.y[b].flatten()
    covariance = torch.diag(variance.flatten())
    spread = matrix @ covariance @ matrix.mT + likelihood.sigma[b] ** 2 * torch.eye(len(y), dtype=F64)
    gain = covariance @ matrix.mT @ torch.linalg.inv(spread)
    return mean.flatten() + gain @ (y - matrix @ mean.flatten())


@pytest.mark.parametrize("name", ["masks", "super-resolution", "blurs", "blur, reflected", "matrix"])
@pytest.mark.parametrize(("level", "kappa"), [(0.2, 0.23), (0.1, 1.0)])
def test_plug_and_play_with_an_exact_denoiser_converges_to_the_mean_that_it_should(name, level, kappa):
    shape = (3, 4, 6)
    prior, likelihood = ellipsoid(shape), likelihood_of(operators(shape)[name], sigma=0.1)
    solver = invflow.PlugAndPlay(prior, steps=1500, first=level, last=level, regularisation=kappa, iterations=100)
    found = solver.sample(likelihood, 1).samples[:, 0]
    for b in range(2):
        # in units of images: mean (m + 1) / 2, variance C / 4, and the denoiser's s^2 on top
        variance, mean = (prior.variance / 4 + level**2) / kappa, (prior.mean + 1) / 2
        x = gaussian_mean(likelihood, b, mean, variance)
        z = mean.flatten() + (prior.variance / 4 / (prior.variance / 4 + level**2)).flatten() * (x - mean.flatten())
        torch.testing.assert_close(found[b].flatten(), z, rtol=0, atol=2e-5)


def test_plug_and_play_follows_a_falling_level_to_the_posterior_mean():
    shape = (1, 4, 4)
    prior, likelihood = ellipsoid(shape), likelihood_of(operators(shape)["mask"], sigma=0.1)
    errors = []
    for last in (0.1, 0.02):
        solver = invflow.PlugAndPlay(prior, steps=4000, first=0.3, last=last, regularisation=1.0)
        found = solver.sample(likelihood.select(slice(1)), 1).samples[0, 0].flatten()
        expected = gaussian_mean(likelihood, 0, (prior.mean + 1) / 2, prior.variance / 4)
        errors.append(float((found - expected).abs().max()))
    assert errors[1] < 0.002
    assert errors[1] < 0.2 * errors[0]


def test_plug_and_play_levels_fall_evenly_in_the_logarithm_and_never_under_the_noise(monkeypatch):
    from invflow.solvers.baselines import plug_and_play

    prior, levels = ellipsoid((1, 4, 4)), []
    monkeypatch.setattr(plug_and_play, "denoised", lambda prior, image, level: levels.append(level) or image)
    likelihood = likelihood_of(operators((1, 4, 4))["mask"], count=3)
    likelihood = invflow.GaussianLikelihood(likelihood.operator, likelihood.y, torch.tensor([0.01, 0.1, 0.5]).double())
    invflow.PlugAndPlay(prior, first=0.4, steps=5).sample(likelihood, 1)
    fall = [0.4 * (s / 0.4) ** (torch.arange(5, dtype=F64) / 4) for s in (0.01, 0.1)]
    torch.testing.assert_close(torch.stack(levels), torch.stack([*fall, torch.full((5,), 0.5, dtype=F64)], dim=1))


def test_plug_and_play_denoises_with_one_call_that_is_the_posterior_mean():
    shape = (3, 4, 6)
    prior, likelihood = ellipsoid(shape), likelihood_of(Denoising(shape))
    posterior = invflow.PlugAndPlay(prior).sample(likelihood, 4)
    assert posterior.nfe.forward == 0.25  # one call for four copies
    for b in range(2):
        expected = gaussian_mean(likelihood, b, (prior.mean + 1) / 2, prior.variance / 4)
        torch.testing.assert_close(posterior.samples[b, 2].flatten(), expected)


def test_plug_and_play_refuses_what_does_not_fit_and_takes_other_sizes():
    prior = ellipsoid((1, 4, 4))
    with pytest.raises(ValueError, match=r"takes images \(1, 4, 4\) and has a fixed size: it cannot take \(1, 8, 8\)"):
        invflow.PlugAndPlay(prior).sample(likelihood_of(Denoising((1, 8, 8))), 1)
    prior.resized = lambda shape: ellipsoid(shape)  # type: ignore[attr-defined]
    assert invflow.PlugAndPlay(prior).sample(likelihood_of(Denoising((1, 8, 8))), 1).image_shape == (1, 8, 8)
    prior.has_velocity = False
    with pytest.raises(ValueError, match=r"jumps from noise to data .*NoiseSMC"):
        invflow.PlugAndPlay(prior)
    with pytest.raises(TypeError, match="takes a FlowMap"):
        invflow.PlugAndPlay("mnist")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="over 0"):
        invflow.PlugAndPlay(ellipsoid((1, 4, 4)), first=0.0)


# -- linear systems ---------------------------------------------------------------------------------------------------


def test_the_linear_solver_solves_and_stops():
    root = randn(12, 12)
    matrix = root @ root.mT + 0.1 * torch.eye(12, dtype=F64)
    right = torch.stack([randn(12, seed=1), torch.zeros(12, dtype=F64)])
    for start in (None, randn(2, 12, seed=2)):
        found, taken = solve(lambda x: x @ matrix, right, lambda x: x / matrix.diagonal(), 200, 1e-12, start)
        torch.testing.assert_close(found[0], torch.linalg.solve(matrix, right[0]), rtol=1e-6, atol=1e-6)
        assert 0 < taken[0] < 200
    assert torch.equal(solve(lambda x: x @ matrix, right, lambda x: x, 200, 1e-12)[0][1], right[1])
    # conjugate directions span the space: as many steps as unknowns, fewer where the preconditioner is near
    for precondition, steps in ((lambda x: x / matrix.diagonal(), 12), (lambda x: x @ torch.linalg.inv(matrix), 1)):
        found, taken = solve(lambda x: x @ matrix, right[:1], precondition, steps, 0.0)
        torch.testing.assert_close(found[0], torch.linalg.solve(matrix, right[0]), rtol=1e-6, atol=1e-8)
        assert taken == steps


def test_a_row_that_has_arrived_stays_where_it_would_be_alone():
    root, right = randn(12, 12), randn(2, 12, seed=1)
    matrix = root @ root.mT + 0.1 * torch.eye(12, dtype=F64)
    start = torch.linalg.solve(matrix, right.mT).mT + torch.tensor([[1.0], [0.01]], dtype=F64) * randn(2, 12, seed=2)
    both, taken = solve(lambda x: x @ matrix, right, lambda x: x, 200, 1e-3, start)
    assert 0 < taken[1] < taken[0]
    for k in range(2):
        alone, steps = solve(lambda x: x @ matrix, right[k:k + 1], lambda x: x, 200, 1e-3, start[k:k + 1])
        assert taken[k] == steps
        torch.testing.assert_close(both[k:k + 1], alone, rtol=1e-10, atol=1e-12)


def test_transfer_functions_are_found_where_there_are_some():
    shape = (3, 6, 8)
    known = {name: transfer_function(likelihood_of(operator)) for name, operator in operators(shape).items()}
    assert {name for name, transfer in known.items() if transfer is not None} == {
        "denoising", "blur", "blurs", "blur, a kernel a channel"}
    assert known["blurs"].shape == (2, 3, 6, 8)
    assert transfer_function(likelihood_of(BoxInpainting(shape, box=(2, 2)))) is None
    assert as_pictures((4, 5)) == (1, 4, 5)
    with pytest.raises(ValueError, match="fewer axes"):
        as_pictures((1, 2, 3, 4))
