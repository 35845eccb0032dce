"""Maps that fold: by quadrature, weighted draws miss parts of the posterior, and the diagnostics report it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from noise_tools import F64, generator
from torch import Tensor

from invflow import FlowMap, GaussianLikelihood, NoiseRTO, NoiseSMC
from invflow.operators import MatrixOperator

FOLDS: dict[str, Callable[[Tensor], Tensor]] = {
    "|z| + z / 10": lambda z: z.abs() + 0.1 * z, "z^3 - 2z": lambda z: z**3 - 2 * z,
    "z + sin 3z": lambda z: z + (3 * z).sin(),
}
ONE_TO_ONE: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda z: 2 * z, "z + 0.8 tanh z": lambda z: z + 0.8 * z.tanh(),
    "a fold where nothing is": lambda z: z + 0.05 * z.square(),
}


class Function(FlowMap):
    state_shape = image_shape = (1,)

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.register_buffer("one", torch.ones((), dtype=F64))

    def velocity(self, x: Tensor, t: Any) -> Tensor:
        return torch.zeros_like(x)

    def jump(self, x: Tensor, s: Any, t: Any) -> Tensor:
        return self.function(x)


def measured(y: float, sigma: float, count: int) -> GaussianLikelihood:
    operator = MatrixOperator(torch.ones(1, 1, dtype=F64), image_shape=(1,))
    return GaussianLikelihood(operator, torch.full((count, 1), y, dtype=F64), sigma)


def evidence(function: Callable[[Tensor], Tensor], y: float, sigma: float) -> float:
    z = torch.linspace(-10, 10, 200_001, dtype=F64)
    log_density = -0.5 * z.square() - 0.5 * ((function(z) - y) / sigma).square() - math.log(2 * math.pi * sigma)
    return float(torch.trapezoid(log_density.exp(), z))


@pytest.mark.parametrize("name", FOLDS)
def test_the_share_that_was_missed(name: str) -> None:
    """The missing evidence, compared with quadrature, is the share found in other solutions, to within a third."""
    prior, likelihood = Function(FOLDS[name]), measured(0.7, 0.3, 16)
    with pytest.warns(UserWarning, match="16 of 16.*other solutions, which hold .*% of the posterior"):
        posterior = NoiseRTO(prior, weights=True, chunk_size=1000).sample(likelihood, 100, generator=generator())
    lacking = 1 - float(posterior.log_evidence.exp().mean()) / evidence(FOLDS[name], 0.7, 0.3)
    assert lacking > 0.4
    missed = posterior.diagnostics["missed_share"]
    assert float(missed.mean()) == pytest.approx(lacking, rel=0.35)
    assert not bool(posterior.diagnostics["converged"].any())


@pytest.mark.parametrize("name", ONE_TO_ONE)
def test_nothing_is_missed_where_the_equations_have_one_solution(name: str) -> None:
    likelihood = measured(0.7, 0.3, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        posterior = NoiseRTO(Function(ONE_TO_ONE[name]), weights=True, chunk_size=1000).sample(
            likelihood, 200, generator=generator())
    assert float(posterior.diagnostics["missed_share"].max()) < 1e-3
    ratio = posterior.log_evidence.exp() / evidence(ONE_TO_ONE[name], 0.7, 0.3)
    assert abs(float(ratio.mean()) - 1) < 4 * float(ratio.std()) / 4 + 1e-3


def test_chains_that_start_in_draws_of_a_fold_say_so() -> None:
    prior = Function(FOLDS["|z| + z / 10"])
    solver = NoiseSMC(prior, start=NoiseRTO(prior, weights=True), chunk_size=1000)
    with pytest.warns(UserWarning, match="other solutions"):
        posterior = solver.sample(measured(0.7, 0.1, 2), 100, generator=generator())
    share = (posterior.samples < 0).double().mean()  # of images, which is none; the noise is on one side
    assert float(share) < 0.2
    assert posterior.diagnostics["converged"].tolist() == [False, False]
    assert float(posterior.diagnostics["missed_share"].min()) > 0.2


def test_what_is_missed_does_not_depend_on_chunks() -> None:
    solver = [NoiseRTO(Function(FOLDS["z + sin 3z"]), weights=True, chunk_size=size) for size in (7, 1000)]
    first, second = (s.draw(measured(0.7, 0.3, 2), 70, generator=generator()) for s in solver)
    torch.testing.assert_close(first.missed, second.missed)
    assert bool((first.missed[:, 64:] == -torch.inf).all())  # which are not looked at


@pytest.mark.parametrize("count", [1, 2])
def test_one_or_two_draws_never_converge(count: int) -> None:
    prior, likelihood = Function(ONE_TO_ONE["linear"]), measured(0.7, 0.3, 2)
    for solver in (NoiseRTO(prior), NoiseRTO(prior, weights=True), NoiseSMC(prior), NoiseSMC(prior, num_moves=0),
                   NoiseSMC(prior, start="rto")):
        with pytest.warns(UserWarning, match="too few draws"):
            posterior = solver.sample(likelihood, count, generator=generator())
        assert not bool(posterior.diagnostics["converged"].any())
