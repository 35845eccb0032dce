"""Checks of users' arguments, shared by operators and rewards."""

from __future__ import annotations

import inspect
import math
import os
import re
import warnings
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

__all__ = [
    "as_index", "as_levels", "as_shape", "check_setting", "checked_evidence", "checked_samples", "host_memory", "Index",
    "looks_like_image", "looks_measured_in", "normalised", "precise", "to_tensor_hint", "warn_of_range",
]

#: annotation words that :func:`check_setting` can check
_JUDGED = {"int": (int,), "float": (int, float), "bool": (bool,), "str": (str,), "None": (type(None),),
           "tuple": (tuple, list), "list": (tuple, list), "Sequence": (tuple, list)}

Index: TypeAlias = "int | slice | Sequence[int] | Tensor"


def host_memory() -> float:
    """Memory of this machine in bytes. The system may grant more, and kill the process once that is used."""
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, ValueError, OSError):  # unknown on this system
        return math.inf


def as_index(index: Index, n: int) -> Tensor:
    """Indices of rows as a tensor.

    Args:
        index: An int, a slice, ints in a list or a ``(k,)`` tensor (repeats allowed), or an ``(n,)`` mask.
        n: Number of rows.

    Returns:
        ``(k,)`` int64 on the CPU, each in [0, n).

    Raises:
        ValueError: If the index selects nothing or a row that does not exist.
    """
    picked = index if isinstance(index, slice) else torch.as_tensor(index, device="cpu").reshape(-1)
    if not isinstance(picked, slice) and picked.numel() == 0:
        picked = picked.long()  # an empty list becomes a tensor of floats
    try:
        rows = torch.arange(n)[picked]
    except IndexError as error:
        raise ValueError(f"index {index} does not fit {n} rows: pass integers below {n}") from error
    if rows.numel() == 0:
        raise ValueError(f"index {index} selects none of {n} rows: pass at least one of 0 to {n - 1}")
    return rows


def as_levels(value: float | Tensor, n: int, name: str, *, allow_zero: bool = False) -> Tensor:
    """A level, such as a noise standard deviation, as one number for each of n rows.

    Args:
        value: A float, or a tensor with one or ``n`` entries.
        n: Number of rows.
        name: Name of the level in errors.
        allow_zero: Whether 0 is a valid level.

    Returns:
        ``(n,)``, floating point.

    Raises:
        ValueError: For another number of entries, or a level that is not finite or not positive.
    """
    if isinstance(value, str):
        raise TypeError(f"{name} is {value!r}: pass a number, such as {name}={_number_in(value)}")
    # Python numbers in double precision: in single precision, a level of 0.4 is off by 1e-8 in float64 problems
    levels = torch.as_tensor(value, dtype=None if isinstance(value, Tensor) else torch.float64).detach()
    if not levels.is_floating_point():
        levels = levels.to(torch.get_default_dtype())
    if levels.numel() not in (1, n) or levels.ndim > 1:
        raise ValueError(f"{name} has shape {tuple(levels.shape)}: pass a float or a tensor of shape ({n},)")
    if not bool((torch.isfinite(levels) & ((levels >= 0) if allow_zero else (levels > 0))).all()):
        bound = ">= 0" if allow_zero else "> 0"
        raise ValueError(f"{name} is {levels.flatten().tolist()[:4]}: it must be finite and {bound}")
    return levels.reshape(-1).expand(n).clone()


def _number_in(text: str) -> str:
    """The number that a string spells, or an example of a number."""
    try:
        return f"{float(text):g}"
    except ValueError:
        return "0.05"


def as_shape(shape: Sequence[int], call: str) -> tuple[int, ...]:
    """Check the shape of an image.

    Args:
        shape: Whole numbers of at least 1.
        call: Call that works, for the error.

    Raises:
        ValueError: For anything else, such as a factor in place of the shape.
    """
    if isinstance(shape, Sequence) and not isinstance(shape, str) and len(shape) and all(
            isinstance(side, int) and side > 0 for side in shape):
        return tuple(shape)
    if callable(getattr(shape, "dim", None)) or hasattr(shape, "__array__"):  # images instead of their shape
        raise ValueError(f"image_shape is a {type(shape).__name__} of shape {tuple(getattr(shape, 'shape', ()))}: the "
                         f"first argument is the shape of one image, such as images.shape[1:], as in {call}")
    raise ValueError(f"image_shape is {shape!r:.60}: the first argument is the shape of one image, as in {call}")


