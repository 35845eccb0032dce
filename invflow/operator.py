"""Forward operators map an image to a measurement, with shared parameters or one set per image."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from invflow._core.asked import Asked
from invflow._core.checks import Index, as_index, as_levels, to_tensor_hint, warn_of_range
from invflow._core.conjugate_gradients import conjugate_gradient
from invflow._core.explained import TellingModule, explained
from invflow._core.random import as_generator, draw_noise
from invflow._core.shapes import column
from invflow._core.watch import check_untouched, version

__all__ = ["ComposedOperator", "Operator", "SUMMARY_LATTICE", "SUMMARY_SIZE"]

#: entries of the vector that :meth:`Operator.context` returns
SUMMARY_SIZE = 32
#: the frequencies of that summary, in its own units: a half-plane, since the other half is the complex conjugate;
#: up to conjugation, quarter turns and reflections map the set to itself
SUMMARY_LATTICE = (
    (0, 1), (1, 0), (1, 1), (1, -1), (0, 2), (2, 0), (1, 2), (2, 1), (2, -1), (1, -2), (2, 2), (2, -2),
    (0, 3), (3, 0), (0, 4), (4, 0),
)

def _full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Switch automatic mixed precision off: the error of rounding to bfloat16 would be larger than the noise."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def _came_from_numpy(error: Exception) -> bool:
    """Whether an error was raised inside NumPy, or by torch on the way to it."""
    step = error.__traceback__
    while step is not None:
        if step.tb_frame.f_globals.get("__name__", "").partition(".")[0] == "numpy":
            return True
        step = step.tb_next
    return "numpy" in str(error).lower()


def _checked(method: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Check the measurement before a method that takes one, and run the method in full precision."""

    @functools.wraps(method)
    def wrapper(self: Operator, y: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = self.check_measurements(y)
        with _full_precision(y.device):
            return method(self, y, *args, **kwargs)

    wrapper.__invflow_checked__ = True  # type: ignore[attr-defined]
    return wrapper


def _asks_for_a_shape(init: Callable[..., None]) -> Callable[..., None]:
    """Name the call that works if an operator is built without its image shape."""
    own = list(inspect.signature(init).parameters.values())[1:2]
    init = explained(init)  # it reports any other missing, unknown or wrong argument
    if not own or own[0].name != "image_shape" or own[0].default is not inspect.Parameter.empty:
        return init

    @functools.wraps(init)
    def wrapper(self: Operator, *args: Any, **kwargs: Any) -> None:
        if not args and "image_shape" not in kwargs:
            call = ", ".join(["(1, 28, 28)", *(f"{name}={value!r:.40}" for name, value in kwargs.items())])
            name = type(self).__name__
            raise TypeError(f"{name} needs image_shape, the shape of one image (channels, height, width), as its first "
                            f"argument, as in {name}({call})")
        init(self, *args, **kwargs)

    return wrapper


class Operator(Asked, TellingModule):
    r"""The forward operator A of y = A(x) + noise.

    A subclass sets :attr:`image_shape` and :attr:`measurement_shape` and defines :meth:`forward`. Everything else
    follows. A linear operator may define :meth:`adjoint` and :meth:`pseudo_inverse` if it has them in closed
    form. Parameters (a mask, a kernel) are buffers. Parameters that differ between images are passed to
    :meth:`register_sets`; a batch with one image per set is then processed without a loop. Using an operator never
    changes it: :meth:`randomize`, :meth:`expand` and :meth:`select` return new operators.

    Attributes:
        image_shape: Shape of one image, without the batch.
        measurement_shape: Shape of one measurement, without the batch.
        linear: Whether A is linear.
        problem_class: Name under which an adapter can be trained for this operator; None if there is none.
        num_sets: Number of parameter sets. One set is shared by all images; otherwise row i of a batch uses set i.

    Example:
        >>> import torch, invflow
        >>> class Flip(invflow.Operator):
        ...     def __init__(self, image_shape):
        ...         super().__init__()
        ...         self.image_shape = self.measurement_shape = tuple(image_shape)
        ...     def forward(self, x):
        ...         return x.flip(-1)
        >>> y = Flip((1, 8, 8)).measure(torch.rand(2, 1, 8, 8), sigma=0.1, generator=torch.Generator())
        >>> y.shape
        torch.Size([2, 1, 8, 8])
    """

    image_shape: tuple[int, ...]
    measurement_shape: tuple[int, ...]
    #: structure of the matrix of A, if known: ``"identity"``, ``"diagonal"`` (each entry times a number),
    #: ``"circular"`` (a circular convolution of each channel) or ``"dense"`` (none of these); None: determined when
    #: needed. A subclass with another :meth:`forward` must set it again
    structure: str | None = None
    linear: bool = True
    problem_class: str | None = None
    #: classes that an adapter may use instead if it was not trained for :attr:`problem_class`, best first
    stand_ins: tuple[str, ...] = ()
    num_sets: int = 1
    _set_names: tuple[str, ...] = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" in cls.__dict__:
            type.__setattr__(cls, "__init__", _asks_for_a_shape(cls.__dict__["__init__"]))
        if "forward" in cls.__dict__ and "structure" not in cls.__dict__:
            cls.structure = None
        for name in ("adjoint", "pseudo_inverse", "embed"):
            method = cls.__dict__.get(name)
            if method is not None and not hasattr(method, "__invflow_checked__"):
                setattr(cls, name, _checked(method))

    # -- what a subclass writes ---------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        """Measurement without noise, ``(n, *image_shape)`` to ``(n, *measurement_shape)``."""
        raise TypeError(f"{type(self).__name__} does not define forward(x), which every operator needs")

    @_checked
    def adjoint(self, y: Tensor) -> Tensor:
        """Transpose of a linear operator. For a nonlinear one, the transposed Jacobian at a mid-grey image.

        Args:
            y: ``(n, *measurement_shape)``.

        Returns:
            ``(n, *image_shape)``; differentiable in ``y``.
        """
        image = torch.full((y.shape[0], *self.image_shape), 0.5, dtype=y.dtype, device=y.device)
        pull_back = torch.func.vjp(self, image)[1]
        result: Tensor = pull_back(y)[0]
        return result

    @_checked
    def pseudo_inverse(self, y: Tensor) -> Tensor:
        """Least-squares image of smallest norm. The default uses conjugate gradients.

        Args:
            y: ``(n, *measurement_shape)``.

        Returns:
            ``(n, *image_shape)``.

        Raises:
            TypeError: If the operator is not linear.
        """
        if not self.linear:
            raise TypeError(
                f"{type(self).__name__} is not linear and defines no pseudo_inverse(y): use operator.embed(y) "
                "for an image-shaped summary of the measurement"
            )
        return conjugate_gradient(self, y)

    @_checked
    def embed(self, y: Tensor) -> Tensor:
        """Turn a measurement into an image for a network: finite, cheap to compute, in [0, 1] if possible.

        The default is a pseudo-inverse stopped after eight conjugate gradient steps, so that it does not amplify the
        noise. For a nonlinear operator it is :meth:`adjoint`.

        Args:
            y: ``(n, *measurement_shape)``.

        Returns:
            ``(n, *image_shape)``.
        """
        return conjugate_gradient(self, y, iterations=8) if self.linear else self.adjoint(y)

    def observed(self) -> Tensor | None:
        """Mask of the observed entries of the measurement, ``(num_sets, *measurement_shape)`` bool; None for all.

        A likelihood uses only the observed entries, and :meth:`measure` adds noise only to them.
        """
        return None

    def context(self) -> tuple[Tensor, Tensor]:
        """Describe the operator to a neural adapter.

        Returns:
            maps: ``(num_sets, 1, H, W)``, 1 where a pixel is observed directly, 0 where it is not; all ones for
                an operator that sees the whole image. (H, W) are the axes of an image after the first, or
                the only axis of an image that is a vector.
            vector: ``(num_sets, SUMMARY_SIZE)``, a summary of the kernel: its transfer function at 16 low
                frequencies (multiples of :data:`SUMMARY_LATTICE`), real parts and then imaginary parts; zeros for
                an operator without kernel.
        """
        spatial = self.image_shape[1:] or self.image_shape
        maps = torch.ones(self.num_sets, 1, *spatial, device=self.device, dtype=self.dtype)
        return maps, maps.new_zeros(self.num_sets, SUMMARY_SIZE)

    def randomize(self, n: int, generator: torch.Generator | None = None) -> Operator:
        """Return an operator of the same kind with new random parameters, one set for each of n images.

        By default, an operator with one set returns itself, and an operator with several draws n of its sets with
        replacement. A subclass may draw parameters of its own.

        Args:
            n: Number of images.
            generator: Random generator.

        Returns:
            An operator with ``num_sets`` equal to n, or to 1 if nothing is random.
        """
        if self.num_sets == 1:
            return self
        generator = as_generator(generator)
        return self.select(torch.randint(self.num_sets, (n,), generator=generator, device=generator.device))

    # -- what follows -------------------------------------------------------------------------------------

    def __call__(self, x: Tensor) -> Tensor:
        """Check the images and measure them without noise, in full precision; see :meth:`forward`."""
        x = self.check_images(x)
        before = version(x)
        try:
            with _full_precision(x.device):
                y = super().__call__(x)
        except Exception as error:
            if _came_from_numpy(error):
                raise TypeError(f"{type(self).__name__}.forward leaves torch for NumPy, where no gradient can follow "
                                f"({error}): write it in torch; or, for a linear map of small images, compute its "
                                "matrix once and use invflow.operators.MatrixOperator(matrix, image_shape)") from error
            raise
        check_untouched(x, before, f"{type(self).__name__}.forward")
        expected = (len(x), *self.measurement_shape)
        if not isinstance(y, Tensor) or tuple(y.shape) != expected:
            found = tuple(y.shape) if isinstance(y, Tensor) else f"a {type(y).__name__}"
            raise ValueError(f"{type(self).__name__}.forward returned {found} for images {tuple(x.shape)}, expected a "
                             f"tensor (n, *measurement_shape) = {expected}: correct forward, or measurement_shape")
        return y

    def __getattr__(self, name: str) -> Any:
        """Explain which attribute a subclass forgot to set."""
        if name in ("image_shape", "measurement_shape") and "_buffers" in self.__dict__:
            raise AttributeError(f"{type(self).__name__} does not set {name}: write self.{name} = (...) in its "
                                 "__init__, a tuple without the batch")
        return super().__getattr__(name)

    def __matmul__(self, other: Operator) -> Operator:
        """``outer @ inner`` applies the inner operator first, then the outer one."""

        return ComposedOperator(self, other)

    @explained(like="operator.measure(x, sigma=0.05, generator=generator)")
    def measure(self, x: Tensor, sigma: float | Tensor, *,
                generator: torch.Generator | None = None) -> Tensor:
        """Measure with Gaussian noise, y = A(x) + sigma e, on the observed entries.

        Args:
            x: ``(n, *image_shape)``, nominally in [0, 1].
            sigma: Standard deviation of the noise, in the measurement's units, at least 0; a float or ``(n,)``.
            generator: Generator for the noise, which is drawn on its device in float32 and then moved.

        Returns:
            ``(n, *measurement_shape)``.

        Warns:
            UserWarning: If the values of a picture look like [0, 255] or [-1, 1].
        """
        x = self.check_images(x)
        warn_of_range(x, self.image_shape)
        clean = self(x)
        level = as_levels(sigma, clean.shape[0], "sigma", allow_zero=True).to(clean)
        noise = draw_noise(tuple(clean.shape), generator).to(clean)
        observed = self.observed()
        if observed is not None:
            noise = noise * observed
        return clean + column(level, clean) * noise

    def expand(self, k: int) -> Operator:
        """Repeat each set k times, in ``repeat_interleave`` order; an operator with one shared set returns itself."""
        if k < 1:
            raise ValueError(f"expand takes k >= 1, not k={k}")
        if self.num_sets == 1 or k == 1:
            return self
        sets = {name: getattr(self, name) for name in self._set_names}
        return self._with_sets({name: value.repeat_interleave(k, 0) for name, value in sets.items()})

    def select(self, index: Index) -> Operator:
        """Select sets by a slice, ints (repeats allowed) or a mask; an operator with one shared set returns itself."""
        if self.num_sets == 1:
            return self
        rows = as_index(index, self.num_sets)
        sets = {name: getattr(self, name) for name in self._set_names}
        return self._with_sets({name: value[rows.to(value.device)] for name, value in sets.items()})

    def register_sets(self, **sets: Tensor) -> None:
        """Register parameters that may differ between images, as buffers.

        Args:
            sets: Tensors ``(num_sets, ...)``, all with the same number of sets.
        """
        counts = {value.shape[0] for value in sets.values()}
        if len(counts) != 1 or min(counts) < 1:
            shapes = {name: tuple(value.shape) for name, value in sets.items()}
            raise ValueError(f"parameters need the same number of sets along their first axis, not {shapes}")
        for name, value in sets.items():
            self.register_buffer(name, value)
        self._set_names = tuple(dict.fromkeys((*self._set_names, *sets)))
        self.num_sets = counts.pop()

    def _with_sets(self, sets: dict[str, Tensor]) -> Operator:
        """A copy that shares everything but the given parameters."""
        if not sets:
            raise TypeError(
                f"{type(self).__name__} sets num_sets = {self.num_sets} by hand: pass its parameters to "
                "self.register_sets(name=tensor), or define expand(k) and select(index)"
            )
        other = copy.copy(self)
        # a shallow copy of a module shares its dictionaries: copy them, so that neither sees the other's changes
        for part in ("_buffers", "_parameters", "_modules"):
            setattr(other, part, dict(getattr(self, part)))
        for name, value in sets.items():
            other._buffers[name] = value
        other.num_sets = next(iter(sets.values())).shape[0]
        return other

    @property
    def device(self) -> torch.device:
        """Device of the operator's tensors; the CPU for an operator without any."""
        return next((b.device for b in chain(self.buffers(), self.parameters())), torch.device("cpu"))

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the operator's tensors; torch's default for an operator without any."""
        tensors = chain(self.buffers(), self.parameters())
        kinds = (b.dtype.to_real() for b in tensors if b.is_floating_point() or b.is_complex())
        return next(kinds, torch.get_default_dtype())

    def check_images(self, x: Tensor) -> Tensor:
        """Return the images in float32 or higher if they fit; otherwise the error says what is expected."""
        return self._check(x, self.image_shape, "x", "images", "image_shape")

    def check_measurements(self, y: Tensor) -> Tensor:
        """Return the measurements in float32 or higher if they fit; otherwise the error says what is expected."""
        return self._check(y, self.measurement_shape, "y", "measurements", "measurement_shape")

    def _check(self, value: Tensor, shape: tuple[int, ...], name: str, plural: str, attribute: str) -> Tensor:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            if isinstance(value, Tensor) and value.is_complex():
                call = f"{type(self).__name__}.as_measurement" if hasattr(self, "as_measurement") else (
                    "torch.view_as_real")
                raise ValueError(
                    f"{name} is {value.dtype}, expected pairs of reals, the real and the imaginary part of each "
                    f"number: pass {call}({name}). Circular noise of standard deviation s has s / sqrt(2) in each "
                    "part: sigma = s / 2**0.5"
                )
            raise ValueError(to_tensor_hint(value, name))
        if tuple(value.shape[1:]) != tuple(shape) or value.ndim == 0:
            hint = f"pass {name}[None]" if tuple(value.shape) == tuple(shape) else f"pass a batch of {plural}"
            if shape[:1] == (1,) and tuple(value.shape) == tuple(shape[1:]):
                hint = f"pass {name}[None, None]"
            if tuple(value.shape[2:]) == tuple(shape):
                hint = f"pass {name}.flatten(0, 1) to operator.expand({value.shape[1]})"
            raise ValueError(
                f"{name} has shape {tuple(value.shape)}, but {type(self).__name__} takes (n, *{attribute}) = "
                f"{('n', *shape)}: {hint}".replace("'n'", "n")
            )
        n = value.shape[0]
        if n == 0:
            raise ValueError(f"{name} has shape {tuple(value.shape)}, an empty batch: pass at least one row")
        if self.num_sets > 1 and n != self.num_sets:
            fits = n % self.num_sets == 0
            hint = f"operator.expand({n // self.num_sets})" if fits else f"operator.randomize({n})"
            raise ValueError(
                f"{type(self).__name__} has {self.num_sets} parameter sets, one for each row, but {name} has "
                f"{n} {plural}: use {hint}, or operator.select(index) for some of the sets"
            )
        return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value

    def extra_repr(self) -> str:
        """Shapes and number of sets, for ``print``."""
        return f"{self.image_shape} -> {self.measurement_shape}, num_sets={self.num_sets}"


class ComposedOperator(Operator):
    """Composition of two operators, A(x) = outer(inner(x)); written ``outer @ inner``.

    Args:
        outer: Operator applied second; its ``image_shape`` must equal the inner one's ``measurement_shape``.
        inner: Operator applied first.
        problem_class: Name under which an adapter was trained for the composition.

    Raises:
        ValueError: If the shapes or the numbers of parameter sets do not fit.

    Example:
        >>> import torch
        >>> from invflow.operators import GaussianBlur, SuperResolution
        >>> (SuperResolution((1, 28, 28), factor=4) @ GaussianBlur((1, 28, 28))).measurement_shape
        (1, 7, 7)
    """

    def __init__(self, outer: Operator, inner: Operator, problem_class: str | None = None) -> None:
        super().__init__()
        if tuple(outer.image_shape) != tuple(inner.measurement_shape):
            raise ValueError(
                f"{type(outer).__name__} takes {outer.image_shape}, but {type(inner).__name__} gives "
                f"{inner.measurement_shape}: outer @ inner applies inner first, so the two shapes must agree"
            )
        if outer.num_sets != inner.num_sets and 1 not in (outer.num_sets, inner.num_sets):
            raise ValueError(
                f"{type(outer).__name__} has {outer.num_sets} parameter sets and {type(inner).__name__} has "
                f"{inner.num_sets}: give both the same number, or one of them a single shared set"
            )
        self.outer, self.inner = outer, inner
        self.image_shape, self.measurement_shape = inner.image_shape, outer.measurement_shape
        self.linear = outer.linear and inner.linear
        self.problem_class = problem_class
        self.num_sets = max(outer.num_sets, inner.num_sets)

    def forward(self, x: Tensor) -> Tensor:
        """``(n, *inner.image_shape)`` to ``(n, *outer.measurement_shape)``."""
        return self.outer(self.inner(x))

    def adjoint(self, y: Tensor) -> Tensor:
        """Apply the outer adjoint, then the inner one."""
        return self.inner.adjoint(self.outer.adjoint(y)) if self.linear else super().adjoint(y)

    def embed(self, y: Tensor) -> Tensor:
        """Apply the outer embedding, then the inner one."""
        return self.inner.embed(self.outer.embed(y))

    def observed(self) -> Tensor | None:
        """Mask of the outer operator."""
        observed = self.outer.observed()
        return observed if observed is None else observed.expand(self.num_sets, *self.measurement_shape)

    def context(self) -> tuple[Tensor, Tensor]:
        """Context of the inner operator, which acts on the image itself."""
        maps, vector = self.inner.context()
        return maps.expand(self.num_sets, *maps.shape[1:]), vector.expand(self.num_sets, -1)

    def randomize(self, n: int, generator: torch.Generator | None = None) -> Operator:
        """Draw new parameters for both operators."""
        return self._compose(self.outer.randomize(n, generator), self.inner.randomize(n, generator))

    def expand(self, k: int) -> Operator:
        """Repeat each set of both operators k times."""
        if self.num_sets == 1:
            return self
        return self._compose(self.outer.expand(k), self.inner.expand(k))

    def select(self, index: Index) -> Operator:
        """Select sets of both operators."""
        if self.num_sets == 1:
            return self
        return self._compose(self.outer.select(index), self.inner.select(index))

    def _compose(self, outer: Operator, inner: Operator) -> Operator:
        return ComposedOperator(outer, inner, self.problem_class)
