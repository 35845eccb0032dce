"""A run of NoiseSMC: its temperatures and step sizes, and its diagnostics."""

from __future__ import annotations

import math
import warnings
from pathlib import Path

import pytest
import torch
from noise_tools import F64, gaussian, generator, measured, quiet, randn

import invflow
from invflow import GaussianLikelihood, GaussianMixtureFlow, NoiseSMC
from invflow.operators import MatrixOperator
from invflow.registry import solver_by_name


def test_each_observation_has_its_own_schedule() -> None:
    sigma = torch.tensor([3.0, 0.02], dtype=F64)
    solver = NoiseSMC(gaussian(), chunk_size=1000)
    states = list(solver.iterate(measured([0.9, 0.9], sigma), 200, generator=generator()))
    path = torch.stack([state.temperature for state in states], dim=1)
    assert bool((path[:, 0] == 0).all())
    assert bool((path[:, -1] == 1).all())
    assert bool((path.diff(dim=1) >= 0).all())
    easy = int((path[0] < 1).sum())  # steps until it arrives
    assert easy < int((path[1] < 1).sum())
    # one that has arrived stays
    assert torch.equal(states[easy].particles.noise[0], states[-1].particles.noise[0])
    assert not torch.equal(states[easy].particles.noise[1], states[-1].particles.noise[1])
    assert bool(states[-1].acceptance[0].isnan())
    for state in states[1:-1]:
        if float(state.temperature[1]) < 1:
            assert float(state.ess[1]) == pytest.approx(180, rel=1e-4)  # nine tenths, the default
    acceptance = torch.stack([state.acceptance[1] for state in states[-3:]])
    assert float(acceptance.mean()) == pytest.approx(0.57, abs=0.12)
    assert float(states[-1].step_size[1]) < 0.3

    posterior = solver.sample(measured([0.9, 0.9], sigma), 200, generator=generator())
    assert torch.equal(posterior.samples, states[-1].particles.images)
    assert torch.equal(posterior.diagnostics["temperatures"], path[:, 1:])
    # alone, the first is what it was beside the other: also its cost is its own
    alone = solver.sample(measured([0.9], sigma[:1]), 200, generator=generator())
    assert alone.nfe.forward == 1 + solver.num_moves * easy
    assert alone.nfe.backward == 1 + solver.num_moves * easy
    assert posterior.nfe.forward == (2 + solver.num_moves * (easy + int((path[1] < 1).sum()))) / 2


def test_an_observation_does_not_feel_when_others_arrive() -> None:
    """Its random numbers are its own, whether the other has arrived long before or comes long after."""
    runs = []
    for other in (3.0, 0.002):
        sigma = torch.tensor([0.05, other], dtype=F64)
        solver = NoiseSMC(gaussian(), num_moves=2, chunk_size=1000, resampling="residual")
        runs.append(quiet(solver, measured([0.9, 0.9], sigma), 60, generator=generator()))
    assert runs[0].diagnostics["temperatures"].shape != runs[1].diagnostics["temperatures"].shape
    torch.testing.assert_close(runs[0].samples[0], runs[1].samples[0])


@pytest.mark.parametrize("step_size", [0.02, 1.0])
def test_step_size_is_found_from_a_wrong_start(step_size: float) -> None:
    solver = NoiseSMC(gaussian(), step_size=step_size, ess_threshold=0.9, num_moves=1, chunk_size=1000)
    posterior = quiet(solver, measured([0.9], 0.01), 200, generator=generator())
    acceptance = posterior.diagnostics["acceptance"][0]
    assert len(acceptance) > 12
    assert abs(float(acceptance[0]) - 0.57) > 0.1
    # Langevin steps on a target this flat in one direction: 0.57 up to the spread of 200 draws and of the trend
    assert float(acceptance[-4:].mean()) == pytest.approx(0.57, abs=0.08)


def test_a_limit_on_temperatures_is_kept() -> None:
    solver = NoiseSMC(gaussian(), max_temperatures=3, chunk_size=1000)
    with pytest.warns(UserWarning, match="effective sample size"):
        posterior = solver.sample(measured([0.9], 1e-4), 100, generator=generator())
    assert posterior.diagnostics["temperatures"].shape == (1, 3)
    assert float(posterior.diagnostics["temperatures"][0, -1]) == 1.0
    assert not bool(posterior.diagnostics["converged"])


def test_it_says_when_it_has_not_converged() -> None:
    rows = 3 * randn(150, 2)
    sigma = torch.tensor([0.01, 50.0], dtype=F64)
    operator = MatrixOperator(rows, image_shape=(2,))
    x = torch.tensor([[0.9, -1.0]], dtype=F64)
    likelihood = GaussianLikelihood(operator, x.expand(2, 2) @ rows.T, sigma)
    y = likelihood.simulate(x.expand(2, 2), generator(5))
    likelihood = GaussianLikelihood(operator, y, sigma)
    solver = NoiseSMC(gaussian(), temperatures=[1.0], num_moves=1, step_size=0.01, acceptance=None)
    words = r"1 of 2 observations: in observation 0, effectively 1 of 100 initial.*residual"
    with pytest.warns(UserWarning, match=words) as seen:
        posterior = solver.sample(likelihood, 100, generator=generator())
    assert seen[0].filename == __file__
    assert posterior.diagnostics["converged"].tolist() == [False, True]
    torch.testing.assert_close(posterior.diagnostics["residual"],  # a root mean square, as everywhere
                               likelihood.chi_square(posterior.samples).mean(1).sqrt())
    assert float(posterior.diagnostics["residual"][0]) > 2
    assert float(posterior.diagnostics["residual"][1]) == pytest.approx(1.0, abs=5 * math.sqrt(2 / 150))
    with pytest.warns(UserWarning, match="k-hat"):
        NoiseSMC(gaussian(), num_moves=0).sample(likelihood, 100, generator=generator())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        posterior = NoiseSMC(gaussian()).sample(likelihood, 400, generator=generator())
    assert bool(posterior.diagnostics["converged"].all())


def test_single_precision_and_files(tmp_path: Path) -> None:
    prior = GaussianMixtureFlow(torch.tensor([[0.5, -0.3], [1.0, 1.0]]), std=0.8, steps=4)
    posterior = solver_by_name("noise-smc", prior, num_moves=2).sample(
        measured([0.9, 0.1]).to(torch.float32), 64, generator=generator(), progress=True)
    assert posterior.samples.dtype == torch.float32
    posterior.save(tmp_path / "p.safetensors")
    loaded = invflow.Posterior.load(tmp_path / "p.safetensors")
    assert torch.equal(loaded.diagnostics["temperatures"], posterior.diagnostics["temperatures"])
    assert loaded.settings["num_moves"] == 2
    assert loaded.select(1).diagnostics["distinct_ancestors"].shape == (1,)


def test_moves_by_default_depend_on_the_start() -> None:
    """Few at each of many temperatures; more where there is but one."""
    assert (NoiseSMC(gaussian()).num_moves, NoiseSMC(gaussian(), start="rto").num_moves) == (6, 10)
    assert NoiseSMC(gaussian(), num_moves=0).num_moves == 0
    temperatures = quiet(NoiseSMC(gaussian()), measured([0.9], 0.05), 200, generator=generator()).diagnostics
    assert temperatures["temperatures"].shape[1] > 6
