"""Time grids, and schedules: the fraction of the reward that counts at each time along the path."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from invflow.flowmap import FlowMap
from invflow.likelihood import GaussianLikelihood
from invflow.linear.structure import zero_unobserved
from invflow.reward import Reward
from invflow.solvers.tilting.annealing import AnnealedCovariance
from invflow.solvers.tilting.look_ahead import _PROBES

__all__ = [
    "AnnealedVariance", "Grid", "Schedule", "logit_grid", "make_times", "measured_gain", "schedule_values",
    "uniform_grid",
]

Grid: TypeAlias = "str | Sequence[float] | Callable[[int], Sequence[float]]"

Schedule: TypeAlias = "str | Callable[[float], float] | AnnealedVariance | AnnealedCovariance"


def uniform_grid(steps: int) -> list[float]:
    """``steps + 1`` times from 0 to 1, evenly spaced."""
    return [i / steps for i in range(steps + 1)]


def logit_grid(steps: int, first: float = 1 / 500, last: float = 0.99) -> list[float]:
    """``steps + 1`` times from 0 to 1, those between ``first`` and ``last`` evenly spaced in log t / (1 - t).

    States commit to one of several well-separated modes in d dimensions near t = 1 / (distance in noise units), which
    a uniform grid steps over. Fine detail appears where 1 - t is of its size.

    Args:
        steps: Number of steps, at least 1.
        first: First time after 0, in (0, 1).
        last: Last time before 1, in (first, 1).
    """
    if not 0 < first < last < 1:
        raise ValueError(f"a logit grid needs 0 < first < last < 1, not first={first} and last={last}")
    if steps < 3:
        return uniform_grid(steps) if steps == 1 else [0.0, math.sqrt(first * last), 1.0]
    low, high = (math.log(t / (1 - t)) for t in (first, last))
    inner = [1 / (1 + math.exp(-(low + (high - low) * i / (steps - 2)))) for i in range(steps - 1)]
    return [0.0, *inner, 1.0]


def make_times(grid: Grid, steps: int) -> list[float]:
    """The times that a sampler visits.

    Args:
        grid: ``"uniform"``, ``"logit"``, a function of the number of steps (such as ``functools.partial(logit_grid,
            first=1e-4)``), or the times themselves, whose number then determines the steps.
        steps: Number of steps, at least 1.

    Returns:
        Increasing times, the first 0 and the last 1.

    Raises:
        ValueError: If the name is unknown, there is no step, or the times do not increase from 0 to 1.
    """
    if isinstance(grid, str):
        known: dict[str, Callable[[int], Sequence[float]]] = {"uniform": uniform_grid, "logit": logit_grid}
        if grid not in known:
            raise ValueError(f"there is no time grid {grid!r}: choose 'uniform' or 'logit', or pass the times")
        grid = known[grid]
    if steps < 1:
        raise ValueError(f"steps={steps}: the path from noise to data takes at least 1 step")
    times = [float(t) for t in (grid(steps) if callable(grid) else grid)]
    if len(times) < 2 or times[0] != 0 or times[-1] != 1 or any(b <= a for a, b in itertools.pairwise(times)):
        raise ValueError(
            f"the time grid starts {times[:3]} and ends {times[-3:]}: times must increase strictly from exactly 0 "
            "(noise) to exactly 1 (data), as in [0.0, 0.1, 0.5, 1.0]"
        )
    return times


@dataclass(frozen=True)
class AnnealedVariance:
    r"""Schedule of a Gaussian likelihood whose variance shrinks to sigma^2.

    The look-ahead at time t determines the image up to a variance of about
    :math:`s^2 (1-t)^2 / ((1-t)^2 + t^2)` (exactly this for Gaussian data with standard deviation 1 in state space and s
    in the measurement; Song et al. 2023, "Pseudoinverse-guided diffusion models"), which adds to the noise of the
    measurement. Up to a constant, the likelihood with the larger variance is the fraction

    .. math:: g(t) = \sigma^2 / (\sigma^2 + s^2 (1-t)^2 / ((1-t)^2 + t^2))

    of the log likelihood. It does not vanish at t = 0, so weights start at g(0) r.

    If the last step goes to the state that the look-ahead predicts, the image is known from the time before that step
    on. The variance that remains at that time is therefore subtracted at all times.

    Args:
        spread: s, the standard deviation of the data in the units of the measurement; nonnegative.
    """

    spread: float = 1.0

    def __call__(self, t: float, sigma: Tensor, known: float = 1.0, gain: Tensor | float = 1.0) -> Tensor:
        """g(t) for noise levels ``(B,)``; in [0, 1].

        Args:
            t: Time in [0, 1].
            sigma: ``(B,)``, noise levels.
            known: Time from which the look-ahead is taken to know the image.
            gain: Variance of a measured value for pixels of unit variance; ``(B,)``, or one for all.
        """
        extra = self.spread**2 * max(0.0, _unknown(t) - _unknown(known))
        return sigma**2 / (sigma**2 + gain * extra)


def _unknown(t: float) -> float:
    """Variance of N(0, 1) data given a state at time t."""
    return (1 - t) ** 2 / ((1 - t) ** 2 + t**2)


@torch.no_grad()
def measured_gain(reward: Reward) -> Tensor:
    """Variance of a measured value for independent pixels of variance 1, averaged over the observed values.

    This is the mean squared norm of the rows of A, estimated from a few random sign vectors (Hutchinson 1990). It is
    exactly 1 if pixels are measured directly, and 1 / k^2 for means over k x k pixels.

    Args:
        reward: Reward of B observations.

    Returns:
        ``(B,)`` or ``(1,)``, in float64 on the CPU; 1 for any reward but a Gaussian likelihood with a linear operator.
    """
    if not isinstance(reward, GaussianLikelihood) or not reward.operator.linear:
        return torch.ones(1, dtype=torch.float64)
    operator = reward.operator
    shape = (operator.num_sets, _PROBES, *operator.measurement_shape)
    signs = torch.randint(2, shape, generator=torch.Generator().manual_seed(0)) * 2.0 - 1
    signs = zero_unobserved(operator, signs.to(device=operator.device, dtype=operator.dtype))
    back = operator.expand(_PROBES).adjoint(signs.flatten(0, 1)).unflatten(0, shape[:2])
    energies = [part.cpu().double().square().flatten(2).sum(2) for part in (back, signs)]
    return (energies[0] / energies[1].clamp(min=1)).mean(1)


def schedule_values(schedule: Schedule, times: Sequence[float], reward: Reward, prior: FlowMap,
                    known: float = 1.0) -> Tensor:
    """The fraction g(t) of the reward at each time.

    Args:
        schedule: ``"linear"`` for g(t) = t; ``"annealed"`` for an :class:`AnnealedVariance` with the spread of
            measurements of unit-variance data in state space, see :func:`measured_gain`; an :class:`AnnealedVariance`
            with another spread; an :class:`~invflow.solvers.tilting.annealing.AnnealedCovariance`; or a function g(t).
        times: Increasing times that end at 1.
        reward: Reward; an annealed schedule needs its noise level ``sigma``.
        prior: Flow map whose affine decoding gives the spread of ``"annealed"``.
        known: Time from which the look-ahead predicts the result of the last step, for an annealed schedule.

    Returns:
        ``(B, len(times))``, or ``(1, len(times))`` if all observations share it, in float64 on the CPU.

    Raises:
        TypeError: If the schedule is annealed and the reward has no sigma.
        ValueError: If the name is unknown, or g decreases, leaves [0, 1], or does not end at 1.
    """
    if schedule == "linear":
        return torch.tensor([list(times)], dtype=torch.float64)
    gain: Tensor | float = 1.0
    if schedule == "annealed":
        gain = measured_gain(reward)
        schedule = AnnealedVariance(1.0 if prior.decode_affine is None else abs(prior.decode_affine[0]))
    if isinstance(schedule, str):
        raise ValueError(f"there is no schedule {schedule!r}: choose 'linear' or 'annealed', or pass a function g(t)")
    if isinstance(schedule, AnnealedVariance):
        sigma = getattr(reward, "sigma", None)
        if not isinstance(sigma, Tensor):
            raise TypeError(
                f"an annealed schedule needs a reward with a noise level sigma, such as a GaussianLikelihood, not a "
                f"{type(reward).__name__}: pass schedule='linear', or a function g(t) from [0, 1] to [0, 1]"
            )
        level = sigma.detach().cpu().double()
        values = torch.stack([schedule(t, level, known, gain) for t in times], dim=1)
    elif isinstance(schedule, AnnealedCovariance):
        values = schedule.values(times, reward, 1.0 if prior.decode_affine is None else prior.decode_affine[0], known)
    else:
        values = torch.tensor([[float(schedule(t)) for t in times]], dtype=torch.float64)
    ends_at_one = bool(((values[:, -1] - 1).abs() < 1e-6).all())
    if not ends_at_one or bool((values < 0).any()) or bool((values.diff(dim=1) < -1e-9).any()):
        shown = [round(v, 4) for v in values[0].tolist()]
        raise ValueError(f"the schedule takes the values {shown[:3]} ... {shown[-2:]}: g(t) must rise from at least 0 "
                         "to exactly 1 at t = 1, as in schedule=lambda t: t**2")
    values[:, -1] = 1.0
    return values
