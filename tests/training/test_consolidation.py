"""The last stage of a VFM's training: one step learns the result of several."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import invflow
from invflow.models.adapter import Adapter
from invflow.models.neural import NeuralFlowMap
from invflow.operators import MatrixOperator
from invflow.solvers.vfm import VFM
from invflow.training import LoopSettings, TrainingProblem, consolidate_vfm
from invflow.training.loop import seeded
from invflow.training.recipe import Run, load_recipe
from invflow_problems.recipes.digits import train_board

SMALL = {"width": 32, "depth": 2}


def pairs(n, generator):
    return torch.randn(n, 2, generator=generator)


def first_coordinate():
    return TrainingProblem(MatrixOperator(torch.tensor([[1.0, 0.0]]), image_shape=(2,), problem_class="first"), 0.3)


def rough_vfm():
    """A pair with random weights: its map in one step and in two differ."""
    g = torch.Generator().manual_seed(0)
    prior = NeuralFlowMap((2,), network="mlp", options=SMALL, decode_affine=(1.0, 0.0), generator=g)
    adapter = Adapter((2,), classes=["first"], network="mlp", options=SMALL, generator=g)
    for p in (*prior.parameters(), *adapter.parameters()):
        p.data += 0.1 * torch.randn(p.shape, generator=g)
    adapter.trained_for = prior.fingerprint()
    return VFM(prior.requires_grad_(False), adapter)


@torch.no_grad()
def several(prior, z, steps):
    for i in range(steps):
        z = prior.jump(z, i / steps, (i + 1) / steps)
    return z


def test_one_step_learns_what_two_do(tmp_path):
    vfm = rough_vfm()
    before, weights = vfm.prior.fingerprint(), {k: v.clone() for k, v in vfm.adapter.state_dict().items()}
    loop = LoopSettings(steps=400, batch_size=128, learning_rate=3e-3, weight_decay=0.0, ema=0.98, precision="no",
                        warmup=10, log_every=100)
    done = consolidate_vfm(vfm, pairs, [first_coordinate()], loop, tmp_path, jumps=2, progress=False)
    assert vfm.prior.fingerprint() == before != done.prior.fingerprint()
    assert all(torch.equal(weights[k], v) for k, v in done.adapter.state_dict().items())

    g = seeded(3, 0, 0)
    likelihood = invflow.GaussianLikelihood(first_coordinate().operator, torch.linspace(-1, 1, 50)[:, None], sigma=0.3)
    mean, std = done.adapter.propose(likelihood)
    for z in (torch.randn(2000, 2, generator=g), (mean + std * torch.randn(40, 50, 2, generator=g)).flatten(0, 1)):
        target = several(vfm.prior, z, 2)
        gap = (several(vfm.prior, z, 1) - target).square().mean()
        assert (several(done.prior, z, 1) - target).square().mean() < 0.02 * gap
        assert (several(done.prior, z, 2) - target).square().mean() < 0.05 * gap  # shorter jumps are kept
    assert not done.prior.independent_noise
    saved = VFM.load(tmp_path / "vfm")
    assert saved.prior.fingerprint() == done.prior.fingerprint()


def test_checkerboard_recipe_goes_through_all_stages(tmp_path):
    recipe = load_recipe("checkerboard")
    vfm = recipe(tmp_path / "joint", steps=3, batch_size=16, progress=False)
    saved, before = VFM.load(tmp_path / "joint" / "vfm"), VFM.load(tmp_path / "joint" / "joint" / "vfm")
    assert saved.prior.fingerprint() == vfm.prior.fingerprint() != before.prior.fingerprint()
    pretrained = invflow.load_prior(tmp_path / "joint" / "pretraining" / "prior")
    settings = dataclasses.replace(recipe.settings, steps=3, batch_size=16)
    run = Run(settings, tmp_path / "frozen", prior=str(tmp_path / "joint" / "pretraining" / "prior"), progress=False)
    frozen = train_board(run, frozen=True)
    assert frozen.prior.fingerprint() == pretrained.fingerprint()  # the frozen map is the pretrained one to the end
    assert frozen.prior.independent_noise


def test_problems_and_jumps_are_checked(tmp_path):
    vfm = rough_vfm()
    loop = LoopSettings(steps=1, batch_size=4, precision="no")
    with pytest.raises(ValueError, match="the adapter knows"):
        consolidate_vfm(vfm, pairs, [], loop, tmp_path, progress=False)
    with pytest.raises(ValueError, match="at least 2"):
        consolidate_vfm(vfm, pairs, [first_coordinate()], loop, tmp_path, jumps=1, progress=False)
