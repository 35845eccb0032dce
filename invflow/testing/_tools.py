"""What the contract checks share: expectations with a message, distances, a watch on the global seed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

__all__ = ["expect", "expect_close", "relative_error", "rounding", "watch_global_seed"]


def expect(condition: bool, message: str) -> None:
    """Raise an AssertionError with ``message`` unless the condition holds (also under ``python -O``)."""
    if not condition:
        raise AssertionError(message)


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
    """Expect that the block neither draws from nor seeds the global random generator."""
    before = torch.random.get_rng_state()
    yield
    expect(torch.equal(before, torch.random.get_rng_state()),
           f"{what} changed the global random state: draw with generator=, never with the global seed")
