"""Builds operators for the command line: by name, with masks and kernels from files."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from invflow import operators
from invflow._core.checks import check_setting
from invflow._core.plugins import kebab, nearest
from invflow.datasets.files import read_kernel, read_mask

if TYPE_CHECKING:
    from invflow.operator import Operator

__all__ = ["kebab", "operator_by_name", "operator_class"]

Say = Callable[[str], None]


def operator_class(name: str) -> tuple[str, Any]:
    """Look up an operator: its name as typed on the command line, and its class.

    Raises:
        ValueError: If the name is unknown; the message has the nearest known one.
    """
    known = {kebab(key): key for key in operators.names()}
    key = kebab(name)
    if key not in known:
        raise ValueError(f"there is no operator {name!r}: {nearest(key, list(known))}")
    return key, operators.find(known[key])


def operator_by_name(name: str, image_shape: tuple[int, ...], *, factor: int | None = None,
                     mask: Path | None = None, mask_hides: str | None = None,
                     kernel: Path | None = None, observed: bool = False, settings: Mapping[str, Any] | None = None,
                     generator: torch.Generator | None = None, say: Say = print) -> Operator:
    """Build an operator from command-line options.

    Args:
        name: Name of the operator, such as ``"box-inpainting"``.
        image_shape: Image shape ``(C, H, W)``.
        factor: Factor of super-resolution.
        mask: File of a mask; the operator's name then determines the problem class for the adapter.
        mask_hides: Colour of the mask's hidden pixels, ``"white"`` or ``"black"``.
        kernel: File of a blur kernel; the same holds for the problem class.
        observed: Whether a measurement exists already, so that no parameter may be drawn at random.
        settings: Other parameters of the operator, by name.
        generator: Generator for random parameters.
        say: Called with a sentence for each assumption.

    Returns:
        The operator, with one parameter set.

    Raises:
        ValueError: If the name is unknown (the message has the nearest known one), or if the options do not fit it.
    """
    key, kind = operator_class(name)
    settings = dict(settings or {}) | ({} if factor is None else {"factor": factor})
    parameters = inspect.signature(kind).parameters
    if factor is not None and "factor" not in parameters:
        raise ValueError(f"--factor belongs to {_those_with('factor')}, not to {key}")
    _check_settings(key, settings, parameters, factor is not None)
    if mask_hides is not None and mask is None:
        raise ValueError("--mask-hides needs a mask: pass --mask FILE too")
    asked = {option: file for option, file in (("mask", mask), ("kernel", kernel)) if file is not None}
    for option in asked:
        if option not in kind.file_parameters():
            raise ValueError(f"--{option} belongs to {_those_with(option)}, not to {key}")
    # a kernel for degrading an image is used as it is; the kernel of an observed blur is centred
    files = {option: read_mask(file, image_shape, hides=mask_hides, say=say) if option == "mask"
             else read_kernel(file, centre=observed, say=say) for option, file in asked.items()}
    settings = {name: check_setting(key, name, value, parameters[name]) for name, value in settings.items()}
    for extra, sentence in kind.assumptions(image_shape, {**settings, **files}, observed=observed):
        settings |= extra
        say(sentence)
    if files:
        from_files: Operator = kind.from_files(image_shape, files, settings, say)
        return from_files
    _check_needed(key, kind, parameters, settings, observed)
    drawn = {"generator": generator} if "generator" in parameters else {}
    operator: Operator = kind(image_shape, **drawn, **settings)
    return operator


def _those_with(option: str) -> str:
    """Names of the operators that an option belongs to."""
    kinds = [(name, operators.find(name)) for name in operators.names()]
    found = [kebab(name) for name, kind in kinds
             if option in (*kind.file_parameters(), *inspect.signature(kind).parameters)]
    return ", ".join(found) or "no installed operator"


def _check_needed(key: str, kind: Any, parameters: Mapping[str, inspect.Parameter], settings: Mapping[str, Any],
                  observed: bool) -> None:
    """Check that no parameter is missing and that, for an existing measurement, none would be drawn at random."""
    for name, parameter in parameters.items():
        if (parameter.default is not parameter.empty or parameter.kind is not parameter.POSITIONAL_OR_KEYWORD
                or name in (*settings, "image_shape")):
            continue
        if name in kind.file_parameters():
            raise ValueError(f"{key} needs its {name}: pass --{name} FILE")
        raise ValueError(f"{key} needs its {name}: pass --operator-set {name}=..., or build it in Python if "
                         "it is not a number or a word")
    if observed and "generator" in parameters:
        ways = " or ".join(f"--{name} FILE" for name in kind.file_parameters()) or "--observed with another operator"
        raise ValueError(f"{key} draws its parameters at random, but an observed file was measured with "
                         f"fixed ones: pass {ways}")


def _check_settings(key: str, settings: Mapping[str, Any], parameters: Mapping[str, inspect.Parameter],
                    with_factor: bool) -> None:
    """Check that the operator has these settings and that no other option sets them."""
    options = {"image_shape": "the prior", "generator": "--seed", "mask": "--mask", "kernel": "--kernel",
               "factor": "--factor"}
    named = [p for p, v in parameters.items() if v.kind in (v.POSITIONAL_OR_KEYWORD, v.KEYWORD_ONLY)]
    known = [p for p in named if p not in options]
    for name in settings:
        if name == "factor" and with_factor:
            continue
        if name in options and name in parameters:
            raise ValueError(f"the {name} of {key} is given by {options[name]}, not by --operator-set")
        if name not in known:
            knows = f"it has {', '.join(known)}" if known else "it has none"
            raise ValueError(f"the operator {key} has no setting {name!r}: {knows}")
