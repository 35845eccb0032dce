"""What ``invflow solve`` does: a user's file becomes a likelihood, a posterior becomes files."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from invflow import operators
from invflow._plugins import nearest
from invflow.imageio import read_image, read_kernel, read_mask
from invflow.reward import GaussianLikelihood, Reward

if TYPE_CHECKING:
    from invflow.operator import Operator
    from invflow.posterior import Posterior
    from invflow.problem import Problem
    from invflow.solvers.base import Solver

__all__ = ["ImageTask", "check_device", "kebab", "move_solver", "operator_by_name", "write_results",
           "write_tilted_results"]

Say = Callable[[str], None]


def kebab(name: str) -> str:
    """A class name as it is typed on the command line: ``BoxInpainting`` to ``box-inpainting``."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", name).lower()


@dataclass
class ImageTask:
    """A problem made of a user's file.

    Attributes:
        file: the image, or with ``observed`` the measurement.
        operator: the operator's name, such as ``"box-inpainting"``.
        sigma: noise standard deviation; None: 0.05 to degrade with, an estimate of an observed file.
        observed: whether the file is the measurement itself.
        mask: file of a mask, for inpainting.
        kernel: file of a kernel, for blurs.
        factor: of super-resolution.
        resize: crop and scale the file to what the prior takes.
        invert: take 1 - image, for dark strokes on a light ground.
        settings: of the operator, by the names of its other parameters.
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

    def pose(self, solver: Solver, generator: torch.Generator,
             say: Say) -> tuple[Tensor | None, GaussianLikelihood]:
        """Read the files, and degrade the image unless it is observed.

        Args:
            solver: whose prior gives the image's shape.
            generator: draws the operator's parameters and the noise.
            say: called with a sentence for each thing assumed or changed.

        Returns:
            truth: ``(1, C, H, W)``, or None for an observed file.
            likelihood: of one observation.

        Raises:
            ValueError: if files, operator and prior do not fit.
        """
        image_shape = _image_shape(solver)
        operator = operator_by_name(self.operator, image_shape, factor=self.factor, mask=self.mask,
                                    kernel=self.kernel, observed=self.observed, settings=self.settings,
                                    generator=generator, say=say)
        if self.observed:
            if self.resize:
                raise ValueError(
                    "--resize would change the measurement itself: pass --observed with a file of the "
                    f"measurement's shape, {tuple(operator.measurement_shape)}, and no --resize"
                )
            y = self._read(tuple(operator.measurement_shape), say)
            if tuple(operator.measurement_shape) == image_shape and operator.observed() is None:
                _warn_of_style(y, solver, say)
            return None, GaussianLikelihood(operator, y[None], self.sigma)
        truth = self._read(image_shape, say)
        _warn_of_style(truth, solver, say)
        sigma = 0.05 if self.sigma is None else self.sigma
        y = operator.measure(truth[None], sigma, generator=generator)
        return truth[None], GaussianLikelihood(operator, y, sigma)

    def _read(self, shape: tuple[int, ...], say: Say) -> Tensor:
        image = read_image(self.file, image_shape=shape, resize=self.resize, say=say)
        return 1 - image if self.invert else image


def _image_shape(solver: Solver) -> tuple[int, ...]:
    prior = getattr(solver, "prior", None)
    shape = tuple(prior.image_shape if prior is not None else getattr(solver, "image_shape", ()))
    if len(shape) != 3:
        raise ValueError(
            f"the prior makes images of shape {shape}, which no image file holds: pass --prior with a "
            "prior over (C, H, W), such as mnist"
        )
    return shape


def _warn_of_style(image: Tensor, solver: Solver, say: Say) -> None:
    """Say if the typical pixel lies far from that of the prior's images: a dark digit on paper, for MNIST."""
    from invflow.solvers.base import Solver

    if type(solver).prior_samples is Solver.prior_samples:  # no base sampler of its own to compare with
        return
    images = solver.prior_samples(32, generator=torch.Generator().manual_seed(0))
    typical = images.flatten(1).median(1).values
    low, high, own = float(typical.min()), float(typical.max()), float(image.median())
    if not low - 0.25 <= own <= high + 0.25:
        say(f"half of the file's pixels lie above {own:.2f}; of the prior's images, above {low:.2f} to "
            f"{high:.2f}. It has learned images unlike this one; --invert exchanges dark and light")


