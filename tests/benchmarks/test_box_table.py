"""The table of a sharply observed hole: its measures without a reference, its rows, and resuming."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.tables import box_table
from benchmarks.tables.box_table import calibration


@pytest.mark.parametrize(("factor", "expected"), [(1.0, 1.0), (0.5, 0.5)])
def test_calibration_of_gaussian_posteriors_is_known(factor: float, expected: float) -> None:
    # posteriors N(m, s^2) of many values, the truth a draw of each, N draws whose spread is a factor of the right one
    generator = torch.Generator().manual_seed(0)
    observations, particles, values, repeats = 16, 8, 50, 200
    ratios, errors = [], []
    for _ in range(repeats):
        scale = 0.1 + torch.rand(observations, 1, generator=generator, dtype=torch.float64)
        truth = scale * torch.randn(observations, values, generator=generator, dtype=torch.float64)
        draws = factor * scale[:, None] * torch.randn(observations, particles, values, generator=generator,
                                                      dtype=torch.float64)
        # the posterior's own mean is 0; a sampler that is too narrow is narrow about it
        error = (draws.mean(1) - truth).square().mean(1)
        found, uncertain = calibration(draws.var(1).mean(1).sqrt(), error, particles)
        ratios.append(found)
        errors.append(uncertain)
    ratio = torch.tensor(ratios)
    wanted = expected * ((1 + 1 / particles) / (1 + factor**2 / particles)) ** 0.5
    assert abs(float(ratio.mean()) - wanted) < 3 * float(ratio.std()) / repeats**0.5 + 0.01 * wanted
    # the jackknife tells the spread between tables
    assert 0.8 < float(torch.tensor(errors).square().mean().sqrt() / ratio.std()) < 1.25


def test_rows_of_fmtt_go_into_the_table_and_are_not_drawn_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                                capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["box_table", "--output", str(tmp_path), "--observations", "2", "--particles", "2", "--group", "2",
                 "--maps", "prior", "--rows", "fmtt", "fmtt-weighted"]
    monkeypatch.setattr(sys, "argv", arguments)
    box_table.main()
    first = capsys.readouterr().out
    lines = list(csv.DictReader((tmp_path / "results.csv").open(newline="")))
    assert [(li["row"], li["observation"], li["forward"]) for li in lines] == [
        (row, index, "100.0") for row in ("fmtt", "fmtt-weighted") for index in ("0", "1")]
    assert all(0 < float(li["residual"]) < 3 for li in lines)
    # resampled by their weights two particles are one, most of the time; as they are, never
    assert all(float(li["std"]) > 0.05 for li in lines[:2])
    assert {li["converged"] for li in lines[2:]} == {"0"}
    monkeypatch.setattr(box_table, "run_group", None)
    box_table.main()
    assert capsys.readouterr().out in first
