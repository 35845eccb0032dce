"""The table of the 25 Gaussians: ``python -m benchmarks.tables.mixture_table OUTPUT`` compares posterior samplers.

In each of the nine settings (d, m), for each replicate (with its own weights, operator, noise level and truth), every
method draws 1,000 particles. The table has their sliced Wasserstein distance W1 to 1,000 exact posterior draws. The row
``exact`` has the distance of other exact draws, the lower limit. The table has two costs: calls of the map, counted as
for a learned map, in which a jump is one call; and velocities, many of which are needed for one jump of the mixture.
FMTT and deepinv's samplers have the same number of forward calls. Samplers that are not installed are skipped.

Rows are written as they are computed, so a stopped run can be resumed; ``evidence.csv`` holds the ratios Z-hat / Z of
20 runs on one problem.
"""

from __future__ import annotations

import argparse
import functools
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.tables.shared import append_rows, head, line, mean_and_error, parser, plus_minus, read_rows
from invflow.likelihood import GaussianLikelihood
from invflow.metrics import sliced_wasserstein
from invflow.models.mixture import GaussianMixtureFlow
from invflow.posterior import Posterior
from invflow.registry import list_solvers, solver_by_name
from invflow.solver import Solver
from invflow.solvers.exact import ExactPosterior
from invflow.solvers.tilting.annealing import AnnealedCovariance, ReversalDiffusion
from invflow.solvers.tilting.schedules import logit_grid
from invflow_problems.mixture25 import SETTINGS, draw_problem

__all__ = ["METHODS", "CountedMixture", "evaluate", "evidence_ratios", "main"]

PARTICLES, PROJECTIONS = 1000, 500
#: number of steps of the jump: it takes 48 velocities, and its root mean square error is under 0.003 of a component's
#: standard deviation
JUMP_STEPS = 8
#: the data lie in (-20, 20), which is mapped to [0, 1] for samplers of images
_RANGE = {"value_range": (-20.0, 20.0)}
#: existing samplers in their deepinv form
_DEEPINV: dict[str, Any] = {"variant": "deepinv", **_RANGE}
#: forward calls per particle, for every sampler without its own setting
CALLS = 100


def _tilting(prior: GaussianMixtureFlow, **settings: Any) -> dict[str, Any]:
    """FMTT for modes that separate early: times, diffusion, schedule from the prior's scales; three calls per step."""
    schedule = AnnealedCovariance.of_mixture(prior)
    return {"steps": (CALLS + 2) // 3, "kernel": "renoise", "diffusion": ReversalDiffusion(0.5), "schedule": schedule,
            "time_grid": functools.partial(logit_grid, first=schedule.first_time), **settings}


