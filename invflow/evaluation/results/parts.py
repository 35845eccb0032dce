"""Parts of a comparison, a file for each: what one solver makes of some observations of one problem."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from invflow._core.records import as_json, digest, parse_json, write_atomically

__all__ = ["Part", "Task", "derive_seed", "plan", "read_part", "write_part"]

_FORMAT = "invflow.comparison.part/1"


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
        return folder / "parts" / _slug(self.problem) / _slug(self.solver) / name


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
    """

    columns: dict[str, list[float]] = field(default_factory=dict)
    costs: dict[str, float | None] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    seed: int = 0
    failure: str | None = None


def plan(problems: list[str], solvers: list[str], observations: int, size: int) -> list[Task]:
    """All tasks, those on the same observations side by side."""
    return [Task(problem, solver, start, min(start + size, observations)) for problem in problems
            for start in range(0, observations, size) for solver in solvers]


def derive_seed(*parts: object) -> int:
    """A seed for a named purpose: the same everywhere, and another for each."""
    found = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(found[:8], "big") >> 2


def _slug(name: str) -> str:
    plain = re.sub(r"[^A-Za-z0-9.=_-]+", "-", name).strip("-.") or "x"
    # names that differ only in what was left out keep apart
    return plain if plain == name else f"{plain}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"


def write_part(part: Part, path: Path, setup: dict[str, Any]) -> None:
    """Write a part, whole or not at all.

    Args:
        part: the result.
        path: of its file.
        setup: what made it, as JSON holds it; a file with another setup is not read for this one.
    """
    header = {"format": _FORMAT, "setup": setup, "columns": part.columns, "costs": part.costs, "seed": part.seed,
              "failure": part.failure}
    stored = {key: value.detach().to("cpu", copy=True).contiguous() for key, value in part.tensors.items()}
    stored = stored or {"empty": torch.zeros(1)}
    plain = as_json({**header, "content": digest(stored, {})}, "part")
    text = json.dumps({**plain, "digest": digest({}, plain)})
    write_atomically(path, lambda name: save_file(stored, name, {"invflow": text}))


def read_part(path: Path, setup: dict[str, Any] | None = None, tensors: bool = True) -> Part | None:
    """Read a part that :func:`write_part` wrote; None if there is none, or its file is damaged.

    Args:
        path: of its file.
        setup: what must have made it; None takes any.
        tensors: whether to read these too.

    Raises:
        ValueError: if the file belongs to another setup, naming what differs.
    """
    if not path.is_file():
        return None
    try:
        with safe_open(str(path), framework="pt") as file:
            header = parse_json((file.metadata() or {})["invflow"])
            held = {key: file.get_tensor(key) for key in file.keys()} if tensors else {}  # noqa: SIM118 - not a dict
        whole, content = header.pop("digest", None), header.get("content")
        damaged = whole is not None and whole != digest({}, header)
        if damaged or header["format"] != _FORMAT or (content and tensors and content != digest(held, {})):
            return None
        held.pop("empty", None)
        found = Part(header["columns"], header["costs"], held, header["seed"], header["failure"])
        theirs = dict(header["setup"])
    except Exception:  # safetensors and JSON fail on damaged files with errors of many kinds
        return None  # cut short by a full disk, say: made anew
    if setup is not None and theirs != json.loads(json.dumps(as_json(setup, "setup"))):
        differing = sorted(key for key in {*theirs, *setup} if theirs.get(key) != as_json(setup.get(key), key))
        raise ValueError(
            f"{path} belongs to another comparison: it differs in {', '.join(differing)} ("
            + "; ".join(f"{key}: {theirs.get(key)!r} there, {setup.get(key)!r} here" for key in differing[:3])
            + "). Pass another output folder, or the same settings to go on with this one"
        )
    return found
