"""Results of a comparison: each solver on each problem, as tables with standard errors and paired differences."""

from __future__ import annotations

import csv
import io
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from invflow.evaluation.measures import METRICS
from invflow.evaluation.results.checks import RANKED, certificate_p
from invflow.evaluation.results.parts import WAITING, Part, Task, read_part, slug
from invflow.evaluation.summary import COLLAPSED, is_collapsed
from invflow.metrics import classifier_features, frechet_distance

if TYPE_CHECKING:
    from invflow.problem import Problem

__all__ = ["Results", "gather"]

R = TypeVar("R", bound="Results")

_COSTS = ("forward", "backward", "seconds", "memory")


@dataclass
class Results:
    """Numbers by problem, solver and observation. :class:`invflow.Comparison` adds text, figures and files.

    Attributes:
        values: Metrics of each observation, ``values[problem][solver][metric]``, a list of B numbers; NaN where the
            solver failed on that observation.
        sets: Metrics of all observations together, ``sets[problem][solver][metric]`` as (value, standard error): the
            Frechet distance, with a jackknife over observations, and the p-value of the certificate, without error.
        costs: ``costs[problem][solver]``: ``forward`` and ``backward`` calls for each sample, ``seconds`` for each
            observation with all its samples, ``memory`` in bytes, the largest of any part, or None.
        failures: ``failures[problem][solver]``, the reason why there is no result on any observation.
        settings: Numbers of observations and samples, seed, split and similar.
        solvers: Settings of each solver by name, in the given order.
        seeds: ``seeds[problem]``, for each observation the seed that the solvers used for its part.
        versions: Versions of the libraries used for the parts, separated by commas if there are several.
        folder: Folder of the parts, or None.
        missing: ``missing[problem][solver]`` for a solver that failed on some observations: ``"observations"``, their
            indices, and ``"reason"``. Its means are over the other observations, so they are not compared with the
            means of complete solvers, and it is never the best.
        descriptions: ``descriptions[problem]``, the problem in lines of text by name: operator, noise, prior,
            size of the measurement.
    """

    values: dict[str, dict[str, dict[str, list[float]]]]
    sets: dict[str, dict[str, dict[str, tuple[float, float]]]]
    costs: dict[str, dict[str, dict[str, float | None]]]
    failures: dict[str, dict[str, str]]
    settings: dict[str, Any]
    solvers: dict[str, Any]
    seeds: dict[str, list[int]]
    versions: dict[str, str]
    folder: Path | None = None
    _parts: dict[Task, Part] | None = None
    missing: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    descriptions: dict[str, dict[str, str]] = field(default_factory=dict)

    @property
    def problems(self) -> list[str]:
        """Names of the problems."""
        return list(self.values)

    def waiting(self) -> int:
        """Number of missing parts that belong to another shard; see ``shard`` of :func:`invflow.compare`."""
        return sum(part.failure == WAITING for part in (self._parts or {}).values())

    # -- numbers -----------------------------------------------------------------------------------------------------

    def metrics(self, problem: str) -> list[str]:
        """Metrics that at least one solver has on a problem, in the order of the table."""
        found = {name for table in (self.values, self.sets) for row in table[problem].values() for name in row}
        return [*(name for name in METRICS if name in found), *sorted(found - set(METRICS))]

    def mean(self, problem: str, solver: str, metric: str) -> tuple[float, float]:
        """Mean over observations and its standard error (NaN for a single observation).

        Raises:
            KeyError: If there is no such number.
        """
        if metric in self.sets[problem].get(solver, {}):
            return self.sets[problem][solver][metric]
        values = torch.tensor(self.values[problem][solver][metric], dtype=torch.float64)
        return _mean(values[self._solved(problem, solver)])

    def difference(self, problem: str, solver: str, metric: str, reference: str | None = None) -> tuple[float, float]:
        """Mean paired difference to another solver and its standard error, over the observations that both solved.

        Args:
            problem: Name of the problem.
            solver: Name of the solver.
            metric: A metric of single observations.
            reference: The solver that is subtracted; the first by default, or ``"best"``.

        Raises:
            KeyError: If there is no such number.
        """
        own = self.values[problem]
        other = self.reference(problem, metric, reference)
        pair = [torch.tensor(own[name][metric], dtype=torch.float64) for name in (solver, other)]
        return _mean((pair[0] - pair[1])[self._solved(problem, solver, other)])

    def complete(self, problem: str, solver: str) -> bool:
        """Whether a solver has results on all observations of a problem."""
        return solver not in self.failures[problem] and solver not in self.missing.get(problem, {})

    def _solved(self, problem: str, *solvers: str) -> list[int]:
        """The observations on which these solvers did not fail."""
        gaps = {b for s in solvers for b in self.missing.get(problem, {}).get(s, {}).get("observations", ())}
        count = len(next(iter(self.values[problem][solvers[0]].values()), ()))
        return [b for b in range(count) if b not in gaps]

    def reference(self, problem: str, metric: str, reference: str | None = None) -> str:
        """The solver with which others are compared: the first that has the metric, the named one, or the best."""
        having = [name for name in self.solvers if metric in self.values[problem].get(name, {})]
        having = [name for name in having if self.complete(problem, name)] or having
        if reference is not None and reference != "best":
            if reference not in self.solvers:
                raise KeyError(f"there is no solver {reference!r}: choose one of {', '.join(self.solvers)}")
            return reference
        if reference is None or not having:
            return having[0] if having else next(iter(self.solvers))
        return self.best(problem, metric) or having[0]

    def best(self, problem: str, metric: str) -> str | None:
        """The solver with the best mean; None if neither direction is better.

        Only solvers with results on all observations and without collapsed weights are considered. The best solver is
        chosen and compared on the same observations, so differences to it are biased in its favour.
        """
        better = METRICS[metric].better if metric in METRICS else None
        means = {}
        for solver in self.solvers:
            if not self.complete(problem, solver) or self.collapsed(problem, solver):
                continue
            try:
                means[solver] = self.mean(problem, solver, metric)[0]
            except KeyError:
                continue
        means = {solver: value for solver, value in means.items() if not math.isnan(value)}
        if better is None or not means:
            return None
        if isinstance(better, str):
            return (min if better == "low" else max)(means, key=lambda name: means[name])
        return min(means, key=lambda name: abs(means[name] - better))

    def leaders(self, problem: str, metric: str) -> list[str]:
        """The best solver and all solvers within two paired standard errors of it.

        Returns:
            An empty list if there is nothing to compare: a single candidate, a single observation, or a metric of all
            observations together, which has no paired errors.
        """
        best, means = self.best(problem, metric), {}
        for solver in self.solvers:
            if metric in self.values[problem].get(solver, {}) and self.complete(problem, solver):
                mean = self.mean(problem, solver, metric)[0]
                if not (self.collapsed(problem, solver) or math.isnan(mean)):
                    means[solver] = mean
        if best not in means or len(means) < 2:
            return []
        better = METRICS[metric].better
        target, up = (better, None) if isinstance(better, float) else (0.0, better == "low")

        def losses(solver: str) -> Tensor:
            """Loss of each observation; the mean is the distance from the best value."""
            values = torch.tensor(self.values[problem][solver][metric], dtype=torch.float64) - target
            return values if (means[solver] >= target if up is None else up) else -values

        gaps = {solver: _mean(losses(solver) - losses(best)) for solver in means}
        return [solver for solver, (gap, error) in gaps.items() if abs(gap) <= 2 * error]

    def collapsed(self, problem: str, solver: str) -> bool:
        """Whether a solver's weights have collapsed; see :func:`invflow.evaluation.summary.is_collapsed`."""
        ess = self.values[problem].get(solver, {}).get("ess", [])
        return is_collapsed(ess, self.settings.get("num_samples", 2 * COLLAPSED))

    def calls(self, problem: str, solver: str) -> float:
        """Calls for each sample, forward and backward together."""
        costs = self.costs[problem][solver]
        return float(costs["forward"] or 0) + float(costs["backward"] or 0)

    def pareto(self, problem: str, metric: str = "crps") -> list[str]:
        """Solvers on the Pareto front of metric and calls, ordered by calls, without those with collapsed weights."""
        better = METRICS[metric].better if metric in METRICS else "low"

        def loss(solver: str) -> float:
            value = self.mean(problem, solver, metric)[0]
            if isinstance(better, float):
                return abs(value - better)
            return -value if better == "high" else value

        known = [s for s in self.solvers if s in self.costs[problem] and self.complete(problem, s)
                 and not self.collapsed(problem, s) and (
                     metric in self.values[problem].get(s, {}) or metric in self.sets[problem].get(s, {}))]
        points = sorted((self.calls(problem, s), loss(s), s) for s in known if not math.isnan(loss(s)))
        front: list[str] = []
        lowest = math.inf
        for _, value, solver in points:
            if value < lowest:
                front.append(solver)
                lowest = value
        return front

    def rows(self, reference: str | None = None) -> list[dict[str, Any]]:
        """The tidy table: a dictionary for each problem, solver and metric, and for each cost.

        Args:
            reference: Reference of the paired differences; see :meth:`difference`.
        """
        rows: list[dict[str, Any]] = []
        for problem in self.problems:
            for solver in self.solvers:
                base: dict[str, Any] = {"problem": problem, "solver": solver}
                if solver in self.failures[problem]:
                    rows.append({**base, "metric": "failure", "note": self.failures[problem][solver]})
                    continue
                if not self.complete(problem, solver):
                    rows.append({**base, "metric": "failure", "note": self.gap(problem, solver)})
                for metric in self.metrics(problem):
                    single = metric in self.values[problem][solver]
                    if not single and metric not in self.sets[problem][solver]:
                        continue
                    mean, error = self.mean(problem, solver, metric)
                    row: dict[str, Any] = {**base, "metric": metric, "mean": mean, "standard_error": error}
                    if single:
                        other = self.reference(problem, metric, reference)
                        row["observations"] = len(self._solved(problem, solver))
                        if metric in self.values[problem].get(other, {}):
                            row["reference"] = other
                            row["difference"], row["difference_error"] = self.difference(problem, solver, metric, other)
                    rows.append(row)
                rows += [{**base, "metric": name, "mean": self.costs[problem][solver][name]} for name in _COSTS]
        return rows

    def gap(self, problem: str, solver: str) -> str:
        """Describe on how many observations a solver in :attr:`missing` failed, and why."""
        gap = self.missing[problem][solver]
        return f"failed on {len(gap['observations'])} of {len(self.seeds[problem])} observations: {gap['reason']}"

    # -- texts and files -----------------------------------------------------------------------------------------------

    def to_csv(self, reference: str | None = None) -> str:
        """The tidy table as CSV."""
        columns = ["problem", "solver", "metric", "mean", "standard_error", "observations", "reference", "difference",
                   "difference_error", "note"]
        return _as_csv(self.rows(reference), columns)

    def observations_csv(self) -> str:
        """Every number of every observation as CSV, with the seed of its part."""
        rows = [{"problem": problem, "solver": solver, "observation": b, "seed": self.seeds[problem][b],
                 "metric": metric, "value": value}
                for problem, table in self.values.items() for solver, found in table.items()
                for metric, values in found.items() for b, value in enumerate(values)]
        return _as_csv(rows, ["problem", "solver", "observation", "seed", "metric", "value"])

    def examples(self, problem: str, solver: str) -> dict[str, Tensor]:
        """Images of the first observations of a problem.

        Returns:
            ``truth``, ``observation``, ``observed`` (mask of the observed entries), ``mean``, ``std`` and
            ``covered`` (whether the truth lies in the 90% interval), each ``(b, ...)``, and ``samples`` ``(b, n,
            ...)``, where available.
        """
        known = dict(self._parts or {})
        if not known and self.folder is not None:
            files = sorted((self.folder / "parts" / slug(problem) / slug(solver)).glob("*.safetensors"))
            read = ((path.stem.partition("-"), read_part(path)) for path in files)
            known = {Task(problem, solver, int(start), int(stop)): part for (start, _, stop), part in read
                     if part is not None}
        own = [part.tensors for task, part in sorted(known.items(), key=lambda item: item[0].start)
               if (task.problem, task.solver) == (problem, solver)]
        names = {name for tensors in own for name in tensors if name != "features" and not name.startswith(RANKED)}
        return {name: torch.cat([tensors[name] for tensors in own if name in tensors]) for name in sorted(names)}

