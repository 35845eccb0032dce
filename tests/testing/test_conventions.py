"""check_flow_map(exact=False, images=) names the convention that a network was trained in, for each wrong one."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import invflow
from invflow.testing import check_flow_map

F64 = torch.float64
SHAPE = (3, 2, 2)
#: a few images in [0, 1], of which the data are blurred copies
CENTRES = torch.rand(6, *SHAPE, generator=torch.Generator().manual_seed(3), dtype=F64) ** 2
SPREAD = 0.05


def flow(scale: float = 2.0, shift: float = -1.0) -> invflow.GaussianMixtureFlow:
    """The exact flow of the images, in states scale * image + shift."""
    return invflow.GaussianMixtureFlow(scale * CENTRES + shift, abs(scale) * SPREAD)


def images(count: int = 256) -> Tensor:
    g = torch.Generator().manual_seed(4)
    which = torch.randint(len(CENTRES), (count,), generator=g)
    return CENTRES[which] + SPREAD * torch.randn(count, *SHAPE, generator=g, dtype=F64)


def prior_of(velocity: Callable[..., Tensor], **options: Any) -> invflow.FlowMap:
    return invflow.from_velocity(velocity, SHAPE, **{"steps": 2, "decode": (0.5, 0.5), **options}).double()


def column(t: Tensor) -> Tensor:
    return t.reshape(-1, 1, 1, 1)


def on_cosine(x: Tensor, t: Tensor) -> Tensor:
    """The exact velocity of the cosine path, by the linear path's."""
    exact, turn = flow(), math.pi / 2
    a, s = (turn * column(t)).sin(), (turn * column(t)).cos()
    time = (a / (a + s)).flatten()
    b = exact.velocity(x / (a + s), time)
    state = x / (a + s)
    m, z = state + (1 - column(time)) * b, state - column(time) * b
    return turn * (s * m - a * z)


def diagonal(x: Tensor, t: Tensor, second: Tensor) -> Tensor:
    """An average velocity given the gap: that of a whole jump, on average, where the gap is none is the velocity."""
    exact = flow()
    return exact.velocity(x, t) + 3 * column(second) * torch.sin(5 * x)


exact = flow()
WRONG: dict[str, tuple[Callable[[], invflow.FlowMap], str]] = {
    "time reversed": (lambda: prior_of(lambda x, t: -exact.velocity(x, 1 - t)), "convention='data-at-0'"),
    "time reversed, stated so": (lambda: prior_of(lambda x, t: exact.velocity(x, t), convention="data-at-0"),
                                 "convention='data-at-1'"),
    "sign": (lambda: prior_of(lambda x, t: -exact.velocity(x, t)), "sign reversed"),
    "clock reversed": (lambda: prior_of(lambda x, t: exact.velocity(x, 1 - t)), "only the time argument reversed"),
    "clock in thousands": (lambda: prior_of(lambda x, t: exact.velocity(x, (t / 1000).clamp(0, 1))), "1000 \\* t"),
    "clock not in thousands": (lambda: prior_of(lambda x, t: exact.velocity(x, (1000 * t).clamp(0, 1))), "t / 1000"),
    "cosine path": (lambda: prior_of(on_cosine), "path='cosine'"),
    "cosine stated for linear": (lambda: prior_of(lambda x, t: exact.velocity(x, t), path="cosine"), "path='linear'"),
    "noise predicted": (lambda: prior_of(lambda x, t: x - column(t) * exact.velocity(x, t)),
                        "as a prediction of the noise"),
    "data predicted": (lambda: prior_of(lambda x, t: exact.denoise(x, t)), "as a prediction of the data"),
    "states in [0, 1]": (lambda: prior_of(lambda x, t: flow(1.0, 0.0).velocity(x, t)), r"decode=\(1.0, 0.0\)"),
    "states in [-1, 1]": (lambda: prior_of(lambda x, t: exact.velocity(x, t), decode=(1.0, 0.0)),
                          r"decode=\(0.5, 0.5\)"),
    "colours reversed": (lambda: prior_of(lambda x, t: exact.velocity(x.flip(1), t).flip(1)), "x.flip\\(1\\)"),
    "second argument": (lambda: invflow.from_average_velocity(
        diagonal, SHAPE, second="r", decode=(0.5, 0.5), order="x, t, r").double(), "second='t-r'"),
}


@pytest.mark.parametrize("kind", list(WRONG))
def test_the_wrong_convention_is_named(kind: str) -> None:
    build, named = WRONG[kind]
    with pytest.raises(AssertionError, match=named):
        check_flow_map(build(), exact=False, images=images(), tolerance=1.0)


@pytest.mark.parametrize("options", [{}, {"decode": (1.0, 0.0)}])
def test_the_right_one_passes(options: dict[str, Any]) -> None:
    right = flow(1.0, 0.0) if options else exact
    check_flow_map(prior_of(lambda x, t: right.velocity(x, t), **options), exact=False, images=images(), tolerance=1.0)
    check_flow_map(prior_of(on_cosine, path="cosine"), exact=False, images=images(), tolerance=1.0)
    average = invflow.from_average_velocity(diagonal, SHAPE, second="t-r", decode=(0.5, 0.5), order="x, t, r")
    check_flow_map(average.double(), exact=False, images=images(), tolerance=10.0)
    jump = invflow.from_consistency(lambda x, t: exact.jump(x, t, 1.0), SHAPE, path="linear", convention="data-at-1",
                                    decode=(0.5, 0.5)).double()
    check_flow_map(jump, exact=False, images=images())
