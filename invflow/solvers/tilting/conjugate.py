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
        TypeError: for anything but a Gaussian likelihood.
        ValueError: for an operator that is not linear, or a decoding that is not affine.
    """
    way_out = "pass proposal='gradient', which takes any reward"
    if not isinstance(reward, GaussianLikelihood):
        raise TypeError(f"proposal='conjugate' conditions each step on a GaussianLikelihood, not on a "
                        f"{type(reward).__name__}: {way_out}")
    if not reward.operator.linear:
        raise ValueError(f"proposal='conjugate' takes linear operators, and {type(reward.operator).__name__} is not "
                         f"linear: {way_out}")
    if prior.decode_affine is None or tuple(prior.image_shape) != tuple(prior.state_shape):
        raise ValueError(f"proposal='conjugate' measures the states themselves, and the images of this "
                         f"{type(prior).__name__} are no affine function of its states: {way_out}")
    return reward


@dataclass(frozen=True)
class Conjugate(Proposal):
    r"""Proposal q(x' | x) that is the base step conditioned on the measurement, of a linear look-ahead.

    With the look-ahead :math:`L(x') \approx \ell + c\,(x' - m)`, the tilt :math:`e^{g r(L(x'))}` of a linear-Gaussian
    reward is Gaussian in x', and its product with the base step N(m, v I) is the Gaussian

    .. math:: q = N(m + s, C), \quad C^{-1} = \frac{I}{v} + \frac{g c^2}{\sigma^2} A^T A, \quad
        s = C\, \frac{g c}{\sigma^2} A^T (y - A \ell).

    It never steps beyond the measurement, however small sigma is against the step, where a gradient step overshoots;
    and it takes no gradient of the network. The slope c is that of data N(0, s^2 I) (for the denoiser,
    :math:`t s^2 / ((1 - t)^2 + t^2 s^2)`; Song et al. 2023, "Pseudoinverse-guided diffusion models", have its
    variance). A slope that is wrong costs weights, not exactness: q is Gaussian with a known density. One that is too
    large makes q narrower than the target and its weights heavy-tailed. One that is too small oversteps, along
    directions in which the data vary more than s, and where they vary much more each step undoes the one before by
    more than it: under a prior of correlated images (:meth:`for_map`) the states then run away. In the
    eigenvectors of A A^T all of it is diagonal; where they are not to be had (see :func:`find_spectrum`) the shift is
    found by a fixed number of conjugate gradient steps, and the covariance stays v I.

    Args:
        spread: s, standard deviation of the data in state space, over 0.
        iterations: of conjugate gradients.
    """

    follows_gradient: ClassVar[bool] = False

    spread: float = 1.0
    iterations: int = 20

    def __post_init__(self) -> None:
        if not (self.spread > 0 and math.isfinite(self.spread)) or self.iterations < 1:
            raise ValueError(f"spread={self.spread} must be over 0 and finite, iterations={self.iterations} at least 1")

    @classmethod
    def for_map(cls, prior: FlowMap) -> Conjugate:
        """With the largest standard deviation of a map's own spectrum for a spread; 1 for a map that has none.

        Args:
            prior: a map; those with ``skip="spectral"`` have a spectrum.
        """
        spectrum = getattr(prior, "spectrum", None)
        if not isinstance(spectrum, spectral.Spectrum):
            return cls()
        return cls(spread=max(1.0, float(spectrum.scales(*prior.state_shape[-2:]).max())))

    def slope(self, kind: str, t: float) -> float:
        """Derivative of a look-ahead from time t, for data N(0, s^2 I)."""
        variance = (1 - t) ** 2 + (t * self.spread) ** 2
        if kind == "none":
            return 1.0
        return t * self.spread**2 / variance if kind == "denoiser" else self.spread / math.sqrt(variance)

    @staticmethod
    def knows_next(look_ahead: LookAhead, step: BaseStep) -> bool:
        """Whether the next look is expected to see what this one saw: the denoiser's, along ancestral steps."""
        return isinstance(step, AncestralStep) and look_ahead.kind == "denoiser"

    def propose(self, move: Move) -> tuple[Tensor, Tensor, Tensor]:
        """The step conditioned on the measurement, see :meth:`__call__`."""
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
            likelihood: of the b observations.
            spectrum: of their operators, 1 set or b.
            gain: ``(b,)``, g at the end of the step.
            slope: c.
            mean: ``(n, *state_shape)``, m.
            variance: v.
            predicted: ``(n, *image_shape)``, the decoded image of l, where the look-ahead sees the mean.
            noise: ``(n, *state_shape)``, standard normal.
            scale: of the decoding.

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
            # as many steps whatever the other rows do
            solved, _ = solve(lambda y: y + bend * measure(pull_back(y)).flatten(0, 1),
                              (weight * residual).flatten(0, 1), None, self.iterations, 0.0)
            moved = variance * step * pull_back(solved)
            change, volume = moved + math.sqrt(variance) * noise, precise(mean.new_zeros(b, 1))
        else:
            values = spectrum.values.to(mean)[:, None]
            known = weight * variance * step**2 * values  # (b, 1, m): what the measurement adds to the precision, by v
            kept = 1 / (1 + known)
            # (1 - sqrt(kept)) / values, without the zero over zero of what is not observed
            narrow = weight * variance * step**2 * kept / (1 + kept.sqrt())
            moved = variance * step * pull_back(spectrum.apply(weight * kept, residual))
            narrowed = noise - pull_back(spectrum.apply(narrow, measure(noise)))
            change = moved + math.sqrt(variance) * narrowed
            volume = precise(known).log1p().sum(2)
        squares = precise(noise).square() - precise(change).square() / variance
        ratio = 0.5 * (squares.flatten(1).sum(1) - volume.expand(b, len(mean) // b).flatten())
        return mean + change, ratio
