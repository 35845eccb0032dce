"""One measure of a posterior: the summary, a comparison and the tables agree."""

from __future__ import annotations

import pytest
import torch

import invflow
from invflow.evaluation import measures
from invflow.evaluation.measures import METRICS, measure
from invflow.evaluation.summary import summarise
from invflow.operators import Denoising

SHAPE = (2, 12, 12)


def case(weighted: bool) -> tuple[invflow.Posterior, invflow.GaussianLikelihood, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    truth = torch.rand(3, *SHAPE, generator=g)
    likelihood = invflow.GaussianLikelihood(Denoising(SHAPE), truth + 0.1 * torch.randn(truth.shape, generator=g), 0.1)
    samples = truth[:, None] + 0.2 * torch.randn(3, 40, *SHAPE, generator=g)
    log_weights = torch.randn(3, 40, generator=g) if weighted else None
    return invflow.Posterior(samples, log_weights=log_weights), likelihood, truth


@pytest.mark.parametrize("weighted", [False, True])
def test_values_are_those_of_the_definitions(weighted: bool) -> None:
    posterior, likelihood, truth = case(weighted)
    found = measure(posterior, likelihood, truth, generator=torch.Generator().manual_seed(1))
    assert set(found) <= set(METRICS)
    weights, error = posterior.weights.double()[..., None, None, None], posterior.samples - truth[:, None]
    if not weighted:  # E|X - y| - E|X - X'| / 2, without the pairs of a sample with itself
        pairs = (posterior.samples[:, :, None] - posterior.samples[:, None]).abs().double().sum((1, 2)) / (40 * 39)
        crps = error.abs().double().mean(1) - 0.5 * pairs
        assert torch.allclose(found["crps"], crps.flatten(1).mean(1), atol=1e-5)
    mean_error = (weights * posterior.samples).sum(1) - truth
    psnr = -10 * mean_error.square().flatten(1).mean(1).log10()
    assert torch.allclose(found["psnr"], psnr, atol=1e-4)
    residual = posterior.samples - likelihood.y[:, None]
    square = (weights[..., 0, 0, 0] * residual.square().flatten(2).mean(2)).sum(1) / 0.01
    assert torch.allclose(found["residual"], square.sqrt(), atol=1e-4)
    assert ("ess" in found) == weighted


def test_the_summary_says_the_same_and_no_more_is_computed_than_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    posterior, likelihood, truth = case(True)
    full = measure(posterior, likelihood, truth, generator=torch.Generator().manual_seed(1))
    summary = summarise(posterior, likelihood, truth)["per_observation"]
    for name in ("psnr", "ssim", "crps", "residual", "ess"):
        assert summary[name] == pytest.approx(full[name].tolist(), rel=1e-6)
    assert "energy" not in summary
    monkeypatch.setattr(measures, "energy_score", None)
    assert set(measure(posterior, likelihood, truth, only=("crps", "coverage"))) == {"crps", "coverage"}


def test_values_do_not_depend_on_how_many_pixels_are_sorted_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    posterior, likelihood, truth = case(False)
    names = ("crps", "coverage", "block_crps")
    whole = measure(posterior, likelihood, truth, only=names)
    monkeypatch.setattr(measures, "_VALUES_AT_A_TIME", 3 * 40 * 7)
    parts = measure(posterior, likelihood, truth, only=names)
    assert all(torch.allclose(whole[name], parts[name], atol=1e-7) for name in names)
    assert set(whole) == set(names)
