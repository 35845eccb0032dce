"""What samplers share that treat every pair of an observation and a sample by itself: rows, their noise, the checks."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from invflow._core.chunks import ChunkSize, check_chunk_size
from invflow._core.random import as_generator
from invflow.flowmap import FlowMap, rows_at_a_time
from invflow.likelihood import GaussianLikelihood
from invflow.linear.structure import SingularSystem, find_system
from invflow.operator import Operator
from invflow.posterior import Posterior
from invflow.reward import Reward
from invflow.solver import Solver
from invflow.solvers.finite import check_finite

__all__ = ["RowNoise", "RowSampler", "Rows"]

#: rows that share a source of random numbers; a chunk draws for the blocks that it overlaps, and no more
_BLOCK = 16


class RowNoise:
    """Standard normal noise for consecutive rows, the same however the rows are cut into chunks.

    Each block of 16 rows has a generator of its own, seeded by a draw of the caller's.

    Args:
        seeds: ``(blocks,)`` int64, one for each block of all rows.
        rows: those that noise is wanted for.
        device: where the random numbers are made.
    """

    def __init__(self, seeds: Tensor, rows: slice, device: torch.device) -> None:
        first, last = rows.start // _BLOCK, -(-rows.stop // _BLOCK)
        self._seeds, self._device = seeds[first:last], device
        self._index: slice | Tensor = slice(rows.start - first * _BLOCK, rows.stop - first * _BLOCK)
        self._generators = [torch.Generator(device).manual_seed(int(seed)) for seed in self._seeds]

    def restart(self, index: Tensor) -> RowNoise:
        """From the beginning, the noise of some of the rows, ``(k,)`` indices among these."""
        other = RowNoise(self._seeds, slice(0, _BLOCK * len(self._seeds)), self._device)
        other._index = torch.arange(_BLOCK * len(self._seeds))[self._index][index.cpu()]
        return other

    @staticmethod
    def seeds(total: int, generator: torch.Generator) -> Tensor:
        """One seed for each block of ``total`` rows; all that is taken from the caller's generator."""
        return torch.randint(2**62, (-(-total // _BLOCK),), generator=generator, device=generator.device).cpu()

    def __call__(self, like: Tensor) -> Tensor:
        """Fresh noise in the shape, type and place of ``like``, ``(rows, ...)``."""
        shape = (_BLOCK, *like.shape[1:])
        blocks = [torch.randn(shape, generator=g, device=g.device, dtype=torch.float32) for g in self._generators]
        noise = torch.cat(blocks)
        index = self._index if isinstance(self._index, slice) else self._index.to(noise.device)
        return noise[index].to(like)


@dataclass(frozen=True)
class Rows:
    """n rows that run together, each a sample of an observation.

    Attributes:
        likelihood: of n observations, one for each row.
        system: the operator's singular system with n sets, or 1 that all rows share; None where it has none at hand.
        noise: of these rows.
        kept: samples that each row is to give; one, but for Markov chains.
        blank: whether nothing is measured, so that guidance may be left out.
    """

    likelihood: GaussianLikelihood
    system: SingularSystem | None
    noise: RowNoise
    kept: int = 1
    blank: bool = False

    def take(self, index: Tensor) -> Rows:
        """Some of the rows, with their noise from its beginning."""
        chosen = self.likelihood.select(index)
        system = None if self.system is None else self.system.select(index)
        return Rows(chosen, system, self.noise.restart(index), self.kept, self.blank)


class RowSampler(Solver):
    """A solver whose samples are independent rows, all of which run through the network together, in chunks.

    A subclass writes :meth:`_run`. The measurement must be Gaussian; ``linear_only`` and ``uses_system`` say what
    else the subclass needs, and ``needs`` whether it takes the prior's score or its velocity alone.

    Args:
        prior: a flow map; trained with noise independent of the data where its score is needed.
        chunk_size: rows through the network at a time; None for 256 on a CPU, and as many as fit on a GPU.

    Raises:
        TypeError: for a prior that is no flow map.
        ValueError: for a map without the velocity or the score that is needed.
    """

    linear_only = True
    uses_system = False
    affine_only = True
    needs = "score"

    def __init__(self, prior: FlowMap, chunk_size: int | None) -> None:
        name = type(self).__name__
        if not isinstance(prior, FlowMap):
            raise TypeError(f"{name} takes a FlowMap, not a {type(prior).__name__}: invflow.load_prior('mnist'), say")
        reason = prior.refusal(self.needs, name)
        if reason is not None:
            raise ValueError(reason)
        if self.affine_only and prior.decode_affine is None:
            raise ValueError(
                f"{name} measures the states themselves, and the images of this {type(prior).__name__} are no affine "
                "function of its states: use invflow.FMTT(prior) or invflow.NoiseSMC(prior), which decode"
            )
        self.prior, self.chunk_size = prior, check_chunk_size(chunk_size)

    @abstractmethod
    def _run(self, rows: Rows) -> Tensor:
        """Images ``(n, k, *image_shape)`` of n rows, k for each; see :meth:`_layout`."""

    def _layout(self, num_samples: int) -> tuple[int, int]:
        """Rows of each observation, and samples that each of them gives: one, but for Markov chains."""
        return num_samples, 1

    # -- the public calls ----------------------------------------------------------------------------------------------

    def _sample(self, reward: Reward, n: int, generator: torch.Generator, progress: bool) -> Posterior:
        """Draw posterior samples; see :meth:`Solver.sample`.

        Returns:
            A posterior without weights or evidence: the method gives none.

        Raises:
            TypeError: for anything but a Gaussian likelihood.
            ValueError: for an operator that the method cannot take, with the solvers that can; for samples that are
                not finite, which tells of steps or weights that are too large.
        """
        return Posterior(self._draw(self._supported(reward), n, generator, progress=progress))

    def prior_samples(self, n: int, *, generator: torch.Generator | int | None = None) -> Tensor:
        """What the same iteration makes where nothing is measured, ``(n, *image_shape)``."""
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
        """Raise where the method cannot do without a singular system and there is none."""

    def _supported(self, reward: Reward) -> GaussianLikelihood:
        """The likelihood on the prior's device, if the method takes it; else an error that names what does."""
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
                f"the operator measures images of shape {tuple(operator.image_shape)}, the prior makes images of "
                f"shape {tuple(self.prior.image_shape)}: build one of them with the other's image_shape"
            )
        return reward.to(self.prior.device)


class _Nothing(Operator):
    """Measures zeros, whatever the image."""

    def __init__(self, image_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.image_shape = self.measurement_shape = tuple(image_shape)

    def forward(self, x: Tensor) -> Tensor:
        """Zeros in the shape of the images."""
        return x * 0

    def adjoint(self, y: Tensor) -> Tensor:
        """Zeros in the shape of the images."""
        return y * 0
