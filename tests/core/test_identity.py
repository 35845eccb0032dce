"""Digests by content: whatever decides the numbers changes them, and nothing else does."""

from __future__ import annotations

import copy
import dataclasses
import functools
import os
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
import torch
from torch import nn

import invflow
from invflow._core.identity import UnidentifiedError, identity, quick_identity, trusting

SCALE = [2.0]


def scaled(x: torch.Tensor) -> torch.Tensor:
    return SCALE[0] * x


class Own(invflow.FlowMap):
    state_shape = image_shape = (2,)

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = weight
        self.register_buffer("hidden", torch.ones(2), persistent=False)

    def velocity(self, x, t):  # type: ignore[no-untyped-def]
        return self.weight * self.hidden * x


def mixture(mean: float = 0.0) -> invflow.GaussianMixtureFlow:
    return invflow.GaussianMixtureFlow(torch.full((1, 2), mean), std=1.0)


def net(seed: int) -> nn.Module:
    layer = nn.Linear(2, 2)
    nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(seed))
    nn.init.zeros_(layer.bias)
    return layer


def velocity_of(seed: int) -> invflow.FlowMap:
    layer = net(seed)
    return invflow.from_velocity(lambda x, t: layer(x), (2,), steps=4)


@dataclasses.dataclass(frozen=True)
class Setting:
    spread: float = 1.0
    kind: str = "a"


def test_equal_content_is_equal_wherever_it_came_from() -> None:
    for make in (mixture, Own, lambda: velocity_of(1), Setting, lambda: {"a": 1, "b": {2, 3}}, lambda: scaled,
                 lambda: functools.partial(scaled), lambda: torch.zeros(2)[::1], lambda: Own):
        assert identity(make()) == identity(make())
    prior = velocity_of(1)
    assert identity(copy.deepcopy(prior)) == identity(prior) == prior.fingerprint()
    assert identity({"a": 1, "b": 2}) == identity({"b": 2, "a": 1})
    x = torch.arange(6.0).reshape(2, 3)
    assert identity(x.T.contiguous().T) == identity(x) == identity(nn.Parameter(x.clone()).data)


@pytest.mark.parametrize(("one", "two"), [
    (mixture(), mixture(30.0)), (Own(), Own(2.0)), (velocity_of(1), velocity_of(2)), (Setting(), Setting(2.0)),
    (1, 1.0), (1, True), ("a", b"a"), ([1, 2], (1, 2)), ([[1], 2], [1, [2]]), (lambda x: x, lambda x: 2 * x),
    (torch.zeros(2), torch.zeros(2, dtype=torch.float64)), (torch.zeros(2, 1), torch.zeros(1, 2)),
    (functools.partial(scaled, 1), functools.partial(scaled, 2)), (invflow.ExactPosterior(mixture()),
                                                                   invflow.ExactPosterior(mixture(30.0))),
    (invflow.FMTT(mixture(), steps=5), invflow.FMTT(mixture(), steps=6)),
    (invflow.LatentFlowMap(mixture(), net(1)), invflow.LatentFlowMap(mixture(), net(2))),
    (invflow.LatentFlowMap(mixture(), net(1).forward), invflow.LatentFlowMap(mixture(), net(2).forward)),
    (invflow.FunctionReward(scaled), invflow.FunctionReward(scaled, differentiable=False)),
])
def test_other_content_is_another(one: object, two: object) -> None:
    assert identity(one) != identity(two)


def test_everything_that_changes_in_place_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    prior, seen = Own(), set()
    seen.add(identity(prior))
    prior.hidden += 1  # in no state_dict
    seen.add(identity(prior))
    prior.hidden.data += 1  # which no version counts
    seen.add(identity(prior))
    prior.weight = 3.0
    seen.add(identity(prior))
    prior.register_forward_hook(lambda module, args, out: 2 * out)
    seen.add(identity(prior))
    monkeypatch.setattr(Own, "velocity", lambda self, x, t: x)
    seen.add(identity(prior))
    assert len(seen) == 6
    before = identity(scaled)
    monkeypatch.setitem(globals(), "SCALE", [3.0])  # a global that the function reads
    assert identity(scaled) != before


@pytest.fixture
def trust() -> Iterator[None]:
    with trusting():
        yield


@pytest.mark.usefixtures("trust")
def test_what_is_remembered_holds_as_long_as_its_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    prior = velocity_of(1)
    assert quick_identity(prior) == identity(prior)
    from invflow._core import identity as module

    with monkeypatch.context() as patched:  # nothing is read again
        patched.setattr(module._Reader, "read", lambda *_: pytest.fail("read again"))
        known = quick_identity(prior)
    for change in (lambda m: next(iter(m.means[:1])).add_(1), lambda m: setattr(m, "ode_steps", 7),
                   lambda m: setattr(m, "means", m.means + 1), lambda m: m.double()):
        prior = mixture()
        known = quick_identity(prior)
        change(prior)
        assert quick_identity(prior) == identity(prior) != known


def test_the_record_of_a_sample_follows_its_prior() -> None:
    prior = mixture()
    solver, reward = invflow.FMTT(prior, steps=2), invflow.FunctionReward(lambda x: x[:, 0])
    first = solver.sample(reward, 2, generator=0).settings["identity"]["prior"]
    prior.means += 30
    assert solver.sample(reward, 2, generator=0).settings["identity"]["prior"] == prior.fingerprint() != first


def test_what_cannot_be_read_is_refused_by_its_way() -> None:
    prior = Own()
    prior.lock = threading.Lock()
    with pytest.raises(UnidentifiedError, match=r"prior\.lock is a _thread\.lock"):
        invflow.FMTT(prior).fingerprint()
    assert quick_identity(prior) is None


def test_an_object_may_say_itself_what_it_is() -> None:
    class Remote(Own):
        def fingerprint(self) -> str:
            return f"server {self.lock[1]}"

    one, two = Remote(), Remote()
    one.lock, two.lock = (threading.Lock(), 1), (threading.Lock(), 2)
    assert identity(one) != identity(two)


def test_another_process_finds_the_same() -> None:
    code = ("import torch, invflow; print(invflow.FMTT(invflow.GaussianMixtureFlow(torch.zeros(1, 2), std=1.0), "
            "schedule=lambda t: t).fingerprint())")
    found = {subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                            env={**os.environ, "PYTHONHASHSEED": seed}).stdout for seed in ("1", "2")}
    assert len(found) == 1
