"""Tensors on the CPU that claim to be on a GPU: mixed devices raise errors, waits and uploads are recorded.

Without a GPU, torch's own fake tensors cannot be differentiated on "cuda", and they compute no values, so no solver
could finish. These tensors compute the values of a GPU on the CPU.
"""

from __future__ import annotations

import copy
import re
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

GPU = torch.device("cuda", 0)

aten = torch.ops.aten
# where a kernel's result is read by the host before it goes on, on a GPU
_WAITS = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten._unique2, aten.bincount,
          aten._linalg_check_errors, aten.unique_dim, aten.unique_consecutive}
_PHYSICAL = {aten._conj: aten._conj_physical.default, aten._neg_view: aten.neg.default}
# what a GPU takes from the host in the same call
_TAKES_HOST_INDEX = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}


class Pretended(torch.Tensor):
    """A tensor of which Python hears that it is on a GPU, while C++, autograd among it, finds it on the CPU."""

    value: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, value: Tensor) -> Pretended:
        """Wrap a CPU tensor, which is shared."""
        made = torch.Tensor._make_wrapper_subclass(
            cls, value.size(), strides=value.stride(), storage_offset=value.storage_offset(), dtype=value.dtype,
            device=value.device)
        made.value = value.detach()
        return made

    @property
    def device(self) -> torch.device:
        """The GPU."""
        return GPU

    def __format__(self, spec: str) -> str:
        return format(self.item(), spec) if self.ndim == 0 else repr(self.value)

    def __deepcopy__(self, memo: dict[int, Any]) -> Pretended:
        made = memo[id(self)] = Pretended(self.value.clone())
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute on the CPU."""
        kwargs = kwargs or {}
        op, leaves = func.overloadpacket, [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        here = [x for x in leaves if isinstance(x, Pretended)]
        host = [x for x in leaves if not isinstance(x, Pretended) and x.ndim > 0]
        if op in _TAKES_HOST_INDEX and isinstance(args[0], Pretended) and not any(x is args[0] for x in host):
            values = [x for x in host if not any(x is i for i in args[1] if i is not None)]
            for _ in range(len(host) - len(values)):
                note("upload")
            host = values
        if op is aten.copy_ and (host or not isinstance(args[0], Pretended)):
            note("upload" if isinstance(args[0], Pretended) else "wait")
        elif host and here:
            raise RuntimeError(f"{func}: tensors on cuda:0 and on the cpu, {[tuple(x.shape) for x in leaves]}")
        masks = args[1] if op in _TAKES_HOST_INDEX else ()
        masked = any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in masks)
        fills = op is not aten.index and masked and args[2].numel() == 1 and len(masks) == 1  # a masked fill
        if op in _WAITS or (masked and not fills) or (op is aten.repeat_interleave and "Tensor" in str(func)):
            note("wait")
        bare_args, bare_kwargs = tree_map_only(Pretended, lambda x: x.value, (args, kwargs))
        # not as lazy views, which below this level are taken for what they are views of
        out = _PHYSICAL.get(op, func)(*bare_args, **bare_kwargs)
        if func._schema.is_mutable and isinstance(args[0], Tensor) and func._schema.name.endswith("_"):
            return args[0]
        return tree_map_only(Tensor, Pretended, out)


_LOG: list[Counter[str]] = []
# folder, if any, and file of what belongs to the library
_LIBRARY = re.compile(r"[/\\]invflow(?:_operators)?[/\\](?:(\w+)[/\\])?(\w+\.py)$")


def note(kind: str) -> None:
    """Count an event at the line of the library that led to it."""
    if not _LOG:
        return
    frame: Any = sys._getframe(1)
    place = "elsewhere"
    while frame is not None:
        found = _LIBRARY.search(frame.f_code.co_filename)
        if found is not None and found[1] != "tests":
            place = f"{found[2]}:{frame.f_lineno} {frame.f_code.co_name}"
            break
        frame = frame.f_back
    _LOG[-1][f"{kind} {place}"] += 1


def _is_gpu(device: Any) -> bool:
    return device is not None and not isinstance(device, Tensor) and torch.device(device).type == "cuda"


def _is_pretended(x: Tensor) -> bool:
    while torch._C._functorch.is_functorch_wrapped_tensor(x):
        x = torch._C._functorch.get_unwrapped(x)
    return isinstance(x, Pretended)


class PretendGPU(TorchFunctionMode):
    """While it lasts there is a GPU; ``with PretendGPU() as seen`` counts by line what waits for it or feeds it."""

    def __enter__(self) -> Counter[str]:
        super().__enter__()
        # tensors that wrap another one cannot be viewed in inference mode; those of a real GPU can
        self._inference_mode, torch.inference_mode = torch.inference_mode, lambda mode=True: torch.no_grad()
        _LOG.append(Counter())
        return _LOG[-1]

    def __exit__(self, *error: Any) -> None:
        torch.inference_mode = self._inference_mode
        _LOG.pop()
        super().__exit__(*error)

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls of torch with the device taken out."""
        kwargs = dict(kwargs or {})
        if getattr(func, "__self__", None) is Tensor.device and func.__name__ == "__get__":
            return GPU if _is_pretended(args[0]) else func(*args)
        if func in (Tensor.to, Tensor.cpu, Tensor.cuda):
            return self._to(func, *args, **kwargs)
        if func in (Tensor.tolist, Tensor.numpy) and isinstance(args[0], Pretended):
            note("wait")
            return args[0].value.tolist()
        if _is_gpu(kwargs.get("device")):
            kwargs["device"] = "cpu"
            with torch._C.DisableTorchFunctionSubclass():
                out = func(*args, **kwargs)
            if isinstance(out, Pretended):
                return out
            if func in (torch.tensor, torch.as_tensor, torch.asarray):
                note("upload")
            return wrap(out)
        if kwargs.get("device") is not None and args and isinstance(args[0], Pretended):  # as_tensor(x, device="cpu")
            note("wait")
            return func(args[0].value, *args[1:], **kwargs)
        return func(*args, **kwargs)

    def _to(self, func: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if func is not Tensor.to:
            args = (GPU if func is Tensor.cuda else torch.device("cpu"),)
        target, dtype = kwargs.pop("device", None), kwargs.pop("dtype", None)
        other = kwargs.pop("other", None)
        for value in (*args, other):
            if isinstance(value, Tensor):
                target, dtype = GPU if _is_pretended(value) else value.device, value.dtype
            elif isinstance(value, torch.dtype):
                dtype = value
            elif isinstance(value, str | torch.device):
                target = value
        here = _is_pretended(x)
        wanted = here if target is None else _is_gpu(target)
        if here == wanted:
            return x if dtype is None else x.to(dtype)
        note("wait" if here else "upload")
        with torch._C.DisableTorchFunctionSubclass():
            moved = x.value.clone() if isinstance(x, Pretended) else wrap(x.detach().clone())
            return moved if dtype is None else moved.to(dtype)


def wrap(x: Tensor) -> Pretended:
    """A leaf on the GPU."""
    made = Pretended(x.detach())
    return made.requires_grad_() if x.requires_grad else made


def bare(x: Any) -> Any:
    """What is on the GPU, on the host, without being counted."""
    return tree_map_only(Pretended, lambda p: p.value, x)


def put(module: torch.nn.Module) -> Any:
    """A copy of a module on the GPU."""
    moved = copy.deepcopy(module)
    for part in moved.modules():
        for kept in (part._parameters, part._buffers):
            for name, value in kept.items():
                if value is not None:
                    kept[name] = wrap(value)
    return moved


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def shaken(module: torch.nn.Module) -> Any:
    """Layers that start at zero would hide what is not finite, not equal, or not there."""
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator(3)))
    return module.eval().requires_grad_(False)


def on_gpu(value: Any) -> Any:
    with PretendGPU():
        return copy.deepcopy(value).to(GPU)


def count(seen: Counter[str], kind: str) -> int:
    """How often a GPU was waited for, or fed."""
    return sum(n for place, n in seen.items() if place.startswith(kind))


def same(here: Any, there: Any, exact: bool = True) -> None:
    """All tensors are on the GPU, and are what the CPU gives."""
    for a, b in zip(tree_leaves(here), tree_leaves(there), strict=True):
        if isinstance(a, Tensor):
            assert isinstance(b, Pretended)
            torch.testing.assert_close(b.value, a, equal_nan=True, **({"rtol": 0, "atol": 0} if exact else {}))
