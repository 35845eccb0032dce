"""Maps that jump to data only, against the exact jump of a Gaussian on each path."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from gaussian_priors import DIM, F64, MEAN, SHAPE, STD, assert_posterior, assert_samples, column, exact_jump, randn
from torch import Tensor

import invflow
from invflow.testing import check_flow_map


def jump_on(alpha: Callable[[Tensor], Tensor], sigma: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """The consistency function of N(MEAN, STD^2) on alpha m + sigma z."""

    def f(x: Tensor, t: Tensor) -> Tensor:
        a, s = column(alpha(t), x), column(sigma(t), x)
        return MEAN + STD / ((a * STD) ** 2 + s**2).sqrt() * (x - a * MEAN)

    return f


QUARTER = math.pi / 2
CASES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "edm": (torch.ones_like, lambda t: t, {"path": "edm"}),
    "trigflow": (torch.cos, torch.sin, {"path": "trigflow"}),
    "linear, data at 0": (lambda t: 1 - t, lambda t: t, {"path": "linear"}),
    "linear, data at 1": (lambda t: t, lambda t: 1 - t, {"path": "linear", "convention": "data-at-1"}),
    "cosine": (lambda t: (QUARTER * t).cos(), lambda t: (QUARTER * t).sin(), {"path": "cosine"}),
    "custom": (lambda t: 1 - t**2, lambda t: t, {"path": (lambda t: 1 - t**2, lambda t: t)}),
}


def prior_of(case: str = "edm", **options: Any) -> Any:
    alpha, sigma, settings = CASES[case]
    return invflow.from_consistency(jump_on(alpha, sigma), SHAPE, **{**settings, **options}).double()


@pytest.mark.parametrize("case", list(CASES))
def test_every_path_is_the_exact_jump(case: str) -> None:
    prior, x = prior_of(case), randn(20, DIM)
    s = torch.linspace(0.05, 0.95, 20, dtype=F64)
    torch.testing.assert_close(prior.jump(x, s, 1.0), exact_jump(x, column(s, x), torch.ones(20, 1, dtype=F64)),
                               rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(prior.jump(x, 1.0, 1.0), x)
    torch.testing.assert_close(prior.jump(x, s, s), x)
    with prior.count() as calls:
        prior.generate(7)
        prior.generate(7, steps=4)
    assert calls.forward == 7 * 5
    assert_samples(prior, count=2000)
    assert_samples(prior, steps=3, count=2000)
    check_flow_map(prior, exact=False)


def test_noise_smc_and_best_of_n_take_it() -> None:
    assert_posterior(invflow.NoiseSMC(prior_of()))
    best = invflow.BestOfN(prior_of(), budget=8, selections=2)
    assert best.sample(invflow.FunctionReward(lambda x: x.sum(1)), 3, generator=torch.Generator()).num_samples == 3


def test_what_needs_more_says_so() -> None:
    prior, x = prior_of(), randn(2, DIM)
    for solver, needs in ((invflow.FMTT, "score"), (invflow.DPS, "score"), (invflow.DiffPIR, "score"),
                          (invflow.PnPFlow, "denoiser"), (invflow.Flower, "denoiser"),
                          (invflow.PlugAndPlay, "denoiser")):
        with pytest.raises(ValueError, match=rf"{solver.__name__} needs a {needs}.*invflow.NoiseSMC\(prior\)"):
            solver(prior)
    for call in (prior.velocity, prior.denoise, prior.score):
        with pytest.raises(ValueError, match="has no velocity"):
            call(x, 0.5)
    with pytest.raises(ValueError, match=r"only jumps to the data.*generate\(n, steps=4"):
        prior.jump(x, 0.2, 0.6)
    with pytest.raises(ValueError, match="need 2 further noise tensors, but 0 were passed"):
        prior.flow(x, 3)


def test_times_of_the_caller() -> None:
    seen: list[Tensor] = []

    def f(x: Tensor, sigma: Tensor) -> Tensor:
        seen.append(sigma)
        return torch.zeros_like(x)

    prior = invflow.from_consistency(f, SHAPE, times=(0.55,))
    prior.generate(3, steps=2)
    torch.testing.assert_close(torch.stack(seen)[:, 0], torch.tensor([80.0, 0.45 / 0.55]), rtol=1e-5, atol=0)
    seen.clear()
    prior.generate(3, steps=4)
    torch.testing.assert_close(torch.stack(seen)[1:, 0], torch.tensor([3.0, 1.0, 1 / 3]), rtol=1e-5, atol=0)
    with pytest.raises(ValueError, match="increasing numbers"):
        invflow.from_consistency(f, SHAPE, times=(0.5, 0.2))


def test_draws_do_not_depend_on_chunks() -> None:
    prior = prior_of()
    one, other = (prior.generate(9, 3, generator=torch.Generator().manual_seed(0), chunk_size=size) for size in (9, 2))
    torch.testing.assert_close(one, other)


def test_through_a_decoder() -> None:
    prior = invflow.LatentFlowMap(prior_of(), lambda x: x[:, None], image_shape=(1, DIM))
    assert not prior.has_velocity
    with prior.count() as calls:
        images = prior.generate(4, 3, generator=torch.Generator().manual_seed(0))
    assert calls.forward == 12
    torch.testing.assert_close(images[:, 0], prior_of().generate(4, 3, generator=torch.Generator().manual_seed(0)))
    with pytest.raises(ValueError, match="FMTT needs a score"):
        invflow.FMTT(prior)


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"path .* is unknown"):
        invflow.from_consistency(lambda x, t: x, SHAPE, path="straight")
    with pytest.raises(ValueError, match="sigma_min < sigma_max"):
        invflow.from_consistency(lambda x, t: x, SHAPE, sigma_max=0.001)
    with pytest.raises(TypeError, match="pass the order, from_consistency"):
        invflow.from_consistency(lambda a, b: a, SHAPE)
    with pytest.raises(ValueError, match="shape of the states"):
        invflow.from_consistency(lambda x, t: x[:, :1], SHAPE).generate(2)
