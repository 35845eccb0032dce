"""Turns a user's image file into a likelihood, for ``invflow solve``."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from invflow.cli.operators import operator_by_name, operator_class
from invflow.datasets.files import fit_to, read_image
from invflow.likelihood import GaussianLikelihood
from invflow.models.compiled import compile_networks
from invflow.posterior import EXACT_MEAN, Posterior
from invflow.restore import in_colour

if TYPE_CHECKING:
    from invflow.operator import Operator
    from invflow.solver import Solver

__all__ = ["ImageTask", "PosedImage", "compile_solver", "operator_by_name"]

Say = Callable[[str], None]

@dataclass
class PosedImage:
    """A user's file as a problem.

    Attributes:
        truth: Truth ``(1, C, H, W)``, or None for an observed file.
        likelihood: Likelihood of one observation, for the solver.
        shown: The same likelihood in the file's own channels; it differs for a grey file with a colour prior.
        solver: The solver for images of this size.
    """

    truth: Tensor | None
    likelihood: GaussianLikelihood
    shown: GaussianLikelihood
    solver: Solver

    def finish(self, posterior: Posterior) -> Posterior:
        """Convert a posterior to the file's own channels."""
        if self.shown is self.likelihood:
            return posterior
        diagnostics = dict(posterior.diagnostics)
        if EXACT_MEAN in diagnostics:
            diagnostics[EXACT_MEAN] = diagnostics[EXACT_MEAN].mean(1, keepdim=True)
        return Posterior(posterior.samples.mean(2, keepdim=True), posterior.log_weights if posterior.weighted else None,
                         posterior.log_evidence, posterior.nfe, posterior.seconds, diagnostics,
                         posterior.settings)


