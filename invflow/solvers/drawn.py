"""Independent draws of a tilted law that a problem knows how to draw from, as a solver."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from invflow._random import as_generator
from invflow.flowmap import FlowMap
from invflow.posterior import NFE, Posterior
from invflow.repeated import score
from invflow.reward import Reward
from invflow.solvers.base import Solver

__all__ = ["DrawnPosterior"]


class DrawnPosterior(Solver):
    """Independent draws of one known law p(x) e^{r(x)}, in closed form or by rejection: the truth to compare with.

    Args:
        sampler: ``(n, generator)`` to independent draws ``(n, *image_shape)``.
        reward: r, of any number of observations.
        prior: the flow map that is tilted.

    Example:
        >>> import torch, invflow
        >>> problem = invflow.load_problem("mixture/half-plane")
        >>> truth, reward = problem.simulate(2, generator=torch.Generator().manual_seed(0))
        >>> problem.exact_posterior().sample(reward, 100).samples.shape
        torch.Size([2, 100, 2])
    """

    def __init__(self, sampler: Callable[[int, torch.Generator], Tensor], reward: Reward, *, prior: FlowMap) -> None:
        self.sampler, self.reward, self.prior = sampler, reward, prior

    @torch.no_grad()
    def sample(self, reward: Reward, num_samples: int, *, generator: torch.Generator | None = None,
               progress: bool = False) -> Posterior:
        """Draw from the tilted law; see :meth:`Solver.sample`.

        Raises:
            TypeError: for another reward than the one whose law is known.
            ValueError: for under one sample.
        """
        if num_samples < 1:
            raise ValueError(f"num_samples is {num_samples}: ask for at least one sample")
        start, count = time.perf_counter(), reward.num_observations or 1
        with self.prior.count() as calls:
            rows = self.sampler(count * num_samples, as_generator(generator))
        samples = rows.unflatten(0, (count, num_samples))
        self._check(reward, samples[:, :8])
        total = len(rows)
        return Posterior(samples, nfe=NFE(calls.forward / total, calls.backward / total),
                         seconds=time.perf_counter() - start, settings={"solver": "DrawnPosterior"})

    def prior_samples(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        """Draw from the prior, ``(n, *image_shape)``: from the law itself where it has one, else in one step."""
        from invflow.mixture import GaussianMixtureFlow

        if isinstance(self.prior, GaussianMixtureFlow):
            return self.prior.decode(self.prior.sample(n, generator=generator))
        return self.prior.generate(n, generator=generator)

    def _check(self, reward: Reward, images: Tensor) -> None:
        """Whether a reward agrees with the known one on images: its law is no other's."""
        own = score(self.reward.to(images.device), images)
        try:
            given = score(reward, images)
        except ValueError as error:
            raise TypeError(f"this law is known for one reward, and a {type(reward).__name__} scores its draws with "
                            f"an error ({error}): pass the reward of the problem") from error
        if not torch.allclose(own, given, rtol=1e-3, atol=1e-3 * float(own.abs().mean()) + 1e-6):
            raise TypeError(
                f"this law is known for one reward, and the {type(reward).__name__} scores its draws otherwise "
                f"({float(given.flatten()[0]):.4g} in place of {float(own.flatten()[0]):.4g}): pass the reward of the "
                "problem, or use invflow.FMTT(prior) or invflow.NoiseSMC(prior), which take any reward"
            )
