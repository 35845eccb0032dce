"""The table of solvers on the six image problems: ``python -m benchmarks.tables.compare_table OUTPUT``.

One command, resumed by the same command; on two processes: ``torchrun --nproc_per_node 2 -m
benchmarks.tables.compare_table OUTPUT``. It reads the first test images, once, in their order. Samplers of the field
run with the settings that :mod:`benchmarks.release.tune_samplers` chose on validation images, at 100 calls a sample.
Solvers with weights draw more particles than they return, which are resampled by their weights; their calls are counted
for the samples returned.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import invflow
from benchmarks.release.tune_samplers import CANDIDATES, steps_of, tuned_settings
from benchmarks.tables.image_table import TASKS
from invflow.evaluation.comparison import Comparison
from invflow.evaluation.results.text import with_error
from invflow.posterior import NFE, Posterior
from invflow.problem import Problem
from invflow.registry import solver_by_name
from invflow.reward import Reward
from invflow.solver import Solver

__all__ = ["COLUMNS", "Particles", "main", "overview", "solvers"]

#: metrics of the table
COLUMNS = ["crps", "coverage", "psnr", "frechet", "residual", "spread"]


class Particles(Solver):
    """A weighted solver that draws more particles than it returns.

    Args:
        solver: whose posteriors carry weights.
        count: particles for each observation.
    """

    def __init__(self, solver: Solver, count: int) -> None:
        self.solver, self.count = solver, count
        self.prior = getattr(solver, "prior", None)

    def sample(self, reward: Reward, num_samples: int, *, generator: torch.Generator | int | None = None,
               progress: bool = False) -> Posterior:
        """Draw ``count`` particles and resample them to ``num_samples`` by their weights."""
        count = max(self.count, num_samples)
        drawn = self.solver.sample(reward, count, generator=generator, progress=progress)
        kept = drawn.resample(num_samples, generator=generator)
        scale = count / num_samples
        kept.nfe = NFE(drawn.nfe.forward * scale, drawn.nfe.backward * scale)
        kept.diagnostics = {key: drawn.diagnostics[key] for key in ("k_hat",) if key in drawn.diagnostics}
        return kept

    def prior_samples(self, n: int, *, generator: torch.Generator | int | None = None) -> Tensor:
        """Of the solver."""
        return self.solver.prior_samples(n, generator=generator)

    def settings(self) -> dict[str, Any]:
        """Of the solver, with the number of particles."""
        own: Any = getattr(self.solver, "settings", dict)
        return {**own(), "particles": self.count}


@dataclasses.dataclass(frozen=True)
class Budget:
    """What the table spends.

    Attributes:
        steps: calls for each sample of the field's samplers and of FMTT with conjugate proposals; of those guided by
            gradients, forward and backward together.
        tilting_steps: of FMTT.
        particles: of FMTT and twisted diffusion.
        proposals: of the importance-corrected VFM.
    """

    steps: int = 100
    tilting_steps: int = 50
    particles: int = 32
    proposals: int = 1000


def solvers(budget: Budget) -> dict[str, Callable[[Problem], Solver]]:
    """All solvers of the table by their names in it, as functions of a problem."""

    def named(name: str, **settings: Any) -> Callable[[Problem], Solver]:
        return lambda problem: solver_by_name(name, problem, **settings)

    def tuned(name: str) -> Callable[[Problem], Solver]:
        def build(problem: Problem) -> Solver:
            chosen = tuned_settings(problem.name, name)
            steps = steps_of(name, budget.steps, chosen)
            solver = solver_by_name(name, problem, **chosen, **steps)
            return Particles(solver, budget.particles) if name == "tds" else solver

        return build

    def weighted(name: str, count: int, **settings: Any) -> Callable[[Problem], Solver]:
        return lambda problem: Particles(solver_by_name(name, problem, **settings), count)

    return {
        "VFM, 1 step": named("vfm", steps=1),
        "VFM, 4 steps": named("vfm", steps=4),
        "VFM, corrected": weighted("vfm", budget.proposals, importance=True),
        # from draws that explain the measurement: tempered from the prior, 32 particles descend from three
        "NoiseSMC": named("noise-smc", start="rto"),
        "FMTT": weighted("fmtt", budget.particles, steps=budget.tilting_steps),
        # what docs/solvers/fmtt.md recommends for sharp measurements: unweighted, hence approximate
        "FMTT, conjugate": named("fmtt", steps=budget.steps, kernel="ancestral", look_ahead="denoiser",
                                 proposal="conjugate", weights="none", time_grid="logit"),
        **{name: tuned(name) for name in CANDIDATES},
        "LMMSE": named("lmmse"),
    }


def overview(found: Comparison, metric: str = "crps", first: str = "VFM, 1 step") -> str:
    """Two tables in markdown that show all problems side by side.

    Solvers by problems, means with standard errors over observations, and what a sample costs: calls forward and
    backward and seconds, means over problems. Then, for each problem, the first solver minus the best of the field's
    and minus NoiseSMC, paired over observations.

    Args:
        found: a comparison on problems of one family, such as MNIST.
        metric: of single observations, low where it is good.
        first: the solver that differences are taken of.
    """
    titles = [problem.partition("/")[2] for problem in found.problems]
    lines = ["| solver | " + " | ".join(titles) + " | calls forward + backward | seconds a sample |",
             "|---" * (len(titles) + 3) + "|"]
    samples = found.settings["num_samples"]
    for solver in found.solvers:
        shown = []
        for problem in found.problems:
            known = metric in found.values[problem].get(solver, {})
            text = with_error(*found.mean(problem, solver, metric)) if known else ""
            shown.append(f"**{text}**" if known and solver == found.best(problem, metric) else text)
        costs = [found.costs[problem][solver] for problem in found.problems if solver in found.costs[problem]]
        forward, backward, seconds = (sum(float(c[key] or 0) for c in costs) / max(1, len(costs))
                                      for key in ("forward", "backward", "seconds"))
        lines.append(f"| {solver} | " + " | ".join(shown) + f" | {forward:.4g} + {backward:.4g} "
                     f"| {seconds / samples:.2g} |")
    lines += ["", f"| {first}, minus | " + " | ".join(titles) + " |", "|---" * (len(titles) + 1) + "|"]
    field = [name for name in found.solvers if name in CANDIDATES]
    # the lowest of several means is low by chance too
    rivals = {"the best of the field, picked on these observations": field, "NoiseSMC": ["NoiseSMC"]}
    for title, names in rivals.items():
        shown = []
        for problem in found.problems:
            having = [name for name in names if metric in found.values[problem].get(name, {})]
            if not having or metric not in found.values[problem].get(first, {}):
                shown.append("")
                continue
            _, best = min((found.mean(problem, name, metric)[0], name) for name in having)
            gap, error = found.difference(problem, first, metric, best)
            shown.append(f"{gap:+.4f} ± {error:.4f}" + (f" ({best})" if len(names) > 1 else ""))
        lines.append(f"| {title} | " + " | ".join(shown) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the comparison and print its tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path, help="folder for the results; a started one is gone on with")
    parser.add_argument("--data", default="mnist", choices=["mnist", "fashion-mnist"])
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--only", nargs="+", help="some of the solvers, by their names in the table")
    parser.add_argument("--observations", type=int, default=12)
    parser.add_argument("--samples", type=int, default=20, help="for each observation; 90%% intervals take 19")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--split", default="test", choices=["test", "validation"])
    parser.add_argument("--untuned", action="store_true", help="run samplers that were not tuned with their defaults")
    for field in dataclasses.fields(Budget):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=int, default=field.default)
    arguments = parser.parse_args()
    budget = Budget(**{field.name: getattr(arguments, field.name) for field in dataclasses.fields(Budget)})
    table = solvers(budget)
    if arguments.only:
        unknown = sorted(set(arguments.only) - set(table))
        if unknown:
            parser.error(f"there is no solver {unknown[0]!r}: choose from {', '.join(table)}")
        table = {name: table[name] for name in arguments.only}
    missing = [f"{name} on {arguments.data}/{task}" for name in CANDIDATES if name in table for task in arguments.tasks
               if not tuned_settings(f"{arguments.data}/{task}", name)]
    if missing and not arguments.untuned:
        parser.error(f"not tuned: {missing[0]}{f' and {len(missing) - 1} more' * (len(missing) > 1)}; run python -m "
                     "benchmarks.release.tune_samplers RUNS first, since a baseline at its defaults is no fair one, or "
                     "pass --untuned")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        found = invflow.compare([f"{arguments.data}/{task}" for task in arguments.tasks], table,
                                num_observations=arguments.observations, num_samples=arguments.samples,
                                seed=arguments.seed, output=arguments.output, split=arguments.split, part_size=4,
                                progress=True)
    if os.environ.get("RANK", "0") == "0":
        found.report(arguments.output / "report.html")
    print(found.to_markdown(COLUMNS) + "\n" + overview(found))


if __name__ == "__main__":
    main()
