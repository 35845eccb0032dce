"""Flow map trajectory tilting: particles follow a base sampler, guided by the reward, with correcting weights."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from invflow._core.chunks import ChunkSize, check_chunk_size
from invflow._core.random import as_generator, draw_noise
from invflow.flowmap import FlowMap, check_prior, rows_at_a_time
from invflow.linear.structure import find_spectrum
from invflow.posterior import Posterior
from invflow.reward import Reward
from invflow.smc import precise
from invflow.solver import Solver
from invflow.solvers.finite import not_finite
from invflow.solvers.tilting.conjugate import Conjugate, check_conjugate
from invflow.solvers.tilting.kernels import BaseStep, Diffusion, HeunStep, RenoiseStep, base_steps
from invflow.solvers.tilting.look_ahead import Look, LookAhead
from invflow.solvers.tilting.particles import (
    Chunk,
    FMTTState,
    Particles,
    StepInfo,
    Task,
    first_bad,
    make_chunks,
    over_chunks,
)
from invflow.solvers.tilting.proposals import GradientShift, HeunShift, Move, Proposal
from invflow.solvers.tilting.record import PathRecord, advise
from invflow.solvers.tilting.schedules import Grid, Schedule, make_times, schedule_values
from invflow.solvers.tilting.selection import ResampleUneven, Selection
from invflow.solvers.tilting.weighting import WEIGHTINGS, floor_rewards

__all__ = ["FMTT", "FMTTState"]


class FMTT(Solver):
    r"""Flow map trajectory tilting: samples of p(x) e^{r(x)} by steps along the path that look ahead to its end.

    At time t the particles are tilted by :math:`r_t(x) = g(t)\, r(L_t(x))`, the reward of the image predicted by the
    look-ahead :math:`L_t` (arXiv 2511.22688). A base step, the Gaussian kernel
    :math:`p(x' \mid x) = N(m(x), v I)`, is shifted by :math:`\tfrac{v}{2} \nabla r_t`, and importance weights correct
    for the remaining difference.

    **Twisted weights** are exact at any number of steps: as the number of particles grows, the weighted particles
    converge to the tilted law itself. With q the shifted kernel, the sum of

    .. math:: \log w \mathrel{+}= \log p(x' \mid x) + r_{t'}(x') - \log q(x' \mid x) - r_t(x)

    telescopes, from :math:`\log w = r_0(x_0)`, to the exact tilt by e^r of the law that :meth:`prior_samples` draws
    from, for any look-ahead, schedule and flow map, however inaccurate (the twisting of Whiteley and Lee 2014).
    **Jarzynski weights** are those of the continuous process: dA = g'(t) r(X_{t,1}(x)) dt with the exact flow map,
    :math:`dA = (\partial_t + b_t \cdot \nabla) r_t dt` otherwise. They hold in the limit of many steps and, with the
    flow map, only as far as the map is exact. The trapezoidal rule approximates the integral.

    Particles of an observation are resampled when their effective sample size falls below a threshold. For a reward
    without a gradient, resampling alone tilts the particles, and twisted weights remain exact.

    A shift by the gradient overshoots if sigma is small compared with the step. For a Gaussian likelihood with a linear
    operator ``proposal="conjugate"`` conditions each step on the measurement instead, in closed form and without a
    gradient of the network, see :class:`~invflow.solvers.tilting.conjugate.Conjugate`. Even so, with a sharp
    measurement of hundreds of pixels a few particles hold all the weight. ``weights="none"`` keeps all particles,
    equally weighted, as an approximation. The weights left out would have shown its error; ``converged`` reports it.

    Args:
        prior: A flow map trained with noise independent of the data.
        steps: K, the number of steps from noise to data.
        look_ahead: ``"flow_map"`` for :math:`X_{t,1}`, ``"denoiser"`` for E[m | x_t], or ``"none"`` for the state.
        look_ahead_steps: Number of jumps of the flow map, over equal parts of [t, 1].
        weights: ``"twisted"``, ``"jarzynski"``, or ``"none"`` for the unchanged draws of the proposals, never
            resampled, equally weighted, approximate. The diagnostics are then those of twisted weights.
        kernel: ``"sde"``, Euler-Maruyama of dx = (b + eps s) dt + sqrt(2 eps) dW with a last step along the flow;
            ``"ancestral"``, the steps of denoising diffusion models, one call each with the denoiser as look-ahead;
            or ``"renoise"``, jumps of the flow map after which noise is added back, whose marginals are exact for an
            exact map at any number of steps. Jarzynski weights need the SDE, or its second-order steps, ``"heun"``,
            which take twice the calls and work with no other weights.
        proposal: ``"gradient"``; ``"conjugate"``; or a :class:`~invflow.solvers.tilting.conjugate.Conjugate` with
            settings, or another :class:`~invflow.solvers.tilting.proposals.Proposal`.
        resample_threshold: Resample when the effective sample size is below this share of N; 0 for never.
        resampling: ``"systematic"``, ``"stratified"``, ``"multinomial"``, ``"residual"`` or ``"ssp"``; or a
            :class:`~invflow.solvers.tilting.selection.Selection`, which makes its own decisions, without the threshold.
        schedule: ``"linear"`` for g(t) = t, ``"annealed"`` for a Gaussian likelihood whose variance shrinks to
            sigma^2, by :class:`~invflow.solvers.tilting.schedules.AnnealedVariance` or, for separate modes,
            :class:`~invflow.solvers.tilting.annealing.AnnealedCovariance`; or an increasing g(t) that ends at g(1) = 1.
        diffusion: eps(t), zero at t = 1; a number c means c (1 - t), v = 2 eps dt. For modes that separate early,
            with renoising, :class:`~invflow.solvers.tilting.annealing.ReversalDiffusion`.
        time_grid: ``"uniform"``; ``"logit"``, even in log t / (1 - t), for data in many dimensions, whose modes
            separate early; a function of the steps; or the times themselves, whose number then determines the steps.
        max_shift: Largest root mean square of a shift over the values of a state, in units of sqrt(v), the noise of
            the step. Twisted weights remain exact, and a lower cap makes their tails lighter. Jarzynski weights need
            the whole shift, so it is not capped for them.
        chunk_size: Number of rows through the map at a time; None for 256 on a CPU, and as many as fit on a GPU.
            Samples do not depend on it beyond rounding.

    Raises:
        TypeError: If the prior is not a flow map.
        ValueError: If the map's noise depends on its data, if Jarzynski weights are combined with renoising, or if a
            setting is unknown or out of range.

    Example:
        >>> import math, torch, invflow
        >>> angle = 2 * math.pi * torch.arange(8) / 8
        >>> ring = 4.8 * torch.stack([angle.cos(), angle.sin()], dim=1)
        >>> prior = invflow.GaussianMixtureFlow(ring, std=0.7)
        >>> tilt = invflow.FunctionReward(lambda x: -x[:, 0].clamp(max=0) ** 2)
        >>> g = torch.Generator().manual_seed(0)
        >>> posterior = invflow.FMTT(prior, steps=10).sample(tilt, 256, generator=g)
        >>> posterior.samples.shape
        torch.Size([1, 256, 2])
    """

    prior: FlowMap
    name = "FMTT"  # in messages

    def __init__(self, prior: FlowMap, *, steps: int = 50, look_ahead: str = "flow_map", look_ahead_steps: int = 1,
                 weights: str = "twisted", kernel: str = "sde", proposal: str | Proposal = "gradient",
                 resample_threshold: float = 0.5, resampling: str | Selection = "systematic",
                 schedule: Schedule = "linear", diffusion: Diffusion = 1.0, time_grid: Grid = "uniform",
                 max_shift: float = 1.0, chunk_size: int | None = None) -> None:
        check_prior("FMTT", prior, "score")
        if weights not in WEIGHTINGS:
            raise ValueError(f"there are no weights {weights!r}: choose 'twisted', 'jarzynski' or 'none'")
        if proposal not in ("gradient", "conjugate") and not isinstance(proposal, Proposal):
            raise ValueError(f"there is no proposal {proposal!r}: choose 'gradient' or 'conjugate', or pass a "
                             "Conjugate with its own settings")
        if isinstance(schedule, str) and schedule not in ("linear", "annealed"):
            raise ValueError(f"there is no schedule {schedule!r}: choose 'linear' or 'annealed', or pass a function")
        self.prior, self.weights, self.kernel, self.proposal = prior, weights, kernel, proposal
        self.resample_threshold, self.resampling = resample_threshold, resampling
        self.schedule, self.diffusion, self.time_grid = schedule, diffusion, time_grid
        self.max_shift, self.chunk_size = max_shift, check_chunk_size(chunk_size)
        self.look_ahead = LookAhead(prior, look_ahead, look_ahead_steps)
        self.times = make_times(time_grid, steps)
        self.steps = len(self.times) - 1
        self.base_steps: list[BaseStep] = base_steps(kernel, self.times, diffusion)
        self.weighting = WEIGHTINGS[weights]
        self.selection = (resampling if isinstance(resampling, Selection)
                          else ResampleUneven(resample_threshold, resampling))
        # Jarzynski weights need the whole shift
        shift = GradientShift(max_shift=max_shift) if weights != "jarzynski" else GradientShift()
        self.proposing = {"gradient": HeunShift() if kernel == "heun" else shift,
                          "conjugate": Conjugate.for_map(prior)}[proposal] if isinstance(proposal, str) else proposal
        reason = self.weighting.refusal(kernel, self.proposing.follows_gradient)
        if reason is not None:
            raise ValueError(reason)

    # -- the public calls ----------------------------------------------------------------------------------------------

    def _sample(self, reward: Reward, n: int, generator: torch.Generator, progress: bool) -> Posterior:
        """Draw weighted posterior samples; see :meth:`Solver.sample`.

        Returns:
            A posterior whose ``log_evidence`` is an estimate of log E[e^r] under :meth:`prior_samples` (unbiased
            before the logarithm with twisted weights), and whose diagnostics hold ``times`` and, for each
            observation: ``ess_path`` and ``reward_path`` ``(B, K + 1)``, the effective sample size and the weighted
            mean of the look-ahead's reward, and ``calls_path``, the calls per particle up to then;
            ``increment_std`` ``(B, K)``, the standard deviation of each step's log weight increments;
            ``thermodynamic_length``, ``total_discrepancy`` and ``discrepancy_path``, see
            :class:`~invflow.solvers.tilting.record.PathRecord`; ``least_ess``, ``resamplings``, ``distinct_ancestors``
            and ``effective_ancestors``, the equivalent number of independent particles, ``k_hat`` of the final
            weights (NaN under 25 particles) and ``k_hat_path`` ``(B, K + 1)`` of all (NaN where they are even,
            with an effective sample size over half of N), ``capped_share`` of the shifts, and ``converged``.

        Raises:
            ValueError: If Jarzynski weights or an annealed schedule do not fit the reward, or if the reward or its
                gradient is NaN or inf; the message names step, observation and particle.

        Warns:
            UserWarning: If it has not converged; the message has the figures.
        """
        from tqdm import tqdm

        name, weighted = self.name, self.weighting.counts
        record, rows = PathRecord(), n * (reward.num_observations or 1)
        with self.prior.count() as calls:
            for state in tqdm(self.iterate(reward, n, generator=generator), total=self.steps + 1,
                              disable=not progress, desc=name, unit="step", delay=2):
                record.add(state, (calls.forward + calls.backward) / rows)
            images = self._decode(state.states.flatten(0, 1)).unflatten(0, state.states.shape[:2])
        advice = advise(reward, isinstance(self.proposing, Conjugate))
        diagnostics = record.finish(state, name, weighted=weighted, advice=advice,
                                    continuous=self.weighting.continuous)
        return Posterior(images, state.log_weights if weighted else None,
                         state.log_evidence.to(images.dtype) if weighted else None, diagnostics=diagnostics)

    def iterate(self, reward: Reward, num_samples: int, *,
                generator: torch.Generator | int | None = None) -> Iterator[FMTTState]:
        """Yield the particles at time 0 and after each of the K steps, for plots and for solvers built on this one.

        Args:
            reward: A reward over B observations; one without observations of its own means B = 1.
            num_samples: N, the number of particles for each observation.
            generator: Random generator.

        Yields:
            K + 1 states; their tensors are never written to afterwards.

        Raises:
            ValueError: Same as in :meth:`sample`.
        """
        generator = as_generator(generator)
        state = self.init(reward, num_samples, generator=generator)
        nothing = torch.zeros(len(state.path), device=state.path.device)
        yield self._view(state, StepInfo(torch.zeros_like(state.path), nothing.bool(), nothing))
        while state.index < self.steps:
            state, info = self.step(state, generator=generator)
            yield self._view(state, info)

    @torch.no_grad()
    def prior_samples(self, n: int, *, generator: torch.Generator | int | None = None) -> Tensor:
        """Draw from the law that is tilted, that of the base dynamics with the same steps: ``(n, *image_shape)``."""
        if n < 1:
            raise ValueError(f"prior_samples draws at least one image, not n={n}")
        generator, size = as_generator(generator), self._size()
        x = self.prior.noise(n, generator=generator)
        for step in self.base_steps:
            moved = size.map(partial(step.mean, self.prior), x)
            if step.variance > 0:
                moved = moved + math.sqrt(step.variance) * self.prior.noise(n, generator=generator)
            if isinstance(step, HeunStep):
                moved = size.map(partial(step.correct_pair, self.prior), torch.stack([x, moved], dim=1))
            x = moved
        return self._decode(x)

    def settings(self) -> dict[str, Any]:
        """Settings in a form that JSON can hold, kept with each posterior."""
        return {**super().settings(), "look_ahead": self.look_ahead.kind, "look_ahead_steps": self.look_ahead.jumps}

    # -- the machine: init and step ------------------------------------------------------------------------------------

    @torch.no_grad()
    def init(self, reward: Reward, num_samples: int, *, generator: torch.Generator | int | None = None) -> Particles:
        """The particles at time 0, from which :meth:`step` starts.

        Args:
            reward: A reward over B observations; one without observations of its own means B = 1.
            num_samples: N, the number of particles for each observation.
            generator: Random generator.

        Raises:
            ValueError, TypeError: If weights, schedule or proposal do not fit the reward.
        """
        if num_samples < 1:
            raise ValueError(f"num_samples is {num_samples}: ask for at least one sample")
        if self.weighting.continuous and not reward.differentiable:
            raise ValueError("Jarzynski weights need dynamics guided by the reward's gradient, and this reward has "
                             "none: pass weights='twisted', which stay exact without it")
        device = self.prior.device
        reward = reward.to(device)
        shape = (reward.num_observations or 1, num_samples)
        known = self.times[-2] if self.look_ahead.makes_last_step(self.kernel) else 1.0
        gains = schedule_values(self.schedule, self.times, reward, self.prior, known)
        size, rows = self._size(), shape[0] * num_samples
        x = draw_noise((rows, *self.prior.state_shape), as_generator(generator), device).to(self.prior.dtype)
        nothing = precise(x.new_zeros(shape))
        spectrum = None
        if isinstance(self.proposing, Conjugate):
            spectrum = find_spectrum(check_conjugate(reward, self.prior))
        task = Task(make_chunks(reward, *shape, size.rows), size, gains.to(nothing),
                    tuple((gains > 0).any(0).tolist()), shape, spectrum)
        look = Look.cat(over_chunks(task.chunks, size, lambda chunk: self._look(task, chunk, x[chunk.rows], 0)))
        look, floored = floor_rewards(look, shape, self.weighting.margin)
        ancestors = torch.arange(num_samples, device=device).expand(shape)
        particles = Particles(task, 0, x, look, nothing, ancestors, nothing[:, 0], floored)
        return replace(particles, path=self.weighting.start(particles))

    @torch.no_grad()
    def step(self, state: Particles, *, generator: torch.Generator | int | None = None) -> tuple[Particles, StepInfo]:
        """Select, move and weight: return the particles at the next time and a record; the old state is unchanged.

        Args:
            state: A state from :meth:`init` or from this method.
            generator: Random generator.

        Raises:
            ValueError: If the reward or its gradient is NaN or inf, or if all steps are done.
        """
        if state.index >= self.steps:
            raise ValueError(f"all {self.steps} steps are done: start again with init(reward, num_samples)")
        step, generator = self.base_steps[state.index], as_generator(generator)
        old, resampled = self.selection(state, self.weighting, generator, step.variance > 0)
        before = self.weighting.log_weights(old)
        noise = torch.zeros(0)
        if step.variance > 0:
            noise = draw_noise(tuple(old.x.shape), generator, old.x.device).to(old.x.dtype)
        pieces = over_chunks(old.task.chunks, old.task.size, lambda chunk: self._move(old, step, chunk, noise))
        moved, ratios, capped, looks = zip(*pieces)
        look, floored = self._floor(Look.cat(looks), old.task.shape, old.index + 1)
        new = replace(old, index=old.index + 1, x=torch.cat(moved), look=look, floored=floored)
        new = replace(new, path=self.weighting.add(old, new, torch.cat(ratios).view(old.task.shape), step))
        return new, StepInfo(self.weighting.log_weights(new) - before, resampled,
                             torch.cat(capped).view(old.task.shape).mean(1))

    def _move(self, old: Particles, step: BaseStep, chunk: Chunk,
              noise: Tensor) -> tuple[Tensor, Tensor, Tensor, Look]:
        """New states of a chunk ``(n, ...)``, log p(x' | x) - log q(x' | x), capped shifts ``(n,)``, and new looks."""
        rows, task, index = chunk.rows, old.task, old.index
        x, known = old.x[rows], old.look.take(rows)
        move = Move(self.prior, self.look_ahead, task, chunk, index, step, x,
                    step.mean(self.prior, x, known.velocity, known.landing), known, noise[rows],
                    lambda there: self._look(task, chunk, there, index + 1, at_mean=True))
        moved, ratio, capped = (self.proposing.propose(move) if step.variance > 0
                                else (move.mean, move.ratio_of_one, move.none_capped))
        return moved, ratio, capped, self._look(task, chunk, moved, index + 1)

    def _look(self, task: Task, chunk: Chunk, x: Tensor, index: int, *, at_mean: bool = False) -> Look:
        """Look ahead from a chunk at the time with this index, computing only what the next step will use.

        With ``at_mean``, look from the means of a renoising step or the predictions of Heun's step, for the gradient
        there.
        """
        step = None if index == self.steps else self.base_steps[index]
        jumps = self.kernel == "renoise"
        pulled = step is not None and step.variance > 0 and chunk.reward.differentiable and task.pulls[index]
        gradient = at_mean or (pulled and not jumps and self.proposing.follows_gradient)
        rate = not at_mean and self.weighting.needs_rate(self.look_ahead, step is None)
        look = self.look_ahead(chunk.reward, x, self.times[index], chunk.shape, gradient=gradient, rate=rate,
                               velocity=step is not None and not jumps, strict=self.weighting.continuous)
        if (bad := first_bad(look, x)) is not None:
            place = divmod(chunk.rows.start + bad[1], task.shape[1])
            raise not_finite(self.name, bad[0], f"step {index} of {self.steps} (t = {self.times[index]:.4g})", *place)
        return look if step is not None and self._uses_landing(step) else look._replace(landing=None)

    def _uses_landing(self, step: BaseStep) -> bool:
        """Whether the step needs the state that the look-ahead predicted from its start."""
        if isinstance(step, RenoiseStep) and step.target == 1 and self.look_ahead.is_one_jump:
            return True
        return isinstance(self.proposing, Conjugate) and self.proposing.knows_next(self.look_ahead, step)

    def _floor(self, look: Look, shape: tuple[int, int], index: int) -> tuple[Look, Tensor]:
        """Looks with finite values in place of -inf: before the end, and with continuous weights also at the end."""
        floored, where = floor_rewards(look, shape, self.weighting.margin)
        return (look if index == self.steps and not self.weighting.continuous else floored), where

    def _view(self, state: Particles, info: StepInfo) -> FMTTState:
        """The public view of the particles, with their evidence."""
        log_weights, shape = self.weighting.log_weights(state), state.task.shape
        evidence = state.log_evidence + log_weights.logsumexp(1) - math.log(shape[1])
        return FMTTState(state.index, self.times[state.index], state.x.unflatten(0, shape), log_weights,
                         info.log_increments, state.look.value.view(shape), state.ancestors, evidence, info.resampled,
                         info.capped, state.floored)

    @torch.no_grad()
    def _decode(self, states: Tensor) -> Tensor:
        return self._size().map(self.prior.decode, states)

    def _size(self) -> ChunkSize:
        # the look-ahead jumps, with a gradient, unless it needs only the velocity
        velocity = self.look_ahead.kind != "flow_map"
        return ChunkSize(rows_at_a_time(self.chunk_size, self.prior, velocity=velocity), self.name)
