"""Strength of the correction of a VFM's samples: factors of the deviations, fitted by the score."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from invflow.likelihood import GaussianLikelihood
from invflow.linear.correction import correct, measurement_noise
from invflow.linear.structure import zero_unobserved
from invflow.solvers.vfm import VFM
from invflow.training.losses import patch_score
from invflow.training.settings import TrainingProblem

__all__ = ["FACTORS", "Fit", "fit_consistency", "move_samples", "noise_in_the_mean"]

#: largest share of the noise that the samples' mean may contain for a class to be corrected by default
MOST_LEAK = 0.15
#: share of the best gain from which another factor counts as equally good
ENOUGH = 0.95
#: candidate factors; 0 means no correction
FACTORS = (0.0, 0.25, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0)


@dataclass(frozen=True)
class Fit:
    """Result for one problem class at one noise level.

    Attributes:
        problem_class: Problem class of the operators.
        sigma: Noise level.
        factor: Factor with the lowest energy score over patches; among those with 95% of its gain, the nearest to that
            of the next higher noise level.
        gain: Decrease of the score relative to no correction, at that factor.
        gain_error: Standard error of the gain, over images.
        leak: Share of the measurement's noise contained in the mean of the samples, <n, A(mean - truth)> / |n|^2;
            NaN without noise. Corrected samples can be calibrated only if it is near 0.
    """

    problem_class: str
    sigma: float
    factor: float
    gain: float
    gain_error: float
    leak: float


@torch.no_grad()
def fit_consistency(vfm: VFM, images: Tensor, problems: Sequence[TrainingProblem], *, levels: int = 3,
                    num_samples: int = 8, factors: Sequence[float] = FACTORS, seed: int = 0) -> list[Fit]:
    """Fit the factors of ``adapter.consistency`` and store them there.

    A class is stored if the correction lowers the score by more than two standard errors at one or more of its levels,
    and the mean of its samples contains at most :data:`MOST_LEAK` of the noise at every level; above that, too much
    is counted twice. The best factor at each level is stored, which may be 0.

    Args:
        vfm: Solver whose adapter predicts deviations.
        images: ``(n, *image_shape)``, each observed once in each class at each level.
        problems: Problem classes, with their ranges.
        levels: Number of noise levels in each range, including both ends, evenly spaced in the logarithm of
            (level + 0.01).
        num_samples: Samples of each posterior, an even number.
        factors: Candidates; the first is 0, the reference for the others.
        seed: Random seed.

    Raises:
        ValueError: For an adapter that predicts no deviations, or too few samples.
    """
    if not vfm.adapter.deviations:
        raise ValueError("this adapter predicts no deviations to fit factors for: train it with consistency=True")
    if not factors or factors[0] != 0:
        raise ValueError(f"factors={factors}: the first must be 0, the reference for the others")
    if num_samples < 2 or num_samples % 2:
        raise ValueError(f"num_samples={num_samples}: samples are scored in pairs, so pass an even number")
    plain = VFM(vfm.prior, vfm.adapter, steps=vfm.steps, chunk_size=vfm.chunk_size, consistency=False)
    fits: list[Fit] = []
    for index, problem in enumerate(problems):
        low, high = problem.levels
        own: list[Fit] = []
        for step in reversed(range(levels)):
            sigma = (low + 0.01) * ((high + 0.01) / (low + 0.01)) ** (step / max(levels - 1, 1)) - 0.01
            own.insert(0, _fit(plain, images, problem, max(sigma, 0.0), num_samples, factors,
                               own[0].factor if own else None,
                               torch.Generator().manual_seed((seed * 1000 + index) * 1000 + step)))
        fits += own
    table: dict[str, list[tuple[float, float]]] = {}
    for name in dict.fromkeys(fit.problem_class for fit in fits):
        of_class = [fit for fit in fits if fit.problem_class == name]
        gains = any(fit.gain > 2 * fit.gain_error for fit in of_class)
        if gains and not any(fit.leak > MOST_LEAK for fit in of_class):
            table[name] = [(round(fit.sigma, 6), fit.factor) for fit in of_class]
    vfm.adapter.consistency = table
    return fits


def _fit(vfm: VFM, images: Tensor, problem: TrainingProblem, sigma: float, num_samples: int, factors: Sequence[float],
         near: float | None, generator: torch.Generator) -> Fit:
    n = len(images)
    operator = problem.operator.randomize(n, generator)
    y = operator.measure(images, sigma, generator=generator)
    likelihood = GaussianLikelihood(operator, y, sigma)
    samples = vfm.sample(likelihood, num_samples, generator=generator).samples
    deviation = vfm.adapter.proposal(likelihood).deviation
    assert deviation is not None
    noise = measurement_noise(n * num_samples, tuple(y.shape[1:]), generator)
    scores = []
    for factor in factors:
        moved = move_samples(likelihood, samples, factor * deviation, noise) if factor else samples
        first, second = moved.unflatten(1, (-1, 2)).unbind(2)
        pairs = patch_score(first.flatten(0, 1), second.flatten(0, 1), images.repeat_interleave(num_samples // 2, 0))
        scores.append(pairs.view(n, -1).mean(1))
    table = torch.stack(scores)
    best = int(table.mean(1).argmin())
    if near is not None:  # without noise, any factor fits a mask: its choice should not affect the levels in between
        gains = table[0].mean() - table.mean(1)
        as_good = (gains >= ENOUGH * gains[best]).nonzero().flatten().tolist()
        best = min(as_good, key=lambda k: abs(factors[k] - near))
    gain = table[0] - table[best]
    return Fit(str(problem.operator.problem_class), sigma, float(factors[best]), float(gain.mean()),
               float(gain.std() / n**0.5), noise_in_the_mean(likelihood, samples.mean(1), images))


def move_samples(likelihood: GaussianLikelihood, samples: Tensor, deviation: Tensor, noise: Tensor) -> Tensor:
    """Correct samples of B posteriors with :func:`~invflow.linear.correction.correct`, ``(B, N, *image_shape)``.

    Args:
        likelihood: Likelihood of B observations.
        samples: ``(B, N, *image_shape)``.
        deviation: ``(B, *image_shape)``, how far each pixel may move.
        noise: ``(B * N, *measurement_shape)``, with standard deviation 1.
    """
    rows = torch.arange(len(samples)).repeat_interleave(samples.shape[1])
    own = likelihood.select(rows)
    moved, _ = correct(own.operator, own.y, own.sigma, samples.flatten(0, 1), deviation[rows].square(), noise)
    result: Tensor = moved.unflatten(0, samples.shape[:2])
    return result


def noise_in_the_mean(likelihood: GaussianLikelihood, mean: Tensor, truth: Tensor) -> float:
    """<n, A mean - A truth> / |n|^2 with noise n = y - A truth, over all observations; NaN without noise.

    0 for an estimate whose error is independent of the noise, 1 for one that copies the measurement.

    Args:
        likelihood: Likelihood of B observations.
        mean: ``(B, *image_shape)``.
        truth: ``(B, *image_shape)``.
    """
    clean = likelihood.operator(truth)
    noise = zero_unobserved(likelihood.operator, likelihood.y.to(clean) - clean)
    error = zero_unobserved(likelihood.operator, likelihood.operator(mean) - clean)
    square = float(noise.square().sum())
    return float((noise * error).sum()) / square if square > 0 and bool((likelihood.sigma > 0).all()) else float("nan")
