"""CIFAR-10: its trainings at small scale, the initial map and adapter, tables and cards."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from safetensors.torch import save_file

from benchmarks.release import fit_lmmse, fit_spread, make_weights
from benchmarks.tables import frechet_table, image_table
from invflow.metrics import psnr
from invflow.models.spectral_adapter import SpectralAdapter
from invflow.nets.classifier import Classifier
from invflow.problem import load_problem
from invflow.solvers.vfm import VFM
from invflow.training import LoopSettings
from invflow.training.spread import spread_factors
from invflow_problems.images import SHAPES
from invflow_problems.recipes import cifar as cifar_recipes
from invflow_problems.samples import load_samples

SMALL = {"channels": [8, 12], "blocks": 1, "embedding": 16}


@pytest.fixture(scope="module")
def images():
    """The validation images as bytes, in the place of the training files."""
    return load_samples("cifar10", "validation")[0].mul(255).round().to(torch.uint8)


@pytest.fixture
def small(images, monkeypatch):
    monkeypatch.setattr(cifar_recipes, "load_images", lambda data, split, dtype: images)
    monkeypatch.setattr(cifar_recipes, "MAP_NETWORK", SMALL)
    monkeypatch.setattr(cifar_recipes, "ADAPTER_NETWORK", {**SMALL, "attention": False})
    return {"data": "nowhere", "progress": False, "batch_size": 12, "precision": "no"}


def test_the_map_is_the_flow_of_a_gaussian_with_the_images_spectrum(images):
    """One jump from noise has the images' mean and contrast, and any number of jumps ends in the same place."""
    prior = cifar_recipes.gaussian_map(images)
    g = torch.Generator().manual_seed(0)
    z = torch.randn(2000, *SHAPES["cifar10"], generator=g)
    made = prior.decode(prior.jump(z, 0.0, 1.0))
    known = images.float() / 255
    torch.testing.assert_close(made.mean((0, 2, 3)), known.mean((0, 2, 3)), atol=0.02, rtol=0)
    contrast = [float((x[..., 1:] - x[..., :-1]).square().mean().sqrt()) for x in (made, known)]  # of neighbours
    assert contrast[0] == pytest.approx(contrast[1], rel=0.15)
    torch.testing.assert_close(prior.flow(z[:4], 3), prior.jump(z[:4], 0.0, 1.0), atol=1e-4, rtol=0)


def test_the_adapter_begins_at_the_best_linear_estimate(images):
    prior = cifar_recipes.gaussian_map(images)
    classes = [str(p.operator.problem_class) for p in cifar_recipes.cifar_problems()]
    adapter = SpectralAdapter.for_map(prior, classes, SMALL, torch.Generator().manual_seed(0)).requires_grad_(False)
    for task in image_table.TASKS:
        problem = load_problem(f"cifar10/{task}")
        truth, likelihood = problem.simulate(12, generator=torch.Generator().manual_seed(1), shuffle=False)
        mean, _ = adapter.propose(likelihood)
        estimate = image_table.stationary_estimate(prior, likelihood)
        restored = prior.decode(prior.jump(adapter.to_state(mean), 0.0, 1.0))
        torch.testing.assert_close(restored, estimate, atol=1e-3, rtol=0)
        grey = prior.decode(prior.mean).expand_as(truth)
        assert psnr(estimate, truth).mean() > psnr(grey, truth).mean() + 4  # dB
        if task == "denoising":
            assert psnr(estimate, truth).mean() > psnr(likelihood.y, truth).mean() + 6


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_both_trainings_run_and_go_on(small, tmp_path, images):
    prior = cifar_recipes.cifar10(tmp_path / "prior", steps=2, **small)
    assert prior.generate(2, 1, generator=torch.Generator().manual_seed(0)).shape == (2, 3, 32, 32)
    assert prior.spectrum is not None
    assert prior.independent_noise
    longer = cifar_recipes.cifar10(tmp_path / "longer", prior=str(tmp_path / "prior" / "prior"), steps=1, **small)
    assert longer.fingerprint() != prior.fingerprint()

    vfm = cifar_recipes.cifar10_vfm(tmp_path / "vfm", steps=2, **small)
    assert vfm.prior.network is None
    expected = cifar_recipes.gaussian_map(images, cifar_recipes.DECODE, torch.Generator().manual_seed(0))
    assert vfm.prior.fingerprint() == expected.fingerprint()
    known = {load_problem(f"cifar10/{task}").problem_class for task in image_table.TASKS}
    assert set(vfm.adapter.classes) == known | {"free-form-inpainting"}
    more = cifar_recipes.cifar10_vfm(tmp_path / "more", prior=str(tmp_path / "vfm" / "vfm"), steps=1, **small)
    assert more.prior.fingerprint() == vfm.prior.fingerprint()
    own = cifar_recipes.cifar10_vfm(tmp_path / "own", prior=str(tmp_path / "prior" / "prior"), steps=1, **small)
    assert own.prior.fingerprint() == prior.fingerprint()

    # table and card of what was trained
    rows = {name: {key: [1.0, 0.1] for key in ("psnr", "crps", "coverage", "residual")}
            for name in ("stationary linear", "VFM, 1 step")}
    text = make_weights._evaluation({"denoising": rows}, vfm=True)
    assert any("PSNR of the linear estimate" in line for line in text)
    assert text[-1] == "| denoising | 1.00 ± 0.10 | 1.00 ± 0.10 | 1.0000 ± 0.1000 | 1.000 ± 0.100 | 1.00 ± 0.10 |"
    assert make_weights._evaluation({}, vfm=False) == []


