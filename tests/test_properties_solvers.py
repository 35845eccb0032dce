"""Properties of all registered solvers: samples do not depend on chunks or other observations, and weights are valid.

Random numbers are drawn for all (B, N) at once, so an observation's samples may change with the number of the others,
but not with their measurements.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from property_tools import assert_near, generator, property_test, seeds, tensor
from tilting_models import Gaussian
from torch import Tensor

import invflow
from invflow.likelihood import GaussianLikelihood
from invflow.models.adapter import Adapter
from invflow.operators import Denoising, MatrixOperator
from invflow.registry import list_solvers

F64 = torch.float64


class Bent(Gaussian):
    """A map in float64 whose jump is not linear."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("anchor", torch.zeros((), dtype=F64))

    def velocity(self, x: Tensor, t: Any) -> Tensor:
        return super().velocity(x, t)

    def jump(self, x: Tensor, s: Any, t: Any) -> Tensor:
        moved = super().jump(x, s, t)
        return moved + 0.1 * moved.flip(-1).sin()


def _vfm(**settings: Any) -> invflow.VFM:
    options = {"width": 8, "depth": 1, "embedding": 8}
    prior = invflow.NeuralFlowMap((3,), network="mlp", options=options, generator=generator(0))
    for p in prior.parameters():
        p.data += 0.3 * tensor(p.numel(), *p.shape).to(p)
    adapter = Adapter((3,), classes=["denoising"], network="mlp", options=options, trained_for=prior.fingerprint(),
                      generator=generator(1))
    return invflow.VFM(prior, adapter, **settings)


def _lmmse(**settings: Any) -> invflow.LinearMMSE:
    return invflow.LinearMMSE.fit(tensor(5, 50, 3) @ tensor(6, 3, 3), **settings)


def _on_prior(name: str, **quick: Any) -> Callable[..., Any]:
    """The solver as the registry makes it, with settings that take few calls."""
    return lambda **settings: invflow.registry.solver_by_name(name, Bent(), **quick, **settings)


#: quick settings; a solver that is not here runs with its own
QUICK: dict[str, dict[str, Any]] = {
    "fmtt": {"steps": 4}, "noise-smc": {"num_moves": 2}, "noise-rto": {"max_iterations": 4}, "tds": {"steps": 4},
    "dps": {"steps": 4}, "pigdm": {"steps": 4}, "moment-matching": {"steps": 3}, "diffpir": {"steps": 4},
    "ddrm": {"steps": 4}, "pnp-flow": {"steps": 3}, "flower": {"steps": 3}, "top-k": {"budget": 30, "selections": 2},
    "beam": {"budget": 8, "branches": 2}, "best-of-n": {"budget": 6, "selections": 2},
    "daps": {"steps": 4, "langevin_steps": 3}, "diamond": {"steps": 4}, "dpnp": {"iterations": 4, "diffusion_steps": 4},
    "noise-langevin": {"steps": 10}, "d-flow": {"iterations": 3}, "ula": {"burn_in": 2, "thinning": 1},
    "plug-and-play": {"steps": 3}, "tv": {"iterations": 20},
}
MAKE: dict[str, Callable[..., Any]] = {name: _on_prior(name, **QUICK.get(name, {})) for name in list_solvers()}
MAKE |= {
    "vfm": lambda **s: _vfm(steps=2, importance=True, **s), "lmmse": _lmmse,
    "exact": lambda **s: invflow.ExactPosterior(invflow.GaussianMixtureFlow(tensor(3, 2, 3), std=0.6), **s),
}
#: of samples relative to their size: those that work in float32 inside, and optimisers, whose rounding adds up
ROUNDING = {"vfm": 1e-5, "noise-rto": 1e-6, **dict.fromkeys(
    ["dps", "pigdm", "moment-matching", "diffpir", "ddrm", "ula"], 1e-4)}


@st.composite
def likelihoods(draw: Any, name: str, count: int) -> GaussianLikelihood:
    """For ``count`` observations: a matrix, shared or one for each, selected entries, or the identity."""
    seed = draw(seeds)
    operators: list[Callable[[], invflow.Operator]] = [lambda: Denoising((3,))]
    if name != "vfm":
        operators += [
            lambda: MatrixOperator(tensor(seed, 2, 3), image_shape=(3,)),
            lambda: MatrixOperator(tensor(seed, count, 2, 3), image_shape=(3,)),
            lambda: MatrixOperator(torch.eye(3, dtype=F64)[:, [0, 2]].mT, image_shape=(3,)),
        ]
    operator = draw(st.sampled_from(operators))()
    dtype = torch.float32 if name == "vfm" else F64
    y = tensor(seed + 1, count, *operator.measurement_shape)
    return GaussianLikelihood(operator.to(dtype), y.to(dtype), sigma=draw(st.sampled_from([0.4, 1.0])))


#: for pictures alone, and by an optional package; see test_classical.py
PICTURES = {"bm3d"}


@pytest.mark.parametrize("name", sorted(set(list_solvers()) - PICTURES))
def test_chunks_and_other_observations_change_nothing(name: str) -> None:
    @property_test(2, data=st.data(), seed=seeds, b=st.integers(1, 3), n=st.integers(1, 5))
    def test_solver(data: Any, seed: int, b: int, n: int) -> None:
        likelihood = data.draw(likelihoods(name, b))

        def sample(likelihood: GaussianLikelihood, **settings: Any) -> invflow.Posterior:
            return MAKE[name](**settings).sample(likelihood, n, generator=generator(seed))

        posterior, tolerance = sample(likelihood), ROUNDING.get(name, 1e-9)
        assert posterior.samples.shape == (b, n, 3)
        assert bool(posterior.samples.isfinite().all())
        assert_near(posterior.weights.sum(1), torch.ones(b), 1e-5)
        assert posterior.weighted == (posterior.ess() is not None)
        if name != "exact":
            size = data.draw(st.integers(1, b * n))
            chunked = sample(likelihood, chunk_size=size)
            assert_near(chunked.samples, posterior.samples, tolerance)
            assert_near(chunked.weights, posterior.weights, 10 * tolerance)
        again = sample(likelihood)
        assert torch.equal(again.samples, posterior.samples), "the same generator gave other samples"
        if b > 1:
            other = likelihood.select(slice(None))
            other.y = other.y.clone()
            other.y[-1] += 1.0
            moved = sample(other)
            assert_near(moved.samples[:-1], posterior.samples[:-1], tolerance)
            assert_near(moved.weights[:-1], posterior.weights[:-1], 10 * tolerance)

    test_solver()
