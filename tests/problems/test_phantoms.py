"""MRI and CT of phantoms: operators against plain arithmetic, posteriors against the Gaussian's closed form."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

import invflow
from invflow_problems import phantoms
from invflow_problems.recipes import ellipses

pytest.importorskip("deepinv")
GENERATOR = torch.Generator


def test_phantoms_are_ellipses() -> None:
    images = phantoms.draw_phantoms(500, GENERATOR().manual_seed(0))
    assert images.shape == (500, 1, 32, 32)
    assert 0 <= float(images.min()) <= float(images.max()) <= 1
    assert float(images[..., [0, -1], :].max()) == 0  # air around the body
    # the area of ellipses with half axes from 0.6 to 0.8 of 16 pixels: pi a b, whose mean is pi (0.7 * 16)^2
    area = (images > 0).float().sum((1, 2, 3))
    assert float(area.mean()) == pytest.approx(math.pi * (0.7 * 16) ** 2, rel=0.12)  # with a rim, and clipped holes
    one = phantoms._ellipses(*(torch.full((1, 1, 1, 1), v) for v in (0.1, -0.2, 0.5, 0.3, 0.7)))
    assert float(one.sum()) == pytest.approx(math.pi * 0.5 * 0.3 * 16**2, rel=0.02)
    axis = (torch.arange(32) + 0.5) / 16 - 1
    assert float((one[0, 0].sum(0) * axis).sum() / one.sum()) == pytest.approx(0.1, abs=0.01)
    assert float((one[0, 0].sum(1) * axis).sum() / one.sum()) == pytest.approx(-0.2, abs=0.01)


def test_the_phase_is_smooth_and_leaves_the_magnitude() -> None:
    real = phantoms.draw_phantoms(20, GENERATOR().manual_seed(3))
    parts = phantoms.draw_complex_phantoms(20, GENERATOR().manual_seed(3))
    torch.testing.assert_close(parts.square().sum(1, keepdim=True).sqrt(), real, atol=1e-6, rtol=0)
    numbers = torch.complex(parts[:, 0], parts[:, 1])
    turn = (numbers[:, :, 1:] * numbers[:, :, :-1].conj()).angle()[real[:, 0, :, 1:] * real[:, 0, :, :-1] > 0.01]
    assert float(turn.abs().max()) < 0.5
    assert float(turn.abs().mean()) > 0.01


def test_a_centred_disc_is_seen_alike_from_all_sides() -> None:
    """The fan beam's reading through the middle is the disc's diameter, in pixels of full density."""
    disc = phantoms._ellipses(*(torch.full((1, 1, 1, 1), v) for v in (0.0, 0.0, 0.5, 0.5, 0.0)))
    sinogram = phantoms.phantoms_ct.operator(disc)
    assert sinogram.shape == (1, 1, 48, 30)
    middle = sinogram[0, 0, 23:25].mean(0)
    assert float(middle.std()) < 0.03 * float(middle.mean())
    assert float(middle.mean()) == pytest.approx(16, rel=0.05)
    assert float(sinogram[0, 0, [0, -1]].abs().max()) == 0


def test_mri_is_the_fourier_transform_of_what_each_coil_sees() -> None:
    operator = phantoms.phantoms_mri.operator
    parts = phantoms.draw_complex_phantoms(2, GENERATOR().manual_seed(1))
    seen = phantoms._coils() * torch.complex(parts[:, 0], parts[:, 1])[:, None]
    k_space = torch.fft.fftshift(torch.fft.fft2(torch.fft.ifftshift(seen, dim=(-2, -1)), norm="ortho"), dim=(-2, -1))
    expected = torch.stack([k_space.real, k_space.imag], 1) * phantoms._mask()[None]
    torch.testing.assert_close(operator(parts), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(phantoms._coils().abs().square().sum(1), torch.ones(1, 32, 32))
    share = float(operator.observed().float().mean())
    assert share == float(phantoms._mask().mean()) == 0.5


def matrix(operator: invflow.Operator) -> Tensor:
    """Dense, ``(m, d)``, of the observed entries."""
    d = math.prod(operator.image_shape)
    columns = operator(torch.eye(d).view(d, *operator.image_shape)).flatten(1)
    keep = operator.observed()
    return (columns if keep is None else columns[:, keep.flatten()]).T.double()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["phantoms/ct", "phantoms/mri"])
def test_noise_rto_draws_from_the_exact_posterior(name: str) -> None:
    problem = invflow.load_problem(name)
    prior, operator = problem.prior, problem.operator
    _, likelihood = problem.simulate(1, generator=GENERATOR().manual_seed(0), source="prior")
    d = math.prod(operator.image_shape)
    # the map is affine in the noise, x = c + B z
    images = prior.decode(prior.jump(torch.cat([torch.zeros(1, d), torch.eye(d)]).view(-1, *operator.image_shape),
                                     0.0, 1.0)).flatten(1).double()
    c, b = images[0], (images[1:] - images[0]).T
    a, keep = matrix(operator), operator.observed()
    y = likelihood.y.flatten(1)[0] if keep is None else likelihood.y[0][keep[0]]
    forward = a @ b / problem.sigma
    precision = torch.eye(d, dtype=torch.float64) + forward.T @ forward
    mean = c + b @ torch.linalg.solve(precision, forward.T @ ((y.double() - a @ c) / problem.sigma))
    covariance = b @ torch.linalg.solve(precision, b.T)
    n = 48
    posterior = invflow.NoiseRTO(prior).sample(likelihood, n, generator=GENERATOR().manual_seed(1))
    assert bool(posterior.diagnostics["converged"].all())
    samples = posterior.samples[0].flatten(1).double()
    # along random directions the mean and the spread of independent draws are within four standard errors
    directions = torch.randn(40, d, dtype=torch.float64, generator=GENERATOR().manual_seed(2))
    std = ((directions @ covariance) * directions).sum(1).sqrt()
    seen = (samples - mean) @ directions.T / std
    assert float(seen.mean(0).abs().max()) < 4 / math.sqrt(n)
    assert float((seen.var(0, unbiased=False).mean() - (1 - 1 / n)).abs()) < 4 * math.sqrt(2 / n / 40) + 0.03
    # and the prior's own spread is another one, where the measurement says anything
    assert float(std.mean()) < 0.5 * float(((directions @ b @ b.T) * directions).sum(1).sqrt().mean())


def test_priors_are_trained_on_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"channels": [4, 8], "blocks": 1, "embedding": 16, "attention": False}
    monkeypatch.setattr(ellipses, "NETWORK", small)
    for recipe, name in ((ellipses.ellipses, "phantoms/ct"), (ellipses.ellipses_complex, "phantoms/mri")):
        recipe(tmp_path / recipe.name, steps=1, batch_size=4, progress=False)
        problem = invflow.load_problem(name).with_prior(tmp_path / recipe.name)
        assert tuple(problem.prior.image_shape) == problem.image_shape
        # before it has learned anything it is the Gaussian with the same mean and spectrum, from other phantoms
        assert float(problem.prior.std.mean()) == pytest.approx(float(invflow.load_problem(name).prior.std.mean()),
                                                                rel=0.03)
