"""Stationary Gaussian images: transforms, spectra, the best linear estimate, the maps and adapters built on them."""

import math

import pytest
import scipy.fft
import torch
from spectral_parts import AFFINE, natural, spectral_map

import invflow
from invflow.linear import spectral
from invflow.linear.spectral import Spectrum, block_dct, dct2, gaussian_estimate, opponent_matrix
from invflow.operators import (
    BoxInpainting,
    Denoising,
    GaussianBlur,
    MaskInpainting,
    MatrixOperator,
    SuperResolution,
)


def dense(spectrum: Spectrum, shape: tuple[int, int, int]) -> torch.Tensor:
    """S^{1/2} as a matrix."""
    units = torch.eye(math.prod(shape), dtype=torch.float64).view(-1, *shape)
    return spectrum.colour(units).flatten(1).T


def test_cosine_transform_is_the_orthonormal_one_of_scipy():
    x = torch.randn(2, 3, 9, 14, dtype=torch.float64)
    expected = scipy.fft.dctn(x.numpy(), axes=(-2, -1), norm="ortho")
    torch.testing.assert_close(dct2(x), torch.as_tensor(expected))
    torch.testing.assert_close(dct2(dct2(x), inverse=True), x)


def test_fast_transform_of_large_images_is_the_same(monkeypatch):
    x = torch.randn(2, 9, 14, dtype=torch.float64)
    by_matrix = dct2(x)
    monkeypatch.setattr("invflow.linear.spectral.LARGEST_MATRIX", 1)
    torch.testing.assert_close(dct2(x), by_matrix)
    torch.testing.assert_close(dct2(by_matrix, inverse=True), x)


@pytest.mark.parametrize("shape", [(16, 24), (19, 30), (5, 8), (3, 1)])
def test_block_cosines_are_orthonormal_and_stay_in_their_block(shape):
    x = torch.randn(2, 3, *shape, dtype=torch.float64)
    torch.testing.assert_close(block_dct(block_dct(x), inverse=True), x)
    torch.testing.assert_close(block_dct(x).square().sum(), x.square().sum())
    single = torch.zeros(1, 1, *shape, dtype=torch.float64)
    single[..., 0, 0] = 1.0
    outside = block_dct(single)[..., 8:, :]
    assert outside.numel() == 0 or outside.abs().max() < 1e-12


def test_block_cosine_matches_scipy_in_the_first_block():
    x = torch.randn(16, 16, dtype=torch.float64)
    expected = scipy.fft.dctn(x[:8, :8].numpy(), norm="ortho")
    torch.testing.assert_close(block_dct(x)[:8, :8], torch.as_tensor(expected))


def test_opponent_colours_are_orthonormal():
    matrix = opponent_matrix(3, torch.float64)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(3, dtype=torch.float64))


