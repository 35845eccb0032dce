"""Benchmarks of throughput: samples per second, and the share of the device's peak used by the networks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import torch
from torch.utils.flop_counter import FlopCounterMode

from invflow._core.random import draw_noise
from invflow.bench.timing import SHAPE, Result, box_likelihood, fresh_vfm, medians, synchronise
from invflow.flowmap import rows_at_a_time

__all__ = ["bench_throughput", "flops_of", "matmul_rate"]

SAMPLES = 1024
LIMIT = 1.10
#: sides of the matrices whose fastest product defines the device's peak: on a CPU the largest do not fit its caches
SIDES = {"cuda": (2048, 4096, 8192), "cpu": (256, 512, 1024, 2048)}


def flops_of(function: Callable[[], object]) -> int:
    """Floating-point operations of the matrix products and convolutions in a call, counting two for each multiply-add.

    Example:
        >>> import torch
        >>> from invflow.bench.throughput import flops_of
        >>> flops_of(lambda: torch.ones(2, 3) @ torch.ones(3, 5))
        60
    """
    counter = FlopCounterMode(display=False)
    with counter:
        function()
    return int(counter.get_total_flops())


def matmul_rate(dtype: torch.dtype, device: torch.device, budget: float = 0.3) -> float:
    """Measured peak of the device: operations per second of the fastest matrix product of several sizes.

    Args:
        dtype: Dtype of the matrices.
        device: Device to measure.
        budget: Seconds for each size; the fastest of at least three products counts.
    """
    rates = []
    for side in SIDES.get(device.type, SIDES["cpu"]):
        a = torch.ones(side, side, dtype=dtype, device=device)
        times: list[float] = []
        while len(times) < 3 or sum(times) < budget:  # the first one selects a kernel
            synchronise(device)
            start = time.perf_counter()
            a @ a
            synchronise(device)
            times.append(time.perf_counter() - start)
        rates.append(2 * side**3 / min(times))
    return max(rates)


def bench_throughput(repeats: int, device: torch.device, generator: torch.Generator) -> Iterator[Result]:
    """VFM.sample in single precision and in bfloat16 autocast: samples per second, share of the peak, and memory.

    The peak is the fastest of several matrix products of the same dtype, timed in the same run; the share counts only
    the matrix products and convolutions of the networks, and is left out where it would exceed 1.
    """
    vfm = fresh_vfm(device, generator)
    likelihood = box_likelihood(device, generator)
    rows = rows_at_a_time(vfm.chunk_size, vfm.prior)
    noise = draw_noise((SAMPLES, *SHAPE), generator).to(device)

    def cast(dtype: torch.dtype) -> AbstractContextManager[object]:
        return torch.autocast(device.type, dtype, enabled=dtype is not torch.float32)

    for dtype in (torch.float32, torch.bfloat16):
        @torch.no_grad()
        def bare(dtype: torch.dtype = dtype) -> None:
            with cast(dtype):
                vfm.adapter.propose(likelihood)
                for chunk in noise.split(rows):
                    vfm.prior.jump(chunk, 0.0, 1.0)

        def sample(dtype: torch.dtype = dtype) -> None:
            with cast(dtype):
                vfm.sample(likelihood, SAMPLES, generator=generator)

        seconds, reference = medians(sample, bare, repeats, device)
        details = {"samples a second": SAMPLES / seconds}
        share = flops_of(bare) / reference / matmul_rate(dtype, device)
        if share <= 1:  # a rate that the networks exceed was no peak: a busy machine slowed the products down
            details["share of peak"] = share
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            sample()
            details["GB at most"] = torch.cuda.max_memory_allocated(device) / 1e9
        name = str(dtype).removeprefix("torch.")
        yield Result(f"VFM.sample, {name}", f"B=1, N={SAMPLES}, chunks of {rows}", seconds, reference,
                     seconds / reference, LIMIT, details=details)