def _mean(values: Tensor) -> tuple[float, float]:
    error = float(values.std() / math.sqrt(len(values))) if len(values) > 1 else math.nan
    return float(values.mean()), error


def _as_csv(rows: list[dict[str, Any]], columns: list[str]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: _no_formula(value) for key, value in row.items()} for row in rows)
    return text.getvalue()


def _no_formula(value: Any) -> Any:
    """A cell that spreadsheets do not treat as a formula: a label that looks like one gets an apostrophe in front."""
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) else value


# -- from parts --------------------------------------------------------------------------------------------------------


def gather(kind: type[R], parts: dict[Task, Part], problems: dict[str, Problem], settings: dict[str, Any],
           solvers: dict[str, Any]) -> R:
    """Combine the parts into results of a given class; their order does not matter."""
    comparison = kind({p: {} for p in problems}, {p: {} for p in problems}, {p: {} for p in problems},
                      {p: {} for p in problems}, settings, solvers, {}, _joined_versions(parts), None, parts,
                      {p: {} for p in problems})
    for problem, posed in problems.items():
        references = _reference_features(posed, settings)
        for solver in solvers:
            mine = [(t.start, t.stop, part) for t, part in parts.items() if (t.problem, t.solver) == (problem, solver)]
            own = sorted(mine, key=lambda found: found[0])
            comparison.seeds[problem] = [part.seed for start, stop, part in own for _ in range(stop - start)]
            solved = [found for found in own if found[2].failure is None]
            reasons = list(dict.fromkeys(part.failure for _, _, part in own if part.failure is not None))
            if not solved:
                comparison.failures[problem][solver] = reasons[0]
                continue
            if reasons:
                gaps = [b for start, stop, part in own if part.failure is not None for b in range(start, stop)]
                comparison.missing[problem][solver] = {"observations": gaps, "reason": "; ".join(reasons)}
            kept = [part for _, _, part in solved]
            names = [name for name in kept[0].columns if all(name in part.columns for part in kept)]
            comparison.values[problem][solver] = {
                name: [v for start, stop, part in own
                       for v in (part.columns[name] if part.failure is None else [math.nan] * (stop - start))]
                for name in names}
            comparison.costs[problem][solver] = _costs(solved)
            comparison.sets[problem][solver] = _set_metrics(kept, references, settings["num_samples"])
    return comparison


