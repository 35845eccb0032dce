"""The exact posterior of a Gaussian mixture prior, for linear operators and Gaussian noise."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from invflow._core.chunks import ChunkSize
from invflow._core.random import draw_noise
from invflow.flowmap import FlowMap
from invflow.likelihood import GaussianLikelihood
from invflow.linear.structure import dense_matrix, matrix_shape
from invflow.models.mixture import GaussianMixtureFlow, pick_components
from invflow.posterior import Posterior
from invflow.reward import Reward, score
from invflow.solver import Solver

__all__ = ["DrawnPosterior", "ExactPosterior"]
_VALUES_AT_A_TIME = 2**24


class _Conditional(NamedTuple):
    """The posterior mixture of B observations, in the right singular vectors of A (S is 1 or B)."""

    log_weights: Tensor  # (B, K)
    log_evidence: Tensor  # (B,)
    shift: Tensor  # (B, K, r): component k has mean mu_k + shift @ directions
    kept: Tensor  # (B, K, r): and covariance s_k^2 (I - directions^T diag(1 - kept) directions)
    directions: Tensor  # (S, r, d)

    def pick(self, part: slice) -> _Conditional:
        """Some of the observations."""
        shared = len(self.directions) == 1
        directions = self.directions if shared else self.directions[part]
        return _Conditional(self.log_weights[part], self.log_evidence[part], self.shift[part],
                            self.kept[part], directions)


class _System(NamedTuple):
    """The operator's singular system with the measured means (S is 1 or B)."""

    measured: Tensor  # (S, K, m)
    left: Tensor  # (S, m, r)
    singular: Tensor  # (S, r)
    directions: Tensor  # (S, r, d)


