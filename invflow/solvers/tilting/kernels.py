"""Base kernels of tilted sampling along a path: the Gaussian steps of the base samplers."""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

from invflow.flowmap import FlowMap

__all__ = ["KERNELS", "AncestralStep", "BaseStep", "Diffusion", "EulerStep", "HeunStep", "RenoiseStep", "base_steps"]

Diffusion: TypeAlias = "float | Callable[[float], float]"

KERNELS = ("sde", "heun", "ancestral", "renoise")


@dataclass(frozen=True)
class BaseStep(ABC):
    """One step of a base sampler, the Gaussian kernel N(m(x), v I) from ``start`` to ``end``.

    Attributes:
        start, end: Times at which the step starts and ends.
        variance: v; zero for a deterministic step.
    """

    start: float
    end: float
    variance: float

    @abstractmethod
    def mean(self, prior: FlowMap, x: Tensor, velocity: Tensor | None = None,
             landing: Tensor | None = None) -> Tensor:
        """The mean m(x).

        Args:
            prior: The flow map.
            x: ``(n, *state_shape)``, states at time ``start``.
            velocity: b_start(x), if known already; saves a call.
            landing: X_{start,1}(x) in one jump, if known already; saves a call if the step makes this jump.

        Returns:
            ``(n, *state_shape)``.
        """


@dataclass(frozen=True)
class EulerStep(BaseStep):
    """Euler-Maruyama step of dx = (b + eps s) dt + sqrt(2 eps) dW, so v = 2 eps dt.

    Attributes:
        diffusion: eps at the start; 0 for a step along the probability flow.
    """

    diffusion: float = 0.0

    def mean(self, prior: FlowMap, x: Tensor, velocity: Tensor | None = None,
             landing: Tensor | None = None) -> Tensor:
        """x + dt (b + eps s), with the score from the velocity, s = (t b - x) / (1 - t)."""
        b = prior.velocity(x, self.start) if velocity is None else velocity
        return x + (self.end - self.start) * _drift(x, self.start, self.diffusion, b)


@dataclass(frozen=True)
class HeunStep(EulerStep):
    r"""Heun's step for the same SDE: Euler-Maruyama predicts, and the mean of the drifts at both ends corrects.

    .. math:: \hat x = x + h F(t, x) + \sqrt{v} \xi, \quad
        x' = x + \tfrac{h}{2} (F(t, x) + F(t', \hat x)) + \sqrt{v} \xi

    with v = h (eps_t + eps_{t'}). The error of its law is of second order in h, since the noise is additive (Kloeden
    and Platen 1992, "Numerical Solution of Stochastic Differential Equations", section 15.1). It is not a Gaussian
    kernel.

    Attributes:
        diffusion_end: eps at the end.
    """

    diffusion_end: float = 0.0

    def correct(self, prior: FlowMap, x: Tensor, predicted: Tensor,
                velocities: tuple[Tensor | None, Tensor | None] = (None, None),
                tilts: tuple[Tensor | None, Tensor | None] = (None, None)) -> Tensor:
        """The corrected state.

        Args:
            prior: The flow map.
            x: ``(n, *state_shape)``, states at the start.
            predicted: ``(n, *state_shape)``, predictions of Euler-Maruyama with the same noise and, if there are
                tilts, the shift h eps grad r_t.
            velocities: b at x and at the predictions, if known already.
            tilts: grad r_t at the same two places; None for no tilt.

        Returns:
            ``(n, *state_shape)``.
        """
        ends = ((x, self.start, self.diffusion), (predicted, self.end, self.diffusion_end))
        before, after = (
            _drift(state, t, eps, prior.velocity(state, t) if b is None else b, tilt)
            for (state, t, eps), b, tilt in zip(ends, velocities, tilts))
        return predicted + 0.5 * (self.end - self.start) * (after - before)

    def correct_pair(self, prior: FlowMap, pair: Tensor) -> Tensor:
        """The corrected states without a tilt, from pairs of state and prediction ``(n, 2, *state_shape)``."""
        return self.correct(prior, pair[:, 0], pair[:, 1])


def _drift(x: Tensor, t: float, eps: float, b: Tensor, tilt: Tensor | None = None) -> Tensor:
    """b + eps (s + grad r_t), with the score from the velocity, s = (t b - x) / (1 - t)."""
    pull = (t * b - x) / (1 - t)
    return b + eps * (pull if tilt is None else pull + tilt)


