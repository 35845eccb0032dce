"""The exact flow of a mixture of Gaussians with arbitrary covariances, in low dimensions."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from invflow.flowmap import FlowMap, Time, expand_time, integrate

__all__ = ["CovarianceMixtureFlow"]


class CovarianceMixtureFlow(FlowMap):
    r"""The exact flow of :math:`m \sim \sum_k w_k N(\mu_k, C_k)` in d dimensions.

    The velocity is in closed form. The jump solves the ODE by the fifth-order method of Dormand and Prince on a grid
    that is uniform in log(t / (1 - t)), because distant modes separate early.

    Args:
        means: ``(K, d)``.
        covariances: ``(K, d, d)``, positive definite.
        weights: ``(K,)``, positive; normalised to sum to 1.
        steps: Number of steps of a jump from noise to data, each with six evaluations of the velocity.

    Example:
        >>> import torch
        >>> from invflow_problems.covariance_mixture import CovarianceMixtureFlow
        >>> prior = CovarianceMixtureFlow(torch.tensor([[-5.0, 0.0], [5.0, 0.0]]), torch.eye(2).expand(2, 2, 2),
        ...                               torch.ones(2))
        >>> prior.generate(3, generator=torch.Generator().manual_seed(0)).shape
        torch.Size([3, 2])
    """

    means: Tensor
    covariances: Tensor
    log_weights: Tensor
    values: Tensor
    vectors: Tensor
    factors: Tensor
    knots: Tensor

    def __init__(self, means: Tensor, covariances: Tensor, weights: Tensor, *, steps: int = 24) -> None:
        super().__init__()
        count, d = means.shape
        if tuple(covariances.shape) != (count, d, d) or tuple(weights.shape) != (count,):
            raise ValueError(f"means {tuple(means.shape)}, covariances {tuple(covariances.shape)} and weights "
                             f"{tuple(weights.shape)} do not match: pass (K, d), (K, d, d) and (K,)")
        self.state_shape = self.image_shape = (d,)
        values, vectors = torch.linalg.eigh(covariances.double())
        if not bool((values > 0).all()) or not bool((weights > 0).all()) or steps < 2:
            raise ValueError(f"covariances must be positive definite (smallest eigenvalue {float(values.min()):.3g}), "
                             f"weights positive, steps={steps} at least 2")
        logit = torch.linspace(-7.0, 7.0, steps - 1, dtype=torch.float64)
        buffers = {"means": means, "covariances": covariances, "log_weights": (weights / weights.sum()).log(),
                   "values": values, "vectors": vectors, "factors": vectors * values.sqrt()[:, None],
                   "knots": logit.sigmoid()}
        for name, value in buffers.items():
            self.register_buffer(name, value.to(means.dtype))

    def _components(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """For x_t and each component: coordinates ``(n, K, d)`` of x - t mu_k, variances and log densities."""
        centered = torch.einsum("nkd,kde->nke", x[:, None] - t[..., None] * self.means, self.vectors)
        variance = (1 - t[..., None]).square() + t[..., None].square() * self.values
        log_density = -0.5 * (centered.square() / variance + variance.log()).sum(2)
        return centered, variance, log_density - 0.5 * self.dimension * math.log(2 * math.pi)

    def velocity(self, x: Tensor, t: Time) -> Tensor:
        """Velocity E[m - z | x_t = x], exact: ``(n, d)`` to the same."""
        time = expand_time(t, x)
        centered, variance, log_density = self._components(x, time)
        share = (self.log_weights + log_density).softmax(1)
        # E[m - z | x, k] = mu_k + (t C_k - (1 - t) I) (t^2 C_k + (1 - t)^2 I)^-1 (x - t mu_k)
        rate = (time[..., None] * self.values - (1 - time[..., None])) / variance
        moved = self.means + torch.einsum("nke,kde->nkd", rate * centered, self.vectors)
        return (share[..., None] * moved).sum(1)

    def jump(self, x: Tensor, s: Time, t: Time) -> Tensor:
        """Flow map X_{s,t}(x), in either direction: ``(n, d)`` to the same."""
        start, end = expand_time(s, x), expand_time(t, x)
        low, high = torch.minimum(start, end), torch.maximum(start, end)
        knots = self.knots[(self.knots > low.min()) & (self.knots < high.max())]
        stops = torch.where(end >= start, knots, knots.flip(0)).clamp(low, high)
        previous = start[:, 0]
        for stop in (*stops.unbind(1), end[:, 0]):
            x = integrate(self.velocity, x, previous, stop, 1, "dopri5")
            previous = stop
        return x

    def log_prob(self, x: Tensor, t: Time = 1.0) -> Tensor:
        """Log density of the path's marginal at time t, ``(n, d)`` to ``(n,)``."""
        return (self.log_weights + self._components(x, expand_time(t, x))[2]).logsumexp(1)

    def sample(self, n: int, *, generator: torch.Generator) -> Tensor:
        """Draw from the mixture itself, ``(n, d)``."""
        device = generator.device
        k = torch.multinomial(self.log_weights.exp().to(device), n, replacement=True, generator=generator)
        noise = torch.randn(n, self.dimension, generator=generator, device=device)
        k, noise = k.to(self.means.device), noise.to(self.means)
        x = torch.empty_like(noise)
        for component, factor in enumerate(self.factors):
            own = k == component
            x[own] = self.means[component] + noise[own] @ factor.T
        return x
