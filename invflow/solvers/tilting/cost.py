"""The cost of a path before it is run: one particle follows it on a map that moves nothing and counts the calls."""

from __future__ import annotations

import copy
import itertools
from functools import partial

import torch
from torch import Tensor

from invflow._core.watch import check_gradients
from invflow.flowmap import FlowMap, Time
from invflow.reward import FunctionReward, Reward
from invflow.solvers.tilting.conjugate import Conjugate
from invflow.solvers.tilting.fmtt import FMTT
from invflow.solvers.tilting.look_ahead import LookAhead
from invflow.solvers.tilting.schedules import schedule_values
from invflow.solvers.tilting.selection import AllGoOn

__all__ = ["JumpCalls", "path_calls"]


class JumpCalls:
    """Forward and backward calls of the jumps of a map: one each for a learned map, more for an ODE.

    Each kind of jump is tried once, on one row. If a map needs one call for two different jumps, it is assumed to need
    one for all.

    Args:
        prior: The flow map.
    """

    def __init__(self, prior: FlowMap) -> None:
        self.prior = prior
        self.known: dict[tuple[float, float], tuple[int, int]] = {}
        self.constant = self(0.0, 1.0) == self(0.5, 0.75 if prior.has_velocity else 1.0) == (1, 1)

    def __call__(self, s: float, t: float) -> tuple[int, int]:
        """Calls for one jump of one row from time s to time t."""
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
        """Calls for a look-ahead from time t to the end, in ``jumps`` equal jumps."""
        times = [1 - (1 - t) * (jumps - i) / jumps if i else t for i in range(jumps + 1)]
        counts = [self(*pair) for pair in itertools.pairwise(times)]
        return sum(c[0] for c in counts), sum(c[1] for c in counts)


class _Bill(FlowMap):
    """A map that moves no state and counts the calls that another map would have made.

    Args:
        jumps: Calls of the other map's jumps.
        decodes: Whether states are decoded, on the other map's device; otherwise images are the states, on the CPU.
    """

    def __init__(self, jumps: JumpCalls, decodes: bool) -> None:
        super().__init__()
        self.jumps, self.decodes = jumps, decodes
        other = jumps.prior
        self.state_shape = other.state_shape
        self.image_shape = other.image_shape if decodes else other.state_shape
        self.has_velocity, self.independent_noise = other.has_velocity, other.independent_noise
        self.register_buffer("like", torch.zeros((), dtype=other.dtype, device=other.device if decodes else "cpu"))
        self.forwards = self.backwards = 0

    @property
    def decode_affine(self) -> tuple[float, float] | None:
        """The affine decoding of the other map."""
        return self.jumps.prior.decode_affine

    def decode(self, state: Tensor) -> Tensor:
        """The other map's decoding, or the state itself."""
        return self.jumps.prior.decode(state) if self.decodes else state

    def velocity(self, x: Tensor, t: Time) -> Tensor:
        """Count one call."""
        return self._charge(x, (1, 1))

    def jump(self, x: Tensor, s: Time, t: Time) -> Tensor:
        """Count the calls that the other map needs from s to t."""
        start, end = (float(torch.as_tensor(time).flatten()[0]) for time in (s, t))
        return self._charge(x, self.jumps(start, end))

    def _charge(self, x: Tensor, calls: tuple[int, int]) -> Tensor:
        self.forwards += calls[0]
        if not x.requires_grad:
            return torch.zeros_like(x)
        moved = x * 0

        def on_backward(_: Tensor) -> None:
            self.backwards += calls[1]

        moved.register_hook(on_backward)
        return moved


def path_calls(solver: FMTT, reward: Reward, jumps: JumpCalls | None = None) -> tuple[int, int]:
    """Forward and backward calls that :meth:`FMTT.sample` makes for each particle, computed without running it.

    With a conjugate proposal the reward's operator is applied to images; other rewards are not evaluated.

    Args:
        solver: Solver with its steps, look-ahead, kernel and proposal.
        reward: Reward; the cost depends on whether it has a gradient and, through an annealed schedule, on its values
            of g.
        jumps: Calls of the map's jumps, if known already.
    """
    measures = isinstance(solver.proposing, Conjugate)
    bill = _Bill(JumpCalls(solver.prior) if jumps is None else jumps, measures)
    dry = copy.copy(solver)
    dry.prior, dry.look_ahead = bill, LookAhead(bill, solver.look_ahead.kind, solver.look_ahead.jumps)
    dry.selection = AllGoOn()  # selection costs no calls
    gains = schedule_values(solver.schedule, solver.times, reward, solver.prior).amax(0).tolist()
    dry.schedule = dict(zip(solver.times, gains)).__getitem__
    if not measures:
        reward = FunctionReward(partial(torch.sum, dim=tuple(range(1, 1 + len(bill.image_shape)))),
                                differentiable=reward.differentiable)
    elif reward.num_observations:
        reward = reward.select(slice(0, 1))
    for _ in dry.iterate(reward, 1, generator=torch.Generator()):
        pass
    return bill.forwards, bill.backwards
