"""Embeddings of times and noise levels."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["TimeEmbedding"]


class TimeEmbedding(nn.Module):
    """Embedding of both times (s, t) of a flow map, or other scalars, by a few *slow* sinusoids and a small MLP.

    The Jacobian-vector product of the MeanFlow loss differentiates these features, and its size grows with their
    frequency. Fast sinusoids, as in diffusion models, make the one-step target too noisy to learn. The angular
    frequencies here are at most 6.

    Args:
        width: Size of the embedding.
        num_scalars: Number of scalars embedded together.
        num_frequencies: Number of sinusoids for each scalar.
        max_frequency: Largest angular frequency.
    """

    frequencies: Tensor

    def __init__(self, width: int, num_scalars: int = 2, num_frequencies: int = 8, max_frequency: float = 6.0) -> None:
        super().__init__()
        self.num_scalars = num_scalars
        self.register_buffer("frequencies", torch.linspace(0.5, max_frequency, num_frequencies), persistent=False)
        self.mlp = nn.Sequential(
            nn.Linear(num_scalars * (2 * num_frequencies + 1), width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()
        )

    def forward(self, *scalars: Tensor) -> Tensor:
        """``num_scalars`` tensors ``(n,)`` to ``(n, width)``."""
        stacked = torch.stack(scalars, dim=1)
        angles = stacked[:, :, None] * self.frequencies
        features = torch.cat([stacked[:, :, None], angles.sin(), angles.cos()], dim=2)
        result: Tensor = self.mlp(features.flatten(1))
        return result
