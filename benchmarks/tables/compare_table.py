"""The table of solvers on the six image problems: ``python -m benchmarks.tables.compare_table OUTPUT --files MNIST``.

The same command resumes a stopped run. Cheap solvers come first; after each solver, the command prints the table of
finished solvers and writes it to ``overview.md``. ``--only`` selects solvers, in the same folder. With ``--files``, a
folder of MNIST's official files, the command reads test images that nobody has inspected
(:mod:`benchmarks.tables.fresh_images`); otherwise, it reads the shipped ones. Existing samplers use the settings that
:mod:`benchmarks.release.tune_samplers` chose on validation images, at 100 calls per sample. Solvers with weights draw
more particles than they return and resample them by their weights; their calls are counted per returned sample.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import invflow
from benchmarks.release.tune_samplers import CANDIDATES, steps_of, tuned_settings
from benchmarks.tables.compare_overview import overview
from benchmarks.tables.fresh_images import LISTED, digest, fresh_images, shuffled
from benchmarks.tables.image_table import TASKS
from invflow.evaluation.comparison import Comparison
from invflow.plugins import write_text
from invflow.posterior import NFE, Posterior
from invflow.problem import Problem, load_problem
from invflow.registry import solver_by_name
from invflow.reward import Reward
from invflow.solver import Solver

__all__ = ["COLUMNS", "Particles", "main", "run", "solvers"]

#: metrics of the tables that show all problems side by side, and of the table of each problem
SIDE_BY_SIDE = ["crps", "patch_energy", "block_crps", "coverage", "coverage_near_ink"]
COLUMNS = [*SIDE_BY_SIDE, "psnr", "frechet", "residual", "spread"]


class Particles(Solver):
    """A weighted solver that draws more particles than it returns.

    Args:
        solver: Solver whose posteriors have weights.
        count: Number of particles for each observation.
    """

    def __init__(self, solver: Solver, count: int) -> None:
        self.solver, self.count = solver, count
        self.prior = solver.prior

    def _sample(self, reward: Reward, n: int, generator: torch.Generator, progress: bool) -> Posterior:
        """Draw ``count`` particles and resample them to ``n`` by their weights."""
        count = max(self.count, n)
        drawn = self.solver.sample(reward, count, generator=generator, progress=progress)
        kept = drawn.resample(n, generator=generator)
        kept.nfe = NFE(drawn.nfe.forward * count / n, drawn.nfe.backward * count / n)
        kept.diagnostics = {key: drawn.diagnostics[key] for key in ("k_hat",) if key in drawn.diagnostics}
        return kept

    def prior_samples(self, n: int, *, generator: torch.Generator | int | None = None) -> Tensor:
        """Same as in the solver."""
        return self.solver.prior_samples(n, generator=generator)

    def settings(self) -> dict[str, Any]:
        """Same as in the solver, with the number of particles."""
        own: Any = getattr(self.solver, "settings", dict)
        return {**own(), "particles": self.count}


@dataclasses.dataclass(frozen=True)
class Budget:
    """Budgets of the table.

    Attributes:
        steps: Calls per sample of the existing samplers and of FMTT with conjugate proposals; for samplers guided by
            gradients, forward and backward calls together.
        tilting_steps: Number of steps of FMTT.
        particles: Number of particles of FMTT and twisted diffusion.
        proposals: Number of proposals of the VFM with importance weights.
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

    return {  # cheap solvers first
        "LMMSE": named("lmmse"),
        "VFM, 1 step": named("vfm", steps=1),
        "VFM, 4 steps": named("vfm", steps=4),
        "VFM, corrected": weighted("vfm", budget.proposals, importance=True),
        **{name: tuned(name) for name in CANDIDATES if name != "tds"},
        # as recommended in docs/solvers/fmtt.md for sharp measurements: unweighted, hence approximate
        "FMTT, conjugate": named("fmtt", steps=budget.steps, kernel="ancestral", look_ahead="denoiser",
                                 proposal="conjugate", weights="none", time_grid="logit"),
        "tds": tuned("tds"),
        "FMTT": weighted("fmtt", budget.particles, steps=budget.tilting_steps),
        # start from draws that fit the measurement: after tempering from the prior, 32 particles descend from three
        "NoiseSMC": named("noise-smc", start="rto"),
    }


