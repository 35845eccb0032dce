"""The checkerboard's table: ``python -m benchmarks.tables.board_table OUTPUT`` trains, evaluates, sweeps tau and alpha.

For comparison, two metrics have the form that they have in the code of the VFM paper (arXiv 2603.07276): the energy
score with its diagonal, and the root of the clamped unbiased MMD. The rest of the library uses the fair forms.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import torch

from benchmarks.tables.shared import append_rows, head, line, parser, read_rows
from invflow.problem import load_problem
from invflow.solvers.vfm import VFM
from invflow.training.recipe import Run
from invflow_problems.checkerboard import evaluate
from invflow_problems.recipes.digits import (
    BOARD_CONSOLIDATION,
    BOARD_PRETRAINING,
    BOARD_SETTINGS,
    board_prior,
    train_board,
)

COLUMNS = ("nlpd", "crps", "share", "mmd", "spread", "prior_share", "prior_mmd")


def main() -> None:
    """Train every configuration for every seed, and append each to ``OUTPUT/table.csv`` when it is done."""
    command = parser("board_table", __doc__, seeds=3)
    command.add_argument("output", type=Path)
    command.add_argument("--steps", type=int, default=BOARD_SETTINGS.steps, help="joint steps of the main run")
    command.add_argument("--sweep-steps", type=int, default=1500, help="joint steps of the frozen map and the sweeps")
    command.add_argument("--only-main", action="store_true", help="skip the frozen map and the sweeps")
    arguments = command.parse_args()
    plans: list[tuple[str, int, dict[str, float | bool]]] = [("joint", arguments.steps, {})]
    if not arguments.only_main:
        sweep = arguments.sweep_steps
        plans += [("frozen", sweep, {"frozen": True})]
        plans += [(f"tau={tau:g}", sweep, {"tau": tau}) for tau in (0.3, 0.5, 1.0, 2.0)]
        plans += [(f"alpha={alpha:g}", sweep, {"alpha": alpha}) for alpha in (0.2, 0.5, 0.8)]
    table = arguments.output / "table.csv"
    done = {(r["configuration"], int(r["seed"])) for r in read_rows(table)}
    for seed in range(arguments.seeds):
        for name, steps, changes in plans:
            if (name, seed) in done:
                continue
            settings = dataclasses.replace(BOARD_SETTINGS, steps=steps, seed=seed)
            pretrained = arguments.output / f"seed{seed}"
            folder = pretrained / name.replace("=", "")
            start = time.process_time()
            board_prior(dataclasses.replace(settings, steps=BOARD_PRETRAINING), Run(settings, pretrained))
            run = Run(settings, folder, prior=str(pretrained / "pretraining" / "prior"))
            vfm = train_board(run, consolidation=round(BOARD_CONSOLIDATION * steps / BOARD_SETTINGS.steps),
                              **changes)  # type: ignore[arg-type]
            # CPU time of this process; for the first configuration, it includes the pretraining
            seconds = round(time.process_time() - start)
            solvers = {name: vfm}
            if not changes:
                solvers["before the last stage"] = VFM.load(folder / "joint" / "vfm")
            for what, solver in solvers.items():
                for jumps in (1, 2, 4):
                    solver.steps = jumps
                    row = {"configuration": what, "seed": seed, "training_steps": steps, "jumps": jumps,
                           "cpu_seconds": seconds, **evaluate(solver)}
                    append_rows(table, [row], row)
    exact = load_problem("checkerboard").exact_posterior()
    summarise(table, evaluate(exact))


def summarise(table: Path, exact: dict[str, float]) -> None:
    """Print means and standard deviations over seeds as markdown, next to those of the exact posterior."""
    rows = read_rows(table)
    print(head("configuration", "jumps", "seeds", *COLUMNS))
    print(line("exact", "", 1, *(f"{exact[c]:.3f}" for c in COLUMNS)))
    for name, jumps in dict.fromkeys((r["configuration"], r["jumps"]) for r in rows):
        chosen = [r for r in rows if (r["configuration"], r["jumps"]) == (name, jumps)]
        values = torch.tensor([[float(r[c]) for c in COLUMNS] for r in chosen])
        deviation = values.std(dim=0) if len(chosen) > 1 else torch.zeros(len(COLUMNS))
        cells = [f"{m:.3f}" + (f" ± {d:.3f}" if len(chosen) > 1 else "")
                 for m, d in zip(values.mean(dim=0).tolist(), deviation.tolist())]
        print(line(name, jumps, len(chosen), *cells))


if __name__ == "__main__":
    main()