def test_the_later_stages_train_the_velocity_and_then_the_jumps(small, tmp_path):
    def columns(folder):
        return (folder / "metrics.csv").read_text().splitlines()[0].split(",")

    velocity = cifar_recipes.cifar10_velocity(tmp_path / "velocity", steps=1, **small)
    assert "flow_matching" in columns(tmp_path / "velocity")
    assert "meanflow" not in columns(tmp_path / "velocity")
    made = cifar_recipes.cifar10_jumps(tmp_path / "jumps", prior=str(tmp_path / "velocity" / "prior"), steps=1, **small)
    assert "meanflow" in columns(tmp_path / "jumps")
    assert made.options == velocity.options == SMALL
    assert made.fingerprint() != velocity.fingerprint()


def test_the_table_compares_with_the_stationary_estimate(small, tmp_path, monkeypatch, capsys):
    cifar_recipes.cifar10_vfm(tmp_path / "vfm", steps=1, **small)
    numbers = ["--observations", "2", "--samples", "19", "--steps", "1"]
    monkeypatch.setattr(sys, "argv", ["image_table", "cifar10", *numbers, "--vfm", str(tmp_path / "vfm" / "vfm"),
                                      "--output", str(tmp_path / "t.json")])
    image_table.main()
    table = json.loads((tmp_path / "t.json").read_text())
    assert (table.pop("observations"), table.pop("samples")) == (2, 19)
    shares = {name: value for name, value in table.items() if name not in image_table.TASKS}
    assert set(shares) == {f"{maker}, {steps}" for maker in ("prior", "map of the VFM") for steps in (1, 2, 4)}
    assert all(0 <= share <= 1 for share in shares.values())
    for row in (table[task] for task in image_table.TASKS):
        assert set(row) == {"pseudo-inverse", "stationary linear", "VFM, 1 step"}
    # one step of training has moved next to nothing: the mean of the samples is the linear estimate and their scatter
    linear, made = (table["denoising"][key]["psnr"][0] for key in ("stationary linear", "VFM, 1 step"))
    assert made == pytest.approx(linear, abs=1)
    assert "| motion-blur | VFM, 1 step |" in capsys.readouterr().out


def test_the_spread_is_fitted_on_the_validation_images(small, tmp_path, monkeypatch, images):
    """Fitted again it stays where it is: the factors that are found stand on top of those that the adapter has."""
    cifar_recipes.cifar10_vfm(tmp_path / "vfm", steps=1, **small)
    seen = []
    monkeypatch.setattr(fit_spread, "spread_factors", lambda vfm, images, problems, seed: seen.append(images)
                        or spread_factors(vfm, images[:20], problems, num_samples=60, seed=seed))
    for begun, output in (("vfm/vfm", "wider"), ("wider", "again")):
        monkeypatch.setattr(sys, "argv", ["fit_spread", str(tmp_path / begun), "--data", "cifar10", "--output",
                                          str(tmp_path / output)])
        fit_spread.main()
    assert torch.equal(seen[0].mul(255).round().to(torch.uint8), images)
    first, second = (VFM.load(tmp_path / name).adapter.spread for name in ("wider", "again"))
    assert set(first) == {str(p.operator.problem_class) for p in cifar_recipes.cifar_problems()}
    # the estimate under a Gaussian is unsure of real images, of hardly one as it should be
    assert max(abs(factor - 1) for factor in first.values()) > 0.1
    # the same random numbers, so that all errors over deviations are divided by the factor that was found, but for the
    # scatter of a mean of 60 samples, which grows with the factor: by at most a hundred-and-twentieth
    for name, factor in first.items():
        assert second[name] == pytest.approx(factor, rel=0.015)


