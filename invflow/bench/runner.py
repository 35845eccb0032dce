"""Benchmarks that print ratios against a reference timed in the same run: ``invflow bench``."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from invflow._core.random import draw_noise
from invflow.bench.timing import MAP_NETWORK, SHAPE, Result, fresh_vfm, medians, training_problems
from invflow.flowmap import rows_at_a_time
from invflow.likelihood import GaussianLikelihood
from invflow.models.neural import NeuralFlowMap
from invflow.operator import Operator
from invflow.training import MeanFlowObjective, Objective, VFMObjective
from invflow.training.losses import meanflow_loss, normalise

__all__ = ["format_results", "run"]


def bench_sampling(repeats: int, device: torch.device, generator: torch.Generator) -> Iterator[Result]:
    """VFM.sample relative to its bare calls of adapter and map, in the same chunks."""
    vfm = fresh_vfm(device, generator)
    operator = training_problems()[2].operator.randomize(1, generator).to(device)
    images = torch.rand(1, *SHAPE, generator=generator).to(device)
    likelihood = GaussianLikelihood(operator, operator.measure(images, 0.025, generator=generator), sigma=0.025)
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

        def sample(n: int = n) -> None:
            with warnings.catch_warnings():  # an untrained map does not fit the measurement
                warnings.simplefilter("ignore")
                vfm.sample(likelihood, n, generator=generator)

        # single samples take a hundredth of a second: few repeats are too noisy
        a, b = medians(sample, bare, repeats if n > 1 else 10 * repeats, device)
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


def peak_memory() -> int:
    """Peak memory of this process in bytes, on Linux and macOS."""
    import resource

    status = Path("/proc/self/status")
    if status.exists():  # getrusage inherits the peak of the process that started this one
        return 1024 * int(next(x.split()[1] for x in status.read_text().splitlines() if x.startswith("VmHWM")))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


MEMORY_SCRIPT = """
import json
import torch
from invflow.bench.runner import peak_memory
from invflow.bench.timing import SHAPE, fresh_vfm, training_problems
from invflow.likelihood import GaussianLikelihood

g = torch.Generator().manual_seed(0)
vfm = fresh_vfm(torch.device("cpu"), g)
operator = training_problems()[2].operator.randomize(1, g)
y = operator.measure(torch.rand(1, *SHAPE, generator=g), 0.025, generator=g)
likelihood = GaussianLikelihood(operator, y, sigma=0.025)
vfm.sample(likelihood, 1, generator=g)
before = peak_memory()
posterior = vfm.sample(likelihood, 10_000, generator=g)
print(json.dumps([(peak_memory() - before) / 1e9, posterior.seconds]))
"""


def bench_memory(repeats: int, device: torch.device, generator: torch.Generator) -> Iterator[Result]:
    """Peak memory above the loaded network while drawing 10,000 samples, in a separate process."""
    sizes = "B=1, N=10,000, ratio in GB"
    if device.type == "cuda":
        vfm = fresh_vfm(device, generator)
        operator = training_problems()[2].operator.randomize(1, generator).to(device)
        y = operator.measure(torch.rand(1, *SHAPE, generator=generator).to(device), 0.025, generator=generator)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        seconds = vfm.sample(GaussianLikelihood(operator, y, sigma=0.025), 10_000, generator=generator).seconds
        peak = (torch.cuda.max_memory_allocated(device) - before) / 1e9
    elif sys.platform == "win32":
        return  # the peak memory of a process would need further packages
    else:
        # a peak never decreases, so this needs a fresh process
        out = subprocess.run([sys.executable, "-c", MEMORY_SCRIPT], capture_output=True, text=True, check=True)
        peak, seconds = json.loads(out.stdout.splitlines()[-1])
    yield Result("memory above the loaded network", sizes, seconds, float("nan"), peak, 1.0)


def bench_particles(repeats: int, device: torch.device, generator: torch.Generator) -> Iterator[Result]:
    """FMTT and NoiseSMC relative to their network calls, and the memory of many particles."""
    from invflow.bench import particles as particles  # which imports this module

    yield from particles.bench_particles(repeats, device, generator)
    yield from particles.bench_particle_memory(repeats, device, generator)


def bench_throughput(repeats: int, device: torch.device, generator: torch.Generator) -> Iterator[Result]:
    """Samples per second, share of the device's peak, and memory, in single precision and in bfloat16."""
    from invflow.bench import throughput as throughput  # which imports this module

    yield from throughput.bench_throughput(repeats, device, generator)


def bench_compiled(repeats: int, device: torch.device, generator: torch.Generator) -> Iterator[Result]:
    """Solvers with compiled networks relative to the same solvers without."""
    from invflow.bench import compiled as compiled  # which imports this module

    yield from compiled.bench_compiled(repeats, device, generator)


BENCHES = {"sampling": bench_sampling, "training": bench_training, "operators": bench_operators,
           "memory": bench_memory, "particles": bench_particles, "throughput": bench_throughput,
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


def as_json(results: list[Result]) -> str:
    """The results as JSON."""
    return json.dumps([asdict(r) | {"passed": r.passed} for r in results], indent=2)
