"""Tune the existing samplers on validation images: ``python -m benchmarks.release.tune_samplers RUNS``.

For each of the six problems and each sampler, the search tries every candidate of a small grid (:data:`CANDIDATES`).
Each candidate draws 4 samples for each of the first 8 validation images (particle methods: 8 particles for 4 images)
with 100 calls. The one with the lowest CRPS, averaged over pixels and images, is kept. Test images are not read. The
choices and all scores are written to ``data/tuned.json``, which :func:`tuned_settings` reads. They do not include the
number of steps, which each table sets. The same command resumes a killed run. ``--samplers dps ddrm`` tunes only those
and keeps the choices of the others.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import invflow
from benchmarks.tables.image_table import TASKS
from invflow.evaluation.summary import write_json
from invflow.problem import Problem, load_problem
from invflow.registry import solver_by_name
from invflow.solver import Solver
from invflow_problems.samples import FOLDER

__all__ = ["CALLS", "CANDIDATES", "TUNED", "main", "steps_of", "tune", "tuned_settings"]

TUNED = FOLDER / "tuned.json"
#: network calls per sample during tuning, forward and backward together
CALLS = 100


def _grid(**axes: list[Any]) -> list[dict[str, Any]]:
    return [dict(zip(axes, values)) for values in itertools.product(*axes.values())]


#: candidates of each sampler, including published defaults
CANDIDATES: dict[str, list[dict[str, Any]]] = {
    "dps": _grid(zeta=[0.3, 0.6, 1.0, 1.8, 3.0]),
    "pigdm": [{"eta": 1.0, "weight": 1.0}, *_grid(eta=[1.0, 0.0], weight=[0.5, 2.0])],
    "moment-matching": _grid(iterations=[1, 2, 3]),
    "diffpir": [{"lambda_": 7.0, "zeta": 0.1}, *_grid(lambda_=[3.0, 7.0], zeta=[0.3, 1.0])],
    "ddrm": _grid(eta=[0.5, 0.7, 0.85, 0.95, 1.0]),
    "ula": _grid(denoiser_sigma=[0.05, 0.1, 0.2, 0.4], step=[0.5]),
    "pnp-flow": _grid(gamma=[0.7, 1.5], alpha=[0.2, 1.0]),
    "flower": _grid(spread=[0.5, 1.0], sampling=[False, True]),
    "tds": _grid(schedule=["constant", "annealed"], max_shift=[1.0, math.inf]),
}
_PARTICLES = ("tds",)


def steps_of(sampler: str, calls: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Settings that give a sampler a budget of network calls for each sample, forward and backward together."""
    if sampler == "moment-matching":  # one forward call and iterations + 1 backward calls
        return {"steps": max(2, round(calls / (2 + settings.get("iterations", 1))))}
    if sampler in ("dps", "pigdm", "tds"):  # one backward call for each forward call
        return {"steps": calls // 2}
    if sampler == "diffpir":  # no call at the last noise level
        return {"steps": calls + 1}
    if sampler == "ula":  # five samples of each chain for twenty in total
        return {"burn_in": calls, "thinning": max(1, 4 * calls // 5), "chains": 4}
    if sampler == "pnp-flow":
        return {"steps": max(1, calls // 2), "average": 2}
    return {"steps": calls}


def tuned_settings(problem: str, sampler: str) -> dict[str, Any]:
    """Tuned settings of a sampler on a problem.

    Args:
        problem: Name such as ``"mnist/box-inpainting"``.
        sampler: Name such as ``"dps"``.

    Returns:
        Keyword arguments of the solver; empty if the sampler was not tuned on this problem.
    """
    found = _read().get("chosen", {}).get(problem, {}).get(sampler, {})
    return {key: math.inf if value == "inf" else value for key, value in found.items()}


@functools.cache
def _read() -> dict[str, Any]:
    return json.loads(TUNED.read_text(encoding="utf-8")) if TUNED.is_file() else {}


def _label(settings: dict[str, Any]) -> str:
    return ",".join(f"{key}={value}" for key, value in settings.items())


def tune(problem: Problem, sampler: str, folder: Path, *, images: int = 8, samples: int = 4,
         seed: int = 0) -> list[dict[str, Any]]:
    """Score the candidates of a sampler on validation images.

    Args:
        problem: Problem with images.
        sampler: Key of :data:`CANDIDATES`.
        folder: Folder for partial results, from which a killed search resumes.
        images: Number of images of the validation split.
        samples: Number of samples for each image.
        seed: Random seed of measurements and samples.

    Returns:
        Candidates with ``settings``, ``crps`` and its ``standard_error`` (None if the candidate failed), best first.
    """
    def builder(settings: dict[str, Any]) -> Callable[[Problem], Solver]:
        return lambda posed: solver_by_name(sampler, posed, **settings, **steps_of(sampler, CALLS, settings),
                                            chunk_size=32)

    if sampler in _PARTICLES:
        images, samples = images // 2, 2 * samples
    solvers = {_label(settings): builder(settings) for settings in CANDIDATES[sampler]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # so few particles are not expected to converge
        found = invflow.compare(problem, solvers, num_observations=images, num_samples=samples, seed=seed,
                                output=folder, split="validation", part_size=images, gallery=0)
    scores = []
    for settings in CANDIDATES[sampler]:
        failed = _label(settings) in found.failures[problem.name]
        mean, error = (math.inf, None) if failed else found.mean(problem.name, _label(settings), "crps")
        plain = {key: "inf" if value == math.inf else value for key, value in settings.items()}
        scores.append({"settings": plain, "crps": None if failed else mean, "standard_error": error})
    return sorted(scores, key=lambda score: math.inf if score["crps"] is None else float(score["crps"]))


def _jobs(data: list[str], samplers: list[str]) -> Iterator[tuple[str, str]]:
    return itertools.product((f"{name}/{task}" for name in data for task in TASKS), samplers)


def main() -> None:
    """Run the search and write its choices after every sampler and problem."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, help="folder for partial results")
    parser.add_argument("--data", nargs="+", default=["mnist"], choices=["mnist", "fashion-mnist"])
    parser.add_argument("--samplers", nargs="+", default=list(CANDIDATES), choices=list(CANDIDATES))
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=TUNED)
    arguments = parser.parse_args()
    record: dict[str, Any] = {"chosen": {}, "scores": {}}
    if arguments.output.is_file():
        record = json.loads(arguments.output.read_text(encoding="utf-8"))
    record["search"] = {
        "what": "every candidate of a grid, least CRPS (mean over pixels and images) kept", "split": "validation",
        "images": arguments.images, "samples": arguments.samples, "calls": CALLS, "seed": arguments.seed,
        "candidates": {name: len(grid) for name, grid in CANDIDATES.items()},
    }
    for name, sampler in _jobs(arguments.data, arguments.samplers):
        start = time.process_time()
        folder = arguments.runs / name.replace("/", "-") / sampler
        scores = tune(load_problem(name), sampler, folder, images=arguments.images, samples=arguments.samples,
                      seed=arguments.seed)
        record["scores"].setdefault(name, {})[sampler] = scores
        if scores[0]["crps"] is not None:
            record["chosen"].setdefault(name, {})[sampler] = scores[0]["settings"]
        write_json(record, arguments.output)
        print(f"{name} {sampler}: {scores[0]} ({time.process_time() - start:.0f} s of CPU time)", flush=True)


if __name__ == "__main__":
    main()
