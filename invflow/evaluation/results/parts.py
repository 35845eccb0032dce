"""Parts of a comparison, a file for each: what one solver makes of some observations of one problem."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from invflow._core.records import as_json, read_record, versions, write_record

__all__ = ["WAITING", "Part", "Stage", "Task", "derive_seed", "plan", "read_part", "read_stages", "slug", "write_part"]

#: stands in for a part of another shard that is not there
WAITING = "not computed yet: it belongs to another shard"
_KINDS = ("invflow.comparison.part/2", "invflow.comparison.part/1")


class Stage(NamedTuple):
    """Observations that were simulated together; a comparison that is extended gets another stage.

    Attributes:
        start, stop: observations.
        size: of its parts.
    """

    start: int
    stop: int
    size: int


@dataclass(frozen=True)
class Task:
    """One solver on some observations of one problem.

    Attributes:
        problem, solver: their names.
        start, stop: observations.
    """

    problem: str
    solver: str
    start: int
    stop: int

    def path(self, folder: Path) -> Path:
        """The file that holds its result."""
        name = f"{self.start:05d}-{self.stop:05d}.safetensors"
        return folder / "parts" / slug(self.problem) / slug(self.solver) / name


@dataclass
class Part:
    """What came out of a task.

    Attributes:
        columns: metrics by name, one number for each observation.
        costs: ``forward`` and ``backward`` calls for each sample, ``seconds`` of all observations together, ``memory``
            in bytes above what was there before, or None.
        tensors: ``features`` ``(b, n, d)``, and of the first observations ``truth``, ``observation``, ``samples``,
            ``mean``, ``std``, ``covered``; those that there are.
        seed: of the solver's random numbers.
        failure: why there is no result; None where there is.
        versions: of what made it.
    """

    columns: dict[str, list[float]] = field(default_factory=dict)
    costs: dict[str, float | None] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    seed: int = 0
    failure: str | None = None
    versions: dict[str, str] = field(default_factory=lambda: versions())


def plan(stages: Mapping[str, Sequence[Stage]], solvers: list[str]) -> list[Task]:
    """All tasks of the problems' stages, those on the same observations side by side."""
    return [Task(problem, solver, start, min(start + stage.size, stage.stop)) for problem, own in stages.items()
            for stage in own for start in range(stage.start, stage.stop, stage.size) for solver in solvers]


def derive_seed(*parts: object) -> int:
    """A seed for a named purpose: the same everywhere, and another for each."""
    found = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(found[:8], "big") >> 2


def slug(name: str) -> str:
    """A name as that of a folder."""
    plain = re.sub(r"[^A-Za-z0-9.=_-]+", "-", name).strip("-.") or "x"
    # names that differ only in what was left out keep apart
    return plain if plain == name else f"{plain}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"


def write_part(part: Part, path: Path, setup: Mapping[str, Any]) -> None:
    """Write a part, whole or not at all.

    Args:
        part: the result.
        path: of its file.
        setup: what made it, as JSON holds it; a file with another setup is not read for this one.
    """
    write_record(path, _KINDS[0], {"setup": setup, "columns": part.columns, "costs": part.costs, "seed": part.seed,
                                   "failure": part.failure, "versions": part.versions}, part.tensors)


def read_part(path: Path, setup: Mapping[str, Any] | None = None, tensors: bool = True) -> Part | None:
    """Read a part that :func:`write_part` wrote; None if there is none, or its file is damaged.

    Args:
        path: of its file.
        setup: what must have made it, unless it is a failure, which anything may replace; None takes any.
        tensors: whether to read these too.

    Raises:
        ValueError: if the file belongs to another setup, naming what differs.
    """
    read = _read(path, tensors)
    if read is None:
        return None
    part, theirs = read
    if setup is not None and part.failure is None:
        if "stage" not in theirs:
            raise ValueError(f"{path} was written by a version of invflow that did not keep what parts are made of: "
                             "pass another output folder")
        ours = as_json(setup, "setup")
        differing = [key for key in dict.fromkeys((*ours, *theirs)) if theirs.get(key) != ours.get(key)]
        if differing:
            shown = [f"{key}: {theirs.get(key)!r} there, {ours.get(key)!r} here" for key in differing[:3]]
            raise ValueError(
                f"{path} belongs to another comparison: it differs in {', '.join(differing)} ({'; '.join(shown)}). "
                "Pass another output folder, or the same arguments to go on with this one"
            )
    return part


def read_stages(folder: Path, problem: str, observations: int, size: int) -> list[Stage]:
    """The stages of a problem: those of the parts that are there, and one more for further observations.

    Args:
        folder: of the comparison.
        problem: its name.
        observations: that are wanted.
        size: of the parts of a new stage.

    Raises:
        ValueError: if the folder holds more observations.
    """
    found = set()
    for path in (folder / "parts" / slug(problem)).glob("*/*.safetensors"):
        read = _read(path, tensors=False)
        if read is not None and read[1].get("problem") == problem:
            # parts of older versions know how many observations there were; read_part says that they are older
            found.add(Stage(*read[1].get("stage", (0, read[1].get("num_observations", observations), size))))
    stages = sorted(found)
    reached = stages[-1].stop if stages else 0
    if [stage.start for stage in stages] != [0, *(stage.stop for stage in stages)][:len(stages)]:
        raise ValueError(f"{folder} holds parts of {problem} that do not follow each other: pass another output folder")
    if reached > observations:
        raise ValueError(f"{folder} holds another comparison, of {reached} observations of {problem}: ask for as many "
                         f"or more, num_observations={reached}, or pass another output folder")
    return stages if reached == observations else [*stages, Stage(reached, observations, size)]


def _read(path: Path, tensors: bool) -> tuple[Part, dict[str, Any]] | None:
    """A part and its setup; None if there is none, or its file is damaged: it is then made anew."""
    try:
        header, held = read_record(path, *_KINDS, tensors=tensors)
        return Part(header["columns"], header["costs"], held, header["seed"], header["failure"],
                    dict(header.get("versions", {}))), dict(header["setup"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