@dataclass
class ImageTask:
    """An inverse problem given by a user's image file.

    Attributes:
        file: File of the image or, with ``observed``, of the measurement.
        operator: Name of the operator, such as ``"box-inpainting"``.
        sigma: Standard deviation of the noise. None means 0.05 for degrading an image, and an estimate for an observed
            file, which is at least the noise of its rounding.
        observed: Whether the file is the measurement itself.
        mask: File of a mask, for inpainting.
        kernel: File of a kernel, for blurs.
        factor: Factor of super-resolution.
        resize: Whether to crop and scale the file to the size that the prior was trained on.
        invert: Whether to use 1 - image, for dark strokes on a light background.
        settings: Other parameters of the operator, by name.
        mask_hides: Colour of the mask's hidden pixels, ``"white"`` or ``"black"``.
    """

    file: Path
    operator: str
    sigma: float | None = None
    observed: bool = False
    mask: Path | None = None
    kernel: Path | None = None
    factor: int | None = None
    resize: bool = False
    invert: bool = False
    settings: dict[str, Any] = field(default_factory=dict)
    mask_hides: str | None = None

    def pose(self, solver: Solver, generator: torch.Generator, say: Say) -> PosedImage:
        """Read the files, and degrade the image unless it is observed.

        If the solver accepts images of any size, the file keeps its own size. With a colour prior, a grey file is
        treated as the mean of three channels with independent noise, which is sqrt(3) times the file's noise in each.
        The mean over channels of the restored image is then the restoration of the grey file.

        Args:
            solver: Solver whose prior determines the image shape, or accepts any. The problem is for its ``resized``
                copy.
            generator: Generator for the operator's parameters and the noise.
            say: Called with a sentence for each assumption or change.

        Raises:
            ValueError: If files, operator and prior do not fit.
        """
        if self.sigma is not None and self.sigma > 1:
            raise ValueError(f"sigma={self.sigma:g}, but pixels lie in [0, 1], and noise above 1 hides everything: "
                             f"if you mean a scale of 0 to 255, pass sigma={self.sigma / 255:.3g}")
        if self.observed and self.resize:
            raise ValueError("--resize would change the measurement itself: pass --observed with a file of the "
                             "measurement's shape, and no --resize")
        trained = _image_shape(solver)
        if not _takes_any_size(solver):
            assert trained is not None
            return self._pose_fixed(trained, solver, generator, say)
        image = self._read_any(trained, say)
        shape = (len(image), *self._image_size((image.shape[1], image.shape[2])))
        state = generator.get_state()
        operator = self._build(shape, generator, say)
        if self.observed and tuple(operator.measurement_shape) != tuple(image.shape):
            raise ValueError(f"{self.file.name} has shape {tuple(image.shape)}, but {operator} measures images {shape} "
                             f"as {tuple(operator.measurement_shape)}: pass a file of that shape")
        if self.observed:
            shown = GaussianLikelihood(operator, image[None], self._level(image, say))
        else:
            sigma = 0.05 if self.sigma is None else self.sigma
            shown = GaussianLikelihood(operator, operator.measure(image[None], sigma, generator=generator), sigma)
        likelihood = shown
        if trained is not None and trained[0] == 3 and len(image) == 1:
            again = torch.Generator().set_state(state)  # draw the same random mask or kernel again
            likelihood = in_colour(shown, self._build((3, *shape[1:]), again, lambda _: None), generator)
            say("the file is grey and the prior is for colour: the file is treated as the mean of three channels, each "
                "with sqrt(3) times its noise; the output is grey")
        fitting = solver.resized(likelihood.operator.image_shape)
        return PosedImage(None if self.observed else image[None], likelihood, shown, fitting)

    def _pose_fixed(self, image_shape: tuple[int, ...], solver: Solver, generator: torch.Generator,
                    say: Say) -> PosedImage:
        """Pose the problem at the only size that the prior accepts."""
        operator = self._build(image_shape, generator, say)
        truth = None
        if self.observed:
            y = self._read(tuple(operator.measurement_shape), say)[None]
            sigma = self._level(y, say)
            if tuple(operator.measurement_shape) == image_shape and operator.observed() is None:
                _warn_of_style(y[0], solver, say)
        else:
            truth = self._read(image_shape, say)[None]
            _warn_of_style(truth[0], solver, say)
            sigma = 0.05 if self.sigma is None else self.sigma
            y = operator.measure(truth, sigma, generator=generator)
        likelihood = GaussianLikelihood(operator, y, sigma)
        return PosedImage(truth, likelihood, likelihood, solver)

    def _level(self, image: Tensor, say: Say) -> float | None:
        """Noise level of an observed file, at least the noise of its rounding."""
        rounding = _rounding(image)
        if self.sigma is None or self.sigma >= rounding:
            return self.sigma
        say(f"sigma={self.sigma:.2g} is below the rounding noise of {self.file.name}: using {rounding:.2g}")
        return rounding

    def _build(self, image_shape: tuple[int, ...], generator: torch.Generator, say: Say) -> Operator:
        return operator_by_name(self.operator, image_shape, factor=self.factor, mask=self.mask,
                                mask_hides=self.mask_hides, kernel=self.kernel,
                                observed=self.observed, settings=self.settings, generator=generator, say=say)

    def _image_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width of the image that the file is a measurement of, or of the file itself."""
        if not self.observed:
            return size
        settings = dict(self.settings) | ({} if self.factor is None else {"factor": self.factor})
        height, width = operator_class(self.operator)[1].image_size(size, settings)
        return height, width

    def _read(self, shape: tuple[int, ...], say: Say) -> Tensor:
        image = read_image(self.file, image_shape=shape, resize=self.resize, say=say)
        return 1 - image if self.invert else image

    def _read_any(self, trained: tuple[int, ...] | None, say: Say) -> Tensor:
        image = read_image(self.file, channels=1 if trained is not None and trained[0] == 1 else None, say=say)
        if self.resize:
            if trained is None:
                raise ValueError("--resize fits a file to a prior's size, but this solver has no prior: scale the file "
                                 "yourself")
            image = fit_to(image, trained[1:], say=say)
        return 1 - image if self.invert else image


def _rounding(image: Tensor) -> float:
    """Standard deviation of the error of rounding to 8 or 16 bits, as used by an image in [0, 1]; 0 for neither."""
    for top in (255, 65535):
        if float((image * top - (image * top).round()).abs().max()) < 0.01:
            return 1 / (top * math.sqrt(12))
    return 0.0


def _takes_any_size(solver: Solver) -> bool:
    if _image_shape(solver) is None:
        return True
    adapter = getattr(solver, "adapter", None)
    return solver.prior is not None and solver.prior.resizable and (adapter is None or adapter.resizable)


def _image_shape(solver: Solver) -> tuple[int, ...] | None:
    """Image shape ``(C, H, W)`` that the prior was trained on; None for a solver without a prior."""
    shape = solver.image_shape if solver.prior is None else tuple(solver.prior.image_shape)
    if shape is not None and len(shape) != 3:
        raise ValueError(
            f"the prior has images of shape {shape}, which do not fit an image file: pass --prior with a "
            "prior over (C, H, W), such as mnist"
        )
    return shape


def _warn_of_style(image: Tensor, solver: Solver, say: Say) -> None:
    """Print a note if the median pixel is far from that of the prior's images, as for a dark digit on paper."""
    from invflow.solver import Solver

    if type(solver).prior_samples is Solver.prior_samples:  # no base sampler to compare with
        return
    images = solver.prior_samples(32, generator=torch.Generator().manual_seed(0))
    typical = images.flatten(1).median(1).values
    low, high, own = float(typical.min()), float(typical.max()), float(image.median())
    if not low - 0.25 <= own <= high + 0.25:
        say(f"the median pixel of the file is {own:.2f}, but {low:.2f} to {high:.2f} in images of the prior, which was "
            "trained on images unlike this one; --invert exchanges dark and light")


def compile_solver(solver: Solver) -> None:
    """Compile the networks of a solver, in place; see :func:`invflow.compile_networks`.

    Raises:
        ValueError: If the solver has none.
    """
    modules = [value for value in vars(solver).values() if isinstance(value, nn.Module)]
    compile_networks(nn.ModuleList(modules))
