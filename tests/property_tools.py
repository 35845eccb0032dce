"""Shared by the property-based tests: the number of examples and their ingredients.

The examples are the same in each run (hypothesis's ``derandomize``), so a slow machine or bad luck fails no test.
``INVFLOW_PROPERTIES=20`` makes twenty times as many, drawn anew in each run; ``python tests/generated_calls.py`` runs
all of them in this way and counts them.
"""

from __future__ import annotations

import collections
import functools
import os
import warnings
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

__all__ = ["CALLS", "assert_near", "dtypes", "generator", "property_test", "seeds", "tensor"]

FACTOR = int(os.environ.get("INVFLOW_PROPERTIES", "1"))
#: examples that were run, by test
CALLS: collections.Counter[str] = collections.Counter()

seeds = st.integers(0, 2**31)
dtypes = st.sampled_from([torch.float32, torch.float64])


def property_test(examples: int, **strategies: st.SearchStrategy[Any]) -> Callable[[Callable[..., None]], Any]:
    """A test of so many examples, each counted; warnings about few particles are no news here."""

    def decorate(test: Callable[..., None]) -> Any:
        @settings(max_examples=examples * FACTOR, derandomize=FACTOR == 1, deadline=None, database=None,
                  suppress_health_check=list(HealthCheck), print_blob=True)
        @given(**strategies)
        @functools.wraps(test)
        def counted(*args: Any, **kwargs: Any) -> None:
            CALLS[test.__name__] += 1
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                test(*args, **kwargs)

        return counted

    return decorate


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tensor(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard normal numbers, from a seed: thousands of values would tell hypothesis nothing."""
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64).to(dtype)


def assert_near(value: Tensor, reference: Tensor, tolerance: float, scale: float | Tensor = 1.0) -> None:
    """Equal to a share of the reference's largest value, or of ``scale`` where that is more."""
    assert value.shape == reference.shape, f"{tuple(value.shape)} against {tuple(reference.shape)}"
    value, reference = value.double(), reference.double()
    largest = max(float(reference.abs().max()), float(torch.as_tensor(scale).abs().max()))
    error = float((value - reference).abs().max())
    assert error <= tolerance * largest, f"differs by {error:.3g} of {largest:.3g}, allowed {tolerance:.0e}"
