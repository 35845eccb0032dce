"""Distance to the tilted law against the number of steps: ``python -m benchmarks.tables.step_sweep OUTPUT``.

FMTT runs with twisted weights on two rings, with each look-ahead: the flow map, the denoiser, and none. A row is one
replicate, with the sliced 2-Wasserstein distance of its particles to 10,000 exact draws. The rows ``exact`` are for
exact draws, as many as there are particles.

- ``mixture/half-plane``: eight Gaussians on a ring, tilted away from the left half plane;
- ``ring/wavy``: a thin ring, tilted to a curve of six arches, four times thinner than the distance between them.

A jump counts as one call, as for a learned map.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from benchmarks.tables.mixture_table import CountedMixture
from benchmarks.tables.shared import Rows, append_rows, head, line, parser, plus_minus, read_rows
from benchmarks.tables.tilting_parts import Replicated, choose, mean_and_std, sample_quietly
from invflow.metrics import sliced_wasserstein
from invflow.plugins import write_atomically, write_text
from invflow.solvers.tilting.fmtt import FMTT
from invflow_problems.half_plane import left_penalty, ring_of_gaussians, tilted_sample
from invflow_problems.ring import ring_wavy, wavy_reward, wavy_sample

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["LOOK_AHEADS", "STEPS", "figure", "main", "rows_of", "summary"]

STEPS = (50, 100, 200, 500)
LOOK_AHEADS = ("flow_map", "denoiser", "none")
FIELDS = ("problem", "look_ahead", "steps", "replicate", "w2", "ancestors", "forward", "backward")
REFERENCE = 10_000
#: a jump's error at four steps is far below the distances measured here
_JUMP_STEPS = 4


@dataclass(frozen=True)
class _Ring:
    """A prior, its reward, and exact draws of the tilted law."""

    prior: CountedMixture
    reward: Callable[[Tensor], Tensor]
    draw: Callable[[int, torch.Generator], Tensor]


def _ring(problem: str) -> _Ring:
    half = problem == "mixture/half-plane"
    mixture: Any = ring_of_gaussians() if half else ring_wavy.prior
    prior = CountedMixture(mixture.means, std=mixture.std, steps=_JUMP_STEPS)
    return _Ring(prior, left_penalty, tilted_sample) if half else _Ring(prior, wavy_reward, wavy_sample)


PROBLEMS = ("mixture/half-plane", "ring/wavy")


def rows_of(problem: str, look_ahead: str, steps: int, particles: int, replicates: int) -> list[dict[str, Any]]:
    """Rows of one cell.

    Args:
        problem: One of the two rings.
        look_ahead: Look-ahead of FMTT, or ``"exact"`` for exact draws.
        steps: Number of steps; 0 for exact draws.
        particles: Number of particles of each replicate.
        replicates: Number of replicates, which run as the observations of one call.
    """
    ring = _ring(problem)

    def exact(n: int, seed: int) -> Tensor:
        return ring.draw(n, torch.Generator().manual_seed(seed))

    reference, weights = exact(REFERENCE, 0)[None], None
    found: dict[str, Any] = {"forward": 0, "backward": 0}
    if look_ahead == "exact":
        samples, ancestors = torch.stack([exact(particles, 1 + k) for k in range(replicates)]), None
    else:
        posterior = sample_quietly(FMTT(ring.prior, steps=steps, look_ahead=look_ahead),
                                   Replicated(ring.reward, replicates), particles, seed=steps)
        samples, ancestors = posterior.samples, posterior.diagnostics["distinct_ancestors"]
        weights = posterior.log_weights if posterior.weighted else None
        found = {"forward": posterior.nfe.forward, "backward": posterior.nfe.backward}
    w2 = sliced_wasserstein(samples, reference.expand(replicates, -1, -1), 2, num_projections=100, log_weights=weights,
                            generator=torch.Generator().manual_seed(0))
    return [{"problem": problem, "look_ahead": look_ahead, "steps": steps, "replicate": k, "w2": float(w2[k]),
             "ancestors": "" if ancestors is None else int(ancestors[k]), **found} for k in range(replicates)]


def summary(rows: Rows) -> str:
    """Markdown: means and standard errors over replicates, and their ratio to the mean of exact draws."""
    lines = [head("problem", "look-ahead", "steps", "sliced W2", "over exact draws", "distinct ancestors", "calls")]
    for problem, look_ahead, steps in dict.fromkeys((r["problem"], r["look_ahead"], r["steps"]) for r in rows):
        own = choose(rows, problem=problem, look_ahead=look_ahead, steps=steps)
        mean, std = mean_and_std(own, "w2")
        exact = choose(rows, problem=problem, look_ahead="exact")
        floor, floor_std = mean_and_std(exact, "w2")
        ratio, ancestors, calls = "", "", "0"
        if look_ahead != "exact":
            relative = math.hypot(std / mean / math.sqrt(len(own)), floor_std / floor / math.sqrt(len(exact)))
            ratio = plus_minus(mean / floor, mean / floor * relative, 2)
            ancestors = f"{mean_and_std(own, 'ancestors')[0]:.0f}"
            calls = f"{float(own[0]['forward']):.0f} + {float(own[0]['backward']):.0f}"
        lines.append(line(problem, look_ahead.replace("_", " "), steps if int(steps) else "",
                          plus_minus(mean, std / math.sqrt(len(own)), 3), ratio, ancestors, calls))
    return "\n".join(lines)


def figure(rows: Rows) -> Figure:
    """Plot sliced W2 against steps, one panel per ring; bars are standard errors, the black line is for exact draws."""
    import matplotlib.pyplot as plt

    problems = list(dict.fromkeys(row["problem"] for row in rows))
    drawn, panels = plt.subplots(1, len(problems), figsize=(4.2 * len(problems), 3.2), layout="constrained",
                                 squeeze=False)
    for axes, problem in zip(panels[0], problems, strict=True):
        for look_ahead in LOOK_AHEADS:
            own = choose(rows, problem=problem, look_ahead=look_ahead)
            steps = sorted({int(row["steps"]) for row in own})
            cells = [choose(own, steps=count) for count in steps]
            found = [mean_and_std(cell, "w2") for cell in cells]
            axes.errorbar(steps, [mean for mean, _ in found],
                          [std / math.sqrt(len(cell)) if len(cell) > 1 else 0.0
                           for (_, std), cell in zip(found, cells, strict=True)],
                          marker="o", capsize=2, label=look_ahead.replace("_", " "))
        floor = mean_and_std(choose(rows, problem=problem, look_ahead="exact"), "w2")[0]
        axes.axhline(floor, color="black", linewidth=0.8, label="exact draws")
        axes.set(xscale="log", yscale="log", xlabel="steps", ylabel="sliced W2", title=problem)
        axes.set_xticks(steps, list(map(str, steps)))
        axes.minorticks_off()
    panels[0][0].legend(fontsize=8)
    return drawn


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    command = parser("step_sweep", "FMTT's distance to the tilted law against its steps, on two rings.",
                     particles=150, replicates=10)
    command.add_argument("output", type=Path,
                         help="folder for steps.csv, steps.md and steps.png; resumes a stopped run")
    command.add_argument("--problems", nargs="+", choices=PROBLEMS, default=list(PROBLEMS))
    command.add_argument("--steps", nargs="+", type=int, default=list(STEPS))
    options = command.parse_args(arguments)
    file = options.output / "steps.csv"
    for problem in options.problems:
        for look_ahead, steps in (("exact", 0), *((name, count) for name in LOOK_AHEADS for count in options.steps)):
            done = len(choose(read_rows(file), problem=problem, look_ahead=look_ahead, steps=steps))
            if done < options.replicates:
                rows = rows_of(problem, look_ahead, steps, options.particles, options.replicates)
                append_rows(file, rows[done:], FIELDS)
    order = ("exact", *LOOK_AHEADS)
    found = sorted(read_rows(file), key=lambda r: (r["problem"], order.index(r["look_ahead"]), int(r["steps"])))
    text = summary(found)
    write_text(options.output / "steps.md", text + "\n")
    drawn = figure(found)
    write_atomically(options.output / "steps.png", lambda path: drawn.savefig(path, format="png", dpi=110))
    print(text)


if __name__ == "__main__":
    main()
