"""Sums and scalings of rewards."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from invflow._checks import Index
from invflow.reward import Reward

__all__ = ["ScaledReward", "SumReward"]


class SumReward(Reward):
    """The sum of rewards; written ``a + b``.

    Raises:
        ValueError: if they know different numbers of observations.
    """

    def __init__(self, *rewards: Reward) -> None:
        counts = {r.num_observations for r in rewards} - {None}
        if len(counts) > 1:
            numbers = " and ".join(sorted(map(str, counts)))
            raise ValueError(f"rewards over {numbers} observations do not add: select the same ones")
        self.rewards = rewards
        self.num_observations = counts.pop() if counts else None
        self.differentiable = all(r.differentiable for r in rewards)

    def __call__(self, x: Tensor) -> Tensor:
        """Score images: ``(B, N, *image_shape)`` to ``(B, N)``."""
        total = self.rewards[0](x)
        for reward in self.rewards[1:]:
            total = total + reward(x)
        return total

    def select(self, index: Index) -> Reward:
        """The sum for some observations only."""
        return SumReward(*(r.select(index) for r in self.rewards))

    def to(self, *args: Any, **kwargs: Any) -> Reward:
        """The sum on another device or in another floating-point type."""
        return SumReward(*(r.to(*args, **kwargs) for r in self.rewards))


class ScaledReward(Reward):
    """A reward times a number; written ``scale * reward``. A scaled likelihood is no longer a log density."""

    def __init__(self, reward: Reward, scale: float) -> None:
        self.reward, self.scale = reward, scale
        self.num_observations, self.differentiable = reward.num_observations, reward.differentiable

    def __call__(self, x: Tensor) -> Tensor:
        """Score images: ``(B, N, *image_shape)`` to ``(B, N)``."""
        return self.scale * self.reward(x)

    def select(self, index: Index) -> Reward:
        """The scaled reward for some observations only."""
        return ScaledReward(self.reward.select(index), self.scale)

    def to(self, *args: Any, **kwargs: Any) -> Reward:
        """The scaled reward on another device or in another floating-point type."""
        return ScaledReward(self.reward.to(*args, **kwargs), self.scale)
