"""The table of solvers: images that nobody has inspected; the best is picked on one half and evaluated on the other."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch

import invflow
from benchmarks.release.tune_samplers import CANDIDATES, tuned_settings
from benchmarks.tables import compare_table
from benchmarks.tables.compare_overview import contenders, halves, overview, picked
from benchmarks.tables.fresh_images import LISTED, fresh_images, shuffled
from benchmarks.tables.image_table import TASKS
from invflow.evaluation.comparison import Comparison
from invflow_problems.samples import load_samples


def official(folder: Path, count: int = 40) -> tuple[Path, np.ndarray]:
    """A folder as of MNIST's files: two shipped images, then others."""
    shipped = (load_samples("mnist")[0][:2, 0] * 255).round().to(torch.uint8).numpy()
    images = np.concatenate([shipped, np.random.default_rng(0).integers(0, 256, (count - 2, 28, 28), dtype=np.uint8)])
    head = b"".join(number.to_bytes(4, "big") for number in (0x803, count, 28, 28))
    (folder / "t10k-images-idx3-ubyte").write_bytes(head + images.tobytes())
    return folder, images


def test_images_are_those_of_the_list_and_none_that_is_shipped(tmp_path: Path) -> None:
    folder, images = official(tmp_path)
    others = shuffled(folder)
    assert len(others) == 38
    assert not any(np.array_equal(other[0], images[k]) for other in others.numpy() for k in (0, 1))
    listed = tmp_path / "list.txt"
    compare_table.main([str(tmp_path / "out"), "--files", str(folder), "--images", str(listed), "--list", "5"])
    names = listed.read_text().split()
    assert names == [hashlib.sha256(other.numpy().tobytes()).hexdigest() for other in others[:5]]
    torch.testing.assert_close(fresh_images(folder, 3, listed), others[:3].float() / 255)
    with pytest.raises(ValueError, match=r"lists 5 images, not 6"):
        fresh_images(folder, 6, listed)
    with pytest.raises(ValueError, match=r"3 of 3 images are not among"):
        fresh_images(folder, 3)


def test_the_list_names_no_image_twice_and_none_that_is_shipped() -> None:
    names = LISTED.read_text().split()
    shipped = {hashlib.sha256((image * 255).round().to(torch.uint8).numpy().tobytes()).hexdigest()
               for split in ("test", "validation") for image in load_samples("mnist", split)[0]}
    assert len(set(names)) == len(names) >= 32
    assert not set(names) & shipped


def found(values: dict[str, list[float]], **others: object) -> Comparison:
    count = len(next(iter(values.values())))
    costs = {name: {"forward": 1.0, "backward": 0.0, "seconds": 2.0, "memory": None} for name in values}
    options = {"failures": {"data/task": {}}, **others}
    return Comparison({"data/task": {name: {"crps": list(row)} for name, row in values.items()}},
                      {"data/task": {name: {} for name in values}}, {"data/task": costs}, options["failures"],
                      {"num_samples": 20}, {name: {} for name in values}, {"data/task": [0] * count}, {}, None)


def test_the_best_is_picked_on_one_half_and_judged_on_the_other() -> None:
    g = torch.Generator().manual_seed(0)
    base = torch.randn(16, generator=g)
    values = {
        "VFM, 1 step": base + 1 + 0.1 * torch.randn(16, generator=g),
        "lucky": torch.where(torch.arange(16) % 2 == 0, base - 0.5, base + 2),  # best where it is picked
        "dps": base, "ddrm": base + 0.01 * torch.randn(16, generator=g),
    }
    table = found({name: row.tolist() for name, row in values.items()})
    assert halves(table, "data/task", "dps") == (list(range(0, 16, 2)), list(range(1, 16, 2)))
    assert picked(table, "data/task", "crps", table.solvers) == "lucky"
    # beside "lucky" on the other half all others are better, so that all of them are contenders
    assert contenders(table, "data/task") == set(values)
    del values["lucky"]
    table = found({name: row.tolist() for name, row in values.items()})
    assert contenders(table, "data/task") == {"dps", "ddrm"}
    lines = overview(table).splitlines()
    best = min(("dps", "ddrm"), key=lambda name: float(values[name][::2].mean()))
    gap = (values["VFM, 1 step"].double() - values[best].double())[1::2]
    assert lines[-2] == (f"| the best existing sampler | {float(gap.mean()):+.4f} ± "
                         f"{float(gap.std()) / 8**0.5:.4f} ({best}) |")
    assert [line.split(" | ")[0] for line in lines if "**" in line] == ["| dps", "| ddrm"]
    assert lines[4].endswith("| 1 + 0 | 0.1 |")  # seconds of a sample, not of an observation


def test_every_sampler_has_settings_that_were_tuned_on_every_problem() -> None:
    for task in TASKS:
        for name, candidates in CANDIDATES.items():
            assert tuned_settings(f"mnist/{task}", name) in candidates, (task, name)


def test_a_killed_table_goes_on_solver_by_solver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = official(tmp_path)
    listed = tmp_path / "list.txt"
    compare_table.main([str(tmp_path / "x"), "--files", str(folder), "--images", str(listed), "--list", "8"])
    arguments = ["--files", str(folder), "--images", str(listed), "--observations", "6", "--samples", "20", "--tasks",
                 "denoising", "gaussian-blur", "--only", "LMMSE", "VFM, 1 step", "ddrm", "--steps", "4", "--untuned"]
    compare_table.main([str(tmp_path / "whole"), *arguments])
    sample, calls = invflow.LinearMMSE.sample, []

    def counting(solver: invflow.LinearMMSE, *given: object, **options: object) -> invflow.Posterior:
        calls.append(len(given[0].y))  # type: ignore[attr-defined]
        if len(calls) == 2:
            raise KeyboardInterrupt
        return sample(solver, *given, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(invflow.LinearMMSE, "sample", counting)
    with pytest.raises(KeyboardInterrupt):
        compare_table.main([str(tmp_path / "killed"), *arguments])
    compare_table.main([str(tmp_path / "killed"), *arguments])
    assert calls == [4, 2, 2, 4, 2]  # four observations in a part: the first part of the first task is not repeated
    numbers = [{(p, s, m): v for p, rows in Comparison.load(tmp_path / name).values.items() for s, row in rows.items()
                for m, v in row.items()} for name in ("whole", "killed")]
    assert numbers[0] == numbers[1]
    assert {"patch_energy", "block_crps", "coverage_near_ink"} <= {m for _, _, m in numbers[0]}
    text = (tmp_path / "killed" / "overview.md").read_text()
    assert all(f"\n| {name} |" in text for name in ("LMMSE", "VFM, 1 step", "ddrm"))
