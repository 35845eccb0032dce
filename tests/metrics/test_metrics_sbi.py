"""Metrics of calibration against those of sbi (Tejero-Cantero et al. 2020), on the same samples and references."""

from __future__ import annotations

import pytest
import torch

from invflow import metrics

pytest.importorskip("sbi", reason="sbi is not installed: pip install sbi")
F64 = torch.float64


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def test_ranks_agree_with_sbi():
    from sbi.diagnostics.sbc import _run_sbc

    samples, truth = randn(30, 19, 3), randn(30, 3, seed=1)
    wanted = _run_sbc(truth, truth, samples.transpose(0, 1), "marginals", show_progress_bar=False)
    found = metrics.random_ranks(samples, truth, torch.Generator().manual_seed(0))
    assert torch.equal(found.double(), wanted.double())


def test_tarp_agrees_with_sbi():
    from sbi.diagnostics.tarp import _run_tarp

    samples, truth, references = randn(200, 37, 3), randn(200, 3, seed=1), randn(200, 3, seed=2)
    # 23 bins for shares of 37: no share lies on an edge between two bins, where the sides would be conventions
    ecp, levels = _run_tarp(samples.transpose(0, 1), truth, references, num_bins=23, z_score_theta=False)
    ranks = metrics.tarp_ranks(samples, truth, references, torch.Generator().manual_seed(0))
    # sbi's levels are edges of a histogram over the shares found; the last edge is part of the last bin
    torch.testing.assert_close(metrics.tarp_curve(ranks, 37, levels.double())[:-1], ecp.double()[:-1])


def test_z_scores_and_contraction_agree_with_sbi():
    from sbi.utils.metrics import posterior_shrinkage, posterior_zscore

    prior, samples, truth = randn(50, 3, seed=2), randn(4, 30, 3), randn(4, 3, seed=1)
    found = metrics.z_scores(samples, truth), metrics.contraction(samples, prior.var(0))
    for b in range(4):
        torch.testing.assert_close(found[0][b].abs(), posterior_zscore(truth[b], samples[b]))
        torch.testing.assert_close(found[1][b], posterior_shrinkage(prior, samples[b]))


def test_mmd_agrees_with_sbi():
    from sbi.utils.metrics import unbiased_mmd_squared

    x, y = randn(2, 40, 3), 0.5 + randn(2, 30, 3, seed=1)
    found = metrics.mmd(x, y, bandwidth=1.7)
    for b in range(2):
        torch.testing.assert_close(found[b], unbiased_mmd_squared(x[b], y[b], scale=1.7))


def test_c2st_agrees_with_sbi():
    from sbi.utils.metrics import c2st

    # classifiers differ; both must come near the best accuracy there is, 0.5 erfc(-|shift| / (2 sqrt 2))
    x, y = randn(1000, 2), 1.0 + randn(1000, 2, seed=1)
    best = float(torch.special.ndtr(torch.tensor(2**0.5 / 2)))
    found = metrics.classifier_two_sample_test(x[None], y[None], generator=torch.Generator().manual_seed(0))
    error = (best * (1 - best) / 2000) ** 0.5
    assert abs(float(found.accuracy) - best) < 0.01 + 3 * error
    assert abs(float(found.accuracy) - float(c2st(x, y, seed=1, classifier="mlp"))) < 0.01 + 3 * error
