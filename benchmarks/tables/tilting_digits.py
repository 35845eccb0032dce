"""The MNIST prior tilted to each digit: one row for each look-ahead, seed and digit, at equal calls per particle.

The reward is the log probability of the digit under the shipped classifier. The same classifier evaluates the samples,
and so does a second one, trained with another seed, which the reward does not use.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from benchmarks.tables.tilting_parts import affordable, sample_quietly
from invflow.flowmap import FlowMap
from invflow.nets.classifier import Classifier
from invflow.plugins import Index, as_index
from invflow.reward import Reward
from invflow.solvers.tilting.fmtt import FMTT

__all__ = ["BUDGET", "DIGIT_FIELDS", "LOOK_AHEADS", "PARTICLES", "DigitReward", "evaluate_digits"]

#: number of calls for each particle, forward and backward: every look-ahead uses exactly this number
BUDGET = 46
PARTICLES = 8
#: settings of FMTT, by name
LOOK_AHEADS: dict[str, dict[str, Any]] = {
    "flow map, 1 jump": {"look_ahead": "flow_map"},
    "flow map, 2 jumps": {"look_ahead": "flow_map", "look_ahead_steps": 2},
    "denoiser": {"look_ahead": "denoiser"},
    "none": {"look_ahead": "none"},
}
DIGIT_FIELDS = ("look_ahead", "seed", "digit", "steps", "accuracy", "accuracy_of_reward", "reward", "length",
                "discrepancy", "ess", "ancestors", "calls", "backward")


class DigitReward(Reward):
    """Log probability of a digit, one digit for each observation.

    Args:
        classifier: Classifier from images in [0, 1] to logits.
        digits: ``(B,)``, int64.
    """

    def __init__(self, classifier: Classifier, digits: Tensor) -> None:
        self.classifier, self.digits = classifier, digits
        self.num_observations = len(digits)

    def select(self, index: Index) -> Reward:
        """The reward of some observations."""
        return DigitReward(self.classifier, self.digits[as_index(index, len(self.digits))])

    def __call__(self, x: Tensor) -> Tensor:
        """``(B, N, C, H, W)`` to ``(B, N)``."""
        logits = self.classifier(x.flatten(0, 1)).log_softmax(1).unflatten(0, x.shape[:2])
        result: Tensor = logits.gather(2, self.digits[:, None, None].expand(*x.shape[:2], 1))[..., 0]
        return result


@functools.cache
def _shipped() -> tuple[FlowMap, Classifier]:
    from invflow.models.neural import load_prior

    return load_prior("mnist"), Classifier.load("mnist")


def evaluate_digits(look_ahead: str, seed: int, judge: Classifier | None = None, *, particles: int = PARTICLES,
                    budget: int = BUDGET) -> list[dict[str, Any]]:
    """Rows for the ten digits, which go through the map together.

    Args:
        look_ahead: A name in :data:`LOOK_AHEADS`.
        seed: Random seed.
        judge: A classifier other than the reward's, for ``accuracy``; None leaves that column empty.
        particles: Number of particles for each digit.
        budget: Calls per particle, forward and backward.

    Returns:
        A value for each of :data:`DIGIT_FIELDS`; accuracies and reward are weighted means.
    """
    prior, classifier = _shipped()
    reward = DigitReward(classifier, torch.arange(10))
    solver = affordable(lambda steps: FMTT(prior, steps=steps, chunk_size=80, **LOOK_AHEADS[look_ahead]), reward,
                        budget)
    posterior = sample_quietly(solver, reward, particles, seed)
    weights, rows = posterior.weights.double(), posterior.samples.flatten(0, 1)

    def accuracy(model: Classifier) -> Tensor:
        right = model.probabilities(rows).argmax(1).unflatten(0, weights.shape) == reward.digits[:, None]
        result: Tensor = (weights * right).sum(1)
        return result

    judged = None if judge is None else accuracy(judge)
    own, found = accuracy(classifier), posterior.diagnostics
    with torch.no_grad():
        mean_reward = (weights * reward(posterior.samples).double()).sum(1)
    ess = posterior.ess()
    assert ess is not None
    return [{"look_ahead": look_ahead, "seed": seed, "digit": digit, "steps": solver.steps,
             "accuracy": "" if judged is None else float(judged[digit]), "accuracy_of_reward": float(own[digit]),
             "reward": float(mean_reward[digit]), "length": float(found["thermodynamic_length"][digit]),
             "discrepancy": float(found["total_discrepancy"][digit]), "ess": float(ess[digit]),
             "ancestors": int(found["distinct_ancestors"][digit]), "calls": posterior.nfe.forward,
             "backward": posterior.nfe.backward} for digit in range(10)]
