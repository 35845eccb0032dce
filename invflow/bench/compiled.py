"""Benchmark of compiled networks: solvers with compiled networks relative to the same solvers without."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial

import torch

from invflow.bench.particles import PARTICLES
from invflow.bench.timing import Result, box_likelihood, fresh_vfm, medians, sample_quietly
from invflow.models.compiled import compile_networks
from invflow.solver import Solver
from invflow.solvers.noise.tempered import NoiseSMC
from invflow.solvers.tilting.fmtt import FMTT
from invflow.solvers.vfm import VFM

__all__ = ["bench_compiled"]

#: compiled networks should at least not be slower; the gain depends on the machine
LIMIT = 1.10


def bench_compiled(repeats: int, device: torch.device, generator: torch.Generator) -> Iterator[Result]:
    """VFM, FMTT and NoiseSMC with compiled networks relative to the same solvers without, excluding compilation."""
    vfm = fresh_vfm(device, generator)
    other = copy.deepcopy(vfm)
    for module in (other.prior, other.adapter):
        compile_networks(module)
    likelihood = box_likelihood(device, generator)
    makers: dict[str, Callable[[VFM], Solver]] = {
        "VFM": lambda vfm: vfm,
        "FMTT": lambda vfm: FMTT(vfm.prior, steps=6),
        "NoiseSMC": lambda vfm: NoiseSMC(vfm.prior, moves="crank-nicolson-langevin", num_moves=4,
                                         temperatures=(0.5, 1.0)),
    }
    for name, make in makers.items():
        compiled, plain = (partial(sample_quietly, make(each), likelihood, PARTICLES, generator)
                           for each in (other, vfm))
        a, b = medians(compiled, plain, repeats, device)
        yield Result(f"{name}, compiled over as it is", f"B=1, N={PARTICLES}", a, b, a / b, LIMIT)
