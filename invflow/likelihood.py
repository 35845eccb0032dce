"""Likelihoods: log densities of a measurement, summed over its entries (never averaged), and the noise level."""

from __future__ import annotations

import copy
import math
import warnings
from abc import abstractmethod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from invflow._core.checks import Index, as_index, as_levels, looks_measured_in, to_tensor_hint
from invflow._core.explained import explained
from invflow._core.networks import settle
from invflow._core.noise_level import NoiseLevel, estimate_sigma, noise_levels, trusted
from invflow._core.random import as_generator, draw_noise
from invflow._core.shapes import column, only_observed
from invflow.operator import Operator
from invflow.reward import Reward

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["GaussianLikelihood", "Likelihood", "NoiseLevel", "PoissonLikelihood", "estimate_sigma", "noise_levels"]

# standard deviation of rounding to 8 bits
ROUNDING = 1 / 255 / math.sqrt(12)


class Likelihood(Reward):
    """The log density of B measurements given images, log p(y | x). It holds the operator and y.

    A subclass defines :meth:`log_density` and :meth:`draw`, entry by entry, and names its per-observation
    parameters in ``level_names``. Entries that the operator did not observe are ignored.

    Attributes:
        operator: The forward operator, with one parameter set or one for each observation.
        y: Measurements ``(B, *measurement_shape)``; zero where nothing was observed.
        num_observations: B.

    Example:
        >>> import math, torch, invflow
        >>> from invflow.operators import Denoising
        >>> class Laplace(invflow.Likelihood):
        ...     def log_density(self, y, clean):
        ...         return -(y - clean).abs() - math.log(2)
        ...     def draw(self, clean, generator):
        ...         u = torch.rand(clean.shape, generator=generator) - 0.5
        ...         return clean - u.sign() * (1 - 2 * u.abs()).log()
        >>> likelihood = Laplace(Denoising((4,)), torch.zeros(1, 4))
        >>> likelihood(torch.ones(1, 1, 4))  # four entries at a distance of 1
        tensor([[-6.7726]])
    """

    level_names: tuple[str, ...] = ()
    operator: Operator

    def __init__(self, operator: Operator, y: Tensor) -> None:
        if not isinstance(operator, Operator):
            built = f"pass {operator.__name__}(image_shape)" if isinstance(operator, type) else "pass an Operator"
            found = f"a tensor of shape {tuple(operator.shape)}" if isinstance(operator, Tensor) else repr(operator)
            raise TypeError(f"the operator of a likelihood is {found:.80}: {built}, as in "
                            "invflow.GaussianLikelihood(operator, y, sigma=0.05)")
        settle(operator)  # dropout or BatchNorm in it would make measurements of one image differ
        self.operator = operator
        y = self._check_measurement(y)
        observed = operator.observed()
        self._observed = None if observed is None else observed.to(y.device)
        if self._observed is not None:
            y = torch.where(self._observed, y, 0.0)
            self._count = self._observed.flatten(1).sum(1).to(y)
        else:
            self._count = y.new_full((1,), math.prod(operator.measurement_shape))
        if not bool(torch.isfinite(y).all()):
            raise ValueError(
                f"y has {int((~torch.isfinite(y)).sum())} entries that are NaN or infinite, expected finite "
                "ones: leave unknown entries out with a mask, as invflow.operators.MaskInpainting(mask) does"
            )
        self.y = y
        self.num_observations = y.shape[0]

    def _check_measurement(self, y: Tensor) -> Tensor:
        """Return the measurement if it fits the operator, which checks shapes and types."""
        operator = self.operator
        sets = operator.num_sets
        if isinstance(y, Tensor) and y.ndim > 1 and len(y) and sets not in (1, len(y)):
            hint = f"operator.select(slice({len(y)}))" if len(y) < sets else "an operator with as many sets"
            raise ValueError(
                f"y has shape {tuple(y.shape)}, {len(y)} observations, but the operator has {sets} parameter "
                f"sets: it takes one set for each observation, or one for all; pass {hint}"
            )
        return operator.check_measurements(y).detach()

    @abstractmethod
    def log_density(self, y: Tensor, clean: Tensor) -> Tensor:
        """Log density of every entry of ``y`` given the measurement without noise.

        Args:
            y: ``(B, 1, *measurement_shape)``.
            clean: ``(B, N, *measurement_shape)``.

        Returns:
            ``(B, N, *measurement_shape)``.
        """

    @abstractmethod
    def draw(self, clean: Tensor, generator: torch.Generator | None) -> Tensor:
        """Add noise to measurements without noise: ``(B, N, *measurement_shape)`` to the same shape."""

    def __call__(self, x: Tensor) -> Tensor:
        """Log likelihood log p(y | x), summed over the measurement: ``(B, N, *image_shape)`` to ``(B, N)``.

        Raises:
            ValueError: If the images do not fit the operator or the number of observations.
        """
        clean = self.predict(x)
        terms = self.log_density(self.y[:, None].to(clean.dtype), clean)
        return self._sum_observed(terms)

    def predict(self, x: Tensor) -> Tensor:
        """Measurements without noise, A(x): ``(B, N, *image_shape)`` to ``(B, N, *measurement_shape)``."""
        shape = tuple(self.operator.image_shape)
        if not isinstance(x, Tensor):
            raise TypeError(to_tensor_hint(x, "x"))
        if x.ndim != len(shape) + 2 or tuple(x.shape[2:]) != shape or x.shape[0] != self.num_observations:
            expected = f"({self.num_observations}, N, {', '.join(map(str, shape))})"
            hint = "pass x[:, None] for one image for each observation"
            if tuple(x.shape[1:]) != shape:
                hint = "use likelihood.select(index) for some of the observations"
            raise ValueError(
                f"x has shape {tuple(x.shape)}, but a likelihood of {self.num_observations} observations of "
                f"images {shape} takes (B, N, *image_shape) = {expected}: {hint}"
            )
        if x.device != self.y.device:
            raise ValueError(f"x is on {x.device}, y on {self.y.device}: use likelihood.to(x.device)")
        clean = self.operator.expand(x.shape[1])(x.flatten(0, 1))
        result: Tensor = clean.unflatten(0, x.shape[:2])
        return result

    def simulate(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Simulate a new noisy measurement of images.

        Args:
            x: Images ``(B, N, *image_shape)``, or ``(B, *image_shape)`` for one image per observation.
            generator: Generator for the noise.

        Returns:
            ``(B, N, *measurement_shape)`` or ``(B, *measurement_shape)``; zero where nothing is observed.
        """
        if not isinstance(x, Tensor):
            raise TypeError(to_tensor_hint(x, "x"))
        single = x.ndim == len(self.operator.image_shape) + 1
        clean = self.predict(x[:, None] if single else x)
        y = only_observed(self.draw(clean, generator), self._observed)
        return y[:, 0] if single else y

    def select(self, index: Index) -> Self:
        """The likelihood of some observations only, with their operators; see :meth:`Reward.select`."""
        rows = as_index(index, len(self.y))
        other = copy.copy(self)
        other.operator = self.operator.select(rows)
        rows = rows.to(self.y.device)
        for name in ("y", *self.level_names):
            setattr(other, name, getattr(self, name)[rows])
        if self._observed is not None and self._observed.shape[0] > 1:
            other._observed, other._count = self._observed[rows], self._count[rows]
        other.num_observations = len(rows)
        return other

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Return a copy, including the operator, on another device or in another floating-point type."""
        other = copy.copy(self)
        other.operator = copy.deepcopy(self.operator).to(*args, **kwargs)
        for name in ("y", *self.level_names):
            setattr(other, name, getattr(self, name).to(*args, **kwargs))
        if self._observed is not None:
            other._observed = self._observed.to(other.y.device)
        other._count = self._count.to(other.y)
        return other

    def __repr__(self) -> str:
        """Operator, number of observations and levels."""
        levels = [""] + [f"{name}={_range(getattr(self, name))}" for name in self.level_names]
        count = self.num_observations
        return (f"{type(self).__name__}({self.operator!r}, {count} observation{'s' if count != 1 else ''}"
                f"{', '.join(levels)})")

    def _level(self, name: str, like: Tensor) -> Tensor:
        """A per-observation parameter, shaped to broadcast against ``(B, N, *measurement_shape)``."""
        return column(getattr(self, name), like)

    def _sum_observed(self, terms: Tensor) -> Tensor:
        """Sum ``(B, N, *measurement_shape)`` over the observed entries, to ``(B, N)``."""
        return only_observed(terms, self._observed).flatten(2).sum(2)

    def count_observed(self) -> Tensor:
        """Number of observed entries, ``(B,)``, or ``(1,)`` if all observations share a mask."""
        return self._count


def _range(levels: Tensor) -> str:
    """One level, or the range from lowest to highest."""
    low, high = (f"{float(level):.4g}" for level in (levels.min(), levels.max()))
    return low if low == high else f"{low} to {high}"


class GaussianLikelihood(Likelihood):
    r"""The likelihood of y = A(x) + sigma e with e ~ N(0, I), normalised, summed over the observed entries.

    .. math:: \log p(y \mid x) = - \|y - A(x)\|^2 / (2 \sigma^2) - m \log(\sigma \sqrt{2 \pi})

    Args:
        operator: The forward operator, with one parameter set or one for each observation.
        y: Measurements ``(B, *measurement_shape)``, floating point and finite.
        sigma: Standard deviation of the noise, in the units of ``y``: a float, a ``(B,)`` tensor, or None to estimate
            it from ``y``, see :func:`invflow.likelihood.estimate_sigma`. With 0 there is no noise and no density:
            calling the likelihood is an error, and only solvers that need no density (the VFM) accept it.

    Attributes:
        operator, y, sigma: As above; sigma is ``(B,)``.

    Raises:
        ValueError: If sigma is negative, or if the measurement is empty, has the wrong shape, or is not floating point
            or not finite.

    Warns:
        UserWarning: If sigma is estimated (with its value), or if the values of ``y`` look like [0, 255] or [-1, 1].

    Example:
        >>> import torch, invflow
        >>> from invflow.operators import Denoising
        >>> likelihood = invflow.GaussianLikelihood(Denoising((1, 8, 8)), torch.zeros(2, 1, 8, 8), sigma=0.1)
        >>> likelihood(torch.zeros(2, 5, 1, 8, 8)).shape
        torch.Size([2, 5])
    """

    level_names = ("sigma",)

    @explained(like="invflow.GaussianLikelihood(operator, y, sigma=0.05)")
    def __init__(self, operator: Operator, y: Tensor, sigma: float | Tensor | None = None) -> None:
        super().__init__(operator, y)
        if sigma is None:
            levels = trusted(noise_levels(self.y, self._observed))
            sigma = self.y.new_tensor([level.sigma for level in levels])
            values = ", ".join(f"{level.sigma:.3g} ({level.low:.3g} to {level.high:.3g})" for level in levels[:4])
            values += ", ..." if len(levels) > 4 else ""
            warnings.warn(f"sigma was estimated from y as {values}: pass sigma=... if you know it", stacklevel=3)
        self.sigma = as_levels(sigma, len(self.y), "sigma", allow_zero=True).to(self.y)
        # checked once, because each check waits for the GPU
        self.noiseless = not bool((self.sigma > 0).all())
        hint = looks_measured_in(self.y, self.sigma, operator, (operator.num_sets, *operator.image_shape))
        if hint is not None:
            warnings.warn(hint, stacklevel=3)

    def log_density(self, y: Tensor, clean: Tensor) -> Tensor:
        """Log of N(y; clean, sigma^2), entry by entry."""
        sigma = self._level("sigma", clean)
        if self.noiseless and not bool((self.sigma > 0).all()):  # perhaps of other observations only
            raise ValueError("sigma is 0, and a measurement without noise has no density: pass the noise level, "
                             f"such as sigma={ROUNDING:.2g} for values rounded to 8 bits, or use the VFM")
        return -0.5 * ((y - clean) / sigma).square() - sigma.log() - 0.5 * math.log(2 * math.pi)

    def draw(self, clean: Tensor, generator: torch.Generator | None) -> Tensor:
        """The measurement without noise plus Gaussian noise."""
        return clean + self._level("sigma", clean) * draw_noise(tuple(clean.shape), generator).to(clean)

    def chi_square(self, x: Tensor) -> Tensor:
        """Chi-square per value: the mean of ((y - A x) / sigma)^2 over the observed entries; near 1 for a good sample.

        Its square root is the residual of the tables: a root mean square, in units of sigma. Without noise (sigma 0),
        the unit is the error of rounding to 8 bits.

        Args:
            x: Images ``(B, N, *image_shape)``.

        Returns:
            ``(B, N)``.
        """
        return self.misfit(self.predict(x))

    def misfit(self, clean: Tensor) -> Tensor:
        """Same as :meth:`chi_square`, computed from noiseless measurements A(x) ``(B, N, *measurement_shape)``."""
        unit = self._level("sigma", clean)
        if self.noiseless:
            unit = torch.where(unit > 0, unit, ROUNDING)
        scaled = (self.y[:, None].to(clean.dtype) - clean) / unit
        count = self.count_observed()[:, None].to(clean.dtype)
        return self._sum_observed(scaled.square()) / count.clamp(min=1)

    def residual(self, x: Tensor) -> Tensor:
        """The former name of :meth:`chi_square`; ``(B, N)``."""
        return self.chi_square(x)


class PoissonLikelihood(Likelihood):
    r"""The likelihood of photon counts, y ~ Poisson(gain A(x) + background), summed over observed entries.

    .. math:: \log p(y \mid x) = \sum y \log \lambda - \lambda - \log y!, \qquad \lambda = g A(x) + b

    Images overshoot, so A(x) may be negative. A negative rate is treated as 0, as in :meth:`draw`: where no photon was
    counted, all rates up to 0 are equally likely. Below a rate of ``floor`` counts, log lambda is replaced by its
    tangent at ``floor``. The density stays finite there, and its gradient points back. Above, it is exact.

    Args:
        operator: The forward operator, with one parameter set or one for each observation.
        y: Counts ``(B, *measurement_shape)``, integers of at least 0, of any dtype.
        gain: Counts for an intensity of 1, above 0; a float or ``(B,)``.
        background: Counts without any light, at least 0; a float or ``(B,)``.
        floor: Rate in counts below which the tangent replaces the logarithm, above 0.

    Raises:
        ValueError: If the gain or the background is out of range, or if the counts are negative, not integers, not
            finite or of the wrong shape.

    Warns:
        UserWarning: If the counts are far above or below those of a white image with this gain.

    Example:
        >>> import torch, invflow
        >>> from invflow.operators import Denoising
        >>> counts = invflow.PoissonLikelihood(Denoising((1, 8, 8)), torch.full((2, 1, 8, 8), 5), gain=10.0)
    """

    level_names = ("gain", "background")

    @explained(like="invflow.PoissonLikelihood(operator, y, gain=20.0)")
    def __init__(self, operator: Operator, y: Tensor, gain: float | Tensor,
                 background: float | Tensor = 0.0, floor: float = 1e-3) -> None:
        if isinstance(y, Tensor) and not y.is_floating_point() and not y.is_complex():
            y = y.to(torch.get_default_dtype())  # counts are integers, so an integer type is valid here
        super().__init__(operator, y)
        if bool(((self.y < 0) | (self.y != self.y.round())).any()):
            raise ValueError(
                f"y has values from {float(self.y.min()):.4g} to {float(self.y.max()):.4g}, expected counts, "
                "whole numbers of at least 0: for intensities use GaussianLikelihood, or (gain * y).round()"
            )
        if not (math.isfinite(floor) and floor > 0):
            raise ValueError(f"floor is {floor}: it must be finite and > 0 counts")
        self.gain = as_levels(gain, len(self.y), "gain").to(self.y)
        dark = as_levels(background, len(self.y), "background", allow_zero=True)
        self.background = dark.to(self.y)
        self.floor = floor
        self._warn_of_gain()

    def _warn_of_gain(self) -> None:
        """Warn about counts that no image in [0, 1] gives. A reciprocal gain is wrong by a factor of its square."""
        with torch.no_grad():
            white = self.operator(self.y.new_ones(self.operator.num_sets, *self.operator.image_shape))
            rate = self.rate(white.clamp(min=0)[:, None])
        brightest, seen = 3 * rate.flatten(1).amax(1), self.y.flatten(1).amax(1)
        bright = seen > brightest + 6 * brightest.sqrt() + 6
        total = self._sum_observed(rate.expand(len(self.y), *rate.shape[1:]))[:, 0]
        dark = self.y.flatten(1).sum(1) < 0.002 * total - 6 * (0.002 * total).sqrt()
        if bool((bright | dark).any()):
            row = int((bright | dark).nonzero()[0, 0])
            warnings.warn(
                f"y has counts up to {float(seen[row]):.4g} and {float(self.y[row].sum()):.4g} in all, but with gain="
                f"{float(self.gain[row]):.4g} a white image gives up to {float(brightest[row]) / 3:.4g} and "
                f"{float(total[row]):.4g} (gain * A(1) + background): gain is the counts for an intensity of 1. "
                "deepinv's is its reciprocal: for deepinv.physics.PoissonNoise(g) pass gain=1 / g", stacklevel=4)

    def rate(self, clean: Tensor) -> Tensor:
        """Expected counts, gain A(x) + background: ``(B, N, *measurement_shape)`` to the same shape."""
        return self._level("gain", clean) * clean + self._level("background", clean)

    def log_density(self, y: Tensor, clean: Tensor) -> Tensor:
        """Log of Poisson(y; rate), entry by entry."""
        rate = self.rate(clean)
        tangent = math.log(self.floor) + (rate - self.floor) / self.floor
        log_rate = torch.where(rate > self.floor, rate.clamp(min=self.floor).log(), tangent)
        # without light, zero counts have probability 1; unclamped, negative rates would raise the density forever
        return y * log_rate - rate.clamp(min=0) - torch.lgamma(y + 1)

    def draw(self, clean: Tensor, generator: torch.Generator | None) -> Tensor:
        """Draw counts; negative rates are treated as 0."""
        generator = as_generator(generator)
        rate = self.rate(clean).detach().clamp(min=0).to(generator.device)
        return torch.poisson(rate, generator=generator).to(clean)