def check_setting(owner: str, name: str, value: object, parameter: inspect.Parameter) -> object:
    """Check a typed setting against the parameter's annotation; a list becomes a tuple if the annotation asks for one.

    Annotations with words other than Python's plain types are not checked.

    Raises:
        ValueError: For a setting of the wrong type, such as a word instead of a number.
    """
    annotation = parameter.annotation if isinstance(parameter.annotation, str) else getattr(
        parameter.annotation, "__name__", "")
    outer = re.sub(r"\[[^\[\]]*\]", "", annotation)  # the function itself checks the items of a tuple
    words = re.findall(r"\w+", outer)
    if not words or not set(words) <= set(_JUDGED):
        return value
    kinds = tuple(kind for word in words for kind in _JUDGED[word])
    if isinstance(value, kinds) and (not isinstance(value, bool) or "bool" in words):
        return tuple(value) if isinstance(value, list) and "tuple" in words else value
    default = parameter.default
    example = f", such as {name}={default}" if isinstance(default, (int, float, str)) else ""
    raise ValueError(f"the setting {name} of {owner} is {value!r}: it takes {' or '.join(annotation.split(' | '))}"
                     f"{example}")


def to_tensor_hint(value: object, name: str) -> str:
    """End of an error message: how to turn something that is not a floating-point tensor into a batch of images."""
    if isinstance(value, Tensor):
        scaled = " / 255" if value.dtype == torch.uint8 else ""
        return f"{name} is a tensor of {value.dtype}: images are floating point in [0, 1], pass {name}.float(){scaled}"
    kind, shape = getattr(value, "dtype", None), getattr(value, "shape", None)
    if kind is not None and shape is not None:  # a NumPy array, or one that torch treats like it
        axes = "[None, None]" if len(shape) == 2 else "[None]" if len(shape) == 3 else ""
        if len(shape) >= 3 and shape[-1] in (1, 3) and shape[-3] not in (1, 3):  # channels last: files and matplotlib
            axes = f".movedim(-1, -3){axes}"
        scaled = " / 255" if str(kind) == "uint8" else ""
        return (f"{name} is a {type(value).__name__} of {kind} and shape {tuple(shape)}: pass a tensor, "
                f"torch.as_tensor({name}){axes}.float(){scaled}")
    if callable(getattr(value, "getdata", None)):  # a Pillow image
        return (f"{name} is an image of {type(value).__module__}: pass a tensor, torchvision.transforms.functional."
                f"to_tensor({name})[None], or read its file with invflow.imageio.read_image(path)[None]")
    if isinstance(value, list | tuple) and value:
        inside = {type(part).__name__ for part in value}
        stacked = "torch.stack" if all(isinstance(part, Tensor) for part in value) else "torch.as_tensor"
        return (f"{name} is a {type(value).__name__} of {len(value)} {'/'.join(sorted(inside))}: pass one tensor, "
                f"{stacked}({name})")
    return f"{name} is {value!r:.60}: pass a floating-point tensor of images in [0, 1]"


def looks_like_image(shape: Sequence[int]) -> bool:
    """Whether a shape is (C, H, W) of a grey or colour picture, whose range is known."""
    return len(shape) == 3 and shape[0] in (1, 3, 4) and min(shape[1:]) >= 8


def warn_of_range(x: Tensor, image_shape: Sequence[int]) -> None:
    """Warn about pictures outside [0, 1]. Nothing is converted: only the caller knows the range.

    Args:
        x: Images, ``(n, *image_shape)``.
        image_shape: Shape of an image. Only pictures are checked.
    """
    if not (looks_like_image(image_shape) and x.numel()):
        return
    low, high = float(x.detach().min()), float(x.detach().max())
    if high > 30:
        warnings.warn(f"x has values up to {high:.4g}, which looks like [0, 255]: images are in [0, 1], so "
                      "pass x / 255", stacklevel=4)
    elif low < -0.5 and high < 2:
        warnings.warn(f"x has values down to {low:.4g}, which looks like [-1, 1]: images are in [0, 1], so "
                      "pass (x + 1) / 2, and half the noise level", stacklevel=4)


