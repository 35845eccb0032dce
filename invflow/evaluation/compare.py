"""``invflow.compare``: run solvers on the same observations, in parts that can be resumed and distributed."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from invflow._core.checks import host_memory
from invflow._core.explained import explained
from invflow._core.files import alone_in, check_writable
from invflow.evaluation.comparison import Comparison
from invflow.evaluation.measures import LEVEL
from invflow.evaluation.results.bench import Bench
from invflow.evaluation.results.description import describe
from invflow.evaluation.results.measure import check_timeout
from invflow.evaluation.results.parts import WAITING, Part, Stage, Task, plan, read_part, read_stages, write_part
from invflow.evaluation.results.results import gather
from invflow.problem import Problem, list_problems, load_problem
from invflow.registry import list_solvers
from invflow.solver import Solver

if TYPE_CHECKING:
    from invflow.evaluation.results.bench import SolverSource

__all__ = ["compare"]


@explained(like="invflow.compare('gaussian/linear', ['exact'])")
def compare(problems: Problem | str | Sequence[Problem | str],
            solvers: Mapping[str, SolverSource] | Sequence[str | Solver], *,
            num_observations: int = 32, num_samples: int = 64, seed: int = 0,
            output: str | os.PathLike[str] | None = None, split: str = "test", source: str = "data",
            part_size: int = 8, gallery: int = 4, device: str | torch.device | None = None,
            timeout: float | None = None, shard: tuple[int, int] | None = None,
            progress: bool = False) -> Comparison:
    """Compare solvers on problems: quality, calibration and cost.

    Every solver gets the same observations of a problem, and the same random numbers for second measurements and
    exact draws. With a folder, each part (a solver on ``part_size`` observations) is written when it is done,
    atomically. After an interruption, the same call resumes and gives the same table. A call with more observations
    or another solver computes only the new parts. A part is reused only if everything that determines its numbers has
    the same content: measurements and truths, operator and noise, prior, weights and settings of the solver, versions.
    If this cannot be determined, the part is computed again. Under ``torchrun`` the parts are distributed over the
    processes; ``shard`` distributes them over independent calls, such as the jobs of a cluster.

    Use test images only for this call, and choose settings with ``split="validation"``.

    Args:
        problems: One or several problems, or their names.
        solvers: Solvers by name. Each is a solver (used for all problems), a solver name for
            :func:`invflow.registry.solver_by_name`, or a function that builds a solver from a problem. A list
            may hold solver names, which are also the labels, and solvers, whose labels are the names of their
            classes. All others are compared with the first solver.
        num_observations: Number of observations of each problem: the first images of the split, or draws of the
            problem's law.
        num_samples: Number of samples for each observation.
        seed: Seed of observations and solvers.
        output: Folder for the parts, ``comparison.json``, ``table.csv``, ``observations.csv``, ``table.md`` and
            ``pareto.png``, locked by this run; None keeps everything in memory.
        split: Split of problems with images: ``"test"``, or ``"validation"`` for choosing settings.
        source: ``"data"``, or ``"prior"`` for truths drawn from the problem's prior.
        part_size: Number of observations per part. A resumed run does not repeat finished parts, and existing parts
            in the folder keep their size.
        gallery: Number of observations of each problem whose images are stored.
        device: Device of the solvers; None leaves them where they are.
        shard: ``(k, n)``, counted from 1: compute only the parts of the k-th of n shares. The result lists the parts
            that are still missing; a call without ``shard``, or the last share, combines all. The calls may run at
            the same time in one folder, or in several folders whose ``parts`` are copied into one afterwards: the
            numbers are the same.
        timeout: Time limit of a part in seconds; a part that exceeds it is stopped between two operations and fails.
        progress: Whether to show a progress bar.

    Returns:
        The comparison. If a solver cannot be built for a problem, raises any error, or returns the wrong
        number of samples, the reason is listed for the parts where it failed; the same call tries these again.

    Raises:
        ValueError: If a number is below 1, a name or split is unknown, the folder belongs to another comparison or is
            used by another run, there are several processes without a folder, or the timeout cannot be enforced.
        OSError: If the folder is not writable; this is checked before anything is computed.

    Example:
        >>> import invflow
        >>> problem = invflow.load_problem("gaussian/linear")
        >>> solvers = {"exact": "exact", "FMTT": lambda problem: invflow.FMTT(problem.prior, steps=10)}
        >>> comparison = invflow.compare(problem, solvers, num_observations=4, num_samples=32)
        >>> sorted(comparison.values["gaussian/linear"])
        ['FMTT', 'exact']
    """
    for name, number in (("num_observations", num_observations), ("num_samples", num_samples),
                         ("part_size", part_size)):
        if number < 1:
            raise ValueError(f"{name}={number}: compare takes at least 1")
    posed = _that_fit(_named_problems(problems), num_observations)
    sources = _named_solvers(solvers)
    check_timeout(timeout)
    process, processes = _place()
    folder = None if output is None else Path(output)
    if shard is not None and (processes > 1 or folder is None or not 1 <= shard[0] <= shard[1]):
        raise ValueError(f"shard={shard}: pass (k, n) with 1 <= k <= n and output='comparison', and no torchrun")
    if processes > 1 and folder is None:
        raise ValueError(f"{processes} processes share their results in a folder: pass output='comparison'")
    if processes > 1 and device is None:
        device = _own_gpu()
    with contextlib.ExitStack() as held:
        if folder is not None and process == 0 and shard is None:
            held.enter_context(alone_in(folder))  # one process holds the lock for the whole run
        elif folder is not None:
            check_writable(folder)
        stages = {name: _stages(problem, folder, num_observations, part_size, source, split)
                  for name, problem in posed.items()}
        settings = {"num_samples": num_samples, "seed": seed, "split": split, "source": source, "gallery": gallery,
                    "level": LEVEL}
        bench = Bench(posed, sources, settings, stages, None if device is None else torch.device(device), timeout)
        tasks = plan(stages, list(sources))
        place = (process, processes) if shard is None else (shard[0] - 1, shard[1])
        parts = _run(bench, tasks, folder, place, progress, waits=shard is None)
        comparison = gather(Comparison, parts, posed, {"num_observations": num_observations, **settings,
                                                       "part_size": part_size, "processes": processes},
                            {solver: bench.described(solver) for solver in sources})
        comparison.descriptions = {name: describe(problem, bench.first_reward(name)) for name, problem in posed.items()}
        if folder is not None and process == 0 and not comparison.waiting():
            if shard is not None:
                try:
                    held.enter_context(alone_in(folder))
                except ValueError:  # the last two shares finished together: the other one writes the same tables
                    return comparison
            comparison.save(folder)
    return comparison


def _stages(problem: Problem, folder: Path | None, observations: int, size: int, source: str,
            split: str) -> list[Stage]:
    if problem.has_images and source == "data" and split in ("test", "validation"):
        there = len(problem.images(split))
        if observations > there:
            raise ValueError(f"problem {problem.name!r} has {there} {split} images, but {observations} were requested: "
                             "request fewer, or any number of prior draws with source='prior'")
    return [Stage(0, observations, size)] if folder is None else read_stages(folder, problem.name, observations, size)


def _run(bench: Bench, tasks: list[Task], folder: Path | None, place: tuple[int, int], progress: bool, *,
         waits: bool = True) -> dict[Task, Part]:
    """Compute the missing parts that belong to this process, and read all parts."""
    process, processes = place
    done = set()
    if folder is not None:  # first check that all existing parts belong to this comparison
        for task in tasks:
            part = read_part(task.path(folder), bench.setup(task), tensors=False) if bench.identified(task) else None
            if part is not None and part.failure is None:
                done.add(task)
        if process == 0 and len(done) < len(tasks) and waits:
            Comparison.clear(folder)  # so that no tables of fewer parts remain
    # rotated over problems and solvers, so that no process gets all the expensive parts
    turns = {key: i for i, key in enumerate(dict.fromkeys((t.problem, t.solver) for t in tasks))}
    counts: dict[tuple[str, str], int] = {}
    own = []
    for task in tasks:
        key = (task.problem, task.solver)
        counts[key] = counts.get(key, -1) + 1
        if (counts[key] + turns[key]) % processes == process:
            own.append(task)
    parts: dict[Task, Part] = {}
    for task in _with_progress([task for task in own if task not in done], progress and (process == 0 or not waits)):
        part = bench.run(task)
        if folder is None:
            parts[task] = part
        else:
            write_part(part, task.path(folder), bench.setup(task))
    if processes > 1 and waits:
        _wait()
    if folder is not None:
        for task in tasks:
            found = read_part(task.path(folder), bench.setup(task))
            if found is None and not waits:
                found = Part(failure=WAITING)
            if found is None:
                raise ValueError(f"the part {task.path(folder)} has disappeared: run the same call again")
            parts[task] = found
    return parts


def _named_problems(problems: Problem | str | Sequence[Problem | str]) -> dict[str, Problem]:
    if isinstance(problems, Solver | Mapping) or (
            isinstance(problems, str) and problems not in list_problems() and problems in list_solvers()):
        raise TypeError(f"compare takes the problems first and then the solvers, not {problems!r:.60} first, as in "
                        "invflow.compare('gaussian/linear', ['exact'])")
    listed = [problems] if isinstance(problems, Problem | str) else list(problems)
    posed = [load_problem(p) if isinstance(p, str) else p for p in listed]
    named = {p.name: p for p in posed}
    if len(named) != len(posed) or not named:
        raise ValueError(f"problems {[p.name for p in posed]}: pass at least one, each once and under its own name")
    return named


def _that_fit(problems: dict[str, Problem], num_observations: int) -> dict[str, Problem]:
    """Check that the truths, which are all drawn at once, fit into memory, and return the problems."""
    for name, problem in problems.items():
        if 4 * num_observations * math.prod(problem.image_shape) > host_memory():
            raise MemoryError(f"{num_observations} observations of {name}, of {math.prod(problem.image_shape)} values "
                              "each, do not fit into memory: pass a smaller num_observations")
    return problems


def _named_solvers(solvers: Mapping[str, SolverSource] | Sequence[str | Solver]) -> dict[str, SolverSource]:
    if isinstance(solvers, str):
        raise ValueError(f"solvers={solvers!r}: pass a list of names, [{solvers!r}], or {{'label': solver}}")
    if isinstance(solvers, Solver):
        raise ValueError(f"solvers={solvers!r}: pass a list, [solver], or {{'label': solver}}")
    named: dict[str, Any] = dict(solvers) if isinstance(solvers, Mapping) else {
        source if isinstance(source, str) else type(source).__name__: source for source in solvers}
    if not named or (not isinstance(solvers, Mapping) and len(named) != len(solvers)):
        raise ValueError(f"solvers {list(solvers)}: pass at least one, each once, as {{'label': solver}}")
    for label, source in named.items():
        if isinstance(source, type) and source.__module__.startswith("invflow."):
            raise TypeError(f"solver {label!r} is the class {source.__name__}: pass an instance of it, or a function "
                            f"of a problem that builds one, lambda problem: invflow.{source.__name__}(problem.prior)")
        if not isinstance(source, Solver | str) and not callable(source):
            raise TypeError(f"solver {label!r} is a {type(source).__name__}: pass a solver, the name of one, or a "
                            "function of a problem that builds one")
    return named


# -- processes -----------------------------------------------------------------------------------------------------


def _place() -> tuple[int, int]:
    """Index of this process, and the number of processes."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return 0, 1  # without importing accelerate
    from accelerate import PartialState

    state = PartialState(cpu=not torch.cuda.is_available())
    return state.process_index, state.num_processes


def _own_gpu() -> torch.device | None:
    """The GPU of this process; None if there is none."""
    if not torch.cuda.is_available():
        return None
    from accelerate import PartialState

    result: torch.device | None = PartialState().device
    return result


def _wait() -> None:
    from accelerate import PartialState

    PartialState().wait_for_everyone()


def _with_progress(tasks: list[Task], shown: bool) -> Any:
    from tqdm import tqdm

    bar = tqdm(tasks, disable=not shown, desc="compare", unit="part", delay=2)
    for task in bar:
        bar.set_postfix_str(f"{task.problem}, {task.solver}")
        yield task
