"""The forward models of deepinv as operators: MRI, tomography, phase retrieval, demosaicing and more."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from invflow.operator import Operator
from invflow.plugins import Index, as_generator, as_index

__all__ = ["DeepinvOperator"]


class DeepinvOperator(Operator):
    """A deepinv ``Physics`` as an operator, without its noise.

    The physics is copied and frozen, so later changes to the caller's object do not affect the operator.
    The adjoint is the vector-Jacobian product, which is exact for every physics (some of deepinv's own adjoints are
    approximate). Complex measurements become pairs of reals, ``(..., 2)``, and lists of measurements become one vector,
    so Gaussian noise has the same meaning as for any other operator. A physics of complex images is given the real
    images with a zero imaginary part.

    Args:
        physics: A ``deepinv.physics.Physics`` or ``LinearPhysics``.
        image_shape: Shape of one image, real.
        problem_class: Name of the operator's problem class, for adapters.
        per_set: Names of the physics' tensors that hold one set of parameters for each image along their first axis,
            such as ("mask",); all images share the other tensors.
        physics_generator: A ``deepinv.physics.generator.PhysicsGenerator`` from which :meth:`randomize` draws
            the tensors named in ``per_set``.

    Raises:
        TypeError: If ``physics`` is not a deepinv physics.
        ValueError: For names in ``per_set`` that the physics does not have, or images that it does not take.

    Example:
        >>> import deepinv
        >>> from invflow.operators import DeepinvOperator
        >>> DeepinvOperator(deepinv.physics.Demosaicing((3, 16, 16)), image_shape=(3, 16, 16)).linear
        True
    """

    measured_entries: Tensor
    _complete: tuple[Tensor, bool] | None = None  # the last entries tensor, and whether all entries are observed

    def __init__(self, physics: Any, image_shape: Sequence[int], problem_class: str | None = None,
                 per_set: Sequence[str] = (), physics_generator: Any = None) -> None:
        super().__init__()
        from deepinv.physics import LinearPhysics, Physics

        if not isinstance(physics, Physics):
            raise TypeError(
                f"physics is a {type(physics).__name__}, expected a deepinv.physics.Physics; write your own operator "
                "as a subclass of invflow.Operator"
            )
        self.physics = physics.clone().requires_grad_(False).eval()
        # noise and sensor are not part of the operator, and deepinv's cannot be pickled
        self.physics.noise_model, self.physics.sensor_model = torch.nn.Identity(), torch.nn.Identity()
        self.image_shape, self.problem_class = tuple(image_shape), problem_class
        self.linear = isinstance(physics, LinearPhysics)
        self.per_set, self.physics_generator = tuple(per_set), physics_generator
        self.num_sets = self._count_sets()
        self._plain, self._complex_images = False, False
        measured = self._probe()
        self.measurement_shape = tuple(measured.shape[1:])
        self.register_buffer("measured_entries", self._find_measured(measured), persistent=False)

    def _probe(self) -> Tensor:
        """Measure random images to find the shape and whether measurements are complex."""
        generator = torch.Generator().manual_seed(0)
        images = torch.rand(self.num_sets, *self.image_shape, generator=generator).to(self.device, self.dtype)
        errors = []
        for self._complex_images in (False, True):
            try:
                with torch.no_grad():
                    measured = self.physics.A(self._as_input(images))
                self._plain = isinstance(measured, Tensor) and not measured.is_complex()
                return _as_real(measured)
            except (RuntimeError, TypeError, ValueError, IndexError, AssertionError) as error:
                errors.append(error)
        raise ValueError(
            f"{type(self.physics).__name__} does not take images {tuple(images.shape)}: {errors[0]}; pass "
            "the image_shape that it was built for, and list in per_set the tensors with one set for each image"
        ) from errors[0]

    def _find_measured(self, measured: Tensor) -> Tensor:
        """Entries ``(num_sets, *measurement_shape)`` that depend on the image; a mask zeroes the rest.

        A nonlinear physics may give the same measurement for most images and still distinguish others, for example
        if it saturates. For such a physics, only entries that its own ``mask`` sets to zero are dropped.
        """
        with torch.no_grad():
            grey = torch.full((self.num_sets, *self.image_shape), 0.5, device=self.device, dtype=self.dtype)
            # two images, because a random pixel is grey by chance, once in 2^24 in single precision
            constant = [measured == _as_real(self.physics.A(self._as_input(x))) for x in (grey, grey / 2)]
            unseen = constant[0] & constant[1]
            return ~unseen if self.linear else ~(unseen & self._masked(unseen))

    def _masked(self, like: Tensor) -> Tensor:
        """Entries where a ``mask`` of the measurement is zero; none if the physics has no such mask."""
        mask = getattr(self.physics, "mask", None)
        try:
            return (mask == 0).expand_as(like) if isinstance(mask, Tensor) else torch.zeros_like(like)
        except RuntimeError:  # the mask has another meaning
            return torch.zeros_like(like)

    def _as_input(self, x: Tensor) -> Tensor:
        return torch.complex(x, torch.zeros_like(x)) if self._complex_images else x

    def observed(self) -> Tensor | None:
        """Entries that depend on the image; None if all do."""
        entries = self.measured_entries
        if self._complete is None or self._complete[0] is not entries:  # checked once per tensor: it waits for a GPU
            self._complete = entries, bool(entries.all())
        return None if self._complete[1] else entries

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
        return _as_real(self.physics.A(self._as_input(x))).to(x.dtype)

    @staticmethod
    def as_measurement(measured: Any) -> Tensor:
        """Convert a measurement of the physics to one of this operator: complex numbers to pairs, lists joined.

        Args:
            measured: ``(n, ...)``, real or complex, or a list of such.

        Returns:
            ``(n, *measurement_shape)``, real.
        """
        return _as_real(measured)

    def pseudo_inverse(self, y: Tensor) -> Tensor:
        """Pseudo-inverse: deepinv's if the physics has a singular value decomposition, else by conjugate gradients."""
        from deepinv.physics import DecomposablePhysics

        if isinstance(self.physics, DecomposablePhysics) and self._plain:
            result: Tensor = self.physics.A_dagger(y)
            return result
        return super().pseudo_inverse(y)

    def randomize(self, n: int, generator: torch.Generator | None = None) -> Operator:
        """Draw parameters with deepinv's generator; without one, draw sets with replacement."""
        if self.physics_generator is None:
            return super().randomize(n, generator)
        generator = as_generator(generator)
        seed = int(torch.randint(2**31, (), generator=generator, device=generator.device))
        drawn = self.physics_generator.step(batch_size=n, seed=seed)
        missing = sorted(set(self.per_set) - set(drawn))
        if missing or not self.per_set:
            raise ValueError(
                f"the physics generator draws {sorted(drawn)}, but per_set is {self.per_set}: list in per_set "
                "the tensors that are drawn"
            )
        own = {name: getattr(self.physics, name) for name in self.per_set}
        for name, value in own.items():
            if drawn[name].shape[1:] != value.shape[1:]:
                raise ValueError(
                    f"the physics generator draws {name} of shape {tuple(drawn[name].shape[1:])}, the "
                    f"physics has {tuple(value.shape[1:])}: build it with the shape that the generator draws"
                )
        other = self._with_physics({name: drawn[name].to(value) for name, value in own.items()})
        other.measured_entries = other._find_measured(other._probe())
        return other

    def expand(self, k: int) -> Operator:
        """Repeat each set k times."""
        if k < 1:
            raise ValueError(f"k={k} is too small: pass k >= 1")
        if self.num_sets == 1:
            return self
        return self._change(lambda value: value.repeat_interleave(k, 0))

    def select(self, index: Index) -> Operator:
        """Some of the sets."""
        if self.num_sets == 1:
            return self
        rows = as_index(index, self.num_sets)
        return self._change(lambda value: value[rows.to(value.device)])

    def _change(self, change: Callable[[Tensor], Tensor]) -> DeepinvOperator:
        """Copy with the same change to every per-set tensor."""
        other = self._with_physics({name: change(getattr(self.physics, name)) for name in self.per_set})
        other.measured_entries = change(self.measured_entries)
        return other

    def _with_physics(self, sets: dict[str, Tensor]) -> DeepinvOperator:
        """Copy whose physics has other per-set tensors."""
        other = _shallow_copy(self)
        if sets:
            other.physics.update_parameters(**sets)  # also updates the tensors that the physics derives from them
        for name, value in sets.items():
            if not torch.equal(getattr(other.physics, name), value):  # deepinv ignores unknown names
                raise TypeError(f"{type(self.physics).__name__} cannot change {name}: remove it from per_set")
        other.num_sets = other._count_sets()
        result: DeepinvOperator = other
        return result

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DeepinvOperator:
        # Module.to(torch.float64) drops the imaginary parts of complex tensors: convert those as pairs of reals
        def move(value: Tensor) -> Tensor:
            if not value.is_complex():
                return fn(value)
            return torch.view_as_complex(fn(torch.view_as_real(value.resolve_conj())).contiguous())

        super()._apply(move, recurse)  # type: ignore[no-untyped-call]  # torch's method has no types
        if self.per_set:  # tensors derived from these were converted to the new dtype, not recomputed in it
            self.physics.update_parameters(**{name: getattr(self.physics, name) for name in self.per_set})
        self._probe()  # some physics update derived tensors on first use: do that now
        return self

    def __getstate__(self) -> dict[str, Any]:
        # default functions of deepinv's classes are lambdas, which pickle cannot find by name
        return {**vars(self), "_modules": {**self._modules, "physics": _exchanged(self.physics, _as_lambda)}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]  # torch's method has no types
        self.physics = _exchanged(self.physics, lambda _, value: value.find() if isinstance(value, _Lambda) else value)

    def __copy__(self) -> DeepinvOperator:
        other = type(self).__new__(type(self))
        vars(other).update(vars(self))
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> DeepinvOperator:
        # deepinv's clone copies random generators too, which deepcopy alone cannot
        other = _shallow_copy(self)
        other.physics = self.physics.clone()
        memo[id(self)] = other
        result: DeepinvOperator = other
        return result


