"""Ranks of truths among posterior samples, from which a certificate is judged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from invflow._core.random import draw_noise
from invflow.evaluation.certificate.judgement import LEVELS
from invflow.evaluation.certificate.quantities import Quantity, evaluate
from invflow.metrics import random_pit, random_ranks, spread_skill, tarp_ranks

if TYPE_CHECKING:
    from invflow.reward import Reward

__all__ = ["rank_truths", "tarp_references"]


def tarp_references(pilot: Tensor, truth: Tensor, generator: torch.Generator) -> Tensor:
    """Draw reference images of TARP, one for each truth: around the prior's mean, with half its standard deviation.

    Distances from references further out depend less on the correlations between pixels.

    Args:
        pilot: Other truths ``(n, *image_shape)``, which give the mean and the standard deviation.
        truth: ``(B, *image_shape)``.
        generator: Random generator.
    """
    center, scale = pilot.double().mean(0), 0.5 * pilot.double().std(0)
    noise = draw_noise(tuple(truth.shape), generator).double()
    return (center + scale * noise.to(center)).to(truth)


@torch.no_grad()
def rank_truths(x: Tensor, truth: Tensor, reward: Reward, references: Tensor, quantities: Mapping[str, Quantity],
                generator: torch.Generator) -> dict[str, Tensor]:
    """Rank truths among equally weighted samples.

    Args:
        x: Samples ``(B, N, *image_shape)``.
        truth: ``(B, *image_shape)``.
        reward: Likelihood of the B observations, on the device of the samples.
        references: References of TARP, ``(B, *image_shape)``.
        quantities: Q quantities by name.
        generator: Generator that breaks ties.

    Returns:
        The tensors for :func:`invflow.evaluation.certificate.judgement.judge`, each ``(B, ...)``.
    """
    count = x.shape[1]
    truth, references = truth.to(x), references.to(x)
    values = evaluate(quantities, x, reward)  # (B, N, Q)
    target = evaluate(quantities, truth[:, None], reward)[:, 0]
    ranks = random_ranks(values, target, generator)
    tarp = tarp_ranks(x, truth, references, generator)
    pit = random_pit(random_ranks(x, truth, generator), count, generator).flatten(1)
    levels = torch.tensor(LEVELS, dtype=torch.float64, device=pit.device)
    covered = torch.stack([((pit - 0.5).abs() <= level / 2).double().mean(1) for level in levels], 1)
    spread, skill = spread_skill(x.double(), truth.double())
    return {"ranks": ranks, "truths": target, "means": values.mean(1), "stds": values.std(1), "tarp_ranks": tarp,
            "pixel_rank": pit.mean(1), "pixel_dispersion": (12 * (pit - 0.5).square()).mean(1),
            "pixel_coverage": covered, "pixel_spread": spread, "pixel_skill": skill}
