"""Flow maps from velocities and denoisers, against Gaussian and empirical distributions in closed form."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from invflow import GaussianMixtureFlow, from_deepinv, from_velocity
from invflow.testing import check_flow_map

F64 = torch.float64
SHAPE = (1, 4, 4)
MEAN, STD = 0.2, 0.4  # of states; images have mean 0.6 and standard deviation 0.2


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def gaussian_flow() -> GaussianMixtureFlow:
    return GaussianMixtureFlow(torch.full((1, *SHAPE), MEAN, dtype=F64), STD)


def gaussian_denoiser(x: Tensor, sigma: Tensor) -> Tensor:
    """E[image | image + sigma e = x] of images from N(0.6, 0.2^2), on images in [0, 1]."""
    variance = (STD / 2) ** 2
    return (MEAN + 1) / 2 + (x - (MEAN + 1) / 2) * variance / (variance + sigma.reshape(-1, 1, 1, 1) ** 2)


def mixture(steps: int = 16) -> GaussianMixtureFlow:
    return GaussianMixtureFlow(2 * randn(3, 2, seed=1), 0.5, steps=steps)


def wrap(reverse: bool = False, **options: Any) -> Any:
    exact = mixture()
    velocity: Callable[[Tensor, Tensor], Tensor] = exact.velocity
    if reverse:  # somebody whose time has the data at 0: x_t = (1 - t) m + t z, velocity z - m
        velocity = lambda x, t: -exact.velocity(x, 1 - t)  # noqa: E731
        options["convention"] = "data-at-0"
    return from_velocity(velocity, (2,), **{"steps": 50, **options}).double()


# -- velocities -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("reverse", [False, True])
def test_velocity_in_either_convention(reverse: bool) -> None:
    exact, prior, x = mixture(), wrap(reverse, steps=200), randn(20, 2)
    times = torch.linspace(0, 1, 20, dtype=F64)
    torch.testing.assert_close(prior.velocity(x, times), exact.velocity(x, times), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(prior.denoise(x, 0.3), exact.denoise(x, 0.3), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(prior.score(x, 0.3), exact.score(x, 0.3), rtol=1e-9, atol=1e-9)
    error = (prior.jump(x, 0.0, 1.0) - exact.jump(x, 0.0, 1.0)).square().mean().sqrt()
    assert error < 1e-3


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("midpoint", 2), ("heun", 2), ("rk4", 4)])
def test_jump_converges_with_the_order_of_its_method(method: str, order: int) -> None:
    z, steps = randn(50, 2), [20, 60]
    exact = mixture(steps=200).jump(z, 0.1, 0.8)
    solutions = [wrap(method=method, steps=k).jump(z, 0.1, 0.8) for k in steps]
    errors = [float((x - exact).square().mean().sqrt()) for x in solutions]
    assert math.log(errors[0] / errors[1]) / math.log(3) > order - 0.4, errors
    assert errors[1] < 0.05


def test_cost_is_steps_times_stages() -> None:
    z = randn(5, 2)
    for method, stages in (("euler", 1), ("midpoint", 2), ("heun", 2), ("rk4", 4), ("dopri5", 6)):
        prior = wrap(method=method, steps=7)
        with prior.count() as calls:
            prior.jump(z, 0.0, 1.0)
        assert calls.forward == 5 * 7 * stages


def test_decoding_by_numbers_or_functions() -> None:
    affine = wrap(decode=(0.5, 0.5))
    x = randn(3, 2)
    assert affine.decode_affine == (0.5, 0.5)
    torch.testing.assert_close(affine.decode(x), x / 2 + 0.5)
    by_functions = wrap(decode=(lambda x: x[:, None].exp(), lambda x: x[:, 0].log()), image_shape=(1, 2))
    assert by_functions.decode_affine is None
    assert by_functions.generate(3, generator=torch.Generator()).shape == (3, 1, 2)
    torch.testing.assert_close(by_functions.encode(by_functions.decode(x)), x)


def test_module_moves_and_is_found() -> None:
    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rate = torch.nn.Parameter(torch.tensor(-0.5))

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return self.rate * x

    prior = from_velocity(Network(), (3,), steps=20)
    assert len(list(prior.parameters())) == 1
    x = prior.double().jump(torch.ones(1, 3, dtype=F64), 0.0, 1.0)
    torch.testing.assert_close(x, torch.full((1, 3), math.exp(-0.5), dtype=F64), rtol=1e-4, atol=0)
    assert prior.generate(2, generator=torch.Generator()).dtype == F64


def test_jointly_trained_velocity_has_no_score() -> None:
    prior = wrap(independent_noise=False)
    with pytest.raises(ValueError, match="gives no score"):
        prior.score(randn(2, 2), 0.5)


@pytest.mark.parametrize("options", [{"reverse": True, "independent_noise": False}, {"decode": (0.5, 0.5)}])
def test_contract_of_velocities(options: dict[str, Any]) -> None:
    check_flow_map(wrap(**options, steps=15, method="rk4"), tolerance=5e-3)


@pytest.mark.parametrize(("options", "error", "words"), [
    ({"convention": "backwards"}, ValueError, "data-at-1"),
    ({"method": "verlet"}, ValueError, "choose one of"),
    ({"steps": 0}, ValueError, "at least 1 step"),
    ({"decode": (0.0, 1.0)}, ValueError, "scale must not be 0"),
    ({"decode": (0.5, abs)}, TypeError, "two functions"),
    ({"image_shape": (1, 2)}, ValueError, "decode_function"),
])
def test_from_velocity_refuses(options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        wrap(**options)


def test_velocity_of_another_shape_is_refused() -> None:
    prior = from_velocity(lambda x, t: x.sum(1), (2,), steps=3)
    with pytest.raises(ValueError, match="shape of the states"):
        prior.velocity(torch.zeros(4, 2), 0.5)
    with pytest.raises(TypeError, match="pass a function"):
        from_velocity(None, (2,), steps=3)  # type: ignore[arg-type]


# -- denoisers ------------------------------------------------------------------------------------------


def test_denoiser_of_a_gaussian_gives_its_flow() -> None:
    exact, z = gaussian_flow(), randn(20, *SHAPE)
    prior = from_deepinv(gaussian_denoiser, SHAPE, steps=80, sigma_max=1e3).double()
    for t in (0.01, 0.5, 0.9):
        torch.testing.assert_close(prior.velocity(z, t), exact.velocity(z, t), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(prior.score(z, t), exact.score(z, t), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(prior.jump(z, 0.0, 1.0), exact.jump(z, 0.0, 1.0), rtol=1e-4, atol=1e-5)
    images = prior.generate(500, generator=torch.Generator().manual_seed(0))
    assert abs(images.mean() - 0.6) < 4.5 * 0.2 / math.sqrt(8000)
    assert abs(images.std() - 0.2) < 4.5 * 0.2 / math.sqrt(2 * 8000)


def test_denoiser_calls_are_counted() -> None:
    prior, z = from_deepinv(gaussian_denoiser, SHAPE, steps=3, sigma_max=10.0).double(), randn(4, *SHAPE)
    for method in (prior.denoise, prior.velocity, prior.score):
        with prior.count() as calls:
            method(z, 0.5)
        assert calls.forward == 4
    with prior.count() as calls:
        prior.jump(z, 0.0, 1.0)
    assert calls.forward == 4 * 3 * 2


def test_ends_of_the_path_are_finite_and_close() -> None:
    exact, x = gaussian_flow(), MEAN + STD * randn(20, *SHAPE)
    prior = from_deepinv(gaussian_denoiser, SHAPE, steps=10, sigma_max=1e3, sigma_min=1e-4).double()
    torch.testing.assert_close(prior.velocity(x, 0.0), exact.velocity(x, 0.0), rtol=0, atol=1e-3)
    torch.testing.assert_close(prior.velocity(x, 1.0), exact.velocity(x, 1.0), rtol=0, atol=5e-3)


def test_levels_stay_within_what_the_denoiser_knows() -> None:
    levels: list[Tensor] = []

    def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
        # the noise that it is given has the level that it is told: data are a point here
        levels.append(sigma)
        spread = (x - (MEAN + 1) / 2).flatten(1).square().mean(1).sqrt()
        torch.testing.assert_close(spread, sigma, rtol=0.05, atol=0.01)
        return torch.full_like(x, (MEAN + 1) / 2)

    prior = from_deepinv(denoiser, (1, 64, 64), steps=5, sigma_max=2.0, sigma_min=0.05).double()
    z = randn(3, 1, 64, 64)
    for t in (0.0, 0.1, 0.2, 0.5, 0.9):
        # the clamped state forgets most of the data before the first known level
        state = (1 - t) * z + t * MEAN if t >= 0.2 else (1 - t) * z
        prior.velocity(state, t)
    prior.denoise(torch.full_like(z, MEAN) + 0.1 * z, 1 / 1.1)
    every = torch.cat(levels)
    assert every.max() <= 2.0 + 1e-12
    assert every.min() >= 0.05 - 1e-12
    torch.testing.assert_close(levels[3], torch.full((3,), 0.5, dtype=F64))


def test_denoiser_of_an_image_set_in_deepinv() -> None:
    """deepinv's exact denoiser of five images, against the mixture flow of those images, very narrow."""
    models = pytest.importorskip("deepinv.models")
    images = torch.rand(5, *SHAPE, generator=torch.Generator().manual_seed(2), dtype=F64)
    denoiser = models.MMSE(dataloader=images, device=torch.device("cpu"), dtype=F64)
    prior = from_deepinv(denoiser, SHAPE, steps=200, sigma_max=50.0).double()
    exact, z = GaussianMixtureFlow(2 * images - 1, 1e-3), randn(30, *SHAPE)
    torch.testing.assert_close(prior.velocity(z, 0.5), exact.velocity(z, 0.5), rtol=0, atol=1e-3)
    x = prior.decode(prior.jump(z, 0.0, 1.0))
    torch.testing.assert_close(x, exact.jump(z, 0.0, 1.0) / 2 + 0.5, rtol=0, atol=5e-3)
    assert (torch.cdist(x.flatten(1), images.flatten(1)).min(1).values < 0.02).all()


