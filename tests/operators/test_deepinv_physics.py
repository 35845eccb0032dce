"""Physics of deepinv as operators."""

from __future__ import annotations

import math

import pytest
import torch

import invflow
from invflow.operators import Blur, DeepinvOperator
from invflow.testing import check_operator


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.rand(*shape, generator=seeded(seed), dtype=dtype)


def test_deepinv_mri_with_masks_per_image(device):
    from deepinv.physics import MRI
    from deepinv.physics.generator import GaussianMaskGenerator

    masks = GaussianMaskGenerator((2, 8, 8), acceleration=2, rng=seeded())
    operator = DeepinvOperator(MRI(img_size=(2, 8, 8)), (2, 8, 8), per_set=["mask"], physics_generator=masks)
    check_operator(operator, device=device)
    random = operator.randomize(3, seeded())
    assert torch.equal(random.observed(), random.physics.mask.expand(3, 2, 8, 8).bool())


def test_deepinv_physics_is_frozen():
    import deepinv

    physics = deepinv.physics.Blur(filter=torch.ones(1, 1, 3, 3) / 9, padding="circular")
    operator, x = DeepinvOperator(physics, (1, 8, 8)), rand(2, 1, 8, 8, dtype=torch.float32)
    before = operator(x)
    physics.update(filter=torch.zeros(1, 1, 3, 3))
    assert torch.equal(operator(x), before)
    torch.testing.assert_close(before, Blur(torch.ones(3, 3) / 9, (1, 8, 8))(x))


def test_deepinv_complex_lists_and_nonlinear():
    import deepinv

    retrieval = deepinv.physics.RandomPhaseRetrieval(m=20, img_size=(1, 3, 3), rng=seeded())
    operator, x = DeepinvOperator(retrieval, (1, 3, 3)), rand(2, 1, 3, 3, dtype=torch.float32)
    assert not operator.linear
    torch.testing.assert_close(operator(x), retrieval.A(x.to(torch.cfloat)))
    maps = torch.ones(1, 2, 6, 6, dtype=torch.cfloat)
    coils = deepinv.physics.MultiCoilMRI(img_size=(2, 6, 6), coil_maps=maps)
    stacked = deepinv.physics.Decolorize().stack(deepinv.physics.Demosaicing((3, 6, 6)))
    for physics, shape, measured in ((coils, (2, 6, 6), (2, 2, 6, 6)), (stacked, (3, 6, 6), (36 + 108,))):
        operator = DeepinvOperator(physics, shape)
        assert operator.measurement_shape == measured
        y, x = torch.randn(2, *measured, generator=seeded()), rand(2, *shape, dtype=torch.float32)
        left, right = (operator(x) * y).sum(), (x * operator.adjoint(y)).sum()
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("saturate", [lambda x: (2 * x).clamp(0, 1), lambda x: (x - 0.7).sign(),
                                      lambda x: (x - 0.5).relu()], ids=["clamp", "one-bit", "relu"])
def test_a_saturating_physics_keeps_all_its_entries(saturate):
    import deepinv

    operator = DeepinvOperator(deepinv.physics.Physics(A=saturate), (1, 8, 8))
    assert operator.observed() is None
    y, x = rand(1, 1, 8, 8, seed=1), rand(1, 3, 1, 8, 8, seed=2)
    likelihood = invflow.GaussianLikelihood(operator.to(torch.float64), y, 0.1)
    off = (y[:, None] - saturate(x)).square().sum((2, 3, 4))
    expected = -off / (2 * 0.1**2) - 64 * math.log(0.1 * math.sqrt(2 * math.pi))
    torch.testing.assert_close(likelihood(x), expected, rtol=1e-12, atol=0)
    assert likelihood.count_observed().tolist() == [64]


def test_a_nonlinear_physics_leaves_out_what_its_mask_does():
    import deepinv

    class MaskedClamp(deepinv.physics.Physics):
        def __init__(self, mask):
            super().__init__()
            self.register_buffer("mask", mask)

        def A(self, x, **kwargs):
            return self.mask * (2 * x).clamp(0, 1)

    mask = (rand(1, 8, 8, seed=3) < 0.5).float()
    assert torch.equal(DeepinvOperator(MaskedClamp(mask), (1, 8, 8)).observed()[0], mask.bool())
    # linear physics are known by what they measure, whatever they call their masks
    linear = deepinv.physics.LinearPhysics(A=lambda x: mask * x, A_adjoint=lambda y: mask * y)
    for physics in (linear, deepinv.physics.Inpainting((1, 8, 8), mask=mask)):
        assert torch.equal(DeepinvOperator(physics, (1, 8, 8)).observed()[0], mask.bool())


def test_a_pixel_that_happens_to_be_grey_is_observed():
    import deepinv

    image = rand(1, 1, 8, 8, dtype=torch.float32)
    image[0, 0, 3, 4] = 0.5
    operator = DeepinvOperator(deepinv.physics.Denoising(), (1, 8, 8))
    assert bool(operator._find_measured(image).all())


def test_deepinv_mistakes_are_named():
    import deepinv

    with pytest.raises(TypeError, match=r"Conv2d.*deepinv.physics.Physics"):
        DeepinvOperator(torch.nn.Conv2d(1, 1, 3), (1, 8, 8))
    with pytest.raises(ValueError, match=r"no tensors \['kernel'\].*filter"):
        DeepinvOperator(deepinv.physics.Blur(filter=torch.ones(1, 1, 3, 3)), (1, 8, 8), per_set=["kernel"])
    with pytest.raises(ValueError, match=r"does not take images \(1, 1, 9, 9\)"):
        DeepinvOperator(deepinv.physics.Inpainting((1, 8, 8), mask=0.5, rng=seeded()), (1, 9, 9))
