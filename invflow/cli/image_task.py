"""What ``invflow solve`` does: a user's file becomes a likelihood, a posterior becomes files."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from invflow.cli.operators import operator_by_name, operator_class
from invflow.cli.results import write_results, write_tilted_results
from invflow.datasets.files import fit_to, read_image
from invflow.likelihood import GaussianLikelihood
from invflow.models.compiled import compile_networks
from invflow.posterior import EXACT_MEAN, Posterior
from invflow.restore import in_colour

if TYPE_CHECKING:
    from invflow.operator import Operator
    from invflow.solver import Solver

__all__ = [
    "ImageTask", "PosedImage", "compile_solver", "operator_by_name", "write_results", "write_tilted_results",
]

Say = Callable[[str], None]

@dataclass
class PosedImage:
    """A user's file as a problem.

    Attributes:
        truth: ``(1, C, H, W)``, or None for an observed file.
        likelihood: of one observation, for the solver.
        shown: the same in the file's own channels: another one for a grey file under a prior for colour.
        solver: the solver, for images of this size.
    """

    truth: Tensor | None
    likelihood: GaussianLikelihood
    shown: GaussianLikelihood
    solver: Solver

    def finish(self, posterior: Posterior) -> Posterior:
        """The posterior of images with the file's own channels."""
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
    """A problem made of a user's file.

    Attributes:
        file: the image, or with ``observed`` the measurement.
        operator: the operator's name, such as ``"box-inpainting"``.
        sigma: noise standard deviation; None: 0.05 to degrade with, an estimate of an observed file, whose noise is at
            least that of its rounding.
        observed: whether the file is the measurement itself.
        mask: file of a mask, for inpainting.
        kernel: file of a kernel, for blurs.
        factor: of super-resolution.
        resize: crop and scale the file to what the prior was trained on.
        invert: take 1 - image, for dark strokes on a light ground.
        settings: of the operator, by the names of its other parameters.
        mask_hides: the paint of the mask that hides, ``"white"`` or ``"black"``.
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

        Where the solver takes images of any size, the file's own is taken. A grey file under a prior for colour
        becomes three channels whose mean it is, with noise that is independent between them: sqrt(3) times its own in
        each. So the mean over channels of what is restored is restored from the file as it is.

        Args:
            solver: whose prior gives the image's shape, or takes any; what is posed is for its ``resized`` copy.
            generator: draws the operator's parameters and the noise.
            say: called with a sentence for each thing assumed or changed.

        Raises:
            ValueError: if files, operator and prior do not fit.
        """
        if self.sigma is not None and self.sigma > 1:
            raise ValueError(f"sigma={self.sigma:g}, but pixels lie in [0, 1], so that noise above 1 leaves nothing: "
                             f"on a scale of 0 to 255 it is sigma={self.sigma / 255:.3g} here")
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
            again = torch.Generator().set_state(state)  # the same random mask or kernel once more
            likelihood = in_colour(shown, self._build((3, *shape[1:]), again, lambda _: None), generator)
            say("the file is grey and the prior knows colour: taken as three channels whose mean it is, at sqrt(3) "
                "times its noise each; what is written is grey")
        fitting = solver.resized(likelihood.operator.image_shape)
        return PosedImage(None if self.observed else image[None], likelihood, shown, fitting)

    def _pose_fixed(self, image_shape: tuple[int, ...], solver: Solver, generator: torch.Generator,
                    say: Say) -> PosedImage:
        """The problem at the one size that the prior takes."""
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
        """The noise of an observed file: at least what its rounding leaves."""
        rounding = _rounding(image)
        if self.sigma is None or self.sigma >= rounding:
            return self.sigma
        say(f"sigma={self.sigma:.2g} is less than what rounding leaves in {self.file.name}: taken as {rounding:.2g}")
        return rounding

    def _build(self, image_shape: tuple[int, ...], generator: torch.Generator, say: Say) -> Operator:
        return operator_by_name(self.operator, image_shape, factor=self.factor, mask=self.mask,
                                mask_hides=self.mask_hides, kernel=self.kernel,
                                observed=self.observed, settings=self.settings, generator=generator, say=say)

    def _image_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width of the image of which the file is a measurement, or the file's own."""
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
                raise ValueError("--resize fits a file to what a prior knows, but this solver has none: scale the file "
                                 "yourself")
            image = fit_to(image, trained[1:], say=say)
        return 1 - image if self.invert else image


def _rounding(image: Tensor) -> float:
    """The standard deviation of rounding to 8 or 16 bits, whichever an image in [0, 1] has; 0 where it has neither."""
    for top in (255, 65535):
        if float((image * top - (image * top).round()).abs().max()) < 0.01:
            return 1 / (top * math.sqrt(12))
    return 0.0


def _takes_any_size(solver: Solver) -> bool:
    if _image_shape(solver) is None:
        return True
    prior, adapter = getattr(solver, "prior", None), getattr(solver, "adapter", None)
    return bool(getattr(prior, "resizable", False)) and bool(getattr(adapter, "resizable", True))


def _image_shape(solver: Solver) -> tuple[int, ...] | None:
    """``(C, H, W)`` that the prior was trained on; None for a solver without a prior."""
    prior = getattr(solver, "prior", None)
    if prior is None and not hasattr(solver, "image_shape"):
        return None
    shape = tuple(prior.image_shape if prior is not None else getattr(solver, "image_shape", ()))
    if len(shape) != 3:
        raise ValueError(
            f"the prior makes images of shape {shape}, which no image file holds: pass --prior with a "
            "prior over (C, H, W), such as mnist"
        )
    return shape


def _warn_of_style(image: Tensor, solver: Solver, say: Say) -> None:
    """Say if the typical pixel lies far from that of the prior's images: a dark digit on paper, for MNIST."""
    from invflow.solver import Solver

    if type(solver).prior_samples is Solver.prior_samples:  # no base sampler of its own to compare with
        return
    images = solver.prior_samples(32, generator=torch.Generator().manual_seed(0))
    typical = images.flatten(1).median(1).values
    low, high, own = float(typical.min()), float(typical.max()), float(image.median())
    if not low - 0.25 <= own <= high + 0.25:
        say(f"half of the file's pixels lie above {own:.2f}; of the prior's images, above {low:.2f} to "
            f"{high:.2f}. It has learned images unlike this one; --invert exchanges dark and light")


def compile_solver(solver: Solver) -> None:
    """Compile the networks of a solver, in place; see :func:`invflow.compile_networks`.

    Raises:
        ValueError: where it has none.
    """
    modules = [value for value in vars(solver).values() if isinstance(value, nn.Module)]
    compile_networks(nn.ModuleList(modules))
