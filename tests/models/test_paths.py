"""Velocities on other paths and with coupled noise, against the closed forms of a Gaussian."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from gaussian_priors import DIM, F64, MEAN, SHAPE, STD, assert_posterior, assert_samples, randn, velocity_on
from torch import Tensor

import invflow
from invflow.models.paths import SchedulePath
from invflow.testing import check_flow_map

QUARTER = math.pi / 2


def vp(t: Tensor) -> Tensor:
    """Share of data of the diffusion with beta from 0.1 to 20, noise at 0."""
    return torch.exp(-0.25 * 19.9 * (1 - t) ** 2 - 0.05 * (1 - t))


#: (alpha, sigma, convention) in the network's own time, and what is to be passed
CASES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "cosine": (lambda t: (QUARTER * t).sin(), lambda t: (QUARTER * t).cos(), {"path": "cosine"}),
    "cosine, data at 0": (lambda t: (QUARTER * t).cos(), lambda t: (QUARTER * t).sin(),
                          {"path": "cosine", "convention": "data-at-0"}),
    "vp": (vp, lambda t: (1 - vp(t) ** 2).sqrt(), {"path": "vp"}),
    "vp, data at 0": (lambda t: vp(1 - t), lambda t: (1 - vp(1 - t) ** 2).sqrt(),
                      {"path": "vp", "convention": "data-at-0"}),
    "custom": (lambda t: t**2, lambda t: 1 - t, {"path": (lambda t: t**2, lambda t: 1 - t)}),
    "custom, data at 0": (lambda t: (1 - t**2).sqrt(), lambda t: t,
                          {"path": (lambda t: (1 - t**2).sqrt(), lambda t: t), "convention": "data-at-0"}),
}


def prior_of(case: str, **options: Any) -> Any:
    alpha, sigma, settings = CASES[case]
    return invflow.from_velocity(velocity_on(alpha, sigma), SHAPE, **{"steps": 40, **settings, **options}).double()


def exact() -> invflow.GaussianMixtureFlow:
    return invflow.GaussianMixtureFlow(torch.full((1, DIM), MEAN, dtype=F64), STD)


@pytest.mark.parametrize("case", list(CASES))
def test_every_path_becomes_the_library_s_own(case: str) -> None:
    prior, x = prior_of(case), randn(20, DIM)
    times = torch.linspace(0.02, 0.98, 20, dtype=F64)
    torch.testing.assert_close(prior.velocity(x, times), exact().velocity(x, times), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(prior.score(x, 0.3), exact().score(x, 0.3), rtol=1e-6, atol=1e-6)
    assert (prior.jump(x, 0.0, 1.0) - exact().jump(x, 0.0, 1.0)).square().mean().sqrt() < 5e-3
    u = torch.linspace(0, 1, 11, dtype=F64)
    torch.testing.assert_close(prior.path.to_position(prior.path.to_time(u)), u, rtol=0, atol=1e-6)
    assert prior.velocity(x, 0.0).isfinite().all()
    assert prior.velocity(x, 1.0).isfinite().all()


def bent(x: Tensor, t: Tensor) -> Tensor:
    return torch.sin(3 * x) * torch.exp(t)[:, None]


def test_derivative_in_time_is_the_velocity_s() -> None:
    """This includes the table and Newton's steps, in forward mode, at states where the network is linear in neither."""
    for case in ("cosine", "custom"):
        prior, x = invflow.from_velocity(bent, SHAPE, steps=3, **CASES[case][2]).double(), randn(4, DIM)
        t, one = torch.full((4,), 0.4, dtype=F64), torch.ones(4, dtype=F64)
        _, tangent = torch.func.jvp(functools.partial(prior.velocity, x), (t,), (one,))
        h = 1e-5
        slope = (prior.velocity(x, t + h) - prior.velocity(x, t - h)) / (2 * h)
        torch.testing.assert_close(tangent, slope, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", ["cosine", "vp, data at 0"])
def test_tilting_has_the_right_spread(case: str) -> None:
    """0.212; the network taken for one of the linear path gives 0.167, and says converged."""
    assert_samples(prior_of(case), count=1000)
    assert_posterior(invflow.FMTT(prior_of(case, steps=5), steps=60, look_ahead="denoiser"), samples=200)


def test_noise_smc_on_the_cosine_path() -> None:
    assert_posterior(invflow.NoiseSMC(prior_of("cosine", steps=8, method="rk4")), samples=100, copies=8)


def test_the_contract_and_a_wrong_path() -> None:
    check_flow_map(prior_of("cosine", steps=15, method="rk4"), tolerance=5e-3)
    images = MEAN + STD * randn(256, DIM, seed=5)
    check_flow_map(prior_of("cosine", steps=15, method="rk4"), exact=False, images=images)
    wrong = prior_of("cosine", path="linear")
    with pytest.raises(AssertionError, match=r"best on the cosine path, data at 1.*path='cosine'"):
        check_flow_map(wrong, exact=False, images=images)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="choose one of 'cosine', 'vp', 'linear'"):
        prior_of("cosine", path="trig")
    with pytest.raises(TypeError, match="two functions"):
        prior_of("cosine", path=(1.0, 2.0))
    with pytest.raises(ValueError, match=r"expected to increase .* convention='data-at-0'"):
        prior_of("cosine", path=(lambda t: 1 - t, lambda t: t))
    with pytest.raises(ValueError, match="expected to increase"):
        SchedulePath(lambda t: 0.5 + 0 * t, lambda t: 0.5 + 0 * t)


