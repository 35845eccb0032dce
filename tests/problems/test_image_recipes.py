"""The trainings of the digits' weights at small scale: each stage continues the one before."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from benchmarks.release import make_weights
from invflow.models.neural import NeuralFlowMap
from invflow_problems.recipes import digits as recipes
from invflow_problems.samples import load_samples

SMALL = {"channels": [4, 8], "blocks": 1, "embedding": 16}


@pytest.fixture
def small(monkeypatch):
    images = load_samples("mnist", "validation")[0].mul(255).round().to(torch.uint8)
    monkeypatch.setattr(recipes, "load_images", lambda data, split, dtype: images)
    monkeypatch.setattr(recipes, "MAP_NETWORK", SMALL)
    monkeypatch.setattr(recipes, "ADAPTER_NETWORK", SMALL)
    return {"data": "nowhere", "progress": False, "batch_size": 16, "precision": "no"}


def columns(folder: Path) -> set[str]:
    with (folder / "metrics.csv").open() as handle:
        return set(csv.DictReader(handle).fieldnames or ())


def velocity(prior: NeuralFlowMap) -> torch.Tensor:
    x = torch.randn(3, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    return prior.velocity(x, 0.4).detach()


def test_each_stage_goes_on_from_the_one_before(small, tmp_path):
    first = recipes.mnist(tmp_path / "1", steps=2, **small)
    assert first.options["channels"] == [4, 8]
    second = recipes.mnist_velocity(tmp_path / "2", prior=str(tmp_path / "1" / "prior"), steps=1, learning_rate=1e-6,
                                    ema=0.0, **small)
    # a tiny step away from where the first one ended, and not from the shipped weights
    torch.testing.assert_close(velocity(second), velocity(first), atol=1e-3, rtol=0)
    assert second.fingerprint() != first.fingerprint()
    assert "flow_matching" in columns(tmp_path / "2")
    assert "meanflow" not in columns(tmp_path / "2")
    third = recipes.mnist_jumps(tmp_path / "3", prior=str(tmp_path / "2" / "prior"), steps=1, learning_rate=1e-6,
                                ema=0.0, **small)
    torch.testing.assert_close(velocity(third), velocity(first), atol=2e-3, rtol=0)
    assert {"flow_matching", "meanflow"} <= columns(tmp_path / "3")
    assert third.independent_noise
    vfm = recipes.mnist_vfm(tmp_path / "4", prior=str(tmp_path / "3" / "prior"), steps=1, **small)
    assert not vfm.prior.independent_noise
    taught = recipes.mnist_vfm_consolidation(tmp_path / "5", prior=str(tmp_path / "4" / "vfm"), steps=1, **small)
    assert taught.adapter.classes == vfm.adapter.classes
    held = recipes.mnist_vfm_score(tmp_path / "6", prior=str(tmp_path / "5" / "vfm"), steps=1, **small)
    assert held.prior.fingerprint() == taught.prior.fingerprint()  # the map stands still
    assert "crps" in columns(tmp_path / "6")


def test_the_card_tells_each_stage(small, tmp_path):
    recipes.mnist(tmp_path / "a", steps=2, **small)
    recipes.mnist_velocity(tmp_path / "b", prior=str(tmp_path / "a" / "prior"), steps=1, **small)
    text = make_weights.card("mnist", [("mnist", tmp_path / "a"), ("mnist-velocity", tmp_path / "b")], None)
    assert "invflow train mnist --data FOLDER --set steps=2" in text
    assert "invflow train mnist-velocity --data FOLDER --prior RUN1/prior --set steps=1" in text
    assert "make_weights mnist RUN2 --after mnist=RUN1 --recipe mnist-velocity" in text
    second = text.split("RUN2: ")[-1]
    assert "flow_matching" in second
    assert "meanflow" not in second  # of which it had no rows, and a mean that is NaN