def test_the_settings_are_for_loops():
    for recipe in (cifar_recipes.cifar10, cifar_recipes.cifar10_vfm):
        assert isinstance(recipe.settings, LoopSettings)
        assert recipe.data == "cifar10"


def test_distances_to_real_images(images):
    """Real images are nearer to real ones than a Gaussian's are, and nearest to themselves."""
    def features(x):
        return torch.nn.functional.avg_pool2d(x, 8).flatten(1)

    prior = cifar_recipes.gaussian_map(images)
    real = load_samples("cifar10", "test")[0]
    rows = dict(frechet_table.frechet_rows(prior, real, images, features, steps=(1, 2), flow=128))
    assert list(rows) == ["training images", "1 step", "2 steps", "velocity, 128 Heun steps"]
    assert rows["training images"]["recall"] > rows["1 step"]["recall"]
    assert rows["1 step"]["frechet"] == pytest.approx(rows["2 steps"]["frechet"], rel=1e-3)  # an exact flow
    assert rows["velocity, 128 Heun steps"]["frechet"] == pytest.approx(rows["1 step"]["frechet"], rel=0.05)
    itself = dict(frechet_table.frechet_rows(prior, real, real, features, steps=()))["training images"]
    assert itself["frechet"] == pytest.approx(0, abs=1e-6)
    assert (itself["precision"], itself["recall"]) == pytest.approx((1, 1))


def test_the_distances_command_says_what_is_missing(monkeypatch, tmp_path, images, capsys):
    monkeypatch.setattr(frechet_table, "load_images", lambda data, split, dtype: images)
    prior = cifar_recipes.gaussian_map(images)
    prior.save_pretrained(tmp_path / "prior")
    with pytest.raises(SystemExit):
        frechet_table.main([str(tmp_path / "prior"), "nowhere", "--weights", str(tmp_path), "--images", "20"])
    assert "no Inception weights" in capsys.readouterr().err


def test_the_distances_command_with_a_classifier(monkeypatch, tmp_path, images, capsys):
    monkeypatch.setattr(frechet_table, "load_images", lambda data, split, dtype: images)
    cifar_recipes.gaussian_map(images).save_pretrained(tmp_path / "prior")
    Classifier(SHAPES["cifar10"], ["a", "b"], width=2).save_pretrained(tmp_path / "classifier")
    frechet_table.main([str(tmp_path / "prior"), "nowhere", "--classifier", str(tmp_path / "classifier"), "--images",
                        "30", "--steps", "1", "--output", str(tmp_path / "t.json")])
    row = json.loads((tmp_path / "t.json").read_text())["1 step"]
    assert set(row) == {"frechet", "precision", "recall"}
    assert row["frechet"] > 0
    assert "| 1 step |" in capsys.readouterr().out


@pytest.mark.slow
def test_distances_with_inceptions_own_network(tmp_path, images, monkeypatch, capsys):
    from torchvision.models import inception_v3

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = inception_v3(weights=None, init_weights=False, aux_logits=True, transform_input=False)
    save_file(model.state_dict(), tmp_path / "inception_v3_google-0cc3c7bd.safetensors")
    monkeypatch.setattr(frechet_table, "load_images", lambda data, split, dtype: images)
    cifar_recipes.gaussian_map(images).save_pretrained(tmp_path / "prior")
    frechet_table.main([str(tmp_path / "prior"), "nowhere", "--weights", str(tmp_path), "--images", "6", "--steps", "1",
                        "--output", str(tmp_path / "t.json")])
    assert set(json.loads((tmp_path / "t.json").read_text())) == {"training images", "1 step"}
    assert "| 1 step |" in capsys.readouterr().out


def test_the_full_covariance_does_not_ship(capsys):
    with pytest.raises(SystemExit):
        fit_lmmse.main(["cifar10", "nowhere"])
    assert "9.4 MB" in capsys.readouterr().err
