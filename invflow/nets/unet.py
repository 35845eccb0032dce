"""A small U-Net with a space-to-depth stem, conditioned by feature-wise scales and shifts."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle, silu

__all__ = ["UNet"]


class PixelNorm(nn.Module):
    """Divides each pixel by the root mean square of its channels, with a learned gain.

    No statistics are shared between pixels, so a tiled image gives what the whole image gives; and its
    forward-mode derivative costs little, unlike that of group normalisation.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(dim=1, keepdim=True) + 1e-5) * self.gain


class Block(nn.Module):
    """Residual block: two 3 x 3 convolutions, a scale and a shift for each channel between them."""

    def __init__(self, channels: int, embedding: int) -> None:
        super().__init__()
        self.norm = PixelNorm(channels)
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.film = nn.Linear(embedding, 2 * channels)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.second.weight)
        nn.init.zeros_(self.film.weight)
        nn.init.zeros_(self.film.bias)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        scale, shift = self.film(embedding)[:, :, None, None].chunk(2, dim=1)
        h = self.first(silu(self.norm(x)))
        h = self.second(silu(h * (1 + scale) + shift))
        return x + h


class Attention(nn.Module):
    """Single-head self-attention over positions, written out: the fused kernels have no forward-mode derivative."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = PixelNorm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.out.weight)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).flatten(2).chunk(3, dim=1)
        weights = (q.transpose(1, 2) @ k * q.shape[1] ** -0.5).softmax(dim=2)
        return x + self.out((v @ weights.transpose(1, 2)).unflatten(2, x.shape[2:]))


class UNet(nn.Module):
    """U-Net ``(n, in_channels, H, W), (n, embedding) -> (n, out_channels, H, W)``; its last layer starts at zero.

    The stem folds ``patch`` x ``patch`` pixels into channels, so that no convolution runs at full resolution: on a
    CPU that is most of the cost. ``patch * 2 ** (levels - 1)`` must divide H and W (:attr:`stride`).

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        channels: width of each level, finest first.
        blocks: residual blocks for each level, on the way down and again on the way up.
        embedding: size of the conditioning vector.
        patch: side of the folded patches.
        attention: self-attention at the coarsest level. Without it the network is fully convolutional.
    """

    def __init__(self, in_channels: int, out_channels: int, channels: Sequence[int] = (64, 128), blocks: int = 2,
                 embedding: int = 128, patch: int = 2, attention: bool = True) -> None:
        super().__init__()
        self.patch = patch
        self.stride = patch * 2 ** (len(channels) - 1)
        self.stem = nn.Conv2d(in_channels * patch**2, channels[0], 3, padding=1)
        self.down = nn.ModuleList(nn.ModuleList(Block(c, embedding) for _ in range(blocks)) for c in channels)
        self.shrink = nn.ModuleList(nn.Conv2d(4 * a, b, 1) for a, b in pairwise(channels))
        self.attention = Attention(channels[-1]) if attention else nn.Identity()
        self.up = nn.ModuleList(nn.ModuleList(Block(c, embedding) for _ in range(blocks)) for c in channels)
        self.grow = nn.ModuleList(nn.Conv2d(b, 4 * a, 1) for a, b in pairwise(channels))
        self.norm = PixelNorm(channels[0])
        self.head = nn.Conv2d(channels[0], out_channels * patch**2, 3, padding=1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Apply the network; H and W must be multiples of :attr:`stride`."""
        if x.shape[-1] % self.stride or x.shape[-2] % self.stride:
            raise ValueError(
                f"the image is {x.shape[-2]} x {x.shape[-1]}, but the U-Net takes sides that are multiples of "
                f"{self.stride}: crop or pad it"
            )
        x = self.stem(pixel_unshuffle(x, self.patch).contiguous(memory_format=torch.channels_last))
        skips: list[Tensor] = []
        for level, blocks in enumerate(self.down):
            for block in blocks:  # type: ignore[attr-defined]
                x = block(x, embedding)
            if level < len(self.shrink):
                skips.append(x)
                x = self.shrink[level](pixel_unshuffle(x, 2))
        x = self.attention(x)
        for level in reversed(range(len(self.up))):
            for block in self.up[level]:  # type: ignore[attr-defined]
                x = block(x, embedding)
            if level > 0:
                x = skips.pop() + pixel_shuffle(self.grow[level - 1](x), 2)
        return pixel_shuffle(self.head(silu(self.norm(x))), self.patch)
