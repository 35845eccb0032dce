"""The photographs' table: the same observations for all solvers, stored cells, means, errors and paired differences."""

from __future__ import annotations

import json
import math

import pytest
import torch
from PIL import Image

import invflow
from benchmarks.tables import photo_parts, photo_table
from benchmarks.tables.photo_parts import Picture
from benchmarks.tables.shared import mean_and_error
from invflow.metrics import psnr


def picture(name: str = "a", height: int = 48, width: int = 36) -> Picture:
    rows, columns = torch.arange(height)[:, None] / height, torch.arange(width) / width
    return Picture(name, torch.stack([rows + 0 * columns, columns + 0 * rows, 0.5 * (rows + columns)]))


class Noisy(invflow.Solver):
    """Truth plus noise of a known level; posterior samples in this sense: coverage is 90%, CRPS known."""

    def __init__(self, truth: torch.Tensor, std: float) -> None:
        self.truth, self.std = truth, std

    def settings(self):
        return {"std": self.std}

    def sample(self, reward, num_samples, *, generator=None, progress=False):
        noise = torch.randn(num_samples + 1, *self.truth.shape, generator=generator)
        centre = self.truth + self.std * noise[0]
        return invflow.Posterior((centre + self.std * noise[1:])[None], seconds=2.5)


def test_a_cell_holds_the_metrics_and_is_read_again(tmp_path):
    (tmp_path / "cells").mkdir()
    truth, setup = picture(height=96, width=84), {"seed": 0, "samples": 99, "solver": "noisy"}
    solver = Noisy(truth.image, 0.1)
    cell = photo_parts.run_cell(tmp_path, truth, "denoising", "vfm", lambda: solver, setup)
    # the mean of 99 samples has the error of their centre; the truth is one more draw of the samples' law
    count = truth.image.numel()
    assert abs(cell["coverage"] - 0.9) < 0.01
    assert abs(cell["psnr"] - 10 * math.log10(1 / (0.01 * (1 + 1 / 99)))) < 10 / math.log(10) * 5 * math.sqrt(2 / count)
    assert abs(cell["crps"] - 0.1 * (2 / math.sqrt(math.pi) - 1 / math.sqrt(math.pi))) < 0.001
    assert cell["seconds"] == 2.5
    assert (tmp_path / "cells" / "a__denoising__vfm.png").is_file()
    assert (tmp_path / "cells" / "a__denoising__vfm__sample.png").is_file()

    def broken() -> invflow.Solver:
        raise AssertionError("a cell that is there is not done again")

    assert photo_parts.run_cell(tmp_path, truth, "denoising", "vfm", broken, setup) == cell
    with pytest.raises(ValueError, match="has another setup"):
        photo_parts.run_cell(tmp_path, truth, "denoising", "vfm", broken, {**setup, "seed": 1})


def test_observations_do_not_depend_on_the_solver_or_on_the_other_pictures():
    first = photo_parts.observe(picture("a"), "random-inpainting", 0)
    again = photo_parts.observe(picture("a"), "random-inpainting", 0)
    assert torch.equal(first.y, again.y)
    for other in (photo_parts.observe(picture("b"), "random-inpainting", 0),
                  photo_parts.observe(picture("a"), "random-inpainting", 1)):
        assert not torch.equal(first.y, other.y)
        assert not torch.equal(first.operator.observed(), other.operator.observed())
    for task, (_, sigma) in photo_parts.TASKS.items():
        likelihood = photo_parts.observe(picture(), task, 0)
        assert float(likelihood.sigma) == pytest.approx(sigma)
        residual = float(likelihood.residual(picture().image[None, None]))
        entries = float(likelihood.count_observed())
        assert abs(residual - 1) < 5 * math.sqrt(2 / entries)


