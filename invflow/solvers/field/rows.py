"""Shared parts of samplers that treat each pair of observation and sample as one row: rows, their noise, checks."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from invflow._core.chunks import ChunkSize, check_chunk_size
from invflow._core.random import as_generator
from invflow.flowmap import FlowMap, check_prior, rows_at_a_time
from invflow.likelihood import GaussianLikelihood
from invflow.linear.structure import SingularSystem, find_system
from invflow.operator import Operator
from invflow.posterior import Posterior
from invflow.reward import Reward
from invflow.solver import Solver
from invflow.solvers.finite import check_finite

__all__ = ["RowNoise", "RowSampler", "Rows"]

#: number of rows that share a source of random numbers; a chunk draws only for the blocks that it overlaps
_BLOCK = 16


class RowNoise:
    """Standard normal noise for consecutive rows, which does not depend on how the rows are split into chunks.

    Each block of 16 rows has its own generator, seeded by a draw from the caller's generator.

    Args:
        seeds: ``(blocks,)`` int64, one seed for each block of all rows.
        rows: Rows for which to draw noise.
        device: Device on which to draw the random numbers.
    """

    def __init__(self, seeds: Tensor, rows: slice, device: torch.device) -> None:
        first, last = rows.start // _BLOCK, -(-rows.stop // _BLOCK)
        self._seeds, self._device = seeds[first:last], device
        self._index: slice | Tensor = slice(rows.start - first * _BLOCK, rows.stop - first * _BLOCK)
        self._generators = [torch.Generator(device).manual_seed(int(seed)) for seed in self._seeds]

    def restart(self, index: Tensor) -> RowNoise:
        """The noise of some of the rows from its beginning; ``index`` has shape ``(k,)``, relative to these rows."""
        other = RowNoise(self._seeds, slice(0, _BLOCK * len(self._seeds)), self._device)
        other._index = torch.arange(_BLOCK * len(self._seeds))[self._index][index.cpu()]
        return other

    @staticmethod
    def seeds(total: int, generator: torch.Generator) -> Tensor:
        """One seed for each block of ``total`` rows, the only draws from the caller's generator."""
        return torch.randint(2**62, (-(-total // _BLOCK),), generator=generator, device=generator.device).cpu()

    def __call__(self, like: Tensor) -> Tensor:
        """Fresh noise with the shape, type and device of ``like``, ``(rows, ...)``."""
        shape = (_BLOCK, *like.shape[1:])
        blocks = [torch.randn(shape, generator=g, device=g.device, dtype=torch.float32) for g in self._generators]
        noise = torch.cat(blocks)
        index = self._index if isinstance(self._index, slice) else self._index.to(noise.device)
        return noise[index].to(like)


@dataclass(frozen=True)
class Rows:
    """n rows that run together, each a sample for one observation.

    Attributes:
        likelihood: Likelihood of n observations, one for each row.
        system: Singular system of the operator with n parameter sets, or 1 that all rows share; None if it is not
            known.
        noise: Noise of these rows.
        kept: Number of samples from each row; one, except for Markov chains.
        blank: Whether nothing is measured, so that guidance can be skipped.
    """

    likelihood: GaussianLikelihood
    system: SingularSystem | None
    noise: RowNoise
    kept: int = 1
    blank: bool = False

    def take(self, index: Tensor) -> Rows:
        """Some of the rows, with their noise restarted."""
        chosen = self.likelihood.select(index)
        system = None if self.system is None else self.system.select(index)
        return Rows(chosen, system, self.noise.restart(index), self.kept, self.blank)


class RowSampler(Solver):
    """A solver whose samples are independent rows, which run through the network together in chunks.

    A subclass implements :meth:`_run`. The measurement must be Gaussian. The attributes ``linear_only`` and
    ``uses_system`` state what else the subclass needs; ``needs`` states whether it uses the prior's score or only its
    velocity.

    Args:
        prior: A flow map; if its score is needed, one trained with noise independent of the data.
        chunk_size: Number of rows through the network at a time; None for 256 on a CPU, and as many as fit on a GPU.

    Raises:
        TypeError: If the prior is not a flow map.
        ValueError: If the map lacks the velocity or the score that is needed.
    """

    prior: FlowMap
    linear_only = True
    uses_system = False
    affine_only = True
    needs = "score"

    def __init__(self, prior: FlowMap, chunk_size: int | None) -> None:
        check_prior(type(self).__name__, prior, self.needs, affine=self.affine_only)
        self.prior, self.chunk_size = prior, check_chunk_size(chunk_size)

    @abstractmethod
    def _run(self, rows: Rows) -> Tensor:
        """Images ``(n, k, *image_shape)`` of n rows, k from each; see :meth:`_layout`."""

    def _layout(self, num_samples: int) -> tuple[int, int]:
        """Number of rows for each observation, and of samples from each row: one, except for Markov chains."""
        return num_samples, 1

    # -- the public calls ----------------------------------------------------------------------------------------------

    def _sample(self, reward: Reward, n: int, generator: torch.Generator, progress: bool) -> Posterior:
        """Draw posterior samples; see :meth:`Solver.sample`.

        Returns:
            A posterior without weights or evidence, since the method gives none.

        Raises:
            TypeError: If the reward is not a Gaussian likelihood.
            ValueError: If the method cannot handle the operator (the message names solvers that can), or if samples
                are not finite, which means that steps or weights are too large.
        """
        return Posterior(self._draw(self._supported(reward), n, generator, progress=progress))

    def prior_samples(self, n: int, *, generator: torch.Generator | int | None = None) -> Tensor:
        """Draws of the same iteration without a measurement, ``(n, *image_shape)``."""
        if n < 1:
            raise ValueError(f"prior_samples draws at least one image, not n={n}")
        nothing = _Nothing(self.prior.image_shape)
        zeros = torch.zeros(1, *self.prior.image_shape, device=self.prior.device)
        likelihood = GaussianLikelihood(nothing, zeros, sigma=1.0)
        return self._draw(likelihood, n, as_generator(generator), blank=True)[0]

    # -- rows ----------------------------------------------------------------------------------------------------------

    def _draw(self, likelihood: GaussianLikelihood, num_samples: int, generator: torch.Generator, *,
              progress: bool = False, blank: bool = False) -> Tensor:
        """Samples ``(B, N, *image_shape)``."""
        from tqdm import tqdm

        system = find_system(likelihood) if self.uses_system else None
        self._check_system(likelihood, system)
        per_observation, kept = self._layout(num_samples)
        batch = len(likelihood.y)
        total = batch * per_observation
        owner = torch.arange(batch).repeat_interleave(per_observation)
        seeds = RowNoise.seeds(total, generator)

        @torch.no_grad()
        def run(part: slice) -> Tensor:
            chosen = likelihood.select(owner[part])
            noise = RowNoise(seeds, part, generator.device)
            rows = Rows(chosen, None if system is None else system.select(owner[part]), noise, kept, blank)
            return self._run(rows).detach().to(self.prior.dtype)

        name = type(self).__name__
        at_a_time = rows_at_a_time(self.chunk_size, self.prior, velocity=True)
        chunks = tqdm(ChunkSize(at_a_time, name).over(total, run), total=-(-total // at_a_time),
                      disable=not progress, desc=name, unit="chunk", delay=2)
        images = torch.cat([images for _, images in chunks])
        check_finite(name, "its end", per_observation * kept, images.flatten(0, 1))
        return images.reshape(batch, per_observation * kept, *self.prior.image_shape)[:, :num_samples]

    def _check_system(self, likelihood: GaussianLikelihood, system: SingularSystem | None) -> None:
        """Raise an error if the method needs a singular system and there is none."""

    def _supported(self, reward: Reward) -> GaussianLikelihood:
        """The likelihood on the prior's device; an error that names other solvers if the method cannot use it."""
        name = type(self).__name__
        others = "invflow.FMTT(prior) and invflow.NoiseSMC(prior) take any reward"
        if not isinstance(reward, GaussianLikelihood):
            raise TypeError(f"{name} takes a GaussianLikelihood, not a {type(reward).__name__}: {others}")
        operator = reward.operator
        if self.linear_only and not operator.linear:
            raise ValueError(
                f"{name} takes linear operators, and {type(operator).__name__} is not linear: {others}, and "
                "invflow.DPS(prior) takes any operator that can be differentiated"
            )
        if tuple(operator.image_shape) != tuple(self.prior.image_shape):
            raise ValueError(
                f"the operator measures images of shape {tuple(operator.image_shape)}, the prior generates images of "
                f"shape {tuple(self.prior.image_shape)}: build one of them with the other's image_shape"
            )
        return reward.to(self.prior.device)


class _Nothing(Operator):
    """An operator whose measurement is zero for every image."""

    def __init__(self, image_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.image_shape = self.measurement_shape = tuple(image_shape)

    def forward(self, x: Tensor) -> Tensor:
        """Zeros in the shape of the images."""
        return x * 0

    def adjoint(self, y: Tensor) -> Tensor:
        """Zeros in the shape of the images."""
        return y * 0
