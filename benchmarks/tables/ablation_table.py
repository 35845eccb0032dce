"""Effect of each part of the last stage: ``python -m benchmarks.tables.ablation_table mnist --data DIR --output DIR``.

Each variant is trained for a few steps, from the same VFM and on the same batches: the adapter alone by the CRPS of
pixels; map and adapter by the CRPS of pixels; both by the energy score over patches; both by the energy score over
patches of corrected samples. Each is evaluated on validation images in three ways: without the correction, with a
correction that may move all pixels equally, and with a correction by the adapter's deviations (those of the initial
VFM, except for the last variant, which trained its own). Such short training shows trends, not final results. A variant
that is already in the output folder is not trained again.
"""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.tables.image_table import TASKS
from benchmarks.tables.samples_table import row
from benchmarks.tables.shared import cell, head, line, mean_and_error, parser
from invflow.datasets.sets import load_images
from invflow.evaluation.summary import write_json
from invflow.likelihood import GaussianLikelihood
from invflow.linear.correction import measurement_noise
from invflow.posterior import Posterior
from invflow.problem import load_problem
from invflow.solvers.vfm import VFM
from invflow.training import LoopSettings, ObjectiveSettings, train_vfm
from invflow.training.correction import move_samples
from invflow_problems.recipes.digits import SAMPLES_OBJECTIVE, image_problems

__all__ = ["VARIANTS", "corrections", "main"]

BEGUN = "as it began"
#: changes to the objective of the last stage, by name; None: no training
VARIANTS: dict[str, dict[str, Any] | None] = {
    BEGUN: None,
    "adapter alone, CRPS": {"frozen": True, "joint": False, "patches": False, "consistency": False},
    "joint, CRPS": {"patches": False, "consistency": False},
    "joint, patches": {"consistency": False},
    "joint, patches, through the correction": {},
}
COLUMNS = (("crps", 4), ("patches", 4), ("psnr_sample", 2), ("residual", 2), ("coverage", 3), ("coverage_near_ink", 3))


def corrections(likelihood: GaussianLikelihood, samples: Tensor, deviation: Tensor, seed: int) -> dict[str, Tensor]:
    """The samples without correction, corrected with one variance for all pixels, and corrected by the deviations."""
    noise = measurement_noise(samples.shape[0] * samples.shape[1], tuple(likelihood.y.shape[1:]),
                              torch.Generator().manual_seed(seed))
    even = deviation.square().mean(tuple(range(1, deviation.ndim)), keepdim=True).sqrt().expand_as(deviation)
    return {"none": samples, "all pixels alike": move_samples(likelihood, samples, even, noise),
            "deviations": move_samples(likelihood, samples, deviation, noise)}


def main() -> None:
    """Train missing variants, print the tables as markdown, and write them as JSON."""
    command = parser("ablation_table", __doc__, steps=100, observations=60, samples=20, seed=0)
    command.add_argument("name", choices=["mnist", "fashion-mnist"],
                         help="name of the shipped VFM, or of the data set of --vfm")
    command.add_argument("--vfm", help="folder of a VFM with deviations, instead of the shipped one")
    command.add_argument("--data", required=True, help="folder of the data set")
    command.add_argument("--output", type=Path, required=True, help="folder for the trained variants and the table")
    command.add_argument("--tasks", nargs="+", default=["random-inpainting", "box-inpainting", "motion-blur"],
                        choices=TASKS)
    command.add_argument("--rows", type=int, default=9, help="rows of a batch for each problem")
    command.add_argument("--learning-rate", type=float, default=2e-4)
    arguments = command.parse_args()
    begun = VFM.load(arguments.vfm or arguments.name, consistency=False)
    tests = {task: load_problem(f"{arguments.name}/{task}") for task in arguments.tasks}
    classes = [str(problem.problem_class) for problem in tests.values()]
    problems = [p for p in image_problems(begun.prior.image_shape) if p.operator.problem_class in classes]
    settings = LoopSettings(arguments.steps, batch_size=arguments.rows * len(problems), warmup=10, ema=0.97,
                            learning_rate=arguments.learning_rate, seed=arguments.seed, log_every=10)
    images = load_images(arguments.data, split="train", dtype=torch.uint8)
    vfms: dict[str, VFM] = {}
    for label, changes in VARIANTS.items():
        vfms[label] = begun
        if changes is not None:
            objective: ObjectiveSettings = dataclasses.replace(SAMPLES_OBJECTIVE, **changes)
            adapter = copy.deepcopy(begun.adapter.grown([str(p.operator.problem_class) for p in problems], {}))
            adapter.consistency = {}  # trained and evaluated with a factor of 1
            trained = train_vfm(images, begun.prior, problems, settings,
                                arguments.output / label.replace(", ", "-").replace(" ", "-"), adapter=adapter,
                                objective=objective)
            vfms[label] = VFM(trained.prior, trained.adapter, consistency=False)
    results: dict[str, Any] = {}
    for task, problem in tests.items():
        truth, likelihood = problem.simulate(arguments.observations, split="validation", shuffle=False,
                                             generator=torch.Generator().manual_seed(arguments.seed))
        titles = head("trained", "corrected by", "CRPS", "gap", "patch energy", "PSNR of a sample", "residual",
                      "90% coverage", "near ink")
        print(f"\n{task}\n\n{titles}")
        first = None
        for label, vfm in vfms.items():
            samples = vfm.sample(likelihood, arguments.samples,
                                 generator=torch.Generator().manual_seed(arguments.seed)).samples
            own = VARIANTS[label] == {}
            deviation = (vfm if own else begun).adapter.proposal(likelihood).deviation
            assert deviation is not None
            for how, moved in corrections(likelihood, samples, deviation, arguments.seed).items():
                found = row(Posterior(moved), likelihood, truth)
                first = found if first is None else first
                cells = [cell(found[key], digits) for key, digits in COLUMNS]
                cells.insert(1, cell(found["crps"] - first["crps"], 4, "+"))
                print(line(label, how, *cells), flush=True)
                results[f"{task}, {label}, {how}"] = {key: mean_and_error(found[key]) for key, _ in COLUMNS}
    write_json(results, arguments.output / "ablation_table.json")


if __name__ == "__main__":
    main()
