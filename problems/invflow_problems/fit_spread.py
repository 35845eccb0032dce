"""How wide a VFM should spread: ``python -m invflow_problems.fit_spread VFM --data DIR --output VFM``.

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
import math
from collections.abc import Sequence
from statistics import NormalDist

import torch
from torch import Tensor

from invflow.reward import GaussianLikelihood
from invflow.solvers.vfm import VFM
from invflow.spectral_adapter import SpectralAdapter
from invflow.training import TrainingProblem
from invflow_problems.cifar_recipes import cifar_problems
from invflow_problems.photos import PhotoCrops, find_photographs
from invflow_problems.recipes import photo_problems
from invflow_problems.samples import load_samples

__all__ = ["LEVEL", "main", "spread_factor", "spread_factors"]

LEVEL = 0.9


def spread_factor(scores: Tensor, level: float = LEVEL) -> float:
    """Factor of the deviations with which central Gaussian intervals hold a share ``level`` of a new group's errors.

    Their quantile at level (1 + 1/n), which keeps ``level`` on average over groups, n of them seen and one new
    (Lee, Barber and Willett 2023, "Distribution-free inference with hierarchical data").

    Args:
        scores: absolute errors over standard deviations, ``(n, ...)``: n independent groups of a size.
        level: of the intervals.

    Raises:
        ValueError: for so few groups that no factor would do.

    Example:
        >>> import torch
        >>> scores = torch.randn(100_000, generator=torch.Generator().manual_seed(0)).abs()
        >>> round(spread_factor(1.5 * scores), 2)
        1.5
    """
    groups = len(scores)
    share = level * (1 + 1 / max(groups, 1))
    if share >= 1:
        raise ValueError(f"{groups} crops cannot tell what holds {level:.0%} of another's pixels: pass at least "
                         f"{math.floor(level / (1 - level)) + 1}")
    ranked = scores.flatten().double().sort().values
    return float(ranked[math.ceil(share * len(ranked)) - 1]) / NormalDist().inv_cdf((1 + level) / 2)


def spread_factors(vfm: VFM, images: Tensor, problems: Sequence[TrainingProblem], *, num_samples: int = 32,
                   seed: int = 0) -> dict[str, float]:
    """The factor of each problem class, on top of those that the adapter has.

    Args:
        vfm: whose samples are Gaussian.
        images: ``(n, C, H, W)``, which nothing was trained on; each is observed once in each class.
        problems: classes, with their ranges of operators and noise levels.
        num_samples: of each posterior, for its mean and its standard deviation.
        seed: of all random numbers.
    """
    factors = {}
    for index, problem in enumerate(problems):
        g = torch.Generator().manual_seed(seed * 1000 + index)
        operator, sigma = problem.operator.randomize(len(images), g), problem.draw_sigma(len(images), g)
        y = operator.measure(images, sigma, generator=g)
        samples = vfm.sample(GaussianLikelihood(operator, y, sigma), num_samples, generator=g).samples
        # the mean of N samples misses the posterior's by a variance of 1/N of theirs
        error = (images - samples.mean(1)).abs() / (samples.std(1) * (1 + 1 / num_samples) ** 0.5)
        factors[str(problem.operator.problem_class)] = spread_factor(error)
    return factors


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
    known = adapter.spread
    found = spread_factors(vfm, images, problems, seed=arguments.seed)
    adapter.spread = {name: round(known.get(name, 1.0) * factor, 3) for name, factor in found.items()}
    for name, factor in adapter.spread.items():
        print(f"{name}: {factor}")
    vfm.save_pretrained(arguments.output)


if __name__ == "__main__":
    main()