@dataclass(frozen=True)
class AncestralStep(BaseStep):
    r"""The ancestral kernel of diffusion models: the law of x' if x is x' plus noise and the image is the denoised one.

    With :math:`\rho = (t (1 - t') / (t' (1 - t)))^2` it has mean :math:`t' (1 - \rho) D_t(x) + \rho (t' / t) x` and
    variance :math:`(1 - t')^2 (1 - \rho)` (Ho, Jain, Abbeel 2020, in the times used here). The denoised image is
    expected to stay the same over the step.
    """

    def mean(self, prior: FlowMap, x: Tensor, velocity: Tensor | None = None,
             landing: Tensor | None = None) -> Tensor:
        """The mean, from D_t(x) = x + (1 - t) b_t(x)."""
        b = prior.velocity(x, self.start) if velocity is None else velocity
        denoised = x + (1 - self.start) * b
        # rho / t, which is finite at t = 0 too
        pull = self.start * ((1 - self.end) / (self.end * (1 - self.start))) ** 2
        return self.end * ((1 - pull * self.start) * denoised + pull * x)


@dataclass(frozen=True)
class RenoiseStep(BaseStep):
    """Jump to a time beyond the end, then add noise back: x' = (t'/u) X_{t,u}(x) + sqrt(v) xi.

    With v = (1 - t')^2 - (t' (1 - u) / u)^2 every marginal is exact for an exact map, at any number of steps.

    Attributes:
        target: u, at least ``end``; equal to it if v = 0.
    """

    target: float = 1.0

    def mean(self, prior: FlowMap, x: Tensor, velocity: Tensor | None = None,
             landing: Tensor | None = None) -> Tensor:
        """(t'/u) X_{t,u}(x)."""
        moved = landing if landing is not None and self.target == 1 else prior.jump(x, self.start, self.target)
        return moved * (self.end / self.target)


def base_steps(kernel: str, times: Sequence[float], diffusion: Diffusion) -> list[BaseStep]:
    """The steps of a base sampler; the last one adds no noise.

    A step of the SDE or of renoising adds noise of variance v = 2 eps dt. Renoising adds at most (1 - t')^2, the
    variance of all noise at the end of the step; it then jumps to u = 1. Ancestral steps have their own noise.

    Args:
        kernel: ``"sde"``, ``"heun"``, ``"ancestral"`` or ``"renoise"``.
        times: Times that increase from 0 to 1.
        diffusion: eps(t), nonnegative, and zero at t = 1 for the SDE; a number c means c (1 - t). With ``math.inf``
            every renoising step jumps to u = 1. Ancestral steps do not use it.

    Raises:
        ValueError: If the kernel is unknown, or the diffusion is negative or does not vanish at 1.
    """
    if kernel not in KERNELS:
        raise ValueError(f"there is no kernel {kernel!r}: choose 'sde' (Euler-Maruyama), 'heun', 'ancestral' or "
                         "'renoise'")
    steps: list[BaseStep] = []
    for start, end in itertools.pairwise(times):
        if kernel == "ancestral":
            kept = (start * (1 - end) / (end * (1 - start))) ** 2
            steps.append(AncestralStep(start, end, (1 - end) ** 2 * (1 - kept)))
            continue
        eps = float(diffusion(start)) if callable(diffusion) else diffusion * (1 - start)
        if not eps >= 0 or (kernel != "renoise" and math.isinf(eps)):
            raise ValueError(f"the diffusion eps is {eps} at t = {start:.4g}: it must be a number >= 0, and finite "
                             "except for kernel='renoise'; the default is 1 - t, diffusion=1.0")
        if kernel == "heun" and end < 1:
            after = float(diffusion(end)) if callable(diffusion) else diffusion * (1 - end)
            steps.append(HeunStep(start, end, (eps + after) * (end - start), eps, after))
            continue
        if kernel in ("sde", "heun"):  # the last step follows the flow
            eps = 0.0 if end == 1 else eps
            steps.append(EulerStep(start, end, 2 * eps * (end - start), eps))
            continue
        left = (1 - end) ** 2
        variance = min(2 * eps * (end - start), left)
        share = math.sqrt(left - variance) / end  # (1 - u) / u
        steps.append(RenoiseStep(start, end, variance, end if variance == 0 else 1 / (1 + share)))
    if kernel in ("sde", "heun") and callable(diffusion) and abs(float(diffusion(1.0))) > 1e-6:
        raise ValueError(f"the diffusion eps is {float(diffusion(1.0))} at t = 1, where it must vanish: the score "
                         "grows without bound there; multiply it by (1 - t)")
    return steps
