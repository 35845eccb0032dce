"""Metrics: pure functions of samples and truth, image quality and distances between laws."""

from invflow.metrics.distances import (
    median_distance,
    mmd,
    mmd_root,
    sliced_wasserstein,
)
from invflow.metrics.quality import (
    central_interval,
    coverage,
    crps,
    energy_score,
    gaussian_crps,
    nlpd,
    psnr,
    spread,
    ssim,
)

__all__ = [
    "central_interval",
    "coverage",
    "crps",
    "energy_score",
    "gaussian_crps",
    "median_distance",
    "mmd",
    "mmd_root",
    "nlpd",
    "psnr",
    "sliced_wasserstein",
    "spread",
    "ssim",
]
