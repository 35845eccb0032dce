"""Paths between noise and data used in training, converted exactly to the library's own path.

A network was trained on alpha(tau) m + sigma(tau) z, in its own time tau; the library uses x_t = (1 - t) z + t m. The
two are the same state up to scale where alpha / sigma = t / (1 - t):

    alpha m + sigma z = (alpha + sigma) x_t,     t = alpha / (alpha + sigma).

A prediction for the network's state is therefore a prediction for x_t, from which m and z follow. Only
time and scale change; the distribution does not.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from invflow._core.ode import TABLEAUS, Time, expand_time, runge_kutta_step
from invflow.models.named_paths import PATHS, Schedule

__all__ = ["PATHS", "Jumps", "LinearPath", "Path", "Predict", "SchedulePath", "VariancePreservingPath",
           "check_convention", "edm_path", "integrate_on_path", "make_path", "trigonometric_path"]

Predict: TypeAlias = Callable[[Tensor, Tensor], Tensor]

PREDICTIONS = ("velocity", "epsilon", "v_prediction", "sample")
CONVENTIONS = ("data-at-1", "data-at-0")
#: distance from an end with infinite or missing derivatives at which a network is evaluated, as a share of its time
MARGIN = 1e-5
_KNOTS, _NEWTON_STEPS = 2049, 4


class Jumps(Protocol):
    """Conversion of a network's prediction to data and noise."""

    def estimate(self, predict: Predict, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Data m and noise z: states ``(n, *shape)`` and times ``(n, 1, ..., 1)`` to twice ``(n, *shape)``."""


class Path(Jumps, Protocol):
    """Conversion of predictions to data, noise and velocity, with a grid of times."""

    def velocity(self, predict: Predict, x: Tensor, t: Tensor) -> Tensor:
        """Velocity b_t(x) = E[m - z | x_t = x]: states ``(n, *shape)``, times ``(n, 1, ..., 1)`` to ``(n, *shape)``."""
        m, z = self.estimate(predict, x, t)
        return m - z

    def to_time(self, u: Tensor) -> Tensor:
        """Time of a position u in [0, 1], on whose grid the network's steps are equal; maps 0 to 0 and 1 to 1."""

    def to_position(self, t: Tensor) -> Tensor:
        """The inverse of :meth:`to_time`."""


def integrate_on_path(path: Path, velocity: Callable[[Tensor, Tensor], Tensor], x: Tensor, s: Time, t: Time, steps: int,
                      method: str) -> Tensor:
    """Solve the ODE of a velocity from s to t, in equal steps on the path's grid: ``(n, *shape)`` to the same."""
    start, end = expand_time(s, x), expand_time(t, x)
    first, last = path.to_position(start), path.to_position(end)
    inner = [path.to_time(torch.lerp(first, last, i / steps)) for i in range(1, steps)]
    # keep the ends as given: converting to a position and back would round them
    for now, then in pairwise([start, *inner, end]):
        x = runge_kutta_step(lambda state, at: velocity(state, at.flatten()), x, now, then, TABLEAUS[method])
    return x


def check_convention(convention: str) -> str:
    """Return the time convention if it is valid.

    Raises:
        ValueError: For any other value.
    """
    if convention not in CONVENTIONS:
        raise ValueError(
            f"no time convention is called {convention!r}: 'data-at-1' has noise at t = 0 and data at "
            "t = 1, 'data-at-0' the reverse (MeanFlow, flow matching in diffusers)"
        )
    return convention


class LinearPath(Path):
    """The straight path, in the library's time or in the reverse.

    Args:
        convention: ``"data-at-1"`` for velocities m - z at the library's time, ``"data-at-0"`` for z - m at 1 - t.
    """

    def __init__(self, convention: str = "data-at-1") -> None:
        self.reverse = check_convention(convention) == "data-at-0"

    def estimate(self, predict: Predict, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Data x + (1 - t) b and noise x - t b."""
        b = self.velocity(predict, x, t)
        return x + (1 - t) * b, x - t * b

    def velocity(self, predict: Predict, x: Tensor, t: Tensor) -> Tensor:
        """The prediction, or its negative at 1 - t."""
        return -predict(x, (1 - t).flatten()) if self.reverse else predict(x, t.flatten())

    def to_time(self, u: Tensor) -> Tensor:
        """The position itself."""
        return u

    def to_position(self, t: Tensor) -> Tensor:
        """The time itself."""
        return t


class SchedulePath(Path):
    r"""Any path alpha(tau) m + sigma(tau) z, in the library's time and scale.

    The velocity is :math:`v = \alpha' m + \sigma' z` (its mean given the state y), with y = alpha m + sigma z. Both
    equations are solved for m and z:

    .. math:: m = (\sigma v - \sigma' y) / D, \qquad z = (\alpha' y - \alpha v) / D, \qquad
              D = \alpha' \sigma - \alpha \sigma'.

    The network's time at the library's t is the root of alpha / (alpha + sigma) = t, found by Newton's method from a
    table. The last step is differentiable, so derivatives in time are correct too. If the path has a little signal
    left at its noisy end, earlier states are rescaled to the noise level of that end. After its last time, the network
    is evaluated at the last time.

    Args:
        alpha: Share of data, a function of tensors of the network's time; :math:`\alpha / (\alpha + \sigma)` increases
            from the noisy end to the data.
        sigma: Share of noise.
        noise_time: The network's time of (almost) pure noise.
        data_time: The network's time of pure data.
        prediction: Prediction of the network at y and tau: ``"velocity"``, ``"sample"`` (m), or ``"epsilon"`` (z).
        slopes: Derivatives of alpha and sigma; None: by automatic differentiation.
        inverse: Map from the library's t to the network's time; None: by Newton's method.

    Raises:
        ValueError: For a path that does not go from noise to data.
    """

    def __init__(self, alpha: Schedule, sigma: Schedule, noise_time: float = 0.0, data_time: float = 1.0,
                 prediction: str = "velocity", slopes: tuple[Schedule, Schedule] | None = None,
                 inverse: Schedule | None = None) -> None:
        self.alpha, self.sigma, self.prediction = alpha, sigma, prediction
        self.slopes, self.inverse = slopes, inverse
        self.noise_time, self.data_time = noise_time, data_time
        u = torch.linspace(0, 1, _KNOTS, dtype=torch.float64)
        if prediction == "velocity":  # at an end a square root may be singular, or the velocity independent of the data
            a, s, da, ds = self._shares(self._own_time(torch.tensor([0.0, 1.0], dtype=torch.float64)), True)
            det = da * s - a * ds
            told = det.isfinite() & (det != 0)
            u = u.clamp(0.0 if told[0] else MARGIN, 1.0 if told[1] else 1 - MARGIN)
        a, s = self._shares(self._own_time(u), False)
        times = a / (a + s)
        if not bool(times.isfinite().all()) or bool((times.diff() <= 0).any()) or times[0] > 0.1 or times[-1] < 0.9:
            raise ValueError(
                f"the path has alpha / (alpha + sigma) from {float(times[0]):.3g} at the network's time {noise_time:g} "
                f"to {float(times[-1]):.3g} at {data_time:g}, expected to increase from about 0 (noise) to about 1 "
                "(data): pass alpha, the share of data, then sigma, that of noise, both of the network's own time, and "
                "convention='data-at-0' if its data are at 0"
            )
        self.positions, self.times = u, times
        self.first, self.last = float(times[0]), float(times[-1])

    def _own_time(self, u: Tensor) -> Tensor:
        return self.noise_time + (self.data_time - self.noise_time) * u

    def _shares(self, tau: Tensor, derivatives: bool) -> tuple[Tensor, ...]:
        """Alpha and sigma, and their derivatives."""
        if not derivatives:
            return torch.as_tensor(self.alpha(tau)).to(tau).expand_as(tau), torch.as_tensor(
                self.sigma(tau)).to(tau).expand_as(tau)
        if self.slopes is not None:
            return self.alpha(tau), self.sigma(tau), self.slopes[0](tau), self.slopes[1](tau)
        one = torch.ones_like(tau)
        found = torch.func.jvp(lambda time: (self.alpha(time) + 0 * time, self.sigma(time) + 0 * time), (tau,), (one,))
        (a, s), (da, ds) = found[0], found[1]
        return a, s, da, ds

    def own_time(self, t: Tensor) -> Tensor:
        """The network's time at the library's t, within the path's ends."""
        if self.inverse is not None:
            return self.inverse(t.to(torch.float64 if t.device.type != "mps" else t.dtype))
        target = t.detach().to(torch.float64 if t.device.type != "mps" else t.dtype)
        knots, values = self.times.to(target), self.positions.to(target)
        right = torch.searchsorted(knots, target.contiguous()).clamp(1, len(knots) - 1)
        low, high = values[right - 1], values[right]
        share = (target - knots[right - 1]) / (knots[right] - knots[right - 1])
        u = torch.lerp(low, high, share.clamp(0, 1))
        length = self.data_time - self.noise_time
        for _ in range(_NEWTON_STEPS):
            a, s, da, ds = self._shares(self._own_time(u), True)
            slope = (da * s - a * ds) * length / (a + s).square()
            u_next = u - (a / (a + s) - target) / slope
            u = torch.where(u_next.isfinite(), u_next, u).clamp(low, high)
        a, s, da, ds = self._shares(self._own_time(u), True)
        slope = (da * s - a * ds) * length / (a + s).square()
        # one more step of length zero, which carries the derivative in t
        step = torch.where(slope.isfinite() & (slope != 0), (t.to(u) - target) / slope, 0.0)
        return self._own_time(u + step)

    def estimate(self, predict: Predict, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Data and noise, from one prediction."""
        time = t.clamp(self.first, self.last)
        early = t < time
        y = torch.where(early, x * (1 - time) / (1 - t).clamp(min=1e-12), x)
        tau = self.own_time(time)
        a, s, da, ds = (part.to(x.dtype) for part in self._shares(tau, True))
        seen = (a + s) * y
        out = predict(seen, tau.to(x.dtype).flatten())
        if self.prediction == "velocity":
            det = da * s - a * ds
            m, z = (s * out - ds * seen) / det, (da * seen - a * out) / det
        elif self.prediction == "sample":
            m = out
            z = (seen - a * m) / s.clamp(min=1e-12)
        else:
            z = out
            m = (seen - s * z) / a.clamp(min=1e-12)
        # the network's input lacks the signal in x: compute the noise from x itself
        return m, torch.where(early, (x - t * m) / (1 - t).clamp(min=1e-12), z)

    def to_time(self, u: Tensor) -> Tensor:
        """Time at a share u of the network's own time; the ends of the path map to 0 and 1."""
        return (_interpolate(u, self.positions, self.times) - self.first) / (self.last - self.first)

    def to_position(self, t: Tensor) -> Tensor:
        """The share of the network's own time at a time."""
        return _interpolate(self.first + t * (self.last - self.first), self.times, self.positions)


class VariancePreservingPath(Path):
    r"""Variance-preserving diffusion, alpha_k m + sigma_k z with alpha_k^2 + sigma_k^2 = 1, as a linear path.

    The signal-to-noise ratio of x_t = (1 - t) z + t m is t / (1 - t). The step k of the diffusion with the same ratio,
    alpha_k / sigma_k = t / (1 - t), has the same state up to a scale:

    .. math:: \alpha_k m + \sigma_k z = (\alpha_k + \sigma_k)\, x_t, \qquad t = \alpha_k / (\alpha_k + \sigma_k).

    The prediction at step k for :math:`(\alpha_k + \sigma_k) x_t` is therefore one for x_t, and noise, data or v each
    give E[m - z | x_t]. k is not an integer: it is interpolated between the training steps, linearly in the angle
    arctan(alpha_k / sigma_k). An Euler step of this velocity is a deterministic DDIM step (Song, Meng, Ermon 2021).

    Training of the model ends with a little signal left. Before that first time, the model is evaluated at the first
    time, for the state rescaled to its noise level; after the last time, the velocity is that of the last.

    Args:
        alphas_cumprod: ``(K,)``, alpha_k^2, decreasing.
        prediction: ``"epsilon"``, ``"v_prediction"`` or ``"sample"``.
        boundary: For a consistency model: map from steps k to (c_skip, c_out). Its jump to data is c_skip times the
            state alpha_k m + sigma_k z plus c_out times the data that it predicts.
        unit_noise: Whether states before the model's first time are rescaled to variance 1, the initial variance of
            its samplers, as in training of models that jump to data; else to the noise at that time, a little less.
    """

    def __init__(self, alphas_cumprod: Tensor, prediction: str,
                 boundary: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None, unit_noise: bool = False) -> None:
        self.unit_noise = unit_noise
        square = alphas_cumprod.detach().to("cpu", torch.float64).flip(0)
        alpha, sigma = square.sqrt(), (1 - square).clamp(min=0).sqrt()
        steps = torch.arange(len(square) - 1, -1, -1, dtype=torch.float64)
        # without signal, a noise prediction does not determine the data: skip such steps
        known = (alpha > (1e-3 if prediction == "epsilon" else -1.0)) & (sigma > 0)
        self.prediction, self.boundary = prediction, boundary
        self.angles, self.steps = torch.atan2(alpha, sigma)[known], steps[known]
        if len(self.angles) < 2 or bool((self.angles.diff() <= 0).any()):
            raise ValueError("alphas_cumprod must decrease from under 1 towards 0, over at least two steps with signal")
        ends = [torch.zeros(1, dtype=torch.float64), torch.full((1,), math.pi / 2, dtype=torch.float64)]
        self.grid = torch.cat([*(ends[:1] if self.angles[0] > 0 else []), self.angles, ends[1]])
        self.positions = torch.linspace(0, 1, len(self.grid), dtype=torch.float64)

    def estimate(self, predict: Predict, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Data and noise, from one prediction."""
        # rounding must not move an end of the table outside it
        angle = _angle(t).clamp(float(self.angles[0]), float(self.angles[-1]))
        alpha, sigma = angle.sin(), angle.cos()
        scale = alpha + sigma
        time, noise_share = alpha / scale, sigma / scale
        early = _angle(t) < float(self.angles[0])  # not t < time: rounding could make that true for any time
        start = 1 / scale if self.unit_noise else noise_share
        y = torch.where(early, x * start / (1 - t).clamp(min=1e-12), x)
        k = _interpolate(angle, self.angles, self.steps)
        out = predict(y * scale, k.flatten())
        if self.prediction == "epsilon":
            z = out
            m = (y - noise_share * z) / time
        elif self.prediction == "sample":
            m = out
            z = (y - time * m) / noise_share
        else:
            m, z = alpha * scale * y - sigma * out, sigma * scale * y + alpha * out
        if self.boundary is not None:
            skip, share = self.boundary(k)
            m = share * m + skip * scale * y
        # the model's input lacks the signal in x: compute the noise from x itself
        return m, torch.where(early, (x - t * m) / (1 - t).clamp(min=1e-12), z)

    def time_of_step(self, k: Tensor) -> Tensor:
        """Times at which the diffusion is at steps k, ``(n,)`` to ``(n,)``."""
        angle = _interpolate(k.to(self.steps), self.steps.flip(0), self.angles.flip(0))
        return angle.sin() / (angle.sin() + angle.cos())

    def to_time(self, u: Tensor) -> Tensor:
        """Time at position u of the grid of steps."""
        angle = _interpolate(u, self.positions, self.grid)
        return angle.sin() / (angle.sin() + angle.cos())

    def to_position(self, t: Tensor) -> Tensor:
        """Position of a time on the grid of steps."""
        return _interpolate(_angle(t), self.grid, self.positions)


def _angle(t: Tensor) -> Tensor:
    return torch.atan2(t, 1 - t)


def _interpolate(x: Tensor, knots: Tensor, values: Tensor) -> Tensor:
    """Piecewise linear, differentiable in x; extrapolated linearly beyond the ends."""
    knots, values = knots.to(x), values.to(x)
    right = torch.searchsorted(knots, x.detach().contiguous()).clamp(1, len(knots) - 1)
    left = right - 1
    share = (x - knots[left]) / (knots[right] - knots[left])
    return torch.lerp(values[left], values[right], share)


def edm_path(sigma_min: float, sigma_max: float) -> SchedulePath:
    """m + sigma z, with sigma as its time, for a network that predicts data."""
    return SchedulePath(torch.ones_like, lambda sigma: sigma, sigma_max, sigma_min, "sample",
                        (torch.zeros_like, torch.ones_like), lambda t: (1 - t) / t)


def trigonometric_path() -> SchedulePath:
    """cos(t) m + sin(t) z (TrigFlow), for a network that predicts data."""
    return SchedulePath(torch.cos, torch.sin, math.pi / 2, 0.0, "sample", (lambda t: -t.sin(), torch.cos),
                        lambda t: torch.atan2(1 - t, t))


def make_path(path: str | tuple[Schedule, Schedule], convention: str, prediction: str = "velocity") -> Path:
    """Build the path of a network whose time runs from 0 to 1.

    Args:
        path: ``"linear"``, ``"cosine"``, ``"vp"``, or (alpha, sigma), two functions of the network's own time.
        convention: ``"data-at-1"`` or ``"data-at-0"``.
        prediction: Prediction of the network: ``"velocity"``, or ``"sample"`` for data.

    Raises:
        ValueError: For an unknown path or convention.
        TypeError: For a path that is neither a name nor two functions.
    """
    noise_time, data_time = (0.0, 1.0) if check_convention(convention) == "data-at-1" else (1.0, 0.0)
    if path == "linear" and prediction == "velocity":
        return LinearPath(convention)
    if isinstance(path, str):
        if path not in PATHS:
            raise ValueError(f"path {path!r} is unknown: choose one of {', '.join(map(repr, PATHS))}, or pass "
                             "(alpha, sigma), the shares of data and noise as functions of the network's time")
        a, s, (da, ds), inverse = PATHS[path]
        if convention == "data-at-0":
            return SchedulePath(a, s, noise_time, data_time, prediction, (da, ds), inverse)
        return SchedulePath(lambda tau: a(1 - tau), lambda tau: s(1 - tau), noise_time, data_time, prediction,
                            (lambda tau: -da(1 - tau), lambda tau: -ds(1 - tau)), lambda t: 1 - inverse(t))
    if not (isinstance(path, tuple) and len(path) == 2 and all(map(callable, path))):
        raise TypeError(f"path is {path!r}: pass a name, or (alpha, sigma), two functions of the network's time")
    return SchedulePath(*path, noise_time, data_time, prediction)
