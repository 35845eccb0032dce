"""Markov chains at temperature 1 that start at draws of randomise-then-optimise: one chain per draw."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from invflow.smc import RESAMPLERS, effective_sample_size, log_mean_weight, pareto_k_hat, precise
from invflow.solvers.noise.hamiltonian import Hamiltonian
from invflow.solvers.noise.metric import Preconditioner
from invflow.solvers.noise.moves import Move
from invflow.solvers.noise.rto import Draws
from invflow.solvers.noise.state import NoiseSMCState
from invflow.solvers.noise.target import NoiseTarget, Particles

__all__ = ["ChainRecord", "run_chains"]

_GAIN = 3.0  # change of the log step size per unit of acceptance: there are few adaptations, so it must be large
_GREATEST_CHANGE = math.log(3.0)  # limit of that change, so that one bad trajectory does no lasting damage
_FIRST_ANGLE = 0.3  # with a metric, in units of the score's inverse length: the metric only knows the points seen
_LEAST_STEP_SIZE = 1e-6


def run_chains(target: NoiseTarget, draws: Draws, move: Move, *, num_moves: int, num_adaptations: int,
               acceptance: float | None, step_size: float, resampling: str,
               generator: torch.Generator) -> Iterator[NoiseSMCState]:
    """Move draws of randomise-then-optimise at temperature 1.

    The first ``num_adaptations`` moves adapt step size and metric; Hamiltonian moves then have half to full length.
    After that both are frozen, and ``num_moves`` moves follow, each of which leaves the posterior invariant. Weighted
    draws are resampled first.

    Args:
        target: Target over all B observations, without proposal.
        draws: Draws for B observations, N each.
        move: Markov move of all chains.
        num_moves: Number of moves after adaptation, at least 1.
        num_adaptations: Number of adaptation moves, at least 0.
        acceptance: Target acceptance of the step size. None keeps the step size.
        step_size: Largest initial h. Moves with a gradient start with a shorter one where the gradient is steep.
        resampling: Name of the resampler.
        generator: Random generator.

    Yields:
        A :class:`NoiseSMCState` before the first move and after each.

    Raises:
        ValueError: If no draw of an observation has a finite weight.
    """
    rows = torch.arange(target.num_observations, device=draws.noise.device)
    particles = target.evaluate(draws.noise, rows)
    none = torch.full_like(particles.log_reward[:, 0], torch.nan)
    state = NoiseSMCState(
        particles, torch.ones_like(none), torch.zeros_like(particles.log_reward), none,
        torch.arange(draws.noise.shape[1], device=rows.device).expand(len(rows), -1),
        _first_step_size(move, particles, None, step_size), torch.ones_like(none), none, none, none,
        adapting=num_adaptations > 0)
    if draws.log_weights is not None:
        state = _resampled(state, draws.log_weights, resampling, rows, generator)
    yield state
    particles, h = state.particles, state.step_size
    preconditioner = Preconditioner(len(rows)) if move.preconditioned else None
    if preconditioner is not None and particles.gradient is not None:
        preconditioner.see(rows, particles.gradient)
    for k in range(num_adaptations + num_moves):
        adapting, target.where = k < num_adaptations, f"move {k + 1} of {num_adaptations + num_moves}"
        if preconditioner is not None:
            preconditioner.recording = adapting
        kernel = move
        if adapting and isinstance(move, Hamiltonian):
            kernel = Hamiltonian(math.ceil(move.steps * max(0.5, (k + 1) / num_adaptations)), move.preconditioned)
        random = move.draw(tuple(particles.noise.shape), generator).to(particles.noise)
        particles, rate = kernel(target, particles, rows, state.temperature, h, random, preconditioner)
        used = h
        if adapting and acceptance is not None and move.tunable:
            change = (_GAIN * (rate - acceptance)).clamp(-_GREATEST_CHANGE, _GREATEST_CHANGE)
            h = (h * change.exp()).clamp(_LEAST_STEP_SIZE, 1.0)
        if adapting and preconditioner is not None:
            first = preconditioner.metric is None
            preconditioner.fit(rows, state.temperature, state.temperature, target.reference(state.temperature, rows)[1])
            if first:
                h = _first_step_size(move, particles, preconditioner, step_size)
        state = NoiseSMCState(particles, state.temperature, state.log_weights, state.log_evidence, state.ancestors,
                              used, state.first_temperature, none, none, rate, adapting)
        yield state


def _resampled(state: NoiseSMCState, log_weights: Tensor, resampling: str, rows: Tensor,
               generator: torch.Generator) -> NoiseSMCState:
    evidence = log_mean_weight(torch.zeros_like(log_weights), log_weights)
    if not bool(evidence.isfinite().all()):
        b = int((~evidence.isfinite()).nonzero()[0])
        raise ValueError(f"no draw of observation {b} has a finite weight: the equations with a fixed linearisation "
                         "had no solution; start from draws without weights with start='rto'")
    index = RESAMPLERS[resampling](log_weights.softmax(1), log_weights.shape[1], generator)
    return NoiseSMCState(state.particles.gather(rows, index), state.temperature, state.log_weights, evidence, index,
                         state.step_size, state.first_temperature, effective_sample_size(log_weights),
                         pareto_k_hat(log_weights), state.acceptance, state.adapting)


def _first_step_size(move: Move, particles: Particles, preconditioner: Preconditioner | None,
                     largest: float) -> Tensor:
    """Safe initial step size, ``(B,)``: the inverse length of the score."""
    if particles.gradient is None:
        return torch.full_like(particles.log_reward[:, 0], largest)
    score, scale = particles.gradient.flatten(2), 1.0
    if preconditioner is not None and preconditioner.metric is not None:
        score, scale = preconditioner.metric.stretch(score), _FIRST_ANGLE
    return (scale / (1 + precise(score).square().sum(2).mean(1)).sqrt()).clamp(max=largest)


class ChainRecord:
    """Record of running chains, for the diagnostics."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.potentials: list[Tensor] = []  # for the frozen chains, including their start
        self.angle: Tensor | None = None
        self._start: Particles | None = None
        self._end: Particles | None = None

    def add(self, state: NoiseSMCState) -> None:
        """Add a state."""
        particles = state.particles
        potential = 0.5 * precise(particles.noise).flatten(2).square().sum(2) - particles.log_reward
        if state.adapting or self._start is None:
            self.potentials, self._start, self.angle = [potential], particles, torch.zeros_like(potential[:, 0])
            return
        self.potentials.append(potential)
        assert self.angle is not None
        self.angle = self.angle + state.acceptance * state.step_size.asin() * self.steps
        self._end = particles

    def diagnostics(self) -> dict[str, Tensor]:
        """``share_moved``, ``quarter_turns``, ``drift`` and ``memory`` of the frozen chains, each ``(B,)``.

        The drift is the mean change of the potential |z|^2 / 2 - r over the second half of the moves, divided by its
        standard error. For chains in equilibrium it is nearly a standard normal number. The memory is the correlation,
        over chains and pixels, between the images at the start and at the end, each minus its mean over the chains. It
        is near 0 for chains that have forgotten their start, whatever their number.
        """
        assert self.angle is not None
        assert self._start is not None
        assert self._end is not None
        change = self.potentials[-1] - self.potentials[(len(self.potentials) - 1) // 2]
        error = change.std(1) / math.sqrt(change.shape[1])
        drift = torch.where(error > 0, change.mean(1) / error, 0.0)
        first, last = (precise(p.images).flatten(2) for p in (self._start, self._end))
        first, last = (x - x.mean(1, keepdim=True) for x in (first, last))
        norm = (first.square().sum((1, 2)) * last.square().sum((1, 2))).sqrt()
        memory = torch.where(norm > 0, (first * last).sum((1, 2)) / norm, 0.0)
        moved = (self._end.noise != self._start.noise).flatten(2).any(2)
        return {"share_moved": precise(moved).mean(1), "quarter_turns": self.angle / (math.pi / 2), "drift": drift,
                "memory": memory}
