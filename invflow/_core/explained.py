"""Error messages for calls with wrong arguments: they name the argument and show a call that works.

A call that succeeds is not checked. The arguments are compared with the annotations only when the call fails with an
error that the library did not raise itself.
"""

from __future__ import annotations

import contextlib
import dis
import functools
import inspect
import numbers
import os
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar, overload

import torch
from torch import Tensor

from invflow._core.checks import to_tensor_hint

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["TellingModule", "explained"]

F = TypeVar("F", bound=Callable[..., Any])

#: annotation words that arguments are checked against; an annotation with any other word is not checked
_KINDS: dict[str, tuple[type, ...]] = {
    "int": (numbers.Integral,), "float": (numbers.Real,), "bool": (bool,), "str": (str,), "None": (type(None),),
    "tuple": (tuple, list), "list": (tuple, list), "Sequence": (tuple, list), "slice": (slice,), "Tensor": (Tensor,),
    "Time": (numbers.Real, Tensor), "PathLike": (os.PathLike,), "Generator": (torch.Generator,), "os": (), "torch": (),
}
#: names of these types in messages
_SPOKEN = {"Real": "a number", "Integral": "a whole number", "NoneType": "None"}


@overload
def explained(function: F, *, arrays: bool = ..., like: str = ...) -> F: ...


@overload
def explained(function: None = None, *, arrays: bool = ..., like: str = ...) -> Callable[[F], F]: ...


def explained(function: Callable[..., Any] | None = None, *, arrays: bool = False, like: str = "") -> Any:
    """Wrap a function so that its errors name the argument that has the wrong type, is missing, or is unknown.

    Args:
        function: Function to wrap. A constructor is named by its class.
        arrays: Whether to accept NumPy arrays for tensor parameters.
        like: Example of a call that works.
    """
    if function is None:
        return functools.partial(explained, arrays=arrays, like=like)
    signature = inspect.signature(function)

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if arrays and any(_is_array(value) for value in (*args, *kwargs.values())):
            args, kwargs = _without_arrays(signature, args, kwargs)
        try:
            return function(*args, **kwargs)
        except (TypeError, AttributeError, ValueError, RuntimeError, IndexError) as error:
            words = None if _was_meant(error) else _what_is_wrong(_name(function, args), signature, args, kwargs, like)
            if words is None:
                raise
            raise TypeError(words) from error

    return wrapper


def _name(function: Callable[..., Any], args: tuple[Any, ...]) -> str:
    """Name of a function as a caller writes it: constructors and methods include their class."""
    first = next(iter(inspect.signature(function).parameters), "")
    if not args or first not in ("self", "cls"):
        return function.__name__
    kind = args[0] if first == "cls" else type(args[0])
    return kind.__name__ if function.__name__ == "__init__" else f"{kind.__name__}.{function.__name__}"


def _was_meant(error: Exception) -> bool:
    """Whether the library raised the error itself, with its own message."""
    step = error.__traceback__
    while step is not None and step.tb_next is not None:
        step = step.tb_next
    if step is None or not step.tb_frame.f_globals.get("__name__", "").startswith("invflow") or (
            step.tb_frame.f_code.co_name == "__getattr__"):  # it does not know what the caller was doing
        return False
    return step.tb_frame.f_code.co_code[step.tb_lasti] == dis.opmap["RAISE_VARARGS"]


def _what_is_wrong(owner: str, signature: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any],
                   like: str) -> str | None:
    """Message about the first argument that does not fit; None if all fit."""
    parameters = [p for p in signature.parameters.values() if p.name not in ("self", "cls")]
    try:
        given = signature.bind(*args, **kwargs).arguments
    except TypeError as mismatch:
        return f"{owner}: {mismatch}; it takes {', '.join(p.name for p in parameters)}{like and f', as in {like}'}"
    for parameter in parameters:
        if parameter.name in given and not _fits(given[parameter.name], parameter.annotation):
            return _of_the_wrong_kind(owner, parameter, given[parameter.name], like)
    return None


