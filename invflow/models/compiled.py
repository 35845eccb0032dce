"""Compiled networks: one kernel in place of several, and on a GPU one launch in place of hundreds."""

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

#: graphs of one function, which all networks of a kind share. A VFM takes four, with gradients and without, and each
#: new number of rows may take another; past its own limit, which is 8, torch falls back to the network as it is
GRAPHS = 64


def compile_networks(module: nn.Module, mode: str = "reduce-overhead", **options: Any) -> None:
    """Compile the networks in a module, in place, with :func:`torch.compile`.

    The networks are compiled when they next run, once with a gradient and once without, for tens of seconds each.
    Inside :mod:`torch.func` and in forward mode they run as they are. Weights are shared with what is compiled, and
    what is saved or copied does not know of it. Results are those of the network as it is, up to rounding.

    Args:
        module: a prior, an adapter, or what contains some.
        mode: of ``torch.compile``. The default replays CUDA graphs on a GPU, where a small network's time is that of
            launching its kernels; ``"default"`` fuses kernels alone.
        options: further ones of ``torch.compile``.

    Raises:
        ValueError: where there is no network in the module: a Gaussian mixture has none.

    Example:
        >>> import torch, invflow
        >>> prior = invflow.NeuralFlowMap((2,), network="mlp", options={"width": 8, "depth": 1})
        >>> invflow.compile_networks(prior, mode="default", backend="eager")
        >>> prior.generate(3, steps=1).shape
        torch.Size([3, 2])
    """
    networks = _networks(module)
    if not networks:
        raise ValueError(f"there is no network in this {type(module).__name__} to compile: it runs as it is")
    import torch._dynamo  # which takes seconds

    config: Any = torch._dynamo.config
    limit = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"  # its older name
    setattr(config, limit, max(getattr(config, limit), GRAPHS))
    for network in networks:
        network.compile(mode=mode, **options)
        # where torch.nn.Module keeps it, and forgets it in what is copied or saved
        compiled: Any = network._compiled_call_impl
        network._compiled_call_impl = partial(_call, network, compiled)


@contextlib.contextmanager
def compiled_networks(module: nn.Module, **options: Any) -> Iterator[None]:
    """As :func:`compile_networks`, for a while."""
    compile_networks(module, **options)
    try:
        yield
    finally:
        for network in _networks(module):
            network._compiled_call_impl = None


def _networks(module: nn.Module) -> list[nn.Module]:
    return [m for m in module.modules() if isinstance(m, (UNet, MLP))]


def _call(network: nn.Module, compiled: Callable[..., Tensor], *args: Tensor) -> Tensor:
    """The compiled network, unless it is transformed: torch would then run it as it is, from that time on always."""
    if forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None:
        out: Tensor = network._call_impl(*args)
        return out
    return compiled(*args).clone()  # a CUDA graph writes its next result over this one
