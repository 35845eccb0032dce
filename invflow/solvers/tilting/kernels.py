"""Base kernels of tilted sampling along a path: Gaussian steps of the samplers that are tilted."""

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
        start, end: times.
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
            prior: the flow map.
            x: ``(n, *state_shape)``, states at time ``start``.
            velocity: b_start(x), if known already; saves a call.
            landing: X_{start,1}(x) in one jump, if known already; saves a call where the step jumps there.

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
    r"""Heun's step of the same SDE: Euler-Maruyama predicts, the mean of the drifts at both ends corrects.

    .. math:: \hat x = x + h F(t, x) + \sqrt{v} \xi, \quad
        x' = x + \tfrac{h}{2} (F(t, x) + F(t', \hat x)) + \sqrt{v} \xi

    with v = h (eps_t + eps_{t'}). Its law is of second order in h, since the noise is additive (Kloeden and Platen
    1992, "Numerical Solution of Stochastic Differential Equations", section 15.1); it is no Gaussian kernel.

    Attributes:
        diffusion_end: eps at the end.
    """

    diffusion_end: float = 0.0

    def correct(self, prior: FlowMap, x: Tensor, predicted: Tensor,
                velocities: tuple[Tensor | None, Tensor | None] = (None, None),
                tilts: tuple[Tensor | None, Tensor | None] = (None, None)) -> Tensor:
        """The corrected state.

        Args:
            prior: the flow map.
            x: ``(n, *state_shape)``, at the start.
            predicted: ``(n, *state_shape)``, by Euler-Maruyama with the same noise and, where there are tilts, the
                shift h eps grad r_t.
            velocities: b at x and at what was predicted, if known already.
            tilts: grad r_t there; None for none.

        Returns:
            ``(n, *state_shape)``.
        """
        ends = ((x, self.start, self.diffusion), (predicted, self.end, self.diffusion_end))
        before, after = (
            _drift(state, t, eps, prior.velocity(state, t) if b is None else b, tilt)
            for (state, t, eps), b, tilt in zip(ends, velocities, tilts))
        return predicted + 0.5 * (self.end - self.start) * (after - before)

    def correct_pair(self, prior: FlowMap, pair: Tensor) -> Tensor:
        """The corrected states without a tilt, of states and predictions side by side, ``(n, 2, *state_shape)``."""
        return self.correct(prior, pair[:, 0], pair[:, 1])


def _drift(x: Tensor, t: float, eps: float, b: Tensor, tilt: Tensor | None = None) -> Tensor:
    """b + eps (s + grad r_t), with the score from the velocity, s = (t b - x) / (1 - t)."""
    pull = (t * b - x) / (1 - t)
    return b + eps * (pull if tilt is None else pull + tilt)


@dataclass(frozen=True)
class AncestralStep(BaseStep):
    r"""The ancestral kernel of diffusion models: where x' was if x came from it by noising, given the denoised image.

    With :math:`\rho = (t (1 - t') / (t' (1 - t)))^2` it has mean :math:`t' (1 - \rho) D_t(x) + \rho (t' / t) x` and
    variance :math:`(1 - t')^2 (1 - \rho)` (Ho, Jain, Abbeel 2020, in the times used here). Along it, the denoised image
    of the next state is expected to be that of this one.
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

    With v = (1 - t')^2 - (t' (1 - u) / u)^2 every marginal is exact for an exact map, however few the steps.

    Attributes:
        target: u, at least ``end``; equal to it where v = 0.
    """

    target: float = 1.0

    def mean(self, prior: FlowMap, x: Tensor, velocity: Tensor | None = None,
             landing: Tensor | None = None) -> Tensor:
        """(t'/u) X_{t,u}(x)."""
        moved = landing if landing is not None and self.target == 1 else prior.jump(x, self.start, self.target)
        return moved * (self.end / self.target)


def base_steps(kernel: str, times: Sequence[float], diffusion: Diffusion) -> list[BaseStep]:
    """The steps of a base sampler; the last one adds no noise.

    The SDE and renoising add noise of variance v = 2 eps dt at a step; renoising at most (1 - t')^2, which is all the
    noise there is at its end, and which it adds where it jumps to u = 1. The noise of ancestral steps is their own.

    Args:
        kernel: ``"sde"``, ``"heun"``, ``"ancestral"`` or ``"renoise"``.
        times: increasing from 0 to 1.
        diffusion: eps(t), nonnegative, and zero at t = 1 for the SDE; a number c stands for c (1 - t). ``math.inf``
            lets every renoising step jump to u = 1. Not used by ancestral steps.

    Raises:
        ValueError: for another kernel; for a diffusion that is negative, or does not vanish at 1.
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
            raise ValueError(f"the diffusion eps is {eps} at t = {start:.4g}: it must be a number >= 0, finite but "
                             "for kernel='renoise'; the default is 1 - t, diffusion=1.0")
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
