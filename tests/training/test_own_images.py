"""From a folder of pictures to one-step posterior samples by three commands, killed on the way."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import invflow
from invflow.models.neural import NeuralFlowMap
from invflow_problems.recipes import own
from invflow_problems.recipes.digits import image_problems

SMALL = {"channels": [4, 8], "blocks": 1, "embedding": 16, "attention": False}
FEW = {"batch_size": 6, "progress": False}


def pictures(folder: Path, count: int = 12) -> Path:
    """Small ones of different sizes, one of them grey."""
    folder.mkdir(parents=True)
    draw = np.random.default_rng(0)
    for i in range(count):
        height, width = 12 + i % 5, 14 + i % 3
        red, green = np.meshgrid(np.linspace(40, 200, width), np.linspace(60, 180, height))
        pixels = np.stack([red, green, np.full_like(red, 90)], -1) + draw.normal(0, 25, (height, width, 3))
        image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
        (image.convert("L") if i == 5 else image).save(folder / f"{i}.png")
    return folder


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own, "NETWORK", SMALL)


def test_each_command_goes_on_from_the_one_before(small: None, tmp_path: Path) -> None:
    folder, said = pictures(tmp_path / "mine"), []
    first = own.prior(tmp_path / "prior", data=str(folder), size=16, steps=2, say=said.append, **FEW)
    assert first.image_shape == (3, 16, 16)
    assert first.resizable
    assert len(said) == 1
    assert "1 is grey among colour ones" in said[0]
    # the folder of the training will do for its result, and its map begins as its own student
    second = own.distil(tmp_path / "map", prior=str(tmp_path / "prior"), data=str(folder), steps=1, learning_rate=1e-7,
                        ema=0.0, say=said.append, **FEW)
    z = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(second.jump(z, 0.0, 1.0), first.jump(z, 0.0, 1.0), atol=1e-4, rtol=0)
    names = ["box-inpainting", "super-resolution:factor=2"]
    vfm = own.vfm(tmp_path / "vfm", prior=str(tmp_path / "map"), data=str(folder), operators=names, steps=1,
                  say=said.append, **FEW)
    assert list(vfm.adapter.classes) == ["box-inpainting", "super-resolution-x2"]
    assert vfm.prior.fingerprint() == second.fingerprint()  # the map stands still
    loaded = invflow.VFM.load(tmp_path / "vfm")
    operator = invflow.operators.SuperResolution((3, 20, 24), factor=2)
    y = operator.measure(torch.rand(1, 3, 20, 24), 0.05, generator=torch.Generator().manual_seed(1))
    posterior = loaded.sample(invflow.GaussianLikelihood(operator, y, 0.05), 3, generator=0)
    assert posterior.samples.shape == (1, 3, 3, 20, 24)  # of another size than what was trained on
    further = own.vfm(tmp_path / "more", prior=str(tmp_path / "vfm"), data=str(folder), steps=1, say=said.append,
                      operators=[*names, "denoising"], **FEW)
    assert list(further.adapter.classes) == ["box-inpainting", "super-resolution-x2", "denoising"]


def test_without_a_prior_the_map_is_that_of_a_gaussian(small: None, tmp_path: Path) -> None:
    folder = str(pictures(tmp_path / "mine"))
    vfm = own.vfm(tmp_path / "vfm", data=folder, size=16, operators=["denoising"], steps=1, say=lambda _: None, **FEW)
    assert vfm.prior.network is None
    assert vfm.prior.image_shape == (3, 16, 16)


def test_other_priors_are_distilled(small: None, tmp_path: Path) -> None:
    """A velocity of which only the ODE is known, without data, and one over vectors."""
    (tmp_path / "made_here.py").write_text(
        "import torch, invflow\n\n\n"
        "def shrinking(x, t):  # to N(0, 0.5^2), in closed form\n"
        "    t = t.view(-1, *[1] * (x.ndim - 1))\n"
        "    return (0.25 * t - (1 - t)) / (0.25 * t**2 + (1 - t) ** 2) * x\n\n\n"
        "def pictures():\n"
        "    return invflow.from_velocity(shrinking, (1, 8, 8), steps=4, decode=(0.5, 0.5))\n\n\n"
        "def jumps():\n"
        "    return invflow.from_consistency(lambda x, t: 0.5 * x, (1, 8, 8))\n")
    sys.path.insert(0, str(tmp_path))
    try:
        student = own.distil(tmp_path / "a", prior="made_here:pictures", steps=2, say=print, **FEW)
        assert isinstance(student, NeuralFlowMap)
        # before it has learned anything it is the flow of a Gaussian with the teacher's spectrum
        spread = float(student.generate(400, generator=torch.Generator().manual_seed(0)).std())
        assert spread == pytest.approx(0.25, rel=0.05)
        with pytest.raises(ValueError, match="no velocity to distil"):
            own.distil(tmp_path / "b", prior="made_here:jumps", say=print)
    finally:
        sys.path.remove(str(tmp_path))


def test_wrong_calls(small: None, tmp_path: Path) -> None:
    folder = str(pictures(tmp_path / "mine"))
    for recipe, words, arguments in (
        (own.prior, "pass --data FOLDER", {}),
        (own.distil, "pass --prior with a name", {"data": folder}),
        (own.vfm, "pass --data FOLDER", {}),
        (own.distil, "takes no --size: leave it out", {"size": 16}),
        (own.prior, "takes no --operators: leave it out", {"operators": ["denoising"]}),
        (own.vfm, "did you mean 'BoxInpainting'", {"prior": "cifar10", "operators": ["box-inpaintin"]}),
        (own.vfm, "no setting 'factr=2'", {"prior": "cifar10", "operators": ["super-resolution:factr=2"]}),
        (own.vfm, "mask", {"prior": "cifar10", "operators": ["mask-inpainting"]}),
        (own.vfm, "leave out --size", {"prior": "cifar10", "data": folder, "size": 16}),
        (own.vfm, "no row for each of 7", {"prior": "cifar10", "data": folder, "batch_size": 4}),
    ):
        with pytest.raises(ValueError, match=words):
            recipe(tmp_path / "out", say=lambda _: None, **arguments)
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "checkpoint.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="is not finished"):
        own.vfm(tmp_path / "out", prior=str(tmp_path / "half"), data=folder)


COMMANDS = (
    ("prior", "--data", "mine", "--size", "16", "--output", "prior"),
    ("distil", "--data", "mine", "--prior", "prior", "--output", "map"),
    ("vfm", "--data", "mine", "--prior", "map", "--operators", "box-inpainting,super-resolution", "--output", "vfm"),
)


def start(folder: Path, arguments: tuple[str, ...], steps: int) -> subprocess.Popen[bytes]:
    more = ("--steps", str(steps), "--batch-size", "4", "--set", "checkpoint_seconds=0", "--set", "log_every=1")
    return subprocess.Popen([sys.executable, "-m", "invflow", "train", *arguments, *more], cwd=folder,
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                            env={**os.environ, "OMP_NUM_THREADS": "1"})


def finish(process: subprocess.Popen[bytes]) -> None:
    error = process.communicate()[1].decode()
    assert process.returncode == 0, error


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="the system has no SIGKILL")
def test_three_commands_killed_twice_give_the_same_bits(tmp_path: Path) -> None:
    steps, whole, cut = 8, tmp_path / "whole", tmp_path / "cut"
    for place in (whole, cut):
        pictures(place / "mine")
        for arguments in COMMANDS:
            if place == cut and arguments[0] != "distil":
                process = start(place, arguments, steps)
                checkpoint = place / arguments[-1] / "checkpoint.safetensors"
                while not checkpoint.exists() and process.poll() is None:
                    time.sleep(0.005)
                process.kill()
                assert process.wait() == -signal.SIGKILL, "it was done before it could be killed"
                assert not (checkpoint.parent / arguments[0] / "config.json").exists()
            finish(start(place, arguments, steps))
    results = sorted(path.relative_to(whole) for path in whole.rglob("model.safetensors"))
    assert [str(path.parent) for path in results] == ["map/prior", "prior/prior", "vfm/vfm/adapter", "vfm/vfm/map"]
    for path in results:
        one, other = load_file(whole / path), load_file(cut / path)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one), path
    image = Image.fromarray((np.random.default_rng(1).random((17, 21, 3)) * 255).astype(np.uint8))
    image.save(cut / "unseen.png")
    command = [sys.executable, "-m", "invflow", "restore", "unseen.png", "--factor", "4", "--sigma", "0.02", "--prior",
               "vfm", "--samples", "2"]
    subprocess.run(command, cwd=cut, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert Image.open(cut / "unseen-restored.png").size == (84, 68)
    assert len(list((cut / "unseen-restored-samples").iterdir())) == 2


def test_named_operators_are_those_of_the_shipped_trainings() -> None:
    shape = (3, 32, 32)
    usual = image_problems(shape)
    assert [p.sigma for p in own.problems_named((), shape)] == [p.sigma for p in usual]
    named = own.problems_named(("box-inpainting", "denoising", "super-resolution:factor=2"), shape)
    assert [p.levels for p in named] == [(0.0, 0.2), (0.0, 0.5), (0.0, 0.2)]
    assert named[0].operator.sides == usual[2].operator.sides
    assert named[2].operator.measurement_shape == (3, 16, 16)
