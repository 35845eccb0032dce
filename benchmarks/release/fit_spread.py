"""Fit the spread of a VFM: ``python -m benchmarks.release.fit_spread VFM --data DIR --output VFM``.

The command applies to VFMs with Gaussian samples, for photographs or CIFAR-10. An adapter that was trained briefly, or
on few images, is overconfident on others. Held-out images show by how much. For each problem class, the command finds
the factor of the standard deviations with which central 90% intervals have 90% coverage over the pixels of a new crop,
or of a new small image. The method is split conformal prediction (Papadopoulos et al. 2002); its score is a pixel's
error divided by its standard deviation. The pixels of a crop are not independent draws: the number of crops, not of
pixels, determines the accuracy, and a new crop is treated as more extreme than all others (hierarchical conformal
prediction, Lee, Barber and Willett 2023). The guarantee holds for crops from the same distribution, not for other
people's images. The factors are written into the adapter's ``config.json``.

With ``--bands``, factors for each opponent colour and band of frequency are fitted first, with which the samples'
residuals have the power of the truths' (:func:`invflow.training.bands.band_factors`).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor

from invflow.linear.lapped import TRANSFORMS
from invflow.models.spectral_adapter import SpectralAdapter
from invflow.solvers.vfm import VFM
from invflow.training import TrainingProblem
from invflow.training.bands import band_factors
from invflow.training.spread import spread_factors
from invflow_problems.photos import PhotoCrops, find_photographs
from invflow_problems.recipes.cifar import cifar_problems
from invflow_problems.recipes.digits import photo_problems
from invflow_problems.samples import load_samples

__all__ = ["fit_bands", "main"]


def fit_bands(vfm: VFM, adapter: SpectralAdapter, images: Tensor, problems: Sequence[TrainingProblem],
              seed: int) -> None:
    """Fit and print the factors of bands; those of whole classes start again from 1."""
    adapter.spread, adapter.bands = {}, {}
    adapter.bands = band_factors(vfm, images, problems, seed=seed)
    for name, rows in adapter.bands.items():
        print(f"{name}, bands: " + "; ".join(" ".join(f"{value:g}" for value in row) for row in rows))


def main() -> None:
    """Fit, print and store the factors."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("vfm", help="folder or name of a VFM")
    parser.add_argument("--data", required=True, help="folder of photographs, or several joined by ':'; or cifar10, "
                        "for the shipped validation images")
    parser.add_argument("--output", required=True, help="folder to write the VFM to")
    parser.add_argument("--crops", type=int, default=32, help="number of crops of the validation photographs")
    parser.add_argument("--size", type=int, default=128, help="side of a crop in pixels")
    parser.add_argument("--symmetries", type=int,
                        help="number of symmetries to average the correction over: 1, 2, 4 or 8")
    parser.add_argument("--transform", choices=list(TRANSFORMS), help="transform in whose coefficients the samples are "
                        "independent; lapped leaves no grid of blocks")
    parser.add_argument("--bands", action="store_true", help="fit factors of bands of frequency first")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    vfm = VFM.load(arguments.vfm)
    adapter = vfm.adapter
    if not isinstance(adapter, SpectralAdapter):
        raise ValueError(f"{arguments.vfm} has a {type(adapter).__name__}, whose samples are not Gaussian: pass a VFM "
                         "with a SpectralAdapter")
    if arguments.symmetries is not None:
        adapter.symmetries = arguments.symmetries
    if arguments.transform is not None:
        adapter.transform = arguments.transform
    if arguments.data == "cifar10":
        images, problems = load_samples("cifar10", "validation")[0], cifar_problems()
    else:
        images = PhotoCrops(find_photographs(arguments.data, "validation"), arguments.size)(
            arguments.crops, torch.Generator().manual_seed(arguments.seed))
        problems = photo_problems((3, arguments.size, arguments.size))
    problems = [problem for problem in problems if problem.operator.problem_class in adapter.classes]
    if arguments.bands:
        fit_bands(vfm, adapter, images, problems, arguments.seed)
    known = adapter.spread
    found = spread_factors(vfm, images, problems, seed=arguments.seed)
    adapter.spread = {name: round(known.get(name, 1.0) * factor, 3) for name, factor in found.items()}
    for name, factor in adapter.spread.items():
        print(f"{name}: {factor}")
    vfm.save_pretrained(arguments.output)


if __name__ == "__main__":
    main()
