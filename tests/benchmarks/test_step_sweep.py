"""The sweep over steps: exact draws at the floor, weights in the distance, and the command that resumes."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.tables import step_sweep


def mean(problem: str, look_ahead: str, steps: int, particles: int = 150) -> float:
    found = step_sweep.rows_of(problem, look_ahead, steps, particles, 10)
    return sum(row["w2"] for row in found) / len(found)


def test_looking_ahead_with_the_map_is_within_one_and_a_half_times_exact_draws() -> None:
    floor = mean("mixture/half-plane", "exact", 0)
    assert mean("mixture/half-plane", "flow_map", 50) < 1.5 * floor


@pytest.mark.parametrize("problem", step_sweep.PROBLEMS)
def test_more_exact_draws_are_closer(problem: str) -> None:
    # the reference is 10,000 draws, so the distance of n draws falls with the root of n
    assert mean(problem, "exact", 0, 1600) < 0.5 * mean(problem, "exact", 0, 100)


def test_the_command_resumes_and_writes_table_and_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import matplotlib.pyplot as plt

    plt.switch_backend("Agg")
    monkeypatch.setattr(step_sweep, "REFERENCE", 200)
    words = [str(tmp_path), "--particles", "16", "--steps", "3", "4", "--problems", "mixture/half-plane"]
    step_sweep.main([*words, "--replicates", "1"])
    first = (tmp_path / "steps.csv").read_text()
    step_sweep.main([*words, "--replicates", "2"])
    rows = (tmp_path / "steps.csv").read_text()
    assert rows.startswith(first)
    assert len(rows.splitlines()) == 1 + 2 * (1 + 3 * 2)
    assert "| mixture/half-plane | flow map | 3 |" in (tmp_path / "steps.md").read_text()
    assert (tmp_path / "steps.png").stat().st_size > 1000
    plt.close("all")
