"""The part of a posterior that the views use, as a structural type, so that they need not import the class."""

# ruff: noqa: D102 - a list of what is used, not a description

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = ["Draws"]


class Draws(Protocol):
    """N samples, possibly weighted, for each of B observations; see :class:`invflow.Posterior`."""

    samples: Tensor
    log_weights: Tensor
    log_evidence: Tensor | None
    diagnostics: dict[str, Any]
    settings: dict[str, Any]
    nfe: Any
    seconds: float

    @property
    def weighted(self) -> bool: ...
    @property
    def num_samples(self) -> int: ...
    @property
    def image_shape(self) -> tuple[int, ...]: ...
    def __len__(self) -> int: ...
    def select(self, index: Any) -> Draws: ...
    def resample(self, n: int, *, generator: torch.Generator | None = None) -> Draws: ...
    def mean(self) -> Tensor: ...
    def std(self) -> Tensor: ...
    def ess(self) -> Tensor | None: ...
    def plot(self, truth: Tensor | None = None, observation: Tensor | None = None, **options: Any) -> Any: ...
