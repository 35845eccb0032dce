"""Measurements offered by the app: operators with one setting each, and a painted hole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from invflow.operator import Operator

__all__ = ["DAMAGES", "HOLE", "Damage", "hole_of", "operator_of"]


@dataclass(frozen=True)
class Damage:
    """An operator in the app.

    Attributes:
        kind: Name of its class in :mod:`invflow.operators`.
        command: Name on the command line.
        setting: Setting offered in the app, or None.
        digits, photographs: Minimum, maximum, step and default of the setting.
        about: Description of the setting.
    """

    kind: str
    command: str
    setting: str | None = None
    digits: tuple[float, float, float, float] = (0, 1, 1, 0)
    photographs: tuple[float, float, float, float] = (0, 1, 1, 0)
    about: str = ""

    def range(self, prior: str) -> tuple[float, float, float, float]:
        """Minimum, maximum, step and default for a prior's images."""
        return self.photographs if prior == "photos" else self.digits

    def value(self, number: float) -> float | int:
        """Value of the setting, an integer if its steps are."""
        return int(number) if float(self.digits[2]).is_integer() else float(number)


HOLE = "painted hole"
DAMAGES = {
    HOLE: Damage("MaskInpainting", "inpainting"),
    "box": Damage("BoxInpainting", "box-inpainting", "box", (2, 24, 1, 14), (8, 128, 8, 64), "side in pixels"),
    "lost pixels": Damage("RandomInpainting", "random-inpainting", "keep", (0.05, 0.95, 0.05, 0.4),
                          (0.05, 0.95, 0.05, 0.4), "share of observed pixels"),
    "Gaussian blur": Damage("GaussianBlur", "gaussian-blur", "std", (0.5, 3, 0.1, 1.5), (0.5, 4, 0.1, 2.0),
                            "standard deviation in pixels"),
    "motion blur": Damage("MotionBlur", "motion-blur", "intensity", (0.1, 1, 0.1, 0.5), (0.1, 1, 0.1, 0.5),
                          "curvature of the path"),
    "low resolution": Damage("SuperResolution", "super-resolution", "factor", (2, 7, 1, 4), (2, 4, 1, 2),
                             "times smaller"),
    "noise alone": Damage("Denoising", "denoising"),
}


def hole_of(opacity: Tensor, size: tuple[int, int]) -> Tensor:
    """Pixels of an image that the paint hides.

    Args:
        opacity: Opacity of the paint, ``(H, W)`` in [0, 1], on a canvas of any size.
        size: Height and width of the image.

    Returns:
        ``(height, width)`` bool: True where at least a quarter of the pixel is painted.
    """
    share = torch.nn.functional.interpolate((opacity > 0.1).float()[None, None], size=size, mode="area")[0, 0]
    return share >= 0.25


def operator_of(damage: str, parameter: float, shape: tuple[int, ...], hole: Tensor | None,
                generator: torch.Generator) -> Operator:
    """Build the chosen operator.

    Args:
        damage: Key of :data:`DAMAGES`.
        parameter: Value of its setting, if it has one.
        shape: ``(C, H, W)``.
        hole: ``(H, W)`` bool, True where hidden; for :data:`HOLE`.
        generator: Source of randomness.

    Raises:
        ValueError: If the hole hides nothing or everything, or a setting is out of range.
    """
    import inspect

    from invflow import operators

    chosen = DAMAGES[damage]
    kind: Any = operators.find(chosen.kind)
    if damage == HOLE:
        if hole is None or not bool(hole.any()):
            raise ValueError("no hole is painted yet: paint over the image with the brush, or choose another damage")
        if bool(hole.all()):
            raise ValueError("the whole image is painted over: leave some of it visible")
        painted: Operator = kind((~hole)[None], shape)
        return painted
    own: dict[str, Any] = {} if chosen.setting is None else {chosen.setting: chosen.value(parameter)}
    if "generator" in inspect.signature(kind).parameters:
        own["generator"] = generator
    built: Operator = kind(shape, **own)
    return built
