"""Fit how strongly to correct samples: ``python -m benchmarks.release.fit_consistency VFM --data DIR --output VFM``.

For each problem class and noise level, the command finds the factor of the adapter's deviations for which corrected
samples of training images have the lowest energy score over patches. It writes the factors into the adapter's
``config.json``.
"""

from __future__ import annotations

import argparse

from invflow.datasets.sets import load_images
from invflow.solvers.vfm import VFM
from invflow.training.correction import fit_consistency
from invflow_problems.recipes.digits import image_problems

__all__ = ["main"]


def main() -> None:
    """Fit, print and store the factors."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("vfm", help="folder or name of a VFM")
    parser.add_argument("--data", required=True, help="folder of the data set; its last training images are used")
    parser.add_argument("--output", required=True, help="folder to write the VFM to")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--samples", type=int, default=8, help="number of samples of each posterior")
    parser.add_argument("--levels", type=int, default=3, help="number of noise levels of each class")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    vfm = VFM.load(arguments.vfm)
    images = load_images(arguments.data, split="train")[-arguments.images :]
    problems = [p for p in image_problems(vfm.prior.image_shape)
                if p.operator.problem_class in vfm.adapter.classes]
    fits = fit_consistency(vfm, images, problems, levels=arguments.levels, num_samples=arguments.samples,
                           seed=arguments.seed)
    print("| class | sigma | factor | gain in patch energy | noise in the mean |\n|---|---|---|---|---|")
    for fit in fits:
        print(f"| {fit.problem_class} | {fit.sigma:.3f} | {fit.factor} | {fit.gain:.3f} ± {fit.gain_error:.3f} "
              f"| {fit.leak:.3f} |")
    print(f"corrected by default: {', '.join(vfm.adapter.consistency) or 'none'}")
    vfm.save_pretrained(arguments.output)


if __name__ == "__main__":
    main()
