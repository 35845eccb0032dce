"""Shared parts of the existing diffusion samplers: settings, noise levels, and images in the scale of the papers."""

from __future__ import annotations

import functools
import inspect
import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, TypedDict

import torch
from torch import Tensor

from invflow._core.watch import check_gradients
from invflow.flowmap import FlowMap
from invflow.linear.structure import observed_forward, observed_residual, zero_unobserved
from invflow.solvers.field.rows import Rows, RowSampler

__all__ = ["DiffusionSampler", "RangedSampler", "Scaled", "SharedSettings", "alpha_bars", "evenly",
           "require_positive"]

#: number of steps of the diffusion that Ho, Jain and Abbeel (2020) train; these samplers use a subset of them
TRAINED_STEPS = 1000


class SharedSettings(TypedDict, total=False):
    """Settings of all diffusion samplers; see :class:`DiffusionSampler`."""

    variant: str
    value_range: tuple[float, float]
    chunk_size: int | None


class RangedSampler(RowSampler):
    """A sampler made for images in a known range.

    Args:
        prior: A flow map trained with noise independent of the data, with affine decoding.
        value_range: (low, high), the range of images that the method assumes; keep the default for images in [0, 1].
        chunk_size: Number of rows through the network at a time; None for 256 on a CPU, and as many as fit on a GPU.
            Samples do not depend on it beyond rounding.
    """

    def __init__(self, prior: FlowMap, *, value_range: tuple[float, float] = (0.0, 1.0),
                 chunk_size: int | None = None) -> None:
        super().__init__(prior, chunk_size)
        low, high = (float(v) for v in value_range)
        if not low < high:
            raise ValueError(f"value_range={value_range}: pass (low, high) with low under high, as (0.0, 1.0)")
        self.value_range = (low, high)

    def _from_unit(self, x: Tensor) -> Tensor:
        """Images from deepinv's output in [0, 1], one for each row: ``(n, 1, *image_shape)``."""
        return (self.value_range[0] + (self.value_range[1] - self.value_range[0]) * x.double())[:, None]


class DiffusionSampler(RangedSampler):
    r"""A sampler that steps through the noise levels of a diffusion model, as published by its authors.

    The papers' images x lie in [-1, 1], and noise levels and step sizes are in these units; ``value_range`` says which
    images these are. If deepinv's implementation is a different method, ``variant="deepinv"`` runs that one.

    Args:
        prior: A flow map trained with noise independent of the data, with affine decoding.
        steps: Number of noise levels.
        variant: ``"paper"``, or ``"deepinv"`` for the form of deepinv 0.5, whose settings are in its own units.
        value_range: (low, high), the range of images that maps to the method's [-1, 1] (in deepinv's form, [0, 1]).
        chunk_size: Number of rows through the network at a time; None for 256 on a CPU, and as many as fit on a GPU.
            Samples do not depend on it beyond rounding.

    Raises:
        TypeError, ValueError: If the prior or a setting does not fit; in ``sample``, if the method cannot handle the
            operator (the message names solvers that can).
    """

    #: largest number of steps of the paper's form; None for no limit
    most_steps: int | None = TRAINED_STEPS

    def __init__(self, prior: FlowMap, steps: int, *, variant: str = "paper",
                 value_range: tuple[float, float] = (0.0, 1.0), chunk_size: int | None = None) -> None:
        super().__init__(prior, value_range=value_range, chunk_size=chunk_size)
        if variant not in ("paper", "deepinv"):
            raise ValueError(f"there is no variant {variant!r}: choose 'paper' or 'deepinv'")
        most = math.inf if self.most_steps is None or variant == "deepinv" else self.most_steps
        if not 2 <= steps <= most:
            raise ValueError(f"steps={steps}: {type(self).__name__} takes at least 2 steps"
                             + (f" and at most {most}" if most < math.inf else ""))
        self.steps, self.variant = steps, variant

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Show the shared settings in the signature of a class that passes them on as ``**shared``."""
        super().__init_subclass__(**kwargs)
        init: Any = cls.__init__
        own = inspect.signature(init)
        if "shared" not in own.parameters:
            return
        passed = inspect.signature(DiffusionSampler.__init__).parameters
        parameters = [p for p in own.parameters.values() if p.name != "shared"]
        parameters += [passed[name] for name in SharedSettings.__annotations__]
        init.__signature__ = own.replace(parameters=parameters)

    def _only_deepinv(self, mend: str, **values: Any) -> None:
        """Refuse settings of deepinv's form in the paper's form; ``mend`` says what to pass instead."""
        for name, value in values.items():
            if value is not None and self.variant == "paper":
                raise ValueError(f"{name}={value} is a setting of deepinv's form: {mend}, or pass variant='deepinv' "
                                 "with it")

    def _only_paper(self, **values: Any) -> None:
        """Refuse settings of the paper's form in deepinv's form."""
        for name, value in values.items():
            if value is not None and self.variant == "deepinv":
                raise ValueError(f"{name}={value} is a setting of the paper's form, absent from variant='deepinv': "
                                 "leave one of them out")

    def _run(self, rows: Rows) -> Tensor:
        if self.variant == "deepinv":
            return self._deepinv(rows)
        scene = Scaled(self.prior, rows, self.value_range)
        return scene.image(self._paper(scene))[:, None]

    @abstractmethod
    def _paper(self, scene: Scaled) -> Tensor:
        """Images x in [-1, 1], ``(n, *image_shape)``, from the paper's algorithm."""

    @abstractmethod
    def _deepinv(self, rows: Rows) -> Tensor:
        """Images ``(n, 1, *image_shape)`` from deepinv's algorithm."""


