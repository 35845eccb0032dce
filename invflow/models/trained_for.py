"""Training ranges of an adapter by problem class (noise levels, operators), and factors of the correction."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from invflow.operator import Operator

__all__ = ["KNEE", "TrainedFor", "operator_traits"]

# noise levels are interpolated in the logarithm of (level + this offset)
KNEE = 0.01


# numbers of an operator that show whether it resembles the training operators, and the tolerance outside their range
NUM_TRAITS, TRAIT_MARGIN = 2, 0.02


def operator_traits(operator: Operator) -> Tensor:
    """Two numbers of each set of an operator's parameters, ``(num_sets, 2)``, that measure how much it observes.

    The share of pixels observed directly, and the mean power that a kernel passes at low frequencies, if it
    has a kernel; both from :meth:`invflow.Operator.context`.
    """
    maps, summary = operator.context()
    return torch.stack([maps.flatten(1).mean(1), 2 * summary.square().mean(1)], dim=1)


class TrainedFor:
    """Training ranges of an adapter by problem class, and factors fitted to its samples.

    Attributes:
        classes: Problem classes.
        deviations: Whether the adapter predicts how far each pixel of a sample may have to move.
    """

    classes: tuple[str, ...]
    deviations: bool

    def inside_levels(self, name: str, sigma: Tensor) -> Tensor | None:
        """Whether noise levels ``(n,)`` are inside the training range; None: unknown."""
        if name not in self.levels:
            return None
        low, high = self.levels[name]
        return (sigma >= low * (1 - 1e-3)) & (sigma <= high * (1 + 1e-3))

    def nearest_level(self, name: str, sigma: Tensor) -> Tensor:
        """Noise levels ``(n,)``, clamped to the training range where it is known."""
        return sigma.clamp(*self.levels[name]) if name in self.levels else sigma

    def inside_traits(self, name: str, operator: Operator) -> Tensor | None:
        """Whether each set of an operator's parameters resembles training operators, ``(num_sets,)``; None: unknown."""
        if name not in self.traits:
            return None
        found = operator_traits(operator)
        low, high = found.new_tensor(self.traits[name]).unbind(1)
        return ((found >= low - TRAIT_MARGIN) & (found <= high + TRAIT_MARGIN)).all(1)

    def correction(self, name: str, sigma: Tensor) -> Tensor | None:
        """Factors of the deviations at noise levels ``(n,)`` of a problem class; None: do not correct its samples."""
        if name not in self.consistency:
            return None
        levels, factors = (sigma.new_tensor(column) for column in zip(*self.consistency[name]))
        place, ends = (sigma + KNEE).log(), (levels + KNEE).log()
        after = torch.searchsorted(ends, place).clamp(1, len(ends) - 1) if len(ends) > 1 else place.new_zeros(
            len(place), dtype=torch.long)
        before = (after - 1).clamp(min=0)
        share = ((place - ends[before]) / (ends[after] - ends[before]).clamp(min=1e-12)).clamp(0, 1)
        return torch.lerp(factors[before], factors[after], share)

    def _known(self) -> dict[str, Any]:
        """Entries added to the configuration since the first adapters were saved, if not empty."""
        found = {"deviations": self.deviations, "levels": {k: list(v) for k, v in self.levels.items()},
                 "traits": {k: [list(pair) for pair in v] for k, v in self.traits.items()},
                 "consistency": {k: [list(pair) for pair in v] for k, v in self.consistency.items()}}
        return {key: value for key, value in found.items() if value}

    @property
    def levels(self) -> dict[str, tuple[float, float]]:
        """Lowest and highest noise level in training, by problem class."""
        return dict(self._levels)

    @levels.setter
    def levels(self, levels: Mapping[str, Sequence[float]]) -> None:
        self._levels: dict[str, tuple[float, float]] = {}
        for name, pair in levels.items():
            self._check_class("levels", name)
            low, high = (float(level) for level in pair)
            if not 0 <= low <= high < math.inf:
                raise ValueError(f"levels[{name!r}] is {low} to {high}: pass noise levels, 0 <= low <= high")
            self._levels[name] = (low, high)

    @property
    def traits(self) -> dict[str, tuple[tuple[float, float], ...]]:
        """Lowest and highest :func:`operator_traits` in training, by problem class."""
        return dict(self._traits)

    @traits.setter
    def traits(self, traits: Mapping[str, Sequence[Sequence[float]]]) -> None:
        self._traits: dict[str, tuple[tuple[float, float], ...]] = {}
        for name, pairs in traits.items():
            self._check_class("traits", name)
            table = tuple((float(low), float(high)) for low, high in pairs)
            if len(table) != NUM_TRAITS or not all(low <= high for low, high in table):
                raise ValueError(f"traits[{name!r}] is {table}: pass {NUM_TRAITS} pairs (low, high)")
            self._traits[name] = table

    @property
    def consistency(self) -> dict[str, tuple[tuple[float, float], ...]]:
        """Factors of the pixels' deviations by problem class, as pairs (noise level, factor)."""
        return dict(self._consistency)

    @consistency.setter
    def consistency(self, factors: Mapping[str, Sequence[Sequence[float]]]) -> None:
        self._consistency: dict[str, tuple[tuple[float, float], ...]] = {}
        for name, pairs in factors.items():
            self._check_class("consistency", name)
            table = tuple((float(level), float(factor)) for level, factor in pairs)
            rising = all(a[0] < b[0] for a, b in pairwise(table))
            if not table or not rising or not all(0 <= v < math.inf for pair in table for v in pair):
                raise ValueError(f"consistency[{name!r}] is {table}: pass pairs (noise level, factor), levels rising, "
                                 "no number below 0")
            self._consistency[name] = table

    def _check_class(self, what: str, name: str) -> None:
        if name not in self.classes:
            raise ValueError(f"{what} names the class {name!r}, but the adapter knows {', '.join(self.classes)}")
