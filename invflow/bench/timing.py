"""Timings as medians of alternated runs, and the shared networks and problems of the benchmarks."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from invflow.likelihood import GaussianLikelihood
from invflow.models.adapter import Adapter
from invflow.models.neural import NeuralFlowMap
from invflow.posterior import Posterior
from invflow.solver import Solver
from invflow.solvers.vfm import VFM
from invflow.training import TrainingProblem

__all__ = ["Result"]

SHAPE = (1, 28, 28)

MAP_NETWORK = {"channels": [32, 128], "blocks": 2}

ADAPTER_NETWORK = {"channels": [32, 96], "blocks": 2}


@dataclass
class Result:
    """One comparison.

    Attributes:
        name: What is compared.
        sizes: Batch and particle counts.
        seconds: Median time of the measured code.
        reference: Median time of the reference in the same run.
        ratio: Ratio of the two times; or, for memory, the peak in GB.
        limit: Upper limit of the ratio (or lower limit, if ``at_least``).
        at_least: Whether the ratio should be large.
        details: Further numbers by name, such as samples per second.
    """

    name: str
    sizes: str
    seconds: float
    reference: float
    ratio: float
    limit: float
    at_least: bool = False
    details: dict[str, float] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether the ratio respects its limit."""
        return self.ratio >= self.limit if self.at_least else self.ratio <= self.limit


def synchronise(device: torch.device) -> None:
    """Wait until a GPU has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def medians(first: Callable[[], object], second: Callable[[], object], repeats: int,
            device: torch.device) -> tuple[float, float]:
    """Median seconds of two functions, run alternately so that a noisy machine affects both equally."""
    def seconds(function: Callable[[], object]) -> float:
        synchronise(device)
        start = time.perf_counter()
        function()
        synchronise(device)
        return time.perf_counter() - start

    first(), second()  # the first calls select kernels and fill caches
    times = torch.tensor([(seconds(first), seconds(second)) for _ in range(repeats)])
    a, b = times.median(dim=0).values.tolist()
    return a, b


def fresh_vfm(device: torch.device, generator: torch.Generator) -> VFM:
    """A VFM of the shipped size with random weights: speed does not depend on their values."""
    prior = NeuralFlowMap(SHAPE, options=MAP_NETWORK, generator=generator)
    classes = [str(p.operator.problem_class) for p in training_problems()]
    adapter = Adapter(SHAPE, classes=classes, options=ADAPTER_NETWORK, generator=generator)
    return VFM(prior.to(device).eval(), adapter.to(device).eval())


def training_problems() -> list[TrainingProblem]:
    """The six problem classes of the shipped adapters."""
    from invflow import operators

    kinds = [operators.Denoising, operators.RandomInpainting, operators.BoxInpainting, operators.SuperResolution,
             operators.GaussianBlur, operators.MotionBlur]
    return [TrainingProblem(kind(SHAPE), (0.01, 0.2)) for kind in kinds]


def box_likelihood(device: torch.device, generator: torch.Generator) -> GaussianLikelihood:
    """A measurement of uniform noise behind a random box, at sigma 0.025."""
    operator = training_problems()[2].operator.randomize(1, generator).to(device)
    images = torch.rand(1, *SHAPE, generator=generator).to(device)
    return GaussianLikelihood(operator, operator.measure(images, 0.025, generator=generator), sigma=0.025)


def sample_quietly(solver: Solver, likelihood: GaussianLikelihood, count: int,
                   generator: torch.Generator) -> Posterior:
    """Samples without warnings: with random weights nothing converges, and nothing fits the measurement."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return solver.sample(likelihood, count, generator=generator)