@dataclass(frozen=True)
class _Lambda:
    """Position of a lambda in the ``__init__`` of a class: a parameter's default, or a constant of the code."""

    owner: type
    place: str | int

    def find(self) -> Any:
        """The lambda itself, or an equal one."""
        made = vars(self.owner)["__init__"]
        if isinstance(self.place, str):
            return inspect.signature(made).parameters[self.place].default
        return FunctionType(made.__code__.co_consts[self.place], made.__globals__)


def _as_lambda(module: Any, value: Any) -> Any:
    """Replace a lambda without closure from a class of the module by a reference to it."""
    if not isinstance(value, FunctionType) or "<lambda>" not in value.__qualname__ or value.__closure__:
        return value
    for owner in type(module).__mro__:
        made = vars(owner).get("__init__")
        if isinstance(made, FunctionType):
            places: list[tuple[str | int, Any]] = [(p.name, p.default)
                                                   for p in inspect.signature(made).parameters.values()]
            places += [(i, value) for i, code in enumerate(made.__code__.co_consts) if code is value.__code__]
            for place, found in places:
                if found is value:
                    return _Lambda(owner, place)
    return value


def _exchanged(module: Any, change: Callable[[Any, Any], Any]) -> Any:
    """A shallow copy in which the plain attributes of all modules are changed."""
    other = _shallow_copy(module)
    for part in other.modules():
        vars(part).update({name: change(part, value) for name, value in vars(part).items()})
    return other


def _shallow_copy(module: Any) -> Any:
    """Copy that shares the original's tensors but not its dictionaries, also in submodules."""
    other = copy.copy(module)
    for part in ("_buffers", "_parameters"):
        setattr(other, part, dict(getattr(module, part)))
    other._modules = {name: child and _shallow_copy(child) for name, child in module._modules.items()}
    return other


def _as_real(measured: Any) -> Tensor:
    """Measurements ``(n, ...)`` as one real tensor: complex ones as pairs, lists flattened and joined."""
    if not isinstance(measured, Tensor):
        return torch.cat([_as_real(part).flatten(1) for part in measured], dim=1)
    if measured.is_complex():
        return torch.view_as_real(measured.resolve_conj())
    return measured if math.prod(measured.shape[1:]) else measured.flatten(1)
