"""The benchmarks of memory: they run in a process of their own, and more samples take no less."""

from __future__ import annotations

import pytest
import torch

from invflow.bench import memory


def test_memory_of_particles_is_measured_in_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "FEW", 2)
    monkeypatch.setattr(memory, "MANY", 64)
    (result,) = memory.bench_particle_memory(1, torch.device("cpu"), torch.Generator().manual_seed(0))
    assert result.sizes.startswith("B=1, N=64 over N=2, chunks of 64")
    assert result.ratio > 1  # the peak of 64 particles after that of two
    assert result.seconds > 0
