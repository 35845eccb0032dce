"""Random numbers from an explicit generator: no function of the library reads or writes the global seed."""

from __future__ import annotations

import operator

import torch
from torch import Tensor

__all__ = ["as_generator", "draw_noise"]


def as_generator(generator: torch.Generator | int | None) -> torch.Generator:
    """The generator that was passed, or one on the CPU: seeded with the number passed, else by the operating system.

    Raises:
        TypeError: for anything else.
    """
    if isinstance(generator, torch.Generator):
        return generator
    fresh = torch.Generator()
    if generator is None:
        fresh.seed()
        return fresh
    try:
        return fresh.manual_seed(operator.index(generator))
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"generator={generator!r}: pass a torch.Generator, or an int for a seed, as in "
                        "generator=torch.Generator().manual_seed(0) or generator=0") from error


def draw_noise(shape: tuple[int, ...], generator: torch.Generator | int | None,
               device: torch.device | None = None) -> Tensor:
    """Standard normal numbers in float32, drawn on the generator's device.

    Always float32, whatever the model's type, so that a seed means the same noise in float32, bfloat16 and float64.

    Args:
        shape: of the numbers.
        generator: as for :func:`as_generator`.
        device: where they are to be; None leaves them on the generator's.
    """
    generator = as_generator(generator)
    # a GPU fetches them from pinned memory by itself, while the host goes on to the next
    pinned = device is not None and device.type == "cuda" and generator.device.type == "cpu"
    noise = torch.randn(shape, generator=generator, device=generator.device, dtype=torch.float32,
                        pin_memory=pinned and torch.cuda.is_available())
    return noise if device is None else noise.to(device, non_blocking=pinned)
