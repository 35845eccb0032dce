"""Digests by content: everything that determines the numbers changes them, and nothing else does."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import importlib
import mmap
import os
import pickle
import random
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import invflow
from invflow._core import source
from invflow._core.identity import UnidentifiedError, identity
from invflow._core.remembered import quick_identity, trusting
from invflow._core.source import _digest

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
        patched.setattr(module.Reader, "read", lambda *_: pytest.fail("read again"))
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


class Level(int):
    """A number with a name."""


def test_to_pickle_an_object_does_not_change_it() -> None:
    before = identity(Setting())
    pickle.dumps(Setting())
    assert identity(Setting()) == before


def test_what_is_not_in_attributes_counts() -> None:
    assert identity(Level(3)) == identity(Level(3)) != identity(Level(4))
    assert identity(random.Random(3)) == identity(random.Random(3)) != identity(random.Random(4))
    one, two = ValueError("a"), ValueError("b")
    one.level = two.level = 1  # type: ignore[attr-defined]
    assert identity(one) != identity(two)


def stream() -> Iterator[int]:
    yield 1


UNREAD: dict[str, Callable[[Path], Any]] = {
    "text file": lambda path: path.open(), "binary file": lambda path: path.open("rb"),
    "raw file": lambda path: path.open("rb", buffering=0), "bytes of one": lambda path: mmap.mmap(-1, 8),
    "socket": lambda _: socket.socket(), "generator": lambda _: stream(), "lock": lambda _: threading.Lock(),
    "event": lambda _: threading.Event(), "local": lambda _: threading.local(), "weak": lambda _: weakref.ref(Own),
}


@pytest.mark.parametrize("make", UNREAD.values(), ids=UNREAD)
def test_what_has_no_content_to_read_is_refused(make: Callable[[Path], Any], tmp_path: Path) -> None:
    """A file that is open, say, whose place in it decides what is read next: also where a function closes over it."""
    (tmp_path / "a.txt").write_text("1 2 3")
    held = make(tmp_path / "a.txt")
    with contextlib.ExitStack() as stack:
        if hasattr(held, "close"):
            stack.callback(held.close)
        for value in (held, [held], lambda x: (held, x), functools.partial(print, held)):
            with pytest.raises(UnidentifiedError, match="cannot be identified"):
                identity(value)


def test_each_module_is_looked_at_once_for_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    vfm = invflow.VFM.load("mnist")
    problem = invflow.load_problem("mnist/denoising")
    likelihood = problem.simulate(1, generator=torch.Generator().manual_seed(0))[1]
    first = vfm.sample(likelihood, 1, generator=0).settings
    from invflow._core import remembered as module

    looked: list[object] = []
    holds = module._Seen.holds
    monkeypatch.setattr(module._Seen, "holds", lambda self, value: looked.append(value) or holds(self, value))
    assert vfm.sample(likelihood, 1, generator=0).settings == first
    assert len(looked) == len({id(x) for x in looked}) == 3  # map, adapter, operator
    with torch.no_grad():
        next(vfm.adapter.parameters()).add_(1)
        next(vfm.prior.parameters()).add_(1)
    second = vfm.sample(likelihood, 1, generator=0).settings
    for key in ("map", "adapter"):
        assert second[key] != first[key]
    assert second["identity"] == {**first["identity"], "prior": identity(vfm.prior), "adapter": identity(vfm.adapter)}
    assert second["identity"]["prior"] != first["identity"]["prior"]


def test_who_says_itself_what_it_is_is_asked_at_each_sample() -> None:
    class Remote(Own):
        def fingerprint(self) -> str:
            return f"server {VERSIONS[0]}"

    prior, reward = Remote(), invflow.FunctionReward(lambda x: x[:, 0])
    solver = invflow.NoiseSMC(prior)
    VERSIONS = [1]
    first, second = (solver.sample(reward, 8, generator=0).settings["identity"] for _ in range(2))
    VERSIONS[0] = 2
    assert first == second != solver.sample(reward, 8, generator=0).settings["identity"]


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


def test_a_module_that_is_held_is_known_by_what_is_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A solver's backend, say: one of the user's own by its content, an installed one by its version."""
    monkeypatch.syspath_prepend(tmp_path)

    def held(text: str) -> invflow.Solver:
        (tmp_path / "backend.py").write_text(text)
        sys.modules.pop("backend", None)
        importlib.invalidate_caches()
        solver = invflow.FMTT(mixture())
        solver.backend = importlib.import_module("backend")  # type: ignore[attr-defined]
        return solver

    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    texts = ["import torch\nSCALE = 2.0\ndef drift(x):\n    return SCALE * torch.sin(x)\n"]
    texts += [texts[0].replace("2.0", "3.0"), texts[0].replace("sin", "cos")]
    first, *others = (held(text).fingerprint() for text in texts)
    assert held(texts[0]).fingerprint() == first
    assert len({first, *others}) == 3
    with pytest.raises(UnidentifiedError, match=r"backend\.LOCK is a _thread\.lock"):
        held("import threading\nLOCK = threading.Lock()\n").fingerprint()
    assert identity(torch) == identity(torch) != identity(os)


def test_the_code_of_the_library_is_read_from_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(source, "_PACKAGES", ("pretended",))
    (tmp_path / "pretended").mkdir()
    (tmp_path / "pretended" / "__init__.py").touch()

    def digest(text: str) -> str:
        (tmp_path / "pretended" / "operator.py").write_text(text)
        return source.code_digest.__wrapped__()

    assert digest("factor = 2") == digest("factor = 2  # twice") != digest("factor = 3")


SOURCE = '''
"""A module."""
class Walk:
    """A walk."""
    length = 3
    def step(self, x):
        """One step."""
        return x + 0.5, 'left', {1, 2}, [i * 2 for i in range(3)]
'''


def test_the_code_of_the_library_is_known_by_what_it_does() -> None:
    def digest(*change: str) -> bytes:
        text = SOURCE.replace(*change) if change else SOURCE
        assert not change or text != SOURCE
        return _digest(compile(text, "a.py", "exec"))

    for change in (("A module.", "Modules."), ("A walk.", "Walks."), ("One step.", "Steps."),
                   ("    length", "    # why\n\n    length")):
        assert digest(*change) == digest(), change
    for change in (("0.5", "0.25"), ("'left'", "'right'"), ("= 3", "= 4"), ("* 2", "* 3"), ("{1, 2}", "{1, 3}"),
                   ("x + ", "x - "), ("step", "go")):
        assert digest(*change) != digest(), change
