"""Large pictures in blocks: the result equals that of the whole picture."""

from __future__ import annotations

import pytest
import torch

import invflow
from invflow.linear.spectral import Spectrum
from invflow.models.neural import NeuralFlowMap
from invflow.models.spectral_adapter import SpectralAdapter
from invflow.operator import Operator
from invflow.operators import Blur, Denoising, MaskInpainting, SuperResolution
from invflow.restore.blocks import posterior_in_blocks
from invflow.restore.posterior import built_again

SIGMA, SHAPE = 0.04, (3, 400, 560)


@pytest.fixture(scope="module")
def vfm() -> invflow.VFM:
    """Untrained: the adapter proposes the best linear estimate under a power law."""
    spectrum = Spectrum(3, (0.03 / Spectrum.frequencies()).log().float().expand(3, -1))
    flow = NeuralFlowMap((3, 16, 16), network="none", skip="spectral", mean=torch.zeros(3, 1, 1),
                         std=torch.full((3, 1, 1), 0.5), spectrum=spectrum)
    classes = ["denoising", "box-inpainting", "super-resolution-x2", "gaussian-blur"]
    adapter = SpectralAdapter.for_map(flow, classes, options={"channels": [8, 8], "blocks": 1, "embedding": 8},
                                      generator=torch.Generator().manual_seed(1))
    adapter.trained_for = flow.fingerprint()
    return invflow.VFM(flow, adapter)


def operator_of(kind: str) -> Operator:
    if kind == "noise":
        return Denoising(SHAPE)
    if kind == "scratches":
        mask = torch.ones(SHAPE[1:])
        mask[180:186, 20:540] = 0
        mask[10:390, 250:254] = 0
        return MaskInpainting(mask, SHAPE, "box-inpainting")
    if kind == "blur":
        grid = torch.arange(-6, 7)
        kernel = torch.exp(-(grid[:, None] ** 2 + grid**2) / 8)
        return Blur(kernel / kernel.sum(), SHAPE, padding="reflect", problem_class="gaussian-blur")
    return SuperResolution(SHAPE, factor=2, filter="gaussian" if kind == "a filter" else "average")


@pytest.mark.parametrize("kind", ["noise", "scratches", "blur", "smallness", "a filter"])
def test_blocks_give_what_the_whole_picture_gives(vfm: invflow.VFM, kind: str) -> None:
    g, operator = torch.Generator().manual_seed(0), operator_of(kind)
    x = vfm.prior_samples(1, SHAPE, generator=g)
    y = operator.measure(x, SIGMA, generator=g)
    whole, spread = posterior_in_blocks(vfm, operator, y, SIGMA, 8, torch.Generator().manual_seed(1), block=4096)
    told: list[tuple[int, int]] = []
    mean, away = posterior_in_blocks(vfm, operator, y, SIGMA, 8, torch.Generator().manual_seed(1),
                                     lambda done, total, left: told.append((done, total)), block=300)
    assert told == [(k + 1, told[-1][1]) for k in range(told[-1][1])]
    assert told[-1][1] >= 4
    assert mean.shape == whole.shape == SHAPE
    assert away.shape == spread.shape == (8, *SHAPE)
    error = float((whole - x[0]).square().mean().sqrt())
    assert float((mean - whole).square().mean().sqrt()) < 0.1 * error
    assert float((mean - x[0]).square().mean().sqrt()) < 1.01 * error
    # where blocks meet, samples spread as far as in their middle
    widths = away.float().square().mean((0, 1)) / spread.square().mean((0, 1)).clamp(min=1e-12)
    assert float(away.float().square().mean()) == pytest.approx(float(spread.square().mean()), rel=0.1)
    seams = widths.unfold(0, 20, 20).unfold(1, 20, 20).mean((2, 3))
    assert float(seams.min()) > 0.6
    assert float(seams.max()) < 1.6


@pytest.mark.parametrize("kind", ["noise", "scratches", "blur", "smallness", "a filter"])
def test_an_operator_that_is_built_again_is_the_same(kind: str) -> None:
    operator = operator_of(kind)
    again, x = built_again(operator, SHAPE), torch.rand(1, *SHAPE, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(again(x), operator(x), rtol=0, atol=0)
    assert (again.problem_class, again.stand_ins) == (operator.problem_class, operator.stand_ins)


def test_a_hole_larger_than_a_block_is_filled_with_something(vfm: invflow.VFM) -> None:
    mask = torch.ones(1000, 400)
    mask[:700] = 0
    y = 0.25 + 0.02 * torch.randn(1, 3, 1000, 400, generator=torch.Generator().manual_seed(0))
    operator = MaskInpainting(mask, (3, 1000, 400), "box-inpainting")
    mean, away = posterior_in_blocks(vfm, operator, y * mask, 0.02, 2, torch.Generator().manual_seed(1), block=256)
    assert bool(mean.isfinite().all() and away.isfinite().all())
    torch.testing.assert_close(mean[:, :200].mean((1, 2)), torch.full((3,), 0.25), atol=0.01, rtol=0)
    assert float(away[:, :, :200].float().std()) > 0.02
