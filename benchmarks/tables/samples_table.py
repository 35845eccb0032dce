"""Comparison of one-step VFMs on validation images: ``python -m benchmarks.tables.samples_table mnist mnist RUN``.

The table is for choosing weights and the correction. Each VFM is evaluated without correction, with its adapter's
correction, and on request with other factors, on the same observations of the first validation images. The gap to the
first row has the standard error of the paired difference. The last columns are the cost of the correction per sample.
"""

from __future__ import annotations

import copy
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.tables.image_table import TASKS, judge
from benchmarks.tables.shared import cell, head, line, mean_and_error, parser
from invflow.evaluation.summary import write_json
from invflow.likelihood import GaussianLikelihood
from invflow.nets.classifier import confident_share
from invflow.posterior import Posterior
from invflow.problem import load_problem
from invflow.solvers.vfm import VFM
from invflow.training.correction import noise_in_the_mean
from invflow.training.losses import patch_score

__all__ = ["main", "patch_energy"]

COLUMNS = (("crps", 4), ("patches", 4), ("psnr", 2), ("psnr_sample", 2), ("residual", 2), ("coverage", 3),
           ("coverage_near_ink", 3))


def patch_energy(samples: Tensor, truth: Tensor) -> Tensor:
    """Energy score over patches per pixel, ``(B,)``, of pairs of samples ``(B, N, C, H, W)``; omits an odd sample."""
    first, second = samples[:, 0:-1:2].flatten(0, 1), samples[:, 1::2].flatten(0, 1)
    pairs = patch_score(first, second, truth.repeat_interleave(samples.shape[1] // 2, 0))
    return pairs.view(len(truth), -1).mean(1) / truth[0].numel()


def row(posterior: Posterior, likelihood: GaussianLikelihood, truth: Tensor) -> dict[str, Tensor]:
    """Metrics for each observation, each ``(B,)``."""
    shown = [name for name, _ in COLUMNS]
    return {**judge(posterior, likelihood, truth, shown), "patches": patch_energy(posterior.samples, truth)}


def main() -> None:
    """Print the tables as markdown, and write them as JSON if requested."""
    command = parser("samples_table", __doc__, observations=60, samples=39, seed=0)
    command.add_argument("data", choices=["mnist", "fashion-mnist", "cifar10"])
    command.add_argument("vfms", nargs="+", help="names or folders of VFMs")
    command.add_argument("--factors", nargs="*", type=float, default=[], help="factors of the correction, a row each")
    command.add_argument("--tasks", nargs="*", default=TASKS, choices=TASKS)
    command.add_argument("--level", type=float, help="noise level, at least 0, in place of the problems' own")
    command.add_argument("--output", type=Path, help="JSON file to write")
    arguments = command.parse_args()
    results: dict[str, Any] = {}
    for task in arguments.tasks:
        g = torch.Generator().manual_seed(arguments.seed)
        problem = copy.copy(load_problem(f"{arguments.data}/{task}"))
        problem.sigma = problem.sigma if arguments.level is None else arguments.level
        truth, likelihood = problem.simulate(arguments.observations, generator=g, split="validation", shuffle=False)
        titles = head("VFM", "correction", "CRPS", "gap", "patch energy", "PSNR of the mean", "of a sample", "residual",
                      "90% coverage", "near ink", "noise in the mean", "operator applied", "CPU ms")
        print(f"\n{task}\n\n{titles}")
        first = None
        for name in arguments.vfms:
            able = VFM.load(name).adapter.deviations
            for consistency in (False, *((None, *arguments.factors) if able else ())):
                vfm = VFM.load(name, consistency=consistency)
                begun = time.process_time()
                posterior = vfm.sample(likelihood, arguments.samples,
                                       generator=torch.Generator().manual_seed(arguments.seed))
                spent = 1000 * (time.process_time() - begun) / (arguments.observations * arguments.samples)
                applied = posterior.diagnostics.get("consistency_steps", torch.zeros(1)).mean()
                found = row(posterior, likelihood, truth)
                first = found if first is None else first
                leak = noise_in_the_mean(likelihood, posterior.mean(), truth)
                cells = [cell(found[key], digits) for key, digits in COLUMNS]
                cells.insert(1, cell(found["crps"] - first["crps"], 4, "+"))
                label = {None: "fitted", False: "none"}.get(consistency, consistency)
                print(line(name, label, *cells, f"{leak:.3f}", f"{float(applied):.1f}", f"{spent:.2f}"), flush=True)
                results[f"{task}, {name}, {label}"] = {
                    **{key: mean_and_error(v) for key, v in found.items()}, "leak": leak, "applied": float(applied),
                    "cpu_ms": spent}
    print()
    for name in arguments.vfms:
        images = VFM.load(name).prior_samples(1000, generator=torch.Generator().manual_seed(arguments.seed))
        share = results[f"recognised, {name}"] = confident_share(images, arguments.data)
        print(f"{name}: {share:.3f} of 1,000 one-step unconditional samples recognised with over 0.9 confidence")
    if arguments.output:
        write_json(results, arguments.output)


if __name__ == "__main__":
    main()