def test_estimate_recovers_a_known_spectrum():
    spectrum = natural()
    z = torch.randn(1500, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = Spectrum.estimate(spectrum.colour(z)).double()
    # within the band that crops of 32 pixels hold; each coefficient's variance is a mean of 1,500
    inside = (Spectrum.frequencies() >= 1 / 48) & (Spectrum.frequencies() <= 0.6)
    error = (found.log_std - spectrum.log_std)[:, inside].abs()
    assert error.max() < 0.06, error


def test_spectrum_follows_its_power_law_at_any_size():
    spectrum = natural(1)
    for height, width in ((16, 16), (50, 37), (300, 200)):
        scales = spectrum.scales(height, width)
        radius = math.hypot(3 / (2 * height), 5 / (2 * width))
        assert math.isclose(float(scales[0, 3, 5]), math.exp(-3) / radius, rel_tol=1e-5)
    # the same correlation between neighbours, whatever the frame: the law of a crop is not that of its file's size
    small, large = (spectrum.scales(n, n)[0].square() for n in (64, 256))
    contrast = [(p * (2 - 2 * torch.cos(math.pi * torch.arange(len(p), dtype=torch.float64) / len(p)))).mean()
                for p in (small, large)]
    assert math.isclose(float(contrast[0]), float(contrast[1]), rel_tol=0.05)


def scattered_mask(shape):
    return (torch.rand(1, *shape[1:], generator=torch.Generator().manual_seed(1)) > 0.5).float()


OPERATORS = {
    "denoising": lambda shape: Denoising(shape),
    "hole": lambda shape: BoxInpainting(shape, box=(6, 5)),
    "scattered": lambda shape: MaskInpainting(scattered_mask(shape), shape),
    "blur": lambda shape: GaussianBlur(shape, std=1.0, kernel_size=5),
    "super-resolution": lambda shape: SuperResolution(shape, factor=3),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_gaussian_estimate_is_the_posterior_mean(name):
    shape = (3, 12, 11)
    operator, spectrum, mean = OPERATORS[name](shape).double(), natural(), torch.full((3, 1, 1), 0.2).double()
    g = torch.Generator().manual_seed(2)
    x = (spectrum.colour(torch.randn(2, *shape, generator=g, dtype=torch.float64)) + mean) * 0.5 + 0.5
    sigma = torch.tensor([0.005, 0.2], dtype=torch.float64)  # one below the levels that masks come down by
    y = operator.measure(x, sigma, generator=g)
    found = gaussian_estimate(spectrum, mean, AFFINE, operator, y, sigma, iterations=400)
    d = math.prod(shape)
    root = dense(spectrum, shape) * 0.5
    a = operator(torch.eye(d, dtype=torch.float64).view(-1, *shape)).flatten(1).T
    prior_mean = (mean * 0.5 + 0.5).expand(shape).flatten()
    for row in range(2):
        precision = torch.linalg.inv(root @ root.T) + a.T @ a / sigma[row] ** 2
        observed = operator.observed()
        seen = torch.ones(len(a), dtype=torch.bool) if observed is None else observed[0].flatten()
        difference = torch.where(seen, y[row].flatten() - a @ prior_mean, 0.0)
        exact = prior_mean + torch.linalg.solve(precision, a.T @ difference) / sigma[row] ** 2
        torch.testing.assert_close((found[row] * 0.5 + 0.5).flatten(), exact, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["hole", "scratch", "scattered"])
def test_low_noise_is_reached_from_above(kind, monkeypatch):
    """At sigma itself as many steps leave much more of the error: what is hidden is still grey."""
    shape, mean = (3, 96, 96), torch.zeros(3, 1, 1).double()
    prior = invflow.load_prior("photos")
    assert isinstance(prior, invflow.NeuralFlowMap)
    assert prior.spectrum is not None
    spectrum = prior.spectrum.double()
    mask = scattered_mask(shape)
    if kind == "hole":
        mask = torch.ones(1, 96, 96)
        mask[:, 30:62, 20:60] = 0
    elif kind == "scratch":
        mask = torch.ones(1, 96, 96)
        for row in range(96):
            for start in (10, 35, 60):
                mask[:, row, start + row // 4 : start + row // 4 + 3] = 0
    operator = MaskInpainting(mask.expand(3, -1, -1), shape).double()
    g = torch.Generator().manual_seed(3)
    x = spectrum.colour(torch.randn(1, *shape, generator=g, dtype=torch.float64)) * 0.5 + 0.5
    sigma = torch.tensor([0.003], dtype=torch.float64)
    y = operator.measure(x, sigma, generator=g)

    def error(iterations):
        estimate = gaussian_estimate(spectrum, mean, AFFINE, operator, y, sigma, iterations=iterations)
        return float((estimate * 0.5 + 0.5 - x).square().mean().sqrt())

    best, found = error(1000), error(24)
    assert best < found < 1.15 * best
    steps = 24 * len(spectral.LEVELS)
    monkeypatch.setattr(spectral, "LEVELS", (0.0,))
    assert error(steps) > 1.5 * found


def test_masks_with_and_without_holes_in_one_batch():
    """Each row is that of its own mask alone."""
    shape, spectrum, mean = (1, 32, 32), natural(1), torch.zeros(1, 1, 1).double()
    hole = torch.ones(1, 32, 32)
    hole[:, 8:20, 9:21] = 0
    masks = torch.stack([hole, scattered_mask(shape), torch.ones(1, 32, 32)])
    g = torch.Generator().manual_seed(4)
    x = spectrum.colour(torch.randn(3, *shape, generator=g, dtype=torch.float64)) * 0.5 + 0.5
    sigma = torch.full((3,), 0.02, dtype=torch.float64)
    y = MaskInpainting(masks, shape).double().measure(x, sigma, generator=g)
    together = gaussian_estimate(spectrum, mean, AFFINE, MaskInpainting(masks, shape).double(), y, sigma)
    for row in range(3):
        alone = gaussian_estimate(spectrum, mean, AFFINE, MaskInpainting(masks[row], shape).double(), y[row][None],
                                  sigma[:1])
        torch.testing.assert_close(together[row], alone[0])


def test_untrained_spectral_map_is_the_gaussian_flow():
    prior = spectral_map((3, 10, 12)).double()
    spectrum, mean = prior.spectrum, prior.mean
    x, t = torch.randn(2, 3, 10, 12, dtype=torch.float64), 0.6
    root = dense(spectrum, (3, 10, 12))
    covariance = root @ root.T
    d = len(root)
    # m ~ N(mean, S), z ~ N(0, I): E[m - z | x_t] by the rule for joint Gaussians
    joint = (1 - t) ** 2 * torch.eye(d, dtype=torch.float64) + t**2 * covariance
    cross = t * covariance - (1 - t) * torch.eye(d, dtype=torch.float64)
    flat_mean = mean.expand(3, 10, 12).flatten()
    expected = flat_mean + (cross @ torch.linalg.solve(joint, (x.flatten(1) - t * flat_mean).T)).T
    torch.testing.assert_close(prior.velocity(x, t).flatten(1), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(prior.jump(prior.jump(x, 0.0, 0.3), 0.3, 1.0), prior.jump(x, 0.0, 1.0))
    torch.testing.assert_close(prior.jump(x, 0.0, 1.0), mean + spectrum.colour(x))


def test_resized_map_shares_weights_and_keeps_its_fingerprint():
    prior = spectral_map()
    larger = prior.resized((3, 50, 37))
    assert larger.network is prior.network
    assert larger.fingerprint() == prior.fingerprint()
    assert larger.generate(2, steps=1, generator=torch.Generator().manual_seed(0)).shape == (2, 3, 50, 37)
    assert prior.image_shape == (3, 32, 32)
    with pytest.raises(ValueError, match="cannot take"):
        prior.resized((1, 32, 32))
    tied = invflow.NeuralFlowMap((3, 32, 32), options={"channels": [8], "blocks": 1, "attention": False},
                                 mean=torch.zeros(3, 32, 32))
    with pytest.raises(ValueError, match="has a fixed size"):
        tied.resized((3, 40, 40))


def test_nonlinear_operators_fall_back_to_their_embedding():
    operator = MatrixOperator(torch.eye(12), image_shape=(12,))
    assert operator.linear
    square = Square((1, 4, 4))
    y = square(torch.rand(2, 1, 4, 4))
    found = gaussian_estimate(natural(1).float(), torch.zeros(1, 1, 1), AFFINE, square, y, torch.full((2,), 0.1))
    torch.testing.assert_close(found * 0.5 + 0.5, square.embed(y))


class Square(invflow.Operator):
    linear = False

    def __init__(self, image_shape):
        super().__init__()
        self.image_shape = self.measurement_shape = tuple(image_shape)
        self.linear = False

    def forward(self, x):
        return x.square()
