"""The U-Net on images of any size: padding, receptive field, tiles."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from invflow.nets import unet
from invflow.nets.unet import Block, UNet, tiles

SHAPES = [(1, (16,), 1), (2, (8, 16), 1), (2, (8, 12), 2), (2, (8, 8, 12), 1), (4, (8, 12), 1)]


def shaken(patch: int = 2, channels: tuple[int, ...] = (8, 16), blocks: int = 1, attention: bool = False,
           dtype: torch.dtype = torch.float32) -> UNet:
    """A network with all weights drawn: heads and blocks that start at zero would hide what lies behind them."""
    network = UNet(3, 2, channels=channels, blocks=blocks, embedding=4, patch=patch, attention=attention)
    g = torch.Generator().manual_seed(1)
    for p in network.parameters():
        p.data = 0.2 * torch.randn(p.shape, generator=g) + (p.ndim == 3)  # gains stay around one
    return network.to(dtype).eval().requires_grad_(False)


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(7), dtype=dtype)


@pytest.mark.parametrize(("patch", "channels", "blocks"), SHAPES)
@pytest.mark.parametrize("offset", [(0, 0), (5, 3)])
def test_tiles_give_what_the_whole_image_gives(patch, channels, blocks, offset, monkeypatch):
    network = shaken(patch, channels, blocks)
    stride = network.stride
    height, width = 2 * network.halo + 3 * stride + offset[0], 2 * network.halo + 5 * stride + offset[1]
    x, embedding = randn(2, 3, height, width), randn(2, 4)
    whole = network(x, embedding)
    assert whole.shape == (2, 2, height, width)
    assert whole.std() > 0.05
    sizes, work = [], UNet._whole
    monkeypatch.setattr(UNet, "_whole", lambda self, x, embedding: sizes.append(x.shape) or work(self, x, embedding))
    with tiles(network, 2 * stride - 1):  # rounded up to two strides
        tiled = network(x, embedding)
    assert len(sizes) >= (2 if offset == (0, 0) else 4)
    assert max(map(max, sizes)) < max(height, width)
    assert (tiled - whole).abs().max() < 1e-5 * max(1.0, float(whole.abs().max()))
    assert network.tile is None


@pytest.mark.parametrize(("patch", "channels", "blocks"), SHAPES)
def test_strips_give_what_the_whole_image_gives(patch, channels, blocks, monkeypatch):
    """Without gradients, a block processes a large image strip by strip, with the same result up to rounding."""
    network = shaken(patch, channels, blocks, dtype=torch.float64)
    x, embedding = randn(1, 3, 96, 72, dtype=torch.float64), randn(1, 4, dtype=torch.float64)
    heights, work = [], Block._whole
    monkeypatch.setattr(Block, "_whole", lambda self, x, *own: heights.append(x.shape[-2]) or work(self, x, *own))
    whole = network(x, embedding)
    number = len(heights)
    monkeypatch.setattr(unet, "STRIP", 1)  # the fewest rows
    with torch.no_grad():
        strips = network(x, embedding)
    assert len(heights) > 3 * number
    assert max(heights[number:]) <= 12
    torch.testing.assert_close(strips, whole, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("patch", "channels", "blocks"), SHAPES)
def test_halo_is_the_reach_of_an_output_pixel(patch, channels, blocks):
    """Furthest input pixel with a gradient, over all positions in a stride: at most the halo, over a stride less."""
    network = shaken(patch, channels, blocks, dtype=torch.float64)
    stride, side = network.stride, 2 * network.halo + 3 * network.stride
    start = network.halo + stride
    x, reach = randn(1, 3, side, side, dtype=torch.float64).requires_grad_(), 0
    out = network(x, randn(1, 4, dtype=torch.float64))
    for row in (start, start + network.patch, start + stride - network.patch, start + stride - 1):
        gradient, = torch.autograd.grad(out[0, :, row, row].sum(), x, retain_graph=True)
        seen = gradient[0].abs().sum(0).nonzero()
        reach = max(reach, int((seen - row).abs().max()))
    assert network.halo - stride < reach <= network.halo


@pytest.mark.parametrize(("patch", "channels", "blocks"), SHAPES[:3])
def test_a_smaller_halo_would_not_do(patch, channels, blocks, monkeypatch):
    """In float64, where the few paths that reach furthest stand out of the rounding."""
    network = shaken(patch, channels, blocks, dtype=torch.float64)
    side = 2 * network.halo + 4 * network.stride
    x, embedding = randn(1, 3, side, network.stride, dtype=torch.float64), randn(1, 4, dtype=torch.float64)
    whole, halo = network(x, embedding), network.halo
    differences = []
    for smaller in (0, 1, 2):
        monkeypatch.setattr(UNet, "halo", halo - smaller * network.stride)
        with tiles(network, 2 * network.stride):
            differences.append(float((network(x, embedding) - whole).abs().max()))
    assert differences[0] < 1e-13
    assert differences[1] > 1e-13
    assert differences[2] > 100 * differences[0]


def test_the_padding_continues_the_last_pixels():
    network = shaken(2, (8, 12))
    x, embedding = randn(1, 3, 21, 30), randn(1, 4)
    padded = torch.cat([x, x[:, :, -1:].expand(-1, -1, 3, -1)], 2)
    padded = torch.cat([padded, padded[..., -1:].expand(-1, -1, -1, 2)], 3)
    assert torch.equal(network(x, embedding), network(padded, embedding)[:, :, :21, :30])
    assert network(x[:, :, :1, :1], embedding).shape == (1, 2, 1, 1)  # smaller than a stride


def test_with_attention_the_stride_must_divide():
    network = shaken(2, (8, 12), attention=True)
    with pytest.raises(ValueError, match="multiples of 4"):
        network(randn(1, 3, 18, 20), randn(1, 4))
    with pytest.raises(ValueError, match="attention=False"):
        _ = network.halo
    x = randn(1, 3, 64, 16)
    whole = network(x, randn(1, 4))
    with tiles(network, 4):  # leaves it alone
        assert torch.equal(network(x, randn(1, 4)), whole)


def test_gradients_and_derivatives_pass():
    network = shaken(2, (8,), dtype=torch.float64)
    x, embedding = randn(1, 3, 5, 40, dtype=torch.float64).requires_grad_(), randn(1, 4, dtype=torch.float64)
    with tiles(network, 2):
        gradient, = torch.autograd.grad(network(x, embedding).square().sum(), x)
        tangent = torch.func.jvp(lambda x: network(x, embedding), (x.detach(),), (torch.ones_like(x),))[1]
    expected, = torch.autograd.grad(network(x, embedding).square().sum(), x)
    assert torch.equal(gradient, expected)
    numeric = (network(x + 1e-6, embedding) - network(x - 1e-6, embedding)) / 2e-6
    torch.testing.assert_close(tangent, numeric.detach(), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("tile", [0, -8])
def test_tiles_have_a_size(tile):
    network = shaken()
    with tiles(network, tile), pytest.raises(ValueError, match="at least 1"):
        network(randn(1, 3, 64, 64), randn(1, 4))


def test_every_number_of_pieces_covers_the_side_once():
    from invflow.nets.unet import _pieces

    for side, core, halo in product((4, 40, 44, 48, 100), (4, 8, 16), (0, 4, 12)):
        covered = [low + i for low, _, first, last in _pieces(side, core, halo) for i in range(first, last)]
        assert covered == list(range(side))
