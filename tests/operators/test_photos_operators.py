"""Operators on photographs: sides without a common divisor, kernels that are small compared with the image."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from invflow.operator import SUMMARY_LATTICE
from invflow.operators import Blur, GaussianBlur, SuperResolution
from invflow.testing import check_operator
from invflow_operators._banded import downsampling
from invflow_operators._transfer import transfer_summary

F64 = torch.float64
FILTERS = ["average", "bilinear", "bicubic", "lanczos", "gaussian"]


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def exactly(*arguments) -> SuperResolution:
    """The operator with its weights in float64 from the start."""
    torch.set_default_dtype(F64)
    try:
        return SuperResolution(*arguments)
    finally:
        torch.set_default_dtype(torch.float32)


# -- super-resolution ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("filter", FILTERS)
@pytest.mark.parametrize(("shape", "factor"), [((1, 9, 14), 4), ((2, 7, 8), 3), ((1, 5, 6), 5), ((1, 10, 9), 1)])
def test_any_side_keeps_the_operators_contract(filter, shape, factor):
    check_operator(SuperResolution(shape, factor, filter))


@pytest.mark.parametrize("filter", FILTERS)
@pytest.mark.parametrize(("height", "width", "factor"), [(9, 14, 4), (29, 31, 3), (140, 131, 2), (259, 30, 3)])
def test_adjoint_and_pseudo_inverse_are_those_of_the_dense_matrix(filter, height, width, factor):
    operator = exactly((1, height, width), factor, filter)
    (m, n), size = operator.measurement_shape[1:], (height, width)
    assert (m, n) == (math.ceil(height / factor), math.ceil(width / factor))
    matrices = []
    for side in size:  # one axis at a time, by the library's own resampling
        unit, out = torch.eye(side, dtype=F64)[None, None], (math.ceil(side / factor), side)
        if filter in ("bilinear", "bicubic"):
            matrices.append(F.interpolate(unit, out, mode=filter, antialias=True)[0, 0])
        elif filter == "average":
            matrices.append(torch.stack([block.mean(0) for block in unit[0, 0].split(factor)]))
        else:
            matrices.append(written_out(filter, side, out[0]))
    rows, columns = matrices
    x, y = rand(2, 1, height, width), rand(2, 1, m, n, seed=1)
    torch.testing.assert_close(operator(x), rows @ x @ columns.mT, rtol=0, atol=1e-13)
    torch.testing.assert_close(operator.adjoint(y), rows.mT @ y @ columns, rtol=0, atol=1e-13)
    inverse = torch.linalg.pinv(rows) @ y @ torch.linalg.pinv(columns).mT
    torch.testing.assert_close(operator.pseudo_inverse(y), inverse, rtol=0, atol=1e-11)
    torch.testing.assert_close(operator(operator.pseudo_inverse(y)), y, rtol=0, atol=1e-12)


def written_out(filter: str, side: int, out: int) -> torch.Tensor:
    """Rows of a resampling, entry by entry."""
    scale, rows = side / out, []
    for i in range(out):
        row = []
        for j in range(side):
            d = (j + 0.5) / scale - (i + 0.5)
            if filter == "lanczos":
                weight = float(np.sinc(d) * np.sinc(d / 3)) if abs(d) < 3 else 0.0
            else:
                weight = math.exp(-0.5 * (d / 0.4) ** 2)
            row.append(weight)
        rows.append(row)
    matrix = torch.tensor(rows, dtype=F64)
    return matrix / matrix.sum(1, keepdim=True)


def test_the_last_block_averages_over_what_is_there():
    x = torch.arange(7.0).expand(1, 1, 1, 7)
    assert SuperResolution((1, 1, 7), 1)(x).shape == (1, 1, 1, 7)
    operator = SuperResolution((1, 3, 7), 3)
    assert operator(x.expand(1, 1, 3, 7))[0, 0, 0].tolist() == [1.0, 4.0, 6.0]
    assert operator.pseudo_inverse(torch.tensor([[[[1.0, 4.0, 6.0]]]]))[0, 0, 0].tolist() == [1, 1, 1, 4, 4, 4, 6]
    constant = torch.full((1, 1, 50, 51), 0.3)
    for filter in FILTERS:
        operator = SuperResolution((1, 50, 51), 4, filter)
        torch.testing.assert_close(operator(constant), torch.full((1, 1, 13, 13), 0.3))


@pytest.mark.parametrize("filter", ["bilinear", "bicubic", "lanczos"])
def test_filters_are_pillows(filter):
    x = rand(1, 1, 37, 50, dtype=torch.float32)
    image = Image.fromarray(x[0, 0].numpy())
    expected = np.asarray(image.resize((math.ceil(50 / 3), math.ceil(37 / 3)), Image.Resampling[filter.upper()]))
    found = SuperResolution((1, 37, 50), 3, filter)(x)[0, 0]
    torch.testing.assert_close(found, torch.from_numpy(expected.copy()), rtol=0, atol=1e-5)


@pytest.mark.parametrize("filter", ["bicubic", "lanczos"])
def test_a_long_side_is_a_matter_of_a_second(filter):
    """Dense matrices took minutes to invert at 4000 pixels; ``cond`` of R is about 1.5, so rounding stays small."""
    start = time.process_time()
    forward, inverse = downsampling(4001, 4, filter)
    assert forward.shape == (1001, 4001)
    assert forward.blocks.numel() + inverse.blocks.numel() < 4001 * 1001 / 3
    y = rand(1, 1, 3, 1001, dtype=torch.float32)
    torch.testing.assert_close(forward(inverse(y)), y, rtol=0, atol=1e-5)
    assert time.process_time() - start < 10


@pytest.mark.parametrize("factor", [0, 33, 2.5])
def test_factors_that_do_not_fit_are_named(factor):
    with pytest.raises(ValueError, match=r"images \(3, 40, 32\).* from 1 to 32"):
        SuperResolution((3, 40, 32), factor)


# -- the summary of a kernel -----------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [12, 28, 63, 64])
def test_summaries_up_to_64_pixels_are_relative_to_the_side(side):
    """Shipped adapters were trained with these numbers."""
    kernel, frequency = rand(1, 1, 5, 5), torch.tensor(SUMMARY_LATTICE, dtype=F64) * 3
    offset = torch.arange(5, dtype=F64) - 2
    phase = (frequency[:, 0, None, None] * offset[:, None] + frequency[:, 1, None, None] * offset) / side
    wave = torch.polar(torch.ones_like(phase), -2 * math.pi * phase)
    expected = (kernel[0, 0] * wave).sum((1, 2))
    found = transfer_summary(kernel, (2, 2), (1, side, side))[0]
    torch.testing.assert_close(found, torch.cat([expected.real, expected.imag]))


def test_a_kernel_has_one_summary_in_all_large_images():
    kernel = rand(7, 7)
    kernel = kernel / kernel.sum()
    small = Blur(kernel, (3, 64, 64)).context()[1]
    for shape in ((3, 65, 64), (3, 300, 211), (3, 64, 1000)):
        torch.testing.assert_close(Blur(kernel, shape).context()[1], small)
    narrow = GaussianBlur((3, 64, 64), std=1.0, kernel_size=25).context()[1]
    torch.testing.assert_close(GaussianBlur((3, 480, 640), std=1.0, kernel_size=25).context()[1], narrow)
    assert (narrow - small).abs().max() > 0.01
    assert (Blur(kernel, (3, 48, 64)).context()[1] - small).abs().max() > 0.01


@pytest.mark.parametrize(("filter", "factor"), [("average", 2), ("average", 3), ("average", 4), ("bicubic", 4)])
def test_super_resolution_has_one_summary_in_all_large_images(filter, factor):
    side = 64 - 64 % factor
    exact = SuperResolution((1, 64, 64), factor, filter)
    for shape in ((1, 64, 4 * side), (1, 480, 600)):
        found = SuperResolution(shape, factor, filter).context()[1]
        torch.testing.assert_close(found, exact.context()[1], rtol=0, atol=1e-6 if filter == "average" else 1e-2)


def test_the_summary_of_super_resolution_is_the_transfer_function_of_its_middle_row():
    for filter, shape, factor in (("average", (1, 28, 28), 4), ("bicubic", (1, 24, 36), 3)):
        operator = exactly(shape, factor, filter)
        profiles, centres = [], []
        for side, matrix in zip(shape[1:], (0, 1), strict=True):
            unit = torch.eye(side, dtype=F64)
            x = unit[:, None, :, None].expand(side, 1, side, shape[2]) if matrix == 0 else \
                unit[:, None, None, :].expand(side, 1, shape[1], side)
            middle = side // factor // 2
            y = operator(x.contiguous())[:, 0]
            profiles.append(y[:, middle, 0] if matrix == 0 else y[:, 0, middle])
            centres.append(middle * factor + (factor - 1) / 2)
        kernel = torch.outer(*profiles)[None, None]
        expected = transfer_summary(kernel, (centres[0], centres[1]), shape)
        torch.testing.assert_close(operator.context()[1], expected, rtol=0, atol=1e-9)
