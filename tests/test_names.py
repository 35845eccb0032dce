"""Names: all public ones load, old dotted paths still work, and the stub agrees with the tables."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import invflow
from benchmarks.release.make_stub import STUB, stub

ROOT = Path(__file__).resolve().parents[1]
#: dotted paths that were written in docs and notebooks before the rooms
WRITTEN = [
    "imageio.read_image", "imageio.read_mask", "imageio.read_kernel", "noise.estimate_sigma", "calibration.Certificate",
    "calibration.calibrate", "comparison.compare", "comparison.Comparison", "problem.list_problems",
    "problem.load_problem", "datasets.load_images", "spectral.gaussian_estimate", "repeated.RepeatedReward",
    "reward.GaussianLikelihood", "reward.PoissonLikelihood", "reward.Likelihood", "operator.conjugate_gradient",
    "plot.posterior_figure", "mixture.GaussianMixtureFlow", "neural.load_prior", "adapter.Adapter", "pretrained.digest",
    "counting.Countable", "solvers.base.Solver", "solvers.registry.solver_by_name", "solvers.fmtt.FMTT",
    "solvers.vfm.VFM", "solvers.noise_smc.NoiseSMC", "solvers.noise_rto.NoiseRTO", "solvers.exact.dense_matrix",
    "solvers.tilting.uniform_grid", "solvers.tilting.LookAhead", "solvers.annealing.AnnealedCovariance",
    "solvers.lmmse.LinearMMSE", "solvers.conjugate.Conjugate", "bench.run", "cli.main",
]


def resolve(dotted: str) -> object:
    """What a dotted path under invflow leads to, as ``from a.b import c`` finds it."""
    module, _, name = f"invflow.{dotted}".rpartition(".")
    return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize("dotted", WRITTEN)
def test_old_dotted_paths_go_on_working(dotted: str) -> None:
    assert resolve(dotted).__name__ == dotted.rpartition(".")[2]


@pytest.mark.parametrize("old", sorted(invflow._MOVED))
def test_every_moved_module_has_the_names_of_those_it_went_to(old: str) -> None:
    module = importlib.import_module(f"invflow.{old}")
    for place in invflow._MOVED[old].split():
        there = importlib.import_module(f"invflow.{place}")
        for name in there.__all__:
            assert getattr(module, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = module.no_such_name


def test_every_dotted_path_of_docs_and_notebooks_leads_somewhere() -> None:
    texts = [path.read_text(encoding="utf-8") for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]]
    texts += ["".join(cell["source"]) for path in (ROOT / "notebooks").glob("*.ipynb")
              for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]]
    found = {match for text in texts for match in re.findall(r"\binvflow((?:\.[A-Za-z_]\w*)+)(?![\w/:=-])", text)}
    missing = []
    for path in sorted(found):
        value: object = invflow
        for depth, name in enumerate(path[1:].split(".")):
            if not hasattr(value, name):
                try:
                    importlib.import_module("invflow." + ".".join(path[1:].split(".")[: depth + 1]))
                except ImportError:
                    missing.append(path)
                    break
            value = getattr(value, name)
    groups = {".recipes", ".priors"}  # of entry points
    assert not set(missing) - groups


def test_the_stub_is_made_of_the_tables() -> None:
    assert STUB.read_text(encoding="utf-8") == stub(), "run python -m benchmarks.release.make_stub"


def test_all_public_names_load() -> None:
    for name in invflow.__all__:
        assert getattr(invflow, name) is not None


def test_importing_is_light() -> None:
    code = ("import torch, sys, time; before = set(sys.modules); start = time.perf_counter(); import invflow; "
            "took = time.perf_counter() - start; print(took, *sorted(m for m in set(sys.modules) - before))")
    took, *loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                                   check=True).stdout.split()
    assert {name for name in loaded if not name.startswith("invflow")} <= {"importlib.machinery", "importlib.abc"}
    assert len(loaded) < 10
    assert float(took) < 1  # 20 ms where nothing else runs
