"""Fit the linear estimate, a baseline for learned priors: ``python -m benchmarks.release.fit_lmmse NAME``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from invflow.datasets.sets import load_images
from invflow.metrics import psnr
from invflow.plugins import SHIPPED, write_text
from invflow.problem import list_problems
from invflow.solvers.baselines.lmmse import LinearMMSE
from invflow_problems.samples import NAMES

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Fit on the training file, store in half precision, and write the card."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.release.fit_lmmse", description=__doc__)
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("data", nargs="?", help="folder of the official files; default: download them")
    parser.add_argument("--output", type=Path, help="output folder; default: where the library looks for the estimate")
    options = parser.parse_args(arguments)
    if options.name == "cifar10" and not options.output:
        parser.error("the covariance of 3,072 values takes 9.4 MB, too large to ship with the library: pass --output "
                     "FOLDER, and later pass that folder to LinearMMSE.load or image_table --lmmse")
    images = load_images(options.data or options.name, "train", dtype=torch.uint8)
    output = options.output or SHIPPED / f"{options.name}-lmmse"
    solver = LinearMMSE.fit(images)
    solver.save_pretrained(output, torch.float16, images=len(images))
    card = describe(options.name, solver, LinearMMSE.load(output), len(images))
    write_text(output / "README.md", card)
    print(card)


def describe(name: str, fitted: LinearMMSE, stored: LinearMMSE, count: int) -> str:
    """The card, with the error of the estimate on each problem before and after rounding."""
    rows, number = [], 24 if fitted.mean.numel() < 1000 else 4  # each mask or kernel needs a dense solve
    for problem_name, problem in list_problems().items():
        if problem_name.startswith(f"{name}/"):
            generator = torch.Generator().manual_seed(0)
            truth, likelihood = problem.simulate(number, generator=generator, split="validation", shuffle=False)
            means = [solver.sample(likelihood, 1, generator=generator).diagnostics["mean"]
                     for solver in (fitted, stored)]
            exact, rounded = (float(psnr(mean, truth).mean()) for mean in means)
            rows.append(f"| {problem_name} | {exact:.2f} | {rounded - exact:+.4f} |")
    table = "\n".join(rows)
    return f"""# Linear estimate for {name}

Mean and covariance of the {count:,} images of the official training file, for
`invflow.LinearMMSE.load`. The file stores a triangular factor of the covariance in half precision.

| problem, {number} validation images | PSNR of the mean, dB | change by rounding, dB |
|---|---|---|
{table}

Command:

    python -m benchmarks.release.fit_lmmse {name} FOLDER
"""


if __name__ == "__main__":
    main()
