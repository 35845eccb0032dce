"""Look-aheads of tilted sampling along a path: predictions of the finished image and its reward."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from invflow._core.shapes import with_axes
from invflow._core.watch import check_gradients
from invflow.flowmap import FlowMap, Time, expand_time
from invflow.reward import Reward
from invflow.solvers.tilting.kernels import BaseStep

__all__ = ["BaseStep", "Look", "LookAhead"]

#: number of random sign vectors over which the gain of an operator is averaged
_PROBES = 16

LOOK_AHEADS = ("flow_map", "denoiser", "none")


# -- look-aheads -------------------------------------------------------------------------------------------------------


class Look(NamedTuple):
    """The result of a look-ahead from n states at one time."""

    value: Tensor  # (n,): r(L_t(x)), the reward of the predicted image
    landing: Tensor | None = None  # (n, *state_shape): L_t(x), if the next step can use it
    velocity: Tensor | None = None  # (n, *state_shape): b_t(x)
    gradient: Tensor | None = None  # (n, *state_shape): gradient of the value in x
    rate: Tensor | None = None  # (n,): (d/dt + b . grad) of the value

    def take(self, index: Tensor | slice) -> Look:
        """The looks of some of the states, in the order of the index."""
        rest = (None if field is None else field[index] for field in self[1:])
        return Look(self.value[index], *rest)

    @staticmethod
    def cat(looks: Sequence[Look]) -> Look:
        """Looks from parts of the states, joined into one."""
        rest = (None if parts[0] is None else torch.cat(parts) for parts in zip(*(look[1:] for look in looks)))
        return Look(torch.cat([look.value for look in looks]), *rest)


def _complain(reward: Reward, prior: FlowMap, landing: Tensor, strict: bool) -> None:
    """Warn, or raise if ``strict``, that a reward claims to have a gradient but gives none."""
    cut = f"the reward {type(reward).__name__}" if landing.requires_grad else f"the flow map {type(prior).__name__}"
    said = (f"no gradient comes back from {cut}, which detaches or does not depend on its images: no gradient guides "
            "the particles, only their weights. Pass FunctionReward(fn, differentiable=False) for a black box")
    if strict:
        raise ValueError(f"{said}, and weights='twisted', which stay exact without a gradient")
    warnings.warn(said, stacklevel=2)


@dataclass(frozen=True)
class LookAhead:
    """The look-ahead L_t: the predicted image at the end of the path from a state at time t, and its reward.

    Attributes:
        prior: The flow map.
        kind: ``"flow_map"`` for X_{t,1}(x), ``"denoiser"`` for E[m | x_t = x], ``"none"`` for x itself.
        jumps: Number of jumps of the flow map, over equal parts of [t, 1].
    """

    prior: FlowMap
    kind: str = "flow_map"
    jumps: int = 1

    def __post_init__(self) -> None:
        if self.kind not in LOOK_AHEADS:
            raise ValueError(f"there is no look-ahead {self.kind!r}: choose one of {', '.join(LOOK_AHEADS)}")
        if self.jumps < 1:
            raise ValueError(f"look_ahead_steps={self.jumps}: a flow map looks ahead in at least 1 jump")

    @property
    def is_one_jump(self) -> bool:
        """Whether the look-ahead is X_{t,1}(x) in a single call, which a renoising step to u = 1 needs too."""
        return self.kind == "flow_map" and self.jumps == 1

    def makes_last_step(self, kernel: str) -> bool:
        """Whether the last step of a base sampler goes to the state that the look-ahead predicts."""
        return self.is_one_jump if kernel == "renoise" else self.kind == "denoiser"

    @torch.no_grad()
    def land(self, x: Tensor, t: float) -> Tensor:
        """The predicted data state L_t(x) alone: ``(n, *state_shape)`` to the same shape."""
        return self._land(x, t, t)[0]

    def __call__(self, reward: Reward, x: Tensor, t: float, shape: tuple[int, int], *, gradient: bool = False,
                 velocity: bool = False, rate: bool = False, strict: bool = False) -> Look:
        """Look ahead from n = b * k states of b observations.

        Args:
            reward: Reward of those b observations.
            x: ``(n, *state_shape)``, states at time t.
            t: Time in [0, 1]; at 1 the look-ahead is the state itself.
            shape: (b, k).
            gradient: Whether to compute the gradient of the value. It is zero where the value does not depend on the
                state, and where the reward is -inf and its gradient undefined.
            velocity: Whether to compute b_t(x); with the denoiser this takes no extra call.
            rate: Whether to compute (d/dt + b . grad) of the value. This takes no further network call: given the
                gradient, b . grad is a product, and d/dt is part of the same backward pass.
            strict: Whether a missing gradient is an error and not only a warning.

        Returns:
            The look, detached.

        Raises:
            ValueError: See ``strict``.
            RuntimeError: If a gradient is needed inside :func:`torch.inference_mode`.

        Warns:
            UserWarning: If a gradient is needed and none comes back.
        """
        differentiate = gradient or rate
        if differentiate:
            check_gradients("tilting by a reward's gradient")
        with torch.set_grad_enabled(differentiate):
            state = x.detach().requires_grad_(differentiate)
            time: Time = t
            if rate:
                time = torch.full((len(x),), t, dtype=x.dtype, device=x.device, requires_grad=True)
            landing, drift = self._land(state, t, time)
            value = reward(self.prior.decode(landing).unflatten(0, shape)).flatten()
        b = None if drift is None else drift.detach()
        if b is None and (velocity or rate):
            with torch.no_grad():
                b = self.prior.velocity(x, t)
        slope, change = None, None
        if differentiate:
            inputs = [state, time] if isinstance(time, Tensor) else [state]
            found: Sequence[Tensor | None] = (None, None)
            if not value.requires_grad:
                _complain(reward, self.prior, landing, strict)
            else:
                found = torch.autograd.grad(value, inputs, torch.ones_like(value), allow_unused=True)
            slope = torch.zeros_like(x) if found[0] is None else found[0]
            dead = value.detach() == -torch.inf
            slope = torch.where(with_axes(dead, x.ndim), 0.0, slope)
            if rate and b is not None:
                in_time = torch.zeros_like(value) if found[1] is None else torch.where(dead, 0.0, found[1])
                change = (slope * b).flatten(1).sum(1) + in_time
        return Look(value.detach(), landing.detach(), b, slope, change)

    def _land(self, x: Tensor, t: float, time: Time) -> tuple[Tensor, Tensor | None]:
        """L_t(x), and the velocity if L_t(x) needed it."""
        if t == 1 or self.kind == "none":
            return x, None
        if self.kind == "denoiser":
            drift = self.prior.velocity(x, time)
            return x + (1 - expand_time(time, x)) * drift, drift
        for k in range(self.jumps):
            start, end = (1 - (1 - time) * (self.jumps - i) / self.jumps if i else time for i in (k, k + 1))
            x = self.prior.jump(x, start, end)
        return x, None
