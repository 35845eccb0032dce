"""The lapped transform: orthonormal for any size, constants in frequency zero, better compaction, no steps."""

import math

import pytest
import torch

from invflow.linear.bands import bands_of
from invflow.linear.lapped import lapped_dct
from invflow.linear.spectral import block_dct, dct2

F64 = torch.float64


@pytest.mark.parametrize("shape", [(16, 24), (8, 8), (19, 30), (5, 8), (3, 1), (9, 15), (23, 33)])
def test_lapped_cosines_are_orthonormal_for_any_size(shape):
    x = torch.randn(2, 3, *shape, dtype=F64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(lapped_dct(lapped_dct(x), inverse=True), x)
    torch.testing.assert_close(lapped_dct(x).square().sum(), x.square().sum())


def test_a_short_last_block_overlaps_too():
    """A cosine of the last, shorter block reaches over its border into the block before, and no further."""
    for rest in (2, 3, 5, 7):
        coefficients = torch.zeros(8, 16 + rest, dtype=F64)
        coefficients[0, -1] = 1.0
        x = lapped_dct(coefficients, inverse=True)[0].abs()
        assert x[15] > 1e-3, rest
        assert x[: 16 - min(rest, 4)].max() < 1e-12, rest


def test_a_constant_has_only_frequency_zero():
    found = lapped_dct(torch.ones(29, 40, dtype=F64))
    expected = block_dct(torch.ones(29, 40, dtype=F64))
    torch.testing.assert_close(found, expected)


def test_coding_gain_is_that_of_the_lapped_orthogonal_transform():
    """For correlation 0.95 of neighbours, Malvar and Staelin (1989) give 9.22 dB; cosines of blocks have 8.83."""
    place = torch.arange(64, dtype=F64)
    covariance = 0.95 ** (place[:, None] - place).abs()

    def gain(transform):
        rows = _along(transform)
        variance = (rows @ covariance @ rows.T).diagonal()[24:32]  # an inner block
        return 10 * math.log10(variance.mean() / variance.log().mean().exp())

    assert gain(lapped_dct) == pytest.approx(9.22, abs=0.01)
    assert gain(block_dct) == pytest.approx(8.83, abs=0.01)


def _along(transform):
    """The transform along one axis as a matrix: that of an image with a single row."""
    return transform(torch.eye(64, dtype=F64)[:, None])[:, 0].T


def test_a_smooth_spectrum_leaves_no_step_between_blocks():
    """Variances that fall with frequency: neighbours in different blocks differ like neighbours in the same block."""
    frequency = torch.arange(8, dtype=F64).repeat(8)
    variance = 1 / (1 + frequency) ** 2
    ratio = {}
    for transform in (block_dct, lapped_dct):
        rows = _along(transform)
        covariance = rows.T @ (variance[:, None] * rows)
        step = covariance.diagonal()[1:] + covariance.diagonal()[:-1] - 2 * covariance.diagonal(1)
        ratio[transform.__name__] = float((step[31] / step[27]).sqrt())  # between pixels 31 and 32, and in a block
    assert abs(ratio["lapped_dct"] - 1) < 0.15 < ratio["block_dct"] - 1, ratio


def test_bands_are_those_of_the_frequency():
    """A cosine of the whole image is in the band of its frequency, and a block's coefficients likewise."""
    x = dct2(torch.eye(1600, dtype=F64)[12].view(40, 40), inverse=True)  # 12 / 80 cycles a pixel along the rows
    power = block_dct(x).square()
    found = [float(power[bands_of(40, 40) == band].sum()) for band in range(6)]
    assert max(range(6), key=found.__getitem__) == 1  # up to 5 / 32
    assert int(bands_of(40, 40, block=None)[0, 12]) == 1
    assert bands_of(11, 8)[8, 0] == 0  # a short block at the border
    assert bands_of(11, 8)[10, 0] == 3  # 2 / 6 of a cycle a pixel
