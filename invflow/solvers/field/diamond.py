"""Weighted Diamond Maps: guidance by the value of a state, estimated by adding noise and jumping with a flow map."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor

from invflow._core.watch import check_gradients
from invflow.flowmap import FlowMap
from invflow.likelihood import GaussianLikelihood, Likelihood
from invflow.reward import Reward
from invflow.solvers.field.rows import Rows, RowSampler

__all__ = ["WeightedDiamondMaps"]

_WEIGHTS = ("density", "published", "reward")


class WeightedDiamondMaps(RowSampler):
    r"""Weighted Diamond Maps (Holderrieth et al. 2026, arXiv 2602.05993), guidance by an estimated value function.

    The tilted flow moves by :math:`v_t + \frac{1 - t}{t} \nabla V_t` with the value :math:`V_t(x) = \log E[e^{r(x_1)} |
    x_t = x]`. Particles estimate it without a model of :math:`p(x_1 | x_t)`: noise takes the state back to a time
    :math:`t' < t`, :math:`x' = s x + \sigma_q \epsilon`, and the flow map takes it to the data,
    :math:`z = X_{t',1}(x')`. Each counts with the weight

    .. math:: \log w = r(z) + \log N(x; t z, (1 - t)^2) + \log p_{t'}(x') - \log q(x' | x),

    whose weighted average gradient is the gradient of the value. Only the difference of the log density between x'
    and x matters. It is computed by the trapezoidal rule from scores, :math:`(s_{t'}(x) + s_{t'}(x')) \cdot (x' - x) /
    2`, which is exact for Gaussian densities and approximate for others. The authors' code uses :math:`s_t(x)` instead
    of :math:`s_{t'}(x)`, which saves a call and is wrong even for a Gaussian with any number of particles. The first
    step, from pure noise, uses the mean of new draws weighted by their rewards.

    The authors' code, which makes images for a prompt, divides each term of the gradient by its norm and uses one
    length for all; here the gradient is that of the value.

    Args:
        prior: A flow map trained with noise independent of the data.
        steps: Number of Euler steps.
        particles: K, the number of particles in each step of each sample; the authors use 4.
        snr: Factor by which t' lowers the signal-to-noise ratio (of powers), above 1. The authors use 5, and 1.1 and
            20 for their two models.
        weights: ``"density"`` for the weights above; ``"published"`` for those with the score at t; ``"reward"`` for
            the share of :math:`e^{r(z)}` alone, which the authors use for images, where the weights of a few particles
            differ too much.
        chunk_size: Same as in :class:`DiffusionSampler`.

    Raises:
        TypeError, ValueError: If the prior or a setting does not fit; in ``sample``, if the reward is not a
            likelihood.

    Example:
        >>> import torch, invflow
        >>> from invflow.operators import Denoising
        >>> prior = invflow.GaussianMixtureFlow(torch.full((1, 1, 4, 4), 0.5), std=0.1)
        >>> likelihood = invflow.GaussianLikelihood(Denoising((1, 4, 4)), torch.full((2, 1, 4, 4), 0.7), sigma=0.1)
        >>> invflow.WeightedDiamondMaps(prior, steps=10).sample(likelihood, 3).nfe
        NFE(forward=94.0, backward=36.0)
    """

    linear_only = False
    affine_only = False

    def __init__(self, prior: FlowMap, *, steps: int = 50, particles: int = 4, snr: float = 5.0,
                 weights: str = "density", chunk_size: int | None = None) -> None:
        super().__init__(prior, chunk_size)
        if steps < 1 or particles < 1 or not snr > 1:
            raise ValueError(f"steps={steps} and particles={particles} must be at least 1, snr={snr} over 1")
        if weights not in _WEIGHTS:
            raise ValueError(f"weights={weights!r} must be one of {', '.join(_WEIGHTS)}")
        self.steps, self.particles, self.snr, self.weights = steps, particles, snr, weights

    def earlier(self, t: float) -> tuple[float, float, float]:
        """Time t' to which noise takes a state back from time t, with the factor and the noise level of x' given x."""
        factor = 1 / (t + math.sqrt(self.snr) * (1 - t))
        before = factor * t
        return before, factor, math.sqrt((1 - before) ** 2 - (factor * (1 - t)) ** 2)

    def _run(self, rows: Rows) -> Tensor:
        check_gradients("WeightedDiamondMaps")
        prior = self.prior
        x = rows.noise(torch.zeros(len(rows.likelihood.y), *prior.state_shape, device=prior.device, dtype=prior.dtype))
        for k in range(self.steps):
            t = k / self.steps
            if rows.blank:
                v = prior.velocity(x, t)
            elif k == 0:
                v = self._first(rows, x) - x
            else:
                v = prior.velocity(x, t)
                v = v + (1 - t) / t * self._value_gradient(rows, x, t, (t * v - x) / (1 - t))
            x = x + v / self.steps
        return prior.decode(x)[:, None]

    def _first(self, rows: Rows, x: Tensor) -> Tensor:
        """Mean data state under the reward, from draws of the prior: what the guided flow heads for at t = 0."""
        ends = torch.stack([self.prior.jump(rows.noise(x), 0.0, 1.0) for _ in range(self.particles)])
        return _average(torch.stack([self._reward(rows, end) for end in ends]), ends)

    def _value_gradient(self, rows: Rows, x: Tensor, t: float, score: Tensor) -> Tensor:
        """Gradient of the value at states of time t, whose score is given."""
        before, factor, spread = self.earlier(t)
        here = self.prior.score(x, before) if self.weights == "density" else score
        logits, gradients = [], []
        for _ in range(self.particles):
            noise = rows.noise(x)
            with torch.enable_grad():
                state = x.detach().requires_grad_()
                renoised = factor * state + spread * noise
                end = self.prior.jump(renoised, before, 1.0)
                reward = self._reward(rows, end)
                fit = -_half_square(state - t * end) / (1 - t) ** 2
                gradient = torch.autograd.grad((reward + fit).sum(), state)[0]
            renoised = renoised.detach()
            there = self.prior.score(renoised, before)
            gradients.append(gradient + factor * there - score)
            logit = reward.detach()
            if self.weights != "reward":
                ratio = ((here + there) / 2 * (renoised - x)).flatten(1).sum(1)
                logit = logit + fit.detach() + ratio + _half_square(noise)
            logits.append(logit)
        return _average(torch.stack(logits), torch.stack(gradients))

    def _reward(self, rows: Rows, state: Tensor) -> Tensor:
        """Log likelihood of data states ``(n, *state_shape)``, ``(n,)``."""
        return rows.likelihood(self.prior.decode(state)[:, None])[:, 0]

    def _supported(self, reward: Reward) -> GaussianLikelihood:
        if isinstance(reward, Likelihood) and not isinstance(reward, GaussianLikelihood):
            return cast(GaussianLikelihood, reward.to(self.prior.device))
        return super()._supported(reward)


def _half_square(x: Tensor) -> Tensor:
    """Half of the squared norm of each row."""
    return x.flatten(1).square().sum(1) / 2


def _average(logits: Tensor, values: Tensor) -> Tensor:
    """Mean of ``(K, n, ...)`` by the softmax of ``(K, n)``."""
    shares = torch.softmax(logits, dim=0).to(values)
    return (shares.reshape(*shares.shape, *[1] * (values.ndim - 2)) * values).sum(0)
