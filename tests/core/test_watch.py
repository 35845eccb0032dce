"""Images changed in place and missing gradients are detected and reported before they change a sample."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import invflow
from invflow import FMTT, FunctionReward, GaussianLikelihood, NoiseRTO, NoiseSMC, Operator, TwistedDiffusion
from invflow.problem import Problem
from invflow.reward import Reward
from invflow.solvers.search import BestOfN, TopKSearch

F64 = torch.float64


def prior() -> invflow.GaussianMixtureFlow:
    return invflow.GaussianMixtureFlow(torch.zeros(1, 2, dtype=F64), std=1.0, steps=2)


def pull(x: Tensor) -> Tensor:
    return -0.5 * (x[:, 0] - 2).square()


def pull_in_place(x: Tensor) -> Tensor:
    return -0.5 * x.sub_(2)[:, 0].square()


class InPlaceReward(Reward):
    def __call__(self, x: Tensor) -> Tensor:
        return -0.5 * x.sub_(2)[..., 0].square()


class InPlace(Operator):
    image_shape = measurement_shape = (2,)

    def forward(self, x: Tensor) -> Tensor:
        return x.sub_(2)


class Shift(InPlace):
    def forward(self, x: Tensor) -> Tensor:
        return x - 2


SOLVERS: list[Callable[[], Any]] = [
    lambda: FMTT(prior(), steps=4), lambda: TwistedDiffusion(prior(), steps=4), lambda: NoiseSMC(prior()),
    lambda: NoiseSMC(prior(), num_moves=0), lambda: BestOfN(prior(), budget=20),
]


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("reward", [
    FunctionReward(pull_in_place), InPlaceReward(), GaussianLikelihood(InPlace(), torch.zeros(1, 2, dtype=F64), 1.0),
], ids=["function", "reward", "operator"])
def test_what_writes_to_its_images_is_refused(solver: Callable[[], Any], reward: Reward) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match=r"in place.*x\.clone\(\)"):
            solver().sample(reward, 16, generator=torch.Generator().manual_seed(0))


def test_a_black_box_may_write_to_what_it_is_given() -> None:
    """NumPy's writes are counted nowhere, so that a black box works on a copy: the same samples as without."""

    def box(x: Tensor) -> Any:
        values = x.numpy()
        values -= 2
        return -0.5 * values[:, 0] ** 2

    def run(fn: Callable[[Tensor], Any]) -> invflow.Posterior:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return NoiseSMC(prior()).sample(FunctionReward(fn, differentiable=False), 400,
                                            generator=torch.Generator().manual_seed(0))

    torch.testing.assert_close(run(box).samples, run(pull).samples)
    assert float(run(box).samples[..., 0].mean()) == pytest.approx(1.0, abs=0.2)  # of N(1, 1/2)


def test_simulate_leaves_its_truths_alone() -> None:
    def problem(operator: Operator) -> Problem:
        return Problem("test/shift", None, operator, 0.1, sampler=lambda n, g: torch.randn(n, 2, generator=g),
                       prior=prior)

    truth, _ = problem(Shift()).simulate(500, generator=torch.Generator().manual_seed(0))
    assert float(truth.mean()) == pytest.approx(0, abs=0.2)
    with pytest.raises(ValueError, match=r"InPlace\.forward changed its images in place"):
        problem(InPlace()).simulate(500, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("solver", [
    *SOLVERS[:3], lambda: NoiseRTO(prior()), lambda: NoiseRTO(prior(), weights=True),
    lambda: TopKSearch(prior(), budget=2000, selections=1),
])
def test_inference_mode_is_refused_where_gradients_are_needed(solver: Callable[[], Any]) -> None:
    likelihood = GaussianLikelihood(Shift(), torch.zeros(1, 2, dtype=F64), 1.0)
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"inference_mode\(\) forbids.*torch.no_grad\(\)"):
        solver().sample(likelihood, 16, generator=torch.Generator().manual_seed(0))


def test_no_grad_changes_nothing_and_inference_mode_serves_what_takes_no_gradient() -> None:
    def run() -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return FMTT(prior(), steps=4).sample(FunctionReward(pull), 16,
                                                 generator=torch.Generator().manual_seed(0)).samples

    outside = run()
    with torch.no_grad():
        torch.testing.assert_close(run(), outside, rtol=0, atol=0)
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        NoiseSMC(prior(), num_moves=0).sample(FunctionReward(pull), 16, generator=torch.Generator().manual_seed(0))
        NoiseSMC(prior()).sample(FunctionReward(pull, differentiable=False), 16,
                                 generator=torch.Generator().manual_seed(0))


def test_a_reward_that_detaches_says_so() -> None:
    detached = FunctionReward(lambda x: pull(x.detach()))
    for solver in (FMTT(prior(), steps=4), TwistedDiffusion(prior(), steps=4)):
        with pytest.warns(UserWarning, match="no gradient comes back from the reward FunctionReward"):
            solver.sample(detached, 200, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=r"no gradient.*weights='twisted'"):
        FMTT(prior(), steps=4, weights="jarzynski").sample(detached, 20, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="no gradient"):
        NoiseSMC(prior()).sample(detached, 20, generator=torch.Generator().manual_seed(0))
