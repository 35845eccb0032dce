"""The baselines that users know: each against a closed form, an optimality condition, or another's implementation."""

from __future__ import annotations

import importlib.util
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import invflow
from invflow import metrics
from invflow._linear_solve import solve
from invflow.flowmap import FlowMap, expand_time
from invflow.operators import (
    Blur,
    BoxInpainting,
    Denoising,
    GaussianBlur,
    MaskInpainting,
    MatrixOperator,
    RandomInpainting,
    SuperResolution,
)
from invflow.solvers._linear import transfer_function
from invflow.solvers.point import as_pictures
from invflow.solvers.registry import solver_by_name
from invflow.solvers.total_variation import gradient, gradient_adjoint, total_variation
from invflow.spectral import opponent_matrix

F64 = torch.float64
HAS_BM3D = importlib.util.find_spec("bm3d") is not None


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=F64)


def edges(*shape: int) -> Tensor:
    """Pictures with an edge in each channel, in [0.2, 0.8]."""
    rows, columns = torch.arange(shape[-2], dtype=F64)[:, None], torch.arange(shape[-1], dtype=F64)
    inside = (rows - shape[-2] / 2) ** 2 + (columns - shape[-1] / 2) ** 2 < (shape[-1] / 4) ** 2
    return (0.2 + 0.6 * inside).expand(*shape).clone()


def operators(shape: tuple[int, int, int]) -> dict[str, invflow.Operator]:
    kernel = randn(2, 1, 3, 4, seed=9).abs()
    return {
        "denoising": Denoising(shape),
        "mask": RandomInpainting(shape, keep=0.5, generator=generator(1)),
        "masks": RandomInpainting(shape, keep=0.5, generator=generator(1)).randomize(2, generator(2)),
        "super-resolution": SuperResolution(shape, factor=2),
        "blur": GaussianBlur(shape, std=0.8, kernel_size=3).double(),
        "blurs": Blur(kernel / kernel.sum((2, 3), keepdim=True), shape).double(),
        "blur, reflected": GaussianBlur(shape, std=0.8, kernel_size=3, padding="reflect").double(),
        "blur, a kernel a channel": Blur(randn(shape[0], 3, 3, seed=4).abs(), shape).double(),
        "matrix": MatrixOperator(randn(7, math.prod(shape), seed=3), image_shape=shape),
    }


def likelihood_of(operator: invflow.Operator, count: int = 2, sigma: float = 0.1) -> invflow.GaussianLikelihood:
    x = edges(count, *operator.image_shape) + 0.05 * randn(count, *operator.image_shape, seed=5)
    y = operator(x) + sigma * randn(count, *operator.measurement_shape, seed=6)
    return invflow.GaussianLikelihood(operator, y, torch.linspace(sigma, 1.5 * sigma, count, dtype=F64))


def dense(likelihood: invflow.GaussianLikelihood, b: int) -> Tensor:
    """The matrix of an observation's operator, unobserved rows zero."""
    one = likelihood.select(slice(b, b + 1))
    unit = torch.eye(math.prod(one.operator.image_shape), dtype=F64).reshape(-1, *one.operator.image_shape)
    rows = one.operator.expand(len(unit))(unit).flatten(1).mT
    observed = one.operator.observed()
    return rows if observed is None else rows * observed.reshape(-1, 1)


# -- Wiener ----------------------------------------------------------------------------------------------------------


def stationary_covariance(solver: invflow.Wiener, shape: tuple[int, int, int]) -> Tensor:
    """By the definition: Fourier matrices, one spectrum for each opponent colour."""
    channels, height, width = shape
    fourier = [torch.exp(-2j * math.pi * torch.outer(n, n) / len(n)) / math.sqrt(len(n))
               for n in (torch.arange(height, dtype=F64), torch.arange(width, dtype=F64))]
    both, power = torch.kron(*fourier), solver.spectrum(shape).flatten(1)
    colours, total = opponent_matrix(channels, F64), torch.zeros(math.prod(shape), math.prod(shape), dtype=F64)
    for c in range(channels):
        plane = (both.conj().mT @ torch.diag(power[c].to(both)) @ both).real
        total += torch.kron(torch.outer(colours[c], colours[c]), plane)
    return total


