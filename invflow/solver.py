"""The solver interface: a reward goes in, a posterior comes out."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from invflow.posterior import Posterior
from invflow.reward import Reward

__all__ = ["move_solver", "Solver"]


class Solver(ABC):
    """Turns a reward into samples of p(x) e^{r(x)}, p being the law of the solver's own base sampler.

    A solver is built with its prior and its settings; :meth:`sample` takes only what changes from call to call.
    """

    #: whether the solver needs training for each kind of operator (an adapter, say)
    needs_training: bool = False

    @abstractmethod
    def sample(self, reward: Reward, num_samples: int, *, generator: torch.Generator | None = None,
               progress: bool = False) -> Posterior:
        """Draw posterior samples.

        Args:
            reward: over B observations, such as a :class:`~invflow.GaussianLikelihood`.
            num_samples: N, samples for each observation.
            generator: source of all random numbers of this call.
            progress: show a progress bar.

        Returns:
            A :class:`~invflow.Posterior` with samples ``(B, N, *image_shape)``.
        """

    def prior_samples(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        """Draw from the law that the solver tilts, its own base sampler.

        Args:
            n: number of samples.
            generator: source of randomness.

        Returns:
            ``(n, *image_shape)``.
        """
        raise TypeError(f"{type(self).__name__} has no base sampler of its own to draw from")


def move_solver(solver: Solver, device: torch.device) -> None:
    """Move the networks and tensors of a solver, in place."""
    for name, value in vars(solver).items():
        if isinstance(value, (nn.Module, Tensor)):
            setattr(solver, name, value.to(device))
