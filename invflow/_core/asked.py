"""What the command line asks an operator's class, so that it has to know none of them by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import Tensor

__all__ = ["FILES", "Asked"]

A = TypeVar("A", bound="Asked")

#: parameters that files may give, each by the option of its name: ``--mask FILE``, ``--kernel FILE``
FILES = ("mask", "kernel")


class Asked:
    """Answers for an operator of which nothing is known but its ``__init__``; a class that knows better overrides them.

    Its first parameter is ``image_shape``. Parameters called ``mask`` and ``kernel`` may be given by files,
    ``factor`` by ``--factor``, and all others by ``--operator-set``. A parameter ``generator`` says that an operator
    draws what it is not given: a measurement that exists already was made by no such draw.
    """

    @classmethod
    def file_parameters(cls) -> tuple[str, ...]:
        """Which of :data:`FILES` may give this operator its parameters: those that ``__init__`` has."""
        return tuple(name for name in FILES if name in inspect.signature(cls).parameters)

    @classmethod
    def from_files(cls: type[A], image_shape: tuple[int, ...], files: Mapping[str, Tensor], settings: Mapping[str, Any],
                   say: Callable[[str], None]) -> A:
        """Build the operator that files describe.

        Args:
            image_shape: ``(C, H, W)``.
            files: one or more of :meth:`file_parameters`: a mask ``(C, H, W)`` of zeros and ones, a kernel ``(h, w)``
                that sums to 1.
            settings: other parameters, by name.
            say: called with a sentence for each thing that is assumed.
        """
        return cls(image_shape=image_shape, **files, **settings)  # type: ignore[call-arg]

    @classmethod
    def assumptions(cls, image_shape: tuple[int, ...], given: Mapping[str, Any], *,
                    observed: bool) -> list[tuple[dict[str, Any], str]]:
        """Settings to take where nobody chose them, each lot with a sentence that says so.

        Args:
            image_shape: ``(C, H, W)``.
            given: the settings that were given, and the tensors of files.
            observed: whether somebody else made the measurement.
        """
        options = [f"--{name} FILE" for name in cls.file_parameters()]
        if observed and options and not given:
            return [({}, f"assumed the defaults of {cls.__name__}: pass {' or '.join(options)} for others")]
        return []

    @classmethod
    def image_size(cls, size: tuple[int, int], settings: Mapping[str, Any]) -> tuple[int, int]:
        """Height and width of the image of which a measurement has some size: here the same.

        Args:
            size: height and width of a measurement.
            settings: that the operator will be built with.
        """
        return size
