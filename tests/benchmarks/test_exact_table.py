"""Output of the tables of exactness and of ablations, against known results."""

from __future__ import annotations

import pytest
import torch

import invflow
from benchmarks.tables.ablation_table import corrections
from benchmarks.tables.exact_table import row
from benchmarks.tables.samples_table import patch_energy
from invflow.models.adapter import Adapter
from invflow.models.neural import NeuralFlowMap
from invflow.operators import RandomInpainting
from invflow.posterior import NFE, Posterior
from invflow.training.loop import seeded

SHAPE = (1, 8, 8)
NETWORK = {"channels": [8, 16], "blocks": 1, "embedding": 16}


def run(seed, shift=0.0, evidence=0.0, observations=400, count=64):
    g = torch.Generator().manual_seed(seed)
    samples = torch.randn(observations, count, 6, generator=g) + shift
    posterior = Posterior(samples, torch.zeros(observations, count), torch.full((observations,), evidence),
                          diagnostics={"k_hat": torch.linspace(0, 1, observations)})
    posterior.nfe = NFE(3, 4)
    return posterior


def test_two_exact_runs_agree_and_two_others_do_not():
    """The mean of 64 independent samples of variance 1 has the variance 1/64; a shift by s adds 64 s^2 / 2 to 1."""
    found = row(run(0), run(1))
    assert found["means"] == pytest.approx(1.0, abs=4 * (2 / 2400) ** 0.5 / 2 + 0.01)
    assert found["effective"] == pytest.approx(1.0)
    assert found["k_hat"] == pytest.approx(0.5, abs=0.01)
    limit = invflow.smc.reliable_k_hat(64)
    assert found["trusted"] == pytest.approx(limit, abs=0.01)
    assert found["calls"] == 7
    assert found["evidence"] == 0.0
    apart = row(run(0), run(1, shift=0.5, evidence=2.0))
    assert apart["means"] == pytest.approx((1 + 64 * 0.25 / 2) ** 0.5, rel=0.05)
    assert apart["evidence"] == pytest.approx(2.0)


def test_patches_are_scored_by_pairs():
    """With an odd number of samples, the last one is omitted; a sample equal to the truth has a score of 0."""
    samples = torch.rand(2, 5, *SHAPE, generator=seeded(0, 0, 0))
    assert torch.equal(patch_energy(samples, samples[:, 0]), patch_energy(samples[:, :4], samples[:, 0]))
    same = samples[:, :1].expand(-1, 4, -1, -1, -1)
    assert float(patch_energy(same, samples[:, 0]).abs().max()) < 1e-3


@pytest.mark.filterwarnings("ignore:VFM. the mean")  # untrained
def test_corrections_are_those_of_the_solver():
    """By the deviations: to the solver's own numbers. All alike: with the deviations' root mean square."""
    prior = NeuralFlowMap(SHAPE, options=NETWORK, generator=seeded(0, 0, 0)).eval()
    adapter = Adapter(SHAPE, classes=["random-inpainting"], options=NETWORK, generator=seeded(0, 0, 1), deviations=True)
    for module in (prior, adapter):
        for p in module.parameters():
            p.data += 0.1 * torch.randn(p.shape, generator=seeded(1, 0, p.numel()))
    adapter.trained_for = prior.fingerprint()
    g = seeded(3, 0, 0)
    operator = RandomInpainting(SHAPE, generator=g).randomize(2, g)
    likelihood = invflow.GaussianLikelihood(operator, operator.measure(torch.rand(2, *SHAPE, generator=g), 0.05,
                                                                       generator=g), 0.05)
    plain, solver = (invflow.VFM(prior, adapter.eval(), consistency=c).sample(
        likelihood, 3, generator=torch.Generator().manual_seed(7)).samples for c in (False, 1.0))
    with torch.no_grad():
        deviation = adapter.proposal(likelihood).deviation
        found = corrections(likelihood, plain, deviation, 7)
        level = torch.full_like(deviation, 0.3)
        alike = corrections(likelihood, plain, level, 7)
    assert torch.equal(found["none"], plain)
    torch.testing.assert_close(found["deviations"], solver, atol=1e-5, rtol=0)
    assert not torch.allclose(found["all pixels alike"], solver, atol=1e-3)
    torch.testing.assert_close(alike["all pixels alike"], alike["deviations"], atol=1e-5, rtol=0)
