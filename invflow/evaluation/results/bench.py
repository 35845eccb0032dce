"""Runs the parts of a comparison: builds observations and solvers, identifies their content, computes results."""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from invflow._core.identity import identity
from invflow._core.records import code_versions
from invflow._core.weighted import least_samples
from invflow.evaluation.measures import LEVEL, features_of, measure
from invflow.evaluation.results.checks import Checks
from invflow.evaluation.results.measure import PeakMemory, time_limit
from invflow.evaluation.results.parts import Part, Stage, Task, derive_seed
from invflow.flowmap import FlowMap
from invflow.likelihood import Likelihood
from invflow.problem import Problem
from invflow.solver import Solver, plain

if TYPE_CHECKING:
    from invflow.posterior import Posterior
    from invflow.reward import Reward

    SolverSource: TypeAlias = Solver | str | Callable[[Problem], Solver]

__all__ = ["Bench"]

#: number of samples per observation stored for a gallery
_GALLERY_SAMPLES = 8


@dataclass
class Bench:
    """Builds observations and solvers when they are first needed, and runs tasks.

    Attributes:
        problems, sources: Problems and the sources of solvers, by name.
        settings: ``num_samples``, ``seed``, ``split``, ``source``, ``gallery`` and ``level``.
        stages: For each problem, the groups of observations that are simulated together.
        device: Device of the solvers; None leaves them where they are.
        timeout: Time limit of a part in seconds.
    """

    problems: Mapping[str, Problem]
    sources: Mapping[str, SolverSource]
    settings: Mapping[str, Any]
    stages: Mapping[str, Sequence[Stage]]
    device: torch.device | None = None
    timeout: float | None = None
    _simulated: dict[tuple[str, Stage], tuple[Tensor | None, Any]] = field(default_factory=dict)
    _built: dict[tuple[str, str], Solver | str] = field(default_factory=dict)
    _described: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)
    _contents: dict[tuple[str, ...], str | None] = field(default_factory=dict)
    _checks: dict[str, Checks | None] = field(default_factory=dict)

    # -- the setup of a part -----------------------------------------------------------------------------------------

    def setup(self, task: Task) -> dict[str, Any]:
        """Everything that determines the numbers of a part; a file with another setup is not reused.

        Names and settings are for readers. Everything else is in three digests: of the
        solver, of the observations with their truths, and of the exact solver and quantities that judge them.
        """
        stage = self._stage(task)
        return {**self.settings, "problem": task.problem, "label": task.solver, "start": task.start, "stop": task.stop,
                "stage": list(stage), "solver": self._describe(task), "versions": code_versions(),
                "content of the observations": self._content(
                    ("observations", task.problem, str(task.start)), partial(self._rows, task)),
                "content of the problem": self._content(("problem", task.problem), partial(self._judged_by, task)),
                "content of the solver": self._content(("solver", task.problem, task.solver),
                                                       partial(self._solver, task))}

    def identified(self, task: Task) -> bool:
        """Whether everything that determines a part could be identified."""
        setup = self.setup(task)
        return all(setup[key] is not None for key in setup if key.startswith("content"))

    def described(self, solver: str) -> dict[str, Any]:
        """Settings of a solver, by problem if they differ."""
        found = {problem: self._describe(Task(problem, solver, 0, 1)) for problem in self.problems}
        first = next(iter(found.values()))
        return first if all(value == first for value in found.values()) else found

    def _describe(self, task: Task) -> dict[str, Any]:
        key = (task.problem, task.solver)
        if key not in self._described:
            solver = self._solver(task)
            if isinstance(solver, str):
                return {"failure": solver}
            self._described[key] = plain(solver.settings())
        return self._described[key]

    def _content(self, key: tuple[str, ...], make: Callable[[], Any]) -> str | None:
        """The digest of the result of a function; None if it cannot be identified."""
        if key not in self._contents:
            value = make()
            try:
                self._contents[key] = identity(value)
            except Exception as error:  # including any error in a user's fingerprint()
                warnings.warn(f"the {' '.join(key)} cannot be identified ({error}): results that depend on it are "
                              "computed again by each call", stacklevel=2)
                self._contents[key] = None
        return self._contents[key]

    def _judged_by(self, task: Task) -> Any:
        """What scores depend on in addition to the observations: an exact solver, if there is one, and quantities."""
        problem = self.problems[task.problem]
        try:
            exact: Solver | None = problem.exact_posterior()
        except (TypeError, ValueError):
            exact = None
        return [exact, dict(problem.quantities), problem.prior_name]

    # -- observations and solvers --------------------------------------------------------------------------------------

    def _stage(self, task: Task) -> Stage:
        return next(s for s in self.stages[task.problem] if s.start <= task.start < s.stop)

    def _rows(self, task: Task) -> tuple[Tensor | None, Any]:
        """Truths and reward of a task."""
        stage = self._stage(task)
        truth, reward = self._observations(task.problem, stage)
        rows = slice(task.start - stage.start, task.stop - stage.start)
        return None if truth is None else truth[rows], reward.select(rows)

    def first_reward(self, name: str) -> Any:
        """The reward of the first observations of a problem."""
        return self._observations(name, self.stages[name][0])[1]

    def _observations(self, name: str, stage: Stage) -> tuple[Tensor | None, Any]:
        if (name, stage) not in self._simulated:
            s, problem = self.settings, self.problems[name]
            # a comparison that is never extended has only the first stage
            purpose = ("observations",) if stage.start == 0 else ("observations", stage.start)
            generator = torch.Generator().manual_seed(derive_seed(s["seed"], name, *purpose))
            shared: dict[str, Any] = {"shuffle": False} if s["source"] == "data" else {}
            if problem.has_images and stage.start > 0:
                problem = copy.copy(problem)
                images = self.problems[name].images
                problem._images = lambda split: images(split)[stage.start:]
            self._simulated[name, stage] = problem.simulate(
                stage.stop - stage.start, generator=generator, source=s["source"], split=s["split"], **shared)
        return self._simulated[name, stage]

    def _solver(self, task: Task) -> Solver | str:
        """The solver, or the reason why it cannot be built for this problem."""
        key = (task.problem, task.solver)
        if key not in self._built:
            from invflow.registry import solver_by_name

            source, problem = self.sources[task.solver], self.problems[task.problem]
            try:
                if isinstance(source, str):
                    found = solver_by_name(source, problem)
                else:
                    found = source if isinstance(source, Solver) else source(problem)
                if not isinstance(found, Solver):
                    raise TypeError(f"the function for {task.solver!r} returned a {type(found).__name__}, not a Solver")
                if self.device is not None:
                    found.to(self.device)
                self._built[key] = found
            except (Exception, SystemExit) as error:  # the constructor of a third party may raise anything
                if isinstance(source, str) and "there is no solver" in str(error):
                    raise
                self._built[key] = "cannot be built: " + _reason(error)
        return self._built[key]

    # -- one part ------------------------------------------------------------------------------------------------------

    def run(self, task: Task) -> Part:
        """Solve and score; any error becomes the part's failure."""
        seed = derive_seed(self.settings["seed"], task.problem, task.start, "solver")
        solver = self._solver(task)
        if isinstance(solver, str):
            return Part(seed=seed, failure=solver)
        truth, reward = self._rows(task)
        try:
            with time_limit(self.timeout):
                return self._run(task, solver, seed, truth, reward)
        except (Exception, SystemExit) as error:  # no error of one solver may affect the others
            return Part(seed=seed, failure=_reason(error))

    def _run(self, task: Task, solver: Solver, seed: int, truth: Tensor | None, reward: Any) -> Part:
        problem, count = self.problems[task.problem], self.settings["num_samples"]
        place = solver.prior.device if isinstance(solver.prior, FlowMap) else torch.device("cpu")
        memory = PeakMemory(place)
        start = time.perf_counter()
        with solver.counting() as cost:  # the sample method of a third party may not report its calls
            posterior = solver.sample(reward.to(place), count, generator=torch.Generator().manual_seed(seed))
        seconds = time.perf_counter() - start
        used = memory.read()
        expected = (task.stop - task.start, count, *problem.image_shape)
        if tuple(posterior.samples.shape) != expected:
            raise ValueError(f"it returned samples {tuple(posterior.samples.shape)}, not {expected}, (observations, "
                             "samples, *image_shape)")
        generator = torch.Generator().manual_seed(derive_seed(self.settings["seed"], task.problem, task.start, "judge"))
        reward = reward.to(posterior.samples.device)
        columns = {key: value.tolist() for key, value in measure(
            posterior, reward, truth, problem=problem, generator=generator).items()}
        nfe = cost(posterior.nfe, math.prod(expected[:2]))
        costs = {"forward": nfe.forward, "backward": nfe.backward, "seconds": seconds, "memory": used}
        tensors = {}
        features = features_of(posterior, problem, generator)
        if features is not None:
            tensors["features"] = features
        shown = min(self.settings["gallery"], task.stop) - task.start
        if shown > 0:
            tensors |= _gallery(posterior, reward, truth, shown, generator)
        checks = self._checks_of(task.problem)
        if checks is not None and truth is not None:
            tensors |= checks.ranks(posterior, truth, reward, task.start)
        return Part(columns, costs, tensors, seed)

    def _checks_of(self, name: str) -> Checks | None:
        if name not in self._checks:
            problem = self.problems[name]
            self._checks[name] = Checks(problem, self.settings["seed"]) if Checks.apply_to(problem) else None
        return self._checks[name]


def _reason(error: BaseException) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, (TypeError, ValueError, TimeoutError)) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


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
        effective = first.ess()  # with too few effective samples the interval is narrower than its level
        fewest = first.num_samples if effective is None else float(effective.min())
        if fewest >= least_samples(LEVEL) and not first.diagnostics.get("point_estimate", False):
            low, high = first.interval(LEVEL)
            kept["covered"] = (low <= kept["truth"]) & (kept["truth"] <= high)
    return kept
