"""How wide a VFM should spread: ``python -m benchmarks.release.fit_spread VFM --data DIR --output VFM``.

That is one whose samples are Gaussian, for photographs or CIFAR-10. An adapter that learned from few images, or not for
long, is surer of others than it should be. Images that it never saw say by how much: for each problem class the factor
of its standard deviations with which the pixels of a new crop, or a new small image, are to lie in their central 90%
intervals nine times in ten (split conformal prediction, Papadopoulos et al. 2002, with a pixel's error over its
deviation for a score). Pixels of a crop are no independent draws: what tells about the next crop is the number of
crops, not of pixels, and a crop that is yet to come counts as one beyond them all (hierarchical conformal prediction,
Lee, Barber and Willett 2023). That holds for crops of the same law; other people's images are of another. The factors
are written into the adapter's ``config.json``.
"""

from __future__ import annotations

import argparse

import torch

from invflow.models.spectral_adapter import SpectralAdapter
from invflow.solvers.vfm import VFM
from invflow.training.spread import spread_factors
from invflow_problems.photos import PhotoCrops, find_photographs
from invflow_problems.recipes.cifar import cifar_problems
from invflow_problems.recipes.digits import photo_problems
from invflow_problems.samples import load_samples

__all__ = ["main"]


def main() -> None:
    """Fit, print and store the factors."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("vfm", help="folder of a VFM, or its name")
    parser.add_argument("--data", required=True, help="folder of photographs; several joined by ':'. Or cifar10: the "
                        "shipped validation images")
    parser.add_argument("--output", required=True, help="folder to write the VFM to")
    parser.add_argument("--crops", type=int, default=32, help="of the validation photographs")
    parser.add_argument("--size", type=int, default=128, help="the side of a crop in pixels")
    parser.add_argument("--symmetries", type=int, help="over which the correction is averaged: 1, 2, 4 or 8")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    vfm = VFM.load(arguments.vfm)
    adapter = vfm.adapter
    if not isinstance(adapter, SpectralAdapter):
        raise ValueError(f"{arguments.vfm} has a {type(adapter).__name__}, whose samples are no Gaussians: only those "
                         "of a SpectralAdapter can be widened by a factor")
    if arguments.symmetries is not None:
        adapter.symmetries = arguments.symmetries
    if arguments.data == "cifar10":
        images, problems = load_samples("cifar10", "validation")[0], cifar_problems()
    else:
        images = PhotoCrops(find_photographs(arguments.data, "validation"), arguments.size)(
            arguments.crops, torch.Generator().manual_seed(arguments.seed))
        problems = photo_problems((3, arguments.size, arguments.size))
    problems = [problem for problem in problems if problem.operator.problem_class in adapter.classes]
    known = adapter.spread
    found = spread_factors(vfm, images, problems, seed=arguments.seed)
    adapter.spread = {name: round(known.get(name, 1.0) * factor, 3) for name, factor in found.items()}
    for name, factor in adapter.spread.items():
        print(f"{name}: {factor}")
    vfm.save_pretrained(arguments.output)


if __name__ == "__main__":
    main()
