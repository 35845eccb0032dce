"""The image problems' table: ``python -m invflow_problems.image_table mnist`` judges a shipped VFM on the test images.

Beside it stand the pseudo-inverse of the measurement and the linear minimum-mean-square-error estimate fitted to the
training images (:class:`invflow.LinearMMSE`), with its Gaussian. The test images were never trained on.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from invflow.metrics import coverage, crps, psnr
from invflow.nets.classifier import confident_share
from invflow.neural import load_prior
from invflow.posterior import Posterior
from invflow.problem import Problem, load_problem
from invflow.report import write_json
from invflow.reward import GaussianLikelihood
from invflow.solvers.base import Solver
from invflow.solvers.lmmse import LinearMMSE
from invflow.solvers.vfm import VFM

__all__ = ["TASKS", "evaluate", "main"]

TASKS = ("denoising", "random-inpainting", "box-inpainting", "super-resolution", "gaussian-blur", "motion-blur")


def standard_error(values: Tensor) -> float:
    """Standard error of a mean over observations."""
    return float(values.std() / math.sqrt(len(values)))


def judge(posterior: Posterior, likelihood: GaussianLikelihood, truth: Tensor) -> dict[str, Tensor]:
    """Metrics for each observation, each ``(B,)``."""
    hidden = likelihood.operator.observed()
    spread = posterior.std().flatten(1)
    quiet = torch.ones_like(spread, dtype=torch.bool) if hidden is None else ~hidden.flatten(1).expand_as(spread)
    return {
        "psnr": psnr(posterior.mean(), truth),
        "crps": crps(posterior.samples, truth, posterior.log_weights).flatten(1).mean(dim=1),
        "coverage": coverage(posterior.samples, truth, 0.9, posterior.log_weights).float().flatten(1).mean(dim=1),
        "residual": likelihood.residual(posterior.samples).mean(dim=1).sqrt(),
        "spread": (spread.square() * quiet).sum(dim=1).div(quiet.sum(dim=1).clamp(min=1)).sqrt(),
    }


def evaluate(problem: Problem, solvers: dict[str, Solver], *, num_observations: int, num_samples: int,
             seed: int) -> dict[str, Any]:
    """Judge solvers on the same observations of the first test images.

    Returns:
        For each solver its metrics: means, standard errors, calls for each sample and seconds; ``pseudo-inverse``
        has its PSNR alone.
    """
    g = torch.Generator().manual_seed(seed)
    truth, likelihood = problem.simulate(num_observations, generator=g, shuffle=False)
    rough = psnr(likelihood.operator.pseudo_inverse(likelihood.y), truth)
    table: dict[str, Any] = {"pseudo-inverse": {"psnr": [float(rough.mean()), standard_error(rough)]}}
    for name, solver in solvers.items():
        posterior = solver.sample(likelihood, num_samples, generator=torch.Generator().manual_seed(seed), progress=True)
        columns = judge(posterior, likelihood, truth)
        table[name] = {key: [float(value.mean()), standard_error(value)] for key, value in columns.items()}
        table[name] |= {"calls": posterior.nfe.forward, "seconds": posterior.seconds}
    return table


def main() -> None:
    """Print the table as markdown and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", choices=["mnist", "fashion-mnist"])
    parser.add_argument("--observations", type=int, default=100)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 4], help="jumps of the VFM, each a row")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vfm", help="folder of a VFM in place of the shipped one")
    parser.add_argument("--prior", help="folder of a prior in place of the shipped one")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    name = arguments.vfm or arguments.data
    solvers: dict[str, Solver] = {"LMMSE": LinearMMSE.load(arguments.data)}
    solvers |= {f"VFM, {k} step{'s' * (k > 1)}": VFM.load(name, steps=k) for k in arguments.steps}
    results: dict[str, Any] = {}
    print("| problem | solver | PSNR of the mean | CRPS | 90% coverage | residual | spread | calls | seconds |")
    print("|" + "---|" * 9)
    for task in TASKS:
        problem = load_problem(f"{arguments.data}/{task}")
        results[task] = evaluate(problem, solvers, num_observations=arguments.observations,
                                 num_samples=arguments.samples, seed=arguments.seed)
        for solver, row in results[task].items():
            cells = [f"{row[k][0]:.{d}f} ± {row[k][1]:.{d}f}" if k in row else ""
                     for k, d in (("psnr", 2), ("crps", 4), ("coverage", 3), ("residual", 2), ("spread", 3))]
            cells += [f"{row['calls']:.2f}", f"{row['seconds']:.1f}"] if "calls" in row else ["", ""]
            print(f"| {task} | {solver} | " + " | ".join(cells) + " |", flush=True)
    prior = load_prior(arguments.prior or arguments.data)
    for label, maker in (("prior", prior), ("map of the VFM", VFM.load(name).prior)):
        for steps in (1, 2, 4):
            images = maker.generate(1000, steps, generator=torch.Generator().manual_seed(arguments.seed))
            share = confident_share(images, arguments.data)
            results[f"{label}, {steps}"] = share
            print(f"{label}, {steps} step{'s' * (steps > 1)}: {share:.3f} recognised with over 0.9 confidence")
    if arguments.output:
        write_json(results, arguments.output)


if __name__ == "__main__":
    main()