def operator_by_name(name: str, image_shape: tuple[int, ...], *, factor: int | None = None,
                     mask: Path | None = None, kernel: Path | None = None, observed: bool = False,
                     settings: Mapping[str, Any] | None = None,
                     generator: torch.Generator | None = None, say: Say = print) -> Operator:
    """Build an operator as the command line asks for it.

    Args:
        name: an operator's name, such as ``"box-inpainting"``.
        image_shape: ``(C, H, W)``.
        factor: of super-resolution.
        mask: file of a mask; the operator's name then says as which class the adapter takes it.
        kernel: file of a blur kernel; likewise.
        observed: whether a measurement exists already, so that no parameter may be drawn at random.
        settings: other parameters of the operator, by name.
        generator: draws random parameters.
        say: called with a sentence for each thing assumed.

    Returns:
        The operator, with one parameter set.

    Raises:
        ValueError: for an unknown name (with the nearest known one), or options that do not fit it.
    """
    known = {kebab(key): key for key in operators.names()}
    key = kebab(name).replace("_", "-")
    if key not in known:
        raise ValueError(f"there is no operator {name!r}: {nearest(key, list(known))}")
    settings = dict(settings or {})
    if settings and (mask is not None or kernel is not None):
        raise ValueError(f"--operator-set {next(iter(settings))}=... does not go with --mask or --kernel, which give "
                         "the operator's parameters")
    if mask is not None:
        return _masked(key, image_shape, mask, say)
    if kernel is not None:
        return _blurred(key, image_shape, kernel, say)
    kind: Any = operators.find(known[key])
    parameters = inspect.signature(kind).parameters
    _check_settings(key, settings, parameters)
    if factor is not None and "factor" not in parameters:
        raise ValueError(f"--factor belongs to super-resolution, not to {key}")
    missing = [p for p, v in parameters.items() if v.default is v.empty and v.kind is v.POSITIONAL_OR_KEYWORD]
    for needed in (p for p in missing if p not in settings):
        if needed in ("mask", "kernel"):
            raise ValueError(f"{key} needs its {needed}: pass --{needed} FILE")
        if needed != "image_shape":
            raise ValueError(f"{key} needs its {needed}: pass --operator-set {needed}=..., or build it in Python if "
                             "that is no number or word")
    if observed and "generator" in parameters:
        option = "--mask" if "inpainting" in key else "--kernel"
        raise ValueError(f"{key} draws its parameters at random, but a file that is observed was made with "
                         f"certain ones: pass {option} FILE")
    arguments: dict[str, Any] = {"generator": generator} if "generator" in parameters else {}
    if factor is not None:
        arguments["factor"] = factor
    operator: Operator = kind(image_shape, **arguments, **settings)
    if observed and key in ("box-inpainting", "gaussian-blur"):
        option = "--mask" if key == "box-inpainting" else "--kernel"
        say(f"assumed the operator's defaults, {operator}: pass {option} FILE for others")
    return operator


def _check_settings(key: str, settings: Mapping[str, Any], parameters: Mapping[str, inspect.Parameter]) -> None:
    """Expect that the operator has these settings, and that no other option gives them."""
    options = {"image_shape": "the prior", "generator": "--seed", "mask": "--mask", "kernel": "--kernel",
               "factor": "--factor"}
    named = [p for p, v in parameters.items() if v.kind in (v.POSITIONAL_OR_KEYWORD, v.KEYWORD_ONLY)]
    known = [p for p in named if p not in options]
    for name in settings:
        if name in options and name in parameters:
            raise ValueError(f"the {name} of {key} is given by {options[name]}, not by --operator-set")
        if name not in known:
            knows = f"it has {', '.join(known)}" if known else "it has none"
            raise ValueError(f"the operator {key} has no setting {name!r}: {knows}")


def _masked(key: str, image_shape: tuple[int, ...], file: Path, say: Say) -> Operator:
    if "inpainting" not in key:
        raise ValueError(f"--mask belongs to the inpainting operators, not to {key}")
    mask = read_mask(file, image_shape, say=say)
    problem_class = key
    if key == "mask-inpainting":
        problem_class = "box-inpainting" if _hides_a_box(mask) else ""
        if not problem_class:
            say("the mask hides no single box, so no adapter was trained for it; if its gaps are scattered, "
                "--operator random-inpainting takes it as such")
    kind: Any = operators.find("MaskInpainting")
    return kind(mask, image_shape, problem_class or None)


