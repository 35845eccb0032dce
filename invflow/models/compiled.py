"""Compiled networks: one kernel instead of several and, on a GPU, one launch instead of hundreds."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from invflow.nets.mlp import MLP
from invflow.nets.unet import UNet

__all__ = ["compile_networks"]

#: graphs of one function, shared by all networks of a kind. A VFM needs four, with gradients and without, and each
#: new number of rows may need another; past its own limit of 8, torch falls back to the uncompiled network
GRAPHS = 64


def compile_networks(module: nn.Module, mode: str = "reduce-overhead", **options: Any) -> None:
    """Compile the networks in a module, in place, with :func:`torch.compile`.

    Each network is compiled when it next runs, once with gradients and once without. Each compilation takes tens of
    seconds. Inside :mod:`torch.func` and in forward mode, networks run uncompiled. The compiled network shares the
    weights; saved files and copies do not contain it. Results equal those of the uncompiled network, up to rounding.

    Args:
        module: A prior, an adapter, or a module that contains them.
        mode: Mode of ``torch.compile``. The default replays CUDA graphs on a GPU, where kernel launches dominate the
            time of a small network; ``"default"`` only fuses kernels.
        options: Further options of ``torch.compile``.

    Raises:
        ValueError: If the module contains no network, such as a Gaussian mixture.

    Example:
        >>> import torch, invflow
        >>> prior = invflow.NeuralFlowMap((2,), network="mlp", options={"width": 8, "depth": 1})
        >>> invflow.compile_networks(prior, mode="default", backend="eager")
        >>> prior.generate(3, steps=1).shape
        torch.Size([3, 2])
    """
    networks = _networks(module)
    if not networks:
        raise ValueError(f"this {type(module).__name__} contains no network to compile: use it without compiling")
    import torch._dynamo  # slow import (seconds)

    config: Any = torch._dynamo.config
    limit = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"  # older name
    setattr(config, limit, max(getattr(config, limit), GRAPHS))
    for network in networks:
        network.compile(mode=mode, **options)
        # torch.nn.Module keeps it here, and drops it from copies and saved files
        compiled: Any = network._compiled_call_impl
        network._compiled_call_impl = partial(_call, network, compiled)


@contextlib.contextmanager
def compiled_networks(module: nn.Module, **options: Any) -> Iterator[None]:
    """Same as :func:`compile_networks`, within a ``with`` block."""
    compile_networks(module, **options)
    try:
        yield
    finally:
        for network in _networks(module):
            network._compiled_call_impl = None


def _networks(module: nn.Module) -> list[nn.Module]:
    return [m for m in module.modules() if isinstance(m, (UNet, MLP))]


def _call(network: nn.Module, compiled: Callable[..., Tensor], *args: Tensor) -> Tensor:
    """Run the compiled network, except under transforms: torch would then fall back to the uncompiled one for good."""
    if forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None:
        out: Tensor = network._call_impl(*args)
        return out
    return compiled(*args).clone()  # the next run of a CUDA graph overwrites this result
