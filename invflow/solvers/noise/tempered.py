"""Sequential Monte Carlo in noise space: converges to the one-step prior's posterior as particles grow."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from invflow._core.chunks import check_chunk_size
from invflow._core.plugins import nearest
from invflow._core.random import as_generator, draw_noise
from invflow.flowmap import FlowMap, rows_at_a_time
from invflow.posterior import Posterior
from invflow.reward import Reward
from invflow.smc import (
    RESAMPLERS,
    count_distinct,
    effective_ancestors,
    effective_sample_size,
    log_mean_weight,
    next_temperature,
    pareto_k_hat,
    precise,
    scale_log,
)
from invflow.solver import Solver
from invflow.solvers.noise.chains import ChainRecord, run_chains
from invflow.solvers.noise.convergence import judge, judge_chains, residual_of_samples
from invflow.solvers.noise.hamiltonian import MOVES, Hamiltonian
from invflow.solvers.noise.metric import Preconditioner
from invflow.solvers.noise.moves import Move
from invflow.solvers.noise.rto import Draws, NoiseRTO
from invflow.solvers.noise.state import NoiseSMCState
from invflow.solvers.noise.target import NoiseProposal, NoiseTarget, Particles, check_prior_and_proposal

__all__ = ["NoiseSMC", "NoiseSMCState"]

_LEAST_STEP_SIZE = 1e-6
# the acceptance of Langevin moves falls by 1.15 per unit of log h at 57%; this is a little more than a Newton step
_GAIN = 1.2


class NoiseSMC(Solver):
    r"""Tempered sequential Monte Carlo in noise space (Del Moral, Doucet, Jasra 2006).

    With the one-step prior x = f(z), z ~ N(0, I), the posterior is a density over noise, :math:`\pi(z) \propto
    N(z; 0, I) e^{r(f(z))}`. N particles start from the proposal q, which is N(0, I) or an adapter's Gaussian,
    and pass through :math:`q^{1-\lambda} \pi^\lambda` for lambda from 0 to 1. Each lambda is the largest that
    keeps the conditional effective sample size. The particles are then resampled and moved by Markov steps that
    leave the new density invariant. This needs neither trajectories nor scores, so maps trained jointly with an
    adapter can be used.

    It converges to the posterior of the one-step prior as N grows, with any number of moves; the rate depends on
    the moves. Each observation has its own temperatures and step sizes. A step size changes only between
    temperatures. The estimate of the evidence e^{log_evidence} is consistent. It is unbiased if ``temperatures``
    and the step size (``acceptance=None``) are fixed beforehand.

    **Sharp likelihoods on images** are too hard for the plain moves: the posterior is thin along a hundred directions
    that change from place to place, and particles resampled at dozens of temperatures all descend from a few. Two
    options help. ``moves="preconditioned-hamiltonian"`` follows the posterior in a metric learnt from gradients of
    earlier moves (:class:`~invflow.solvers.noise.metric.Preconditioner`). ``start="rto"`` starts the particles at
    temperature 1 from :class:`~invflow.NoiseRTO`, independent draws that explain the measurement but are not an exact
    sample. There, ``num_adaptations`` moves set step size and metric. Both are then frozen, and ``num_moves``
    Metropolis-corrected moves follow. Every particle is then the end of its own Markov chain, which converges to the
    posterior as the number of moves grows, not as N grows, and there is no log evidence. The moves correct local
    errors. They rarely lead from one explanation of the measurement to another; then the shares of explanations are
    those of the draws. ``memory`` in the diagnostics shows this, and ``converged`` accounts for it. With
    ``start=NoiseRTO(prior, weights=True)``, for small measurements, the draws are first weighted and resampled. There
    is then a log evidence, and it also converges as N grows, unless the map folds (``missed_share``).

    With ``num_moves`` 0 it is importance sampling: one step from q to the posterior. With an adapter this is the
    importance-weighted VFM, and its k-hat shows whether VFM alone can be trusted for this observation.

    Args:
        prior: Any flow map. With a proposal, the map that the adapter was trained with.
        proposal: An :class:`~invflow.Adapter`, or any object with ``check_map(prior)`` and ``propose(reward)``.
            None: the particles start from N(0, I).
        start: Start of the particles. ``"prior"``: at temperature 0, from the proposal or N(0, I). ``"rto"`` or a
            :class:`~invflow.NoiseRTO` with the same prior: at temperature 1, from its draws; a proposal then only helps
            the optimiser.
        moves: ``"crank-nicolson-langevin"``, ``"hamiltonian"`` or ``"preconditioned-hamiltonian"``;
            ``"crank-nicolson"`` or ``"elliptical-slice"``, which need no gradient. None: the first for differentiable
            rewards, otherwise ``"crank-nicolson"``; the third with a start by randomise-then-optimise.
        num_moves: Number of moves of each particle at each temperature, at least 0 (few moves at many temperatures beat
            many moves at few). None: 6, or 10 with a start by randomise-then-optimise.
        leapfrog_steps: Number of steps of each Hamiltonian move, and of its forward and backward calls. None: 40 with a
            start by randomise-then-optimise, otherwise 10.
        num_adaptations: Number of moves before step size and metric are frozen, with a start by
            randomise-then-optimise.
        ess_threshold: Conditional effective sample size to keep, as a share of N in (0, 1).
        acceptance: Target share of accepted proposals, in (0, 1), to which the step size adapts. None keeps the step
            size. ``"best"``: 0.57, which suits Langevin moves (Roberts and Rosenthal 1998), or 0.8 for Hamiltonian
            moves.
        step_size: h of the first temperature, in (0, 1]; a move keeps sqrt(1 - h^2) of its noise.
        temperatures: Ascending temperatures that end with 1, instead of adaptive ones.
        resampling: One of ``"multinomial"``, ``"stratified"``, ``"systematic"``, ``"residual"``, ``"ssp"``.
        chunk_size: Number of rows through the map at a time; None for 256 on a CPU, and as many as fit on a GPU.
            Results do not depend on it beyond rounding.
        max_temperatures: Maximum number of temperatures of an adaptive run. The last one is 1, however few particles
            survive it.

    Raises:
        TypeError: For a prior or a proposal of the wrong type.
        ValueError: For a setting out of range or an unknown name; for an adapter of another map.

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

    prior: FlowMap

    def __init__(self, prior: FlowMap, *, proposal: NoiseProposal | None = None, start: str | NoiseRTO = "prior",
                 moves: str | None = None, num_moves: int | None = None, leapfrog_steps: int | None = None,
                 num_adaptations: int = 3, ess_threshold: float = 0.9, acceptance: float | str | None = "best",
                 step_size: float = 0.5, temperatures: Sequence[float] | None = None, resampling: str = "systematic",
                 chunk_size: int | None = None, max_temperatures: int = 400) -> None:
        check_prior_and_proposal("NoiseSMC", prior, proposal)
        for kind, name, known in (("moves", moves, MOVES), ("resampling", resampling, RESAMPLERS)):
            if name is not None and name not in known:
                raise ValueError(f"{kind}={name!r} is unknown: {nearest(name, list(known))}")
        num_moves = (6 if start == "prior" else 10) if num_moves is None else num_moves
        leapfrog_steps = (10 if start == "prior" else 40) if leapfrog_steps is None else leapfrog_steps
        if num_moves < 0 or min(max_temperatures, leapfrog_steps) < 1 or num_adaptations < 0:
            raise ValueError(f"num_moves={num_moves} and num_adaptations={num_adaptations} must be at least 0, "
                             f"max_temperatures={max_temperatures} and leapfrog_steps={leapfrog_steps} at least 1")
        share = 0.5 if acceptance in ("best", None) else acceptance  # may still be a string
        if not 0 < ess_threshold < 1 or isinstance(share, str) or not 0 < share < 1 or not 0 < step_size <= 1:
            raise ValueError(f"ess_threshold={ess_threshold} and acceptance={acceptance} must lie in (0, 1), "
                             f"step_size={step_size} in (0, 1]; acceptance may also be None or 'best'")
        self.temperatures = None if temperatures is None else _checked_temperatures(temperatures)
        if num_moves == 0 and self.temperatures is not None and len(self.temperatures) > 1:
            raise ValueError("without moves the weights take one step to temperature 1: pass temperatures only "
                             "with num_moves over 0")
        self.prior, self.proposal = prior, proposal
        self.start = _checked_start(start, prior, self.temperatures, num_moves)
        self.moves, self.num_moves, self.resampling = moves, num_moves, resampling
        self.leapfrog_steps, self.num_adaptations = leapfrog_steps, num_adaptations
        self.ess_threshold, self.acceptance, self.step_size = ess_threshold, acceptance, step_size
        self.chunk_size, self.max_temperatures = check_chunk_size(chunk_size), max_temperatures

    @torch.no_grad()
    def _sample(self, reward: Reward, n: int, generator: torch.Generator, progress: bool) -> Posterior:
        """Draw posterior samples; see :meth:`Solver.sample`.

        Returns:
            With moves, particles that were resampled and then moved. They have equal weights, so ``ess()`` is None, and
            they are dependent, as ``distinct_ancestors`` shows. Without moves, weighted particles. Diagnostics for each
            observation: ``temperatures`` and ``acceptance`` ``(B, T)`` (1 and NaN after an observation has reached 1);
            ``distinct_ancestors``, the number of initial particles with descendants left, and ``effective_ancestors``,
            the equivalent number of independent particles; ``least_ess``, the least effective sample size of a step's
            weights, in particles; ``k_hat``, the largest of a step's weights; ``step_size``, the last one;
            ``residual``, the root mean square of (y - A x) / sigma, if the reward has one; and ``converged``, whether
            all of these pass their checks, see the warning. With a start by randomise-then-optimise also: ``solved``,
            the share of its draws that reached a minimum; ``share_moved``, the share of the frozen chains that moved;
            ``quarter_turns``, how often they could have crossed the prior's width; ``drift``, the drift of the
            potential |z|^2 / 2 - r in standard errors, large before equilibrium; ``memory``, the correlation between
            the images at the start and the end of the frozen chains; and, for weighted draws, ``missed_share``, see
            :class:`~invflow.NoiseRTO`.

        Raises:
            ValueError: For Langevin moves with a reward that has no gradient; if no particle of
                an observation has a finite reward; if a reward or an image is NaN, with step and particle.

        Warns:
            UserWarning: For observations that have not converged, with the reason.
        """
        from tqdm import tqdm

        trace: list[tuple[Tensor, ...]] = []
        record = ChainRecord(self.leapfrog_steps if isinstance(self._move(reward), Hamiltonian) else 1)
        with tqdm(disable=not progress, desc="NoiseSMC", unit="temperature", delay=2) as bar:
            draws = None if self.start == "prior" else self._draw(reward, n, generator, progress)
            for state in self._run(reward, n, draws, generator):
                trace.append((state.temperature, state.acceptance, state.ess, state.k_hat))
                if draws is not None:
                    record.add(state)
                if progress:
                    bar.update()
                    bar.set_postfix(temperature=f"{float(state.temperature.min()):.3g}")
        temperatures, acceptance, ess, k_hat = (torch.stack(v, dim=1) for v in zip(*trace))
        diagnostics = {
            "temperatures": temperatures[:, 1:], "acceptance": acceptance[:, 1:],
            "distinct_ancestors": count_distinct(state.ancestors),
            "effective_ancestors": effective_ancestors(state.ancestors, state.log_weights),
            "least_ess": ess.nan_to_num(nan=torch.inf).amin(1),
            # NaN if there is no number at all
            "k_hat": torch.where(k_hat.isnan().all(1), torch.nan, k_hat.nan_to_num(nan=-torch.inf).amax(1)),
            "step_size": state.step_size,
        }
        residual = residual_of_samples(reward, state.particles.images, state.log_weights,
                                         rows_at_a_time(self.chunk_size, self.prior))
        diagnostics |= {} if residual is None else {"residual": residual}
        if draws is not None:
            diagnostics |= record.diagnostics() | {"solved": precise(draws.converged).mean(1)}
            weighted = draws.log_weights is not None
            diagnostics |= {"missed_share": draws.missed_share()} if weighted else {}
            diagnostics["converged"], complaint = judge_chains(diagnostics, reward, n, weighted=weighted)
        else:
            diagnostics["converged"], complaint = judge(diagnostics, reward, n, moved=self.num_moves > 0)
        if complaint is not None:
            warnings.warn(complaint, stacklevel=5)  # above the decorators and Solver.sample
        evidence = None if bool(state.log_evidence.isnan().all()) else state.log_evidence
        return Posterior(state.particles.images, None if self.num_moves else state.log_weights, evidence,
                         diagnostics=diagnostics)

    @torch.no_grad()
    def iterate(self, reward: Reward, num_samples: int, *,
                generator: torch.Generator | int | None = None) -> Iterator[NoiseSMCState]:
        """Run the particles through the temperatures, as :meth:`sample` does.

        Args:
            reward: Reward over B observations, or over any number (treated as one).
            num_samples: Number of samples N, at least 1.
            generator: Random generator.

        Yields:
            A :class:`NoiseSMCState` for temperature 0, and one after each step. An observation that has reached
            temperature 1 no longer changes. With a start by randomise-then-optimise, one state for its draws, and one
            after each move.

        Raises:
            ValueError: As in :meth:`sample`.
        """
        generator = as_generator(generator)
        draws = None if self.start == "prior" else self._draw(reward, num_samples, generator, False)
        yield from self._run(reward, num_samples, draws, generator)

    def _draw(self, reward: Reward, num_samples: int, generator: torch.Generator | int | None, progress: bool) -> Draws:
        start = self.start if isinstance(self.start, NoiseRTO) else NoiseRTO(
            self.prior, proposal=self.proposal, chunk_size=self.chunk_size)
        return start.draw(reward, num_samples, generator=generator, progress=progress)

    def _run(self, reward: Reward, num_samples: int, draws: Draws | None,
              generator: torch.Generator) -> Iterator[NoiseSMCState]:
        if num_samples < 1:
            raise ValueError(f"num_samples is {num_samples}: ask for at least one sample")
        move = self._move(reward)
        proposal = None if self.proposal is None or draws is not None else self.proposal.propose(reward)
        target = NoiseTarget(self.prior, reward, proposal, gradient=move.uses_gradient and self.num_moves > 0,
                             chunk_size=self.chunk_size)
        if draws is not None:
            yield from run_chains(
                target, draws, move, num_moves=self.num_moves, num_adaptations=self.num_adaptations,
                acceptance=self._aim(move), step_size=self.step_size, resampling=self.resampling, generator=generator)
            return
        state = self._start(target, num_samples, generator)
        preconditioner = Preconditioner(target.num_observations) if move.preconditioned else None
        yield state
        step = 0
        while bool((state.temperature < 1).any()):  # synchronises with the GPU: the weights decide the number of steps
            state = self._advance(target, move, state, step, generator, preconditioner)
            step += 1
            yield state

    def prior_samples(self, n: int, *, generator: torch.Generator | int | None = None) -> Tensor:
        """Draw from the one-step prior f(z), which the solver tilts, ``(n, *image_shape)``."""
        return self.prior.generate(n, 1, generator=generator,
                                   chunk_size=rows_at_a_time(self.chunk_size, self.prior))

    # -- one run ------------------------------------------------------------------------------------------------

    def _move(self, reward: Reward) -> Move:
        langevin = "crank-nicolson-langevin" if self.start == "prior" else "preconditioned-hamiltonian"
        name = self.moves or (langevin if reward.differentiable else "crank-nicolson")
        if MOVES[name].uses_gradient and self.num_moves > 0 and not reward.differentiable:
            raise ValueError(
                f"moves={name!r} need gradients, but the reward {type(reward).__name__} has none "
                '(differentiable=False): use moves="crank-nicolson" or moves="elliptical-slice"'
            )
        move = MOVES[name]
        return Hamiltonian(self.leapfrog_steps, move.preconditioned) if isinstance(move, Hamiltonian) else move

    def _start(self, target: NoiseTarget, count: int, generator: torch.Generator) -> NoiseSMCState:
        observations = target.num_observations
        standard = draw_noise((observations, count, *self.prior.state_shape), generator, self.prior.device)
        standard = standard.to(self.prior.dtype)
        rows = torch.arange(observations, device=self.prior.device)
        particles = target.evaluate(target.initial(standard), rows)
        none = torch.full_like(particles.log_reward[:, 0], torch.nan)
        zero = torch.zeros_like(none)
        return NoiseSMCState(
            particles, zero, torch.zeros_like(particles.log_reward), zero,
            torch.arange(count, device=rows.device).expand(observations, -1), zero + self.step_size, zero,
            none, none, none)

    def _advance(self, target: NoiseTarget, move: Move, state: NoiseSMCState, step: int,
                 generator: torch.Generator, preconditioner: Preconditioner | None) -> NoiseSMCState:
        """Do one temperature: reweight and, with moves, resample and move."""
        active, last = state.temperature < 1, state.temperature
        log_ratio = target.log_ratio(state.particles)
        temperature = self._next_temperature(log_ratio, state.temperature, step)
        step_size = self._adapted(move, state, temperature)
        increments = scale_log((temperature - state.temperature)[:, None], log_ratio)
        gained = log_mean_weight(torch.zeros_like(increments), increments)
        if not bool(torch.isfinite(gained).all()):  # synchronises with the GPU: a later error could not name the cause
            b = int((~torch.isfinite(gained)).nonzero()[0])
            raise ValueError(
                f"the rewards of observation {b} give no weight to any of its {increments.shape[1]} particles: "
                f"they lie between {float(log_ratio[b].min())} and {float(log_ratio[b].max())}; a reward may be -inf "
                "at some images, but not at all of them: check it, or use more particles"
            )
        state = replace(
            state, temperature=temperature, log_evidence=state.log_evidence + gained, step_size=step_size,
            first_temperature=torch.where(state.temperature == 0, temperature, state.first_temperature),
            ess=torch.where(active, effective_sample_size(increments), torch.nan),
            k_hat=torch.where(active, pareto_k_hat(increments), torch.nan))
        if self.num_moves == 0:
            return replace(state, log_weights=increments)
        # drawn for all observations, so that the random numbers of one do not depend on when others finish
        index = RESAMPLERS[self.resampling](increments.softmax(1), increments.shape[1], generator)
        rows = active.nonzero()[:, 0]  # synchronises with the GPU: the number of active rows decides the moves' cost
        particles = state.particles.gather(rows, index[rows])
        accepted = torch.zeros_like(temperature[rows])
        if preconditioner is not None:
            self._fit(preconditioner, target, particles, rows, None if step == 0 else last[rows], temperature[rows])
        for k in range(self.num_moves):
            target.where = f"step {step + 1}, move {k + 1} of {self.num_moves}"
            # moved first: rows are on the map's device, but the numbers are on the generator's
            random = move.draw(tuple(state.particles.noise.shape), generator).to(particles.noise).select(rows)
            particles, rate = move(target, particles, rows, temperature[rows], state.step_size[rows], random,
                                   preconditioner)
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

    def _fit(self, preconditioner: Preconditioner, target: NoiseTarget, particles: Particles, rows: Tensor,
             last: Tensor | None, temperature: Tensor) -> None:
        """Fit a metric for the next moves to the gradients from the moves at the last temperature."""
        seen_at = temperature if last is None else last
        if last is None and particles.gradient is not None:  # at the first temperature: from the particles themselves
            preconditioner.see(rows, particles.gradient)
        preconditioner.fit(rows, seen_at, temperature, target.reference(temperature, rows)[1])
        preconditioner.forget()

    def _aim(self, move: Move) -> float | None:
        """Target share of accepted proposals."""
        return move.best_acceptance if self.acceptance == "best" else self.acceptance  # type: ignore[return-value]

    def _adapted(self, move: Move, state: NoiseSMCState, temperature: Tensor) -> Tensor:
        """Step size at the next temperature, from the last acceptance and from both temperatures.

        Along a direction in which e^r has the inverse variance L, the target has the inverse variance 1 + lambda L
        in units of the reference, and h is proportional to its inverse square root. At the first temperature the reward
        begins to distinguish the particles, so L = 1 / first. Without this forecast h would lag behind.
        """
        aim = self._aim(move)
        if aim is None or not move.tunable:
            return state.step_size
        first, last = state.first_temperature, state.temperature
        change = _GAIN * (state.acceptance - aim)
        if not move.preconditioned:  # a metric already contains the forecast
            change = change - 0.5 * ((first + temperature) / (first + last)).log()
        adapted = (state.step_size * change.exp()).clamp(_LEAST_STEP_SIZE, 1.0)
        # unchanged before the first temperature and after the last
        return torch.where(state.acceptance.isnan() | (last == 1), state.step_size, adapted)


