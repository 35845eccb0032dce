"""The exact flow of a Gaussian mixture: a prior without learning, as the reference for tests."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from invflow._core.explained import explained
from invflow._core.ode import TABLEAUS, Time, expand_time, runge_kutta_step
from invflow._core.random import as_generator, draw_noise
from invflow._core.shapes import with_axes
from invflow.flowmap import FlowMap

__all__ = ["GaussianMixtureFlow"]

_TABLEAU = TABLEAUS["dopri5"]


class GaussianMixtureFlow(FlowMap):
    r"""The exact flow of a mixture of isotropic Gaussians, :math:`m \sim \sum_k w_k N(\mu_k, s_k^2 I)`.

    Everything but the jump is in closed form. The jump is an ODE in the span of the means. Let s
    be the smallest of the s_k, :math:`\gamma_t^2 = (1-t)^2 + t^2 s^2`, :math:`a = t / \gamma_t` and :math:`y =
    x_t / \gamma_t`. Then :math:`y = a m' + n` with n ~ N(0, I) and m' from the mixture of :math:`N(\mu_k,
    \delta_k I)`, :math:`\delta_k = s_k^2 - s^2`, and the flow becomes

    .. math:: \frac{dy}{da} = E[m' \mid y]
        = \sum_k r_k(y) \left(\mu_k + \frac{a \delta_k}{1 + a^2 \delta_k} (y - a \mu_k)\right),

    With one common std, the flow depends only on the responsibilities r_k: y is constant outside the span of
    the means, and moves in a straight line once a single component is left, where any step is exact. The
    steps are Dormand and Prince's (1980), of fifth order, on a fixed grid that is uniform in asinh(0.3 a L), with L
    the largest distance between two means. This grid resolves the commitment to a mode wherever it happens (in
    800 dimensions with well-separated modes, near t = 1/160).

    Cost and accuracy: a jump from 0 to 1 takes ``steps`` steps of six velocities each (96 rows forward for each
    state at the default of 16); a shorter jump takes the steps that lie inside it. Compared with a very fine
    solution, the root-mean-square error relative to that of the data is below 5e-5 with one common std, for two
    to 300 components in 1 to 800 dimensions (25 separated modes in 800 dimensions: 1e-6); the worst of
    thousands of states is near 1e-3. With several stds it is below 1e-4.

    The states are the images: ``decode`` only reshapes, if ``image_shape`` differs.

    Args:
        means: ``(K, *state_shape)``, at least one component. The map has their floating-point type: if
            rounding matters, pass float64 means instead of converting the map afterwards.
        std: Standard deviation > 0, common or ``(K,)``, one for each component.
        weights: ``(K,)``, nonnegative; normalised to sum to 1. Default: equal.
        image_shape: Shape of an image, with the same number of values as a state. Default: the state's.
        steps: Number of steps of a jump from noise to data, at least 2.

    Raises:
        ValueError: For means that are not a batch, wrong shapes, a std that is not positive, weights that are
            negative or all zero, or values that are not finite.

    Example:
        >>> import torch, invflow
        >>> ring = torch.linspace(0, 2 * torch.pi, 9)[:-1]
        >>> prior = invflow.GaussianMixtureFlow(4.8 * torch.stack([ring.cos(), ring.sin()], dim=1))
        >>> prior.generate(3, generator=torch.Generator().manual_seed(0)).shape
        torch.Size([3, 2])
    """

    means: Tensor
    std: Tensor
    log_weights: Tensor
    center: Tensor
    basis: Tensor
    coordinates: Tensor
    knots: Tensor

    @explained
    def __init__(self, means: Tensor, std: float | Tensor = 0.7, weights: Tensor | None = None,
                 image_shape: tuple[int, ...] | None = None, *, steps: int = 16) -> None:
        super().__init__()
        means, std, log_weights = _validated(means, std, weights)
        self.state_shape = tuple(means.shape[1:])
        self.image_shape = self.state_shape if image_shape is None else tuple(image_shape)
        if math.prod(self.image_shape) != math.prod(self.state_shape):
            raise ValueError(
                f"image_shape {self.image_shape} and the means' state_shape {self.state_shape} differ in "
                "size: pass means of shape (K, *image_shape), or no image_shape"
            )
        if steps < 2:
            raise ValueError(f"steps={steps} is too few: the jump takes at least 2 steps")
        self.ode_steps = steps
        self.common_std = bool((std == std[0]).all())

        # the geometry is computed in float64 for every type of the map: the rank of the means depends on it
        flat = means.double().flatten(1)
        center = (log_weights.exp()[:, None] * flat).sum(0)
        centered = flat - center
        _, singular, directions = torch.linalg.svd(centered, full_matrices=False)
        rank = int((singular > 1e-9 * flat.abs().max()).sum())
        basis = directions[:rank]
        coordinates = centered @ basis.T
        knots = _knots(coordinates, std, self.dimension, steps)
        buffers = {"means": means, "std": std, "log_weights": log_weights, "center": center, "basis": basis,
                   "coordinates": coordinates, "knots": knots}
        for name, value in buffers.items():
            self.register_buffer(name, value.to(means.dtype))

    @property
    def weights(self) -> Tensor:
        """Weights of the components, ``(K,)``, with sum 1."""
        return self.log_weights.exp()

    @property
    def decode_affine(self) -> tuple[float, float] | None:
        """(1, 0), the identity; None if images and states differ in shape."""
        return (1.0, 0.0) if self.image_shape == self.state_shape else None

    def decode(self, state: Tensor) -> Tensor:
        """The state itself, in the image's shape: ``(n, *state_shape)`` to ``(n, *image_shape)``."""
        return state.reshape(len(state), *self.image_shape)

    def encode(self, image: Tensor) -> Tensor:
        """The image itself, in the state's shape: ``(n, *image_shape)`` to ``(n, *state_shape)``."""
        return image.reshape(len(image), *self.state_shape)

    # -- closed forms at one time ---------------------------------------------------------------------------

    def velocity(self, x: Tensor, t: Time) -> Tensor:
        """Velocity b_t(x) = E[m - z | x_t = x], exact: ``(n, *state_shape)`` to the same, t in [0, 1]."""
        t, gamma = self._times(x, t)
        rate = (t * self.std.min() ** 2 - (1 - t)) / gamma**2
        flat = x.flatten(1)
        return (rate * flat + (1 - t) / gamma**2 * self._center_of_mass(flat, t, gamma)).reshape(x.shape)

    def denoise(self, x: Tensor, t: Time) -> Tensor:
        """Posterior mean E[m | x_t = x], exact at every t: ``(n, *state_shape)`` to the same; one call."""
        t, gamma = self._times(x, t)
        flat = x.flatten(1)
        mean = self._center_of_mass(flat, t, gamma)
        out = mean + t * self.std.min() ** 2 / gamma**2 * (flat - t * mean)
        return self.record_output(out.reshape(x.shape), x.shape[0])

    def score(self, x: Tensor, t: Time) -> Tensor:
        """Gradient of :meth:`log_prob`, exact at every t: ``(n, *state_shape)`` to the same; one call."""
        t, gamma = self._times(x, t)
        flat = x.flatten(1)
        out = (t * self._center_of_mass(flat, t, gamma) - flat) / gamma**2
        return self.record_output(out.reshape(x.shape), x.shape[0])

    def log_prob(self, x: Tensor, t: Time = 1.0) -> Tensor:
        """Log density of the path's marginal at time t.

        Args:
            x: ``(n, *state_shape)``.
            t: Time, a float or ``(n,)``, in [0, 1]; at 1 the density of the data.

        Returns:
            ``(n,)``, in nats.
        """
        t, gamma = self._times(x, t)
        a = t / gamma
        inside, outside = self._whiten(x.flatten(1), a, gamma)
        square = outside.square().sum(1, keepdim=True)
        log_joint = self._log_joint(inside, square, a)
        if self.common_std:
            log_joint = log_joint - 0.5 * (inside.square().sum(1, keepdim=True) + square)
        return log_joint.logsumexp(1) - self.dimension * (gamma[:, 0].log() + 0.5 * math.log(2 * math.pi))

    def sample(self, n: int, *, generator: torch.Generator | int | None = None) -> Tensor:
        """Draw data states from the mixture itself, without the flow.

        Args:
            n: Number of states, at least 1.
            generator: Source of randomness.

        Returns:
            ``(n, *state_shape)``.
        """
        if n < 1:
            raise ValueError(f"sample takes n >= 1, not n={n}")
        generator = as_generator(generator)
        k = draw_components(self.log_weights[None], n, generator)[0]
        noise = draw_noise((n, *self.state_shape), generator, self.device).to(self.dtype)
        return self.means[k] + with_axes(self.std[k], noise.ndim) * noise

    # -- the jump -------------------------------------------------------------------------------------------

    def jump(self, x: Tensor, s: Time, t: Time) -> Tensor:
        """Flow map X_{s,t}(x), in either direction; differentiable in x, s and t; equal to x where s = t."""
        s, gamma_s = self._times(x, s)
        t, gamma_t = self._times(x, t)
        start, end = s / gamma_s, t / gamma_t
        flat = x.flatten(1)
        out = gamma_t / gamma_s * flat + gamma_t * (end - start) * self.center
        if len(self.basis) == 0 and self.common_std:  # one Gaussian: nothing is left to solve
            return out.reshape(x.shape)
        inside, outside = self._whiten(flat, start, gamma_s)
        square = outside.square().sum(1, keepdim=True)
        moved, growth, velocities = self._solve(inside, square, start, end)
        out = out + gamma_t * ((moved - inside) @ self.basis)
        if not self.common_std:
            out = out + gamma_t * torch.expm1(growth) * outside
        return self.record_output(out.reshape(x.shape), velocities)

    def _solve(self, inside: Tensor, square: Tensor, start: Tensor,
               end: Tensor) -> tuple[Tensor, Tensor, int]:
        """Whitened coordinates transported from a = start to end, log growth outside the span, and velocities."""
        low, high = torch.minimum(start, end), torch.maximum(start, end)
        # synchronises with a GPU once per jump: the number of knots between the ends determines the steps
        knots = self.knots[(self.knots > low.min()) & (self.knots < high.max())]
        # each row steps to the knots between its own ends; at other knots its step has length zero
        stops = torch.where(end >= start, knots, knots.flip(0)).clamp(low, high)
        own_steps = 1 + ((knots > low) & (knots < high)).sum(1)
        state = torch.cat([inside, torch.zeros_like(square)], dim=1)

        def slope(state: Tensor, a: Tensor) -> Tensor:
            drift, growth = self._drift(state[:, :-1], square * (2 * state[:, -1:]).exp(), a)
            return torch.cat([drift, growth], dim=1)

        previous = start
        for stop in (*(stop[:, None] for stop in stops.unbind(1)), end):
            state = runge_kutta_step(slope, state, previous, stop, _TABLEAU)
            previous = stop
        return state[:, :-1], state[:, -1:], len(_TABLEAU.nodes) * int(own_steps.sum())

    # -- whitened coordinates -------------------------------------------------------------------------------

    def _times(self, x: Tensor, t: Time) -> tuple[Tensor, Tensor]:
        """Time and gamma_t, each ``(n, 1)``; checks the shape of ``x`` and the range of ``t``."""
        if tuple(x.shape[1:]) != self.state_shape:
            raise ValueError(
                f"states have shape {tuple(x.shape)}, expected (n, *{self.state_shape}): "
                "reshape them, or use encode(image) for images"
            )
        inside = not isinstance(t, Tensor) and 0 <= t <= 1  # known without synchronising with a GPU
        t = expand_time(t, x.flatten(1))
        if not inside and bool(((t < 0) | (t > 1)).any()):
            low, high = float(t.min()), float(t.max())
            raise ValueError(f"times must lie between 0 (noise) and 1 (data); these lie between {low} and {high}")
        return t, ((1 - t) ** 2 + (t * self.std.min()) ** 2).sqrt()

    def _whiten(self, flat: Tensor, a: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
        """Coordinates ``(n, rank)`` of y - a center in the span of the means, and the rest ``(n, d)``."""
        y = flat / gamma - a * self.center
        inside = y @ self.basis.T
        return inside, y - inside @ self.basis

    def _log_joint(self, inside: Tensor, square: Tensor, a: Tensor) -> Tensor:
        """``(n, K)``, log w_k N(y; a mu_k, (1 + a^2 delta_k) I), up to d log(2 pi) / 2 and, with a common
        std, |y|^2 / 2, which cancel in the responsibilities.
        """
        distance = a**2 * self.coordinates.square().sum(1) - 2 * a * (inside @ self.coordinates.T)
        if self.common_std:
            return self.log_weights - 0.5 * distance
        variance = 1 + a**2 * self._extra_variance()
        distance = distance + inside.square().sum(1, keepdim=True) + square
        return self.log_weights - 0.5 * (self.dimension * variance.log() + distance / variance)

    def _extra_variance(self) -> Tensor:
        return self.std**2 - self.std.min() ** 2

    def _drift(self, inside: Tensor, square: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        """E[m' - center | y]: inside the span, ``(n, rank)``; outside, the factor of y, ``(n, 1)``."""
        responsibility = self._log_joint(inside, square, a).softmax(1)
        drift = responsibility @ self.coordinates
        if self.common_std:
            return drift, torch.zeros_like(square)
        extra = self._extra_variance()
        pull = responsibility * (a * extra / (1 + a**2 * extra))
        growth = pull.sum(1, keepdim=True)
        return drift + growth * inside - a * (pull @ self.coordinates), growth

    def _center_of_mass(self, flat: Tensor, t: Tensor, gamma: Tensor) -> Tensor:
        """E[m' | x_t], ``(n, d)``: the expected mean plus the contribution of wider components."""
        inside, outside = self._whiten(flat, t / gamma, gamma)
        drift, growth = self._drift(inside, outside.square().sum(1, keepdim=True), t / gamma)
        return self.center + drift @ self.basis + growth * outside


def draw_components(log_weights: Tensor, n: int, generator: torch.Generator | int | None) -> Tensor:
    """Draw components: ``(B, K)`` normalised log weights to indices ``(B, n)``, by inversion in float64."""
    generator = as_generator(generator)
    shape = (len(log_weights), n)
    uniform = torch.rand(shape, generator=generator, device=generator.device, dtype=torch.float64)
    return pick_components(log_weights, uniform.to(log_weights.device))


def pick_components(log_weights: Tensor, uniform: Tensor) -> Tensor:
    """Components ``(B, n)`` for uniform numbers ``(B, n)``, by ``(B, K)`` normalised log weights in float64."""
    cumulative = log_weights.double().exp().cumsum(1)
    cumulative = cumulative / cumulative[:, -1:]
    index = torch.searchsorted(cumulative, uniform, right=True)
    return index.clamp(max=log_weights.shape[1] - 1)


def _validated(means: Tensor, std: float | Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Check the arguments; return means, and in float64 standard deviations and normalised log weights, ``(K,)``."""
    means = torch.as_tensor(means)
    if not means.is_floating_point():
        means = means.to(torch.get_default_dtype())
    if means.ndim < 2 or means.numel() == 0:
        raise ValueError(f"means have shape {tuple(means.shape)}, expected (K, *state_shape) with K >= 1")
    count = means.shape[0]
    stds = torch.as_tensor(std, dtype=torch.float64, device=means.device)
    if stds.shape not in ((), (count,)):
        raise ValueError(f"std has shape {tuple(stds.shape)}: pass a float, or one for each of {count} means")
    shares = torch.ones(count) if weights is None else torch.as_tensor(weights)
    shares = shares.to(device=means.device, dtype=torch.float64)
    if shares.shape != (count,):
        raise ValueError(f"weights have shape {tuple(shares.shape)}, expected ({count},), one for each mean")
    if not (means.isfinite().all() and stds.isfinite().all() and shares.isfinite().all()):
        raise ValueError("means, std and weights must be finite")
    if bool((stds <= 0).any()) or bool((shares < 0).any()) or float(shares.sum()) <= 0:
        raise ValueError(
            f"std must be positive (smallest: {float(stds.min())}), weights nonnegative with a positive sum "
            f"(least: {float(shares.min())})"
        )
    return means, stds.expand(count).clone(), (shares / shares.sum()).log()


def _knots(coordinates: Tensor, std: Tensor, dimension: int, steps: int) -> Tensor:
    """Inner ends of the steps in a = t / gamma_t, between 0 and 1 / std: ``(steps - 1,)``, ascending."""
    last = 1 / float(std.min())
    distances = torch.pdist(coordinates)
    spread = float((std**2 - std.min() ** 2).max())
    # the earlier event: the farthest means separate, or the norm separates wide components from narrow ones
    farthest = float(distances.max()) if len(distances) else 0.0
    length = max(farthest, math.sqrt(dimension * spread))
    if length == 0:
        return coordinates.new_empty(0)
    settled = last
    apart = distances[distances > 1e-9 * length]
    if spread == 0 and len(apart):
        # beyond 12 standard deviations all but one in 10^8 states have a single component left: a straight path
        settled = min(last, 12 / float(apart.min()))
    count = steps if settled == last else steps - 1
    fractions = torch.linspace(0, 1, count + 1, dtype=torch.float64, device=coordinates.device)[1:]
    knots = torch.sinh(fractions * math.asinh(0.3 * length * settled)) / (0.3 * length)
    result: Tensor = knots[:-1] if settled == last else knots
    return result
