"""Average velocities in all conventions, against the exact flow map of a Gaussian."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from gaussian_priors import DIM, F64, MEAN, SHAPE, STD, assert_posterior, assert_samples, column, exact_jump, randn
from torch import Tensor

import invflow
from invflow.testing import check_flow_map

CONVENTIONS = [(second, convention) for second in ("r", "t-r") for convention in ("data-at-0", "data-at-1")]


def mean_flow(second: str, convention: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """u of N(MEAN, STD^2), written in the paper's own time where that has the data at 0."""

    def u(x: Tensor, t: Tensor, r: Tensor) -> Tensor:
        now, other = column(t, x), column(r, x)
        reverse = convention == "data-at-0"
        then = other if second == "r" else now - other if reverse else now + other
        share = (lambda time: 1 - time) if reverse else (lambda time: time)  # of the data
        spread = lambda time: ((share(time) * STD) ** 2 + (1 - share(time)) ** 2).sqrt()  # noqa: E731
        end = share(then) * MEAN + spread(then) / spread(now) * (x - share(now) * MEAN)
        gap = then - now
        slope = torch.where(gap == 0, torch.full_like(gap, 1.0), gap)
        # on the diagonal the velocity: derivative of the line above with respect to "then"
        sign = -1.0 if reverse else 1.0
        rate = sign * (share(now) * STD**2 - (1 - share(now))) / spread(now) ** 2
        return torch.where(gap == 0, sign * MEAN + rate * (x - share(now) * MEAN), (end - x) / slope)

    return u


def prior_of(second: str, convention: str, **options: Any) -> Any:
    return invflow.from_average_velocity(mean_flow(second, convention), SHAPE, second=second, convention=convention,
                                         **options).double()


@pytest.mark.parametrize(("second", "convention"), CONVENTIONS)
def test_every_convention_is_the_exact_map(second: str, convention: str) -> None:
    prior, x = prior_of(second, convention), randn(20, DIM)
    s, t = torch.linspace(0, 0.8, 20, dtype=F64), torch.linspace(1, 0.9, 20, dtype=F64)
    torch.testing.assert_close(prior.jump(x, s, t), exact_jump(x, column(s, x), column(t, x)))
    exact = invflow.GaussianMixtureFlow(torch.full((1, DIM), MEAN, dtype=F64), STD)
    torch.testing.assert_close(prior.velocity(x, 0.3), exact.velocity(x, 0.3))
    torch.testing.assert_close(prior.score(x, 0.3), exact.score(x, 0.3))
    with prior.count() as calls:
        prior.generate(7, steps=2)
    assert calls.forward == 14
    check_flow_map(prior)
    assert_samples(prior)
    assert_samples(prior, steps=3)


@pytest.mark.parametrize(("second", "convention"), CONVENTIONS)
def test_noise_smc_draws_its_posterior(second: str, convention: str) -> None:
    assert_posterior(invflow.NoiseSMC(prior_of(second, convention)))


@pytest.mark.parametrize("convention", ["data-at-0", "data-at-1"])
def test_tilting_draws_its_posterior(convention: str) -> None:
    assert_posterior(invflow.FMTT(prior_of("r", convention), steps=60))


def test_a_joint_map_has_no_score() -> None:
    prior = prior_of("r", "data-at-0", coupling="joint")
    assert not prior.independent_noise
    with pytest.raises(ValueError, match="FMTT needs a score"):
        invflow.FMTT(prior)


def test_order_is_found_or_asked_for() -> None:
    u, x = mean_flow("r", "data-at-0"), randn(4, DIM)
    wanted = prior_of("r", "data-at-0").jump(x, 0.2, 0.7)
    settings: dict[str, Any] = dict(state_shape=SHAPE, convention="data-at-0")
    for network in (lambda z, r, t: u(z, t, r), lambda t, r, x: u(x, t, r), lambda x, timestep, timestep_r: u(
            x, timestep, timestep_r)):
        prior = invflow.from_average_velocity(network, **settings).double()
        torch.testing.assert_close(prior.jump(x, 0.2, 0.7), wanted)
    for unclear in (lambda a, b, c: u(a, b, c), lambda x, s, t: u(x, s, t)):
        with pytest.raises(TypeError, match=r"pass the order, from_average_velocity\(..., order='x, t, r'"):
            invflow.from_average_velocity(unclear, **settings)
        prior = invflow.from_average_velocity(unclear, order="x, t, r", **settings).double()
        torch.testing.assert_close(prior.jump(x, 0.2, 0.7), wanted)
    with pytest.raises(ValueError, match="name each of x, t, r once"):
        invflow.from_average_velocity(u, order="x, t", **settings)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="'t-r' if it is the length"):
        prior_of("h", "data-at-0")
    with pytest.raises(ValueError, match="no time convention"):
        prior_of("r", "noise-first")
    with pytest.raises(ValueError, match="no coupling is called"):
        prior_of("r", "data-at-0", coupling="ot")
    with pytest.raises(TypeError, match="pass a function"):
        invflow.from_average_velocity(3, SHAPE)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"also takes y, .*from_average_velocity\(..., y=...\)"):
        invflow.from_average_velocity(lambda x, t, r, y: x, SHAPE)
    with pytest.raises(TypeError, match="takes no argument 'label'"):
        invflow.from_average_velocity(lambda x, t, r: x, SHAPE, label=3)
    prior = invflow.from_average_velocity(lambda x, t, r: x.sum(1), SHAPE)
    with pytest.raises(ValueError, match="shape of the states"):
        prior.velocity(torch.zeros(4, DIM), 0.5)