def _checked_temperatures(temperatures: Sequence[float]) -> tuple[float, ...]:
    values = tuple(float(t) for t in temperatures)
    ascending = all(low < high for low, high in zip((0.0, *values), values))
    if not values or not ascending or values[-1] != 1.0:
        raise ValueError(f"temperatures are {values}: pass ascending ones over 0 that end with 1, such "
                         "as [0.01, 0.1, 1.0]")
    return values


def _checked_start(start: str | NoiseRTO, prior: FlowMap, temperatures: object, num_moves: int) -> str | NoiseRTO:
    if isinstance(start, str) and start not in ("prior", "rto"):
        raise ValueError(f"start={start!r} is unknown: pass 'prior', 'rto' or an invflow.NoiseRTO")
    if not isinstance(start, str | NoiseRTO):
        raise TypeError(f"the start is a {type(start).__name__}: pass 'prior', 'rto' or an invflow.NoiseRTO")
    if isinstance(start, NoiseRTO) and start.prior is not prior:
        raise ValueError("the start draws from another prior: pass NoiseRTO(prior, ...) with the same prior")
    if start != "prior" and (num_moves == 0 or temperatures is not None):
        raise ValueError("a start by randomise-then-optimise is moved at temperature 1: pass num_moves over 0 and no "
                         "temperatures")
    return start
