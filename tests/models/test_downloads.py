"""Priors that deepinv downloads: their list, offline errors, and noise outside their range."""

from __future__ import annotations

import urllib.error
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import invflow
from invflow.models.downloads import DOWNLOADS, load_download

models = pytest.importorskip("deepinv.models")


def test_the_list_says_size_licence_and_range() -> None:
    from invflow.cli.entry import app

    text = CliRunner().invoke(app, ["list", "priors"]).output
    for name, entry in DOWNLOADS.items():
        line = next(line for line in text.splitlines() if line.split()[:1] == [name])
        assert f"{entry.megabytes} MB" in line
        assert entry.licence in line
        assert ("plug-and-play only" in line) == ("drunet" in name)


def test_offline_it_names_the_file_and_the_place(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise urllib.error.URLError("no network")

    monkeypatch.setattr("deepinv.models.drunet.load_state_dict_from_url", refuse)
    state = torch.get_rng_state()
    with pytest.raises(OSError, match=r"drunet_deepinv_color_finetune_22k.pth \(131 MB\).*no network.*put it into .*"
                                      r"checkpoints"):
        invflow.load_prior("deepinv/drunet")
    assert torch.equal(torch.get_rng_state(), state)


def test_outside_its_noise_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = models.DRUNet(pretrained=None).state_dict()
    monkeypatch.setattr("deepinv.models.drunet.load_state_dict_from_url", lambda *args, **kwargs: weights)
    prior = load_download("deepinv/drunet", image_shape=(3, 16, 16), steps=2)
    with pytest.raises(ValueError, match=r"trained for noise up to 0.196 .*invflow.PlugAndPlay\(prior"):
        prior.generate(1)
    x = torch.zeros(1, 3, 16, 16)
    assert prior.velocity(x, 0.75).isfinite().all()
    likelihood = invflow.GaussianLikelihood(invflow.operators.Denoising((3, 16, 16)), x + 0.5, sigma=0.1)
    found = invflow.PlugAndPlay(prior, steps=2, first=0.19).sample(likelihood, 1)
    assert found.samples.isfinite().all()


def test_unknown_names_lead_to_the_nearest() -> None:
    with pytest.raises(ValueError, match="deepinv/drunet"):
        invflow.load_prior("deepinv/drunett")
    with pytest.raises(TypeError, match="class_labels"):
        load_download("deepinv/imagenet64-adm")
