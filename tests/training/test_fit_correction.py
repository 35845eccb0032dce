"""Factors of the correction, fitted by the score."""

from __future__ import annotations

import pytest
import torch

import invflow
from invflow.models.adapter import Adapter
from invflow.models.neural import NeuralFlowMap
from invflow.operators import MatrixOperator
from invflow.training import TrainingProblem
from invflow.training.correction import fit_consistency, noise_in_the_mean

TINY = {"width": 8, "depth": 1}


def untrained(std=1.0):
    """A VFM whose samples are N(0, std^2) whatever was observed, which says that they deviate by 0.05."""
    prior = NeuralFlowMap((4,), network="mlp", options=TINY, decode_affine=(std, 0.0),
                          generator=torch.Generator().manual_seed(0))
    adapter = Adapter((4,), classes=["all", "none"], network="mlp", options=TINY, deviations=True,
                      generator=torch.Generator().manual_seed(0))
    adapter.trained_for = prior.fingerprint()
    return invflow.VFM(prior, adapter)


def problem(name, matrix, sigma):
    return TrainingProblem(MatrixOperator(matrix, image_shape=(4,), problem_class=name), sigma)


def test_factors_of_the_gaussian():
    """Blind samples of variance 1 want C = 1, a factor of 20 on 0.05; where nothing is observed, nothing is gained."""
    truth = torch.randn(1500, 4, generator=torch.Generator().manual_seed(1))
    vfm = untrained()
    problems = [problem("all", torch.eye(4), (0.2, 0.5)), problem("none", 1e-6 * torch.eye(4), 0.5)]
    fits = fit_consistency(vfm, truth, problems, levels=2, factors=(0.0, 2.0, 20.0, 200.0))
    assert [fit.factor for fit in fits[:2]] == [20.0, 20.0]
    assert [fit.sigma for fit in fits[:2]] == pytest.approx([0.2, 0.5])
    assert all(fit.gain > 10 * fit.gain_error for fit in fits[:2])
    assert list(vfm.adapter.consistency) == ["all"]
    assert [factor for _, factor in vfm.adapter.consistency["all"]] == [20.0, 20.0]
    with pytest.raises(ValueError, match="scored in pairs"):
        fit_consistency(vfm, truth, problems, num_samples=3)


def test_noise_in_the_mean():
    """0 for an estimate that has not seen y, 1 for y itself, the gain for a linear estimate."""
    g = torch.Generator().manual_seed(0)
    truth, operator = torch.randn(5000, 4, generator=g), MatrixOperator(torch.eye(4), image_shape=(4,))
    y = operator.measure(truth, 0.5, generator=g)
    likelihood = invflow.GaussianLikelihood(operator, y, 0.5)
    assert noise_in_the_mean(likelihood, torch.zeros_like(truth), truth) == pytest.approx(0, abs=0.06)
    assert noise_in_the_mean(likelihood, y, truth) == pytest.approx(1, abs=1e-5)
    assert noise_in_the_mean(likelihood, 0.8 * y, truth) == pytest.approx(0.8, abs=0.02)
