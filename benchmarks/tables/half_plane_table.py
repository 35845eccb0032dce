"""The table of the tilted ring: ``python -m benchmarks.tables.half_plane_table OUTPUT`` evaluates FMTT.

Each row is for one kind of weights and kernel, one look-ahead, one number of steps and one seed, with 4,000 particles.
It has the share with x_0 > 0, the mean reward, the log evidence, the effective sample size and the calls. Twisted
weights are compared with their own base sampler, tilted by importance weights. Renoising kernels and Jarzynski weights
are compared with the closed form. Without resampling, the table also has the unweighted share, as published (arXiv
2511.22688). Rows are written as they are computed, so a stopped run can be resumed.
"""

from __future__ import annotations

import functools
import itertools
import math
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.tables.shared import (
    Rows,
    append_rows,
    head,
    line,
    mean_and_error,
    parser,
    plus_minus,
    read_rows,
)
from invflow.reward import FunctionReward
from invflow.solvers.tilting.fmtt import FMTT
from invflow_problems.half_plane import left_penalty, ring_of_gaussians, tilted_expectations

__all__ = ["CONFIGURATIONS", "evaluate", "main"]

#: six steps of the jump (36 velocities) differ from the exact map by under a hundredth of a standard deviation
JUMP_STEPS = 6
LOOK_AHEADS = ("flow_map", "denoiser", "none")
#: settings of FMTT, by name
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "twisted": {},
    "twisted, renoise": {"kernel": "renoise"},
    "jarzynski": {"weights": "jarzynski"},
    "jarzynski, heun": {"weights": "jarzynski", "kernel": "heun"},
    "no resampling": {"weights": "jarzynski", "resample_threshold": 0.0},
}
FIELDS = ("configuration", "look_ahead", "steps", "seed", "share", "reward", "plain_share", "plain_reward",
          "log_evidence", "ess", "resamplings", "calls", "backward", "seconds")
BASE_DRAWS = 100_000


def _values(x: Tensor) -> Tensor:
    """Share of the right half-plane and reward, ``(n, 2)`` in float64."""
    return torch.stack([(x[:, 0] > 0).double(), left_penalty(x).double()], dim=1)


def evaluate(configuration: str, look_ahead: str, steps: int, seed: int, *, particles: int = 4000) -> dict[str, Any]:
    """One row: weighted and plain means of share and reward, and cost."""
    solver = FMTT(ring_of_gaussians(steps=JUMP_STEPS), steps=steps, look_ahead=look_ahead, chunk_size=10**6,
                  **CONFIGURATIONS[configuration])
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        posterior = solver.sample(FunctionReward(left_penalty), particles,
                                  generator=torch.Generator().manual_seed(1000 * seed + steps))
    values = _values(posterior.samples[0])
    weighted, plain = posterior.weights[0].double() @ values, values.mean(0)
    ess = posterior.ess()
    assert ess is not None and posterior.log_evidence is not None  # noqa: PT018
    return {"configuration": configuration, "look_ahead": look_ahead, "steps": steps, "seed": seed,
            "share": float(weighted[0]), "reward": float(weighted[1]), "plain_share": float(plain[0]),
            "plain_reward": float(plain[1]), "log_evidence": float(posterior.log_evidence),
            "ess": float(ess) / particles, "resamplings": int(posterior.diagnostics["resamplings"]),
            "calls": posterior.nfe.forward, "backward": posterior.nfe.backward, "seconds": time.perf_counter() - start}


@functools.cache
def base_values(steps: int) -> tuple[tuple[float, float], tuple[float, float]]:
    """Share and reward of the Euler-Maruyama base sampler's draws weighted by e^r, with standard errors."""
    solver = FMTT(ring_of_gaussians(steps=JUMP_STEPS), steps=steps, chunk_size=10**5)
    x = solver.prior_samples(BASE_DRAWS, generator=torch.Generator().manual_seed(steps))
    weights, values = left_penalty(x).double().softmax(0), _values(x)
    mean = weights @ values
    error = (weights.square()[:, None] * (values - mean).square()).sum(0).sqrt()
    return (float(mean[0]), float(mean[1])), (float(error[0]), float(error[1]))


