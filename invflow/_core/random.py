"""Random numbers from an explicit generator: no function of the library uses the global random state."""

from __future__ import annotations

import operator

import torch
from torch import Tensor

__all__ = ["as_generator", "draw_noise"]


def as_generator(generator: torch.Generator | int | None) -> torch.Generator:
    """Return the generator that was passed, or a new one on the CPU.

    The new generator is seeded with the number that was passed, or by the operating system for None.

    Raises:
        TypeError: For anything else.
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
        raise TypeError(f"generator={generator!r}: pass a torch.Generator, or an int as a seed, as in "
                        "generator=torch.Generator().manual_seed(0) or generator=0") from error


def draw_noise(shape: tuple[int, ...], generator: torch.Generator | int | None,
               device: torch.device | None = None) -> Tensor:
    """Standard normal numbers in float32, drawn on the generator's device.

    They are float32 whatever the model's type, so that a seed gives the same noise in float32, bfloat16 and float64.

    Args:
        shape: Shape of the result.
        generator: Generator or seed, as in :func:`as_generator`.
        device: Device of the result. None leaves it on the generator's device.
    """
    generator = as_generator(generator)
    # a GPU copies from pinned memory asynchronously, while the host continues
    pinned = device is not None and device.type == "cuda" and generator.device.type == "cpu"
    noise = torch.randn(shape, generator=generator, device=generator.device, dtype=torch.float32,
                        pin_memory=pinned and torch.cuda.is_available())
    return noise if device is None else noise.to(device, non_blocking=pinned)
