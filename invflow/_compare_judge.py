"""What a comparison measures of a posterior, observation by observation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from invflow.metrics import classifier_features, coverage, crps, energy_score, nlpd, psnr, sliced_wasserstein, ssim
from invflow.posterior import Posterior
from invflow.reward import GaussianLikelihood, Likelihood, Reward

if TYPE_CHECKING:
    from invflow.problem import Problem

__all__ = ["METRICS", "Metric", "features_of", "judge"]

LEVEL = 0.9
#: samples of an observation whose features are kept
_MOST_FEATURES = 64


@dataclass(frozen=True)
class Metric:
    """How a metric is shown.

    Attributes:
        title: of its column.
        better: ``"low"``, ``"high"``, a value that is best, or None where neither is better.
        note: one line of explanation.
    """

    title: str
    better: str | float | None
    note: str


METRICS: dict[str, Metric] = {
    "crps": Metric("CRPS", "low", "continuous ranked probability score of each pixel, fair, mean over pixels"),
    "energy": Metric("energy score", "low", "energy score of the image, fair, Euclidean norm"),
    "coverage": Metric("90% coverage", LEVEL, "share of the truth's pixels in the central 90% interval"),
    "psnr": Metric("PSNR of mean", "high", "peak signal-to-noise ratio of the posterior mean, dB"),
    "psnr_sample": Metric("PSNR of samples", "high", "mean over samples of their own peak signal-to-noise ratio, dB"),
    "ssim": Metric("SSIM of mean", "high", "structural similarity of the posterior mean"),
    "rmse": Metric("RMSE of mean", "low", "root mean squared error of the posterior mean"),
    "residual": Metric("residual", 1.0, "root mean square of (y - A x) / sigma over samples; 1 for the truth"),
    "nlpd": Metric("NLPD", "low", "negative log predictive density of a second measurement, nats"),
    "spread": Metric("spread", None, "root mean square over pixels of the posterior standard deviation"),
    "sliced_wasserstein": Metric("sliced W1", "low", "sliced Wasserstein distance to exact posterior draws"),
    "reward": Metric("reward", None, "weighted mean of the reward"),
    "ess": Metric("ESS", None, "effective sample size of the weights, in samples"),
    "k_hat": Metric("k-hat", None, "Pareto tail index of the weights; beyond 0.7 they cannot be trusted"),
    "frechet": Metric("Frechet", "low", "Frechet distance to real images in features of a small classifier"),
}


@torch.no_grad()
def judge(posterior: Posterior, reward: Reward, truth: Tensor | None, problem: Problem,
          generator: torch.Generator) -> dict[str, Tensor]:
    """Metrics of a posterior.

    Args:
        posterior: of B observations.
        reward: their likelihood, or the reward that the problem tilts its prior by.
        truth: ``(B, *image_shape)`` or None.
        problem: that was solved.
        generator: draws second measurements, exact samples and directions; the same for every solver, so that
            differences between solvers do not come from it.

    Returns:
        Some of :data:`METRICS` and the problem's own quantities by name, each ``(B,)`` in float64 on the CPU. What does
        not apply is left out.
    """
    samples = posterior.samples
    log_weights = posterior.log_weights if posterior.weighted else None
    found: dict[str, Tensor] = {}
    if truth is not None:
        found |= _against_truth(posterior, truth.to(samples), log_weights)
    if isinstance(reward, GaussianLikelihood):
        residual = torch.cat([reward.residual(part) for part in samples.split(256, dim=1)], dim=1)
        found["residual"] = (residual * posterior.weights).sum(1).sqrt()
    if isinstance(reward, Likelihood) and truth is not None:
        second: Any = reward.select(slice(None))
        second.y = reward.simulate(truth.to(reward.y), generator)
        density = torch.cat([second(part) for part in samples.split(256, dim=1)], dim=1)
        found["nlpd"] = nlpd(density, log_weights)
    if posterior.num_samples > 1 and not _is_point(posterior):
        found["spread"] = posterior.std().nan_to_num(nan=0.0).square().flatten(1).mean(1).sqrt()
    if problem.tilts:
        found |= _quantities(posterior, reward, problem)
    exact = _exact_samples(problem, reward, posterior, generator)
    if exact is not None:
        found["sliced_wasserstein"] = sliced_wasserstein(
            samples, exact.to(samples), log_weights=log_weights, num_projections=200, generator=generator)
    ess = posterior.ess()
    if ess is not None:
        found["ess"] = ess
    k_hat = posterior.diagnostics.get("k_hat")
    if isinstance(k_hat, Tensor) and k_hat.shape == (len(posterior),) and not bool(k_hat.isnan().all()):
        found["k_hat"] = k_hat
    return {name: value.detach().double().cpu() for name, value in found.items()}


def _is_point(posterior: Posterior) -> bool:
    """Whether all samples are copies of one image, which has neither a spread nor intervals."""
    return bool(posterior.diagnostics.get("point_estimate", False))


def _against_truth(posterior: Posterior, truth: Tensor, log_weights: Tensor | None) -> dict[str, Tensor]:
    samples, mean, count = posterior.samples, posterior.mean(), posterior.num_samples
    found = {}
    if count > 1:
        pieces = [crps(samples[b : b + 1], truth[b : b + 1], None if log_weights is None else log_weights[b : b + 1])
                  for b in range(len(truth))]  # one at a time: it sorts all samples of each pixel
        found["crps"] = torch.cat(pieces).flatten(1).mean(1)
        found["energy"] = energy_score(samples, truth, log_weights)
    if count >= math.ceil(2 / (1 - LEVEL) - 1 - 1e-9) and not _is_point(posterior):
        found["coverage"] = coverage(samples, truth, LEVEL, log_weights).double().flatten(1).mean(1)
    if truth.ndim == 4:
        found["psnr"] = psnr(mean, truth)
        found["psnr_sample"] = (psnr(samples, truth) * posterior.weights).sum(1)
        if min(truth.shape[2:]) >= 11:
            found["ssim"] = ssim(mean, truth)
    else:  # no picture, so its values have no range of 1
        found["rmse"] = (mean - truth).square().flatten(1).mean(1).sqrt()
    return found


def _quantities(posterior: Posterior, reward: Reward, problem: Problem) -> dict[str, Tensor]:
    """Weighted means of the reward and of the problem's own quantities."""
    weights, flat = posterior.weights.double(), posterior.samples.flatten(0, 1)
    values = torch.cat([reward(part) for part in posterior.samples.split(1024, dim=1)], dim=1)
    found = {"reward": (weights * values.double()).sum(1)}
    for name, quantity in problem.quantities.items():
        own = torch.cat([quantity(part) for part in flat.split(1024)]).view(weights.shape)
        found[name] = (weights * own.double()).sum(1)
    return found


def _exact_samples(problem: Problem, reward: Reward, posterior: Posterior,
                   generator: torch.Generator) -> Tensor | None:
    """As many draws of the exact posterior, where it is known."""
    try:
        solver = problem.exact_posterior()
        return solver.sample(reward.to("cpu"), posterior.num_samples, generator=generator).samples
    except (TypeError, ValueError):
        return None


def features_of(posterior: Posterior, problem: Problem, generator: torch.Generator) -> Tensor | None:
    """Classifier features of equally weighted samples, ``(B, n, 128)``; None where there is no classifier for them."""
    from invflow.pretrained import shipped_names

    name = problem.prior_name
    if name is None or name not in shipped_names("classifier"):
        return None
    count = min(posterior.num_samples, _MOST_FEATURES)
    draws = posterior.resample(count, generator=generator)
    return classifier_features(draws.samples.flatten(0, 1), name).unflatten(0, (len(draws), count))