@pytest.mark.parametrize("name", operators((3, 4, 6)))
def test_wiener_is_the_posterior_mean_of_the_stationary_gaussian(name):
    shape = (3, 4, 6)
    solver = invflow.Wiener(amplitude=(0.05, 0.02, 0.03), exponent=1.7, level=0.3, tolerance=1e-13, iterations=1000)
    likelihood = likelihood_of(operators(shape)[name])
    found = solver.sample(likelihood, 1)
    covariance, mean = stationary_covariance(solver, shape), torch.full((math.prod(shape),), 0.5, dtype=F64)
    for b in range(2):
        matrix, y = dense(likelihood, b), likelihood.y[b].flatten()
        spread = matrix @ covariance @ matrix.mT + likelihood.sigma[b] ** 2 * torch.eye(len(y), dtype=F64)
        expected = mean + covariance @ matrix.mT @ torch.linalg.solve(spread, y - matrix @ mean)
        torch.testing.assert_close(found.samples[b, 0].flatten(), expected, rtol=1e-7, atol=1e-8)
    closed = name in ("denoising", "blur", "blurs")
    assert bool((found.diagnostics["iterations"] == 0).all()) == closed, "a product of transforms, or a solver"


def test_wiener_fit_finds_the_spectrum_that_images_were_drawn_from():
    true = invflow.Wiener(amplitude=(0.06, 0.02, 0.01), exponent=2.2, level=0.1)
    size, count = 64, 40
    noise = randn(count, 3, size, size, seed=1)
    coefficients = torch.fft.fft2(noise, norm="ortho") * true.spectrum((3, size, size)).sqrt()
    colours = torch.fft.ifft2(coefficients, norm="ortho").real
    images = 0.5 + torch.einsum("ck,nchw->nkhw", opponent_matrix(3, F64), colours)
    found = invflow.Wiener.fit(images)
    # rings of hundreds of coefficients in 40 images: well under a part in ten
    assert abs(found.exponent - 2.2) < 0.1
    for a, b in zip(found.amplitude, true.amplitude, strict=True):
        assert abs(math.log(a / b)) < 0.1


def test_wiener_takes_grey_pictures_and_vectors_and_says_what_amplitudes_do_not_fit():
    for shape in ((1, 8, 8), (8, 8), (9,)):
        y = torch.full((1, *shape), 0.6)
        assert invflow.Wiener().sample(invflow.GaussianLikelihood(Denoising(shape), y, 0.1), 1).image_shape == shape
    # a grey picture in three channels is the same picture
    grey = 0.5 + 0.1 * randn(1, 1, 8, 8)
    one = invflow.Wiener().sample(invflow.GaussianLikelihood(Denoising((1, 8, 8)), grey, 0.1), 1).mean()
    three = invflow.Wiener(level=0.25 * 3**0.5).sample(
        invflow.GaussianLikelihood(Denoising((3, 8, 8)), grey.expand(1, 3, 8, 8), 0.1 * 3**0.5), 1).mean()
    torch.testing.assert_close(three, one.expand_as(three))
    with pytest.raises(ValueError, match="3 amplitudes do not fit images"):
        invflow.Wiener().sample(invflow.GaussianLikelihood(Denoising((2, 8, 8)), torch.zeros(1, 2, 8, 8), 0.1), 1)
    with pytest.raises(ValueError, match="over 0"):
        invflow.Wiener(level=0)
    with pytest.raises(ValueError, match="fit takes images"):
        invflow.Wiener.fit(torch.zeros(4, 4))


# -- total variation -------------------------------------------------------------------------------------------------


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


# -- bicubic ---------------------------------------------------------------------------------------------------------


def test_bicubic_reproduces_quadratics_as_keys_promises():
    """Keys's kernel with a = -1/2 interpolates quadratics exactly; torch's own default, a = -3/4, does not."""
    factor, size = 4, 12

    def surface(rows: Tensor, columns: Tensor) -> Tensor:
        return 0.2 + 0.03 * rows - 0.02 * columns + 0.004 * rows**2 - 0.003 * columns**2 + 0.002 * rows * columns

    coarse = torch.arange(size, dtype=F64)
    fine = (torch.arange(size * factor, dtype=F64) + 0.5) / factor - 0.5  # centres of pixels
    y = surface(coarse[:, None], coarse)[None, None]
    operator = SuperResolution((1, size * factor, size * factor), factor=factor).double()
    found = invflow.Bicubic().sample(invflow.GaussianLikelihood(operator, y, 0.01), 1).samples[0, 0, 0]
    inner = slice(2 * factor, -2 * factor)
    torch.testing.assert_close(found[inner, inner], surface(fine[:, None], fine)[inner, inner], rtol=0, atol=1e-12)


