"""The table of guidance: correct where guidance is exact, and its rows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import invflow
from benchmarks.tables import guidance_table
from invflow.operators import MatrixOperator


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_guidance_is_right_for_white_gaussian_data() -> None:
    # of N(0, I) the covariance given a noisy state is what ``annealed`` takes, so that at strength 1 nothing is wrong
    prior = invflow.GaussianMixtureFlow(torch.zeros(1, 2), std=1.0)
    operator = MatrixOperator(torch.tensor([[1.0, 0.5]]))
    problem = invflow.Problem("white", None, operator, 0.5, sampler=lambda n, g: prior.sample(n, generator=g),
                              prior=lambda: prior)
    likelihood = invflow.GaussianLikelihood(operator, torch.tensor([[1.5]]), sigma=0.5)
    mean, covariance = invflow.ExactPosterior(prior).moments(likelihood)

    def moments(**options: object) -> tuple[torch.Tensor, torch.Tensor]:
        x = guidance_table.guided(problem, likelihood, 4000, seeded(), steps=400, **options)[0]  # type: ignore[arg-type]
        return x.mean(0), x.T.cov()

    right = moments(strength=1.0, annealed=True)
    assert float((right[0] - mean[0]).abs().max()) < 0.06
    assert float((right[1] - covariance[0]).abs().max()) < 0.06
    for options in ({"strength": 1.0, "annealed": False}, {"strength": 4.0, "annealed": True}):
        wrong = moments(**options)
        assert max(float((wrong[0] - mean[0]).abs().max()), float((wrong[1] - covariance[0]).abs().max())) > 0.1


def test_reweighted_noise_is_weighted_by_the_likelihood() -> None:
    problem = invflow.load_problem("gaussian/linear")
    _, likelihood = problem.simulate(2, generator=seeded())
    posterior = guidance_table.reweighted(problem, likelihood, 50, seeded(1))
    torch.testing.assert_close(posterior.weights, likelihood(posterior.samples).softmax(1))


def test_the_command_writes_table_and_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import matplotlib.pyplot as plt

    plt.switch_backend("Agg")
    monkeypatch.setattr(guidance_table, "STRENGTHS", (1.0,))
    monkeypatch.setattr(guidance_table, "_methods", lambda n, known=guidance_table._methods: {
        key: draw for key, draw in known(n).items() if not key[0].startswith("Noise")})
    guidance_table.main([str(tmp_path), "--samples", "16", "--observations", "2", "--seeds", "2"])
    assert (tmp_path / "guidance.png").stat().st_size > 1000
    lines = (tmp_path / "guidance.csv").read_text().splitlines()
    assert len(lines) == 1 + 2 * 3
    assert "| guidance, fixed | 1 |" in (tmp_path / "guidance.md").read_text()
    plt.close("all")
