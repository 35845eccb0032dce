"""Metrics of a posterior by name, for the summary of the command line, comparisons and tables."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from invflow._core.weighted import least_samples
from invflow.likelihood import GaussianLikelihood, Likelihood
from invflow.metrics import (
    block_means,
    classifier_features,
    coverage,
    coverage_near_ink,
    crps,
    energy_score,
    floor_ratio,
    highest_density_coverage,
    mean_gap,
    nlpd,
    patch_energy_score,
    psnr,
    sliced_wasserstein,
    ssim,
)
from invflow.posterior import Posterior
from invflow.reward import Reward, score

if TYPE_CHECKING:
    from invflow.problem import Problem

__all__ = ["LEVEL", "METRICS", "Metric", "expectations_of", "features_of", "measure"]

#: level of the intervals
LEVEL = 0.9
#: number of samples sorted at once
_VALUES_AT_A_TIME = 2**25

#: number of samples per observation whose features are stored
_MOST_FEATURES = 64


@dataclass(frozen=True)
class Metric:
    """Presentation of a metric.

    Attributes:
        title: Title of its column.
        better: ``"low"``, ``"high"``, the best value, or None if neither direction is better.
        note: Explanation in one line.
        group: Group of columns, ``"quality"`` or ``"honesty"``.
        needs: Requirements of this column.
    """

    title: str
    better: str | float | None
    note: str
    group: str = "quality"
    needs: str = ""

METRICS: dict[str, Metric] = {
    "crps": Metric("CRPS", "low", "continuous ranked probability score of each pixel, fair, mean over pixels",
                   needs="known truths and at least two samples"),
    "energy": Metric("energy score", "low", "energy score of the image, fair, Euclidean norm",
                     needs="known truths and at least two samples"),
    "patch_energy": Metric("patch energy score", "low", "energy score of patches of 7 x 7 pixels, fair, their mean",
                           needs="known truths that are images, and at least two samples"),
    "block_crps": Metric("CRPS of blocks", "low", "CRPS of means over 4 x 4 pixels, fair, mean over blocks",
                         needs="known truths that are images, and at least two samples"),
    "psnr": Metric("PSNR of mean", "high", "peak signal-to-noise ratio of the posterior mean, dB",
                   needs="known truths that are images"),
    "psnr_sample": Metric("PSNR of samples", "high", "peak signal-to-noise ratio of single samples, their mean, dB",
                          needs="known truths that are images"),
    "ssim": Metric("SSIM of mean", "high", "structural similarity of the posterior mean",
                   needs="known truths that are images of at least 11 x 11 pixels"),
    "rmse": Metric("RMSE of mean", "low", "root mean square error of the posterior mean",
                   needs="known truths that are not images (images have PSNR)"),
    "nlpd": Metric("NLPD", "low", "negative log predictive density of a second measurement, nats",
                   needs="a measurement of known truths"),
    "sliced_wasserstein": Metric("sliced W1", "low", "sliced Wasserstein distance to exact posterior draws",
                                 needs="a problem whose exact posterior is known"),
    "floor_ratio": Metric("W1 over floor", "low", "sliced Wasserstein distance to the exact posterior, divided by "
                          "that of as many exact draws; near 1 for exact draws",
                          needs="a problem whose exact posterior is known"),
    "mean_gap": Metric("gap of the mean", "low", "squared error of the mean over that of the mean of exact draws, dB",
                       needs="a problem whose exact posterior is known, and known truths"),
    "frechet": Metric("Frechet", "low", "Frechet distance to real images in features of a small classifier; no solver "
                      "is in bold, because the distance has no paired errors",
                      needs="a prior with a shipped classifier"),
    "reward": Metric("reward", None, "weighted mean of the reward", needs="a problem that tilts its prior by a reward"),
    "coverage": Metric("90% coverage", LEVEL, "share of the truth's pixels in the central 90% interval", "honesty",
                       needs="known truths, at least 19 effective samples, and more than one image as the answer"),
    "coverage_near_ink": Metric("90% coverage near ink", LEVEL, "the same share, over pixels within two of a pixel "
                                "above 0.1 in the truth", "honesty", needs="known truths that are images on black, and "
                                "at least 19 effective samples"),
    "density_coverage": Metric("90% by density", LEVEL, "share of truths in the highest-density region of 90%",
                               "honesty", needs="a problem whose posterior density is known, and known truths"),
    "certificate": Metric("certificate p", None, "smallest corrected p-value of the checks of calibration on these "
                          "observations; below 0.05 the checks reject the samples; few observations reveal only gross "
                          "errors", "honesty", needs="a problem whose exact posterior is known, and truths drawn from "
                          "its prior"),
    "residual": Metric("residual", 1.0, "root mean square of (y - A x) / sigma over samples; 1 for the truth",
                       "honesty", needs="a measurement with Gaussian noise"),
    "spread": Metric("spread", None, "root mean square over pixels of the posterior standard deviation", "honesty",
                     needs="at least two samples, and more than one image as the answer"),
    "ess": Metric("ESS", None, "effective sample size of the weights, in samples", "honesty",
                  needs="a solver with weights"),
    "k_hat": Metric("k-hat", None, "Pareto tail index of the weights; above 0.7 they cannot be trusted", "honesty",
                    needs="a solver with weights that estimates it"),
}


@torch.no_grad()
def measure(posterior: Posterior, reward: Reward | None = None, truth: Tensor | None = None, *,
            only: Collection[str] | None = None, problem: Problem | None = None,
            generator: torch.Generator | None = None, progress: bool = False) -> dict[str, Tensor]:
    """Compute metrics of a posterior.

    Args:
        posterior: Posterior of B observations.
        reward: Their likelihood, or the reward by which the problem tilts its prior.
        truth: Truths ``(B, *image_shape)``, if known.
        only: Names of :data:`METRICS` to compute; None for all that apply.
        problem: The problem that was solved, for its exact posterior and its own quantities.
        generator: Generator for second measurements, exact samples and directions. Use the same for every solver, so
            that it does not cause differences between them.
        progress: Whether to show a progress bar after two seconds.

    Returns:
        Some of :data:`METRICS` and the problem's own quantities by name, each ``(B,)`` in float64 on the CPU. Metrics
        that do not apply are left out.
    """
    rules: dict[str, Callable[[], Tensor]] = {}  # in the order in which they use the generator
    log_weights = posterior.log_weights if posterior.weighted else None
    if truth is not None:
        rules |= _against_truth(posterior, truth.to(posterior.samples), log_weights, generator, progress)
    if isinstance(reward, GaussianLikelihood):
        rules["residual"] = lambda: (_in_parts(reward.chi_square, posterior) * posterior.weights).sum(1).sqrt()
    if isinstance(reward, Likelihood) and truth is not None:
        rules["nlpd"] = lambda: nlpd(_in_parts(_again(reward, truth, generator), posterior), log_weights)
    if posterior.num_samples > 1 and not _is_point(posterior):
        rules["spread"] = lambda: posterior.std().nan_to_num(nan=0.0).square().flatten(1).mean(1).sqrt()
    found = {name: rule() for name, rule in rules.items() if only is None or name in only}
    if problem is not None and reward is not None:
        if not isinstance(reward, Likelihood):
            found |= expectations_of(posterior, reward, problem.quantities)
        found |= _against_exact(posterior, reward, truth, problem, generator)
    ess, k_hat = posterior.ess(), posterior.diagnostics.get("k_hat")
    if ess is not None:
        found["ess"] = ess
    if isinstance(k_hat, Tensor) and k_hat.shape == (len(posterior),) and not bool(k_hat.isnan().all()):
        found["k_hat"] = k_hat
    return {name: value.detach().double().cpu() for name, value in found.items() if only is None or name in only}


def expectations_of(posterior: Posterior, reward: Reward,
                    quantities: Mapping[str, Callable[[Tensor], Tensor]]) -> dict[str, Tensor]:
    """Weighted means ``(B,)`` of the reward and of functions of images ``(n, *image_shape)`` to ``(n,)``, by name."""
    weights, flat = posterior.weights.double(), posterior.samples.flatten(0, 1)
    found = {"reward": (weights * _in_parts(partial(score, reward), posterior).double()).sum(1)}
    for name, quantity in quantities.items():
        own = torch.cat([quantity(part) for part in flat.split(1024)]).view(weights.shape)
        found[name] = (weights * own.double()).sum(1)
    return found


def _in_parts(function: Callable[[Tensor], Tensor], posterior: Posterior) -> Tensor:
    """Apply a function from samples ``(B, n, *image_shape)`` to ``(B, n)`` to all samples, in chunks."""
    return torch.cat([function(part) for part in posterior.samples.split(256, dim=1)], dim=1)


def _again(likelihood: Likelihood, truth: Tensor, generator: torch.Generator | None) -> Likelihood:
    """The likelihood for a second measurement of the truth."""
    second = likelihood.select(slice(None))
    second.y = likelihood.simulate(truth.to(likelihood.y), generator)
    return second


def _is_point(posterior: Posterior) -> bool:
    """Whether all samples are copies of one image, which has neither a spread nor intervals."""
    return bool(posterior.diagnostics.get("point_estimate", False))


def _against_truth(posterior: Posterior, truth: Tensor, log_weights: Tensor | None, generator: torch.Generator | None,
                   progress: bool) -> dict[str, Callable[[], Tensor]]:
    """Metrics that compare with the truth, in the order in which they use the generator."""
    samples, count, picture = posterior.samples, posterior.num_samples, truth.ndim == 4
    rules: dict[str, Callable[[], Tensor]] = {}
    if count > 1:
        rules["crps"] = lambda: _by_pixels(crps, samples, truth, log_weights, progress)
        rules["energy"] = lambda: energy_score(samples, truth, log_weights, generator=generator)
    if count >= least_samples(LEVEL) and not _is_point(posterior):
        rules["coverage"] = lambda: _by_pixels(_covered, samples, truth, log_weights, progress)
        if picture:
            rules["coverage_near_ink"] = lambda: _covered(samples, truth, log_weights, coverage_near_ink)
    if not picture:  # its values are not in a range of length 1
        rules["rmse"] = lambda: (posterior.mean() - truth).square().flatten(1).mean(1).sqrt()
        return rules
    if count > 1 and min(truth.shape[2:]) >= 7:
        rules["patch_energy"] = lambda: patch_energy_score(samples, truth, log_weights, generator=generator)
        rules["block_crps"] = lambda: _by_pixels(crps, block_means(samples.flatten(0, 1)).unflatten(
            0, samples.shape[:2]), block_means(truth), log_weights, progress)
    rules["psnr"] = lambda: psnr(posterior.mean(), truth)
    rules["psnr_sample"] = lambda: (psnr(samples, truth) * posterior.weights).sum(1)
    if min(truth.shape[2:]) >= 11:
        rules["ssim"] = lambda: ssim(posterior.mean(), truth)
    return rules


def _covered(samples: Tensor, truth: Tensor, log_weights: Tensor | None,
             rule: Callable[..., Tensor] = coverage) -> Tensor:
    with warnings.catch_warnings():  # the requirements of the column already state this
        warnings.filterwarnings("ignore", "coverage: a level")
        return rule(samples, truth, LEVEL, log_weights).double()


def _by_pixels(rule: Callable[[Tensor, Tensor, Tensor | None], Tensor], samples: Tensor, truth: Tensor,
               log_weights: Tensor | None, progress: bool) -> Tensor:
    """Mean over pixels, ``(B,)``, in chunks of pixels, since sorting samples takes several times their memory."""
    from tqdm import tqdm

    samples, truth = samples.flatten(2), truth.flatten(1)
    size = max(1, _VALUES_AT_A_TIME // (samples.shape[0] * samples.shape[1]))
    parts = tqdm(list(zip(samples.split(size, 2), truth.split(size, 1), strict=True)), disable=not progress,
                 desc=rule.__name__.strip("_"), delay=2, leave=False)
    return torch.cat([rule(a, b, log_weights) for a, b in parts], dim=1).mean(1)


def _against_exact(posterior: Posterior, reward: Reward, truth: Tensor | None, problem: Problem,
                   generator: torch.Generator | None) -> dict[str, Tensor]:
    """Metrics that need an exact posterior: distance in units of its floor, gap of the mean, coverage by density."""
    samples, count = posterior.samples, posterior.num_samples
    log_weights = posterior.log_weights if posterior.weighted else None
    try:
        solver = problem.exact_posterior()
        exact = solver.sample(reward.to("cpu"), count, generator=generator).samples.to(samples)
    except (TypeError, ValueError):  # not known
        return {}
    found = {"sliced_wasserstein": sliced_wasserstein(samples, exact, log_weights=log_weights, num_projections=200,
                                                      generator=generator)}
    more = solver.sample(reward.to("cpu"), 2 * count, generator=generator).samples.to(samples)
    every = torch.cat([exact, more], dim=1)
    if count > 1:
        found["floor_ratio"] = floor_ratio(samples, every, log_weights, generator=generator)
    if truth is not None:
        found["mean_gap"] = mean_gap(samples, every, truth.to(samples), log_weights)
    log_prob = getattr(problem.prior, "log_prob", None)
    if truth is not None and log_prob is not None and isinstance(reward, Likelihood) and count >= least_samples(LEVEL):
        prior = problem.prior

        def log_density(x: Tensor) -> Tensor:  # (B, N, *image_shape) to (B, N), up to a constant
            states = prior.encode(x.to(prior.dtype).flatten(0, 1))
            own: Tensor = log_prob(states).unflatten(0, x.shape[:2])
            return own.double() + reward(x).double()

        with warnings.catch_warnings():  # too few effective samples give NaN, as for the other intervals
            warnings.simplefilter("ignore")
            found["density_coverage"] = highest_density_coverage(
                log_density(samples), log_density(truth.to(samples)[:, None])[:, 0], LEVEL, log_weights)
    return found


def features_of(posterior: Posterior, problem: Problem, generator: torch.Generator) -> Tensor | None:
    """Classifier features of equally weighted samples, ``(B, n, 128)``; None if there is no classifier for them."""
    from invflow._core.folders import shipped_names

    name = problem.prior_name
    if name is None or name not in shipped_names("classifier"):
        return None
    count = min(posterior.num_samples, _MOST_FEATURES)
    draws = posterior.resample(count, generator=generator)
    result: Tensor | None = classifier_features(draws.samples.flatten(0, 1), name).unflatten(0, (len(draws), count))
    return result
