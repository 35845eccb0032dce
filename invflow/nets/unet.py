"""A small U-Net with a space-to-depth stem, conditioned by feature-wise scales and shifts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, pixel_shuffle, pixel_unshuffle, silu

__all__ = ["UNet", "can_tile", "tiles"]


#: values of an activation that a block processes at a time on a CPU: buffers that stay in its cache and are reused,
#: where the allocator would get memory of a whole large image from the system, and return it, for each operation
STRIP = 2**21


class PixelNorm(nn.Module):
    """Normalisation that divides each pixel by the root mean square of its channels, with a learned gain.

    Pixels share no statistics, so a tiled image gives the same result as the whole image. Its
    forward-mode derivative is cheap, unlike that of group normalisation.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(dim=1, keepdim=True) + 1e-5) * self.gain


class Block(nn.Module):
    """Residual block: two 3 x 3 convolutions, with a scale and a shift for each channel in between."""

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
        height = x.shape[-2]
        rows = max(8, STRIP // x[:, :, 0].numel())
        if height <= rows or x.device.type != "cpu" or torch.is_grad_enabled():
            return self._whole(x, scale, shift)
        # an output row depends on two rows above and two below it
        cuts = [(max(top - 2, 0), top, min(top + rows, height)) for top in range(0, height, rows)]
        return torch.cat([self._whole(x[..., low : stop + 2, :], scale, shift)[..., top - low : stop - low, :]
                          for low, top, stop in cuts], dim=-2)

    def _whole(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        h = self.first(silu(self.norm(x)))
        h = self.second(silu(h * (1 + scale) + shift))
        result: Tensor = x + h
        return result


class Attention(nn.Module):
    """Single-head self-attention over positions, written explicitly: fused kernels have no forward-mode derivative."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = PixelNorm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.out.weight)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).flatten(2).chunk(3, dim=1)
        weights = (q.transpose(1, 2) @ k * q.shape[1] ** -0.5).softmax(dim=2)
        result: Tensor = x + self.out((v @ weights.transpose(1, 2)).unflatten(2, x.shape[2:]))
        return result


class UNet(nn.Module):
    """U-Net ``(n, in_channels, H, W), (n, embedding) -> (n, out_channels, H, W)``; its last layer starts at zero.

    The stem folds ``patch`` x ``patch`` pixels into channels, so no convolution runs at full resolution, which would
    be most of the cost on a CPU.

    Without attention, an image may have any size. If its sides are not multiples of ``patch * 2 ** (levels - 1)``
    (:attr:`stride`), it is padded on the right and at the bottom with its last pixels, and the output is cropped.
    An output pixel then depends on no input further than :attr:`halo` pixels away, so a large image can be processed
    in overlapping tiles, with the same result up to rounding. With attention, the stride must divide H and W.

    Args:
        in_channels: Number of input channels.
        out_channels: Number of output channels.
        channels: Width of each level, finest first.
        blocks: Residual blocks for each level, on the way down and again on the way up.
        embedding: Size of the conditioning vector.
        patch: Side of the folded patches.
        attention: Whether to use self-attention at the coarsest level. Without it the network is fully convolutional.

    Attributes:
        stride: The padded sides are multiples of this number.
        tile: Side of the tiles in pixels, without the overlap, rounded up to the stride; None, the default: no
            tiles. Images with sides up to ``tile + 2 * halo`` are not cut, nor is any image while a gradient
            is recorded. :func:`tiles` sets it temporarily.

    Example:
        >>> import torch
        >>> from invflow.nets.unet import UNet
        >>> network = UNet(3, 3, channels=(8, 16), blocks=1, embedding=4, attention=False)
        >>> network(torch.zeros(1, 3, 50, 33), torch.zeros(1, 4)).shape, network.halo
        (torch.Size([1, 3, 50, 33]), 32)
    """

    tile: int | None = None

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

    @property
    def halo(self) -> int:
        """Distance in pixels of the inputs that an output pixel may depend on, rounded up to the stride.

        Raises:
            ValueError: With attention, which depends on the whole image.
        """
        if not isinstance(self.attention, nn.Identity):
            raise ValueError("a U-Net with attention depends on the whole image: build it with attention=False")
        levels, reach = len(self.down), 0
        for cell in range(2 ** (levels - 1)):  # the position of a cell in its coarsest cell determines its reach
            radius = 2 * len(self.up[0])  # type: ignore[arg-type]
            low, high = cell - 1 - radius, cell + 1 + radius  # from the head through the finest blocks of the way up
            for _ in range(levels - 1):
                low, high = low // 2 - radius, high // 2 + radius
            for level in range(levels):  # backwards, from the coarsest blocks of the way down
                low, high = (2 * low, 2 * high + 1) if level else (low, high)
                low, high = low - radius, high + radius
            low, high = low - 1, high + 1  # the stem
            reach = max(reach, self.patch * (cell + 1 - low) - 1, self.patch * (high + 1 - cell) - 1)
        result: int = -(-reach // self.stride) * self.stride
        return result

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Apply the network.

        Args:
            x: ``(n, in_channels, H, W)``.
            embedding: ``(n, embedding)``.

        Returns:
            ``(n, out_channels, H, W)``.

        Raises:
            ValueError: With attention, if the sides are not multiples of the stride.
        """
        height, width = x.shape[-2:]
        bottom, right = -height % self.stride, -width % self.stride
        if bottom or right:
            if not isinstance(self.attention, nn.Identity):
                raise ValueError(
                    f"the image is {height} x {width}, but this U-Net needs sides that are multiples of "
                    f"{self.stride}: crop or pad it"
                )
            x = pad(x, (0, right, 0, bottom), mode="replicate")
        if self.tile is None or (torch.is_grad_enabled() and self._needs_gradient(x, embedding)):
            out = self._whole(x, embedding)
        else:
            out = self._tiled(x, embedding, self.tile)
        return out[..., :height, :width] if bottom or right else out

    def _needs_gradient(self, *inputs: Tensor) -> bool:
        return any(x.requires_grad for x in inputs) or any(p.requires_grad for p in self.parameters())

    def _tiled(self, x: Tensor, embedding: Tensor, tile: int) -> Tensor:
        """Apply the network to overlapping tiles of a padded image and join the cores of their outputs."""
        if tile < 1:
            raise ValueError(f"tile={tile}: pass the side of a tile in pixels, at least 1, or None")
        core, halo = -(-tile // self.stride) * self.stride, self.halo
        pieces = [_pieces(side, core, halo) for side in x.shape[-2:]]
        if all(len(along) == 1 for along in pieces):
            return self._whole(x, embedding)
        rows = []
        for top, bottom, first, last in pieces[0]:
            row = []
            for left, right, begin, end in pieces[1]:
                out = self._whole(x[..., top:bottom, left:right], embedding)
                row.append(out[..., first:last, begin:end].clone())  # not a view, which would keep the whole tile
            rows.append(torch.cat(row, dim=-1))
        return torch.cat(rows, dim=-2)

    def _whole(self, x: Tensor, embedding: Tensor) -> Tensor:
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


def _pieces(side: int, core: int, halo: int) -> list[tuple[int, int, int, int]]:
    """Cuts along one axis: start and end of each piece in the image, and of its core in the piece."""
    if side <= core + 2 * halo:
        return [(0, side, 0, side)]
    cuts = []
    for start in range(0, side, core):
        stop = min(start + core, side)
        low, high = max(start - halo, 0), min(stop + halo, side)
        cuts.append((low, high, start - low, stop - low))
    return cuts


@contextmanager
def tiles(module: nn.Module, tile: int | None) -> Iterator[None]:
    """Context in which all U-Nets without attention in a module work in tiles.

    Args:
        module: A U-Net, or a module that contains some.
        tile: Side of the tiles in pixels, without the overlap; None: whole images.

    Example:
        >>> import torch
        >>> from invflow.nets.unet import UNet, tiles
        >>> network = UNet(1, 1, channels=(8,), blocks=1, embedding=4, attention=False).requires_grad_(False)
        >>> with tiles(network, 16):
        ...     network(torch.zeros(1, 1, 80, 40), torch.zeros(1, 4)).shape
        torch.Size([1, 1, 80, 40])
    """
    networks = _local(module)
    before = [network.tile for network in networks]
    for network in networks:
        network.tile = tile
    try:
        yield
    finally:
        for network, value in zip(networks, before, strict=True):
            network.tile = value


def can_tile(module: nn.Module) -> bool:
    """Whether :func:`tiles` changes anything in a module."""
    return bool(_local(module))


def _local(module: nn.Module) -> list[UNet]:
    return [m for m in module.modules() if isinstance(m, UNet) and isinstance(m.attention, nn.Identity)]
