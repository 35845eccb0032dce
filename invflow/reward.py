"""Rewards: scores of a finished image. A likelihood is the reward that inverse problems use."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from invflow._core.checks import Index, as_index
from invflow._core.networks import settle
from invflow._core.watch import watched

if TYPE_CHECKING:
    from invflow.operator import Operator

__all__ = ["FunctionReward", "RepeatedReward", "Reward", "ScaledReward", "score_rows", "SumReward"]


class Reward(ABC):
    """A score r(x) of images; a solver draws from p(x) e^{r(x)}.

    A subclass defines :meth:`__call__`, and :meth:`select` if its observations differ. Rewards can be added and
    scaled: ``likelihood + 0.5 * tilt``.

    Attributes:
        num_observations: B, the number of observations, or None if the reward is the same for any number of them.
        differentiable: Whether gradients with respect to the images exist. False means a black box.
        operator: The forward operator of a measurement; None for a reward of the image alone.
        problem_class: Name under which an adapter recognises a reward without an operator.
    """

    num_observations: int | None = None
    differentiable: bool = True
    operator: Operator | None = None
    problem_class: str | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__call__" in cls.__dict__:
            cls.__call__ = watched(cls.__call__)  # type: ignore[method-assign]

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """Score images.

        Args:
            x: Images ``(B, N, *image_shape)``, N for each of B observations.

        Returns:
            ``(B, N)``.
        """

    def select(self, index: Index) -> Reward:
        """The reward of some observations only.

        Args:
            index: An int, a slice, ints in a list or a ``(k,)`` tensor (repeats allowed), or a ``(B,)`` mask.

        Returns:
            A reward over those observations, or the reward itself if it is the same for any number of them.
        """
        if self.num_observations is None:
            return self
        raise TypeError(
            f"{type(self).__name__} has {self.num_observations} observations: it must define select(index)"
        )

    def to(self, *args: Any, **kwargs: Any) -> Reward:
        """Return a copy on another device or in another type; takes the arguments of :meth:`torch.Tensor.to`."""
        return self

    def __add__(self, other: Reward) -> Reward:

        return SumReward(self, other) if isinstance(other, Reward) else NotImplemented

    def __mul__(self, scale: float) -> Reward:

        return ScaledReward(self, float(scale)) if isinstance(scale, int | float) else NotImplemented

    __rmul__ = __mul__


class FunctionReward(Reward):
    """A reward from a function of images, the same for every observation.

    Args:
        fn: Function from ``(n, *image_shape)`` to ``(n,)``.
        differentiable: False for a black box, which is called without gradients and may return anything that
            ``torch.as_tensor`` accepts.

    Networks in the function are put into evaluation mode and stay there.

    Example:
        >>> import torch, invflow
        >>> bright = invflow.FunctionReward(lambda x: x.flatten(1).mean(1))
        >>> bright(torch.ones(2, 3, 1, 4, 4)).shape
        torch.Size([2, 3])
    """

    def __init__(self, fn: Callable[[Tensor], Any], differentiable: bool = True) -> None:
        if not callable(fn):
            raise TypeError(f"FunctionReward takes a function of images, not {fn!r:.60}, as in "
                            "invflow.FunctionReward(lambda x: -x.square().flatten(1).sum(1))")
        self.fn, self.differentiable = fn, differentiable
        self._networks = settle(fn)

    def __call__(self, x: Tensor) -> Tensor:
        """Score images: ``(B, N, *image_shape)`` to ``(B, N)``.

        Raises:
            ValueError: If the function does not return one number for each image.
        """
        if x.ndim < 3:
            raise ValueError(
                f"x has shape {tuple(x.shape)}, expected (B, N, *image_shape): pass x[None] for n images of "
                "one observation"
            )
        for network in self._networks:
            if network.training:
                network.eval()
        rows = x.flatten(0, 1)
        if self.differentiable:
            values = self.fn(rows)
        else:
            with torch.no_grad():
                values = torch.as_tensor(self.fn(rows.detach().clone()))  # a copy, since NumPy code may write to it
        if tuple(values.shape) != (rows.shape[0],):
            raise ValueError(
                f"the function returned shape {tuple(values.shape)} for images {tuple(rows.shape)}, expected "
                f"({rows.shape[0]},), one number for each image: sum or average over the other axes, as in "
                "values.flatten(1).sum(1)"
            )
        result: Tensor = values.to(device=x.device, dtype=x.dtype).unflatten(0, x.shape[:2])
        return result

    def __repr__(self) -> str:
        black_box = "" if self.differentiable else ", differentiable=False"
        return f"FunctionReward({getattr(self.fn, '__name__', type(self.fn).__name__)}{black_box})"


class SumReward(Reward):
    """The sum of rewards; written ``a + b``.

    Raises:
        ValueError: If their numbers of observations differ.
    """

    def __init__(self, *rewards: Reward) -> None:
        counts = {r.num_observations for r in rewards} - {None}
        if len(counts) > 1:
            numbers = " and ".join(sorted(map(str, counts)))
            raise ValueError(f"rewards over {numbers} observations cannot be added: select the same ones")
        self.rewards = rewards
        self.num_observations = counts.pop() if counts else None
        self.differentiable = all(r.differentiable for r in rewards)

    def __call__(self, x: Tensor) -> Tensor:
        """Score images: ``(B, N, *image_shape)`` to ``(B, N)``."""
        total = self.rewards[0](x)
        for reward in self.rewards[1:]:
            total = total + reward(x)
        return total

    def __repr__(self) -> str:
        return "(" + " + ".join(map(repr, self.rewards)) + ")"

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

    def __repr__(self) -> str:
        return f"{self.scale:g} * {self.reward!r}"

    def select(self, index: Index) -> Reward:
        """The scaled reward for some observations only."""
        return ScaledReward(self.reward.select(index), self.scale)

    def to(self, *args: Any, **kwargs: Any) -> Reward:
        """The scaled reward on another device or in another floating-point type."""
        return ScaledReward(self.reward.to(*args, **kwargs), self.scale)


class RepeatedReward(Reward):
    """A reward without observations of its own, repeated for B observations.

    A solver gives each repeat its own particles, so the spread over the repeats is due to the solver alone.

    Args:
        reward: A reward with ``num_observations`` None.
        count: B, at least 1.

    Raises:
        ValueError: If the reward has observations of its own, or if count is below 1.

    Example:
        >>> import torch, invflow
        >>> from invflow.reward import RepeatedReward
        >>> tilt = RepeatedReward(invflow.FunctionReward(lambda x: -x.square().sum(1)), 4)
        >>> tilt(torch.ones(4, 10, 2)).shape, tilt.select([0, 1]).num_observations
        (torch.Size([4, 10]), 2)
    """

    def __init__(self, reward: Reward, count: int) -> None:
        if reward.num_observations is not None:
            raise ValueError(f"the reward has {reward.num_observations} observations of its own: use "
                             f"reward.select([0] * {count}) to repeat one of them")
        if count < 1:
            raise ValueError(f"count={count}: repeat a reward at least once")
        self.reward, self.differentiable = reward, reward.differentiable
        self.num_observations: int = count

    def __call__(self, x: Tensor) -> Tensor:
        """Score images: ``(B, N, *image_shape)`` to ``(B, N)``.

        Raises:
            ValueError: If the number of observations differs.
        """
        if len(x) != self.num_observations:
            raise ValueError(f"x has shape {tuple(x.shape)}, but the reward is repeated for {self.num_observations} "
                             "observations and takes that many: use reward.select(index) for some of them")
        return self.reward(x)

    def select(self, index: Index) -> Reward:
        """The reward for some of the repeats; see :meth:`Reward.select`."""
        other = copy.copy(self)
        other.num_observations = len(as_index(index, self.num_observations))
        return other

    def to(self, *args: Any, **kwargs: Any) -> Reward:
        """Return a copy on another device or in another floating-point type."""
        other = copy.copy(self)
        other.reward = self.reward.to(*args, **kwargs)
        return other

    def __repr__(self) -> str:
        return f"RepeatedReward({self.reward!r}, {self.num_observations})"


def score(reward: Reward, x: Tensor, chunk_size: int = 1024) -> Tensor:
    """Compute rewards of many images in chunks, without gradients: ``(B, N, *image_shape)`` to ``(B, N)``."""
    step = max(1, chunk_size // len(x))
    with torch.no_grad():
        return torch.cat([reward(part) for part in x.split(step, dim=1)], dim=1)


def score_rows(reward: Reward, images: Tensor, owner: Tensor) -> Tensor:
    """Compute the reward of images that each belong to an observation, so that B N rows can be split anywhere.

    Args:
        reward: A reward over B observations, or any number of them.
        images: Images ``(n, *image_shape)``.
        owner: Index of the observation of each image, ``(n,)``.

    Returns:
        ``(n,)``.
    """
    if reward.num_observations in (None, 1):
        return reward(images[None])[0]
    return reward.select(owner)(images[:, None])[:, 0]
