"""Checks for mistakes that would change samples silently: images modified in place, and gradients that are disabled."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

__all__ = ["check_gradients", "check_untouched", "version", "watched", "without_gradients"]


def without_gradients() -> AbstractContextManager[Any]:
    """Inference mode for the library's networks if gradients are already off: a twentieth faster for a single image.

    Tensors made inside cannot take part in gradients later: copy those that leave the context.
    """
    return nullcontext() if torch.is_grad_enabled() else torch.inference_mode()


def version(x: Any) -> int | None:
    """Number of writes to a tensor; None if they are not counted, as for tensors of inference mode."""
    if not isinstance(x, Tensor) or torch.compiler.is_compiling() or x.is_inference():
        return None
    return int(x._version)


def check_untouched(x: Any, before: int | None, what: str) -> None:
    """Raise if a function has modified its input images in place.

    Raises:
        ValueError: If it has; the message says how to avoid it.
    """
    if before is not None and version(x) != before:
        raise ValueError(f"{what} changed its images in place, but the caller still uses them: write x = x - 2 instead "
                         "of x.sub_(2), or begin with x = x.clone()")


def watched(method: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Wrap a reward's ``__call__`` so that it raises if it modifies its images."""

    @functools.wraps(method)
    def wrapper(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        before = version(x)
        values = method(self, x, *args, **kwargs)
        check_untouched(x, before, f"the reward {type(self).__name__}")
        return values

    return wrapper


def check_gradients(what: str) -> None:
    """Raise if gradients are needed but cannot be enabled.

    Raises:
        RuntimeError: In :func:`torch.inference_mode`, which cannot be undone for tensors made inside it.
    """
    if torch.is_inference_mode_enabled():
        raise RuntimeError(f"{what} takes gradients, and torch.inference_mode() forbids them: leave it out, or use "
                           "torch.no_grad(), inside which solvers enable gradients where they need them")
