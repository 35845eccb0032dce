"""Distillation: the losses against closed forms, and a mixture's ODE learned as one jump."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from invflow import ExactPosterior, FlowMap, GaussianLikelihood, GaussianMixtureFlow, LatentFlowMap, NoiseSMC
from invflow.flowmap import expand_time
from invflow.models.neural import NeuralFlowMap
from invflow.operators import MatrixOperator
from invflow.training import LoopSettings
from invflow.training.distillation import (
    DistillationObjective,
    distill,
    lagrangian_distillation_loss,
    meanflow_distillation_loss,
    semigroup_distillation_loss,
)

F64 = torch.float64
MEAN, STD, D = 0.4, 0.6, 3


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def spread(t: Tensor) -> Tensor:
    return ((1 - t) ** 2 + (t * STD) ** 2).sqrt()


def slope(t: Tensor) -> Tensor:
    """b_t(x) = MEAN + slope(t) (x - t MEAN), of the Gaussian N(MEAN, STD^2)."""
    return (t * STD**2 - (1 - t)) / spread(t) ** 2


def velocity(x: Tensor, t: Tensor) -> Tensor:
    t = expand_time(t, x)
    return MEAN + slope(t) * (x - t * MEAN)


def average_velocity(x: Tensor, s: Tensor, t: Tensor) -> Tensor:
    s, t = expand_time(s, x), expand_time(t, x)
    steep = (STD**2 * (s + t) - (2 - s - t)) / (spread(s) * (spread(s) + spread(t)))
    return MEAN + steep * (x - s * MEAN)


def times() -> tuple[Tensor, Tensor, int]:
    s = torch.tensor([0.0, 0.0, 0.2, 0.5, 0.3, 0.9], dtype=F64)
    t = torch.tensor([1.0, 0.4, 0.9, 0.6, 0.3, 0.9], dtype=F64)
    return s, t, 4


@pytest.mark.parametrize("count", [4, None])
@pytest.mark.parametrize("loss", [meanflow_distillation_loss, lagrangian_distillation_loss])
def test_losses_vanish_for_the_exact_map(loss: Callable[..., Tensor], count: int | None) -> None:
    s, t, _ = times()
    torch.testing.assert_close(loss(average_velocity, velocity, randn(6, D), s, t, count), torch.zeros(6, dtype=F64),
                               rtol=0, atol=1e-20)


@pytest.mark.parametrize("mixed", [False, True])
def test_meanflow_loss_of_a_wrong_map(mixed: bool) -> None:
    """u + c s is off by c s - (t - s) c, and only the first of the two is differentiated."""
    s, t, count = times()
    order = torch.tensor([3, 5, 0, 1, 4, 2]) if mixed else torch.arange(6)
    s, t, c = s[order], t[order], randn(D, seed=1).requires_grad_()

    def wrong(x: Tensor, s: Tensor, t: Tensor) -> Tensor:
        return average_velocity(x, s, t) + c * expand_time(s, x)

    losses = meanflow_distillation_loss(wrong, velocity, randn(6, D), s, t, None if mixed else count)
    off = (s - (t - s))[:, None] * c.detach()
    torch.testing.assert_close(losses.detach(), off.square().sum(1))
    losses.sum().backward()
    torch.testing.assert_close(c.grad, (2 * off * s[:, None]).sum(0))


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("through", [False, True])
def test_lagrangian_loss_of_a_wrong_map(through: bool, mixed: bool) -> None:
    """u + c t moves the landing by (t - s) c t: dX/dt is off by c t + (t - s) c, b_t(X) by slope(t) (t - s) c t."""
    s, t, count = times()
    order = torch.tensor([3, 5, 0, 1, 4, 2]) if mixed else torch.arange(6)
    s, t, c = s[order], t[order], randn(D, seed=1).requires_grad_()

    def wrong(x: Tensor, s: Tensor, t: Tensor) -> Tensor:
        return average_velocity(x, s, t) + c * expand_time(t, x)

    losses = lagrangian_distillation_loss(wrong, velocity, randn(6, D), s, t, None if mixed else count,
                                          through_teacher=through)
    moves, teacher = t + (t - s), slope(t) * (t - s) * t
    moves = torch.where(s == t, t, moves)  # on the diagonal the loss is flow matching, without the derivative
    off = (moves - teacher)[:, None] * c.detach()
    torch.testing.assert_close(losses.detach(), off.square().sum(1))
    losses.sum().backward()
    sensitivity = moves - teacher if through else moves
    torch.testing.assert_close(c.grad, (2 * off * sensitivity[:, None]).sum(0))


def test_semigroup_loss_vanishes_for_the_exact_map() -> None:
    s, t, k = times()
    middle = torch.lerp(s, t, torch.rand(6, dtype=F64, generator=torch.Generator().manual_seed(0)))
    found = semigroup_distillation_loss(average_velocity, velocity, randn(6, D), s, t, middle, k)
    torch.testing.assert_close(found, torch.zeros(6, dtype=F64), rtol=0, atol=1e-20)


def test_semigroup_loss_of_a_wrong_map() -> None:
    """u + c s: the first jump, to r, lands (r - s) c s too far, and the second adds its own c r."""
    s, t, k = times()
    r, c = 0.3 * s + 0.7 * t, randn(D, seed=1).requires_grad_()

    def wrong(x: Tensor, s: Tensor, t: Tensor) -> Tensor:
        return average_velocity(x, s, t) + c * expand_time(s, x)

    losses = semigroup_distillation_loss(wrong, velocity, randn(6, D), s, t, r, k)
    steep = (STD**2 * (r + t) - (2 - r - t)) / (spread(r) * (spread(r) + spread(t)))
    target = torch.where(t > s, 0.7 * s + 0.3 * (r + steep * (r - s) * s), 0.0)  # the diagonal has the teacher's own
    off = (s - target)[:, None] * c.detach()
    torch.testing.assert_close(losses.detach(), off.square().sum(1))
    losses.sum().backward()
    torch.testing.assert_close(c.grad, (2 * off * s[:, None]).sum(0))


# -- training ---------------------------------------------------------------------------------------------


def mixture(steps: int = 8) -> GaussianMixtureFlow:
    return GaussianMixtureFlow(torch.tensor([[2.0, 0.0], [-1.0, 1.7], [-1.0, -1.7]]), std=0.4, steps=steps)


def draw_data(n: int, generator: torch.Generator) -> Tensor:
    means = mixture().means.reshape(3, 2)
    component = torch.randint(3, (n,), generator=generator)
    return means[component] + 0.4 * torch.randn(n, 2, generator=generator)


def settings(steps: int, **options: Any) -> LoopSettings:
    return LoopSettings(**{**dict(steps=steps, batch_size=256, learning_rate=4e-3, warmup=20, ema=0.98, precision="no"),
                           **options})


@functools.cache
def student(folder: Path, loss: str, from_data: bool) -> NeuralFlowMap:
    found = distill(mixture(), settings(250), folder, data=draw_data if from_data else None, loss=loss,
                    options={"width": 64, "depth": 3, "embedding": 32}, progress=False)
    assert isinstance(found, NeuralFlowMap)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("distilled")


@pytest.mark.parametrize(("loss", "from_data", "bound"), [("lagrangian", False, 0.1), ("meanflow", True, 0.2),
                                                          ("semigroup", True, 0.2)])
def test_one_jump_does_what_the_ode_does(folder: Path, loss: str, from_data: bool, bound: float) -> None:
    """Mean square error of one jump against the exact one: a small share of that of one Euler step of the teacher."""
    z = torch.randn(2000, 2, generator=torch.Generator().manual_seed(5))
    exact = mixture(100).jump(z, 0.0, 1.0)
    euler = z + mixture().velocity(z, 0.0)
    found = student(folder / loss, loss, from_data)
    with found.count() as calls:
        landed = found.jump(z, 0.0, 1.0)
    assert calls.forward == 2000
    ratio = (landed - exact).square().sum() / (euler - exact).square().sum()
    assert ratio < bound, float(ratio)
    between = (found.jump(mixture(100).jump(z, 0.0, 0.5), 0.5, 1.0) - exact).square().sum()
    assert between / (euler - exact).square().sum() < bound
    assert (folder / loss / "prior" / "model.safetensors").is_file()
    again = NeuralFlowMap.from_pretrained(folder / loss / "prior")
    torch.testing.assert_close(again.jump(z, 0.0, 1.0), landed)


def test_one_step_solvers_apply_to_the_student(folder: Path) -> None:
    """Tempered sampling through one call: the posterior of the student is near that of the teacher."""
    operator = MatrixOperator(torch.tensor([[0.0, 1.0]]), image_shape=(2,))
    likelihood = GaussianLikelihood(operator, torch.tensor([[1.5]]), sigma=0.5)
    g = torch.Generator().manual_seed(0)
    found = NoiseSMC(student(folder / "lagrangian", "lagrangian", False)).sample(likelihood, 1000, generator=g)
    exact = ExactPosterior(mixture()).sample(likelihood, 4000, generator=g)
    assert (found.mean() - exact.mean()).abs().max() < 0.15
    assert (found.std() / exact.std() - 1).abs().max() < 0.2


# -- what distill makes of its arguments ------------------------------------------------------------------


class Sided(FlowMap):
    """A flow with states in [-1, 1] and images in [0, 1], that says where it was asked."""

    state_shape = image_shape = (2,)
    decode_affine = (0.5, 0.5)  # type: ignore[assignment]

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.asked: list[Tensor] = []

    def velocity(self, x: Tensor, t: Any) -> Tensor:
        self.asked.append(x)
        return -x * self.weight


def test_states_come_from_data_or_from_the_path(tmp_path: Path) -> None:
    """Images of 0.75 are states of 0.5; along the path noise shrinks by e^-s."""
    teacher = Sided()
    new = NeuralFlowMap((2,), network="mlp", options={"width": 8, "depth": 1}, generator=torch.Generator())
    g = torch.Generator()
    objective = DistillationObjective(new, teacher, "meanflow", from_data=True, distinct=0.0)
    objective(torch.full((64, 2), 0.75), g.manual_seed(0))
    s = torch.rand(64, 2, generator=g.manual_seed(0))[:, 0]
    noise = torch.randn(64, 2, generator=g)
    torch.testing.assert_close(teacher.asked[-1], (1 - s[:, None]) * noise + 0.5 * s[:, None])
    z = torch.randn(64, 2, generator=g.manual_seed(1))
    DistillationObjective(new, teacher, "meanflow", distinct=0.0)(z, g.manual_seed(0))
    torch.testing.assert_close(teacher.asked[-1], z * (-s[:, None]).exp(), rtol=1e-3, atol=1e-4)
    found = distill(teacher, settings(2), tmp_path, options={"width": 8, "depth": 1}, progress=False)
    assert found.decode_affine == (0.5, 0.5)
    assert teacher.weight.requires_grad
    assert not any(p.requires_grad for p in found.parameters())


@pytest.mark.parametrize("loss", ["lagrangian", "meanflow"])
def test_latent_teachers_give_latent_students(tmp_path: Path, loss: str) -> None:
    """A tiny U-Net in place of a mixture of codes, with images for data."""
    codes = GaussianMixtureFlow(torch.full((1, 1, 4, 4), 0.5), std=0.5, steps=2)
    teacher = LatentFlowMap(codes, lambda x: x.repeat_interleave(2, 2), lambda x: x[:, :, ::2])
    images = torch.rand(32, 1, 8, 4, generator=torch.Generator().manual_seed(0))
    options = {"channels": [8], "blocks": 1, "patch": 1}
    found = distill(teacher, settings(2, batch_size=8), tmp_path, data=images, loss=loss,
                    options=options, progress=False)
    assert isinstance(found, LatentFlowMap)
    assert isinstance(found.latent, NeuralFlowMap)
    with found.count() as calls:
        assert found.generate(3, generator=torch.Generator().manual_seed(0)).shape == (3, 1, 8, 4)
    assert calls.forward == 3
    # in the loop's usual precision the teacher stays in its own
    with torch.autocast("cpu", torch.bfloat16):
        objective = DistillationObjective(copy.deepcopy(found.latent).requires_grad_(True), teacher, loss)
        value, _ = objective(torch.randn(8, 1, 4, 4, generator=torch.Generator()), torch.Generator())
    value.backward()
    assert value.isfinite()
    further = distill(teacher, settings(2, batch_size=8), tmp_path / "on", start=found.latent, progress=False)
    assert further.image_shape == (1, 8, 4)


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="lagrangian, meanflow"):
        distill(mixture(), settings(1), tmp_path, loss="eulerian")
    other = NeuralFlowMap((3,), network="mlp", options={"width": 8, "depth": 1})
    with pytest.raises(ValueError, match="the same state_shape"):
        distill(mixture(), settings(1), tmp_path, start=other)
