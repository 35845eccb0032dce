"""The forward models of deepinv as operators: MRI, tomography, phase retrieval, demosaicing and more."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from invflow._random import as_generator
from invflow.operator import Operator

__all__ = ["DeepinvOperator"]


class DeepinvOperator(Operator):
    """A deepinv ``Physics`` as operator, without its noise.

    The physics is copied and frozen, so that later changes to the caller's object do not reach the operator.
    Its adjoint is the vector-Jacobian product, which is exact for every physics (some of deepinv's own are
    approximate). Complex measurements are taken as pairs of reals, ``(..., 2)``, and lists of measurements as
    one vector, so that Gaussian noise means the same as for any other operator.

    Args:
        physics: a ``deepinv.physics.Physics`` or ``LinearPhysics``.
        image_shape: the shape of one image, real.
        problem_class: the name under which an adapter was trained for it.
        per_set: names of the physics' tensors whose first axis is one set of parameters for each image, such
            as ("mask",); the others are shared.
        parameters: a ``deepinv.physics.generator.PhysicsGenerator`` from which :meth:`randomize` draws; it
            needs ``per_set`` to name the tensors that it makes.

    Raises:
        TypeError: for something that is no deepinv physics.
        ValueError: for names in ``per_set`` that the physics does not have, or images that it does not take.

    Example:
        >>> import deepinv
        >>> from invflow.operators import DeepinvOperator
        >>> DeepinvOperator(deepinv.physics.Demosaicing((3, 16, 16)), image_shape=(3, 16, 16)).linear
        True
    """

    def __init__(self, physics: Any, image_shape: Sequence[int], problem_class: str | None = None,
                 per_set: Sequence[str] = (), parameters: Any = None) -> None:
        super().__init__()
        from deepinv.physics import LinearPhysics, Physics

        if not isinstance(physics, Physics):
            raise TypeError(
                f"physics is a {type(physics).__name__}, expected a deepinv.physics.Physics; an operator of your "
                "own derives from invflow.Operator"
            )
        self.physics = physics.clone().requires_grad_(False).eval()
        self.image_shape, self.problem_class = tuple(image_shape), problem_class
        self.linear = isinstance(physics, LinearPhysics)
        self.per_set, self.parameters = tuple(per_set), parameters
        self.num_sets = self._count_sets()
        probe = torch.full((self.num_sets, *self.image_shape), 0.5, device=self.device, dtype=self.dtype)
        try:
            with torch.no_grad():
                measured = self.physics.A(probe)
        except (RuntimeError, ValueError, IndexError, AssertionError) as error:
            raise ValueError(
                f"{type(physics).__name__} does not take images {tuple(probe.shape)}: {error}; pass the "
                "image_shape that it was built for, and per_set=(names) for tensors with one set for each image"
            ) from error
        self.measurement_shape = tuple(_as_real(measured).shape[1:])

    def _count_sets(self) -> int:
        missing = [name for name in self.per_set if not isinstance(getattr(self.physics, name, None), Tensor)]
        if missing:
            known = [name for name, _ in self.physics.named_buffers() if "." not in name]
            raise ValueError(f"{type(self.physics).__name__} has no tensors {missing}; it has {known}")
        counts = {len(getattr(self.physics, name)) for name in self.per_set} or {1}
        if len(counts) > 1:
            raise ValueError(f"the tensors {self.per_set} have different numbers of sets, {sorted(counts)}")
        return counts.pop()

    def forward(self, x: Tensor) -> Tensor:
        """``(n, *image_shape)`` to ``(n, *measurement_shape)``, without noise."""
        return _as_real(self.physics.A(x)).to(x.dtype)

    def pseudo_inverse(self, y: Tensor) -> Tensor:
        """deepinv's, where it has a singular value decomposition; else by conjugate gradients."""
        from deepinv.physics import DecomposablePhysics

        if isinstance(self.physics, DecomposablePhysics) and not self._complex(y):
            return self.physics.A_dagger(y)
        return super().pseudo_inverse(y)

    def _complex(self, y: Tensor) -> bool:
        probe = torch.full((self.num_sets, *self.image_shape), 0.5, device=y.device, dtype=y.dtype)
        measured = self.physics.A(probe)
        return not isinstance(measured, Tensor) or measured.is_complex()

    def randomize(self, n: int, generator: torch.Generator | None = None) -> Operator:
        """Parameters drawn by deepinv's generator; without one, sets drawn with replacement."""
        if self.parameters is None:
            return super().randomize(n, generator)
        generator = as_generator(generator)
        seed = int(torch.randint(2**31, (), generator=generator, device=generator.device))
        drawn = self.parameters.step(batch_size=n, seed=seed)
        missing = sorted(set(self.per_set) - set(drawn))
        if missing or not self.per_set:
            raise ValueError(
                f"the parameter generator draws {sorted(drawn)}, but per_set is {self.per_set}: name the tensors "
                "that it draws in per_set"
            )
        return self._with_physics(lambda name, value: drawn[name].to(value))

    def expand(self, k: int) -> Operator:
        """Each set k times."""
        if k < 1:
            raise ValueError(f"expand takes k >= 1, not k={k}")
        if self.num_sets == 1:
            return self
        return self._with_physics(lambda name, value: value.repeat_interleave(k, 0))

    def select(self, index: Any) -> Operator:
        """Some of the sets."""
        if self.num_sets == 1:
            return self
        from invflow._checks import as_index

        rows = as_index(index, self.num_sets)
        return self._with_physics(lambda name, value: value[rows.to(value.device)])

    def _with_physics(self, change: Callable[[str, Tensor], Tensor]) -> Operator:
        """A copy whose physics has other per-set tensors."""
        other = copy.copy(self)
        for part in ("_buffers", "_parameters", "_modules"):
            setattr(other, part, dict(getattr(self, part)))
        other.physics = self.physics.clone()
        for name in self.per_set:
            setattr(other.physics, name, change(name, getattr(self.physics, name)))
        other.num_sets = other._count_sets()
        return other

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DeepinvOperator:
        # Module.to(torch.float64) drops the imaginary parts of complex tensors: move those as pairs of reals
        def move(value: Tensor) -> Tensor:
            if not value.is_complex():
                return fn(value)
            return torch.view_as_complex(fn(torch.view_as_real(value.resolve_conj())).contiguous())

        return super()._apply(move, recurse)

    def __deepcopy__(self, memo: dict[int, Any]) -> DeepinvOperator:
        # deepinv's clone copies random generators too, which deepcopy alone cannot
        other = self._with_physics(lambda name, value: value)
        memo[id(self)] = other
        return other  # type: ignore[return-value]


def _as_real(measured: Any) -> Tensor:
    """Measurements ``(n, ...)`` as one real tensor: complex ones in pairs, lists flattened and joined."""
    if not isinstance(measured, Tensor):
        return torch.cat([_as_real(part).flatten(1) for part in measured], dim=1)
    if measured.is_complex():
        return torch.view_as_real(measured.resolve_conj())
    return measured if math.prod(measured.shape[1:]) else measured.flatten(1)