def test_bicubic_agrees_with_pillow():
    import numpy as np
    from PIL import Image

    y = torch.rand(1, 1, 9, 7, generator=generator())
    found = invflow.Bicubic().sample(invflow.GaussianLikelihood(SuperResolution((1, 27, 21), factor=3), y, 0.01), 1)
    other = np.asarray(Image.fromarray(y[0, 0].numpy(), mode="F").resize((21, 27), Image.Resampling.BICUBIC))
    torch.testing.assert_close(found.samples[0, 0, 0], torch.tensor(other), rtol=0, atol=1e-5)


def test_bicubic_elsewhere():
    shape = (2, 4, 4)
    blur = GaussianBlur(shape, std=1.0, kernel_size=3)
    y = torch.rand(3, *shape, generator=generator())
    assert torch.equal(invflow.Bicubic().sample(invflow.GaussianLikelihood(blur, y, 0.1), 1).samples[:, 0], y)
    mask = torch.ones(4, 4, dtype=torch.bool)
    mask[1, 2] = False
    found = invflow.Bicubic().sample(invflow.GaussianLikelihood(MaskInpainting(mask, shape), y, 0.1), 1).samples[:, 0]
    assert torch.equal(found[..., mask], y[..., mask])
    torch.testing.assert_close(found[..., 1, 2], y[..., mask].mean(-1))
    matrix = MatrixOperator(randn(3, 5), image_shape=(5,))
    y = randn(2, 3, seed=1)
    found = invflow.Bicubic().sample(invflow.GaussianLikelihood(matrix, y, 0.1), 1).samples[:, 0]
    torch.testing.assert_close(found, y @ torch.linalg.pinv(randn(3, 5)).mT)


# -- BM3D ------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not HAS_BM3D, reason="bm3d is not installed")
@pytest.mark.parametrize("channels", [1, 3])
def test_bm3d_denoises_as_the_package_does(channels):
    import bm3d

    y = (edges(1, channels, 40, 32) + 0.1 * randn(1, channels, 40, 32)).float()
    found = invflow.BM3D().sample(invflow.GaussianLikelihood(Denoising((channels, 40, 32)), y, 0.1), 1).samples[0, 0]
    picture = y[0].double().permute(1, 2, 0).numpy()
    other = bm3d.bm3d(picture[..., 0], 0.1) if channels == 1 else bm3d.bm3d_rgb(picture, 0.1)
    other = torch.tensor(other, dtype=torch.float32).reshape(40, 32, -1).permute(2, 0, 1)
    torch.testing.assert_close(found, other, rtol=0, atol=1e-3)  # threads add up in any order
    assert (found - edges(channels, 40, 32)).abs().mean() < 0.3 * (y[0] - edges(channels, 40, 32)).abs().mean()


@pytest.mark.skipif(not HAS_BM3D, reason="bm3d is not installed")
@pytest.mark.parametrize("sides", [(5, 5), (4, 6)])
def test_bm3d_undoes_a_blur_without_a_shift(sides):
    import bm3d

    shape, kernel = (1, 48, 33), randn(*sides, seed=2).abs() ** 2
    operator = Blur(kernel / kernel.sum(), shape).double()
    truth = edges(2, *shape)
    y = operator.measure(truth, 0.01, generator=generator())
    found = invflow.BM3D().sample(invflow.GaussianLikelihood(operator, y, 0.01), 1).samples[:, 0]
    assert (metrics.psnr(found, truth) > metrics.psnr(y, truth) + 5).all()
    if sides == (5, 5):  # of odd sides the package's origin is the middle, as ours is
        other = bm3d.bm3d_deblurring(y[0, 0, :, :, None].numpy(), 0.01, (kernel / kernel.sum()).numpy())
        torch.testing.assert_close(found[0, 0].float(), torch.tensor(other).float(), rtol=0, atol=1e-3)
    colour = Blur(kernel / kernel.sum(), (3, 48, 33)).double()
    truth = edges(1, 3, 48, 33) * torch.tensor([1.0, 0.5, 0.8]).reshape(3, 1, 1)
    y = colour.measure(truth, 0.01, generator=generator())
    found = invflow.BM3D().sample(invflow.GaussianLikelihood(colour, y, 0.01), 1).samples[:, 0]
    assert (metrics.psnr(found, truth) > metrics.psnr(y, truth) + 5).all()


