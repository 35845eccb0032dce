"""Law of the samples of a VFM for photographs: ``python -m benchmarks.tables.photo_law --data FOLDER``.

On crops of the validation photographs, it compares (truth - mean) with (sample - mean): spectra in eight bands,
correlations between colours and between neighbours, block means, the grid of 8 x 8 pixels, and how often a small
network tells patches of the two apart (:mod:`benchmarks.tables.residual_law`). It also prints CRPS, the energy score
of patches, and the coverage of 90% intervals of pixels and of block means. The factors of the standard deviations are
fitted to other crops of the same photographs.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.tables.photo_parts import TASKS, write_picture
from benchmarks.tables.residual_law import BANDS, SIDES, moments, told_apart
from invflow.evaluation.results.parts import derive_seed
from invflow.likelihood import GaussianLikelihood
from invflow.metrics import block_means, coverage, crps, patch_energy_score
from invflow.solvers.vfm import VFM
from invflow_problems.photos import PhotoCrops, find_photographs

__all__ = ["law", "main"]

CHUNK, KEPT, SHOWN = 16, 4, 2
MAIN = ("denoising", "random-inpainting", "super-resolution", "gaussian-blur", "motion-blur")


def law(vfm: VFM, images: Tensor, task: str, *, samples: int = 20, seed: int = 0,
        pictures: Path | None = None) -> tuple[dict[str, float], dict[str, float], dict[str, float]]:
    """Moments of the truths' and of the samples' residuals, and scores.

    Args:
        vfm: Solver.
        images: ``(n, 3, H, W)`` in [0, 1], not used in training; sides multiples of 16, at least 64.
        task: One of :data:`benchmarks.tables.photo_parts.TASKS`.
        samples: Samples of each posterior, at least 19, of which four are used for the moments and one is classified.
        seed: Seed of observations and samples.
        pictures: File for a sheet of the first two images: truth, mean, three samples, ten times the standard
            deviation; None: no sheet.
    """
    make, sigma = TASKS[task]
    g = torch.Generator().manual_seed(derive_seed(seed, "law", task))
    left: list[Tensor] = []
    drawn: list[Tensor] = []
    rows: list[Tensor] = []
    scores: dict[str, list[Tensor]] = {}
    for truth in images.split(CHUNK):
        operator = make((3, *truth.shape[2:]))  # type: ignore[arg-type]
        if task in ("random-inpainting", "motion-blur"):
            operator = operator.randomize(len(truth), g)
        likelihood = GaussianLikelihood(operator, operator.measure(truth, sigma, generator=g), sigma)
        posterior = vfm.sample(likelihood, samples, generator=g)
        x, mean = posterior.samples, posterior.mean()
        left.append(truth - mean)
        drawn.append(x[:, :KEPT] - mean[:, None])
        found = {"rmse": left[-1].square().flatten(1).mean(1).sqrt(), "CRPS": crps(x, truth).flatten(1).mean(1),
                 "patch energy": patch_energy_score(x, truth, size=7, stride=12), "coverage": _share(x, truth)}
        found |= {f"coverage {s}": _share(block_means(x, s), block_means(truth, s)) for s in SIDES[:2]}
        for name, values in found.items():
            scores.setdefault(name, []).append(values)
        for i in range(max(0, SHOWN - len(rows))):
            std = 10 * x[i].std(0)
            rows.append(torch.cat([truth[i], mean[i], *x[i, :3], std], 2))
    if pictures is not None:
        write_picture(torch.cat(rows, 1), pictures)
    own, others = torch.cat(left), torch.cat(drawn)
    kept = {name: float(torch.cat(values).mean()) for name, values in scores.items()}
    kept["told apart"] = told_apart(own, others[:, 0], seed)
    return moments(own), moments(others.flatten(0, 1)), kept


def _share(samples: Tensor, truth: Tensor) -> Tensor:
    return coverage(samples, truth).flatten(1).mean(1)


def markdown(found: dict[str, tuple[dict[str, float], dict[str, float], dict[str, float]]]) -> str:
    """Rows of quantities, columns of tasks: ratios of samples to truths, pairs of correlations, and scores."""
    first = next(iter(found.values()))
    lines = ["| | " + " | ".join(found) + " |", "|---|" + "---|" * len(found)]
    for name in first[0]:
        title, cells = name, []
        kind, _, number = name.partition(" ")
        if number and kind != "block":
            title = f"{kind} below {BANDS[int(number)]:.3g}, ratio"
        for truth, drawn, _ in found.values():
            ratio = bool(number)
            cells.append(f"{drawn[name] / truth[name]:.2f}" if ratio else f"{truth[name]:.2f}, {drawn[name]:.2f}")
        lines.append(f"| {title}{', ratio' if kind == 'block' else ''} | " + " | ".join(cells) + " |")
    for name in first[2]:
        lines.append(f"| {name} | " + " | ".join(f"{scores[name]:.4g}" for _, _, scores in found.values()) + " |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tables.photo_law", description=__doc__)
    parser.add_argument("--data", required=True, help="folder of photographs")
    parser.add_argument("--vfm", default="photos", help="name or folder of the VFM")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(MAIN))
    parser.add_argument("--crops", type=int, default=140, help="number of crops of the validation photographs")
    parser.add_argument("--size", type=int, default=96, help="side of a crop, a multiple of 16 from 64 on")
    parser.add_argument("--samples", type=int, default=20)
    parser.add_argument("--symmetries", type=int, help="symmetries to average the correction over: 1, 2, 4 or 8")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--pictures", type=Path, help="folder for sheets of truth, mean, samples, standard deviation")
    options = parser.parse_args(arguments)
    vfm = VFM.load(options.vfm)
    if options.symmetries is not None:
        vfm.adapter.symmetries = options.symmetries  # type: ignore[assignment]
    images = PhotoCrops(find_photographs(options.data, "validation"), options.size)(
        options.crops, torch.Generator().manual_seed(options.seed))
    if options.pictures is not None:
        options.pictures.mkdir(parents=True, exist_ok=True)
    found = {task: law(vfm, images, task, samples=options.samples, seed=options.seed,
                       pictures=options.pictures and options.pictures / f"{task}.png") for task in options.tasks}
    print(markdown(found))


if __name__ == "__main__":
    main()
