"""A solver behind the interface of deepinv's benchmarks, f(y, physics)."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import Tensor

import invflow
from invflow.deepinv_bridge import as_reconstructor

deepinv = pytest.importorskip("deepinv")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def prior() -> invflow.GaussianMixtureFlow:
    return invflow.GaussianMixtureFlow(torch.full((1, 1, 8, 8), 0.5), std=0.2)


@pytest.mark.parametrize("build", [invflow.ExactPosterior, lambda p: invflow.DPnP(p, iterations=10)])
def test_a_solver_runs_in_a_benchmark_as_a_function_of_y_and_physics(build: object) -> None:
    physics = deepinv.physics.Inpainting((1, 8, 8), mask=0.5, rng=seeded(),
                                         noise_model=deepinv.physics.GaussianNoise(0.1, rng=seeded(1)))
    truth = prior().generate(6, generator=seeded(2))
    f = as_reconstructor(build(prior()), num_samples=200)  # type: ignore[operator]
    assert list(inspect.signature(f.forward).parameters)[:2] == ["y", "physics"]
    y = physics(truth)
    images: Tensor = f(y, physics)
    assert images.shape == truth.shape
    assert torch.equal(images, f(y, physics))  # the same measurement, the same image
    one = torch.cat([f(row[None], physics) for row in y])  # a benchmark goes image by image, or in batches
    assert float((one - images).abs().max()) < 0.1
    # where a pixel was observed, the posterior mean shrinks it towards the prior's: 0.04 / (0.04 + 0.01)
    seen = physics.mask.expand_as(y) > 0
    wanted = torch.where(seen, 0.5 + 0.8 * (y - 0.5), 0.5)
    assert float((images - wanted).square().mean().sqrt()) < 0.04


def test_deepinv_tests_it_with_its_own_metric() -> None:
    physics = deepinv.physics.Denoising(deepinv.physics.GaussianNoise(0.1, rng=seeded(1)))
    truth = prior().generate(4, generator=seeded(2))
    y = physics(truth)
    model = as_reconstructor(invflow.ExactPosterior(prior()), num_samples=100)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(truth, y), batch_size=4)
    metric = deepinv.loss.metric.PSNR()
    found = deepinv.test(model, loader, physics, metrics=metric, compare_no_learning=False, verbose=False,
                         show_progress_bar=False)
    assert found["PSNR"] == pytest.approx(float(metric(model(y, physics), truth).mean()), abs=0.05)
    assert found["PSNR"] > float(metric(y, truth).mean())
