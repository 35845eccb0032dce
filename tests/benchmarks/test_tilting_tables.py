"""The tables of tilting: the size of a map's error, equal calls, resuming, and which errors weights correct."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from tilting_models import Gaussian, Tilt

from benchmarks.tables.tilting_budget import METHODS, SEARCHES, evaluate_budget, takes
from benchmarks.tables.tilting_digits import BUDGET, LOOK_AHEADS, DigitReward
from benchmarks.tables.tilting_parts import Replicated, affordable, from_base
from benchmarks.tables.tilting_tables import ROWS, TABLES, fill
from benchmarks.tables.tilting_weights import FirstHalf, PerturbedMap, evaluate_dimension, evaluate_error
from invflow import FMTT
from invflow_problems.half_plane import left_penalty, ring_of_gaussians


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def as_text(rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    return [{name: str(value) for name, value in row.items()} for row in rows]


@pytest.mark.parametrize("where", ["jump", "both"])
def test_the_error_of_the_map_has_the_size_that_it_says(where: str) -> None:
    ring = ring_of_gaussians(dtype=torch.float64, steps=4)
    wrong = PerturbedMap(ring, 0.2, where)
    # the ring's variance in each coordinate is 4.8^2 / 2 + 0.5
    assert wrong.spread == pytest.approx((4.8**2 / 2 + 0.5) ** 0.5)
    z = torch.randn(20_000, 2, generator=generator(), dtype=torch.float64)
    square = (wrong.jump(z, 0.0, 1.0) - ring.jump(z, 0.0, 1.0)).square().mean(1)
    error = float(square.std()) / len(z) ** 0.5
    assert abs(float(square.mean()) - (0.2 * wrong.spread) ** 2) < 4 * error


@pytest.mark.parametrize("where", ["jump", "both"])
def test_a_short_jump_follows_the_velocity_of_the_same_map(where: str) -> None:
    ring = ring_of_gaussians(dtype=torch.float64, steps=4)
    wrong, x, h = PerturbedMap(ring, 0.4, where), torch.randn(50, 2, generator=generator(), dtype=torch.float64), 1e-5
    torch.testing.assert_close((wrong.jump(x, 0.3, 0.3 + h) - x) / h, wrong.velocity(x, 0.3), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(wrong.jump(x, 0.3, 0.3), x)
    off = (wrong.velocity(x, 0.3) - ring.velocity(x, 0.3)).abs().max()
    assert off == 0 if where == "jump" else off > 0.5


def test_without_an_error_it_is_the_map() -> None:
    ring, x = ring_of_gaussians(steps=4), torch.randn(5, 2, generator=generator())
    right = PerturbedMap(ring, 0.0)
    torch.testing.assert_close(right.jump(x, 0.1, 0.9), ring.jump(x, 0.1, 0.9))
    with pytest.raises(ValueError, match="pass size >= 0"):
        PerturbedMap(ring, -0.1)
    with pytest.raises(ValueError, match="'jump' or 'both'"):
        PerturbedMap(ring, 0.1, "velocity")


def test_every_look_ahead_takes_as_many_calls_for_its_digits() -> None:
    reward = Tilt(lambda x: -x.square().sum(1), 2)
    for name, settings in LOOK_AHEADS.items():
        def make(steps: int, settings: dict[str, Any] = settings) -> FMTT:
            return FMTT(Gaussian(), steps=steps, **settings)

        solver = affordable(make, reward, BUDGET)
        nfe = solver.sample(reward, 30, generator=generator()).nfe
        assert nfe.forward + nfe.backward == BUDGET, name


def test_a_budget_that_is_too_small_is_refused() -> None:
    reward = Replicated(left_penalty, 2)
    with pytest.raises(ValueError, match="too small for two steps"):
        affordable(lambda steps: FMTT(ring_of_gaussians(), steps=steps), reward, 3)


@pytest.mark.parametrize("method", [name for name in METHODS if name != "NoiseSMC"])
def test_no_method_exceeds_its_budget(method: str) -> None:
    if takes("mixture/half-plane", method):
        rows = evaluate_budget("mixture/half-plane", method, 12, particles=16)
        assert len(rows) == ROWS
        # Jarzynski weights without a look-ahead take the velocity at the end, too
        assert 8 <= rows[0]["calls"] + rows[0]["backward"] <= 12 + (method == "FMTT Jarzynski, none")


def test_search_finds_the_reward_and_loses_the_law() -> None:
    def means(method: str) -> dict[str, float]:
        rows = evaluate_budget("mixture/half-plane", method, 25, particles=100)
        return {name: sum(row[name] for row in rows) / ROWS for name in ("reward", "w1", "mode_error", "modes")}

    exact, twisted = means("exact"), means("FMTT twisted, denoiser")
    assert exact["modes"] == 5
    for method in SEARCHES[2:]:  # whose particles compete
        found = means(method)
        assert found["reward"] > exact["reward"] + 0.03
        assert min(found["w1"], found["mode_error"] * 5) > 1.3 * max(twisted["w1"], exact["w1"])


def test_digits_are_rewarded_each_by_its_own() -> None:
    class Fixed(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.flatten(1)

    reward = DigitReward(Fixed(), torch.tensor([2, 0, 1]))  # type: ignore[arg-type]
    x = torch.randn(3, 4, 1, 1, 3, generator=generator())
    expected = torch.stack([x.flatten(2).log_softmax(2)[b, :, k] for b, k in enumerate((2, 0, 1))])
    torch.testing.assert_close(reward(x), expected)
    torch.testing.assert_close(reward.select([2, 0])(x[[2, 0]]), expected[[2, 0]])


def test_a_run_that_was_stopped_gives_the_same_table(tmp_path: Path) -> None:
    table = dataclasses.replace(TABLES["dimension"], cells=(("gaussian", 2, "gradient, denoiser"),
                                                            ("gaussian", 2, "NoiseSMC")))
    asked: list[str] = []

    def run(prior: str, d: int, method: str) -> list[dict[str, Any]]:
        asked.append(method)
        return evaluate_dimension(prior, d, method, particles=30, steps=4)

    whole = fill(table, tmp_path / "whole.csv", run)
    assert len(whole) == 2 * ROWS
    lines = (tmp_path / "whole.csv").read_text().splitlines(keepends=True)
    (tmp_path / "part.csv").write_text("".join(lines[:15]))  # stopped in the second cell
    asked.clear()
    assert fill(table, tmp_path / "part.csv", run) == whole
    assert asked == ["NoiseSMC"]
    asked.clear()
    assert fill(table, tmp_path / "part.csv", run) == whole
    assert asked == []


@pytest.mark.parametrize("kernel", ["twisted, denoiser", "twisted, flow map"])
def test_twisted_weights_stay_with_the_base_of_a_wrong_map(kernel: str) -> None:
    rows = as_text(evaluate_error("both", 0.4, kernel, particles=300, steps=8))
    for name in ("share", "reward"):
        difference, error = from_base(rows, name)
        assert abs(difference) < 4 * error, name


@pytest.mark.parametrize("method", ["unweighted, denoiser", "unweighted, flow map", "Jarzynski, flow map"])
def test_other_weights_do_not(method: str) -> None:
    rows = as_text(evaluate_error("both", 0.4, method, particles=900, steps=8))
    difference, error = from_base(rows, "reward")
    assert abs(difference) > 5 * error


def test_the_evidence_of_an_observed_half_is_unbiased() -> None:
    errors = torch.tensor([row["log_evidence_error"] for row in evaluate_dimension(
        "gaussian", 8, "gradient, denoiser", particles=400, steps=10)])
    ratio = errors.double().exp()
    assert abs(float(ratio.mean()) - 1) < 4 * float(ratio.std()) / ROWS**0.5
    operator = FirstHalf(6)
    x, y = torch.randn(4, 6, generator=generator()), torch.randn(4, 3, generator=generator(1))
    torch.testing.assert_close((operator(x) * y).sum(), (x * operator.adjoint(y)).sum())


@pytest.mark.parametrize("name", list(TABLES))
def test_every_table_and_plot_can_be_made(name: str, tmp_path: Path) -> None:
    from benchmarks.tables import tilting_plots

    table = TABLES[name]
    rows: list[dict[str, str]] = []
    numbers = torch.rand(len(table.cells), ROWS, generator=generator())
    for cell, values in zip(table.cells, numbers):
        for k, value in enumerate(values.tolist()):
            row = {field: str(value) for field in table.fields} | dict(zip(table.fields, map(str, cell)))
            rows.append(row | {table.fields[table.keys]: str(k)})
    text = table.markdown(rows)
    assert "nan" not in text
    for cell in table.cells:
        assert all(str(part) in text for part in cell if isinstance(part, str))
    if table.plot is not None:
        file = tmp_path / "plot.png"
        tilting_plots.save(tilting_plots.PLOTS[name](rows), file)
        assert 10_000 < file.stat().st_size < 150_000