def _words(annotation: object) -> list[str]:
    """Words of an annotation; empty if the annotation cannot be checked."""
    text = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", "")
    while "[" in text:  # the function itself checks the items of a tuple
        text, before = re.sub(r"\[[^\[\]]*\]", "", text), text
        if text == before:
            break
    words = re.findall(r"\w+", text)
    return words if set(words) <= set(_KINDS) else []


def _fits(value: object, annotation: object) -> bool:
    words = _words(annotation)
    kinds = tuple(kind for word in words for kind in _KINDS[word])
    if isinstance(value, Tensor) and "Tensor" in words:
        return value.dtype != torch.uint8
    return not words or (isinstance(value, kinds) and (not isinstance(value, bool) or "bool" in words))


def _of_the_wrong_kind(owner: str, parameter: inspect.Parameter, value: Any, like: str) -> str:
    """Message about one argument: what it is, what it should be, and a value that works."""
    name, words = parameter.name, _words(parameter.annotation)
    if "Tensor" in words and callable(getattr(value, "interval", None)) and hasattr(value, "samples"):
        return (f"{name} of {owner} is a {type(value).__name__}: pass its samples (B, N, *image_shape), "
                f"{name}=posterior.samples, or one image per observation, posterior.mean()")
    if "Tensor" in words and not isinstance(value, str | numbers.Number):
        return f"{owner}: {to_tensor_hint(value, name)}"
    kinds = dict.fromkeys(kind.__name__ for word in words for kind in _KINDS[word])
    expected = " or ".join(_SPOKEN.get(kind, kind) for kind in kinds)
    meant: object = None
    if isinstance(value, str | int | float):
        for word in [word for word in ("int", "float") if word in words]:
            with contextlib.suppress(ValueError, TypeError):
                meant = int(value) if word == "int" else float(value)
                break
    elif isinstance(parameter.default, int | float | str) and not isinstance(parameter.default, bool):
        meant = parameter.default
    works = f", such as {name}={meant!r}" if meant is not None else ""
    sized = isinstance(value, Tensor) or _is_array(value)
    found = f"a {type(value).__name__} of shape {tuple(value.shape)}" if sized else f"{value!r:.60}"
    return f"{name} of {owner} is {found}, expected {expected}{works}{f', as in {like}' if like else ''}"


def _is_array(value: object) -> bool:
    return type(value).__module__ == "numpy" and hasattr(value, "__array__") and hasattr(value, "shape")


def _without_arrays(signature: inspect.Signature, args: tuple[Any, ...],
                    kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Convert arrays to tensors for tensor parameters. Arrays of uint8 are left as they are: they need scaling."""
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError:
        return args, dict(kwargs)
    for name, value in bound.arguments.items():
        if _is_array(value) and "Tensor" in _words(signature.parameters[name].annotation) and str(
                value.dtype) != "uint8":
            bound.arguments[name] = torch.as_tensor(value)
    return bound.args, bound.kwargs


class TellingModule(torch.nn.Module):
    """Module that explains a missing ``super().__init__()``."""

    def __getattr__(self, name: str) -> Any:
        """Look up an attribute; report a missing ``super().__init__()``."""
        self._check_begun(name)
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; report a module or parameter that is set before ``super().__init__()``."""
        if isinstance(value, torch.nn.Module | torch.nn.Parameter):
            self._check_begun(name, "sets")
        super().__setattr__(name, value)

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move to a device, as in torch. The error for an unknown device lists the known ones."""
        try:
            return super().to(*args, **kwargs)
        except RuntimeError as error:
            if "device type" not in str(error) and "device string" not in str(error):
                raise
            named = next((value for value in (*args, *kwargs.values()) if isinstance(value, str)), None)
            raise ValueError(f"there is no device {named!r}: pass 'cpu', 'cuda' for an NVIDIA GPU, or 'mps' for a "
                             "Mac's GPU") from error

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        """Register a tensor that moves with the module."""
        self._check_begun(name)
        super().register_buffer(name, tensor, persistent)

    def _check_begun(self, name: str, does: str = "has no") -> None:
        if "_buffers" not in self.__dict__:
            what = f"sets self.{name}" if does == "sets" else f"has no {name!r}"
            raise AttributeError(f"{type(self).__name__} {what}, because its __init__ does not begin with "
                                 "super().__init__()")
