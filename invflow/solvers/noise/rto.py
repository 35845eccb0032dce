"""Randomise-then-optimise in noise space: independent draws, each the solution of a perturbed problem."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from invflow._core.chunks import ChunkSize, check_chunk_size
from invflow._core.random import as_generator, draw_noise
from invflow.flowmap import FlowMap, rows_at_a_time
from invflow.likelihood import GaussianLikelihood
from invflow.linear.structure import zero_unobserved
from invflow.posterior import Posterior
from invflow.reward import Reward
from invflow.smc import log_mean_weight, pareto_k_hat, precise
from invflow.solver import Solver
from invflow.solvers.noise.convergence import judge_draws, residual_of_samples
from invflow.solvers.noise.lbfgs import BatchedLBFGS
from invflow.solvers.noise.perturbed import PerturbedProblem
from invflow.solvers.noise.rto_weights import Linearisation, find_missed, solve_linearised
from invflow.solvers.noise.target import NoiseProposal, check_prior_and_proposal

__all__ = ["Draws", "NoiseRTO", "NoiseRTOState"]

# with weights: number of further starts that search for other solutions, number of draws per observation that are
# checked, and distance of the starts in standard deviations. Solutions missed by fewer than a few in a hundred draws
# bias the weights by as little
_STARTS, _MOST_CHECKED, _START_SPREAD = 4, 64, 2.0


@dataclass(frozen=True)
class NoiseRTOState:
    """State of one chunk of draws after one iteration.

    Attributes:
        rows: Indices of the draws among all B N, ordered by observation.
        noise: z, ``(n, *state_shape)``.
        objective: |z - xi|^2 / 2 + misfit, ``(n,)``; with ``weights``, half the squared residual of the equations.
        gradient_norm: Norm of the objective's gradient, ``(n,)``; with ``weights``, the residual of the equations.
        iterations: Number of iterations, ``(n,)``.
        active: Whether a draw is still being optimised, ``(n,)``.
        converged: Whether it has converged, ``(n,)``.
        log_weights: Log weights, ``(n,)``; None without ``weights``.
        missed: Log weights of solutions found from other starts, ``(n,)``, see
            :func:`~invflow.solvers.noise.rto_weights.find_missed`; only with ``weights``, in the last state.
    """

    rows: slice
    noise: Tensor
    objective: Tensor
    gradient_norm: Tensor
    iterations: Tensor
    active: Tensor
    converged: Tensor
    log_weights: Tensor | None = None
    missed: Tensor | None = None


@dataclass(frozen=True)
class Draws:
    """Result of a run of :class:`NoiseRTO`: B observations with N draws each.

    Attributes:
        noise: z, ``(B, N, *state_shape)``.
        objective, gradient_norm, iterations, converged: Each ``(B, N)``, see :class:`NoiseRTOState`.
        log_weights, missed: Each ``(B, N)``; None without ``weights``.
    """

    noise: Tensor
    objective: Tensor
    gradient_norm: Tensor
    iterations: Tensor
    converged: Tensor
    log_weights: Tensor | None
    missed: Tensor | None = None

    def missed_share(self) -> Tensor:
        """Lower bound on the posterior share of solutions that the checked draws have missed, ``(B,)``."""
        assert self.log_weights is not None
        assert self.missed is not None
        both = torch.stack([part[:, :_MOST_CHECKED].logsumexp(1) for part in (self.missed, self.log_weights)])
        return both.softmax(0)[0].nan_to_num(nan=0.0)


class NoiseRTO(Solver):
    r"""Randomise-then-optimise in noise space (Bardsley, Solonen, Haario, Laine 2014).

    The prior is the one-step prior x = f(z) with z ~ N(0, I), and y = A(x) + sigma e. Each draw takes fresh
    xi ~ N(0, I) and e ~ N(0, I). L-BFGS, with all draws in parallel, then minimises

    .. math:: |z - \xi|^2 / 2 + |y + \sigma e - A f(z)|^2 / (2 \sigma^2).

    Draws are independent and share no ancestor. If A f is linear, they are posterior draws, exact up to the tolerance
    of the optimiser. Otherwise they are **an approximation** (also known as randomised maximum likelihood, Oliver, He,
    Reynolds 1996): they explain the measurement to the noise level and spread over its explanations, but the share of
    each explanation is not that of the posterior, and no weight corrects it. ``diagnostics["approximate"]`` reports
    this, and ``converged`` is True only if the draws show A f to be linear between them (``bend``). Moves correct the
    draws: ``NoiseSMC(prior, start="rto")``.

    With ``weights=True`` the draws are importance-weighted and converge to the posterior as N grows. They then solve
    :math:`z - \xi + G_*^T (A f(z) - y - \sigma e) / \sigma = 0`, where the linearisation :math:`G_*` of
    :math:`A f / \sigma` is fixed at one point per observation. The solutions have the known density

    .. math:: q(z) \propto |\det(I + G(z) G_*^T)| \,
        e^{-v^T (I + G_*^T G_*)^{-1} v / 2}, \quad v = z + G_*^T (A f(z) - y) / \sigma,

    provided that the equation has one solution. Each iteration takes m backward calls, where m is the number of
    measured values, so this is only for small m. A draw without a solution has weight zero. Where f folds, the equation
    has several solutions, and the posterior at solutions that were not drawn is missing. Up to 64 draws of each
    observation are therefore solved from four more starts each (with 64 draws, five times the cost). The posterior
    share of the other solutions that they find is ``missed_share``. Over 2%, the draws have not converged.

    Args:
        prior: Any flow map. With a proposal, the map that the adapter was trained with.
        proposal: An :class:`~invflow.Adapter`. Draws start at its noise, and its standard deviation scales the
            optimiser. It changes the cost, but not the minimised objective. None: draws start at xi.
        weights: Whether to weight the draws; see above.
        max_iterations: Maximum number of iterations: of L-BFGS, with a little over one forward and one backward call
            each, or of Newton's method with ``weights``.
        memory: Number of curvature pairs kept for each draw.
        tolerance: Smallest decrease of the objective (a negative log density) in ten iterations; with less a draw
            stops.
        chunk_size: Number of draws through the map at a time; None for 256 on a CPU, and as many as fit on a GPU.
            Results do not depend on it beyond rounding.

    Raises:
        TypeError: For a prior or a proposal of the wrong type.
        ValueError: For a setting out of range; for an adapter of another map.

    Example:
        >>> import torch, invflow
        >>> from invflow.operators import MatrixOperator
        >>> prior = invflow.GaussianMixtureFlow(torch.tensor([[1.0, 0.0]]), std=0.5)
        >>> operator = MatrixOperator(torch.tensor([[0.0, 1.0]]), image_shape=(2,))
        >>> likelihood = invflow.GaussianLikelihood(operator, torch.tensor([[0.4]]), sigma=0.3)
        >>> g = torch.Generator().manual_seed(0)
        >>> invflow.NoiseRTO(prior).sample(likelihood, 64, generator=g).samples.shape
        torch.Size([1, 64, 2])
    """

    prior: FlowMap

    def __init__(self, prior: FlowMap, *, proposal: NoiseProposal | None = None, weights: bool = False,
                 max_iterations: int = 200, memory: int = 50, tolerance: float = 1.0,
                 chunk_size: int | None = None) -> None:
        check_prior_and_proposal("NoiseRTO", prior, proposal)
        if max_iterations < 1 or memory < 1 or not tolerance > 0:
            raise ValueError(f"max_iterations={max_iterations} and memory={memory} must be at least 1, "
                             f"tolerance={tolerance} over 0")
        self.prior, self.proposal, self.weights = prior, proposal, weights
        self.max_iterations, self.memory, self.tolerance = max_iterations, memory, tolerance
        self.chunk_size = check_chunk_size(chunk_size)

    @torch.no_grad()
    def _sample(self, reward: Reward, n: int, generator: torch.Generator, progress: bool) -> Posterior:
        """Draw posterior samples; see :meth:`Solver.sample`.

        Returns:
            Independent samples, weighted if ``weights`` is set. Diagnostics for each observation: ``residual``, the
            root mean square of (y - A x) / sigma with the unperturbed y; ``objective``, ``gradient_norm`` and
            ``iterations``, means over the draws; ``solved``, the share of draws whose optimiser converged, to a minimum
            no worse than most; ``k_hat`` and ``missed_share`` with ``weights``; ``approximate``, whether the draws are
            an approximation; without weights ``bend``, how far A f is from linear between the draws, see :meth:`bend`;
            and ``converged``, whether all of these pass their checks, see the warning. Without weights it is True only
            if the draws show A f to be linear.

        Raises:
            TypeError: For a reward that is not a Gaussian likelihood.
            ValueError: With ``weights``, for over 256 measured values.

        Warns:
            UserWarning: For observations that have not converged, with the reason.
        """
        draws = self.draw(reward, n, generator=generator, progress=progress)
        images = self._size().map(self.prior.one_step, draws.noise.flatten(0, 1))
        images = images.unflatten(0, draws.objective.shape)
        bend = None if self.weights else self.bend(draws.noise, images, cast(GaussianLikelihood, reward))
        diagnostics, complaint = self.examine(draws, images, reward, bend)
        if complaint is not None:
            warnings.warn(complaint, stacklevel=5)  # above the decorators and Solver.sample
        evidence = None
        if draws.log_weights is not None:
            evidence = log_mean_weight(torch.zeros_like(draws.log_weights), draws.log_weights)
        return Posterior(images, draws.log_weights, evidence, diagnostics=diagnostics)

    @torch.no_grad()
    def draw(self, reward: Reward, num_samples: int, *, generator: torch.Generator | int | None = None,
             progress: bool = False) -> Draws:
        """Run all chunks to their end, in noise space. Arguments and errors are those of :meth:`sample`."""
        from tqdm import tqdm

        ends: dict[int, NoiseRTOState] = {}
        with tqdm(disable=not progress, desc="NoiseRTO", unit="iteration", delay=2) as bar:
            for state in self.iterate(reward, num_samples, generator=generator):
                ends[state.rows.start] = state
                if progress:
                    bar.update()
                    bar.set_postfix(objective=f"{float(state.objective.median()):.4g}",
                                    active=int(state.active.sum()))
        states = [ends[k] for k in sorted(ends)]

        def gather(name: str) -> Tensor:
            result: Tensor = torch.cat([getattr(state, name) for state in states]).unflatten(0, (-1, num_samples))
            return result

        log_weights, missed = (gather(name) if self.weights else None for name in ("log_weights", "missed"))
        return Draws(gather("noise"), gather("objective"), gather("gradient_norm"), gather("iterations"),
                     gather("converged"), log_weights, missed)

    @torch.no_grad()
    def iterate(self, reward: Reward, num_samples: int, *,
                generator: torch.Generator | int | None = None) -> Iterator[NoiseRTOState]:
        """Run the chunks one after another, as :meth:`sample` does.

        Args:
            reward: A :class:`~invflow.GaussianLikelihood` over B observations.
            num_samples: Number of samples N, at least 1.
            generator: Random generator.

        Yields:
            A :class:`NoiseRTOState` of a chunk before its first iteration and after each. A chunk that does not fit in
            memory restarts with half the rows.

        Raises:
            TypeError, ValueError: As in :meth:`sample`.
        """
        likelihood = self._checked(reward, num_samples)
        generator, prior = as_generator(generator), self.prior
        observations = len(likelihood.y)
        shape = (observations, num_samples)
        xi = draw_noise((*shape, *prior.state_shape), generator, prior.device).to(prior.dtype).flatten(0, 1)
        y = likelihood.y
        error = draw_noise((*shape, *y.shape[1:]), generator, y.device).to(y).flatten(0, 1)
        proposal = None
        if self.proposal is not None:
            mean, std = self.proposal.propose(reward)
            proposal = (mean.detach().to(xi), std.detach().to(xi))
        owner = torch.arange(observations, device=xi.device).repeat_interleave(num_samples)
        linearisation = self._linearise(likelihood, proposal) if self.weights else None
        checked = min(num_samples, _MOST_CHECKED)  # the first draws of each observation
        index = torch.arange(num_samples, device=xi.device).repeat(observations)
        starts = _START_SPREAD * draw_noise((_STARTS, observations, checked, *prior.state_shape), generator,
                                            prior.device).to(xi).flatten(3) if self.weights else None

        def run(rows: slice) -> Iterator[NoiseRTOState]:
            chosen = likelihood.select(owner[rows])
            problem = PerturbedProblem(prior, chosen, xi[rows], error[rows], places=(rows.start, num_samples))
            if linearisation is not None and starts is not None:
                local = linearisation.select(owner[rows])
                for solution in solve_linearised(problem, local, self.max_iterations):
                    state = NoiseRTOState(rows, solution.noise, 0.5 * solution.residual.square(), solution.residual,
                                          solution.iterations, solution.active, solution.converged,
                                          solution.log_weights)
                    yield state
                missed, few = torch.full_like(solution.log_weights, -torch.inf), (index[rows] < checked).nonzero()[:, 0]
                if len(few):
                    again = PerturbedProblem(prior, chosen.select(few), xi[rows][few],
                                             error[rows][few], places=(rows.start, num_samples))
                    missed[few] = find_missed(again, local.select(few), solution.take(few),
                                              starts[:, owner[rows][few], index[rows][few]], self.max_iterations)
                yield replace(state, missed=missed)
                return
            start, scale = problem.xi, None
            if proposal is not None:
                scale = proposal[1][owner[rows]]
                start = torch.addcmul(proposal[0][owner[rows]], scale, start)
                scale = scale.flatten(1)
            optimiser = BatchedLBFGS(problem.value_and_gradient, start.flatten(1), scale=scale, memory=self.memory,
                                     tolerance=self.tolerance)
            yield self._state(rows, optimiser)
            for problem.iteration in range(1, self.max_iterations + 1):
                if not optimiser.running:
                    break
                optimiser.step()
                yield self._state(rows, optimiser)

        yield from self._size().stream(len(owner), run)

    def _size(self) -> ChunkSize:
        return ChunkSize(rows_at_a_time(self.chunk_size, self.prior), "NoiseRTO")

    def _state(self, rows: slice, optimiser: BatchedLBFGS) -> NoiseRTOState:
        return NoiseRTOState(rows, optimiser.point.reshape(-1, *self.prior.state_shape), optimiser.value.clone(),
                             optimiser.gradient.norm(dim=1), optimiser.iterations.clone(), optimiser.active.clone(),
                             optimiser.levelled.clone())

    def _checked(self, reward: Reward, num_samples: int) -> GaussianLikelihood:
        if num_samples < 1:
            raise ValueError(f"num_samples is {num_samples}: ask for at least one sample")
        if not isinstance(reward, GaussianLikelihood):
            raise TypeError(f"the reward is a {type(reward).__name__}, but randomise-then-optimise needs a "
                            "measurement with Gaussian noise: pass an invflow.GaussianLikelihood, or use NoiseSMC, "
                            "which takes any reward")
        return reward

    def _linearise(self, likelihood: GaussianLikelihood, proposal: tuple[Tensor, Tensor] | None) -> Linearisation:
        """Fixed linearisation at the most probable noise of each observation."""
        zero = torch.zeros((len(likelihood.y), *self.prior.state_shape), device=self.prior.device,
                           dtype=self.prior.dtype)
        problem = PerturbedProblem(self.prior, likelihood, zero, torch.zeros_like(likelihood.y))
        mean, std = (zero, torch.ones_like(zero)) if proposal is None else proposal
        optimiser = BatchedLBFGS(problem.value_and_gradient, mean.flatten(1), scale=std.flatten(1),
                                 memory=self.memory, tolerance=min(self.tolerance, 1e-3))
        for _ in range(self.max_iterations):
            if not optimiser.running:
                break
            optimiser.step()
        return Linearisation.at(problem, optimiser.point.view_as(zero))

    @torch.no_grad()
    def bend(self, noise: Tensor, images: Tensor, likelihood: GaussianLikelihood) -> Tensor:
        r"""How far the scaled measurement h = A f / sigma is from linear between the draws.

        If h is linear, draws are exact up to the tolerance of the optimiser; the draws can only show how linear it is
        between them. The bend is the root mean square, over pairs of draws, of :math:`|h((z + z') / 2) - (h(z) + h(z'))
        / 2|`. It is zero if h is linear in the convex hull of the draws. A pair in two modes with something else
        between them bends by their distance in units of the noise. It takes one forward call per draw.

        Args:
            noise: Noise of the draws, ``(B, N, *state_shape)``.
            images: Images of the draws, ``(B, N, *image_shape)``.
            likelihood: Likelihood of the B observations.

        Returns:
            ``(B,)``, in float64; NaN for a single draw, which shows nothing.
        """
        if noise.shape[1] < 2:
            return torch.full((len(noise),), torch.nan, dtype=torch.float64, device=noise.device)
        middle = 0.5 * (noise + noise.roll(1, 1))
        between = self._size().map(self.prior.one_step, middle.flatten(0, 1))
        ends = likelihood.predict(images)
        second = likelihood.predict(between.unflatten(0, noise.shape[:2])) - 0.5 * (ends + ends.roll(1, 1))
        second = zero_unobserved(likelihood.operator, second)
        return precise(second).flatten(2).square().sum(2).mean(1).sqrt() / precise(likelihood.sigma)

    def examine(self, draws: Draws, images: Tensor, reward: Reward,
                bend: Tensor | None = None) -> tuple[dict[str, Any], str | None]:
        """Diagnostics of draws with their images ``(B, N, *image_shape)``, and a warning or None."""
        weights = torch.zeros_like(draws.objective) if draws.log_weights is None else draws.log_weights
        diagnostics: dict[str, Any] = {
            "objective": draws.objective.mean(1), "gradient_norm": precise(draws.gradient_norm).mean(1),
            "iterations": precise(draws.iterations).mean(1), "approximate": not self.weights,
        }
        residual = residual_of_samples(reward, images, weights, self._size().rows)
        assert residual is not None  # a Gaussian likelihood has a residual
        diagnostics["residual"] = residual
        if draws.log_weights is not None:
            diagnostics["k_hat"] = pareto_k_hat(draws.log_weights)
            diagnostics["missed_share"] = draws.missed_share()
        if bend is not None:
            diagnostics["bend"] = bend
        verdict = judge_draws(diagnostics, draws.objective, draws.converged, reward,
                              log_weights=draws.log_weights)
        diagnostics["solved"], diagnostics["converged"], complaint = verdict
        return diagnostics, complaint

    def prior_samples(self, n: int, *, generator: torch.Generator | int | None = None) -> Tensor:
        """Draw from the one-step prior f(z), ``(n, *image_shape)``."""
        return self.prior.generate(n, 1, generator=generator, chunk_size=self._size().rows)
