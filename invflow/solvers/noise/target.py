"""Posterior in noise space: rewards of the one-step prior, and the tempered densities that lead to the posterior."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from invflow._core.chunks import ChunkSize
from invflow._core.shapes import column, with_axes
from invflow._core.watch import check_gradients
from invflow.flowmap import FlowMap, check_prior, rows_at_a_time
from invflow.reward import Reward, score_rows
from invflow.smc import precise
from invflow.solvers.finite import FARTHEST, first_row, not_finite

__all__ = ["NoiseProposal", "NoiseTarget", "Particles", "check_prior_and_proposal", "log_prior_over_proposal"]


@runtime_checkable
class NoiseProposal(Protocol):
    """Interface of a proposal for NoiseSMC, such as :class:`~invflow.Adapter`."""

    def check_map(self, prior: FlowMap) -> None:
        """Raise a ValueError if the proposal was made for another map."""

    def propose(self, reward: Reward) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the noise of B observations, each ``(B, *state_shape)``."""


def check_prior_and_proposal(solver: str, prior: FlowMap, proposal: object) -> None:
    """Check that the prior is a flow map, and that the proposal is for this map, in the coordinates of its state."""
    check_prior(solver, prior)
    if proposal is not None:
        if not isinstance(proposal, NoiseProposal):
            raise TypeError(f"a {type(proposal).__name__} is not a proposal: it needs check_map(prior) and "
                            "propose(reward); pass an invflow.Adapter, such as vfm.adapter")
        proposal.check_map(prior)
        if getattr(proposal, "turned", False):
            raise ValueError(f"a {type(proposal).__name__} proposes noise in coordinates of its own, but the solvers "
                             "in noise space need Gaussians that are diagonal in the coordinates of the state: leave "
                             "out proposal, or use VFM(prior, adapter, importance=True)")


@dataclass(frozen=True)
class Particles:
    """N particles for each of B observations, with everything computed at them.

    Attributes:
        noise: z, ``(B, N, *state_shape)``.
        images: f(z), ``(B, N, *image_shape)``.
        log_reward: r(f(z)), ``(B, N)``; -inf for noise so far out that the map or the reward overflows.
        gradient: Gradient of r(f(z)) with respect to z, ``(B, N, *state_shape)``; None if no move needs it.
    """

    noise: Tensor
    images: Tensor
    log_reward: Tensor
    gradient: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> Particles:
        """Apply a function to each tensor."""
        gradient = None if self.gradient is None else function(self.gradient)
        return Particles(function(self.noise), function(self.images), function(self.log_reward), gradient)

    def gather(self, rows: Tensor, index: Tensor) -> Particles:
        """Select the particles ``index`` ``(b, n)`` of the observations ``rows`` ``(b,)``."""
        return self.map(lambda values: values[rows[:, None], index])

    def write(self, rows: Tensor, other: Particles) -> Particles:
        """Return a copy in which the observations ``rows`` ``(b,)`` hold ``other``."""
        gradient = self.gradient
        if gradient is not None and other.gradient is not None:
            gradient = gradient.index_copy(0, rows, other.gradient)
        return Particles(self.noise.index_copy(0, rows, other.noise),
                         self.images.index_copy(0, rows, other.images),
                         self.log_reward.index_copy(0, rows, other.log_reward), gradient)

    def choose(self, accept: Tensor, other: Particles) -> Particles:
        """Return ``other`` where ``accept`` ``(B, N)`` is true, and these particles elsewhere."""

        def pick(new: Tensor, old: Tensor) -> Tensor:
            return torch.where(with_axes(accept, new.ndim), new, old)

        gradient = self.gradient
        if gradient is not None and other.gradient is not None:
            gradient = pick(other.gradient, gradient)
        return Particles(pick(other.noise, self.noise), pick(other.images, self.images),
                         pick(other.log_reward, self.log_reward), gradient)