@pytest.mark.skipif(not HAS_BM3D, reason="bm3d is not installed")
@pytest.mark.parametrize("name", ["mask", "super-resolution", "blur, reflected"])
def test_bm3d_says_what_it_does_not_take(name):
    likelihood = likelihood_of(operators((3, 16, 16))[name])
    with pytest.raises(ValueError, match=r"is neither: use invflow.TotalVariation"):
        invflow.BM3D().sample(likelihood, 1)
    with pytest.raises(ValueError, match="there is no profile 'fast'"):
        invflow.BM3D(profile="fast")


def test_bm3d_is_imported_by_nothing_else_and_missed_with_a_word_on_its_licence(monkeypatch):
    code = ("import sys, invflow; invflow.BM3D; invflow.TotalVariation(); invflow.Wiener()\n"
            "assert not {'bm3d', 'bm4d'} & set(sys.modules)")
    subprocess.run([sys.executable, "-c", code], check=True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="non-commercial use only"):
        invflow.BM3D()


# -- plug and play ---------------------------------------------------------------------------------------------------


class Ellipsoid(FlowMap):
    """The flow of a Gaussian with independent values of mean m and their own variances; states are in [-1, 1]."""

    def __init__(self, mean: Tensor, variance: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("variance", variance)
        self.state_shape = self.image_shape = tuple(mean.shape)

    @property
    def decode_affine(self) -> tuple[float, float]:
        return 0.5, 0.5

    def velocity(self, x: Tensor, t) -> Tensor:
        t = expand_time(t, x)
        gain = (t * self.variance - (1 - t)) / (t**2 * self.variance + (1 - t) ** 2)
        return self.mean + gain * (x - t * self.mean)


def ellipsoid(shape: tuple[int, ...]) -> Ellipsoid:
    return Ellipsoid(0.3 * randn(*shape, seed=11), 0.05 + 0.5 * randn(*shape, seed=12).abs())


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
    with pytest.raises(ValueError, match=r"the prior makes images of shape \(1, 4, 4\)"):
        invflow.PlugAndPlay(prior).sample(likelihood_of(Denoising((1, 8, 8))), 1)
    prior.resized = lambda shape: ellipsoid(shape)  # type: ignore[attr-defined]
    assert invflow.PlugAndPlay(prior).sample(likelihood_of(Denoising((1, 8, 8))), 1).image_shape == (1, 8, 8)
    prior.independent_noise = False
    with pytest.raises(ValueError, match="trained jointly with an adapter"):
        invflow.PlugAndPlay(prior)
    with pytest.raises(TypeError, match="takes a FlowMap"):
        invflow.PlugAndPlay("mnist")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="over 0"):
        invflow.PlugAndPlay(ellipsoid((1, 4, 4)), first=0.0)


# -- what they share -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bicubic", "wiener", "tv", "plug-and-play"])
def test_copies_of_one_image_and_what_is_said_of_them(name, tmp_path):
    prior, likelihood = ellipsoid((1, 8, 8)), likelihood_of(operators((1, 8, 8))["mask"])
    posterior = solver_by_name(name, prior).sample(likelihood, 20)
    assert posterior.samples.shape == (2, 20, 1, 8, 8)
    assert posterior.samples.stride(1) == 0, "copies take the memory of one"
    assert not posterior.weighted
    assert posterior.diagnostics["point_estimate"] is True
    assert posterior.seconds > 0
    truth = edges(2, 1, 8, 8)
    crps = metrics.crps(posterior.samples, truth)
    torch.testing.assert_close(crps, (posterior.mean() - truth).abs())
    posterior.save(tmp_path / "posterior.safetensors")
    again = invflow.Posterior.load(tmp_path / "posterior.safetensors")
    torch.testing.assert_close(again.mean(), posterior.mean())
    assert again.diagnostics["point_estimate"] is True
    one = solver_by_name(name, prior, chunk_size=1).sample(likelihood, 1)
    torch.testing.assert_close(one.mean(), posterior.mean())
    with pytest.raises(TypeError, match="takes a GaussianLikelihood"):
        solver_by_name(name, prior).sample(invflow.FunctionReward(lambda x: x.flatten(1).sum(1)), 1)
    with pytest.raises(ValueError, match="at least one sample"):
        solver_by_name(name, prior).sample(likelihood, 0)
    with pytest.raises(ValueError, match="chunk_size=0"):
        solver_by_name(name, prior, chunk_size=0)


