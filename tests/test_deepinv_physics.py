"""Physics of deepinv as operators."""

from __future__ import annotations

import pytest
import torch

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


def test_deepinv_mistakes_are_named():
    import deepinv

    with pytest.raises(TypeError, match=r"Conv2d.*deepinv.physics.Physics"):
        DeepinvOperator(torch.nn.Conv2d(1, 1, 3), (1, 8, 8))
    with pytest.raises(ValueError, match=r"no tensors \['kernel'\].*filter"):
        DeepinvOperator(deepinv.physics.Blur(filter=torch.ones(1, 1, 3, 3)), (1, 8, 8), per_set=["kernel"])
    with pytest.raises(ValueError, match=r"does not take images \(1, 1, 9, 9\)"):
        DeepinvOperator(deepinv.physics.Inpainting((1, 8, 8), mask=0.5, rng=seeded()), (1, 9, 9))
