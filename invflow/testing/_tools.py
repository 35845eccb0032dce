"""What the contract checks share: expectations with a message, distances, a watch on the global seeds."""

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
#: what the global generators are set to during a check: no plug-in that seeds them will guess it
_UNLIKELY_SEED = 1_734_806_219


def expect(condition: bool, message: str) -> None:
    """Raise an AssertionError with ``message`` unless the condition holds (also under ``python -O``)."""
    if not condition:
        raise AssertionError(message)


def attempt(call: Callable[[], _T], what: str, advice: str) -> _T:
    """The result of a call into a plug-in; whatever it raises becomes an AssertionError that says what was tried."""
    try:
        return call()
    except AssertionError:
        raise
    except Exception as error:
        reason = (str(error).strip().splitlines() or ["no message"])[0]
        raise AssertionError(f"{what} raised {type(error).__name__}: {reason}. {advice}") from error


def root_mean_square(value: Tensor) -> float:
    """Of all entries, in float64."""
    return float(value.detach().double().square().mean().sqrt())


def relative_error(value: Tensor, reference: Tensor, floor: float = 1e-3) -> float:
    """Root-mean-square difference over that of the reference, or ``floor`` if that is more; in float64."""
    scale = reference.double().square().mean().sqrt().clamp(min=floor)
    return float((value.double() - reference.double()).square().mean().sqrt() / scale)


def expect_close(value: Tensor, reference: Tensor, tolerance: float, what: str, advice: str,
                 floor: float = 1e-3) -> None:
    """Expect the same shape, finite values and a relative error within ``tolerance``; say by how much not."""
    expect(value.shape == reference.shape,
           f"{what}: shape {tuple(value.shape)}, expected {tuple(reference.shape)}. {advice}")
    error = relative_error(value, reference, floor)
    expect(error <= tolerance,  # also false for NaN
           f"{what}: relative difference {error:.2e} (root mean square), allowed {tolerance:.1e}. {advice}")


def rounding(dtype: torch.dtype) -> float:
    """Relative difference that a change of batch size may make: a few hundred units in the last place."""
    return 1e-10 if dtype == torch.float64 else 1e-4


@contextmanager
def watch_global_seed(what: str) -> Iterator[None]:
    """Expect that the block neither draws from nor seeds a global random generator: torch's, numpy's or Python's.

    The generators are first set to a state that no plug-in seeds them to, lest one that calls ``manual_seed(0)`` go
    unnoticed where a test has just done the same; afterwards they are as they were.
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
           f"{what} changed the global random state, {' and '.join(changed)}: draw from the generator that is passed "
           "as generator=, and neither draw from nor seed a global one")


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