def test_comparisons_leave_out_what_a_point_estimate_does_not_have(tmp_path):
    shape = (1, 12, 12)
    truth = edges(6, *shape).float()
    prior = invflow.GaussianMixtureFlow(truth[:1], std=0.1)
    problem = invflow.Problem("test/edges", None, Denoising(shape), 0.1, images=lambda split: truth,
                              prior=lambda: prior)
    found = invflow.compare(problem, {"exact": "exact", "tv": "tv"}, num_observations=3, num_samples=20,
                            output=tmp_path, gallery=1)
    values = found.values["test/edges"]
    assert {"coverage", "spread", "crps"} <= set(values["exact"])
    assert not {"coverage", "spread"} & set(values["tv"])
    assert {"crps", "psnr", "ssim", "energy"} <= set(values["tv"])
    assert "tv" in (tmp_path / "table.md").read_text()


def test_the_linear_solver_solves_and_stops():
    root = randn(12, 12)
    matrix = root @ root.mT + 0.1 * torch.eye(12, dtype=F64)
    right = torch.stack([randn(12, seed=1), torch.zeros(12, dtype=F64)])
    for start in (None, randn(2, 12, seed=2)):
        found, taken = solve(lambda x: x @ matrix, right, lambda x: x / matrix.diagonal(), 200, 1e-12, start)
        torch.testing.assert_close(found[0], torch.linalg.solve(matrix, right[0]), rtol=1e-6, atol=1e-6)
        assert 0 < taken[0] < 200
    assert torch.equal(solve(lambda x: x @ matrix, right, lambda x: x, 200, 1e-12)[0][1], right[1])


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


# -- the photographs -------------------------------------------------------------------------------------------------


PHOTO_TASKS = ["denoising", "random_inpainting", "box_inpainting", "super_resolution", "super_resolution_x2",
               "super_resolution_x3", "gaussian_blur", "motion_blur"]


@pytest.mark.parametrize("task", PHOTO_TASKS)
def test_photo_problems_keep_the_contract(task):
    from invflow.testing import check_problem
    from invflow_problems import photo_problems

    problem = getattr(photo_problems, f"photos_{task}")
    assert problem.name == f"photos/{task.replace('_', '-')}"
    check_problem(problem)
    expected = "super_resolution_x4" if task == "super_resolution" else task
    assert problem.problem_class == expected.replace("_", "-")


def test_photographs_are_split_whole():
    from invflow_problems import photo_samples, photo_split

    splits = [photo_split.HELD_OUT, photo_split.VALIDATION, photo_split.TRAINING]
    names = [name for split in splits for name in split]
    assert len(names) == len(set(names))
    for split, own in (("test", photo_split.HELD_OUT), ("validation", photo_split.VALIDATION)):
        assert {crop.photo for crop in photo_samples.CROPS[split]} == set(own)
        images = photo_samples.load_photos(split)
        assert images.shape == (len(photo_samples.CROPS[split]), 3, 256, 256)
        assert images.min() >= 0
        assert images.max() <= 1
        assert (images.flatten(1).std(1) > 0.05).all(), "a crop shows nothing"
    with pytest.raises(ValueError, match="splits are"):
        photo_samples.load_photos("training")


def test_samples_are_cut_where_the_crops_say(tmp_path):
    from PIL import Image
    from safetensors.torch import load_file

    from invflow_problems import make_samples, photo_samples

    for crop in {c.photo: c for crops in photo_samples.CROPS.values() for c in crops}.values():
        folder = tmp_path / "photos" / crop.photo / "contents" / "images"
        folder.mkdir(parents=True)
        ramp = torch.arange(1280).expand(1000, 1280) * 200 // 1279
        Image.fromarray(torch.stack([ramp, ramp, ramp], 2).to(torch.uint8).numpy()).save(folder / "a.jpg", quality=95)
    make_samples.main(["photos", str(tmp_path / "photos"), "--output", str(tmp_path)])
    tensors = load_file(tmp_path / "photos.safetensors")
    for split, crops in photo_samples.CROPS.items():
        assert tensors[f"{split}_images"].shape == (len(crops), 3, 256, 256)
        for image, crop in zip(tensors[f"{split}_images"].float(), crops, strict=True):
            expected = (crop.left + 128) / 640 * 200
            assert abs(float(image[:, :, 127:129].mean()) - expected) < 2
    with pytest.raises(ValueError, match="there is no photograph"):
        photo_samples.make_photos([tmp_path / "empty"], Path(tmp_path))