def test_network_of_deepinv_keeps_the_contract() -> None:
    models = pytest.importorskip("deepinv.models")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = models.DRUNet(1, 1, nc=(4, 4, 4, 4), nb=1, pretrained=None)
    prior = from_deepinv(network, (1, 8, 8), steps=2, sigma_max=1.0)
    assert len(list(prior.parameters())) > 0
    check_flow_map(prior, exact=False, tolerance=0.1)


def test_contract_of_a_gaussian_denoiser() -> None:
    check_flow_map(lambda: from_deepinv(gaussian_denoiser, SHAPE, steps=30, sigma_max=100.0).double())


def test_from_deepinv_refuses() -> None:
    with pytest.raises(ValueError, match="sigma_min < sigma_max"):
        from_deepinv(gaussian_denoiser, SHAPE, steps=5, sigma_max=1e-4)
    with pytest.raises(TypeError, match="pass a denoiser"):
        from_deepinv(3, SHAPE, steps=5, sigma_max=1.0)  # type: ignore[arg-type]
    prior = from_deepinv(lambda x, sigma: x.mean(1), SHAPE, steps=5, sigma_max=1.0)
    with pytest.raises(ValueError, match="keep the shape"):
        prior.velocity(torch.zeros(2, *SHAPE), 0.5)
