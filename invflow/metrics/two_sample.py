"""Classifier two-sample test: whether a small network can tell two sets of samples apart."""

from __future__ import annotations

import math
import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from invflow._core.random import as_generator, draw_noise
from invflow._core.weighted import effective_size
from invflow.metrics.distances import _flat_pair
from invflow.metrics.quality import normalised_weights

__all__ = ["C2ST", "classifier_two_sample_test"]


class C2ST(NamedTuple):
    """Accuracy on held-out samples, ``(B,)``, and the p-value of the hypothesis that the laws are equal, ``(B,)``."""

    accuracy: Tensor
    p_value: Tensor


def classifier_two_sample_test(x: Tensor, y: Tensor, log_weights: Tensor | None = None,
                               y_log_weights: Tensor | None = None, *, hidden: int = 64, steps: int = 300,
                               learning_rate: float = 1e-2, weight_decay: float = 1e-2,
                               generator: torch.Generator | None = None) -> C2ST:
    r"""Classifier two-sample test (Lopez-Paz and Oquab 2017): one half of the samples trains, the other half tests.

    For each b a network with one hidden layer learns, on standardised values, which set a sample is from. All b are
    trained at once. The accuracy is the mean of both sets' shares of correct answers, 1/2 for equal laws at any N and
    M. Given the trained network, the shares of the two sets that are classified as "first" have the same expectation
    for equal laws. The p-value is one-sided, for their difference, by the normal approximation.

    A large p-value only means that this classifier found no difference with this many samples.

    Args:
        x: ``(B, N, *shape)``, N >= 4; for large images, the features of :func:`classifier_features`.
        y: ``(B, M, *shape)``, M >= 4.
        log_weights: Log weights of x, ``(B, N)`` or None. The number of samples is then the effective one.
        y_log_weights: Log weights of y, ``(B, M)`` or None.
        hidden: Number of hidden units.
        steps: Number of steps of Adam, each on the whole training half.
        learning_rate: Learning rate of Adam.
        weight_decay: Decoupled weight decay of Adam.
        generator: Generator for the halves and the initial weights.

    Returns:
        ``accuracy`` and ``p_value``, ``(B,)`` each. NaN, with a warning, if a law has fewer than four effective
        samples, or if one of its halves has no weight.

    Raises:
        ValueError: If the shapes do not fit or a set has fewer than four samples.
    """
    a, b = _flat_pair(x, y, "classifier_two_sample_test")
    if min(a.shape[1], b.shape[1]) < 4:
        raise ValueError(f"the test takes at least four samples of each law, not {a.shape[1]} and {b.shape[1]}")
    generator = as_generator(generator)
    sets, masses = [], []
    few = torch.zeros(len(a), dtype=torch.bool, device=a.device)
    for values, given in ((a, log_weights), (b, y_log_weights)):
        order = torch.rand(values.shape[:2], generator=generator, device=generator.device).argsort(1).to(a.device)
        weights = normalised_weights(given, values, "classifier_two_sample_test")
        sets.append(values.gather(1, order[:, :, None].expand_as(values)).detach().float())
        masses.append(weights.gather(1, order).float())
        half = values.shape[1] // 2
        few |= effective_size(weights) < 4 * (1 - 1e-5)
        few |= (masses[-1][:, :half].sum(1) == 0) | (masses[-1][:, half:].sum(1) == 0)
    if bool(few.any()):
        warnings.warn(f"classifier_two_sample_test: {int(few.sum())} of {len(few)} comparisons have fewer than four "
                      "effective samples for training or testing: their results are NaN", stacklevel=3)
    halves = [values.shape[1] // 2 for values in sets]
    train = torch.cat([v[:, :h] for v, h in zip(sets, halves)], 1)
    mass = torch.cat([_share(w[:, :h]) / 2 for w, h in zip(masses, halves)], 1)
    target = torch.cat([torch.ones(halves[0]), torch.zeros(halves[1])]).to(train)
    centre = (mass[:, :, None] * train).sum(1, keepdim=True)
    scale = (mass[:, :, None] * (train - centre).square()).sum(1, keepdim=True).sqrt().clamp(min=1e-12)
    parameters = _first_weights(len(train), train.shape[2], hidden, generator, train)
    optimiser = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay)
    with torch.enable_grad():
        for _ in range(steps):
            optimiser.zero_grad()
            logits = _logits((train - centre) / scale, parameters)
            loss = torch.nn.functional.binary_cross_entropy_with_logits(
                logits, target.expand_as(logits), weight=mass, reduction="sum")
            loss.backward()
            optimiser.step()
    first, variance = [], []
    with torch.no_grad():
        for values, weights, half in zip(sets, masses, halves):
            held = _share(weights[:, half:])
            judged = (_logits((values[:, half:] - centre) / scale, parameters) > 0).float()
            first.append((held * judged).sum(1).double())
            variance.append(held.double().square().sum(1))  # 1 / number of samples
        accuracy = 0.5 * (first[0] + 1 - first[1])
        size = [1 / v for v in variance]
        pooled = (size[0] * first[0] + size[1] * first[1]) / (size[0] + size[1])
        error = (pooled * (1 - pooled) * (variance[0] + variance[1])).sqrt()
        score = torch.where(error > 0, (first[0] - first[1]) / error.clamp(min=1e-300), 0.0)
    accuracy, p_value = (torch.where(few, torch.nan, v).to(a.dtype) for v in (accuracy, torch.special.ndtr(-score)))
    return C2ST(accuracy, p_value)


def _share(weights: Tensor) -> Tensor:
    """Weights of one half, which sum to 1; equal if the half has no weight, so that training stays finite."""
    total = weights.sum(1, keepdim=True)
    return torch.where(total > 0, weights / total.clamp(min=1e-30), 1 / weights.shape[1])


def _first_weights(batch: int, inputs: int, hidden: int, generator: torch.Generator, like: Tensor) -> list[Tensor]:
    shapes = [(inputs, hidden), (1, hidden), (hidden, 1)]
    gains = [math.sqrt(2 / inputs), 0.5, math.sqrt(1 / hidden)]
    # the same initial weights for all b, so that the result for one does not depend on their number
    values = [draw_noise(shape, generator).to(like) * gain for shape, gain in zip(shapes, gains)]
    return [value.expand(batch, *value.shape).clone().requires_grad_() for value in values]


def _logits(x: Tensor, parameters: list[Tensor]) -> Tensor:
    inner, bias, outer = parameters
    return (torch.relu(x @ inner + bias) @ outer)[..., 0]