def _joined_versions(parts: dict[Task, Part]) -> dict[str, str]:
    """The versions of all parts, each once."""
    found: dict[str, dict[str, None]] = {}
    for part in parts.values():
        for name, version in part.versions.items():
            found.setdefault(name, {})[version] = None
    return {name: ", ".join(sorted(each)) for name, each in found.items()}


def _costs(own: list[tuple[int, int, Part]]) -> dict[str, float | None]:
    counts = [stop - start for start, stop, _ in own]
    total = sum(counts)
    found: dict[str, float | None] = {}
    for name in ("forward", "backward"):
        found[name] = sum(n * float(part.costs[name] or 0) for n, (_, _, part) in zip(counts, own)) / total
    found["seconds"] = sum(float(part.costs["seconds"] or 0) for _, _, part in own) / total
    peaks = [float(peak) for _, _, part in own if (peak := part.costs["memory"]) is not None]
    found["memory"] = max(peaks) if peaks else None
    return found


def _reference_features(problem: Problem, settings: dict[str, Any]) -> Tensor | None:
    from invflow._core.folders import shipped_names

    if not problem.has_images or problem.prior_name not in shipped_names("classifier"):
        return None
    return classifier_features(problem.images(settings["split"]), str(problem.prior_name))


def _set_metrics(parts: list[Part], references: Tensor | None, num_samples: int) -> dict[str, tuple[float, float]]:
    """Metrics of all observations together, each with its standard error."""
    found = {}
    p_value = certificate_p([part.tensors for part in parts], num_samples)
    if p_value is not None:
        found["certificate"] = (p_value, math.nan)
    return found | _frechet(parts, references)


def _frechet(parts: list[Part], references: Tensor | None) -> dict[str, tuple[float, float]]:
    """Frechet distance with its jackknife standard error over groups of observations."""
    if references is None or any("features" not in part.tensors for part in parts):
        return {}
    features = torch.cat([part.tensors["features"] for part in parts])  # (B, n, d)
    if features.shape[0] * features.shape[1] < 2:
        return {}
    value = float(frechet_distance(features.flatten(0, 1), references))
    groups = min(8, len(features))
    if groups < 3:
        return {"frechet": (value, math.nan)}
    index = torch.arange(len(features)) * groups // len(features)
    without = torch.tensor([float(frechet_distance(features[index != g].flatten(0, 1), references))
                            for g in range(groups)], dtype=torch.float64)
    error = math.sqrt((groups - 1) / groups * float((without - without.mean()).square().sum()))
    return {"frechet": (value, error)}
