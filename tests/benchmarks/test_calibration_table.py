"""The table of certificates: exact samplers pass, existing samplers are detected, a killed run resumes."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

import invflow
from benchmarks.tables import calibration_table
from benchmarks.tables.calibration_table import CASES, main, run, summary

SMALL = ["--simulations", "80", "--ranks", "19"]


@pytest.mark.parametrize(("solver", "verdict"), [
    ("ExactPosterior", "passes"), ("NoiseSMC", "passes"), ("DPS", "fails"), ("DDRM", "fails"),
])
def test_exact_samplers_pass_and_those_of_the_field_are_caught(
        solver: str, verdict: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # the map in two steps is another map, whose own posterior NoiseSMC draws, in half the time
    monkeypatch.setattr(calibration_table, "JUMP_STEPS", 2)
    said: list[str] = []
    rows = main([str(tmp_path), "--only", f"gaussian/linear {solver}", *SMALL], said.append)
    assert [row["verdict"] for row in rows] == [verdict]
    assert rows[0]["particles"] == (190 if solver == "NoiseSMC" else 19)
    assert (rows[0]["rejected"] > 0) == (verdict == "fails")
    assert bool(rows[0]["worst"]) == (verdict == "fails")
    assert verdict in said[-1]


def test_noise_smc_passes_on_digits_of_14_by_14(tmp_path: Path) -> None:
    # few simulations: enough to see a posterior that is half or twice as wide, not to certify that it is exact
    case = next(case for case in CASES if case.title == "mnist-14/super-resolution NoiseSMC")
    certificate = run(case, tmp_path, simulations=24, ranks=4)
    assert certificate.verdict == "too few to certify"
    assert certificate.num_particles == 40
    assert certificate.checks["all pixels, spread"].p_value > 0.01
    assert 0.8 < certificate.judgement.spread_skill < 1.25
    assert certificate.settings["truths"] == "the solver's own prior"


def test_a_killed_table_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = [str(tmp_path / "killed"), "--only", "gaussian/linear Exact", "gaussian/linear DDRM", *SMALL]
    whole = main([str(tmp_path / "whole"), *arguments[1:]], lambda text: None)
    simulate, count = invflow.evaluation.calibrate._simulate, 0

    def counting(*parts):
        nonlocal count
        count += 1
        if count == 6:  # four chunks of the first solver, two of the second
            raise KeyboardInterrupt
        return simulate(*parts)

    monkeypatch.setattr(invflow.evaluation.calibrate, "_simulate", counting)
    with pytest.raises(KeyboardInterrupt):
        main(arguments, lambda text: None)
    assert len(list(csv.DictReader((tmp_path / "killed" / "table.csv").open()))) == 1
    resumed = main(arguments, lambda text: None)
    assert count == 6 + 3
    assert resumed == whole
    assert (tmp_path / "killed" / "table.md").read_text() == (tmp_path / "whole" / "table.md").read_text()


def test_the_table_is_complete() -> None:
    asked = {(problem, solver) for problem in ("gaussian/linear", "mixture/25-8-1", "mixture/25-80-2")
             for solver in ("ExactPosterior", "NoiseSMC", "DPS", "DDRM")}
    vfm = {(f"mnist/{task}", f"VFM, {steps}") for steps in ("1 step", "4 steps")
           for task in ("denoising", "random-inpainting", "box-inpainting", "super-resolution", "gaussian-blur",
                        "motion-blur")}
    found = {(case.problem.name, case.solver): case for case in CASES}
    assert asked | vfm <= set(found)
    assert all((found[key].simulations, found[key].ranks) == (200, 99) for key in asked | vfm)
    assert sum(case.part == "digits" and case.simulations >= 100 for case in CASES) >= 2
    # nothing is set but where the data lie, and how many rows go through at a time
    dps = found["mixture/25-8-1", "DPS"]
    default = invflow.DPS(dps.problem.prior, value_range=(-20.0, 20.0), chunk_size=1 << 11)
    assert dps.build(dps.problem).settings() == default.settings()


def test_rows_say_what_was_found(tmp_path: Path) -> None:
    case = next(case for case in CASES if case.title == "gaussian/linear DDRM")
    certificate = run(case, tmp_path, simulations=80, ranks=19)
    row = summary(case, certificate)
    assert set(row) == set(calibration_table.FIELDS)
    assert row["rejected"] == sum(not check.passed for check in certificate.judgement.checks)
    assert row["least_p"] == min(check.p_adjusted for check in certificate.judgement.checks)
    assert row["forward"] == 20.0  # steps, one call each
    line = calibration_table.format_markdown([row]).splitlines()[2]
    assert line.startswith("| gaussian/linear | DDRM | 80 x 19 (19) | fails |")
    assert line.replace("\\|", "").count("|") == 10


def test_an_unknown_certificate_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([str(tmp_path), "--only", "nothing"])
    assert "gaussian/linear ExactPosterior" in capsys.readouterr().err
