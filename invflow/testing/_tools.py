"""Tools of the contract checks: expectations with a message, distances, and a check of the global random state."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

__all__ = ["attempt", "expect", "expect_close", "relative_error", "root_mean_square", "rounding", "watch_global_seed"]

_T = TypeVar("_T")
#: seed of the global generators during a check; no plug-in will use the same one
_UNLIKELY_SEED = 1_734_806_219


def expect(condition: bool, message: str) -> None:
    """Raise an AssertionError with ``message`` unless the condition holds (also under ``python -O``)."""
    if not condition:
        raise AssertionError(message)


def attempt(call: Callable[[], _T], what: str, advice: str) -> _T:
    """Call a plug-in; turn any exception into an AssertionError that says what was tried."""
    try:
        return call()
    except AssertionError:
        raise
    except Exception as error:
        reason = (str(error).strip().splitlines() or ["no message"])[0]
        raise AssertionError(f"{what} raised {type(error).__name__}: {reason}. {advice}") from error


def root_mean_square(value: Tensor) -> float:
    """Root mean square of all entries, in float64."""
    return float(value.detach().double().square().mean().sqrt())


def relative_error(value: Tensor, reference: Tensor, floor: float = 1e-3) -> float:
    """Root-mean-square difference divided by that of the reference, or by ``floor`` if larger; in float64."""
    scale = reference.double().square().mean().sqrt().clamp(min=floor)
    return float((value.double() - reference.double()).square().mean().sqrt() / scale)


def expect_close(value: Tensor, reference: Tensor, tolerance: float, what: str, advice: str,
                 floor: float = 1e-3) -> None:
    """Check for equal shapes, finite values and a relative error within ``tolerance``."""
    expect(value.shape == reference.shape,
           f"{what}: shape {tuple(value.shape)}, expected {tuple(reference.shape)}. {advice}")
    error = relative_error(value, reference, floor)
    expect(error <= tolerance,  # also false for NaN
           f"{what}: relative difference {error:.2e} (root mean square), allowed {tolerance:.1e}. {advice}")


def rounding(dtype: torch.dtype) -> float:
    """Relative difference allowed for a change of batch size: a few hundred units in the last place."""
    return 1e-10 if dtype == torch.float64 else 1e-4


@contextmanager
def watch_global_seed(what: str) -> Iterator[None]:
    """Check that the block neither draws from nor seeds a global random generator of torch, numpy or Python.

    The generators are first set to a state that no plug-in seeds them to. Otherwise ``manual_seed(0)`` would go
    unnoticed if a test has just called it too. Afterwards, their state is restored.
    """
    kept = _global_states()
    torch.default_generator.manual_seed(_UNLIKELY_SEED)
    np.random.seed(_UNLIKELY_SEED)  # noqa: NPY002
    random.seed(_UNLIKELY_SEED)
    try:
        before = _global_states()
        yield
        after = _global_states()
    finally:
        torch.random.set_rng_state(kept["torch's"])
        np.random.set_state(kept["numpy's"])  # noqa: NPY002
        random.setstate(kept["Python's"])
    changed = [name for name in before if not _same(before[name], after[name])]
    expect(not changed,
           f"{what} changed the global random state, {' and '.join(changed)}: draw from the generator passed "
           "as generator=, and do not use or seed a global one")


def _global_states() -> dict[str, Any]:
    states: dict[str, Any] = {"torch's": torch.random.get_rng_state(), "numpy's": np.random.get_state(),  # noqa: NPY002
                              "Python's": random.getstate()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["torch's on CUDA"] = torch.cuda.get_rng_state()
    return states


def _same(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor):
        return torch.equal(first, second)
    return all(np.array_equal(a, b) for a, b in zip(first, second))
