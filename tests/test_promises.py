"""Promises of the nouns in addition to their mathematics: descriptions, pickling and moving, and costs."""

from __future__ import annotations

import pickle

import pytest
import torch

import invflow
from invflow.operators import DeepinvOperator, Denoising, GaussianBlur

SHAPE = (1, 8, 8)


def prior() -> invflow.GaussianMixtureFlow:
    return invflow.GaussianMixtureFlow(torch.full((1, *SHAPE), 0.5), std=0.2, steps=2)


class Alone(invflow.Solver):
    """A third party's solver, which writes sample and states no cost."""

    def __init__(self, prior: invflow.FlowMap) -> None:
        self.prior = prior

    def sample(self, reward, num_samples, *, generator=None, progress=False) -> invflow.Posterior:
        count = reward.num_observations
        x = self.prior.generate(3 * count * num_samples, generator=generator)[: count * num_samples]
        return invflow.Posterior(x.unflatten(0, (count, num_samples)))

    def prior_samples(self, n, *, generator=None):
        return self.prior.generate(n, generator=generator)


def test_a_solver_that_overrides_sample_alone_pays_for_its_calls() -> None:
    """Else it would stand on the Pareto front for nothing."""
    problem = invflow.Problem("grey", None, Denoising(SHAPE), 0.1, prior=prior,
                              sampler=lambda n, g: prior().sample(n, generator=g))
    found = invflow.compare(problem, {"alone": Alone(prior())}, num_observations=2, num_samples=4)
    assert found.costs["grey"]["alone"]["forward"] == 3
    made = invflow.calibrate(Alone(prior()), problem, num_simulations=2, num_samples=4, num_particles=4,
                             generator=torch.Generator().manual_seed(0))
    assert made.record["forward"].tolist() == [12, 12]


def test_nouns_say_what_they_are() -> None:
    likelihood = invflow.GaussianLikelihood(GaussianBlur(SHAPE, std=1.0), torch.zeros(2, *SHAPE), 0.1)
    assert repr(invflow.FMTT(prior(), steps=7)) == "FMTT(prior=GaussianMixtureFlow(1, 8, 8), steps=7)"
    assert repr(prior()).startswith("GaussianMixtureFlow((1, 8, 8), ")
    assert repr(likelihood.operator).startswith("GaussianBlur((1, 8, 8) -> (1, 8, 8)")
    assert repr(likelihood) == f"GaussianLikelihood({likelihood.operator!r}, 2 observations, sigma=0.1)"


@pytest.mark.parametrize("name", ["gaussian/linear", "mnist/box-inpainting"])
def test_problems_are_pickled(name: str) -> None:
    """To other processes, though functions of theirs have no name to be pickled by."""
    problem = invflow.load_problem(name)
    again = pickle.loads(pickle.dumps(problem))
    (one, _), (two, likelihood) = (p.simulate(2, generator=torch.Generator().manual_seed(0)) for p in (problem, again))
    assert torch.equal(one, two)
    assert repr(again) == repr(problem)
    assert torch.equal(pickle.loads(pickle.dumps(likelihood)).y, likelihood.y)


def test_an_operator_of_deepinv_is_pickled() -> None:
    import deepinv

    physics = deepinv.physics.Inpainting(SHAPE, mask=0.5, rng=torch.Generator().manual_seed(0),
                                         noise_model=deepinv.physics.GaussianNoise(0.1))
    operator = DeepinvOperator(physics, image_shape=SHAPE)
    x = torch.rand(2, *SHAPE, generator=torch.Generator().manual_seed(1))
    again = pickle.loads(pickle.dumps(operator))
    assert torch.equal(again(x), operator(x))
    assert torch.equal(again.adjoint(x), operator.adjoint(x))
