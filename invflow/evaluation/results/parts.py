"""Parts of a comparison: the results of one solver on some observations of one problem, one file each."""

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

#: placeholder for a missing part of another shard
WAITING = "not computed yet: it belongs to another shard"
_KINDS = ("invflow.comparison.part/2", "invflow.comparison.part/1")


class Stage(NamedTuple):
    """Observations that were simulated together; extending a comparison adds another stage.

    Attributes:
        start, stop: Range of observations.
        size: Number of observations in its parts.
    """

    start: int
    stop: int
    size: int


@dataclass(frozen=True)
class Task:
    """One solver on some observations of one problem.

    Attributes:
        problem, solver: Their names.
        start, stop: Range of observations.
    """

    problem: str
    solver: str
    start: int
    stop: int

    def path(self, folder: Path) -> Path:
        """Path of the file that holds its result."""
        name = f"{self.start:05d}-{self.stop:05d}.safetensors"
        return folder / "parts" / slug(self.problem) / slug(self.solver) / name


@dataclass
class Part:
    """Result of a task.

    Attributes:
        columns: Metrics by name, one number for each observation.
        costs: ``forward`` and ``backward`` calls for each sample, ``seconds`` of all observations together, additional
            ``memory`` in bytes, or None.
        tensors: ``features`` ``(b, n, d)``, and for the first observations ``truth``, ``observation``, ``samples``,
            ``mean``, ``std``, ``covered``, where available.
        seed: Seed of the solver.
        failure: Reason why there is no result; None if there is one.
        versions: Versions of the libraries used.
    """

    columns: dict[str, list[float]] = field(default_factory=dict)
    costs: dict[str, float | None] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    seed: int = 0
    failure: str | None = None
    versions: dict[str, str] = field(default_factory=lambda: versions())


def plan(stages: Mapping[str, Sequence[Stage]], solvers: list[str]) -> list[Task]:
    """All tasks of the problems' stages; tasks on the same observations are adjacent."""
    return [Task(problem, solver, start, min(start + stage.size, stage.stop)) for problem, own in stages.items()
            for stage in own for start in range(stage.start, stage.stop, stage.size) for solver in solvers]


def derive_seed(*parts: object) -> int:
    """A seed for a named purpose: the same on every machine, and different for each purpose."""
    found = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(found[:8], "big") >> 2


def slug(name: str) -> str:
    """A name as a folder name."""
    plain = re.sub(r"[^A-Za-z0-9.=_-]+", "-", name).strip("-.") or "x"
    # the digest distinguishes names that differ only in the replaced characters
    return plain if plain == name else f"{plain}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"


def write_part(part: Part, path: Path, setup: Mapping[str, Any]) -> None:
    """Write a part atomically.

    Args:
        part: The result.
        path: Path of its file.
        setup: Everything that determines it, as JSON values; a file with another setup is not reused.
    """
    write_record(path, _KINDS[0], {"setup": setup, "columns": part.columns, "costs": part.costs, "seed": part.seed,
                                   "failure": part.failure, "versions": part.versions}, part.tensors)


def read_part(path: Path, setup: Mapping[str, Any] | None = None, tensors: bool = True) -> Part | None:
    """Read a part written by :func:`write_part`; None if there is none, or if its file is damaged.

    Args:
        path: Path of its file.
        setup: Required setup, unless the part is a failure, which may always be replaced; None accepts any.
        tensors: Whether to read the tensors too.

    Raises:
        ValueError: If the file belongs to another setup; the message names the differences.
    """
    read = _read(path, tensors)
    if read is None:
        return None
    part, theirs = read
    if setup is not None and part.failure is None:
        if "stage" not in theirs:
            raise ValueError(f"{path} was written by a version of invflow that did not record what determines a part: "
                             "pass another output folder")
        ours = as_json(setup, "setup")
        differing = [key for key in dict.fromkeys((*ours, *theirs)) if theirs.get(key) != ours.get(key)]
        if differing:
            shown = [f"{key}: {theirs.get(key)!r} there, {ours.get(key)!r} here" for key in differing[:3]]
            raise ValueError(
                f"{path} belongs to another comparison: it differs in {', '.join(differing)} ({'; '.join(shown)}). "
                "Pass another output folder, or the same arguments to resume this one"
            )
    return part


def read_stages(folder: Path, problem: str, observations: int, size: int) -> list[Stage]:
    """The stages of a problem: the stages of existing parts, and a new stage for further observations.

    Args:
        folder: Folder of the comparison.
        problem: Name of the problem.
        observations: Requested number of observations.
        size: Number of observations in the parts of a new stage.

    Raises:
        ValueError: If the folder holds more observations.
    """
    found = set()
    for path in (folder / "parts" / slug(problem)).glob("*/*.safetensors"):
        read = _read(path, tensors=False)
        if read is not None and read[1].get("problem") == problem:
            # parts of older versions record the number of observations; read_part reports that they are older
            found.add(Stage(*read[1].get("stage", (0, read[1].get("num_observations", observations), size))))
    stages = sorted(found)
    reached = stages[-1].stop if stages else 0
    if [stage.start for stage in stages] != [0, *(stage.stop for stage in stages)][:len(stages)]:
        raise ValueError(f"{folder} holds parts of {problem} with gaps between them: pass another output folder")
    if reached > observations:
        raise ValueError(f"{folder} holds another comparison, of {reached} observations of {problem}: request at "
                         f"least as many, num_observations={reached}, or pass another output folder")
    return stages if reached == observations else [*stages, Stage(reached, observations, size)]


def _read(path: Path, tensors: bool) -> tuple[Part, dict[str, Any]] | None:
    """A part and its setup; None if there is none or its file is damaged, so that it is computed again."""
    try:
        header, held = read_record(path, *_KINDS, tensors=tensors)
        return Part(header["columns"], header["costs"], held, header["seed"], header["failure"],
                    dict(header.get("versions", {}))), dict(header["setup"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
