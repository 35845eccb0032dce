"""Dynamics of FMTT in which the best particles take the place of all, and what a path costs before it is run."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from invflow._core.watch import check_gradients
from invflow.flowmap import FlowMap
from invflow.reward import Reward
from invflow.solvers.tilting.fmtt import FMTT
from invflow.solvers.tilting.kernels import RenoiseStep
from invflow.solvers.tilting.particles import Run
from invflow.solvers.tilting.schedules import schedule_values

__all__ = ["JumpCalls", "SelectingFMTT", "path_calls"]


class JumpCalls:
    """Calls, forward and backward, of the jumps of a map: one each for a learned map, more for an ODE.

    Each kind of jump is tried once, on one row; a map that takes one call for two different ones is taken to do so
    for all.

    Args:
        prior: the flow map.
    """

    def __init__(self, prior: FlowMap) -> None:
        self.prior = prior
        self.known: dict[tuple[float, float], tuple[int, int]] = {}
        self.constant = self(0.0, 1.0) == self(0.5, 0.75 if prior.has_velocity else 1.0) == (1, 1)

    def __call__(self, s: float, t: float) -> tuple[int, int]:
        """Calls of one jump of one row from time s to time t."""
        if getattr(self, "constant", False):
            return 1, 1
        if (s, t) not in self.known:
            x = torch.zeros(1, *self.prior.state_shape, device=self.prior.device, dtype=self.prior.dtype)
            check_gradients("a search along the path")
            with self.prior.uncounted(), self.prior.count() as calls, torch.enable_grad():
                x.requires_grad_()
                torch.autograd.grad(self.prior.jump(x, s, t).sum(), x)
            self.known[s, t] = calls.forward, calls.backward
        return self.known[s, t]

    def look(self, t: float, jumps: int) -> tuple[int, int]:
        """Calls of a look from time t to the end, in so many equal jumps."""
        times = [1 - (1 - t) * (jumps - i) / jumps if i else t for i in range(jumps + 1)]
        counts = [self(*pair) for pair in itertools.pairwise(times)]
        return sum(c[0] for c in counts), sum(c[1] for c in counts)


def path_calls(solver: FMTT, reward: Reward, jumps: JumpCalls | None = None) -> tuple[int, int]:
    """Calls that :meth:`FMTT.sample` makes for each particle, forward and backward, known beforehand.

    Args:
        solver: with its steps, look-ahead, kernel and proposal.
        reward: which matters in whether it has a gradient, and in an annealed schedule.
        jumps: what is known about the map's jumps.
    """
    ahead, kernel = solver.look_ahead, solver.kernel
    jumps = JumpCalls(solver.prior) if jumps is None else jumps

    def look(t: float) -> tuple[int, int]:
        if ahead.kind != "flow_map":
            return (0, 0) if ahead.kind == "none" else (1, 1)
        return jumps.look(t, ahead.jumps)

    pulls = (schedule_values(solver.schedule, solver.times, reward, solver.prior) > 0).any(0).tolist()
    gradients = reward.differentiable and solver.conjugate is None
    forward = backward = 0
    for index, step in enumerate(solver.base_steps):
        follows, last, moves = kernel != "renoise", index + 1 == solver.steps, step.variance > 0
        here, there = look(step.start), look(step.end) if not last else (0, 0)
        forward += here[0]
        rate = solver.weights == "jarzynski" and ahead.kind != "flow_map"
        if follows and ((gradients and moves and pulls[index]) or rate):
            backward += here[1]
        if follows and ahead.kind != "denoiser":
            forward += 1  # the velocity
        if isinstance(step, RenoiseStep) and not (ahead.is_one_jump and step.target == 1):
            forward += jumps(step.start, step.target)[0]
        known = kernel == "ancestral" and ahead.kind == "denoiser"
        if moves and solver.conjugate is not None and not known:
            forward += there[0]  # at the mean
        if moves and kernel in ("renoise", "heun") and gradients:  # at the mean, or at what was predicted
            forward, backward = forward + there[0], backward + there[1]
        if moves and kernel == "heun" and ahead.kind != "denoiser":
            forward += 1
    if solver.weights == "jarzynski" and ahead.kind == "none":
        forward += 1  # the velocity at the end, for the last trapezium
    return forward, backward


class SelectingFMTT(FMTT):
    """FMTT without weights, in which copies of the k best particles replace all N at some of the steps.

    Args:
        prior: the flow map.
        k: particles kept.
        selections: how often, at steps evenly spaced along the path, the first and the last left out.
        settings: of FMTT.
    """

    name = "TopKSearch"

    def __init__(self, prior: FlowMap, k: int, selections: int, **settings: Any) -> None:
        super().__init__(prior, weights="none", **settings)
        self.k = k
        self.selected_at = {round(self.steps * (i + 1) / (selections + 1)) for i in range(selections)}

    def calls(self, reward: Reward, jumps: JumpCalls) -> int:
        """Calls for each particle, forward and backward together."""
        return sum(path_calls(self, reward, jumps))

    def _resample(self, run: Run, moves: bool) -> Tensor:
        chosen = torch.full((run.shape[0],), run.index in self.selected_at, device=run.x.device)
        if run.index not in self.selected_at:
            return chosen
        best = run.look.value.view(run.shape).topk(self.k, dim=1).indices
        self._gather(run, best[:, torch.arange(run.shape[1], device=best.device) % self.k])
        return chosen
