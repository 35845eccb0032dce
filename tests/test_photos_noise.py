"""The noise level of photographs, estimated from one of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from invflow.noise import estimate_sigma


def noisy(name: str, sigma: float) -> torch.Tensor:
    data = pytest.importorskip("skimage.data")
    x = torch.from_numpy(np.atleast_3d(getattr(data, name)()) / 255).permute(2, 0, 1)[None, :, :300, :300]
    return x + sigma * torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype)


@pytest.mark.parametrize("name", ["astronaut", "chelsea", "coffee", "rocket", "camera", "brick"])
@pytest.mark.parametrize("sigma", [0.025, 0.1])
def test_the_level_of_a_photograph_is_known_to_a_tenth(name: str, sigma: float) -> None:
    assert float(estimate_sigma(noisy(name, sigma))) == pytest.approx(sigma, rel=0.11)


@pytest.mark.parametrize("name", ["astronaut", "chelsea", "coffee"])
def test_where_little_noise_was_added_the_photographs_own_counts_too(name: str) -> None:
    own = float(estimate_sigma(noisy(name, 0.0)))
    assert 0 < own < 0.008
    assert float(estimate_sigma(noisy(name, 0.01))) == pytest.approx((own**2 + 0.01**2) ** 0.5, rel=0.15)


def test_white_noise_is_not_underestimated_by_leaving_directions_out() -> None:
    y = 0.2 * torch.randn(4, 3, 160, 170, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(estimate_sigma(y), torch.full((4,), 0.2), rtol=0.03)


def test_only_observed_patches_count() -> None:
    g = torch.Generator().manual_seed(0)
    y = 0.1 * torch.randn(2, 1, 200, 200, generator=g)
    observed = torch.ones(1, 1, 200, 200, dtype=torch.bool)
    observed[:, :, 50:120, 30:170] = False
    y = torch.where(observed, y, 0.0)
    assert torch.allclose(estimate_sigma(y, observed), torch.full((2,), 0.1), rtol=0.05)
    scattered = torch.rand(1, 1, 200, 200, generator=g) < 0.7  # no patch is whole: the differences alone
    assert torch.allclose(estimate_sigma(torch.where(scattered, y, 0.0), scattered & observed),
                          torch.full((2,), 0.1), rtol=0.05)
