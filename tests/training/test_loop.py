"""The training loop: inputs of a checkpoint, weights that are not finite, and the state after a stop."""

from __future__ import annotations

import csv
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from invflow._core.files import alone_in
from invflow._core.identity import identity
from invflow.operators import (
    BoxInpainting,
    Denoising,
    FreeFormInpainting,
    GaussianBlur,
    MaskInpainting,
    MotionBlur,
    RandomInpainting,
)
from invflow.training import TrainingProblem
from invflow.training.checkpoint import CHECKPOINT, PREVIOUS
from invflow.training.loop import LoopSettings, MetricsFile, Objective, batches_of, fit

SETTINGS = LoopSettings(steps=6, batch_size=4, warmup=0, precision="no", checkpoint_seconds=0.0, log_every=1)


class Fit(Objective):
    """A linear layer that learns to give its input back; its loss may be made to break."""

    def __init__(self, scale: float = 1.0, start: float = 0.5, break_at: int | None = None) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3, bias=False)
        nn.init.constant_(self.layer.weight, start)
        self.scale, self.calls, self.break_at = scale, 0, break_at
        self._derived = ("calls", "break_at")

    _derived = ("calls", "break_at")

    def trained(self) -> dict[str, nn.Module]:
        return {"layer": self.layer}

    def forward(self, data: Tensor, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        self.calls += 1
        loss = self.scale * (self.layer(data) - data).square().sum()
        if self.calls == self.break_at:  # a finite loss whose gradient is not a number
            loss = loss + (0 * self.layer.weight.sum()).abs().sqrt()
        return loss, {}


def rows(seed: int = 0) -> Tensor:
    return torch.rand(16, 3, generator=torch.Generator().manual_seed(seed))


def train(folder: Path, objective: Objective, data: Any = None, stop_at: int | None = None, **changes: Any) -> bool:
    settings = LoopSettings(**{**vars(SETTINGS), **changes})
    return fit(objective, batches_of(rows() if data is None else data, settings), settings, folder, progress=False,
               stop_at=stop_at)


def step_of(path: Path) -> int:
    with safe_open(path, framework="pt") as file:
        return int(file.metadata()["step"])


@pytest.mark.parametrize(("other", "word"), [
    (lambda folder: train(folder, Fit(start=0.4)), "another prior, network or objective"),
    (lambda folder: train(folder, Fit(scale=2.0)), "another prior, network or objective"),
    (lambda folder: train(folder, Fit(), data=rows(1)), "other data"),
    (lambda folder: train(folder, Fit(), seed=1), "other settings"),
])
def test_a_folder_of_something_else_is_refused(tmp_path: Path, other: Any, word: str) -> None:
    train(tmp_path, Fit(), stop_at=3)
    before = (tmp_path / CHECKPOINT).read_bytes()
    with pytest.raises(ValueError, match=word):
        other(tmp_path)
    assert (tmp_path / CHECKPOINT).read_bytes() == before
    assert train(tmp_path, Fit(), log_every=2)  # the same goes on, with what is free to change changed


def test_a_folder_of_other_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(tmp_path, Fit(), stop_at=3)
    before = (tmp_path / CHECKPOINT).read_bytes()
    with monkeypatch.context() as changed:
        changed.setattr("invflow.training.loop.code_digest", lambda *_: "another")
        with pytest.raises(ValueError, match=r"other code of invflow.*the version that started it"):
            train(tmp_path, Fit())
    assert (tmp_path / CHECKPOINT).read_bytes() == before
    assert train(tmp_path, Fit())


def test_what_cannot_be_identified_trains_but_is_not_resumed(tmp_path: Path) -> None:
    def sampler(n: int, generator: torch.Generator, held: Any = threading.Lock()) -> Tensor:  # noqa: B008
        return torch.rand(n, 3, generator=generator)

    train(tmp_path, Fit(), data=sampler, stop_at=3)
    with pytest.raises(ValueError, match="cannot determine whether"):
        train(tmp_path, Fit(), data=sampler)


@pytest.mark.parametrize("step", [3, 6])
def test_a_gradient_that_is_not_a_number_ends_training_and_spares_the_checkpoint(tmp_path: Path, step: int) -> None:
    with pytest.raises(FloatingPointError, match=rf"not finite at step {step}.*holds step {step - 1}"):
        train(tmp_path, Fit(break_at=step))
    assert step_of(tmp_path / CHECKPOINT) == step - 1
    objective = Fit()
    assert train(tmp_path, objective)  # goes on from there
    assert bool(objective.layer.weight.isfinite().all())


def test_the_checkpoint_before_is_kept_and_taken_where_the_last_is_missing(tmp_path: Path) -> None:
    train(tmp_path, Fit(), stop_at=4)
    assert (step_of(tmp_path / PREVIOUS), step_of(tmp_path / CHECKPOINT)) == (4, 4) or (
        step_of(tmp_path / PREVIOUS) == 3)
    (tmp_path / CHECKPOINT).unlink()  # killed between the two renames
    whole, resumed = Fit(), Fit()
    assert train(tmp_path / "whole", whole)
    assert train(tmp_path, resumed)
    assert torch.equal(whole.layer.weight, resumed.layer.weight)


def test_a_damaged_checkpoint_names_the_one_before(tmp_path: Path) -> None:
    train(tmp_path, Fit(), stop_at=4)
    (tmp_path / CHECKPOINT).write_bytes(b"x" * 100)
    with pytest.raises(ValueError, match=f"damaged.*the previous one is .*{PREVIOUS}"):
        train(tmp_path, Fit())


def test_two_trainings_in_one_folder_are_refused(tmp_path: Path) -> None:
    with alone_in(tmp_path), pytest.raises(ValueError, match="another run is using"):
        train(tmp_path, Fit())


def test_an_interruption_says_what_it_saved_and_how_to_go_on(tmp_path: Path) -> None:
    class Interrupted(Fit):
        def forward(self, data: Tensor, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
            if self.calls == 2:
                os.kill(os.getpid(), signal.SIGINT)
            return super().forward(data, generator)

    with pytest.raises(KeyboardInterrupt, match=r"stopped at step 3 of 6 and saved .*\.safetensors: run the same"):
        train(tmp_path, Interrupted())
    assert step_of(tmp_path / CHECKPOINT) == 3


def test_metrics_are_never_fewer_than_the_checkpoint_knows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(tmp_path, Fit(), stop_at=4)
    path = tmp_path / "metrics.csv"
    before = path.read_text()

    def killed(*_: Any) -> None:
        raise SystemExit

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(SystemExit):  # while rows beyond step 2 are dropped
        MetricsFile(path, 2)
    assert path.read_text() == before
    monkeypatch.undo()
    MetricsFile(path, 2)
    with path.open(newline="") as handle:
        assert [row["step"] for row in csv.DictReader(handle)] == ["1", "2"]


def test_each_number_stands_under_its_name(tmp_path: Path) -> None:
    """Batches differ in what they measure, and a kill leaves the beginning of a row."""
    path = tmp_path / "metrics.csv"
    log = MetricsFile(path, 0)
    log.write(1, {"loss": 1.0, "meanflow": 2.0})
    log.write(2, {"loss": 3.0, "flow_matching": 4.0, "meanflow": 5.0})
    log.write(3, {"loss": 6.0, "flow_matching": 7.0})
    with path.open("a") as handle:
        handle.write("1")  # of 10, killed
    MetricsFile(path, 3).write(4, {"loss": 8.0, "flow_matching": 9.0, "meanflow": 10.0})
    with path.open(newline="") as handle:
        rows = [(row["step"], row["loss"], row["meanflow"], row["flow_matching"]) for row in csv.DictReader(handle)]
    assert rows == [("1", "1", "2", ""), ("2", "3", "5", "4"), ("3", "6", "", "7"), ("4", "8", "10", "9")]


@pytest.mark.parametrize("kind", [RandomInpainting, BoxInpainting, FreeFormInpainting, MotionBlur, GaussianBlur])
def test_a_problem_class_is_the_same_in_every_process(kind: Any) -> None:
    """Its operator is built with random parameters, seeded by the operating system; no batch uses them."""
    shape = (1, 16, 16)
    first, second = (TrainingProblem(kind(shape), (0.0, 0.2)) for _ in range(2))
    assert identity(first) == identity(second)
    others = [TrainingProblem(kind(shape), (0.0, 0.3)), TrainingProblem(kind(shape), (0.0, 0.2), share=2.0),
              TrainingProblem(kind((1, 16, 17)), (0.0, 0.2)), TrainingProblem(Denoising(shape), (0.0, 0.2))]
    assert identity(first) not in {identity(other) for other in others}


def test_the_range_of_an_operator_identifies_its_problem_class() -> None:
    narrow, wide = (TrainingProblem(RandomInpainting((1, 16, 16), keep=keep), 0.1) for keep in ((0.3, 0.5), (0.3, 0.6)))
    assert identity(narrow) != identity(wide)
    first, second = (TrainingProblem(MaskInpainting(torch.arange(256).view(1, 16, 16) < k), 0.1) for k in (20, 21))
    assert identity(first) != identity(second)