def posed(data: str, tasks: list[str], files: Path | None, count: int, listed: Path = LISTED) -> list[Problem]:
    """The problems, with the listed images instead of the shipped ones if a folder of files is given."""
    problems = [load_problem(f"{data}/{task}") for task in tasks]
    if files is None:
        return problems
    images = fresh_images(files, count, listed)
    return [problem.with_images(images) for problem in problems]


def run(problems: list[Problem], table: dict[str, Callable[[Problem], Solver]], output: Path, *, observations: int,
        samples: int, seed: int = 0, split: str = "test", part_size: int = 4,
        say: Callable[[str], None] = print) -> Comparison:
    """Compare solver by solver, and show the table of the finished solvers after each.

    Args:
        problems: Problems to solve.
        table: Solvers by name, in order.
        output: Folder for the parts. A part is one solver on ``part_size`` observations of a problem; an existing part
            is not computed again, even if another run wrote it.
        observations, samples, seed, split, part_size: Same as in :func:`invflow.compare`.
        say: Function that prints.

    Returns:
        The comparison of all solvers.
    """
    done: dict[str, Callable[[Problem], Solver]] = {}
    for name, source in table.items():
        done[name], start = source, time.process_time()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            found = invflow.compare(problems, done, num_observations=observations, num_samples=samples, seed=seed,
                                    output=output, split=split, part_size=part_size, progress=True)
        write_text(output / "overview.md", f"{found.to_markdown(COLUMNS)}\n\n{overview(found, SIDE_BY_SIDE)}")
        say(f"{overview(found)}\n{name}: {time.process_time() - start:.0f} s of CPU time\n")
    return found


def main(argv: list[str] | None = None) -> None:
    """Run the comparison and print its tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path, help="folder for the results; an unfinished one is resumed")
    parser.add_argument("--files", type=Path, help="folder of MNIST's official files, for images that are not shipped")
    parser.add_argument("--images", type=Path, default=LISTED, help="file with digests of the images that may be read")
    parser.add_argument("--list", type=int, metavar="N", help="write the digests of N images, and exit")
    parser.add_argument("--data", default="mnist", choices=["mnist", "fashion-mnist"])
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--only", nargs="+", help="names of the solvers to run, as in the table")
    parser.add_argument("--observations", type=int, default=32)
    parser.add_argument("--samples", type=int, default=20, help="samples for each observation; 90%% intervals need 19")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--split", default="test", choices=["test", "validation"])
    parser.add_argument("--untuned", action="store_true", help="run untuned samplers with their defaults")
    for field in dataclasses.fields(Budget):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=int, default=field.default)
    arguments = parser.parse_args(argv)
    if arguments.list is not None:
        lines = "".join(f"{digest(image)}\n" for image in shuffled(arguments.files)[:arguments.list])
        arguments.images.write_text(lines, encoding="utf-8")
        return
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
        parser.error(f"not tuned: {missing[0]}{f' and {len(missing) - 1} more' * (len(missing) > 1)}. Untuned "
                     "baselines make an unfair comparison: run python -m benchmarks.release.tune_samplers RUNS first, "
                     "or pass --untuned")
    if arguments.files is not None and arguments.data != "mnist":
        parser.error("--files works only for MNIST, whose test images are listed: leave it out")
    problems = posed(arguments.data, arguments.tasks, arguments.files, arguments.observations, arguments.images)
    found = run(problems, table, arguments.output, observations=arguments.observations, samples=arguments.samples,
                seed=arguments.seed, split=arguments.split)
    found.report(arguments.output / "report.html")
    print((arguments.output / "overview.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