def log_prior_over_proposal(noise: Tensor, mean: Tensor, std: Tensor, batch_dims: int = 1) -> Tensor:
    """log N(z; 0, I) - log N(z; mean, diag std^2), summed in float64.

    Args:
        noise: z, with ``batch_dims`` leading dimensions that are kept.
        mean: Mean of the proposal, broadcast against z.
        std: Standard deviation of the proposal, over 0.
        batch_dims: Number of leading dimensions of the result.
    """
    noise, mean, std = precise(noise), precise(mean), precise(std)
    terms = std.log() + 0.5 * ((noise - mean) / std).square() - 0.5 * noise.square()
    return terms.flatten(batch_dims).sum(batch_dims)


class NoiseTarget:
    r"""Densities from a proposal q to the posterior in noise space, pi(z) = N(z; 0, I) e^{r(f(z))}.

    The density at temperature lambda is :math:`q^{1-\lambda} \pi^\lambda = N(\mu_\lambda, S_\lambda) \,
    e^{\lambda r(f(z))}` up to a constant. With q = N(mu, S) the Gaussian reference has :math:`S_\lambda =
    ((1-\lambda) S^{-1} + \lambda I)^{-1}` and :math:`\mu_\lambda = (1-\lambda) S_\lambda S^{-1} \mu`. With
    q = N(0, I) it is N(0, I) at every temperature.

    Args:
        prior: Flow map, with f(z) = ``prior.one_step(z)``.
        reward: Reward r over B observations, or over any number (treated as one).
        proposal: Mean and standard deviation of q, each ``(B, *state_shape)``. None: q = N(0, I).
        gradient: Whether particles carry the gradient of r(f(z)).
        chunk_size: Number of rows through the map at a time; None for 256 on a CPU, and as many as fit on a GPU.

    Attributes:
        where: Name of the current step, for errors; set by the caller.
    """

    where = "step 0"

    def __init__(self, prior: FlowMap, reward: Reward, proposal: tuple[Tensor, Tensor] | None = None, *,
                 gradient: bool = False, chunk_size: int | None = None) -> None:
        self.prior, self.reward = prior, reward
        self.gradient, self._size = gradient, ChunkSize(rows_at_a_time(chunk_size, prior), "NoiseSMC")
        self.num_observations = 1 if reward.num_observations is None else reward.num_observations
        self.proposal = None if proposal is None else self._checked(*proposal)
        self._known: tuple[Tensor, Tensor] | None = None  # rows of observations, and their copy on the host

    def _checked(self, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
        expected = (self.num_observations, *self.prior.state_shape)
        if tuple(mean.shape) != expected or tuple(std.shape) != expected:
            raise ValueError(
                f"the proposal gave a mean {tuple(mean.shape)} and a std {tuple(std.shape)}, but both must be "
                f"(B, *state_shape) = {expected}: return one Gaussian for each observation of the reward"
            )
        if not bool((torch.isfinite(mean) & torch.isfinite(std) & (std > 0)).all()):
            raise ValueError(f"the proposal's mean must be finite and its std finite and > 0; the least std is "
                             f"{float(std.min())}")
        device, dtype = self.prior.device, self.prior.dtype
        return mean.detach().to(device, dtype), std.detach().to(device, dtype)

    def initial(self, standard: Tensor) -> Tensor:
        """Turn standard normal numbers into draws from q: ``(B, N, *state_shape)`` to the same shape."""
        if self.proposal is None:
            return standard
        mean, std = self.proposal
        return torch.addcmul(mean[:, None], std[:, None], standard)

    def log_ratio(self, particles: Particles) -> Tensor:
        """Log of N(z; 0, I) e^{r(f(z))} / q(z), ``(B, N)``: the importance weight from q to the posterior."""
        if self.proposal is None:
            return particles.log_reward
        mean, std = self.proposal
        ratio = log_prior_over_proposal(particles.noise, mean[:, None], std[:, None], batch_dims=2)
        return ratio + particles.log_reward

    def reference(self, temperature: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the Gaussian reference at a temperature.

        Args:
            temperature: lambda, ``(b,)``.
            rows: Indices of the observations, ``(b,)``.

        Returns:
            Two tensors that broadcast against ``(b, N, *state_shape)``.
        """
        if self.proposal is None:
            one = torch.ones((), device=self.prior.device, dtype=self.prior.dtype)
            return torch.zeros_like(one), one
        mean, std = (value[rows][:, None] for value in self.proposal)
        level = column(temperature, mean)
        variance = 1 / ((1 - level) / std.square() + level)
        return (1 - level) * variance / std.square() * mean, variance.sqrt()

    def evaluate(self, noise: Tensor, rows: Tensor) -> Particles:
        """Particles at the noise ``(b, N, *state_shape)`` of the observations ``rows`` ``(b,)``."""
        count = noise.shape[1]
        flat = self.evaluate_rows(noise.flatten(0, 1), self._on_host(rows).repeat_interleave(count))
        return flat.map(lambda values: values.unflatten(0, (len(rows), count)))

    def _on_host(self, rows: Tensor) -> Tensor:
        """Rows on the host, where rewards select observations. They are copied once for all moves of the same rows."""
        if self._known is None or self._known[0] is not rows:
            self._known = rows, rows.cpu()
        return self._known[1]

    def evaluate_rows(self, noise: Tensor, owner: Tensor, particle: Tensor | None = None) -> Particles:
        """Particles at the noise ``(n, *state_shape)`` of the observations ``owner`` ``(n,)``, in chunks.

        Args:
            noise: z.
            owner: Observation of each row, on the host to avoid synchronising with the GPU.
            particle: Index of each row among the particles of its observation, for errors, ``(n,)``. None: 0, 1, ... in
                the order of the rows of each observation.

        Returns:
            Particles whose tensors have the single batch dimension n.

        Raises:
            ValueError: If the map's image is not finite, or the reward is NaN or +inf, at noise within a hundred
                standard deviations. Farther out, where only failed trial steps lead, the reward is -inf, so such noise
                is never accepted.
        """
        images = noise.new_empty((len(noise), *self.prior.image_shape))
        scores = precise(noise.new_empty(len(noise)))
        gradient = torch.empty_like(noise) if self.gradient else None
        if self.gradient:
            check_gradients("NoiseSMC with moves that use the reward's gradient")

        def run(part: slice) -> None:
            z = noise[part].detach()
            with torch.set_grad_enabled(self.gradient):
                z = z.requires_grad_(self.gradient)
                x = self.prior.one_step(z)
                score = score_rows(self.reward, x, owner[part])
                if gradient is not None:
                    gradient[part] = self._differentiate(score, z)
            images[part], scores[part] = x.detach(), precise(score.detach())

        for _ in self._size.over(len(noise), run):
            pass
        scores = self._checked_scores(noise, images, scores, owner, particle)
        if gradient is not None:  # if it is not finite, the drift of a proposal may have any value
            gradient = gradient.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        return Particles(noise, images, scores, gradient)

    def _checked_scores(self, noise: Tensor, images: Tensor, scores: Tensor, owner: Tensor,
                        particle: Tensor | None) -> Tensor:
        """Rewards, with -inf for bad values at noise too far out; other bad values raise an error about the first."""
        broken = ~images.flatten(1).isfinite().all(1)
        bad = broken | scores.isnan() | (scores == torch.inf)
        if not bool(bad.any()):  # synchronises with the GPU once per call: the error must name the particle
            return scores
        row = first_row(bad & (noise.flatten(1).abs().amax(1) <= FARTHEST))  # NaN does not count as within it
        if row is None:
            return torch.where(bad, -torch.inf, scores)
        b = int(owner[row])
        n = int((owner[:row] == b).sum()) if particle is None else int(particle[row])
        raise not_finite("NoiseSMC", "image of the flow map" if bool(broken[row]) else "reward", self.where, b, n)

    def _differentiate(self, score: Tensor, z: Tensor) -> Tensor:
        if not score.requires_grad:
            raise ValueError(
                f"the reward {type(self.reward).__name__} has differentiable=True but gives no gradient: "
                'use moves="crank-nicolson" or "elliptical-slice", or FunctionReward(fn, '
                "differentiable=False) for a black box"
            )
        return torch.autograd.grad(score.sum(), z)[0]