#: by name in the table: the name of the solver, and its settings or a function of the prior that returns them
METHODS: dict[str, tuple[str, dict[str, Any] | Callable[[GaussianMixtureFlow], dict[str, Any]]]] = {
    # many temperatures with few moves: at equal calls, the weights vary less than for few temperatures with many moves
    "noise-smc": ("noise-smc", {"moves": "crank-nicolson-langevin", "num_moves": 6, "ess_threshold": 0.9}),
    "fmtt conjugate": ("fmtt", functools.partial(_tilting, proposal="conjugate")),
    "fmtt": ("fmtt", _tilting),
    "moment-matching": ("moment-matching", {"steps": CALLS, "iterations": 3, **_DEEPINV}),
    "dps": ("dps", {"steps": CALLS, **_DEEPINV}),
    "dps annealed": ("dps", {"steps": CALLS, "guidance": "annealed", **_DEEPINV}),
    "ula": ("ula", {"burn_in": CALLS // 2, "thinning": CALLS // 2, "step": 0.5, "denoiser_sigma": 0.05, **_RANGE}),
    "ddrm": ("ddrm", {"steps": CALLS, **_DEEPINV}),
    "pigdm": ("pigdm", {"steps": CALLS, **_DEEPINV}),
    "diffpir": ("diffpir", {"steps": CALLS, **_DEEPINV}),
    # deepinv's default number of steps
    "moment-matching, 1,000": ("moment-matching", {"steps": 1000, "iterations": 3, **_DEEPINV}),
    "dps, 1,000": ("dps", {"steps": 1000, **_DEEPINV}),
}
FIELDS = ("d", "m", "replicate", "method", "w1", "calls", "backward", "velocities", "log_evidence_error", "seconds",
          "note")


class CountedMixture(GaussianMixtureFlow):
    """The mixture with a jump counted as one call, as for a learned map; ``velocities`` counts its velocities."""

    velocities: int = 0

    def record_output(self, output: Tensor, rows: int) -> Tensor:
        """Count one call for each row of the output, whatever it actually costs."""
        if self.call_scopes():
            self.velocities += rows
        return super().record_output(output, len(output))


def _generator(*key: int) -> torch.Generator:
    seed = 0
    for part in key:
        seed = seed * 7919 + part
    return torch.Generator().manual_seed(seed)


def _pose(d: int, m: int, replicate: int) -> tuple[GaussianLikelihood, ExactPosterior, CountedMixture]:
    problem = draw_problem(d, m, replicate)
    _, likelihood = problem.simulate(1, generator=_generator(replicate, d, m, 0))
    mixture = problem.prior
    assert isinstance(mixture, GaussianMixtureFlow)
    counted = CountedMixture(mixture.means, std=1.0, weights=mixture.weights, steps=JUMP_STEPS)
    return likelihood, ExactPosterior(mixture), counted


def _solver(method: str, prior: CountedMixture, particles: int) -> Solver:
    name, settings = METHODS[method]
    return solver_by_name(name, prior, **(settings(prior) if callable(settings) else settings), chunk_size=particles)


def evaluate(d: int, m: int, replicate: int, method: str, *, particles: int = PARTICLES) -> dict[str, Any]:
    """One row of the table.

    Args:
        d: Dimension of the state.
        m: Number of measurements.
        replicate: Random seed of the problem and of all draws.
        method: ``"exact"`` or a name in :data:`METHODS`.
        particles: Number of draws of the method, and of the exact posterior for comparison.

    Returns:
        A value for each of :data:`FIELDS`; calls and velocities for each particle.
    """
    likelihood, exact, prior = _pose(d, m, replicate)
    reference = exact.sample(likelihood, particles, generator=_generator(replicate, d, m, 1))
    generator = _generator(replicate, d, m, 2)
    row: dict[str, Any] = {"d": d, "m": m, "replicate": replicate, "method": method, "note": ""}
    start = time.perf_counter()
    try:
        if method == "exact":
            posterior = exact.sample(likelihood, particles, generator=generator)
        else:
            solver = _solver(method, prior, particles)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", UserWarning)
                posterior = solver.sample(likelihood, particles, generator=generator)
            row["note"] = "not converged" if any("not converged" in str(w.message) for w in caught) else ""
    except (ValueError, RuntimeError) as error:  # diverged, or does not support the operator
        return {**row, "note": f"failed: {str(error)[:60]}"}
    seconds = time.perf_counter() - start
    distance = sliced_wasserstein(posterior.samples, reference.samples, num_projections=PROJECTIONS,
                                  log_weights=posterior.log_weights if posterior.weighted else None,
                                  generator=_generator(replicate, d, m, 3))
    return {**row, "w1": float(distance), "calls": posterior.nfe.forward, "backward": posterior.nfe.backward,
            "velocities": prior.velocities / particles, "log_evidence_error": _evidence_error(posterior, reference),
            "seconds": seconds}


def _evidence_error(posterior: Posterior, exact: Posterior) -> float | str:
    if posterior.log_evidence is None or exact.log_evidence is None:
        return ""
    return float(posterior.log_evidence - exact.log_evidence)


def evidence_ratios(method: str, *, d: int = 8, m: int = 1, seeds: int = 20, particles: int = PARTICLES) -> list[float]:
    """Z-hat / Z of independent runs on the problem of replicate 0."""
    likelihood, exact, prior = _pose(d, m, 0)
    solver = _solver(method, prior, particles)
    ratios = []
    for seed in range(seeds):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            estimate = solver.sample(likelihood, particles, generator=_generator(seed, d, m, 4)).log_evidence
        assert estimate is not None
        ratios.append(float((estimate - exact.log_evidence(likelihood)).exp()))
    return ratios


# -- the files ---------------------------------------------------------------------------------------------------------


def format_markdown(rows: list[dict[str, str]]) -> str:
    """Mean W1 with its standard error, its ratio to that of exact draws, and the costs, by setting and method."""
    lines = [head("d", "m", "method", "replicates", "W1", "over exact", "map calls", "backward", "velocities")]
    for d, m in SETTINGS:
        chosen = [row for row in rows if (row["d"], row["m"]) == (str(d), str(m))]
        floors = {row["replicate"]: float(row["w1"]) for row in chosen if row["method"] == "exact"}
        for method in ("exact", *METHODS):
            found = [row for row in chosen if row["method"] == method and row["replicate"] in floors]
            good = [row for row in found if row["w1"]]
            if not found:
                continue
            if not good:
                lines.append(f"| {d} | {m} | {method} | {len(found)} | failed | | | | |")
                continue
            w1, error = mean_and_error([float(row["w1"]) for row in good])
            ratio = w1 / mean_and_error([floors[row["replicate"]] for row in good])[0]
            costs = [f"{mean_and_error([float(row[key]) for row in good])[0]:.0f}"
                     for key in ("calls", "backward", "velocities")]
            count = str(len(good)) + (f" of {len(found)}" if len(good) < len(found) else "")
            lines.append(line(d, m, method, count, plus_minus(w1, error, 3), f"{ratio:.2f}", *costs))
    return "\n".join(lines)


def format_evidence(rows: list[dict[str, str]]) -> str:
    """Mean Z-hat / Z with its standard error, by method."""
    lines = []
    for method in dict.fromkeys(row["method"] for row in rows):
        ratios = [float(row["ratio"]) for row in rows if row["method"] == method]
        mean, error = mean_and_error(ratios)
        lines.append(f"{method}: mean Z-hat / Z {mean:.3f} ± {error:.3f} over {len(ratios)} seeds, "
                     f"{abs(mean - 1) / error:.1f} standard errors from 1")
    return "\n".join(lines)


def _parse_setting(text: str) -> tuple[int, int]:
    d, _, m = text.partition("-")
    if (int(d), int(m or 0)) not in SETTINGS:
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(f'{a}-{b}' for a, b in SETTINGS)}")
    return int(d), int(m)


def main(arguments: list[str] | None = None, say: Callable[[str], None] = print) -> None:
    """Fill the table, replicate by replicate, and print it as markdown."""
    command = parser("mixture_table", __doc__, replicates=20, particles=PARTICLES, threads=1)
    command.add_argument("output", type=Path, help="folder of table.csv and evidence.csv")
    command.add_argument("--settings", type=_parse_setting, nargs="+", default=list(SETTINGS), metavar="D-M")
    command.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    command.add_argument("--evidence-seeds", type=int, default=20,
                         help="number of runs on one problem for Z-hat / Z; 0 for none")
    options = command.parse_args(arguments)
    torch.set_num_threads(options.threads)
    methods = [name for name in options.methods if METHODS[name][0] in list_solvers()]
    for name in set(options.methods) - set(methods):
        say(f"skipped {name}: this solver is not installed")
    table, evidence = options.output / "table.csv", options.output / "evidence.csv"
    done = {(row["d"], row["m"], row["replicate"], row["method"]) for row in read_rows(table)}
    for replicate in range(options.replicates):
        for d, m in options.settings:
            for method in ("exact", *methods):
                if (str(d), str(m), str(replicate), method) not in done:
                    append_rows(table, [evaluate(d, m, replicate, method, particles=options.particles)], FIELDS)
    weighing = [name for name in ("noise-smc", "fmtt conjugate", "fmtt") if name in methods and options.evidence_seeds]
    for method in weighing:
        if method not in {row["method"] for row in read_rows(evidence)}:
            ratios = evidence_ratios(method, seeds=options.evidence_seeds, particles=options.particles)
            append_rows(evidence, [{"method": method, "seed": seed, "ratio": ratio} for seed, ratio in
                                   enumerate(ratios)], ("method", "seed", "ratio"))
    say(format_markdown(read_rows(table)))
    if weighing:
        say("\n" + format_evidence(read_rows(evidence)))


if __name__ == "__main__":
    main()
