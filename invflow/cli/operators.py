"""Operators as the command line asks for them: by name, with masks and kernels from files."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from invflow import operators
from invflow._core.plugins import nearest
from invflow.datasets.files import read_kernel, read_mask

if TYPE_CHECKING:
    from invflow.operator import Operator

__all__ = ["kebab", "operator_by_name"]

Say = Callable[[str], None]


def kebab(name: str) -> str:
    """A class name as it is typed on the command line: ``BoxInpainting`` to ``box-inpainting``."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", name).lower()


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
    beside = [name for name in settings if kernel is None or name != "padding"]
    if beside and (mask is not None or kernel is not None):
        raise ValueError(f"--operator-set {beside[0]}=... does not go with --mask or --kernel, which give the "
                         "operator's parameters; only padding=... goes with --kernel")
    if mask is not None:
        return _masked(key, image_shape, mask, say)
    if kernel is not None:
        return _blurred(key, image_shape, kernel, observed, settings, say)
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
    border = _border(kind, observed, settings, say)
    operator: Operator = kind(image_shape, **arguments, **settings, **border)
    if observed and key in ("box-inpainting", "gaussian-blur") and not settings:
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
    kind: Any = operators.find("MaskInpainting")
    named = key not in ("mask-inpainting", "inpainting")
    return kind(mask, image_shape, key) if named else kind(mask, image_shape)


def _border(kind: type[Operator], observed: bool, settings: Mapping[str, Any], say: Say) -> dict[str, str]:
    """What to take for the border of a blur that somebody else made."""
    blur: Any = operators.find("Blur")
    if not observed or not issubclass(kind, blur) or "padding" in settings:
        return {}
    # a camera's blur brings in what lies outside the frame: to think that it wraps around rings far into the picture
    say("took what the blur brings in from outside the picture for its reflection; --operator-set padding=circular is "
        "for a blur that wraps around")
    return {"padding": "reflect"}


def _blurred(key: str, image_shape: tuple[int, ...], file: Path, observed: bool, settings: Mapping[str, Any],
             say: Say) -> Operator:
    if "blur" not in key:
        raise ValueError(f"--kernel belongs to the blurs, not to {key}")
    problem_class = None if key == "blur" else key
    if problem_class is None:
        say("an adapter takes a kernel as one of a kind that it was trained for: name it by --operator "
            "gaussian-blur or motion-blur")
    kernel = read_kernel(file, say=say)
    kind: Any = operators.find("Blur")
    border = _border(kind, observed, settings, say)
    return kind(kernel, image_shape, problem_class=problem_class, **settings, **border)
