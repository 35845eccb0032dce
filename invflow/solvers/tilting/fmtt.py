"""Flow map trajectory tilting: particles follow a base sampler, drawn to reward, with weights that correct them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from invflow._core.chunks import ChunkSize
from invflow._core.random import as_generator, draw_noise
from invflow.flowmap import FlowMap, rows_at_a_time
from invflow.likelihood import GaussianLikelihood
from invflow.linear.structure import find_spectrum
from invflow.posterior import Posterior
from invflow.reward import Reward
from invflow.smc import RESAMPLERS, effective_sample_size, precise, scale_log
from invflow.solver import Solver
from invflow.solvers.finite import not_finite
from invflow.solvers.tilting.conjugate import Conjugate, check_conjugate
from invflow.solvers.tilting.kernels import BaseStep, Diffusion, HeunStep, base_steps
from invflow.solvers.tilting.look_ahead import Look, LookAhead
from invflow.solvers.tilting.particles import (
    Chunk,
    FMTTState,
    Run,
    child_generator,
    first_bad,
    make_chunks,
    over_chunks,
)
from invflow.solvers.tilting.record import PathRecord, advise
from invflow.solvers.tilting.schedules import Grid, Schedule, make_times, schedule_values
from invflow.solvers.tilting.settings import check_prior, check_settings

__all__ = ["FMTT", "FMTTState"]


class FMTT(Solver):
    r"""Flow map trajectory tilting: samples of p(x) e^{r(x)} by steps along the path that look ahead to its end.

    At time t the particles are tilted by :math:`r_t(x) = g(t)\, r(L_t(x))`, the reward of the image that the
    look-ahead :math:`L_t` sees coming (arXiv 2511.22688). A base step, the Gaussian kernel
    :math:`p(x' \mid x) = N(m(x), v I)`, is shifted by :math:`\tfrac{v}{2} \nabla r_t`, and importance weights make up
    for what the shift does not do.

    **Twisted weights** are exact at any number of steps. With q the shifted kernel,

    .. math:: \log w \mathrel{+}= \log p(x' \mid x) + r_{t'}(x') - \log q(x' \mid x) - r_t(x)

    telescopes, from :math:`\log w = r_0(x_0)`, to the exact tilt by e^r of the law that :meth:`prior_samples` draws
    from, for any look-ahead, schedule and flow map, learned or wrong (the twisting of Whiteley and Lee 2014).
    **Jarzynski weights** are those of the continuous process: dA = g'(t) r(X_{t,1}(x)) dt with the exact flow map,
    :math:`dA = (\partial_t + b_t \cdot \nabla) r_t dt` otherwise. They hold as steps grow and, with the flow map, as
    far as the map is exact; the integral is taken by the trapezoidal rule.

    Particles of an observation are resampled where their effective sample size is under a threshold. Of a reward
    without gradient, resampling alone does the work, and twisted weights remain exact.

    A shift by the gradient overshoots where sigma is small against the step. For a Gaussian likelihood with a linear
    operator ``proposal="conjugate"`` conditions each step on the measurement instead, in closed form and without a
    gradient of the network, see :class:`~invflow.solvers.tilting.conjugate.Conjugate`. Even so, a sharp measurement of
    hundreds of pixels leaves any weights to a few particles; ``weights="none"`` keeps all of them, equally weighted, as
    an approximation whose error the weights left out would have told: ``converged`` says so.

    Args:
        prior: a flow map trained with noise independent of the data.
        steps: K, steps from noise to data.
        look_ahead: ``"flow_map"`` for :math:`X_{t,1}`, ``"denoiser"`` for E[m | x_t], or ``"none"`` for the state.
        look_ahead_steps: jumps of the flow map, over equal parts of [t, 1].
        weights: ``"twisted"``, ``"jarzynski"``, or ``"none"``: the draws of the proposals as they are, never
            resampled, equally weighted, approximate. The diagnostics are those of twisted weights.
        kernel: ``"sde"``, Euler-Maruyama of dx = (b + eps s) dt + sqrt(2 eps) dW with a last step along the flow;
            ``"ancestral"``, the steps of denoising diffusion models, one call each with the denoiser as look-ahead;
            or ``"renoise"``, jumps of the flow map after which noise is added back, whose marginals are exact for an
            exact map at any number of steps. Jarzynski weights take the SDE, or its second-order steps, ``"heun"``, for
            twice the calls, which no other weights take.
        proposal: ``"gradient"``; ``"conjugate"``; or a :class:`~invflow.solvers.tilting.conjugate.Conjugate` with
            settings.
        resample_threshold: share of N under which the effective sample size leads to resampling; 0 for never.
        resampling: ``"systematic"``, ``"stratified"``, ``"multinomial"``, ``"residual"`` or ``"ssp"``.
        schedule: ``"linear"`` for g(t) = t, ``"annealed"`` for a Gaussian likelihood whose variance shrinks to
            sigma^2, by :class:`~invflow.solvers.tilting.schedules.AnnealedVariance` or, for separate modes,
            :class:`~invflow.solvers.tilting.annealing.AnnealedCovariance`; or an increasing g(t) that ends at g(1) = 1.
        diffusion: eps(t), zero at t = 1; a number c stands for c (1 - t), v = 2 eps dt. For modes that part early,
            with renoising, :class:`~invflow.solvers.tilting.annealing.ReversalDiffusion`.
        time_grid: ``"uniform"``; ``"logit"``, even in log t / (1 - t), for data in many dimensions, whose modes part
            early; a function of the steps; or the times themselves, whose number then decides the steps.
        max_shift: greatest root mean square of a shift over the values of a state, in units of sqrt(v), the noise of
            the step. Twisted weights remain exact, and with a lower cap their tails are lighter; Jarzynski weights need
            the whole shift, and none of theirs is capped.
        chunk_size: rows through the map at a time; None for 256 on a CPU, and as many as fit on a GPU. Samples do
            not depend on it beyond rounding.

    Raises:
        TypeError: for a prior that is no flow map.
        ValueError: for a map whose noise depends on its data; for Jarzynski weights of renoising; for a setting that
            is unknown or out of range.

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

    name = "FMTT"  # in what is said

    def __init__(self, prior: FlowMap, *, steps: int = 50, look_ahead: str = "flow_map", look_ahead_steps: int = 1,
                 weights: str = "twisted", kernel: str = "sde", proposal: str | Conjugate = "gradient",
                 resample_threshold: float = 0.5, resampling: str = "systematic", schedule: Schedule = "linear",
                 diffusion: Diffusion = 1.0, time_grid: Grid = "uniform", max_shift: float = 1.0,
                 chunk_size: int | None = None) -> None:
        check_prior(prior)
        check_settings(weights, kernel, proposal, resample_threshold, resampling, schedule, max_shift, chunk_size)
        self.prior, self.weights, self.kernel, self.proposal = prior, weights, kernel, proposal
        self.conjugate = proposal if isinstance(proposal, Conjugate) else None
        if proposal == "conjugate":
            self.conjugate = Conjugate.for_map(prior)
        self.look_ahead = LookAhead(prior, look_ahead, look_ahead_steps)
        self.resample_threshold, self.resampling = resample_threshold, resampling
        self.schedule, self.diffusion, self.time_grid = schedule, diffusion, time_grid
        self.max_shift, self.chunk_size = max_shift, chunk_size
        self.times = make_times(time_grid, steps)
        self.steps = len(self.times) - 1
        self.base_steps: list[BaseStep] = base_steps(kernel, self.times, diffusion)

    # -- the public calls ----------------------------------------------------------------------------------------------

    def _sample(self, reward: Reward, n: int, generator: torch.Generator, progress: bool) -> Posterior:
        """Draw weighted posterior samples; see :meth:`Solver.sample`.

        Returns:
            A posterior whose ``log_evidence`` is an estimate of log E[e^r] under :meth:`prior_samples` (unbiased
            before the logarithm with twisted weights), and whose diagnostics hold ``times`` and, for each
            observation: ``ess_path`` and ``reward_path`` ``(B, K + 1)``, the effective sample size and the weighted
            mean of the look-ahead's reward, beside ``calls_path``, the calls that a particle had taken by then;
            ``increment_std`` ``(B, K)``, the standard deviation of each step's log weight increments;
            ``thermodynamic_length``, ``total_discrepancy`` and ``discrepancy_path``, see
            :class:`~invflow.solvers.tilting.record.PathRecord`; ``least_ess``, ``resamplings``, ``distinct_ancestors``,
            ``k_hat`` of the final weights (NaN under 25 particles) and ``k_hat_path`` ``(B, K + 1)`` of all (NaN where
            they are even, with an effective sample size over half of N), ``capped_share`` of the shifts, and
            ``converged``.

        Raises:
            ValueError: for Jarzynski weights or an annealed schedule of a reward that does not
                fit them; where the reward or its gradient is NaN or inf, with the step, observation and particle.

        Warns:
            UserWarning: where it has not converged, with the figures.
        """
        from tqdm import tqdm

        name, weighted = self.name, self.weights != "none"
        record, rows = PathRecord(), n * (reward.num_observations or 1)
        with self.prior.count() as calls:
            for state in tqdm(self.iterate(reward, n, generator=generator), total=self.steps + 1,
                              disable=not progress, desc=name, unit="step", delay=2):
                record.add(state, (calls.forward + calls.backward) / rows)
            images = self._decode(state.states.flatten(0, 1)).unflatten(0, state.states.shape[:2])
        diagnostics = record.finish(state, name, weighted=weighted, advice=advise(reward, self.conjugate),
                                    continuous=self.weights == "jarzynski")
        return Posterior(images, state.log_weights if weighted else None,
                         state.log_evidence.to(images.dtype) if weighted else None, diagnostics=diagnostics)

    def iterate(self, reward: Reward, num_samples: int, *,
                generator: torch.Generator | int | None = None) -> Iterator[FMTTState]:
        """The particles at time 0 and after each of the K steps, for plots and for solvers built on this one.

        Args:
            reward: over B observations; one that scores any number alike stands for B = 1.
            num_samples: N, particles for each observation.
            generator: source of all random numbers.

        Yields:
            K + 1 states; their tensors are never written to afterwards.

        Raises:
            ValueError: as :meth:`sample`.
        """
        run = self._start(reward, num_samples, as_generator(generator))
        nothing = torch.zeros(run.shape[0], device=run.x.device)
        yield self._state(run, torch.zeros_like(run.path), nothing.bool(), nothing)
        for step in self.base_steps:
            resampled = self._resample(run, moves=step.variance > 0)
            before = self._log_weights(run)
            capped = self._advance(run, step)
            yield self._state(run, before, resampled, capped)

    @torch.no_grad()
    def prior_samples(self, n: int, *, generator: torch.Generator | int | None = None) -> Tensor:
        """Draw from the law that is tilted, the base dynamics in the same steps: ``(n, *image_shape)``."""
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
        """Settings as JSON holds them, kept with each posterior."""
        return {**super().settings(), "look_ahead": self.look_ahead.kind, "look_ahead_steps": self.look_ahead.jumps}

    # -- the steps -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _start(self, reward: Reward, num_samples: int, generator: torch.Generator) -> Run:
        """Particles at time 0, with the weights r_0(x_0)."""
        if num_samples < 1:
            raise ValueError(f"num_samples is {num_samples}: ask for at least one sample")
        if self.weights == "jarzynski" and not reward.differentiable:
            raise ValueError("Jarzynski weights hold for dynamics by the reward's gradient, and this reward has none: "
                             "pass weights='twisted', which stay exact without it")
        device = self.prior.device
        reward = reward.to(device)
        shape = (reward.num_observations or 1, num_samples)
        known = self.times[-2] if self.look_ahead.makes_last_step(self.kernel) else 1.0
        gains = schedule_values(self.schedule, self.times, reward, self.prior, known)
        size = self._size()
        chunks = make_chunks(reward, *shape, size.rows)
        rows = shape[0] * num_samples
        x = draw_noise((rows, *self.prior.state_shape), generator, device).to(self.prior.dtype)
        like = precise(x.new_zeros(shape))
        ancestors = torch.arange(num_samples, device=device).expand(shape)
        run = Run(chunks, size, gains.to(like), (gains > 0).any(0).tolist(), generator, shape, x,
                  Look(like.flatten()), like, ancestors, like[:, 0], torch.zeros_like(ancestors, dtype=torch.bool))
        if self.conjugate is not None:
            run.spectrum = find_spectrum(check_conjugate(reward, self.prior))
        run.look = self._floor(run, Look.cat(over_chunks(
            chunks, run.size, lambda chunk: self._look(run, chunk, x[chunk.rows], 0))))
        if self.weights == "jarzynski":
            run.path = self._tilt(run)
        return run

    def _look(self, run: Run, chunk: Chunk, x: Tensor, index: int, *, at_mean: bool = False) -> Look:
        """Look ahead from a chunk at the time of that index, for no more than what the next step will use.

        With ``at_mean``, from the means of a renoising step or what Heun's predicts, for the gradient there.
        """
        ends = index == self.steps
        moves = not ends and self.base_steps[index].variance > 0
        pulls = chunk.reward.differentiable and run.pulls[index]
        rate = self.weights == "jarzynski" and self.look_ahead.kind != "flow_map" and not at_mean and (
            not ends or self.look_ahead.kind == "none")
        gradient = at_mean or (self.kernel != "renoise" and moves and pulls and self.conjugate is None)
        look = self.look_ahead(chunk.reward, x, self.times[index], chunk.shape, gradient=gradient, rate=rate,
                               velocity=self.kernel != "renoise" and not ends, strict=self.weights == "jarzynski")
        if (bad := first_bad(look, x)) is not None:
            place = divmod(chunk.rows.start + bad[1], run.shape[1])
            raise not_finite(self.name, bad[0], f"step {index} of {self.steps} (t = {self.times[index]:.4g})", *place)
        if not self._reuses_landing(index) and not self._is_martingale:
            look = look._replace(landing=None)
        return look

    def _floor(self, run: Run, look: Look) -> Look:
        """Looks in which -inf has a finite stand-in before the end, and with Jarzynski weights at the end.

        Those hold for a reward that is continuous where it is followed: there the stand-in of a pure constraint is the
        value that it has elsewhere, whose difference is added after the last step.
        """
        jarzynski = self.weights == "jarzynski"
        floored = run.floor(look, 0.0) if jarzynski else run.floor(look)
        return look if run.index == self.steps and not jarzynski else floored

    def _reuses_landing(self, index: int) -> bool:
        """Whether the step from the time of that index needs X_{t,1}(x), which the look-ahead then knows."""
        if index == self.steps or not self.look_ahead.is_one_jump:
            return False
        return getattr(self.base_steps[index], "target", 0.0) == 1

    @property
    def _is_martingale(self) -> bool:
        """Whether the conjugate proposal knows what the next look is expected to see: what this one saw."""
        return self.conjugate is not None and self.kernel == "ancestral" and self.look_ahead.kind == "denoiser"

    @torch.no_grad()
    def _advance(self, run: Run, step: BaseStep) -> Tensor:
        """Move all particles by one step; returns the share of capped shifts, ``(B,)``."""
        noise = torch.zeros(0)
        if step.variance > 0:
            noise = draw_noise(tuple(run.x.shape), run.generator, run.x.device).to(run.x.dtype)
        moved, ratios, capped, looks = zip(*over_chunks(
            run.chunks, run.size, lambda chunk: self._advance_chunk(run, step, chunk, noise)))
        old, look = run.look, Look.cat(looks)
        run.x, run.index = torch.cat(moved), run.index + 1
        run.look = self._floor(run, look)
        if self.weights == "jarzynski":
            run.path = run.path + run.work(old, step.end - step.start)
            if step.end == 1:  # what stood for -inf until now takes its leave
                run.path = torch.where(run.floored, -torch.inf, run.path)
        else:
            run.path = run.path + torch.cat(ratios).view(run.shape)
        return torch.cat(capped).view(run.shape).mean(1)

    def _advance_chunk(self, run: Run, step: BaseStep, chunk: Chunk,
                       noise: Tensor) -> tuple[Tensor, Tensor, Tensor, Look]:
        """New states ``(n, ...)``, log p(x' | x) - log q(x' | x) ``(n,)``, which shifts were capped, new looks."""
        known = run.look.take(chunk.rows)
        x = step.mean(self.prior, run.x[chunk.rows], known.velocity, known.landing)
        ratio, capped = precise(x.new_zeros(len(x))), x.new_zeros(len(x))
        if step.variance > 0 and self.conjugate is not None:
            x, ratio = self._condition(run, step, chunk, x, known, noise[chunk.rows])
        elif isinstance(step, HeunStep):
            x = self._heun(run, step, chunk, x + math.sqrt(step.variance) * noise[chunk.rows], known)
        elif step.variance > 0:
            pushed = noise[chunk.rows]
            pull, capped = self._pull(run, step, chunk, x, known)
            if pull is not None:
                wide = precise(pull.flatten(1))
                # in units of sqrt(v): log N(pull + noise; 0, I) - log N(pull + noise; pull, I)
                ratio = -(0.5 * wide.square() + wide * precise(pushed.flatten(1))).sum(1)
                pushed = pushed + pull
            x = x + math.sqrt(step.variance) * pushed
        return x, ratio, capped, self._look(run, chunk, x, run.index + 1)

    def _condition(self, run: Run, step: BaseStep, chunk: Chunk, mean: Tensor, known: Look,
                   noise: Tensor) -> tuple[Tensor, Tensor]:
        """The step conditioned on the measurement: new states, and log p(x' | x) - log q(x' | x)."""
        assert self.conjugate is not None
        assert self.prior.decode_affine is not None
        assert isinstance(chunk.reward, GaussianLikelihood)
        ahead = known.landing if self._is_martingale else self.look_ahead.land(mean, step.end)
        assert ahead is not None
        spectrum = None if run.spectrum is None else run.spectrum.select(chunk.observations)
        slope = self.conjugate.slope(self.look_ahead.kind, step.end)
        return self.conjugate(chunk.reward, spectrum, run.gain(chunk, run.index + 1), slope, mean, step.variance,
                              self.prior.decode(ahead), noise, self.prior.decode_affine[0])

    def _heun(self, run: Run, step: HeunStep, chunk: Chunk, predicted: Tensor, known: Look) -> Tensor:
        """Heun's tilted step, from the prediction without a tilt."""
        before = None if known.gradient is None else run.tilt(chunk, run.index, known.gradient)
        if before is not None:
            predicted = predicted + (step.end - step.start) * step.diffusion * before
        ahead = self._look(run, chunk, predicted, run.index + 1, at_mean=True)
        after = None if ahead.gradient is None else run.tilt(chunk, run.index + 1, ahead.gradient)
        return step.correct(self.prior, run.x[chunk.rows], predicted, (known.velocity, ahead.velocity), (before, after))

    def _pull(self, run: Run, step: BaseStep, chunk: Chunk, mean: Tensor,
              known: Look) -> tuple[Tensor | None, Tensor]:
        """The shift (v/2) grad r_t in units of sqrt(v), ``(n, ...)``, and where it was capped, ``(n,)``."""
        index = run.index
        gradient = known.gradient
        if self.kernel == "renoise" and chunk.reward.differentiable:
            index = run.index + 1  # grad r_{t'} at the mean, where the noise is to be added
            gradient = self._look(run, chunk, mean, index, at_mean=True).gradient
        if gradient is None:
            return None, mean.new_zeros(len(mean))
        pull = 0.5 * math.sqrt(step.variance) * run.tilt(chunk, index, gradient)
        if self.weights == "jarzynski":
            return pull, mean.new_zeros(len(mean))
        length = pull.flatten(1).square().mean(dim=1).sqrt()
        scale = (self.max_shift / length.clamp(min=1e-30)).clamp(max=1.0)
        return pull * scale.view(-1, *[1] * (mean.ndim - 1)), (scale < 1).to(mean)

    # -- the weights ---------------------------------------------------------------------------------------------------

    def _tilt(self, run: Run) -> Tensor:
        """r_t(x) = g(t) r(L_t(x)) where the particles stand, ``(B, N)``."""
        return scale_log(run.gains[:, run.index, None], precise(run.look.value).view(run.shape))

    def _log_weights(self, run: Run) -> Tensor:
        return run.path if self.weights == "jarzynski" else run.path + self._tilt(run)

    def _resample(self, run: Run, moves: bool) -> Tensor:
        """Resample those that need it, before a step whose noise parts the copies; returns which, ``(B,)``."""
        if self.resample_threshold == 0 or self.weights == "none" or not moves:
            return torch.zeros(run.shape[0], dtype=torch.bool, device=run.x.device)
        log_weights = self._log_weights(run)
        index, chosen = self._select(run, log_weights)
        if index is None:
            return chosen
        gained = log_weights.logsumexp(1) - math.log(run.shape[1])
        run.log_evidence = torch.where(chosen, run.log_evidence + gained, run.log_evidence)
        self._gather(run, index)
        fresh = torch.zeros_like(run.path) if self.weights == "jarzynski" else -self._tilt(run)
        run.path = torch.where(chosen[:, None], fresh, run.path)
        return chosen

    def _gather(self, run: Run, index: Tensor) -> None:
        """Put particles ``index`` ``(B, N)`` in the place of all."""
        flat = (index + run.shape[1] * torch.arange(run.shape[0], device=index.device)[:, None]).flatten()
        run.x, run.look = run.x[flat], run.look.take(flat)
        run.ancestors = run.ancestors.gather(1, index)

    def _select(self, run: Run, log_weights: Tensor) -> tuple[Tensor | None, Tensor]:
        """Which particles go on, ``(B, N)`` or None for all, and which observations are resampled, ``(B,)``."""
        count, generator = log_weights.shape[1], child_generator(run.generator)
        ess = effective_sample_size(log_weights)
        chosen = (ess > 0) & (ess < self.resample_threshold * count)
        # one question a step for a GPU to answer; unasked, all states and looks would be copied at every step
        if not bool(chosen.any()):
            return None, chosen
        stay = torch.arange(count, device=log_weights.device).expand_as(log_weights)
        shares = torch.where(chosen[:, None], log_weights, 0.0).softmax(1)
        return torch.where(chosen[:, None], RESAMPLERS[self.resampling](shares, count, generator), stay), chosen

    def _state(self, run: Run, before: Tensor, resampled: Tensor, capped: Tensor) -> FMTTState:
        log_weights = self._log_weights(run)
        evidence = run.log_evidence + log_weights.logsumexp(1) - math.log(run.shape[1])
        return FMTTState(run.index, self.times[run.index], run.x.unflatten(0, run.shape), log_weights,
                         log_weights - before, run.look.value.view(run.shape), run.ancestors, evidence,
                         resampled, capped, run.floored)

    @torch.no_grad()
    def _decode(self, states: Tensor) -> Tensor:
        return self._size().map(self.prior.decode, states)

    def _size(self) -> ChunkSize:
        # a jump is looked ahead by, and differentiated, unless the velocity alone tells where it leads
        velocity = self.look_ahead.kind != "flow_map"
        return ChunkSize(rows_at_a_time(self.chunk_size, self.prior, velocity=velocity), self.name)
