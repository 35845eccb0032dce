"""The conjugate proposal of tilted sampling: each step conditioned on a linear-Gaussian measurement in closed form."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from invflow._core.conjugate_gradients import solve
from invflow.flowmap import FlowMap
from invflow.likelihood import GaussianLikelihood
from invflow.linear import spectral
from invflow.linear.structure import Spectrum, zero_unobserved
from invflow.reward import Reward
from invflow.smc import precise
from invflow.solvers.tilting.kernels import AncestralStep, BaseStep
from invflow.solvers.tilting.look_ahead import LookAhead
from invflow.solvers.tilting.proposals import Move, Proposal

__all__ = ["Conjugate", "check_conjugate"]


def check_conjugate(reward: Reward, prior: FlowMap) -> GaussianLikelihood:
    """The reward, if a step can be conditioned on it in closed form.

    Raises:
        TypeError: If the reward is not a Gaussian likelihood.
        ValueError: If the operator is not linear, or the decoding is not affine.
    """
    way_out = "pass proposal='gradient', which takes any reward"
    if not isinstance(reward, GaussianLikelihood):
        raise TypeError(f"proposal='conjugate' conditions each step on a GaussianLikelihood, not on a "
                        f"{type(reward).__name__}: {way_out}")
    if not reward.operator.linear:
        raise ValueError(f"proposal='conjugate' takes linear operators, and {type(reward.operator).__name__} is not "
                         f"linear: {way_out}")
    if prior.decode_affine is None or tuple(prior.image_shape) != tuple(prior.state_shape):
        raise ValueError(f"proposal='conjugate' needs images that are an affine function of the states, and the "
                         f"decoding of this {type(prior).__name__} is not affine: {way_out}")
    return reward


@dataclass(frozen=True)
class Conjugate(Proposal):
    r"""Proposal q(x' | x): the base step conditioned on the measurement, with the look-ahead treated as linear.

    With the look-ahead :math:`L(x') \approx \ell + c\,(x' - m)`, the tilt :math:`e^{g r(L(x'))}` of a linear-Gaussian
    reward is Gaussian in x'. Its product with the base step N(m, v I) is the Gaussian

    .. math:: q = N(m + s, C), \quad C^{-1} = \frac{I}{v} + \frac{g c^2}{\sigma^2} A^T A, \quad
        s = C\, \frac{g c}{\sigma^2} A^T (y - A \ell).

    Under this model a step never goes beyond the measurement, even if sigma is small compared with the step, where a
    gradient step overshoots. It needs no gradient of the network. The slope c is that of data N(0, s^2 I) (for the
    denoiser, :math:`t s^2 / ((1 - t)^2 + t^2 s^2)`; Song et al. 2023, "Pseudoinverse-guided diffusion models", give its
    variance). A wrong slope makes the weights uneven but leaves twisted weights exact, since q is Gaussian with a known
    density. A slope that is too large makes q narrower than the target and its weights heavy-tailed. A slope that is
    too small overshoots along directions in which the data vary more than s. Where they vary much more, each step
    overcorrects the one before: with a prior of correlated images (:meth:`for_map`) the states then diverge. In the
    eigenvectors of A A^T everything is diagonal. If these are not available (see :func:`find_spectrum`), a fixed number
    of conjugate gradient steps computes the shift, and the covariance stays v I.

    Args:
        spread: s, the standard deviation of the data in state space, above 0.
        iterations: Number of conjugate gradient steps.
    """

    follows_gradient: ClassVar[bool] = False

    spread: float = 1.0
    iterations: int = 20

    def __post_init__(self) -> None:
        if not (self.spread > 0 and math.isfinite(self.spread)) or self.iterations < 1:
            raise ValueError(f"spread={self.spread} must be over 0 and finite, iterations={self.iterations} at least 1")

    @classmethod
    def for_map(cls, prior: FlowMap) -> Conjugate:
        """The proposal whose spread is the largest standard deviation in the map's spectrum; 1 if it has no spectrum.

        Args:
            prior: A flow map; those with ``skip="spectral"`` have a spectrum.
        """
        spectrum = getattr(prior, "spectrum", None)
        if not isinstance(spectrum, spectral.Spectrum):
            return cls()
        return cls(spread=max(1.0, float(spectrum.scales(*prior.state_shape[-2:]).max())))

    def slope(self, kind: str, t: float) -> float:
        """Derivative of the look-ahead at time t, for data N(0, s^2 I)."""
        variance = (1 - t) ** 2 + (t * self.spread) ** 2
        if kind == "none":
            return 1.0
        return t * self.spread**2 / variance if kind == "denoiser" else self.spread / math.sqrt(variance)

    @staticmethod
    def knows_next(look_ahead: LookAhead, step: BaseStep) -> bool:
        """Whether the next look-ahead is expected to equal this one: for the denoiser along ancestral steps."""
        return isinstance(step, AncestralStep) and look_ahead.kind == "denoiser"

    def propose(self, move: Move) -> tuple[Tensor, Tensor, Tensor]:
        """Draw the step conditioned on the measurement, see :meth:`__call__`."""
        likelihood, index = move.chunk.reward, move.index + 1
        assert move.prior.decode_affine is not None
        assert isinstance(likelihood, GaussianLikelihood)
        ahead = (move.known.landing if self.knows_next(move.look_ahead, move.step)
                 else move.look_ahead.land(move.mean, move.step.end))
        assert ahead is not None
        spectrum = None if move.task.spectrum is None else move.task.spectrum.select(move.chunk.observations)
        x, ratio = self(likelihood, spectrum, move.task.gain(move.chunk, index),
                        self.slope(move.look_ahead.kind, move.step.end), move.mean, move.step.variance,
                        move.prior.decode(ahead), move.noise, move.prior.decode_affine[0])
        return x, ratio, move.none_capped

    def __call__(self, likelihood: GaussianLikelihood, spectrum: Spectrum | None, gain: Tensor, slope: float,
                 mean: Tensor, variance: float, predicted: Tensor, noise: Tensor,
                 scale: float) -> tuple[Tensor, Tensor]:
        """Propose the next states of b observations with k particles each, n = b k.

        Args:
            likelihood: Likelihood of the b observations.
            spectrum: Spectrum of their operators, with 1 parameter set or b.
            gain: ``(b,)``, g at the end of the step.
            slope: c, the slope of the look-ahead.
            mean: ``(n, *state_shape)``, m.
            variance: v.
            predicted: ``(n, *image_shape)``, the decoded image of l, the look-ahead from the mean.
            noise: ``(n, *state_shape)``, standard normal noise.
            scale: Factor of the affine decoding.

        Returns:
            The states x' ``(n, *state_shape)``, and log N(x'; m, v I) - log q(x') ``(n,)``.
        """
        b = len(likelihood.y)
        operator = likelihood.operator.expand(len(mean) // b)

        def measure(x: Tensor) -> Tensor:
            result: Tensor = zero_unobserved(operator, operator(x)).flatten(1).unflatten(0, (b, -1))
            return result

        def pull_back(y: Tensor) -> Tensor:
            return operator.adjoint(zero_unobserved(operator, y.reshape(-1, *operator.measurement_shape)))

        residual = likelihood.y.to(mean).flatten(1)[:, None] - measure(predicted)
        weight = (gain.to(mean) / likelihood.sigma.to(mean).square())[:, None, None]
        step = scale * slope
        if spectrum is None:
            bend = variance * step**2 * weight.expand(b, residual.shape[1], 1).flatten(0, 1)
            # a fixed number of steps, so that it does not depend on the other rows
            solved, _ = solve(lambda y: y + bend * measure(pull_back(y)).flatten(0, 1),
                              (weight * residual).flatten(0, 1), None, self.iterations, 0.0)
            moved = variance * step * pull_back(solved)
            change, volume = moved + math.sqrt(variance) * noise, precise(mean.new_zeros(b, 1))
        else:
            values = spectrum.values.to(mean)[:, None]
            known = weight * variance * step**2 * values  # (b, 1, m): precision from the measurement, times v
            kept = 1 / (1 + known)
            # (1 - sqrt(kept)) / values, without zero over zero where nothing is observed
            narrow = weight * variance * step**2 * kept / (1 + kept.sqrt())
            moved = variance * step * pull_back(spectrum.apply(weight * kept, residual))
            narrowed = noise - pull_back(spectrum.apply(narrow, measure(noise)))
            change = moved + math.sqrt(variance) * narrowed
            volume = precise(known).log1p().sum(2)
        squares = precise(noise).square() - precise(change).square() / variance
        ratio = 0.5 * (squares.flatten(1).sum(1) - volume.expand(b, len(mean) // b).flatten())
        return mean + change, ratio