@torch.no_grad()
def looks_measured_in(y: Tensor, sigma: Tensor, measure: Callable[[Tensor], Tensor],
                      shape: Sequence[int]) -> str | None:
    """Message about measurements that cannot come from pictures in [0, 1], whatever the noise; None if they can.

    Args:
        y: Measurements, ``(B, *measurement_shape)``.
        sigma: Noise levels, ``(B,)``.
        measure: Forward operator.
        shape: Shape of a batch of images for the operator. Only pictures are checked.
    """
    if not looks_like_image(shape[1:]):
        return None
    # among a million values with normal noise, hardly one is off by five standard deviations
    ends = torch.stack([(y.flatten(1).amin(1) + 5 * sigma).min(), (y.flatten(1).amax(1) - 5 * sigma).max()])
    low, high = ends.tolist()
    if high <= 30 and low >= -0.5:
        return None
    white = float(measure(y.new_ones(*shape)).max())
    if high > 30 and high > 20 * abs(white):
        return (f"y has values up to {float(y.max()):.4g}, a white image measures {white:.4g}: it looks like [0, 255], "
                "and images are in [0, 1], so pass y / 255")
    if low < -0.5 * white and high < 2 * white:
        contrasts = torch.rand(*shape, generator=torch.Generator().manual_seed(0)).round().to(y)
        black = measure(torch.zeros_like(contrasts))
        # operators such as differences and waves give negative values for images in [0, 1] too
        if float(measure(contrasts).min()) > -0.25 * white and float(black.abs().max()) < 0.25 * white:
            return (f"y has values down to {float(y.min()):.4g}, a black image measures 0: unless sigma is too small, "
                    "it looks like [-1, 1], and images are in [0, 1], so pass (y + 1) / 2, and half the noise level")
    return None


def checked_samples(samples: Tensor) -> Tensor:
    """Check that samples are a batch of finite images; return them detached, in single precision at least."""
    if not isinstance(samples, Tensor) or not samples.is_floating_point():
        raise TypeError("samples must be a floating-point tensor (B, N, *image_shape): "
                        f"{to_tensor_hint(samples, 'samples')}")
    if samples.ndim < 3 or samples.shape[0] == 0 or samples.shape[1] == 0:
        raise ValueError("samples must have shape (B, N, *image_shape) with B and N at least 1, not "
                         f"{tuple(samples.shape)}; for a single observation pass samples.unsqueeze(0)")
    samples = samples.detach()
    if samples.dtype not in (torch.float32, torch.float64):  # sums over thousands are inaccurate in half precision
        samples = samples.float()
    if math.isfinite(samples.sum().item()):
        return samples  # if the sum overflows, the samples are checked one by one
    broken = ~torch.isfinite(samples).flatten(2).all(2)
    if bool(broken.any()):
        b, n = (int(i) for i in broken.nonzero()[0])
        raise ValueError(
            f"{int(broken.sum())} of {broken.numel()} samples hold values that are not finite, the first in "
            f"particle {n} of observation {b}: check the solver's step sizes and the reward of these samples"
        )
    return samples


def precise(values: Tensor) -> Tensor:
    """Convert to float64 if the device supports it: weights are differences of large log densities."""
    return values.float() if values.device.type == "mps" else values.double()


def normalised(log_weights: Tensor | None, samples: Tensor) -> Tensor:
    """Log weights ``(B, N)`` whose exponentials sum to one over N; None gives equal weights."""
    b, n = samples.shape[:2]
    if log_weights is None:
        return torch.full((b, n), -math.log(n), dtype=samples.dtype, device=samples.device)
    if tuple(log_weights.shape) != (b, n):
        raise ValueError(f"log_weights of shape {tuple(log_weights.shape)} do not fit samples of shape "
                         f"{tuple(samples.shape)}: pass one for each particle, ({b}, {n})")
    log_weights = precise(log_weights.detach().to(samples.device))
    bad = log_weights.isnan() | (log_weights == torch.inf)
    if bool(bad.any()):
        i, j = (int(k) for k in bad.nonzero()[0])
        raise ValueError(f"the log weight of particle {j} of observation {i} is {log_weights[i, j].item()}")
    total = log_weights.logsumexp(1, keepdim=True)
    if bool(total.isinf().any()):
        empty = int(total.squeeze(1).isinf().nonzero()[0])
        raise ValueError(f"all {n} log weights of observation {empty} are -inf: no particle is compatible")
    return (log_weights - total).to(samples.dtype)


def checked_evidence(log_evidence: Tensor | None, samples: Tensor) -> Tensor | None:
    """Check that there is one log evidence for each observation."""
    if log_evidence is None:
        return None
    if tuple(log_evidence.shape) != (samples.shape[0],):
        raise ValueError(f"log_evidence must have shape ({samples.shape[0]},), one for each observation, "
                         f"not {tuple(log_evidence.shape)}")
    return log_evidence.detach().to(samples.device)
