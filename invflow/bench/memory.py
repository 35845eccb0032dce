"""Benchmarks of memory. On a CPU each runs in a process of its own, because the peak of a process never decreases.

That process is ``python -m invflow.bench.memory particles 256 1024``, for some numbers of samples.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from invflow.bench.timing import Result, box_likelihood, fresh_vfm, sample_quietly
from invflow.solver import Solver
from invflow.solvers.tilting.fmtt import FMTT

__all__ = ["bench_memory", "bench_particle_memory"]

FEW, MANY = 256, 1024


def peak_memory(device: torch.device) -> int:
    """Peak memory in bytes, of this process on Linux and macOS or of a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    status = Path("/proc/self/status")
    if status.exists():  # getrusage inherits the peak of the process that started this one
        return 1024 * int(next(x.split()[1] for x in status.read_text().splitlines() if x.startswith("VmHWM")))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def peaks(kind: str, counts: Sequence[int], device: torch.device,
          generator: torch.Generator) -> list[tuple[float, float]]:
    """Peak memory in GB beyond that of two samples, and seconds, for increasing numbers of samples.

    Args:
        kind: ``"vfm"``, or ``"particles"`` for FMTT in chunks of 64.
        counts: Numbers of samples.
        device: Device of the networks.
        generator: Generator for the networks, the measurement and the samples.
    """
    vfm, likelihood = fresh_vfm(device, generator), box_likelihood(device, generator)
    solver: Solver = vfm
    if kind == "particles":
        solver = FMTT(vfm.prior, steps=2, schedule=lambda t: 0.5 + 0.5 * t, chunk_size=64)
    sample_quietly(solver, likelihood, 2, generator)
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else peak_memory(device)
    found = []
    for count in counts:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        seconds = sample_quietly(solver, likelihood, count, generator).seconds
        found.append(((peak_memory(device) - before) / 1e9, seconds))
    return found


def _peaks(kind: str, counts: Sequence[int], device: torch.device,
           generator: torch.Generator) -> list[tuple[float, float]]:
    """Same as :func:`peaks`, on a CPU in a process of its own; none on Windows, which needs further packages."""
    if device.type == "cuda":
        return peaks(kind, counts, device, generator)
    if sys.platform == "win32":
        return []
    command = [sys.executable, "-m", "invflow.bench.memory", kind, *map(str, counts)]
    out = subprocess.run(command, capture_output=True, text=True, check=True)
    return [(gigabytes, seconds) for gigabytes, seconds in json.loads(out.stdout.splitlines()[-1])]


def bench_memory(repeats: int, device: torch.device, generator: torch.Generator) -> Iterator[Result]:
    """Peak memory above the loaded network while drawing 10,000 samples."""
    for peak, seconds in _peaks("vfm", (10_000,), device, generator):
        yield Result("memory above the loaded network", "B=1, N=10,000, ratio in GB", seconds, float("nan"), peak, 1.0)


def bench_particle_memory(repeats: int, device: torch.device, generator: torch.Generator) -> Iterator[Result]:
    """Peak memory of FMTT beyond the network, with four times as many particles in chunks, relative to fewer."""
    found = _peaks("particles", (FEW, MANY), device, generator)
    if found:
        (few, _), (many, seconds) = found
        sizes = f"B=1, N={MANY} over N={FEW}, chunks of 64, {many:.3f} GB"
        yield Result("FMTT, memory of many particles over few", sizes, seconds, float("nan"), many / few, 1.5)


if __name__ == "__main__":
    print(json.dumps(peaks(sys.argv[1], [int(count) for count in sys.argv[2:]], torch.device("cpu"),
                           torch.Generator().manual_seed(0))))
