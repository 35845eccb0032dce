"""All operators by name: the built-in ones and those of installed plug-ins.

    from invflow.operators import GaussianBlur

Plug-ins register a module under the entry-point group ``invflow.operators``; its ``__all__`` is the list.
Names are looked up when first used. :func:`find` accepts a class name or a problem class, for tools that
read names.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from invflow._core import plugins
from invflow.operator import Operator

if TYPE_CHECKING:
    from invflow_operators.blur import Blur as Blur
    from invflow_operators.blur import GaussianBlur as GaussianBlur
    from invflow_operators.blur import MotionBlur as MotionBlur
    from invflow_operators.deepinv_physics import DeepinvOperator as DeepinvOperator
    from invflow_operators.elementwise import Denoising as Denoising
    from invflow_operators.inpainting import BoxInpainting as BoxInpainting
    from invflow_operators.inpainting import FreeFormInpainting as FreeFormInpainting
    from invflow_operators.inpainting import Inpainting as Inpainting
    from invflow_operators.inpainting import MaskInpainting as MaskInpainting
    from invflow_operators.inpainting import RandomInpainting as RandomInpainting
    from invflow_operators.linear import ComposedOperator as ComposedOperator
    from invflow_operators.linear import MatrixOperator as MatrixOperator
    from invflow_operators.superresolution import SuperResolution as SuperResolution

_GROUP = "invflow.operators"


def names() -> list[str]:
    """Class names of all operators, built-in ones first."""
    return list(_all())


def _all() -> dict[str, type[Operator]]:
    return plugins.named(_GROUP, type, lambda name, kind: name if issubclass(kind, Operator) else None,
                         what="an Operator", fold=_fold)


def find(name: str) -> type[Operator]:
    """Find an operator's class by its name, written "BoxInpainting", "box-inpainting" or "box_inpainting".

    Raises:
        ValueError: If there is none; the message names the nearest.
    """
    known = names()
    folded = {_fold(k): k for k in reversed(known)}
    if _fold(name) not in folded:
        raise ValueError(f"there is no operator {name!r}: {plugins.nearest(name, known)}")
    return _all()[folded[_fold(name)]]


def _fold(name: str) -> str:
    return name.replace("-", "").replace("_", "").replace(" ", "").lower()


def __getattr__(name: str) -> Any:
    if name == "__all__":
        return names()
    if name.startswith("_"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        value = _all()[name]
    except KeyError:
        raise AttributeError(f"there is no operator {name!r}: {plugins.nearest(name, names())}") from None
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *names()})