# -- coupled noise ----------------------------------------------------------------------------------------------------


def coupled_velocity(x: Tensor, t: Tensor) -> Tensor:
    """Velocity of the optimal coupling of N(0, 1) and N(MEAN, STD^2): straight lines from z to m = MEAN + STD z."""
    share = (1 - t + t * STD)[:, None]
    z = (x - t[:, None] * MEAN) / share
    return MEAN + (STD - 1) * z


def coupled(**options: Any) -> Any:
    return invflow.from_velocity(coupled_velocity, SHAPE, steps=1, method="euler", coupling="optimal-transport",
                                 **options).double()


def test_a_coupled_flow_has_a_denoiser_and_no_score() -> None:
    prior, z = coupled(), randn(50, DIM)
    m = MEAN + STD * z
    assert not prior.independent_noise
    for t in (0.0, 0.3, 0.9):  # every path is known by its state: the mean of m is m
        torch.testing.assert_close(prior.denoise((1 - t) * z + t * m, t), m)
    assert_samples(prior)
    with pytest.raises(ValueError, match="gives no score"):
        prior.score(z, 0.5)
    for solver in (invflow.FMTT, invflow.DPS, invflow.PiGDM, invflow.DiffPIR, invflow.TwistedDiffusion):
        with pytest.raises(ValueError, match=r"needs a score.*optimal transport.*invflow.PnPFlow\(prior\)"):
            solver(prior)
    check_flow_map(prior)


def test_plug_and_play_flows_take_a_coupled_flow() -> None:
    """PnP-Flow's fixed point of a denoising problem; Flower's answer for a flow whose paths are straight lines."""
    y = torch.full((2, DIM), 0.9, dtype=F64)
    likelihood = invflow.GaussianLikelihood(invflow.operators.Denoising(SHAPE), y, sigma=0.3)
    found = invflow.PnPFlow(coupled(), steps=200).sample(likelihood, 4, generator=torch.Generator().manual_seed(0))
    assert found.samples.isfinite().all()
    assert MEAN < float(found.mean().mean()) < 0.9
    flower = invflow.Flower(coupled(), steps=50, spread=STD).sample(likelihood, 64,
                                                                  generator=torch.Generator().manual_seed(0))
    assert flower.samples.isfinite().all()
    assert MEAN < float(flower.mean().mean()) < 0.9


def test_noise_smc_of_a_coupled_flow() -> None:
    assert_posterior(invflow.NoiseSMC(coupled()))
