"""Sequential Monte Carlo in noise space: exact for the one-step prior as the particles grow."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from invflow._plugins import nearest
from invflow._random import as_generator, draw_noise
from invflow.counting import Countable
from invflow.flowmap import FlowMap
from invflow.posterior import NFE, Posterior
from invflow.reward import Reward
from invflow.smc import (
    RESAMPLERS,
    count_distinct,
    effective_sample_size,
    log_mean_weight,
    next_temperature,
    pareto_k_hat,
    scale_log,
)
from invflow.solvers.base import Solver
from invflow.solvers.noise_convergence import judge, mean_squared_residual
from invflow.solvers.noise_moves import MOVES, Move
from invflow.solvers.noise_target import NoiseProposal, NoiseTarget, Particles

__all__ = ["NoiseSMC", "NoiseSMCState"]

_LEAST_STEP_SIZE = 1e-6
# the acceptance of Langevin moves falls by 1.15 per unit of log h at 57%: a little more than Newton's step
_GAIN = 1.2


@dataclass(frozen=True)
class NoiseSMCState:
    """Where a run stands after one temperature; B observations with N particles each.

    Attributes:
        particles: with ``noise`` ``(B, N, *state_shape)`` and ``images`` ``(B, N, *image_shape)``.
        temperature: ``(B,)``, lambda, from 0 to 1.
        log_weights: ``(B, N)``, of the particles; all 0 where they have been resampled.
        log_evidence: ``(B,)``, of the target at this temperature.
        ancestors: ``(B, N)``, the initial particle that each descends from.
        step_size: ``(B,)``, h of this step's moves.
        first_temperature: ``(B,)``, the first one over 0, which tells how informative the reward is; 0 before.
        ess: ``(B,)``, effective sample size of this step's weights, in particles; NaN where none was made.
        k_hat: ``(B,)``, tail index of this step's weights; NaN where none was made.
        acceptance: ``(B,)``, mean over this step's moves; NaN where none was made.
    """

    particles: Particles
    temperature: Tensor
    log_weights: Tensor
    log_evidence: Tensor
    ancestors: Tensor
    step_size: Tensor
    first_temperature: Tensor
    ess: Tensor
    k_hat: Tensor
    acceptance: Tensor


class NoiseSMC(Solver):
    r"""Tempered sequential Monte Carlo in noise space (Del Moral, Doucet, Jasra 2006).

    The one-step prior x = f(z) with z ~ N(0, I) makes the posterior one over noise, :math:`\pi(z) \propto
    N(z; 0, I) e^{r(f(z))}`. N particles start at the proposal q, which is N(0, I) or an adapter's Gaussian,
    and pass through :math:`q^{1-\lambda} \pi^\lambda` for lambda from 0 to 1. Each lambda is the largest that
    keeps the conditional effective sample size; then the particles are resampled and moved by Markov steps that
    leave the new density invariant. No trajectory is needed, and no score: maps trained jointly with an
    adapter will do.

    It converges to the posterior of the one-step prior as N grows, with any number of moves; how fast depends on
    the moves. Temperatures and step sizes are each observation's own, a step size is changed between
    temperatures only. The estimate of the evidence e^{log_evidence} is consistent, and unbiased where
    ``temperatures`` and the step size (``acceptance=None``) are given beforehand.

    With ``num_moves`` 0 it is importance sampling: one step from q to the posterior. With an adapter this is the
    importance-weighted VFM, and its k-hat says whether VFM alone can be trusted for this observation.

    Args:
        prior: any flow map; the map that the adapter was trained with where there is a proposal.
        proposal: an :class:`~invflow.Adapter`, or any object with ``check_map(prior)`` and ``propose(reward)``;
            None: the particles start at N(0, I).
        moves: ``"crank-nicolson-langevin"``; ``"crank-nicolson"`` or ``"elliptical-slice"``, which need no
            gradient. None: the first for differentiable rewards, else the second.
        num_moves: moves of each particle at each temperature, at least 0.
        ess_threshold: conditional effective sample size to be kept, as a share of N in (0, 1).
        acceptance: share of proposals to be accepted, towards which the step size goes, in (0, 1); None leaves
            the step size as it is. 0.57 suits Langevin moves (Roberts and Rosenthal 1998).
        step_size: h of the first temperature, in (0, 1]; a move keeps sqrt(1 - h^2) of its noise.
        temperatures: ascending, the last 1, in place of adaptive ones.
        resampling: one of ``"multinomial"``, ``"stratified"``, ``"systematic"``, ``"residual"``, ``"ssp"``.
        chunk_size: rows through the map at a time. Results do not depend on it beyond rounding.
        max_temperatures: of an adaptive run; the last of them is 1, however few particles survive it.

    Raises:
        TypeError: for a prior or a proposal that is none.
        ValueError: for a setting out of range or an unknown name; for an adapter of another map.

    Example:
        >>> import torch, invflow
        >>> from invflow.operators import MatrixOperator
        >>> prior = invflow.GaussianMixtureFlow(torch.tensor([[-2.0, 0.0], [2.0, 0.0]]), std=0.5)
        >>> operator = MatrixOperator(torch.tensor([[0.0, 1.0]]), image_shape=(2,))
        >>> likelihood = invflow.GaussianLikelihood(operator, torch.tensor([[0.4]]), sigma=0.3)
        >>> g = torch.Generator().manual_seed(0)
        >>> invflow.NoiseSMC(prior).sample(likelihood, 256, generator=g).samples.shape
        torch.Size([1, 256, 2])
    """

    def __init__(self, prior: FlowMap, *, proposal: NoiseProposal | None = None, moves: str | None = None,
                 num_moves: int = 5, ess_threshold: float = 0.5, acceptance: float | None = 0.57,
                 step_size: float = 0.5, temperatures: Sequence[float] | None = None,
                 resampling: str = "systematic", chunk_size: int = 256, max_temperatures: int = 200) -> None:
        if not isinstance(prior, FlowMap):
            raise TypeError(f"the prior is a {type(prior).__name__}, expected an invflow.FlowMap, such as "
                            "invflow.load_prior('mnist')")
        if proposal is not None:
            if not isinstance(proposal, NoiseProposal):
                raise TypeError(f"a {type(proposal).__name__} is no proposal, which needs check_map(prior) and "
                                "propose(reward): pass an invflow.Adapter, such as vfm.adapter")
            proposal.check_map(prior)
        for kind, name, known in (("moves", moves, MOVES), ("resampling", resampling, RESAMPLERS)):
            if name is not None and name not in known:
                raise ValueError(f"{kind}={name!r} is not known: {nearest(name, list(known))}")
        if num_moves < 0 or chunk_size < 1 or max_temperatures < 1:
            raise ValueError(f"num_moves={num_moves} must be at least 0, chunk_size={chunk_size} and "
                             f"max_temperatures={max_temperatures} at least 1")
        if not 0 < ess_threshold < 1 or not (acceptance is None or 0 < acceptance < 1) or not 0 < step_size <= 1:
            raise ValueError(f"ess_threshold={ess_threshold} and acceptance={acceptance} must lie in (0, 1), "
                             f"step_size={step_size} in (0, 1]")
        self.temperatures = None if temperatures is None else _checked_temperatures(temperatures)
        if num_moves == 0 and self.temperatures is not None and len(self.temperatures) > 1:
            raise ValueError("without moves the weights take one step to temperature 1: pass temperatures only "
                             "with num_moves over 0")
        self.prior, self.proposal = prior, proposal
        self.moves, self.num_moves, self.resampling = moves, num_moves, resampling
        self.ess_threshold, self.acceptance, self.step_size = ess_threshold, acceptance, step_size
        self.chunk_size, self.max_temperatures = chunk_size, max_temperatures

    @torch.no_grad()
    def sample(self, reward: Reward, num_samples: int, *, generator: torch.Generator | None = None,
               progress: bool = False) -> Posterior:
        """Draw posterior samples; see :meth:`Solver.sample`.

        Returns:
            With moves, particles that were resampled and then moved: equal weights, so that ``ess()`` is None,
            and dependent, as ``distinct_ancestors`` tells. Without moves, weighted particles. Diagnostics, for
            each observation: ``temperatures`` and ``acceptance`` ``(B, T)`` (after an observation has arrived: 1
            and NaN); ``distinct_ancestors``, initial particles with descendants left; ``least_ess``, the least
            effective sample size of a step's weights, in particles; ``k_hat``, the largest of a step's weights;
            ``step_size``, the last; ``residual``, the mean squared residual in sigma^2, where the reward has
            one; and ``converged``, whether all of these are as they should be, see the warning.

        Raises:
            ValueError: for under one sample; for Langevin moves with a reward that has no gradient; if no
                particle of an observation has a finite reward.

        Warns:
            UserWarning: of observations for which it has not converged, with what was seen.
        """
        from tqdm import tqdm

        start = time.perf_counter()
        trace: list[tuple[Tensor, ...]] = []
        with ExitStack() as scopes, tqdm(disable=not progress, desc="NoiseSMC", unit="temperature",
                                         delay=2) as bar:
            counted = [m for m in (self.prior, self.proposal) if isinstance(m, Countable)]
            calls = [scopes.enter_context(module.count()) for module in counted]
            for state in self.iterate(reward, num_samples, generator=generator):
                trace.append((state.temperature, state.acceptance, state.ess, state.k_hat))
                if progress:
                    bar.update()
                    bar.set_postfix(temperature=f"{float(state.temperature.min()):.3g}")
        temperatures, acceptance, ess, k_hat = (torch.stack(v[1:], dim=1) for v in zip(*trace))
        diagnostics = {
            "temperatures": temperatures, "acceptance": acceptance,
            "distinct_ancestors": count_distinct(state.ancestors),
            "least_ess": ess.nan_to_num(nan=torch.inf).amin(1),
            # without a single number, NaN
            "k_hat": torch.where(k_hat.isnan().all(1), torch.nan, k_hat.nan_to_num(nan=-torch.inf).amax(1)),
            "step_size": state.step_size,
        }
        residual = mean_squared_residual(reward, state.particles.images, state.log_weights, self.chunk_size)
        if residual is not None:
            diagnostics["residual"] = residual
        diagnostics["converged"], complaint = judge(diagnostics, reward, num_samples, moved=self.num_moves > 0)
        if complaint is not None:
            warnings.warn(complaint, stacklevel=3)  # over the decorator
        rows = state.ancestors.numel()
        nfe = NFE(sum(c.forward for c in calls) / rows, sum(c.backward for c in calls) / rows)
        return Posterior(state.particles.images, None if self.num_moves else state.log_weights, state.log_evidence,
                         nfe, time.perf_counter() - start, diagnostics, self.settings())

    @torch.no_grad()
    def iterate(self, reward: Reward, num_samples: int, *,
                generator: torch.Generator | None = None) -> Iterator[NoiseSMCState]:
        """Run the particles through the temperatures, as :meth:`sample` does.

        Args:
            reward: over B observations, or any number (taken as one).
            num_samples: N, at least 1.
            generator: source of randomness.

        Yields:
            A :class:`NoiseSMCState` for temperature 0, and one after each step. An observation that has arrived at
            1 stays as it is.

        Raises:
            ValueError: as :meth:`sample`.
        """
        if num_samples < 1:
            raise ValueError(f"num_samples is {num_samples}: ask for at least one sample")
        move, generator = self._move(reward), as_generator(generator)
        proposal = None if self.proposal is None else self.proposal.propose(reward)
        target = NoiseTarget(self.prior, reward, proposal, gradient=move.uses_gradient and self.num_moves > 0,
                             chunk_size=self.chunk_size)
        state = self._start(target, num_samples, generator)
        yield state
        step = 0
        while bool((state.temperature < 1).any()):
            state = self._advance(target, move, state, step, generator)
            step += 1
            yield state

    def prior_samples(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        """Draw from the one-step prior that is tilted, ``(n, *image_shape)``."""
        return self.prior.generate(n, 1, generator=generator, chunk_size=self.chunk_size)

    def settings(self) -> dict[str, Any]:
        """Settings as plain values, kept with each posterior."""
        names = ("moves", "num_moves", "ess_threshold", "acceptance", "temperatures", "resampling", "chunk_size",
                 "max_temperatures")
        proposal = None if self.proposal is None else type(self.proposal).__name__
        return {"solver": "NoiseSMC", "proposal": proposal, "initial_step_size": self.step_size,
                **{name: getattr(self, name) for name in names}}

    # -- one run ------------------------------------------------------------------------------------------------

    def _move(self, reward: Reward) -> Move:
        name = self.moves or ("crank-nicolson-langevin" if reward.differentiable else "crank-nicolson")
        if MOVES[name].uses_gradient and self.num_moves > 0 and not reward.differentiable:
            raise ValueError(
                f"moves={name!r} take gradients, which the reward {type(reward).__name__} says it has not "
                '(differentiable=False): use moves="crank-nicolson" or moves="elliptical-slice"'
            )
        return MOVES[name]

    def _start(self, target: NoiseTarget, count: int, generator: torch.Generator) -> NoiseSMCState:
        observations = target.num_observations
        standard = draw_noise((observations, count, *self.prior.state_shape), generator)
        standard = standard.to(device=self.prior.device, dtype=self.prior.dtype)
        rows = torch.arange(observations, device=self.prior.device)
        particles = target.evaluate(target.initial(standard), rows)
        none = torch.full_like(particles.log_reward[:, 0], torch.nan)
        zero = torch.zeros_like(none)
        return NoiseSMCState(
            particles, zero, torch.zeros_like(particles.log_reward), zero,
            torch.arange(count, device=rows.device).expand(observations, -1), zero + self.step_size, zero,
            none, none, none)

    def _advance(self, target: NoiseTarget, move: Move, state: NoiseSMCState, step: int,
                 generator: torch.Generator) -> NoiseSMCState:
        """One temperature: reweight, and with moves resample and move."""
        active = state.temperature < 1
        log_ratio = target.log_ratio(state.particles)
        temperature = self._next_temperature(log_ratio, state.temperature, step)
        step_size = self._adapted(move, state, temperature)
        increments = scale_log((temperature - state.temperature)[:, None], log_ratio)
        gained = log_mean_weight(torch.zeros_like(increments), increments)
        if not bool(torch.isfinite(gained).all()):
            b = int((~torch.isfinite(gained)).nonzero()[0])
            raise ValueError(
                f"the rewards of observation {b} give its {increments.shape[1]} particles no weight to go on with: "
                f"they lie between {float(log_ratio[b].min())} and {float(log_ratio[b].max())}; a reward may be "
                "-inf at some images, not at all of them, and never +inf or NaN: check it, or take more particles"
            )
        state = replace(
            state, temperature=temperature, log_evidence=state.log_evidence + gained, step_size=step_size,
            first_temperature=torch.where(state.temperature == 0, temperature, state.first_temperature),
            ess=torch.where(active, effective_sample_size(increments), torch.nan),
            k_hat=torch.where(active, pareto_k_hat(increments), torch.nan))
        if self.num_moves == 0:
            return replace(state, log_weights=increments)
        # drawn for all observations, so that the random numbers of one do not depend on when others arrive
        index = RESAMPLERS[self.resampling](increments.softmax(1), increments.shape[1], generator)
        rows = active.nonzero()[:, 0]
        particles = state.particles.gather(rows, index[rows])
        accepted = torch.zeros_like(temperature[rows])
        for _ in range(self.num_moves):
            random = move.draw(tuple(state.particles.noise.shape), generator).select(rows).to(particles.noise)
            particles, rate = move(target, particles, rows, temperature[rows], state.step_size[rows], random)
            accepted += rate / self.num_moves
        acceptance = torch.full_like(temperature, torch.nan).index_copy(0, rows, accepted)
        return replace(
            state, particles=state.particles.write(rows, particles), acceptance=acceptance,
            ancestors=torch.where(active[:, None], state.ancestors.gather(1, index), state.ancestors))

    def _next_temperature(self, log_ratio: Tensor, temperature: Tensor, step: int) -> Tensor:
        if self.temperatures is not None:
            return torch.full_like(temperature, self.temperatures[step])
        if self.num_moves == 0 or step == self.max_temperatures - 1:
            return torch.ones_like(temperature)
        return next_temperature(log_ratio, temperature, self.ess_threshold)

    def _adapted(self, move: Move, state: NoiseSMCState, temperature: Tensor) -> Tensor:
        """Step size at the next temperature, from the acceptance at the last and from both temperatures.

        Along a direction of which e^r knows the inverse variance L, the target has the inverse variance 1 + lambda L
        in units of the reference, and h goes with its inverse square root. The first temperature is where the reward
        begins to tell the particles apart, L = 1 / first: without this forecast h would trail behind.
        """
        if self.acceptance is None or not move.tunable:
            return state.step_size
        first, last = state.first_temperature, state.temperature
        change = _GAIN * (state.acceptance - self.acceptance) - 0.5 * ((first + temperature) / (first + last)).log()
        adapted = (state.step_size * change.exp()).clamp(_LEAST_STEP_SIZE, 1.0)
        # as it was before the first temperature, and after the last
        return torch.where(state.acceptance.isnan() | (last == 1), state.step_size, adapted)


def _checked_temperatures(temperatures: Sequence[float]) -> tuple[float, ...]:
    values = tuple(float(t) for t in temperatures)
    ascending = all(low < high for low, high in zip((0.0, *values), values))
    if not values or not ascending or values[-1] != 1.0:
        raise ValueError(f"temperatures are {values}, expected ascending ones over 0 of which the last is 1, such "
                         "as [0.01, 0.1, 1.0]")
    return values