class ExactPosterior(Solver):
    r"""Independent draws from the exact posterior of a mixture prior, for linear A and Gaussian noise.

    With A = U diag(l) V^T, the component N(mu_k, s_k^2 I) of the prior becomes one of the posterior with

    .. math:: \text{mean } \mu_k + V \frac{s_k^2 l}{s_k^2 l^2 + \sigma^2} U^T (y - A \mu_k), \quad
        \text{covariance } s_k^2 \left(I - V \frac{s_k^2 l^2}{s_k^2 l^2 + \sigma^2} V^T\right),

    and weight proportional to w_k N(y; A mu_k, s_k^2 A A^T + sigma^2 I) (Bishop 2006, "Pattern Recognition
    and Machine Learning", section 2.3.3). One singular value decomposition of the dense m x d matrix, for
    each parameter set, serves all components and samples; no d x d matrix is made. The work is in float64,
    whatever the type of the prior.

    Args:
        mixture: The prior.
        max_entries: Largest number of entries of the operator's dense matrices, (sets) m d.

    Raises:
        TypeError: If the prior is not a :class:`~invflow.GaussianMixtureFlow`.

    Example:
        >>> import torch, invflow
        >>> from invflow.operators import MatrixOperator
        >>> prior = invflow.GaussianMixtureFlow(torch.tensor([[-2.0, 0.0], [2.0, 0.0]]), std=0.5)
        >>> operator = MatrixOperator(torch.tensor([[0.0, 1.0]]), image_shape=(2,))
        >>> likelihood = invflow.GaussianLikelihood(operator, torch.tensor([[1.0]]), sigma=0.1)
        >>> invflow.ExactPosterior(prior).sample(likelihood, 100).samples.shape
        torch.Size([1, 100, 2])
    """

    prior: GaussianMixtureFlow

    def __init__(self, mixture: GaussianMixtureFlow, *, max_entries: int = 50_000_000) -> None:
        if not isinstance(mixture, GaussianMixtureFlow):
            raise TypeError(
                f"the exact posterior is known for a GaussianMixtureFlow, not a {type(mixture).__name__}: "
                "for other priors use invflow.NoiseSMC(prior) or invflow.FMTT(prior)"
            )
        self.prior, self.max_entries = mixture, max_entries

    @torch.no_grad()
    def _sample(self, reward: Reward, n: int, generator: torch.Generator, progress: bool) -> Posterior:
        """Draw independent posterior samples; see :meth:`Solver.sample`. No network call is made.

        Returns:
            A posterior without weights, with the exact ``log_evidence`` and, in the diagnostics, the
            ``component_weights`` ``(B, K)`` of the posterior mixture.

        Raises:
            TypeError: If the reward is not a :class:`~invflow.GaussianLikelihood`.
            ValueError: If the operator is not linear, has another image shape than the prior, or has a dense
                matrix that is too large.
        """
        likelihood = self._supported(reward)
        observations, device = len(likelihood.y), self.prior.means.device
        uniform = torch.rand((observations, n), generator=generator, device=generator.device, dtype=torch.float64)
        noise = draw_noise((observations, n, self.prior.dimension), generator).to(device)
        samples, weights, evidence = [], [], []
        for part, exact in self._conditionals(likelihood):
            index = pick_components(exact.log_weights, uniform[part].to(device))
            chunk = max(1, _VALUES_AT_A_TIME // noise[0].numel())
            own = partial(self._draw_rows, exact, index, noise[part])
            samples += [piece for _, piece in ChunkSize(chunk, "ExactPosterior").over(len(index), own)]
            weights.append(exact.log_weights.exp())
            evidence.append(exact.log_evidence)
        return Posterior(torch.cat(samples).unflatten(2, self.prior.image_shape),
                         log_evidence=torch.cat(evidence).to(self.prior.dtype),
                         diagnostics={"component_weights": torch.cat(weights).to(self.prior.dtype)})

    def prior_samples(self, n: int, *, generator: torch.Generator | int | None = None) -> Tensor:
        """Draw from the mixture itself, ``(n, *image_shape)``."""
        return self.prior.decode(self.prior.sample(n, generator=generator))

    @torch.no_grad()
    def moments(self, likelihood: GaussianLikelihood) -> tuple[Tensor, Tensor]:
        """Exact posterior mean and covariance.

        Args:
            likelihood: A likelihood over B observations.

        Returns:
            mean: ``(B, *image_shape)``.
            covariance: ``(B, d, d)``, d the number of values in an image.

        Raises:
            TypeError, ValueError: As in :meth:`sample`.
        """
        variance = self.prior.std.double().square()
        means, covariances = [], []
        for _, exact in self._conditionals(self._supported(likelihood)):
            weights = exact.log_weights.exp()
            centers = self.prior.means.double().flatten(1) + exact.shift @ exact.directions
            mean = (weights[:, None] @ centers)[:, 0]
            spread = weights.sqrt()[..., None] * (centers - mean[:, None])
            removed = torch.einsum("bk,k,bkr->br", weights, variance, 1 - exact.kept)
            covariance = spread.mT @ spread - exact.directions.mT @ (removed[..., None] * exact.directions)
            covariance.diagonal(dim1=1, dim2=2).add_((weights @ variance)[:, None])
            means.append(mean.to(self.prior.dtype))
            covariances.append(covariance.to(self.prior.dtype))
        return torch.cat(means).unflatten(1, self.prior.image_shape), torch.cat(covariances)

    @torch.no_grad()
    def log_evidence(self, likelihood: GaussianLikelihood) -> Tensor:
        """Exact log p(y) of each observation, ``(B,)``, in nats over the observed entries."""
        parts = [exact.log_evidence for _, exact in self._conditionals(self._supported(likelihood))]
        return torch.cat(parts).to(self.prior.dtype)

    # -- the closed form ------------------------------------------------------------------------------------

    def _conditionals(self, likelihood: GaussianLikelihood) -> Iterator[tuple[slice, _Conditional]]:
        """The posterior for chunks of observations, as many as fit in memory with all components."""
        means, std = self.prior.means.double().flatten(1), self.prior.std.double()
        y = likelihood.y.flatten(1).to(means)
        noise = likelihood.sigma.to(means).square()[:, None, None]
        count = likelihood.count_observed().to(means)[:, None].expand(len(y), 1)
        matrix = dense_matrix(likelihood).to(means)  # (S, m, d), S is 1 or B
        left, singular, directions = torch.linalg.svd(matrix, full_matrices=False)
        at_a_time = max(1, _VALUES_AT_A_TIME // max(1, len(means) * y.shape[1]))
        for start in range(0, len(y), at_a_time):
            part = slice(start, start + at_a_time)
            own = part if len(matrix) > 1 else slice(None)
            system = _System(means @ matrix[own].mT, left[own], singular[own], directions[own])
            yield part, self._condition(y[part], noise[part], count[part], std, system)

    def _condition(self, y: Tensor, noise: Tensor, count: Tensor, std: Tensor, system: _System) -> _Conditional:
        measured, left, singular, directions = system
        # parts of the measurements and the means inside and outside the operator's range
        y_inside, mean_inside = (y[:, None] @ left), measured @ left
        inside = y_inside - mean_inside  # (b, K, r)
        outside = (y[:, None] - y_inside @ left.mT) - (measured - mean_inside @ left.mT)
        signal = (std[:, None] * singular[:, None]).square()
        square = (inside.square() / (signal + noise)).sum(2) + (outside.square() / noise).sum(2)
        # unobserved entries are rows of zeros: count only observed ones
        volume = torch.log1p(signal / noise).sum(2) + count * (2 * math.pi * noise[..., 0]).log()
        log_joint = self.prior.log_weights.double() - 0.5 * (square + volume)
        log_evidence = log_joint.logsumexp(1)
        shift = std[:, None].square() * singular[:, None] / (signal + noise) * inside
        return _Conditional(log_joint - log_evidence[:, None], log_evidence, shift,
                            noise / (signal + noise), directions)

    def _draw_rows(self, exact: _Conditional, index: Tensor, noise: Tensor, rows: slice) -> Tensor:
        return self._draw(exact.pick(rows), index[rows], noise[rows])

    def _draw(self, exact: _Conditional, index: Tensor, noise: Tensor) -> Tensor:
        """Samples ``(b, N, d)`` for components ``(b, N)`` and standard normal noise ``(b, N, d)``."""
        rows = torch.arange(len(index), device=index.device)[:, None]
        std = self.prior.std.double()[index][..., None]
        noise = noise.double()
        # standard deviation s sqrt(kept) in the directions that were measured, s in all others
        less = std * (1 - exact.kept[rows, index].sqrt()) * (noise @ exact.directions.mT)
        moved = (exact.shift[rows, index] - less) @ exact.directions
        return (self.prior.means.double().flatten(1)[index] + std * noise + moved).to(self.prior.dtype)

    def _supported(self, reward: Reward) -> GaussianLikelihood:
        """The reward, if the closed form holds for it; else an error that names other solvers."""
        others = "invflow.NoiseSMC(prior) and invflow.FMTT(prior) take any reward"
        if not isinstance(reward, GaussianLikelihood):
            raise TypeError(
                "the posterior has a closed form for a GaussianLikelihood, not for a "
                f"{type(reward).__name__}: {others}"
            )
        operator = reward.operator
        if not operator.linear:
            raise ValueError(
                f"the posterior has a closed form for linear operators, but {type(operator).__name__} is not "
                f"linear: {others}"
            )
        if tuple(operator.image_shape) != self.prior.image_shape:
            raise ValueError(
                f"the operator measures images of shape {tuple(operator.image_shape)}, but the prior generates "
                f"images of shape {self.prior.image_shape}: build one of them with the other's image_shape"
            )
        shape = matrix_shape(operator)
        if math.prod(shape) > self.max_entries:
            raise ValueError(
                f"this operator's dense matrices have shape {shape} (sets, m, d), {math.prod(shape)} values, "
                f"over max_entries={self.max_entries}: take fewer observations at a time with "
                f"likelihood.select(index), raise max_entries, or use another solver; {others}"
            )
        return reward


class DrawnPosterior(Solver):
    """Independent draws from one known law p(x) e^{r(x)}, in closed form or by rejection, as a reference.

    Args:
        sampler: Function from ``(n, generator)`` to independent draws ``(n, *image_shape)``.
        reward: The reward r, of any number of observations.
        prior: The flow map that is tilted.

    Example:
        >>> import torch, invflow
        >>> problem = invflow.load_problem("mixture/half-plane")
        >>> truth, reward = problem.simulate(2, generator=torch.Generator().manual_seed(0))
        >>> problem.exact_posterior().sample(reward, 100).samples.shape
        torch.Size([2, 100, 2])
    """

    prior: FlowMap

    def __init__(self, sampler: Callable[[int, torch.Generator], Tensor], reward: Reward, *, prior: FlowMap) -> None:
        self.sampler, self.reward, self.prior = sampler, reward, prior

    @torch.no_grad()
    def _sample(self, reward: Reward, n: int, generator: torch.Generator, progress: bool) -> Posterior:
        """Draw from the tilted law; see :meth:`Solver.sample`.

        Raises:
            TypeError: If the reward is not the one whose law is known.
        """
        count = reward.num_observations or 1
        samples = self.sampler(count * n, generator).unflatten(0, (count, n))
        self._check(reward, samples[:, :8])
        return Posterior(samples)

    def prior_samples(self, n: int, *, generator: torch.Generator | int | None = None) -> Tensor:
        """Draw from the prior, ``(n, *image_shape)``: from its exact law if known, otherwise in one step."""
        from invflow.models.mixture import GaussianMixtureFlow

        if isinstance(self.prior, GaussianMixtureFlow):
            return self.prior.decode(self.prior.sample(n, generator=generator))
        return self.prior.generate(n, generator=generator)

    def _check(self, reward: Reward, images: Tensor) -> None:
        """Check that a reward agrees with the known one on images."""
        own = score(self.reward.to(images.device), images)
        try:
            given = score(reward, images)
        except ValueError as error:
            raise TypeError(f"this law is known for one reward, but a {type(reward).__name__} scores its draws with "
                            f"an error ({error}): pass the reward of the problem") from error
        if not torch.allclose(own, given, rtol=1e-3, atol=1e-3 * float(own.abs().mean()) + 1e-6):
            raise TypeError(
                f"this law is known for one reward, but the {type(reward).__name__} scores its draws differently "
                f"({float(given.flatten()[0]):.4g} instead of {float(own.flatten()[0]):.4g}): pass the reward of the "
                "problem, or use invflow.FMTT(prior) or invflow.NoiseSMC(prior), which take any reward"
            )
