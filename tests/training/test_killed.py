"""Runs that are killed with SIGKILL, which no program can catch, resume and give the same numbers."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import invflow
from invflow.cli.compare import parse_solver
from invflow.evaluation.calibrate import Certificate

PROBLEM = "gaussian/linear"
pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="the system has no SIGKILL")


def start(*arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", "invflow", *arguments], stdout=subprocess.DEVNULL,
                            stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})


def kill_when(condition: Callable[[], bool], *arguments: str) -> None:
    """Run a command and kill it as soon as the condition holds."""
    process = start(*arguments)
    try:
        for _ in range(12000):  # two minutes
            if condition() or process.poll() is not None:
                break
            time.sleep(0.01)
        assert process.poll() is None, "it was done before it could be killed"
    finally:
        process.kill()
        process.wait()
    assert process.returncode == -signal.SIGKILL


@pytest.mark.slow
def test_a_comparison(tmp_path: Path) -> None:
    arguments = ("compare", PROBLEM, "--solver", "exact", "--solver", "few=fmtt:steps=12", "--observations", "48",
                 "--samples", "32", "--output", str(tmp_path))

    def parts() -> list[Path]:
        return sorted(tmp_path.glob("parts/*/*/*.safetensors"))

    kill_when(lambda: len(parts()) >= 8, *arguments)  # six of the first solver, two of the second
    before = {path: path.stat().st_mtime_ns for path in parts()}
    assert 8 <= len(before) < 12
    assert not (tmp_path / "comparison.json").exists()
    assert start(*arguments).wait() == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before  # none was made again
    assert len(parts()) == 12
    solvers = {"exact": "exact", "few": parse_solver("fmtt:steps=12")[1]}
    whole = invflow.compare(PROBLEM, solvers, num_observations=48, num_samples=32)
    resumed = (tmp_path / "table.csv").read_text()
    numbers = [[row for row in csv.DictReader(text.splitlines()) if row["metric"] not in ("seconds", "memory")]
               for text in (resumed, whole.to_csv())]
    assert numbers[0] == numbers[1]
    assert len(numbers[0]) > 10


@pytest.mark.slow
def test_a_calibration(tmp_path: Path) -> None:
    arguments = ("calibrate", PROBLEM, "--solver", "dps", "--set", "steps=20", "--simulations", "40", "--samples", "19",
                 "--chunk-size", "2", "--output", str(tmp_path))
    record = tmp_path / "simulations.safetensors"
    kill_when(record.exists, *arguments)
    assert not (tmp_path / "certificate.json").exists()
    assert start(*arguments).wait() == 0
    problem = invflow.load_problem(PROBLEM)
    whole = invflow.calibrate(invflow.DPS(problem.prior, steps=20), problem, num_simulations=40, num_samples=19,
                              chunk_size=2, generator=torch.Generator().manual_seed(0))
    resumed = Certificate.load(tmp_path)
    assert all(torch.equal(resumed.record[key], value) for key, value in whole.record.items() if key != "seconds")
