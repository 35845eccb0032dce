"""Kill compare, calibrate and train repeatedly, and check that they give the same bits as an uninterrupted run.

    python tests/kills.py                  # 20 kills of each, some minutes
    python tests/kills.py --kills 3 train

Each run is a child process that SIGKILL ends at a random moment; the next one resumes in the same folder. A run that
ends before it is killed is compared, and another begins in an empty folder. Everything but time and memory must agree.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import os
import random
import shlex
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

from invflow.cli.entry import app
from invflow.evaluation.certificate.certificate import Certificate

MEASURED = {"seconds", "memory"}


def table(folder: Path) -> object:
    """The table of a comparison, number by number as it is written."""
    rows = list(csv.DictReader((folder / "table.csv").read_text().splitlines()))
    return [row for row in rows if row["metric"] not in MEASURED]


def record(folder: Path) -> object:
    """Ranks and all else that a certificate is made of, bit by bit."""
    return {key: value.numpy().tobytes() for key, value in Certificate.load(folder).record.items()
            if key not in MEASURED}


def weights(folder: Path) -> object:
    """What was trained, bit by bit, and the log."""
    found = {str(path.relative_to(folder)): {key: value.numpy().tobytes() for key, value in load_file(path).items()}
             for path in sorted(folder.rglob("model.safetensors"))}
    logs = {str(path.relative_to(folder)): path.read_text() for path in sorted(folder.rglob("metrics.csv"))}
    if not found or not logs:
        raise ValueError(f"{folder} holds no weights, or no log of their training")
    return found, logs


#: each command, and what of its folder has to be the same
COMMANDS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "compare": ("compare gaussian/linear --solver exact --solver few=fmtt:steps=12 --observations 64 --samples 256",
                table),
    "calibrate": ("calibrate gaussian/linear --solver dps --set steps=20 --simulations 80 --samples 19 --chunk-size 2",
                  record),
    "train": ("train checkerboard --steps 60 --batch-size 64 --set checkpoint_seconds=0.1 --set log_every=5", weights),
}


def work(line: str, folder: Path) -> None:
    """Run a command, its words into a file beside the folder."""
    torch.set_num_threads(1)
    said = os.open(folder.with_suffix(".txt"), os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o644)
    os.dup2(said, 1), os.dup2(said, 2)
    try:
        code = app([*shlex.split(line), "--output", str(folder)], standalone_mode=False)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code or 0)


def run(line: str, folder: Path, kill_after: float | None = None) -> bool:
    """Run a command to its end, which it must reach, or kill it; returns whether it was killed."""
    child = multiprocessing.get_context("fork").Process(target=work, args=(line, folder))
    child.start()
    child.join(kill_after)
    if child.is_alive():
        child.kill()
        child.join()
        if child.exitcode == -signal.SIGKILL:
            return True
    if child.exitcode:
        sys.exit(f"{line} failed:\n{folder.with_suffix('.txt').read_text()[-4000:]}")
    return False


def torment(name: str, kills: int, seed: int, place: Path) -> None:
    """Kill a command so often; exits with a message where a run does not go on, or ends with other bits."""
    line, content = COMMANDS[name]
    whole, folder = place / f"{name}-whole", place / name
    start = time.monotonic()
    run(line, whole)
    seconds = time.monotonic() - start
    expected, draw, killed, ended = content(whole), random.Random(f"{seed} {name}"), 0, 0
    while True:
        # many kills to a run: each resumes from what the ones before have left
        if run(line, folder, draw.uniform(0, 0.6 * seconds) if killed < kills else None):
            killed += 1
            continue
        ended += 1
        if content(folder) != expected:
            sys.exit(f"{name}: after {killed} kills the numbers are others than without any; see {place}")
        left = [str(path) for path in folder.rglob(".*.partial")]
        if left:
            sys.exit(f"{name}: half-written files were left behind: {left}")
        if killed >= kills:
            break
        shutil.rmtree(folder)
    print(f"{name}: {killed} kills, {ended} runs that ended, each with the bits of one that was never interrupted",
          flush=True)


def main() -> None:
    """Kill what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="COMMAND", help="compare, calibrate, train [default: all]")
    parser.add_argument("--kills", type=int, default=20, help="of each command [default: 20]")
    parser.add_argument("--seed", type=int, default=0, help="of the moments [default: 0]")
    asked = parser.parse_args()
    if unknown := set(asked.names) - set(COMMANDS):
        parser.error(f"there is no {sorted(unknown)[0]!r} here: pass {', '.join(COMMANDS)}")
    place = Path(tempfile.mkdtemp())
    for name in asked.names or COMMANDS:
        torment(name, asked.kills, asked.seed, place)
    shutil.rmtree(place)


if __name__ == "__main__":
    main()
