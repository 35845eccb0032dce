"""Metrics: pure functions of samples and truth.

Image quality and scores (:mod:`quality`, :mod:`regions`, :mod:`perceptual`), distances between laws (:mod:`distances`,
:mod:`two_sample`, :mod:`features`, :mod:`exactness`), calibration (:mod:`ranks`, :mod:`calibration`, :mod:`intervals`,
:mod:`highest_density`), and a check without a truth (:mod:`predictive`).

With log weights, each is the metric of the weighted law, which ignores samples of weight zero. With too few effective
samples it is NaN, with a warning.
"""

import inspect
import sys

from invflow._core.explained import explained
from invflow.metrics.calibration import (
    ChiSquare,
    CoverageCurve,
    MeanTest,
    SpreadSkill,
    contraction,
    coverage_curve,
    mean_test,
    random_pit,
    residual_chi_square,
    spread_skill,
    tarp_curve,
    tarp_ranks,
    z_scores,
)
from invflow.metrics.distances import (
    max_sliced_wasserstein,
    median_distance,
    mmd,
    mmd_root,
    sliced_wasserstein,
)
from invflow.metrics.exactness import floor_ratio, mean_gap
from invflow.metrics.features import (
    PrecisionRecall,
    classifier_features,
    frechet_distance,
    inception_features,
    precision_recall,
)
from invflow.metrics.highest_density import highest_density_coverage, highest_density_interval
from invflow.metrics.intervals import ConformalIntervals, central_interval, conformal_scale, coverage
from invflow.metrics.perceptual import lpips, vgg_features
from invflow.metrics.predictive import PredictiveCheck, predictive_check
from invflow.metrics.quality import (
    crps,
    energy_score,
    gaussian_crps,
    nlpd,
    psnr,
    spread,
    ssim,
)
from invflow.metrics.ranks import (
    RankTest,
    detectable_shift,
    detectable_spread,
    ecdf_band,
    holm,
    random_ranks,
    rank_power,
    rank_test,
)
from invflow.metrics.regions import block_means, coverage_near_ink, near_ink, patch_energy_score
from invflow.metrics.two_sample import C2ST, classifier_two_sample_test

__all__ = [
    "C2ST",
    "ChiSquare",
    "ConformalIntervals",
    "CoverageCurve",
    "MeanTest",
    "PrecisionRecall",
    "PredictiveCheck",
    "RankTest",
    "SpreadSkill",
    "block_means",
    "central_interval",
    "classifier_features",
    "classifier_two_sample_test",
    "conformal_scale",
    "contraction",
    "coverage",
    "coverage_curve",
    "coverage_near_ink",
    "crps",
    "detectable_shift",
    "detectable_spread",
    "ecdf_band",
    "energy_score",
    "floor_ratio",
    "frechet_distance",
    "gaussian_crps",
    "highest_density_coverage",
    "highest_density_interval",
    "holm",
    "inception_features",
    "lpips",
    "max_sliced_wasserstein",
    "mean_gap",
    "mean_test",
    "median_distance",
    "mmd",
    "mmd_root",
    "near_ink",
    "nlpd",
    "patch_energy_score",
    "precision_recall",
    "predictive_check",
    "psnr",
    "random_pit",
    "random_ranks",
    "rank_power",
    "rank_test",
    "residual_chi_square",
    "sliced_wasserstein",
    "spread",
    "spread_skill",
    "ssim",
    "tarp_curve",
    "tarp_ranks",
    "vgg_features",
    "z_scores",
]

# wrapped to accept NumPy arrays and to name an argument of the wrong kind; under both names, for pickles
for _name in __all__:
    _function = globals()[_name]
    if inspect.isfunction(_function):
        globals()[_name] = explained(_function, arrays=True)
        setattr(sys.modules[_function.__module__], _name, globals()[_name])
