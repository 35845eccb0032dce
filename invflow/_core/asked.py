"""Questions that the command line asks an operator's class, so that it needs no knowledge of single operators."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import Tensor

__all__ = ["FILES", "Asked"]

A = TypeVar("A", bound="Asked")

#: parameters that can be read from files, each with the option of the same name: ``--mask FILE``, ``--kernel FILE``
FILES = ("mask", "kernel")


class Asked:
    """Default answers, derived from an operator's ``__init__``. Operator classes override them where needed.

    The first parameter is ``image_shape``. Parameters called ``mask`` and ``kernel`` can be read from files, ``factor``
    is set by ``--factor``, and all others by ``--operator-set``. A parameter ``generator`` means that the operator
    draws parameters that it is not given; such a draw cannot explain a measurement that already exists.
    """

    @classmethod
    def file_parameters(cls) -> tuple[str, ...]:
        """Those of :data:`FILES` that are parameters of ``__init__``."""
        return tuple(name for name in FILES if name in inspect.signature(cls).parameters)

    @classmethod
    def from_files(cls: type[A], image_shape: tuple[int, ...], files: Mapping[str, Tensor], settings: Mapping[str, Any],
                   say: Callable[[str], None]) -> A:
        """Build the operator that files describe.

        Args:
            image_shape: Shape of an image, ``(C, H, W)``.
            files: One or more of :meth:`file_parameters`: a mask ``(C, H, W)`` of zeros and ones, a kernel ``(h, w)``
                that sums to 1.
            settings: Other parameters, by name.
            say: Function called with a sentence for each assumption.
        """
        return cls(image_shape=image_shape, **files, **settings)  # type: ignore[call-arg]

    @classmethod
    def assumptions(cls, image_shape: tuple[int, ...], given: Mapping[str, Any], *,
                    observed: bool) -> list[tuple[dict[str, Any], str]]:
        """Default settings for what the user did not choose, each set with a sentence that states the assumption.

        Args:
            image_shape: Shape of an image, ``(C, H, W)``.
            given: Settings that were given, and the tensors from files.
            observed: Whether the measurement already exists, rather than being simulated.
        """
        options = [f"--{name} FILE" for name in cls.file_parameters()]
        if observed and options and not given:
            return [({}, f"assumed the defaults of {cls.__name__}: pass {' or '.join(options)} to change them")]
        return []

    @classmethod
    def image_size(cls, size: tuple[int, int], settings: Mapping[str, Any]) -> tuple[int, int]:
        """Height and width of the image for a measurement of a given size; by default the same.

        Args:
            size: Height and width of the measurement.
            settings: Settings that the operator will be built with.
        """
        return size
