"""The short table of a posterior: how good, how faithful to the measurement, at what cost."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from invflow._core.records import write_atomically
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

__all__ = ["COLLAPSED", "features_of", "format_table", "is_collapsed", "judge", "Metric", "METRICS", "summarise",
           "summarise_tilted", "write_json"]

#: effective samples under which weights have collapsed
COLLAPSED = 10

_COLUMNS = {
    "psnr": ("PSNR", "{:.2f}"), "rmse": ("RMSE", "{:.3f}"), "ssim": ("SSIM", "{:.3f}"),
    "crps": ("CRPS", "{:.4f}"), "residual": ("residual", "{:.2f}"), "std": ("std. dev.", "{:.4f}"),
    "ess": ("ESS", "{:.0f}"),
}
_MARK = "*"
_NOTES = {
    "psnr": "PSNR (dB) and SSIM of the posterior mean",
    "crps": "CRPS of the samples, mean over pixels; lower is better",
    "residual": "residual: root mean square of (y - A x) / sigma over the samples; near 1 for a good fit",
}


def is_collapsed(ess: Sequence[float], samples: int) -> bool:
    """Whether weights have collapsed: under ten effective samples in half of the observations or more.

    What is left of such a row are the numbers of a few samples: it is marked, and never called best. Fewer than twenty
    samples have collapsed where under half of them are effective.

    Args:
        ess: effective sample size of each observation; empty for a solver without weights.
        samples: N, of each observation.
    """
    few = [value < min(COLLAPSED, samples / 2) for value in ess]
    return bool(few) and 2 * sum(few) >= len(few)


@torch.no_grad()
def summarise(posterior: Posterior, likelihood: Reward | None = None,
              truth: Tensor | None = None, progress: bool = False) -> dict[str, Any]:
    """Numbers that judge a posterior.

    Args:
        posterior: of B observations.
        likelihood: of its observations; a :class:`~invflow.GaussianLikelihood` gives the residual.
        truth: ``(B, *image_shape)``, where it is known.
        progress: show a progress bar if it takes over two seconds.

    Returns:
        ``per_observation``, lists of B numbers by name, and ``mean``, their means: ``psnr`` (dB) and ``ssim``
        of the posterior mean (``rmse`` where images are no pictures), ``crps`` of the samples, mean over
        pixels, ``residual``, root mean square over samples and observed entries in units of sigma, ``std``,
        root mean square of the posterior standard deviation, ``ess`` in particles. What does not apply is
        left out. Besides, ``standard_error``, those of the means (none of one observation), ``calls_per_sample``,
        ``seconds``, the numbers of ``observations`` and ``samples``.
    """
    columns: dict[str, Tensor] = {}
    if truth is not None:
        truth, mean = truth.to(posterior.samples), posterior.mean()
        if truth.ndim == 4:
            columns["psnr"] = psnr(mean, truth)
        else:  # no picture, so its values have no range of 1
            columns["rmse"] = (mean - truth).square().flatten(1).mean(1).sqrt()
        if truth.ndim == 4 and min(truth.shape[2:]) >= 11:
            columns["ssim"] = ssim(mean, truth)
        if posterior.num_samples > 1:
            columns["crps"] = _crps(posterior, truth, progress)
    if isinstance(likelihood, GaussianLikelihood):
        columns["residual"] = _residual(posterior, likelihood)
    return _summary(columns, posterior)


@torch.no_grad()
def summarise_tilted(posterior: Posterior, reward: Reward, quantities: Mapping[str, Callable[[Tensor], Tensor]] = {},
                     expectations: Mapping[str, float] = {}) -> dict[str, Any]:
    """Numbers that judge samples of a prior tilted by a reward.

    Args:
        posterior: of B repeats, with or without weights.
        reward: of these repeats.
        quantities: functions of images ``(n, *image_shape)`` to ``(n,)`` by name.
        expectations: their known means under the tilted law, and that of ``"reward"``, by name.

    Returns:
        As :func:`summarise`: weighted means of the ``reward`` and of each quantity, ``std``, ``ess``, and the
        ``log evidence`` where the solver gives it; besides, ``expected``, the known means.
    """
    weights, x = posterior.weights.double(), posterior.samples
    columns = {"reward": (weights * score(reward, x)).sum(1)}
    for name, quantity in quantities.items():
        values = torch.cat([quantity(part) for part in x.flatten(0, 1).split(1024)])
        columns[name] = (weights * values.view(weights.shape)).sum(1)
    if posterior.log_evidence is not None:
        columns["log evidence"] = posterior.log_evidence
    return {**_summary(columns, posterior), "expected": {k: v for k, v in expectations.items() if k in columns}}


def _summary(columns: dict[str, Tensor], posterior: Posterior) -> dict[str, Any]:
    if posterior.num_samples > 1:
        columns["std"] = posterior.std().square().flatten(1).mean(1).sqrt()
    ess = posterior.ess()
    if ess is not None:
        columns["ess"] = ess
    return {
        "per_observation": {key: value.tolist() for key, value in columns.items()},
        "mean": {key: float(value.double().mean()) for key, value in columns.items()},
        "standard_error": {key: float(value.double().std() / math.sqrt(len(value))) for key, value in columns.items()
                           if len(value) > 1},
        "calls_per_sample": {"forward": posterior.nfe.forward, "backward": posterior.nfe.backward},
        "seconds": posterior.seconds,
        "observations": len(posterior),
        "samples": posterior.num_samples,
    }


def _crps(posterior: Posterior, truth: Tensor, progress: bool) -> Tensor:
    """Mean CRPS over pixels, ``(B,)``, one observation at a time: it sorts all particles of each pixel."""
    from tqdm import tqdm

    scores = []
    for b in tqdm(range(len(posterior)), disable=not progress, desc="CRPS", delay=2, leave=False):
        rows = slice(b, b + 1)
        log_weights = posterior.log_weights[rows] if posterior.weighted else None
        scores.append(crps(posterior.samples[rows], truth[rows], log_weights).mean())
    return torch.stack(scores)


def _residual(posterior: Posterior, likelihood: GaussianLikelihood) -> Tensor:
    """Root mean square residual ``(B,)`` in units of sigma, in pieces of the particles."""
    square = torch.zeros(len(posterior), dtype=posterior.samples.dtype, device=posterior.samples.device)
    pieces = zip(posterior.samples.split(256, dim=1), posterior.weights.split(256, dim=1), strict=True)
    for samples, weights in pieces:
        square += (likelihood.chi_square(samples) * weights).sum(1)
    return square.sqrt()


def format_table(summary: dict[str, Any], rows: int = 8) -> str:
    """The table of :func:`summarise`, as text.

    Args:
        summary: from :func:`summarise`.
        rows: observations listed, at most; the last lines are the mean over all of them and its
            standard error.

    Returns:
        A few lines without a final line break.
    """
    found, count, expected = summary["per_observation"], summary["observations"], summary.get("expected")
    ess, samples = found.get("ess", []), summary["samples"]
    collapsed = is_collapsed(ess, samples)
    marks = [f" {_MARK}" if is_collapsed([value], samples) else "" for value in ess] or [""] * count
    # quantities of a problem's own come first
    names = [*(name for name in found if name not in _COLUMNS), *(name for name in _COLUMNS if name in found)]

    def row(first: str, values: dict[str, float]) -> list[str]:
        return [first, *(_COLUMNS.get(n, (n, "{:.4f}"))[1].format(values[n]) if n in values else "" for n in names)]

    cells = [["observation" if expected is None else "repeat", *(_COLUMNS.get(n, (n, ""))[0] for n in names)]]
    for b in range(min(rows, count) if count > 1 else 0):
        cells.append(row(f"{b + 1}{marks[b]}", {n: found[n][b] for n in names}))
    if count > rows:
        cells.append(row("...", {}))
    cells.append(row(("mean" if count > 1 else "1") + (f" {_MARK}" if collapsed else ""), summary["mean"]))
    if summary.get("standard_error"):
        cells.append(row("standard error", summary["standard_error"]))
    if expected:
        cells.append(row("exact", expected))
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in cells]
    calls = summary["calls_per_sample"]
    lines += ["", f"{summary['samples']} samples for each {cells[0][0]}; network calls per sample: "
              f"{calls['forward']:.3g} forward, {calls['backward']:.3g} backward; {summary['seconds']:.2f} s"]
    if any(marks[:rows]) or collapsed:
        lines.append(f"{_MARK} collapsed: under {COLLAPSED} effective samples ({sum(map(bool, marks))} of {count}); "
                     "these numbers are those of a few samples")
    return "\n".join(lines + [note for name, note in _NOTES.items() if name in names])


def write_json(value: Any, path: Path) -> None:
    """Write JSON, whole or not at all; numbers that are not finite, which JSON does not have, become null."""
    text = json.dumps(_finite(value), indent=2) + "\n"
    write_atomically(path, lambda name: Path(name).write_text(text, encoding="utf-8"))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

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
        group: of columns, ``"quality"`` or ``"honesty"``.
        needs: what a comparison must have for this column.
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
    "psnr_sample": Metric("PSNR of samples", "high", "mean over samples of their own peak signal-to-noise ratio, dB",
                          needs="known truths that are images"),
    "ssim": Metric("SSIM of mean", "high", "structural similarity of the posterior mean",
                   needs="known truths that are images of at least 11 x 11 pixels"),
    "rmse": Metric("RMSE of mean", "low", "root mean square error of the posterior mean",
                   needs="known truths that are not images (images have PSNR)"),
    "nlpd": Metric("NLPD", "low", "negative log predictive density of a second measurement, nats",
                   needs="a measurement of known truths"),
    "sliced_wasserstein": Metric("sliced W1", "low", "sliced Wasserstein distance to exact posterior draws",
                                 needs="a problem whose exact posterior is known"),
    "floor_ratio": Metric("W1 over floor", "low", "sliced Wasserstein distance to the exact posterior, in units of "
                          "what as many exact draws reach; 1 is as good as exact",
                          needs="a problem whose exact posterior is known"),
    "mean_gap": Metric("gap of the mean", "low", "squared error of the mean over that of the mean of exact draws, dB",
                       needs="a problem whose exact posterior is known, and known truths"),
    "frechet": Metric("Frechet", "low", "Frechet distance to real images in features of a small classifier; it has no "
                      "paired errors, so that no solver is in bold", needs="a prior with a shipped classifier"),
    "reward": Metric("reward", None, "weighted mean of the reward", needs="a problem that tilts its prior by a reward"),
    "coverage": Metric("90% coverage", LEVEL, "share of the truth's pixels in the central 90% interval", "honesty",
                       needs="known truths, at least 19 effective samples, and more than one image as the answer"),
    "coverage_near_ink": Metric("90% coverage near ink", LEVEL, "the same share, of pixels within two of one above 0.1 "
                                "in the truth", "honesty", needs="known truths that are images on black, and at least "
                                "19 effective samples"),
    "density_coverage": Metric("90% by density", LEVEL, "share of truths in the highest-density region of 90%",
                               "honesty", needs="a problem whose posterior density is known, and known truths"),
    "residual": Metric("residual", 1.0, "root mean square of (y - A x) / sigma over samples; 1 for the truth",
                       "honesty", needs="a measurement with Gaussian noise"),
    "spread": Metric("spread", None, "root mean square over pixels of the posterior standard deviation", "honesty",
                     needs="at least two samples, and more than one image as the answer"),
    "ess": Metric("ESS", None, "effective sample size of the weights, in samples", "honesty",
                  needs="a solver with weights"),
    "k_hat": Metric("k-hat", None, "Pareto tail index of the weights; beyond 0.7 they cannot be trusted", "honesty",
                    needs="a solver with weights that estimates it"),
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
        found |= _against_truth(posterior, truth.to(samples), log_weights, generator)
    if isinstance(reward, GaussianLikelihood):
        residual = torch.cat([reward.chi_square(part) for part in samples.split(256, dim=1)], dim=1)
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
        found |= _against_exact(posterior, reward, truth, problem, exact.to(samples), generator)
    ess = posterior.ess()
    if ess is not None:
        found["ess"] = ess
    k_hat = posterior.diagnostics.get("k_hat")
    if isinstance(k_hat, Tensor) and k_hat.shape == (len(posterior),) and not bool(k_hat.isnan().all()):
        found["k_hat"] = k_hat
    return {name: value.detach().double().cpu() for name, value in found.items()}


def _against_exact(posterior: Posterior, reward: Reward, truth: Tensor | None, problem: Problem, exact: Tensor,
                   generator: torch.Generator) -> dict[str, Tensor]:
    """What an exact posterior says of samples: distance in units of a floor, the mean's gap, coverage by density."""
    samples, count = posterior.samples, posterior.num_samples
    log_weights = posterior.log_weights if posterior.weighted else None
    more = problem.exact_posterior().sample(reward.to("cpu"), 2 * count, generator=generator).samples.to(samples)
    every = torch.cat([exact, more], dim=1)
    found = {}
    if count > 1:
        found["floor_ratio"] = floor_ratio(samples, every, log_weights, generator=generator)
    if truth is not None:
        found["mean_gap"] = mean_gap(samples, every, truth.to(samples), log_weights)
    log_prob = getattr(problem.prior, "log_prob", None)
    if truth is not None and log_prob is not None and not problem.tilts and count >= least_samples(LEVEL):
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


