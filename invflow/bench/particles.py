"""Benchmarks of particle solvers: time relative to their network calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from invflow._core.random import draw_noise
from invflow.bench.timing import SHAPE, Result, box_likelihood, fresh_vfm, medians, sample_quietly
from invflow.flowmap import FlowMap
from invflow.solver import Solver
from invflow.solvers.noise.tempered import NoiseSMC
from invflow.solvers.tilting.fmtt import FMTT

__all__ = ["bench_particles", "box_likelihood"]

PARTICLES = 64
LIMIT = 1.15


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
        run = partial(sample_quietly, solver, likelihood, PARTICLES, generator)
        nfe = run().nfe
        forward, backward = round(nfe.forward), round(nfe.backward)
        a, b = medians(run, _bare(prior, x, backward, forward - backward), repeats, device)
        sizes = f"B=1, N={PARTICLES}, {forward} calls forward and {backward} backward"
        yield Result(f"{name} over its network calls", sizes, a, b, a / b, LIMIT)