def test_the_table_runs_and_goes_on(tmp_path, capsys):
    arguments = [str(tmp_path), "--sets", "held-out", "--max-side", "60", "--solvers", "bicubic", "wiener", "bm3d",
                 "vfm", "--tasks", "super-resolution", "--vfm", "no-such-vfm"]
    photo_table.main(arguments)
    said = capsys.readouterr().out
    assert "vfm is skipped: " in said
    assert "| super-resolution | wiener | " in (tmp_path / "table.md").read_text()
    assert "bm3d |" not in (tmp_path / "table.md").read_text()
    with Image.open(tmp_path / "sheet-super-resolution.png") as sheet:
        assert sheet.size[0] == 4 * (60 + 4) - 4  # truth, observation, bicubic, wiener
    files = {file: file.stat().st_mtime_ns for file in (tmp_path / "cells").iterdir()}
    table = (tmp_path / "table.md").read_text()
    photo_table.main(arguments)
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "cells").iterdir()} == files
    assert (tmp_path / "table.md").read_text() == table
    cell = json.loads((tmp_path / "cells" / "Dune-1__super-resolution__bicubic.json").read_text())
    shown = next(p for p in photo_parts.held_out([], 60) if p.name == "Dune-1")
    likelihood = photo_parts.observe(shown, "super-resolution", 0)
    expected = psnr(invflow.Bicubic().sample(likelihood, 1).mean(), shown.image[None])
    assert cell["psnr"] == pytest.approx(float(expected), abs=1e-4)
    assert "coverage" not in cell


def test_differences_are_paired():
    cells = {}
    for i, base in enumerate([20.0, 25.0, 33.0]):
        cells[f"p{i}", "denoising", "vfm"] = {"psnr": base + 1 + 0.1 * i, "ssim": 0.9, "crps": 0.02, "seconds": 1.0,
                                              "coverage": 0.9}
        cells[f"p{i}", "denoising", "tv"] = {"psnr": base, "ssim": 0.8, "crps": 0.03, "seconds": 2.0}
    cells["p3", "denoising", "tv"] = {"psnr": 90.0, "ssim": 0.8, "crps": 0.03, "seconds": 2.0}
    mean, error = photo_table.difference(cells, "denoising", "vfm", "tv", "psnr")
    assert mean == pytest.approx(1.1)
    assert error == pytest.approx(0.1 / math.sqrt(3))
    assert photo_table.difference(cells, "denoising", "vfm", "tv", "coverage") is None
    table = photo_table.markdown(cells, ["denoising"], ["vfm", "tv"])
    assert "| denoising | tv | +1.10 ± 0.06 | +0.100 ± 0.000 | -0.0100 ± 0.0000 |" in table
    assert "| denoising | vfm | 27.10 ± " in table
    assert mean_and_error([3.0])[0] == 3.0
    assert math.isnan(mean_and_error([3.0])[1])


def test_which_photographs_are_taken(tmp_path):
    for name in ("Kite", "Dune", "mine"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (100, 50), "teal").save(tmp_path / name / f"{name}.png")
    said: list[str] = []
    assert [p.name for p in photo_parts.held_out([tmp_path], None, said.append)] == ["Dune"]
    assert [p.image.shape for p in photo_parts.held_out([tmp_path], 50, said.append)] == [(3, 24, 48)]
    (tmp_path / "Dune" / "Dune.png").unlink()
    assert [p.name for p in photo_parts.held_out([tmp_path], None, said.append)] == ["mine"]
    assert said == ["Kite is skipped: it belongs to the training photographs"]
    with pytest.raises(ValueError, match="no test photographs"):
        photo_parts.held_out([tmp_path / "Kite"], None, said.append)
    with pytest.raises(ValueError, match="too small"):
        photo_parts.held_out([tmp_path / "mine"], 30)
    assert len(photo_parts.held_out([], None)) == 10


def test_scikit_image_is_left_out_with_a_sentence_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "skimage", None)
    said: list[str] = []
    assert photo_parts.scikit_image(256, said.append) == []
    assert "pip install" in said[0]


def test_scikit_image_photographs():
    pytest.importorskip("skimage")
    found = photo_parts.scikit_image(64)
    assert [p.name for p in found] == ["astronaut", "chelsea", "coffee", "rocket"]
    assert all(max(p.image.shape[1:]) == 60 and p.image.shape[0] == 3 for p in found)
    assert all(float(p.image.min()) >= 0 and float(p.image.max()) <= 1 for p in found)
