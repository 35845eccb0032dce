"""The well-known baselines: each against a closed form, an optimality condition, or another implementation.

The iterative ones, total variation and plug-and-play, are in ``test_splitting.py``.
"""

from __future__ import annotations

import importlib.util
import math
import subprocess
import sys

import pytest
import torch
from classical_tools import F64, dense, edges, ellipsoid, generator, likelihood_of, operators, randn
from torch import Tensor

import invflow
from invflow import metrics
from invflow.linear.spectral import opponent_matrix
from invflow.operators import Blur, Denoising, GaussianBlur, MaskInpainting, MatrixOperator, SuperResolution
from invflow.registry import solver_by_name

HAS_BM3D = importlib.util.find_spec("bm3d") is not None


# -- Wiener -----------------------------------------------------------------------------------------------------------


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


# -- bicubic ----------------------------------------------------------------------------------------------------------


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


# -- BM3D -------------------------------------------------------------------------------------------------------------


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


# -- copies of one image ----------------------------------------------------------------------------------------------


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