def _distance(found: tuple[float, float], truth: float, error: float = 0.0) -> str:
    return f"{abs(found[0] - truth) / math.hypot(found[1], error):.1f}"


def format_markdown(rows: Rows) -> str:
    """Means over seeds with standard errors, and distances from the truths in standard errors."""
    exact = tilted_expectations()
    lines = [f"exact: share {exact['share x0 > 0']:.4f}, reward {exact['reward']:.4f}, log evidence "
             f"{exact['log evidence']:.4f}", "",
             head("weights", "look-ahead", "steps", "share", "reward", "from base", "from exact", "ESS", "calls")]
    plain = ["", "Without resampling and without weights:", "",
             head("look-ahead", "steps", "share", "reward", "ESS")]

    def mean(chosen: Rows, name: str) -> tuple[float, float]:
        return mean_and_error([float(row[name]) for row in chosen])

    for configuration, look_ahead, steps in dict.fromkeys(
            (row["configuration"], row["look_ahead"], row["steps"]) for row in rows):
        chosen = [row for row in rows
                  if (row["configuration"], row["look_ahead"], row["steps"]) == (configuration, look_ahead, steps)]
        share, reward, (ess, _), (calls, _) = (mean(chosen, name) for name in ("share", "reward", "ess", "calls"))
        from_base = ""
        if configuration == "twisted":  # the renoising kernel keeps the marginals of the mixture itself
            means, errors = base_values(int(steps))
            from_base = f"{_distance(share, means[0], errors[0])}, {_distance(reward, means[1], errors[1])}"
        from_exact = f"{_distance(share, exact['share x0 > 0'])}, {_distance(reward, exact['reward'])}"
        lines.append(line(configuration, look_ahead, steps, plus_minus(*share, 4), plus_minus(*reward, 4), from_base,
                          from_exact, f"{ess:.2f}", f"{calls:.0f}"))
        if configuration == "no resampling":
            percent, error = (100 * number for number in mean(chosen, "plain_share"))
            plain.append(line(look_ahead, steps, f"{plus_minus(percent, error, 1)}%",
                              plus_minus(*mean(chosen, "plain_reward"), 2), f"{ess:.2f}"))
    return "\n".join(lines + plain)


def main(arguments: list[str] | None = None, say: Callable[[str], None] = print) -> None:
    """Fill the table, seed by seed, and print it as markdown; distances are in standard errors."""
    command = parser("half_plane_table", __doc__, seeds=10, particles=4000, threads=1)
    command.add_argument("output", type=Path, help="folder of table.csv")
    command.add_argument("--steps", type=int, nargs="+", default=[10, 25, 100])
    command.add_argument("--configurations", nargs="+", choices=list(CONFIGURATIONS), default=list(CONFIGURATIONS))
    options = command.parse_args(arguments)
    torch.set_num_threads(options.threads)
    table = options.output / "table.csv"
    done = {(row["configuration"], row["look_ahead"], row["steps"], row["seed"]) for row in read_rows(table)}
    for seed in range(options.seeds):
        for configuration, steps, look_ahead in itertools.product(options.configurations, options.steps, LOOK_AHEADS):
            if (configuration, look_ahead, str(steps), str(seed)) not in done:
                row = evaluate(configuration, look_ahead, steps, seed, particles=options.particles)
                append_rows(table, [row], FIELDS)
    order = {name: i for i, name in enumerate(CONFIGURATIONS)}
    rows = read_rows(table)
    rows.sort(key=lambda row: (order[row["configuration"]], LOOK_AHEADS.index(row["look_ahead"]), int(row["steps"])))
    say(format_markdown(rows))


if __name__ == "__main__":
    main()
