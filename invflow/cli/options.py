"""Shared parts of the commands: notes, one-line errors, NAME=VALUE settings, devices."""

from __future__ import annotations

import functools
import json
import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer

if TYPE_CHECKING:
    from invflow.problem import Problem

__all__ = ["MOST_SEED", "PRIOR_HELP", "Device", "Seed", "check_device", "find_problem", "parse_settings",
           "refuse_processes", "say", "user_errors"]


MOST_SEED = 2**63 - 1
#: options that several commands have
Seed = Annotated[int, typer.Option(min=0, max=MOST_SEED, help="Random seed.")]
Device = Annotated[str, typer.Option(help="Device: cpu, cuda, cuda:1, mps.")]
PRIOR_HELP = ("Name of a shipped or plug-in prior, a folder, a Hub repository id, or package.module:function "
              "[default: the problem's].")


def say(message: str) -> None:
    """Print a note."""
    typer.echo(f"note: {message}", err=True)


@contextmanager
def _warnings_as_notes() -> Iterator[None]:
    """Print the library's warnings as notes, without a file name and a line of code."""
    with warnings.catch_warnings():
        warnings.simplefilter("default", UserWarning)
        warnings.showwarning = lambda message, *_, **__: say(_counted_from_one(str(message)))
        yield


def _counted_from_one(message: str) -> str:
    """Number the observations in a message of the library from one, as in tables, rather than from zero."""
    return re.sub(r"\b(observation|repeat) (\d+)\b", lambda found: f"{found[1]} {int(found[2]) + 1}", message)


def user_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Print errors that a user can fix as one line, with exit code 2; INVFLOW_DEBUG=1 shows the traceback."""

    @functools.wraps(command)
    def wrapper(*args: Any, **kwargs: Any) -> None:
        try:
            with _warnings_as_notes():
                command(*args, **kwargs)
        except BrokenPipeError:  # for example from | head: click exits silently
            raise
        except (typer.Exit, typer.Abort):
            raise
        except Exception as error:
            if os.environ.get("INVFLOW_DEBUG"):
                raise
            typer.echo("error: " + _in_a_line(error), err=True)
            raise typer.Exit(2) from error

    return wrapper


def _in_a_line(error: Exception) -> str:
    """A one-line message: errors that a user can fix unchanged, all others with a hint on where to look."""
    words = _counted_from_one(" ".join(str(error).split()))
    if isinstance(error, MemoryError) or "alloc" in words or "out of memory" in words:
        first = words.partition(" Error code")[0].rpartition("]")[2].partition(": ")[2] or words
        return f"not enough memory ({first}): use fewer or smaller images or samples at a time, see --help"
    if isinstance(error, (ValueError, TypeError, OSError, ArithmeticError)):
        return words or type(error).__name__
    return f"{type(error).__name__}: {words}; INVFLOW_DEBUG=1 shows where it comes from"


def parse_settings(steps: int | None, pairs: list[str], option: str = "--set",
              example: str = "chunk_size=64") -> dict[str, Any]:
    """Parse settings written as NAME=VALUE; a value is JSON or a word."""
    settings: dict[str, Any] = {} if steps is None else {"steps": steps}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not (name and equals):
            raise ValueError(f"{option} takes NAME=VALUE, such as {option} {example}, not {pair!r}")
        try:
            settings[name.replace("-", "_")] = json.loads(value)
        except json.JSONDecodeError:  # a word
            settings[name.replace("-", "_")] = value
    return settings


def find_problem(name: str) -> Problem:
    """Find a problem by its name; for the name of a solver, the error says where to pass it."""
    from invflow.problem import list_problems, load_problem
    from invflow.registry import list_solvers

    if name in list_solvers() and name not in list_problems():
        raise ValueError(f"{name} is a solver, not a problem: pass it as --solver {name}, after a problem such as "
                         "mnist/denoising")
    return load_problem(name)


def refuse_processes(command: str, way: str) -> None:
    """Raise an error if several processes would do the same work.

    Raises:
        ValueError: If torchrun started more than one process.
    """
    processes = os.environ.get("WORLD_SIZE", "1")
    if processes != "1":
        raise ValueError(f"invflow {command} runs in one process, but torchrun started {processes}, each of which "
                         f"would do the same work: {way}")


def check_device(name: str) -> torch.device:
    """Return a device by its name if it is available.

    Raises:
        ValueError: If it is not available.
    """
    try:
        device = torch.device(name)
        torch.empty(1, device=device).cpu()  # this fails for a device without data, such as meta
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        if "device type" in reason or "device string" in reason:
            reason = "torch knows cpu; cuda, an NVIDIA GPU; mps, the GPU of a Mac"
        raise ValueError(f"the device {name!r} cannot be used ({reason}): pass --device cpu") from error
    return device
