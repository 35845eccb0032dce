"""Mistakes that would change samples without a word: images written to in place, gradients where there are none."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

__all__ = ["check_gradients", "check_untouched", "version", "watched", "without_gradients"]


def without_gradients() -> AbstractContextManager[Any]:
    """Inference mode for networks of ours where gradients are off already: by a twentieth quicker for a single image.

    What is made inside takes no part in gradients later: copy what leaves it.
    """
    return nullcontext() if torch.is_grad_enabled() else torch.inference_mode()


def version(x: Any) -> int | None:
    """How often a tensor was written to; None for what does not count it, as tensors of inference mode do not."""
    if not isinstance(x, Tensor) or torch.compiler.is_compiling() or x.is_inference():
        return None
    return int(x._version)


def check_untouched(x: Any, before: int | None, what: str) -> None:
    """Refuse what has written to the images that it was given.

    Raises:
        ValueError: with the mend.
    """
    if before is not None and version(x) != before:
        raise ValueError(f"{what} changed its images in place, which the caller goes on with: write x = x - 2 for "
                         "x.sub_(2), or begin with x = x.clone()")


def watched(method: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A reward's ``__call__`` that is refused if it writes to its images."""

    @functools.wraps(method)
    def wrapper(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        before = version(x)
        values = method(self, x, *args, **kwargs)
        check_untouched(x, before, f"the reward {type(self).__name__}")
        return values

    return wrapper


def check_gradients(what: str) -> None:
    """Refuse to go on without gradients where they are needed.

    Raises:
        RuntimeError: in :func:`torch.inference_mode`, which nothing inside of it can undo for tensors made there.
    """
    if torch.is_inference_mode_enabled():
        raise RuntimeError(f"{what} takes gradients, and torch.inference_mode() forbids them: leave it out, or use "
                           "torch.no_grad(), within which solvers switch them on where they need them")
