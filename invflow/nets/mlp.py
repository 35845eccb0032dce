"""A residual multilayer perceptron for flow maps and adapters on vectors."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

__all__ = ["MLP", "init_linear"]


def init_linear(layer: nn.Linear | nn.Conv2d, gain: float, generator: torch.Generator | None) -> None:
    """Normal weights of standard deviation ``gain / sqrt(fan_in)``, zero bias, from an explicit generator."""
    fan_in = layer.weight[0].numel()
    with torch.no_grad():
        layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator) * (gain / fan_in**0.5))
        if layer.bias is not None:
            layer.bias.zero_()


class MLP(nn.Module):
    """Perceptron ``(n, in_features), (n, embedding) -> (n, out_features)``; its last layer starts at zero.

    Args:
        in_features: Input size.
        out_features: Output size.
        width: Hidden size.
        depth: Hidden layers.
        embedding: Size of a conditioning vector, added after every hidden layer; 0 for none.
        num_frequencies: Number of sinusoids of each input as additional inputs (Tancik et al. 2020), needed for sharp
            edges; 0 for none.
        max_frequency: Largest of their angular frequencies, which are evenly spaced.
    """

    frequencies: Tensor

    def __init__(self, in_features: int, out_features: int, width: int = 256, depth: int = 5,
                 embedding: int = 0, num_frequencies: int = 0, max_frequency: float = 8.0) -> None:
        super().__init__()
        frequencies = max_frequency * torch.arange(1, num_frequencies + 1) / max(1, num_frequencies)
        self.register_buffer("frequencies", frequencies, persistent=False)
        sizes = [in_features * (1 + 2 * num_frequencies)] + [width] * depth
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        self.condition = nn.Linear(embedding, width * depth) if embedding else None
        self.last = nn.Linear(width, out_features)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        """Apply the network to ``x`` (n, in_features), conditioned on ``embedding`` (n, embedding)."""
        shifts: list[Tensor | None] = [None] * len(self.layers)
        if self.condition is not None:
            if embedding is None:
                raise ValueError("this MLP is conditional: pass its embedding, (n, embedding)")
            shifts = list(self.condition(embedding).chunk(len(self.layers), dim=1))
        if len(self.frequencies):
            angles = (x[:, :, None] * self.frequencies).flatten(1)
            x = torch.cat([x, angles.sin(), angles.cos()], dim=1)
        for layer, shift in zip(self.layers, shifts):
            h = layer(x) if shift is None else layer(x) + shift
            h = nn.functional.silu(h)
            x = x + h if x.shape == h.shape else h
        result: Tensor = self.last(x)
        return result