def _hides_a_box(mask: Tensor) -> bool:
    """Whether the pixels that are not observed are one full rectangle."""
    hidden = (mask == 0).any(0)
    rows, columns = hidden.any(1).nonzero().flatten(), hidden.any(0).nonzero().flatten()
    if len(rows) == 0:
        return False
    box = hidden[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return bool(box.all()) and bool((mask == mask[:1]).all())


def _blurred(key: str, image_shape: tuple[int, ...], file: Path, say: Say) -> Operator:
    if "blur" not in key:
        raise ValueError(f"--kernel belongs to the blurs, not to {key}")
    problem_class = None if key == "blur" else key
    if problem_class is None:
        say("an adapter takes a kernel as one of a kind that it was trained for: name it by --operator "
            "gaussian-blur or motion-blur")
    kernel = read_kernel(file, say=say)
    kind: Any = operators.find("Blur")
    return kind(kernel, image_shape, problem_class=problem_class)


# -- devices -----------------------------------------------------------------------------------------------


def check_device(name: str) -> torch.device:
    """A device by its name, if it is there.

    Raises:
        ValueError: if it is not.
    """
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"the device {name!r} cannot be used ({reason}): pass --device cpu") from error
    return device


def move_solver(solver: Solver, device: torch.device) -> None:
    """Move the networks and tensors of a solver, in place."""
    for name, value in vars(solver).items():
        if isinstance(value, (nn.Module, Tensor)):
            setattr(solver, name, value.to(device))


# -- results -----------------------------------------------------------------------------------------------


def write_results(folder: Path, posterior: Posterior, likelihood: GaussianLikelihood, truth: Tensor | None,
                  summary: dict[str, Any], title: str) -> list[Path]:
    """Write ``figure.png``, ``posterior.safetensors`` and ``metrics.json``, each whole or not at all.

    Args:
        folder: made where it does not exist.
        posterior: of B observations; truth and observation are kept in its file too, among the diagnostics.
        likelihood: of these observations.
        truth: ``(B, *image_shape)`` or None.
        summary: of :func:`invflow.report.summarise`.
        title: of the figure.

    Returns:
        The files.
    """
    figure = posterior.plot(truth, likelihood.y, observed=likelihood.operator.observed(), title=title)
    posterior.diagnostics["observation"] = likelihood.y
    if truth is not None:
        posterior.diagnostics["truth"] = truth
    return _write(folder, figure, posterior, summary)


def write_tilted_results(folder: Path, posterior: Posterior, problem: Problem, reward: Reward, summary: dict[str, Any],
                         title: str, generator: torch.Generator) -> list[Path]:
    """The files of :func:`write_results` for a problem with a reward: points in the plane are drawn beside exact ones.

    Args:
        folder: made where it does not exist.
        posterior: of B repeats.
        problem: whose exact draws are shown, where it knows how to draw them.
        reward: of the repeats.
        summary: of :func:`invflow.report.summarise_tilted`.
        title: of the figure.
        generator: draws the exact points.

    Returns:
        The files.
    """
    if posterior.image_shape != (2,):
        return _write(folder, posterior.plot(title=title), posterior, summary)
    from invflow.plot_plane import plane_figure

    exact = None
    try:
        solver = problem.exact_posterior()
        exact = solver.sample(reward.select(0), 2000, generator=generator).samples[0]
    except TypeError:  # none is known
        pass
    prior = problem.prior.generate(2000, generator=generator)
    figure = plane_figure(posterior, exact=exact, prior=prior, title=title)
    return _write(folder, figure, posterior, summary)


def _write(folder: Path, figure: Any, posterior: Posterior, summary: dict[str, Any]) -> list[Path]:
    from invflow._posterior_file import versions
    from invflow.pretrained import write_atomically
    from invflow.report import write_json

    files = [folder / "figure.png", folder / "posterior.safetensors", folder / "metrics.json"]
    write_atomically(files[0], lambda name: figure.savefig(name, format="png"))
    posterior.save(files[1])
    write_json({**summary, "settings": posterior.settings, "versions": versions()}, files[2])
    return files
