"""Rewards of minus infinity: the base law under a constraint, by counting and by quadrature."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from tilting_models import Gaussian, Tilt
from torch import Tensor

from invflow import FMTT, TwistedDiffusion

F64 = torch.float64
REPEATS = 60


class Line(Gaussian):
    state_shape = image_shape = (1,)

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("one", torch.ones((), dtype=F64))


def over(edge: float, beside: float = 0.0) -> Any:
    """log 1{x > edge}, and a likelihood of 1.5 with precision ``beside`` beside it."""

    def fn(x: Tensor) -> Tensor:
        return torch.where(x[:, 0] > edge, 0.0, -torch.inf).to(x) - 0.5 * beside * (x[:, 0] - 1.5).square()

    return fn


def within(estimates: Tensor, truth: float, error: float = 0.0, bias: float = 0.0) -> None:
    """The mean over independent runs is the truth, within four standard errors of both and a bias."""
    spread = math.hypot(float(estimates.std()) / math.sqrt(len(estimates)), error)
    assert abs(float(estimates.mean()) - truth) < 4 * spread + bias, (float(estimates.mean()), truth, spread)


SOLVERS = {
    "renoise": lambda: FMTT(Line(), steps=8, kernel="renoise", chunk_size=10**5),
    "sde": lambda: FMTT(Line(), steps=10, chunk_size=10**5),
    "no look-ahead": lambda: FMTT(Line(), steps=10, look_ahead="none", chunk_size=10**5),
    "twisted diffusion": lambda: TwistedDiffusion(Line(), steps=10, schedule="linear", chunk_size=10**5),
    "jarzynski": lambda: FMTT(Line(), steps=10, weights="jarzynski", chunk_size=10**5),
    "jarzynski, denoiser": lambda: FMTT(Line(), steps=10, weights="jarzynski", look_ahead="denoiser",
                                        chunk_size=10**5),
    "jarzynski, a schedule that ends early": lambda: FMTT(
        Line(), steps=10, weights="jarzynski", schedule=lambda t: min(2 * t, 1.0), chunk_size=10**5),
}


@pytest.mark.parametrize("name", SOLVERS)
def test_a_constraint_leaves_the_part_of_the_base_law_that_meets_it(name: str) -> None:
    """P(x > 0.5) and E[x | x > 0.5]: .309 and 1.141 where the steps draw N(0, 1) as it is, else counted."""
    solver = SOLVERS[name]()
    posterior = solver.sample(Tilt(over(0.5), REPEATS), 600, generator=torch.Generator().manual_seed(0))
    assert bool((posterior.samples[posterior.weights > 0] > 0.5).all())
    base = solver.prior_samples(400_000, generator=torch.Generator().manual_seed(1))[:, 0]
    kept = base[base > 0.5]
    share, mean = len(kept) / len(base), float(kept.mean())
    if name == "renoise":  # whose marginals are exact
        share, mean = 0.308538, 1.141078
    # the stand-in depends on the particles: a bias of the order 1 / N
    within(posterior.log_evidence.exp(), share, (share / len(base)) ** 0.5, bias=2 / 600)
    within((posterior.weights * posterior.samples[..., 0]).sum(1), mean, float(kept.std()) / len(kept) ** 0.5, 2 / 600)
    assert float(posterior.diagnostics["converged"].double().mean()) > 0.9


def test_a_likelihood_beside_a_constraint_keeps_its_particles() -> None:
    """N(0, 1) with x > 0.5 and a measurement of 1.5 +- 0.5, by quadrature; the weights stay those of the likelihood."""
    solver = FMTT(Line(), steps=8, kernel="renoise", chunk_size=10**5)
    posterior = solver.sample(Tilt(over(0.5, 4.0), REPEATS), 600, generator=torch.Generator().manual_seed(0))
    x = torch.linspace(0.5, 8, 75_001, dtype=F64)
    density = (-0.5 * x.square() - 2 * (x - 1.5).square()).exp() / math.sqrt(2 * math.pi)
    evidence, mean = float(torch.trapezoid(density, x)), float(torch.trapezoid(x * density, x))
    within(posterior.log_evidence.exp(), evidence, bias=0.01 * evidence)
    within((posterior.weights * posterior.samples[..., 0]).sum(1), mean / evidence, bias=2 / 600)
    assert float(posterior.ess().mean()) > 200


def test_jarzynski_weights_say_that_the_reward_breaks_off() -> None:
    """Beside a likelihood a constraint leaves no continuous reward to follow: the weights are wrong, and it says so."""
    solver = FMTT(Line(), steps=10, weights="jarzynski", chunk_size=10**5)
    with pytest.warns(UserWarning, match="drops to -inf.*weights='twisted'"):
        posterior = solver.sample(Tilt(over(0.5, 4.0), 3), 600, generator=torch.Generator().manual_seed(0))
    assert posterior.diagnostics["converged"].tolist() == [False] * 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # neither half of it is a reason to warn
        solver.sample(Tilt(over(-9.0, 4.0), 3), 600, generator=torch.Generator().manual_seed(0))
        solver.sample(Tilt(over(0.5), 3), 600, generator=torch.Generator().manual_seed(0))


def test_only_what_is_minus_infinity_has_a_stand_in_and_only_before_the_end() -> None:
    states = list(FMTT(Line(), steps=4, resample_threshold=0.0).iterate(
        Tilt(lambda x: -1000 * x[:, 0].square() + over(0.5)(x), 2), 50, generator=torch.Generator().manual_seed(0)))
    for state in states[:-1]:
        finite = torch.where(state.floored, torch.inf, state.rewards).amin(1, keepdim=True)
        torch.testing.assert_close(state.rewards[state.floored], (finite - 3).expand_as(state.rewards)[state.floored])
        assert float(finite.min()) < -1000  # as low as they come
        assert bool(state.log_weights.isfinite().all())
    assert bool((states[-1].log_weights[states[-1].floored] == -torch.inf).all())
    assert bool(states[-1].floored.any())


def test_where_nothing_meets_the_constraint_until_late() -> None:
    """All stand-ins are alike, and no weight is NaN; where nothing meets it at the end, that is an error."""
    solver = FMTT(Line(), steps=10, chunk_size=10**5)
    *path, last = solver.iterate(Tilt(over(2.0), 20), 4, generator=torch.Generator().manual_seed(0))
    assert any(bool(state.floored.all(1).any()) for state in path)
    assert all(bool(state.log_weights.isfinite().all()) for state in path)
    assert not bool(last.log_weights.isnan().any() | last.log_evidence.isnan().any())
    with pytest.raises(ValueError, match="no particle is compatible"):
        solver.sample(Tilt(over(50.0), 2), 60, generator=torch.Generator().manual_seed(0))
