"""Benchmarks of particle solvers: time relative to their network calls, and memory."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from invflow._core.random import draw_noise
from invflow.bench.timing import SHAPE, Result, fresh_vfm, medians, training_problems
from invflow.flowmap import FlowMap
from invflow.likelihood import GaussianLikelihood
from invflow.solver import Solver
from invflow.solvers.noise.tempered import NoiseSMC
from invflow.solvers.tilting.fmtt import FMTT

__all__ = ["bench_particle_memory", "bench_particles", "box_likelihood"]

PARTICLES = 64
LIMIT = 1.15


def box_likelihood(device: torch.device, generator: torch.Generator) -> GaussianLikelihood:
    """A measurement of uniform noise behind a random box, at sigma 0.025."""
    operator = training_problems()[2].operator.randomize(1, generator).to(device)
    images = torch.rand(1, *SHAPE, generator=generator).to(device)
    return GaussianLikelihood(operator, operator.measure(images, 0.025, generator=generator), sigma=0.025)


def _bare(prior: FlowMap, x: Tensor, with_gradient: int, without: int) -> Callable[[], None]:
    """Jumps of the map from x, some with a gradient and some without, with the same number of rows as a solver."""

    def calls() -> None:
        for _ in range(with_gradient):
            z = x.requires_grad_()
            torch.autograd.grad(prior.jump(z, 0.5, 1.0).sum(), z)
        with torch.no_grad():
            for _ in range(without):
                prior.jump(x, 0.5, 1.0)

    return calls


def bench_particles(repeats: int, device: torch.device, generator: torch.Generator) -> Iterator[Result]:
    """FMTT and NoiseSMC relative to their bare forward and backward calls, on box inpainting."""
    prior = fresh_vfm(device, generator).prior
    likelihood = box_likelihood(device, generator)
    solvers: dict[str, Solver] = {
        "FMTT": FMTT(prior, steps=6),
        "FMTT, conjugate": FMTT(prior, steps=12, kernel="ancestral", look_ahead="denoiser", schedule="annealed",
                                proposal="conjugate"),
        "NoiseSMC": NoiseSMC(prior, moves="crank-nicolson-langevin", num_moves=4, temperatures=(0.5, 1.0)),
    }
    x = draw_noise((PARTICLES, *SHAPE), generator).to(device)
    for name, solver in solvers.items():
        def run(solver: Solver = solver) -> object:
            import warnings

            with warnings.catch_warnings():  # with random weights nothing converges
                warnings.simplefilter("ignore")
                return solver.sample(likelihood, PARTICLES, generator=generator)

        nfe = solver_calls(run())
        a, b = medians(run, _bare(prior, x, nfe[1], nfe[0] - nfe[1]), repeats, device)
        sizes = f"B=1, N={PARTICLES}, {nfe[0]} calls forward and {nfe[1]} backward"
        yield Result(f"{name} over its network calls", sizes, a, b, a / b, LIMIT)


def solver_calls(posterior: object) -> tuple[int, int]:
    """Forward and backward calls for each particle, as integers."""
    nfe = posterior.nfe  # type: ignore[attr-defined]
    return round(nfe.forward), round(nfe.backward)


MEMORY_SCRIPT = """
import json, warnings
import torch
from invflow.bench import fresh_vfm, peak_memory
from invflow.bench_particles import MANY, FEW, box_likelihood
from invflow.solvers.fmtt import FMTT

warnings.simplefilter("ignore")
g = torch.Generator().manual_seed(0)
prior = fresh_vfm(torch.device("cpu"), g).prior
likelihood = box_likelihood(torch.device("cpu"), g)
solver = FMTT(prior, steps=2, schedule=lambda t: 0.5 + 0.5 * t, chunk_size=64)
solver.sample(likelihood, 2, generator=g)
before, peaks = peak_memory(), []
for count in (FEW, MANY):
    seconds = solver.sample(likelihood, count, generator=g).seconds
    peaks.append((peak_memory() - before) / 1e9)
print(json.dumps([*peaks, seconds]))
"""
FEW, MANY = 256, 1024


def bench_particle_memory(repeats: int, device: torch.device, generator: torch.Generator) -> Iterator[Result]:
    """Peak memory of FMTT beyond the network, with four times as many particles in chunks, relative to fewer."""
    if device.type == "cuda":
        prior, likelihood, peaks = fresh_vfm(device, generator).prior, box_likelihood(device, generator), []
        solver = FMTT(prior, steps=2, schedule=lambda t: 0.5 + 0.5 * t, chunk_size=64)
        for count in (2, FEW, MANY):
            before = torch.cuda.memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
            seconds = solver.sample(likelihood, count, generator=generator).seconds
            peaks.append((torch.cuda.max_memory_allocated(device) - before) / 1e9)
        few, many = peaks[1:]
    elif sys.platform == "win32":
        return  # the peak memory of a process would need further packages
    else:
        out = subprocess.run([sys.executable, "-c", MEMORY_SCRIPT], capture_output=True, text=True, check=True)
        few, many, seconds = json.loads(out.stdout.splitlines()[-1])
    sizes = f"B=1, N={MANY} over N={FEW}, chunks of 64, {many:.3f} GB"
    yield Result("FMTT, memory of many particles over few", sizes, seconds, float("nan"), many / few, 1.5)
