"""Benchmarks that print ratios against a reference timed in the same run: ``invflow bench``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from invflow._core.random import draw_noise
from invflow.bench.compiled import bench_compiled
from invflow.bench.memory import bench_memory, bench_particle_memory
from invflow.bench.particles import bench_particles
from invflow.bench.throughput import bench_throughput
from invflow.bench.timing import (
    MAP_NETWORK,
    SHAPE,
    Result,
    box_likelihood,
    fresh_vfm,
    medians,
    sample_quietly,
    training_problems,
)
from invflow.flowmap import rows_at_a_time
from invflow.models.neural import NeuralFlowMap
from invflow.operator import Operator
from invflow.training import MeanFlowObjective, Objective, VFMObjective
from invflow.training.losses import meanflow_loss, normalise

__all__ = ["format_results", "run"]


def bench_sampling(repeats: int, device: torch.device, generator: torch.Generator) -> Iterator[Result]:
    """VFM.sample relative to its bare calls of adapter and map, in the same chunks."""
    vfm = fresh_vfm(device, generator)
    likelihood = box_likelihood(device, generator)
    operator = likelihood.operator
    observed, summary = operator.context()
    classes = torch.tensor([vfm.adapter.class_index(likelihood)], device=device)
    embedded, sigma = operator.embed(likelihood.y), torch.full((1,), 0.025, device=device)
    rows = rows_at_a_time(vfm.chunk_size, vfm.prior)
    for n in (1024, 1):
        noise = draw_noise((n, *SHAPE), generator).to(device)

        @torch.no_grad()
        def bare(noise: Tensor = noise) -> None:
            vfm.adapter(embedded, observed, summary, classes, sigma)
            for chunk in noise.split(rows):
                vfm.prior.jump(chunk, 0.0, 1.0)

        # single samples take a hundredth of a second: few repeats are too noisy
        a, b = medians(partial(sample_quietly, vfm, likelihood, n, generator), bare,
                       repeats if n > 1 else 10 * repeats, device)
        yield Result("VFM.sample over its network calls", f"B=1, N={n}, chunks of {rows}", a, b, a / b, 1.10)


class FlowMatching(Objective):
    """Plain flow matching, the reference for the training steps."""

    def __init__(self, prior: NeuralFlowMap) -> None:
        super().__init__()
        self.prior = prior

    def forward(self, data: Tensor, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of a batch of images."""
        states = self.prior.encode(data)
        noise = draw_noise(tuple(states.shape), generator).to(states)
        t = torch.rand(len(states), generator=generator, device=generator.device).to(states.device)
        return normalise(meanflow_loss(self.prior.average_velocity, noise, states, t, t, 0).mean()), {}


def bench_training(repeats: int, device: torch.device, generator: torch.Generator) -> Iterator[Result]:
    """A MeanFlow step and a joint VFM step relative to a plain flow-matching step."""
    batch = 96
    images = torch.rand(batch, *SHAPE, generator=generator).to(device)

    def stepper(objective: Objective) -> Callable[[], None]:
        parameters = [p for p in objective.parameters() if p.requires_grad]
        optimiser = torch.optim.AdamW(parameters)

        def step() -> None:
            with torch.autocast(device.type, torch.bfloat16):
                loss, _ = objective(images, generator)
            loss.backward()
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)

        return step

    def prior() -> NeuralFlowMap:
        return NeuralFlowMap(SHAPE, options=MAP_NETWORK, generator=generator).to(device)

    reference = stepper(FlowMatching(prior()))
    a, b = medians(stepper(MeanFlowObjective(prior())), reference, repeats, device)
    sizes = f"batch {batch}, bf16, half the rows with s < t"
    yield Result("MeanFlow step over flow-matching step", sizes, a, b, a / b, 2.0)
    vfm = fresh_vfm(device, generator)
    joint = VFMObjective(vfm.prior.train(), vfm.adapter.train(), training_problems())
    a, b = medians(stepper(joint), reference, repeats, device)
    yield Result("joint VFM step over flow-matching step", sizes + ", six problems", a, b, a / b, 4.0)


def bench_operators(repeats: int, device: torch.device, generator: torch.Generator) -> Iterator[Result]:
    """A loop of 64 random operators relative to one batch of 64, excluding the draw of their parameters."""
    images = torch.rand(64, *SHAPE, generator=generator).to(device)
    for problem in training_problems():
        batched = problem.operator.randomize(64, generator).to(device)
        if batched.num_sets == 1:
            continue
        singles: list[Operator] = [batched.select([i]) for i in range(64)]

        def loop(singles: list[Operator] = singles) -> None:
            for i, single in enumerate(singles):
                single.adjoint(single(images[i : i + 1]))

        def together(batched: Operator = batched) -> None:
            batched.adjoint(batched(images))

        a, b = medians(loop, together, repeats, device)
        name = type(problem.operator).__name__
        yield Result(f"loop of 64 {name} over one batch", "64 forward and adjoint, 28 x 28", a, b, a / b, 5.0, True)


def _particles(repeats: int, device: torch.device, generator: torch.Generator) -> Iterator[Result]:
    yield from bench_particles(repeats, device, generator)
    yield from bench_particle_memory(repeats, device, generator)


BENCHES = {"sampling": bench_sampling, "training": bench_training, "operators": bench_operators,
           "memory": bench_memory, "particles": _particles, "throughput": bench_throughput,
           "compiled": bench_compiled}


def run(repeats: int = 20, device: str = "cpu", only: list[str] | None = None, seed: int = 0,
        progress: bool = True) -> list[Result]:
    """Run the benchmarks.

    Args:
        repeats: Number of timings for each median.
        device: Device to run on.
        only: Names among :data:`BENCHES`; None runs all. On a CPU it then skips compilation, which takes minutes there
            and gains little.
        seed: Random seed.
        progress: Whether to show a progress bar.

    Returns:
        One result for each comparison.

    Raises:
        ValueError: For an unknown name.
    """
    from tqdm import tqdm

    unknown = sorted(set(only or ()) - set(BENCHES))
    if unknown:
        raise ValueError(f"unknown benchmark {', '.join(unknown)}: choose from {', '.join(BENCHES)}")
    generator = torch.Generator().manual_seed(seed)
    results: list[Result] = []
    names = only or [name for name in BENCHES if name != "compiled" or device.startswith("cuda")]
    with tqdm(names, disable=not progress, desc="bench") as bar:
        for name in bar:
            bar.set_postfix_str(name)
            results.extend(BENCHES[name](repeats, torch.device(device), generator))
    return results


def format_results(results: list[Result], device: str = "cpu") -> str:
    """Table of results, with the machine and the versions."""
    where = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    lines = [f"torch {torch.__version__}, {where}, medians", ""]
    lines.append(f"{'':44s} {'seconds':>9s} {'reference':>9s} {'ratio':>7s} {'limit':>8s}  sizes")
    for r in results:
        sign = ">=" if r.at_least else "<="
        lines.append(f"{r.name:44s} {r.seconds:9.4f} {r.reference:9.4f} {r.ratio:7.2f} {sign}{r.limit:5.2f} "
                     f"{'' if r.passed else 'FAILS '} {r.sizes}")
        if r.details:
            lines.append("    " + ", ".join(f"{key} {value:.4g}" for key, value in r.details.items()))
    return "\n".join(lines)
