"""Damaged files for everything that is read from disk: ``python tests/fuzz.py 10000 --seed 0``.

Each file is a valid one that was damaged: bits flipped, cut, stretched, swapped with a file of another kind, a header
that declares another length or a huge shape, hostile values in its JSON, NaN in its numbers, a pickle under its name.
Reading it must give an error of the documented kind, or an object that can be used. It fails

- with any other error, a crash, more than ten seconds of work, or over 500 MB of memory;
- if anything in it was executed (a pickle that writes a file, PostScript that Ghostscript would run);
- if the content differs from what was saved, for formats that carry a digest.

A failure is printed with the command that repeats it. The damage depends only on the seed and the number of the file.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import faulthandler
import hashlib
import resource
import shutil
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fuzz_damage import damage, sentinel_of
from fuzz_targets import TARGETS, Target

SECONDS, MEGABYTES = 10, 500


@dataclass
class Summary:
    """Results of the files.

    Attributes:
        refused: with an error of the documented kind, by target.
        read: as objects that can be used, by target.
        failures: what went wrong, with the line that repeats it.
        slowest: seconds of processor time, and of what.
        memory: megabytes above the start.
    """

    refused: collections.Counter[str] = field(default_factory=collections.Counter)
    read: collections.Counter[str] = field(default_factory=collections.Counter)
    damages: collections.Counter[str] = field(default_factory=collections.Counter)
    failures: list[str] = field(default_factory=list)
    slowest: tuple[float, str] = (0.0, "")
    memory: float = 0.0

    def __str__(self) -> str:
        names = sorted(self.refused.keys() | self.read.keys())
        total = sum(self.refused.values()) + sum(self.read.values()) + len(self.failures)
        lines = [f"{name:18}{self.refused[name]:>9} refused{self.read[name]:>9} read" for name in names]
        kinds = ", ".join(f"{name} {count}" for name, count in sorted(self.damages.items()))
        lines += [f"damages: {kinds}", f"{total} files: {sum(self.refused.values())} refused, "
                  f"{sum(self.read.values())} read, {len(self.failures)} failures; the slowest took "
                  f"{self.slowest[0]:.2f} s ({self.slowest[1]}); memory grew by {self.memory:.0f} MB"]
        return "\n".join([*lines, *self.failures])


class Hang(BaseException):
    """Past all ``except Exception``."""


@contextlib.contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Raise in a block that works longer than so many seconds of processor time."""
    def stop(*_: Any) -> None:
        raise Hang

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def megabytes() -> float:
    """The most memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def examine(target: Target, place: Path, original: str) -> str:
    """Read a damaged file: "refused", "read", or what is wrong."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with time_limit(SECONDS):
                found = target.load(place)
                known = target.describe(found)
        except target.errors as error:
            return "refused" if str(error) else f"an error without a word: {error!r}"
        except Hang:
            return f"more than {SECONDS} s of work"
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            return f"{type(error).__name__}: {str(error)[:200]} (in {Path(last.filename).name}:{last.lineno})"
    if target.knows and known != original and target.knows(place):
        return "another object than was saved, without an error"
    return "read"


def run(count: int, seed: int = 0, start: int = 0, only: str | None = None,
        report: Callable[[str], None] = lambda line: None) -> Summary:
    """Damage and read so many files.

    Args:
        count: number of files.
        seed: of the damage.
        start: number of the first file.
        only: a target's name; None takes all in turn.
        report: called with a line now and then.
    """
    summary, targets = Summary(), [t for t in TARGETS if only in (None, t.name)]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        good = root / "good"
        for target in targets:
            target.make(good / target.name)
        originals = {t.name: t.describe(t.load(good / t.name)) for t in targets}
        foreign = sorted(p for p in good.rglob("*") if p.is_file())
        base = megabytes()
        for i in range(start, start + count):
            target = targets[i % len(targets)]
            place = root / "bad"
            shutil.copytree(good / target.name, place)
            what = damage(place, target.files, foreign, f"{seed}-{i}", target.name)
            before, cpu = megabytes(), time.process_time()
            verdict = examine(target, place, originals[target.name])
            took, grown = time.process_time() - cpu, megabytes() - before
            if sentinel_of(place).exists():
                verdict = "it was run"
            elif grown > MEGABYTES:
                verdict = f"{grown:.0f} MB of memory"
            summary.damages[what.split(" ")[0]] += 1
            summary.slowest = max(summary.slowest, (took, f"{target.name}, file {i}"))
            summary.memory = megabytes() - base
            if verdict in ("refused", "read"):
                (summary.refused if verdict == "refused" else summary.read)[target.name] += 1
            else:
                summary.failures.append(f"FAILED {target.name}, {what}: {verdict}\n    python tests/fuzz.py 1 --seed "
                                        f"{seed} --start {i}" + (f" --only {only}" if only else ""))
                report(summary.failures[-1])
            shutil.rmtree(place)
            sentinel_of(place).unlink(missing_ok=True)
            if (i + 1 - start) % 500 == 0:
                report(f"{i + 1 - start} files, {len(summary.failures)} failures")
    return summary


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("count", type=int, nargs="?", default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=int, default=0, help="number of the first file")
    parser.add_argument("--only", choices=[t.name for t in TARGETS], help="one kind of file")
    arguments = parser.parse_args()
    faulthandler.enable()
    start = time.perf_counter()
    summary = run(arguments.count, arguments.seed, arguments.start, arguments.only,
                  lambda line: print(line, flush=True))
    print(summary)
    print(f"{time.perf_counter() - start:.0f} s; digest of the verdicts "
          f"{hashlib.sha256(repr((summary.refused, summary.read)).encode()).hexdigest()[:8]}")
    return bool(summary.failures)


if __name__ == "__main__":
    raise SystemExit(main())
