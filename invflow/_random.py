"""Random numbers from an explicit generator: no function of the library reads or writes the global seed."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["as_generator", "draw_noise"]


def as_generator(generator: torch.Generator | None) -> torch.Generator:
    """The generator that was passed, else a fresh one on the CPU, seeded by the operating system."""
    if generator is None:
        generator = torch.Generator()
        generator.seed()
    return generator


def draw_noise(shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
    """Standard normal numbers in float32 on the generator's device.

    Always float32, whatever the model's type, so that a seed means the same noise in float32, bfloat16 and float64.
    """
    generator = as_generator(generator)
    return torch.randn(shape, generator=generator, device=generator.device, dtype=torch.float32)
