"""One reward for several independent repeats."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from invflow._checks import Index, as_index
from invflow.reward import Reward

__all__ = ["RepeatedReward"]


class RepeatedReward(Reward):
    """A reward of any number of observations, for B observations that are repeats of one another.

    A solver gives each its own particles, so that the spread over the repeats is the solver's own.

    Args:
        reward: with ``num_observations`` None.
        count: B, at least 1.

    Raises:
        ValueError: for a reward that has observations of its own, or a count under 1.

    Example:
        >>> import torch, invflow
        >>> from invflow.repeated import RepeatedReward
        >>> tilt = RepeatedReward(invflow.FunctionReward(lambda x: -x.square().sum(1)), 4)
        >>> tilt(torch.ones(4, 10, 2)).shape, tilt.select([0, 1]).num_observations
        (torch.Size([4, 10]), 2)
    """

    def __init__(self, reward: Reward, count: int) -> None:
        if reward.num_observations is not None:
            raise ValueError(f"the reward knows {reward.num_observations} observations: reward.select([0] * {count}) "
                             "repeats one of them")
        if count < 1:
            raise ValueError(f"count={count}: repeat a reward at least once")
        self.reward, self.differentiable = reward, reward.differentiable
        self.num_observations: int = count

    def __call__(self, x: Tensor) -> Tensor:
        """Score images: ``(B, N, *image_shape)`` to ``(B, N)``.

        Raises:
            ValueError: for another number of observations.
        """
        if len(x) != self.num_observations:
            raise ValueError(f"x has shape {tuple(x.shape)}, but the reward is repeated for {self.num_observations} "
                             "observations, so it takes that many: reward.select(index) takes some of them")
        return self.reward(x)

    def select(self, index: Index) -> Reward:
        """The reward for some of the repeats; see :meth:`Reward.select`."""
        other = copy.copy(self)
        other.num_observations = len(as_index(index, self.num_observations))
        return other

    def to(self, *args: Any, **kwargs: Any) -> Reward:
        """The reward on another device or in another floating-point type; a copy."""
        other = copy.copy(self)
        other.reward = self.reward.to(*args, **kwargs)
        return other

    def __repr__(self) -> str:
        return f"RepeatedReward({self.reward!r}, {self.num_observations})"


def score(reward: Reward, x: Tensor, chunk_size: int = 1024) -> Tensor:
    """Rewards of many images without gradients, in pieces: ``(B, N, *image_shape)`` to ``(B, N)``."""
    step = max(1, chunk_size // len(x))
    with torch.no_grad():
        return torch.cat([reward(part) for part in x.split(step, dim=1)], dim=1)