class Scaled:
    """Rows in the units of the papers: images x in [-1, 1], measured as y = A x + sigma noise.

    Images of the library are mid + half x. Measurements are reduced by the measurement of mid and divided by half, and
    so is the noise. For a nonlinear operator, only the residual is divided.

    Args:
        prior: A flow map with affine decoding.
        rows: Rows with their measurements.
        value_range: (low, high), the range of images.

    Attributes:
        sigma: Noise level of the measurements in these units, ``(n,)``.
    """

    def __init__(self, prior: FlowMap, rows: Rows, value_range: tuple[float, float]) -> None:
        self.prior, self.rows = prior, rows
        self.half, self.mid = (value_range[1] - value_range[0]) / 2, (value_range[1] + value_range[0]) / 2
        self.sigma = rows.likelihood.sigma.to(self.zeros()) / self.half

    def zeros(self) -> Tensor:
        """Zeros in the shape and type of x, ``(n, *image_shape)``."""
        prior = self.prior
        return torch.zeros(len(self.rows.likelihood.y), *prior.image_shape, device=prior.device, dtype=prior.dtype)

    def image(self, x: Tensor) -> Tensor:
        """Images of the library."""
        return self.mid + self.half * x

    def noise(self) -> Tensor:
        """Fresh standard normal noise, ``(n, *image_shape)``."""
        return self.rows.noise(self.zeros())

    def denoise(self, x: Tensor, level: float) -> Tensor:
        """Mean of the image given x, the image plus noise of standard deviation ``level``."""
        prior = self.prior
        assert prior.decode_affine is not None
        t = 1 / (1 + level * self.half / abs(prior.decode_affine[0]))
        found = prior.decode(prior.denoise(t * prior.encode(self.image(x)), t))
        return (found - self.mid) / self.half

    def tweedie(self, x: Tensor, bar: float) -> tuple[Tensor, Tensor]:
        """The state of a variance-preserving diffusion as a leaf, and its denoised image with a gradient graph."""
        check_gradients("guided diffusion")
        leaf = x.detach().requires_grad_()
        with torch.enable_grad():
            return leaf, self.denoise(leaf / math.sqrt(bar), math.sqrt((1 - bar) / bar))

    def forward(self, x: Tensor) -> Tensor:
        """A x, for a linear operator."""
        return observed_forward(self.rows.likelihood, x)

    def adjoint(self, v: Tensor) -> Tensor:
        """A^T v, for a linear operator."""
        operator = self.rows.likelihood.operator
        return operator.adjoint(zero_unobserved(operator, v))

    def residual(self, x: Tensor) -> Tensor:
        """y - A x, zero where nothing was observed."""
        return observed_residual(self.rows.likelihood, self.image(x)) / self.half


@functools.cache
def alpha_bars() -> tuple[float, ...]:
    """Share of the image's variance at each of 1,000 steps, for noise that grows evenly from 1e-4 to 0.02 a step."""
    betas = torch.linspace(1e-4, 0.02, TRAINED_STEPS, dtype=torch.float64)
    return tuple((1 - betas).cumprod(0).tolist())


def evenly(steps: int) -> Sequence[float]:
    """``alpha_bars`` at the times k 1000 / steps for k = 0, ..., steps - 1, as in DDIM; the last is below 1,000."""
    return [alpha_bars()[k * TRAINED_STEPS // steps] for k in range(steps)]


def require_positive(**values: float) -> None:
    """Raise an error for a setting that is not above 0."""
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{name}={value} must be over 0")
