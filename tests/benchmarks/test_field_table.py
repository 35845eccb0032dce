"""The table of existing samplers on a Gaussian: exact draws are correct in it, and the known faults show."""

from __future__ import annotations

import pytest

from benchmarks.tables.field_table import EXACT, SAMPLERS, main, moments


def test_exact_draws_are_right_and_others_wrong_where_they_are_known_to_be() -> None:
    found, nfe = moments("exact", 256)
    errors = [std / (256 * 32) ** 0.5 for std in (EXACT[1], EXACT[1], EXACT[3], EXACT[3])]
    assert all(abs(a - b) < 4.5 * e for a, b, e in zip(found, EXACT, errors, strict=True))
    assert nfe.forward == 0
    _, std, hidden_mean, hidden_std = moments("DDRM, 100 steps", 256)[0]
    assert std < 0.05  # too narrow
    assert hidden_mean == pytest.approx(0.5, abs=0.01)
    assert moments("DDRM, deepinv", 256)[0][1] < 0.8 * std  # and narrower by far with its noise divided
    assert hidden_std < 0.1


def test_rows_are_printed_one_by_one() -> None:
    said: list[str] = []
    main(["--samples", "8", "--only", "exact", "Flower, mean"], said.append)
    assert [line.split(" | ")[0] for line in said[1:]] == ["| *truth*", "| exact", "| Flower, mean"]
    assert said[1] == "| *truth* | | 0.6000 | 0.0707 | 0.5000 | 0.1000 |"
    assert said[3].startswith("| Flower, mean | 100 + 0 | 0.6")
    assert "Flower" in SAMPLERS
