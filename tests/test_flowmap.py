"""The flow map base class: its ODE, its counting, its contract, and failures of the contract check."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from invflow import FlowMap, GaussianMixtureFlow
from invflow.flowmap import expand_time, integrate
from invflow.testing import check_flow_map

F64 = torch.float64


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=F64)


class Scaled(FlowMap):
    """The flow of N(0, I) to N(1, s^2 I), by its velocity alone: the jump is the default ODE."""

    state_shape = image_shape = (2,)

    def __init__(self, std: float = 0.3, steps: int = 50) -> None:
        super().__init__()
        self.ode_steps = steps
        self.register_buffer("std", torch.tensor(std, dtype=F64))

    def velocity(self, x: Tensor, t: Any) -> Tensor:
        t = expand_time(t, x)
        rate = (t * self.std**2 - (1 - t)) / ((1 - t) ** 2 + t**2 * self.std**2)
        return 1 + rate * (x - t)


class Jumping(Scaled):
    """The same with its map, x + (t - s) u, in closed form."""

    def jump(self, x: Tensor, s: Any, t: Any) -> Tensor:
        s, t = expand_time(s, x), expand_time(t, x)
        spread = [((1 - u) ** 2 + (u * self.std) ** 2).sqrt() for u in (s, t)]
        return t + spread[1] / spread[0] * (x - s)


# -- the ODE --------------------------------------------------------------------------------------------


def slope(errors: list[float], steps: list[int]) -> float:
    return math.log(errors[0] / errors[-1]) / math.log(steps[-1] / steps[0])


def test_default_jump_converges_with_order_two() -> None:
    prior, z, steps = GaussianMixtureFlow(2 * randn(3, 2, seed=1), 0.5), randn(50, 2), [40, 80, 160]
    exact = prior.jump(z, 0.0, 1.0)
    errors = []
    for k in steps:
        prior.ode_steps = k
        errors.append(float((FlowMap.jump(prior, z, 0.0, 1.0) - exact).square().mean().sqrt()))
    assert 1.8 < slope(errors, steps) < 2.2, errors


ORDERS = [("euler", 1), ("midpoint", 2), ("heun", 2), ("rk4", 4), ("dopri5", 5)]


@pytest.mark.parametrize(("method", "order"), ORDERS)
def test_methods_have_their_order(method: str, order: int) -> None:
    start, steps = torch.tensor([[0.9], [-0.8]], dtype=F64), [8, 16, 32]
    exact = 1 / (1 / start - math.sin(1.0))
    errors = []
    for k in steps:
        x = integrate(lambda x, t: x**2 * t.cos()[:, None], start, 0.0, 1.0, k, method)
        errors.append(float((x - exact).abs().max()))
    assert abs(slope(errors, steps) - order) < 0.4, errors


def test_ode_runs_backwards_and_row_by_row() -> None:
    prior, z = Scaled(steps=200), randn(6, 2)
    ends = torch.linspace(0.1, 1.0, 6, dtype=F64)
    x = prior.jump(z, 0.0, ends)
    torch.testing.assert_close(x, Jumping().jump(z, 0.0, ends), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(prior.jump(x, ends, 0.0), z, rtol=1e-3, atol=1e-3)
    alone = torch.cat([prior.jump(z[i:i + 1], 0.0, float(ends[i])) for i in range(6)])
    torch.testing.assert_close(x, alone, rtol=1e-12, atol=1e-12)


def test_integrate_never_leaves_the_interval() -> None:
    seen: list[Tensor] = []

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        seen.append(t)
        return x

    start = torch.tensor([0.0, 0.1, 0.3, 0.7], dtype=torch.float32)
    for method in ("heun", "rk4", "dopri5"):
        integrate(velocity, torch.ones(4, 1), start, 1.0, 7, method)
    assert torch.cat(seen).max() == 1.0


def test_integrate_refuses() -> None:
    with pytest.raises(ValueError, match="choose one of"):
        integrate(Scaled().velocity, randn(2, 2), 0.0, 1.0, 5, "verlet")
    with pytest.raises(ValueError, match="at least 1 step"):
        integrate(Scaled().velocity, randn(2, 2), 0.0, 1.0, 0)
    with pytest.raises(ValueError, match="has 4 rows"):
        expand_time(torch.zeros(3), randn(4, 2))


# -- what follows from the velocity -------------------------------------------------------------------------


def test_denoiser_and_score_of_a_gaussian() -> None:
    prior, x, t = Scaled(), randn(5, 2), 0.4
    variance = 0.6**2 + (0.4 * 0.3) ** 2
    expected = 1 + 0.4 * 0.09 / variance * (x - t)
    torch.testing.assert_close(prior.denoise(x, t), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(prior.score(x, t), -(x - t) / variance, rtol=1e-12, atol=1e-12)


def test_score_is_refused_where_there_is_none() -> None:
    prior = Scaled()
    with pytest.raises(ValueError, match="undefined at t = 1"):
        prior.score(randn(2, 2), 1.0)
    prior.independent_noise = False
    with pytest.raises(ValueError, match="gives no score"):
        prior.score(randn(2, 2), 0.5)


def test_generate_has_the_law_of_the_data() -> None:
    x = Jumping().generate(4000, generator=generator())
    assert (x.mean(0) - 1).abs().max() < 4.5 * 0.3 / math.sqrt(4000)
    assert (x.var(0) - 0.09).abs().max() < 4.5 * 0.09 * math.sqrt(2 / 4000)


def test_generate_does_not_depend_on_chunks_or_type_of_noise() -> None:
    prior = Jumping()
    images = [prior.generate(7, 3, generator=generator(1), chunk_size=chunk) for chunk in (1, 3, 256)]
    assert all(torch.equal(images[0], other) for other in images)
    single = Jumping().float().generate(7, 3, generator=generator(1))
    torch.testing.assert_close(single.double(), images[0], rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="n >= 1"):
        prior.generate(0)


# -- counting -----------------------------------------------------------------------------------------------


def test_velocities_of_the_default_jump_are_counted() -> None:
    prior = Scaled(steps=5)
    x = randn(3, 2).requires_grad_()
    with prior.count() as outer:
        prior.velocity(x, 0.5)
        with prior.count() as inner:
            out = prior.jump(x, 0.0, 1.0)
        torch.autograd.grad(out.sum(), x)
    assert (inner.forward, inner.backward) == (3 * 2 * 5, 3 * 2 * 5)
    assert (outer.forward, outer.backward) == (3 + 30, 30)
    prior.velocity(x, 0.5)
    assert outer.forward == 33


def test_one_jump_in_closed_form_counts_once() -> None:
    prior, z = Jumping(), randn(4, 2)
    with prior.count() as calls:
        prior.generate(10, 3, generator=generator())
        prior.score(z, 0.5)
        prior.denoise(z, 0.5)
        prior.one_step(z)
    assert calls.forward == 10 * 3 + 3 * 4


def test_jacobian_vector_products_count_once_each_way() -> None:
    prior, z = Jumping(), randn(4, 2)
    with prior.count() as calls:
        torch.func.jvp(lambda x: prior.jump(x, 0.2, 1.0), (z,), (z,))
    assert (calls.forward, calls.backward) == (4, 4)
    with prior.count() as calls:
        _, pull_back = torch.func.vjp(lambda x: prior.jump(x, 0.2, 1.0), z)
        pull_back(z)
    assert (calls.forward, calls.backward) == (4, 4)


def test_a_velocity_that_calls_its_parent_counts_once() -> None:
    class Damped(Scaled):
        def velocity(self, x: Tensor, t: Any) -> Tensor:
            return 0.9 * super().velocity(x, t)

    prior = Damped()
    with prior.count() as calls:
        prior.velocity(randn(4, 2), 0.5)
    assert calls.forward == 4


# -- the contract check -------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [Scaled, Jumping], ids=["ode", "closed form"])
def test_contract(make: type[FlowMap]) -> None:
    check_flow_map(make)


class Reversed(Jumping):
    def velocity(self, x: Tensor, t: Any) -> Tensor:
        return -super().velocity(x, t)


class Mixing(Jumping):
    def velocity(self, x: Tensor, t: Any) -> Tensor:
        return super().velocity(x - 0.01 * x.mean(0), t)


class Moving(Jumping):
    def jump(self, x: Tensor, s: Any, t: Any) -> Tensor:
        return 1.01 * super().jump(x, s, t)


class Learned(Jumping):
    """Starts along the velocity, then is a little off, as a learned map is."""

    def jump(self, x: Tensor, s: Any, t: Any) -> Tensor:
        return super().jump(x, s, t) + 0.1 * (expand_time(t, x) - expand_time(s, x)) ** 2 * x


class Coupled(Jumping):
    independent_noise = False

    def score(self, x: Tensor, t: Any) -> Tensor:
        return x


class Halved(Jumping):
    @property
    def decode_affine(self) -> tuple[float, float]:
        return (0.5, 0.5)

    def decode(self, state: Tensor) -> Tensor:
        return state / 2


class Lossy(Jumping):
    def encode(self, image: Tensor) -> Tensor:
        return image.clamp(-0.5, 0.5)


class Seeded(Jumping):
    def jump(self, x: Tensor, s: Any, t: Any) -> Tensor:
        torch.manual_seed(0)
        return super().jump(x, s, t)


class Uncounted(Jumping):
    def jump(self, x: Tensor, s: Any, t: Any) -> Tensor:
        self.record(forward=1)
        return super().jump(x, s, t)


class Ungenerated(Jumping):
    def noise(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        return super().noise(n)


class Single(Jumping):
    def velocity(self, x: Tensor, t: Any) -> Tensor:
        return super().velocity(x, t).float()


class Infinite(Jumping):
    def velocity(self, x: Tensor, t: Any) -> Tensor:
        return super().velocity(x, t) + 0 / expand_time(t, x)


class Shapeless(Jumping):
    image_shape = None  # type: ignore[assignment]


@pytest.mark.parametrize(("make", "words"), [
    (Reversed, "against velocity"), (Mixing, "single rows"), (Moving, "identity"), (Learned, "two jumps"),
    (Coupled, "it must raise ValueError"), (Halved, "its decode_affine"), (Lossy, "encode must invert"),
    (Seeded, "global random state"), (Uncounted, "counted"), (Ungenerated, "same seed"),
    (Single, "must be kept"), (Infinite, "not finite"), (Shapeless, "image_shape"),
], ids=lambda value: value.__name__ if isinstance(value, type) else None)
def test_contract_check_finds(make: type[FlowMap], words: str) -> None:
    with pytest.raises(AssertionError, match=words):
        check_flow_map(make)


def test_contract_check_spares_a_learned_map_the_semigroup() -> None:
    check_flow_map(Learned, exact=False)


def test_gaussian_agrees_with_the_mixture_of_one() -> None:
    mixture, z = GaussianMixtureFlow(torch.ones(1, 2, dtype=F64), 0.3), randn(4, 2)
    torch.testing.assert_close(mixture.velocity(z, 0.7), Scaled().velocity(z, 0.7), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(mixture.jump(z, 0.2, 0.7), Jumping().jump(z, 0.2, 0.7), rtol=1e-12, atol=1e-12)
