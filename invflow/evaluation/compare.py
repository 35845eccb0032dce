"""``invflow.compare``: solvers on the same observations of problems, in parts that can be resumed and shared out."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from invflow.evaluation.comparison import Comparison
from invflow.evaluation.results.parts import Part, Task, derive_seed, plan, read_part, write_part
from invflow.evaluation.results.results import gather
from invflow.evaluation.summary import LEVEL, features_of, judge
from invflow.likelihood import Likelihood
from invflow.problem import Problem, load_problem
from invflow.solver import Solver

if TYPE_CHECKING:
    from invflow.posterior import Posterior
    from invflow.reward import Reward

    SolverSource: TypeAlias = Solver | str | Callable[[Problem], Solver]

__all__ = ["compare"]

#: images of an observation that are kept for a gallery
_GALLERY_SAMPLES = 8


def compare(problems: Problem | str | Sequence[Problem | str],
            solvers: Mapping[str, SolverSource] | Sequence[str | Solver], *,
            num_observations: int = 32, num_samples: int = 64, seed: int = 0,
            output: str | os.PathLike[str] | None = None, split: str = "test", source: str = "data",
            part_size: int = 8, gallery: int = 4, device: str | torch.device | None = None,
            progress: bool = False) -> Comparison:
    """Compare solvers on problems: how good, how honest, at what cost.

    Every solver gets the same observations of a problem, and the same random numbers for second measurements and
    exact draws. With a folder, each part (a solver on ``part_size`` observations) is written as it is done, whole or
    not at all: the same call goes on where a killed one stopped, and gives the same table. Under ``torchrun``
    the parts are shared out over the processes.

    Test images are for this call and for nothing else: choose settings with ``split="validation"``.

    Args:
        problems: one or several, or their names.
        solvers: by name, each a solver (for all problems alike), the name of one that suits each problem, as
            :func:`invflow.registry.solver_by_name` takes it, or a function of a problem that builds one. A list
            holds names, which stand for themselves, and solvers, called by their classes. The
            first one is what the others are compared with.
        num_observations: of each problem; the first images of the split, or draws of the problem's law.
        num_samples: for each observation.
        seed: of observations and solvers.
        output: folder for the parts, ``comparison.json``, ``table.csv``, ``observations.csv``, ``table.md`` and
            ``pareto.png``; None keeps all in memory.
        split: of problems with images: ``"test"``, or ``"validation"`` for choosing settings.
        source: ``"data"``, or ``"prior"`` for truths drawn from the problem's prior.
        part_size: observations that a solver gets at a time, and that a resumed run does not repeat.
        gallery: observations of each problem whose images are kept.
        device: where solvers run; None leaves them where they are.
        progress: show a progress bar.

    Returns:
        The comparison. A solver that cannot take a problem, or fails on it, is listed with the reason.

    Raises:
        ValueError: for numbers under 1, an unknown name or split, a folder that belongs to another comparison, or
            several processes without a folder.

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
    posed = _named_problems(problems)
    sources = _named_solvers(solvers)
    process, processes = _place()
    folder = None if output is None else Path(output)
    if processes > 1 and folder is None:
        raise ValueError(f"{processes} processes share their results in a folder: pass output='comparison'")
    if processes > 1 and device is None:
        device = _own_gpu()
    bench = _Bench(posed, sources, {"num_observations": num_observations, "num_samples": num_samples, "seed": seed,
                                    "split": split, "source": source, "gallery": gallery, "level": LEVEL},
                   None if device is None else torch.device(device))
    tasks = plan(list(posed), list(sources), num_observations, part_size)
    parts: dict[Task, Part] = {}
    if folder is not None:  # before anything is computed: does all that is there belong to this comparison?
        for task in tasks:
            read_part(task.path(folder), bench.setup(task), tensors=False)
    # rotated from problem to problem and solver to solver, so that none has the dear ones alone
    turns = {key: i for i, key in enumerate((p, s) for p in posed for s in sources)}
    own = [t for t in tasks if (t.start // part_size + turns[t.problem, t.solver]) % processes == process]
    for task in _with_progress(own, progress and process == 0):
        part = None if folder is None else read_part(task.path(folder), bench.setup(task), tensors=False)
        if part is None:
            part = bench.run(task)
            if folder is not None:
                write_part(part, task.path(folder), bench.setup(task))
        if folder is None:
            parts[task] = part
    if processes > 1:
        _wait()
    if folder is not None:
        for task in tasks:
            found = read_part(task.path(folder))
            if found is None:
                raise ValueError(f"the part {task.path(folder)} has gone: run the same call once more")
            parts[task] = found
    comparison = gather(Comparison, parts, posed, {**bench.settings, "part_size": part_size, "processes": processes},
                        {solver: bench.described(solver) for solver in sources})
    if folder is not None and process == 0:
        comparison.save(folder)
    return comparison


def _named_problems(problems: Problem | str | Sequence[Problem | str]) -> dict[str, Problem]:
    listed = [problems] if isinstance(problems, Problem | str) else list(problems)
    posed = [load_problem(p) if isinstance(p, str) else p for p in listed]
    named = {p.name: p for p in posed}
    if len(named) != len(posed) or not named:
        raise ValueError(f"problems {[p.name for p in posed]}: pass at least one, each once and under its own name")
    return named


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
        if not isinstance(source, Solver | str) and not callable(source):
            raise TypeError(f"solver {label!r} is a {type(source).__name__}: pass a solver, the name of one, or a "
                            "function of a problem that builds one")
    return named


# -- processes -----------------------------------------------------------------------------------------------------


def _place() -> tuple[int, int]:
    """Number of this process, and of all of them."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return 0, 1  # without importing accelerate
    from accelerate import PartialState

    state = PartialState(cpu=not torch.cuda.is_available())
    return state.process_index, state.num_processes


def _own_gpu() -> torch.device | None:
    """The GPU of this process; None where there is none."""
    if not torch.cuda.is_available():
        return None
    from accelerate import PartialState

    return PartialState().device


def _wait() -> None:
    from accelerate import PartialState

    PartialState().wait_for_everyone()


def _with_progress(tasks: list[Task], shown: bool) -> Any:
    from tqdm import tqdm

    bar = tqdm(tasks, disable=not shown, desc="compare", unit="part", delay=2)
    for task in bar:
        bar.set_postfix_str(f"{task.problem}, {task.solver}")
        yield task


# -- one part ------------------------------------------------------------------------------------------------------


@dataclass
class _Bench:
    """Builds observations and solvers when they are first needed, and runs tasks."""

    problems: dict[str, Problem]
    sources: dict[str, Any]
    settings: dict[str, Any]
    device: torch.device | None
    _simulated: dict[str, tuple[Tensor | None, Any]] = field(default_factory=dict)
    _built: dict[tuple[str, str], Solver | str] = field(default_factory=dict)
    _identities: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)

    def setup(self, task: Task) -> dict[str, Any]:
        """What makes a part: a file of another setup is not taken for this one."""
        return {**self.settings, "problem": task.problem, "label": task.solver, "start": task.start, "stop": task.stop,
                "solver": self._identity(task)}

    def described(self, solver: str) -> dict[str, Any]:
        """Settings of a solver, by problem where they differ."""
        found = {problem: self._identity(Task(problem, solver, 0, 1)) for problem in self.problems}
        first = next(iter(found.values()))
        return first if all(value == first for value in found.values()) else found

    def run(self, task: Task) -> Part:
        """Solve and judge."""
        seed = derive_seed(self.settings["seed"], task.problem, task.start, "solver")
        solver = self._solver(task)
        if isinstance(solver, str):
            return Part(seed=seed, failure=solver)
        problem = self.problems[task.problem]
        truth, reward = self._observations(task.problem)
        rows = slice(task.start, task.stop)
        truth, reward = None if truth is None else truth[rows], reward.select(rows)
        prior = getattr(solver, "prior", None)
        place = prior.device if prior is not None else torch.device("cpu")
        memory = _PeakMemory(place)
        try:
            start = time.perf_counter()
            posterior = solver.sample(reward.to(place), self.settings["num_samples"],
                                      generator=torch.Generator().manual_seed(seed))
            seconds = time.perf_counter() - start
        except (TypeError, ValueError) as error:
            return Part(seed=seed, failure=" ".join(str(error).split()))
        used = memory.read()
        generator = torch.Generator().manual_seed(derive_seed(self.settings["seed"], task.problem, task.start, "judge"))
        reward = reward.to(posterior.samples.device)
        columns = {key: value.tolist() for key, value in judge(posterior, reward, truth, problem, generator).items()}
        costs = {"forward": posterior.nfe.forward, "backward": posterior.nfe.backward, "seconds": seconds,
                 "memory": used}
        tensors = {}
        features = features_of(posterior, problem, generator)
        if features is not None:
            tensors["features"] = features
        shown = min(self.settings["gallery"], self.settings["num_observations"]) - task.start
        if shown > 0:
            tensors |= _gallery(posterior, reward, truth, min(shown, task.stop - task.start), generator)
        return Part(columns, costs, tensors, seed)

    def _observations(self, problem: str) -> tuple[Tensor | None, Any]:
        if problem not in self._simulated:
            s = self.settings
            generator = torch.Generator().manual_seed(derive_seed(s["seed"], problem, "observations"))
            shared: dict[str, Any] = {"shuffle": False} if s["source"] == "data" else {}
            self._simulated[problem] = self.problems[problem].simulate(
                s["num_observations"], generator=generator, source=s["source"], split=s["split"], **shared)
        return self._simulated[problem]

    def _identity(self, task: Task) -> dict[str, Any]:
        """Settings and, of learned priors, what tells their weights."""
        key = (task.problem, task.solver)
        if key not in self._identities:
            solver = self._solver(task)
            if isinstance(solver, str):
                return {"failure": solver}
            settings = getattr(solver, "settings", None)
            found: dict[str, Any] = dict(settings()) if callable(settings) else {"solver": type(solver).__name__}
            fingerprint = getattr(getattr(solver, "prior", None), "fingerprint", None)
            if callable(fingerprint):
                found["prior"] = fingerprint()
            self._identities[key] = found
        return self._identities[key]

    def _solver(self, task: Task) -> Solver | str:
        """The solver, or the reason why there is none for this problem."""
        key = (task.problem, task.solver)
        if key not in self._built:
            from invflow.registry import solver_by_name

            source, problem = self.sources[task.solver], self.problems[task.problem]
            try:
                if isinstance(source, str):
                    source = solver_by_name(source, problem)
                elif not isinstance(source, Solver):
                    source = source(problem)
                if not isinstance(source, Solver):
                    raise TypeError(f"the function for {task.solver!r} made a {type(source).__name__}, not a Solver")
            except (TypeError, ValueError) as error:
                if isinstance(source, str) and "there is no solver" in str(error):
                    raise
                source = "cannot be built: " + " ".join(str(error).split())
            if self.device is not None and isinstance(source, Solver):
                from invflow.solver import move_solver

                move_solver(source, self.device)
            self._built[key] = source
        return self._built[key]


def _gallery(posterior: Posterior, reward: Reward, truth: Tensor | None, count: int,
             generator: torch.Generator) -> dict[str, Tensor]:
    """Images of the first observations."""
    first = posterior.select(slice(count))
    draws = first.resample(min(_GALLERY_SAMPLES, first.num_samples), generator=generator) if first.weighted else first
    kept = {"samples": draws.samples[:, :_GALLERY_SAMPLES], "mean": first.mean(),
            "std": first.std().nan_to_num(nan=0.0)}
    y = getattr(reward, "y", None)
    if isinstance(y, Tensor):
        kept["observation"] = y[:count]
        observed = reward.operator.observed() if isinstance(reward, Likelihood) else None
        if observed is not None:
            kept["observed"] = observed.expand(len(y), *y.shape[1:])[:count]
    if truth is not None:
        kept["truth"] = truth[:count].to(first.samples)
        if first.num_samples > 1 and not first.diagnostics.get("point_estimate", False):
            low, high = first.interval(LEVEL)
            kept["covered"] = (low <= kept["truth"]) & (kept["truth"] <= high)
    return kept


class _PeakMemory:
    """Peak memory of a span of code above what was in use when it began; None where the system does not tell."""

    def __init__(self, device: torch.device) -> None:
        self.device, self._before = device, None
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._before = torch.cuda.memory_allocated(device)
            return
        try:
            _give_back_freed_memory()
            Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to what is in use now
            self._before = _resident("VmRSS")
        except OSError:
            pass

    def read(self) -> float | None:
        """Bytes."""
        if self._before is None:
            return None
        peak = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else _resident("VmHWM")
        return float(max(0, peak - self._before))


def _give_back_freed_memory() -> None:
    """Ask the C library, so that what an earlier solver has freed does not hide what this one takes."""
    import ctypes

    with contextlib.suppress(OSError, AttributeError):  # of another C library: the peak is then a lower bound
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(name)))
