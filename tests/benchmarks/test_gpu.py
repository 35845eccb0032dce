"""The comparison of a GPU with the CPU: the CPU against itself, and against a device with wrong results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from invflow.registry import list_solvers


def test_a_device_agrees_with_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = gpu.main(["--device", "cpu", "--only", "vfm", "lmmse", "bicubic", "--samples", "2", "--no-speed",
                       "--output", str(tmp_path)])
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert status == 0
    assert [check["difference"] for check in found["solvers"]] == [0.0, 0.0, 0.0]
    assert found["solvers"][0]["calls"][0] == pytest.approx(1 + 1 / 2)  # one jump, one adapter call for two samples
    assert "vfm" in capsys.readouterr().out


@pytest.mark.parametrize(("change", "note"), [(lambda x: x + 1e-3, "samples differ"),
                                              (None, "failed with RuntimeError")])
def test_a_device_that_computes_something_else_is_seen(monkeypatch: pytest.MonkeyPatch, change, note: str) -> None:
    real, runs = gpu.draw, []

    def draw(name: str, device: torch.device, samples: int, seed: int):
        posterior = real(name, device, samples, seed)
        runs.append(name)
        if len(runs) == 2:
            if change is None:
                raise RuntimeError("an illegal memory access")
            posterior.samples = change(posterior.samples)
        return posterior

    monkeypatch.setattr(gpu, "draw", draw)
    check = gpu.agreement("bicubic", torch.device("cpu"), samples=1)
    assert note in check.note
    assert not check.passed


def test_a_solver_that_refuses_is_no_failure() -> None:
    check = gpu.agreement("wiener", torch.device("cpu"), samples=1)  # knows the spectrum of photographs alone
    assert check.passed


def test_every_solver_is_compared() -> None:
    assert set(gpu.SHORT) == set(list_solvers())


def test_an_unknown_solver_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu.main(["--only", "magic"])
    assert "magic" in capsys.readouterr().err