def _is_point(posterior: Posterior) -> bool:
    """Whether all samples are copies of one image, which has neither a spread nor intervals."""
    return bool(posterior.diagnostics.get("point_estimate", False))


def _against_truth(posterior: Posterior, truth: Tensor, log_weights: Tensor | None,
                   generator: torch.Generator) -> dict[str, Tensor]:
    samples, mean, count = posterior.samples, posterior.mean(), posterior.num_samples
    found = {}
    if count > 1:
        found["crps"] = crps(samples, truth, log_weights).flatten(1).mean(1)
        found["energy"] = energy_score(samples, truth, log_weights, generator=generator)
    if count >= least_samples(LEVEL) and not _is_point(posterior):
        with warnings.catch_warnings():  # the column's note says it
            warnings.filterwarnings("ignore", "coverage: a level")
            found["coverage"] = coverage(samples, truth, LEVEL, log_weights).double().flatten(1).mean(1)
            if truth.ndim == 4:
                found["coverage_near_ink"] = coverage_near_ink(samples, truth, LEVEL, log_weights)
    if truth.ndim == 4:
        if count > 1 and min(truth.shape[2:]) >= 7:
            found["patch_energy"] = patch_energy_score(samples, truth, log_weights, generator=generator)
            blocks = block_means(samples.flatten(0, 1)).unflatten(0, samples.shape[:2])
            found["block_crps"] = crps(blocks, block_means(truth), log_weights).flatten(1).mean(1)
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
    from invflow._core.folders import shipped_names

    name = problem.prior_name
    if name is None or name not in shipped_names("classifier"):
        return None
    count = min(posterior.num_samples, _MOST_FEATURES)
    draws = posterior.resample(count, generator=generator)
    result: Tensor | None = classifier_features(draws.samples.flatten(0, 1), name).unflatten(0, (len(draws), count))
    return result
