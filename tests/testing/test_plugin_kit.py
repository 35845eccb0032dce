"""The plug-in kit: the generated package, settings on the command line, and the interfaces to deepinv."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import invflow
from invflow._core import plugins
from invflow.cli.entry import app
from invflow.cli.image_task import operator_by_name
from invflow.cli.new import write_operator_package, write_package
from invflow.datasets.files import read_image
from invflow.deepinv_bridge import as_reconstructor, metric_from_deepinv
from invflow.testing import check_operator

SHAPE = (1, 8, 8)
FILES = [".gitignore", "README.md", "pyproject.toml", "src/invflow_line_sensor/__init__.py",
         "tests/test_invflow_line_sensor.py"]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(arguments))
    return result.exit_code, result.output


def contents(folder: Path) -> list[str]:
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())


# -- the package ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["LineSensor", "line-sensor", "line_sensor", "line sensor"])
def test_a_package_is_written(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "deep" / "package"
    code, output = run("new", "operator", name, "--output", str(folder))
    assert code == 0, output
    assert contents(folder) == FILES
    assert list(folder.parent.iterdir()) == [folder]  # the draft is gone
    assert f"wrote {folder}" in output.replace("\n", "")
    assert "--operator line-sensor" in output
    text = {file: (folder / file).read_text() for file in FILES}
    assert not any(re.search(r"\$[a-z]", part) for part in text.values())
    assert 'invflow_line_sensor = "invflow_line_sensor"' in text["pyproject.toml"]
    for file in FILES[3:]:
        ast.parse(text[file])
        assert max(map(len, text[file].splitlines())) <= 120
    assert "class LineSensor(Operator):" in text[FILES[3]]


def test_the_default_folder_is_named_after_the_operator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("new", "operator", "LineSensor")[0] == 0
    assert contents(tmp_path / "invflow-line-sensor") == FILES


@pytest.mark.parametrize(("name", "words"), [
    ("3d", "cannot name a class"), ("li/ne", "cannot name a class"), ("Düne", "cannot name a class"),
    ("", "cannot name a class"),
    ("-", "cannot name a class"), ("../x", "cannot name a class"), ("None", "cannot name a class"),
    ("gaussian-blur", "there is an operator GaussianBlur already"), ("gaussianblur", "GaussianBlur already"),
    ("Operators", "package invflow_operators is installed already"),
])
def test_bad_names_write_nothing(tmp_path: Path, name: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        write_operator_package(name, tmp_path / "package")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "package"
    folder.mkdir()
    code, output = run("new", "operator", "LineSensor", "--output", str(folder))
    assert code == 2
    assert "exists: pass another folder" in output
    assert list(folder.iterdir()) == []
    code, output = run("new", "sampler", "Mine")
    assert code == 2
    assert "invflow new operator Mine" in output


def test_nothing_half_written_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="disk full"):
        write_operator_package("LineSensor", tmp_path / "package")
    assert list(tmp_path.iterdir()) == []


def install(folder: Path, site: Path) -> None:
    """With pip where the build backend is there, else as pip would: the module, and its entry point beside it."""
    if importlib.util.find_spec("hatchling") is not None:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index",
                   "--target", str(site), str(folder)]
        subprocess.run(command, check=True, capture_output=True, timeout=300)
        return
    project = (folder / "pyproject.toml").read_text()
    found = re.findall(r'\[project\.entry-points\."([\w.]+)"\]\n(\w+) = "(\w+)"', project)
    assert found, "the package registers no entry point"
    module = found[0][2]
    info = site / f"{module}-0.1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text("".join(f"[{group}]\n{key} = {place}\n" for group, key, place in found))
    (folder / "src" / module).rename(site / module)


def test_the_package_installs_passes_its_tests_and_solves(tmp_path: Path) -> None:
    """All in one: its own tests (the contract among them), the list, and a solve of an image with a setting."""
    folder, command = write_operator_package("LineSensor", tmp_path / "package")
    assert command == "line-sensor"
    site = tmp_path / "site"
    install(folder, site)
    image = tmp_path / "digit.png"
    from PIL import Image

    digit = invflow.load_problem("mnist/denoising").images()[0, 0]
    Image.fromarray((255 * digit).round().byte().numpy()).save(image)
    script = (
        "import sys, pytest\n"
        "from invflow.cli.entry import app\n"
        f"code = pytest.main(['-q', '-p', 'no:cacheprovider', {str(folder)!r}])\n"
        "assert code == 0, code\n"
        "for line in sys.argv[1:]:\n"
        "    app(line.split('|'), standalone_mode=False)\n"
    )
    solve = f"solve|--image|{image}|--operator|line-sensor|--operator-set|window=4|--solver|lmmse|--samples|4"
    environment = {**os.environ, "PYTHONPATH": f"{site}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    result = subprocess.run([sys.executable, "-c", script, "list|operators", f"{solve}|--output|{tmp_path / 'out'}"],
                            capture_output=True, text=True, check=False, env=environment, timeout=600, cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "7 passed" in result.stdout
    assert re.search(r"line-sensor +Averages each row", result.stdout)
    made = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert "LineSensor((1, 28, 28) -> (1, 28, 7)" in made["settings"]["operator"]


MADE = {
    "solver": ("Narrowing", r"narrowing +Draws of the prior, weighted by e\^r", "4 passed",
               ["compare|gaussian/linear|--solver|narrowing|--observations|4|--samples|16",
                "calibrate|gaussian/linear|--solver|narrowing|--set|steps=2|--simulations|20|--samples|9",
                "solve|gaussian/linear|--solver|narrowing|--set|steps=2|--samples|16"]),
    "prior": ("GreyPixels", r"grey-pixels +Independent pixels", "3 passed",
              ["solve|--image|IMAGE|--operator|denoising|--sigma|0.1|--prior|grey-pixels|--solver|noise-rto|--samples|4"]),
    "problem": ("BlurredWaves", r"blurred-waves +blurred waves on a few pixels", "4 passed",
                ["solve|blurred-waves|--solver|exact|--samples|4",
                 "compare|blurred-waves|--solver|exact|--observations|2|--samples|4",
                 "calibrate|blurred-waves|--solver|exact|--simulations|20|--samples|9",
                 "train|blurred-waves|--steps|2|--batch-size|8",
                 "solve|blurred-waves|--prior|out4/prior|--solver|noise-rto|--samples|4"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", MADE)
def test_a_package_of_another_kind_installs_and_is_known_to_every_command(kind: str, tmp_path: Path) -> None:
    """Its own tests pass (the contract among them), and commands know what it offers by name."""
    name, listed, passed, commands = MADE[kind]
    folder, _ = write_package(kind, name, tmp_path / "package")
    site = tmp_path / "site"
    install(folder, site)
    from invflow.datasets.files import write_image

    write_image(torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(0)), tmp_path / "a.png")
    script = ("import sys, pytest\nfrom invflow.cli.entry import app\n"
              f"code = pytest.main(['-q', '-p', 'no:cacheprovider', {str(folder)!r}])\nassert code == 0, code\n"
              "for i, line in enumerate(sys.argv[1:]):\n"
              "    code = app([*line.split('|'), *(['--output', f'out{i}'] if i else [])], standalone_mode=False)\n"
              "    assert not code, (line, code)\n")
    lines = [f"list|{kind}s", *(line.replace("IMAGE", str(tmp_path / "a.png")) for line in commands)]
    environment = {**os.environ, "PYTHONPATH": f"{site}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    result = subprocess.run([sys.executable, "-c", script, *lines], capture_output=True, text=True, check=False,
                            env=environment, timeout=600, cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert passed in result.stdout
    assert re.search(listed, result.stdout)
    assert "left out" not in result.stderr
    settings = json.loads((tmp_path / f"out{len(commands)}" / "metrics.json").read_text())["settings"]
    assert settings["solver"] == name if kind == "solver" else settings["identity"]["prior"]


@pytest.mark.parametrize(("kind", "name", "words"), [
    ("solver", "noise-smc", "there is a solver noise-smc already"), ("solver", "NoiseSMC", "noise-smc already"),
    ("prior", "Mnist", "there is a prior mnist already"), ("metric", "Mine", "cannot write a 'metric'"),
])
def test_names_that_are_taken_by_its_own_kind_write_nothing(kind: str, name: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        write_package(kind, name, tmp_path / "package")
    assert list(tmp_path.iterdir()) == []


def test_the_example_operator_keeps_the_contract_here_too(tmp_path: Path) -> None:
    folder, _ = write_operator_package("LineSensor", tmp_path / "package")
    spec = importlib.util.spec_from_file_location("line_sensor", folder / FILES[3])
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    check_operator(module.LineSensor(SHAPE))
    with pytest.raises(ValueError, match="window=3 does not divide the width 8"):
        module.LineSensor(SHAPE, window=3)


def test_built_in_operators_come_before_those_of_plug_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    """A package named invflow_anything must not put its GaussianBlur in the place of invflow's own."""
    entries = [importlib.metadata.EntryPoint(name, value, "invflow.operators") for name, value in (
        ("theirs", "invflow_a"), ("blur", "invflow_operators.blur"), ("elementwise", "invflow_operators.elementwise"))]
    module = type(sys)("invflow_a")
    module.GaussianBlur, module.__all__ = object, ["GaussianBlur"]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "invflow_a", module)
    monkeypatch.setattr(plugins, "entry_points", lambda group: entries)
    plugins.offers.cache_clear()
    try:
        assert plugins.find("invflow.operators", "GaussianBlur") is not object
    finally:
        plugins.offers.cache_clear()


# -- settings of an operator -----------------------------------------------------------------------------------------


def test_settings_reach_the_operator() -> None:
    wide = operator_by_name("gaussian-blur", (1, 16, 16), settings={"std": 3.0})
    narrow = operator_by_name("gaussian-blur", (1, 16, 16), settings={"std": 0.5})
    x = torch.zeros(1, 1, 16, 16)
    x[..., 8, 8] = 1
    assert wide(x).max() < narrow(x).max()


@pytest.mark.parametrize(("name", "settings", "words"), [
    ("gaussian-blur", {"sd": 1.0}, "gaussian-blur has no setting 'sd': it has .*std"),
    ("denoising", {"image_shape": 1}, "image_shape of denoising is given by the prior"),
    ("super-resolution", {"factor": 2}, "factor of super-resolution is given by --factor"),
    ("matrix-operator", {}, "needs its matrix: pass --operator-set matrix="),
])
def test_settings_that_do_not_fit_are_named(name: str, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        operator_by_name(name, (1, 16, 16), settings=settings)


def test_settings_on_the_command_line_belong_to_an_image(tmp_path: Path) -> None:
    code, output = run("solve", "mnist/denoising", "--operator-set", "std=1")
    assert code == 2
    assert "--operator-set belongs to --image" in output
    code, output = run("solve", "--image", "x.png", "--operator", "gaussian-blur", "--operator-set", "std")
    assert code == 2
    assert "--operator-set takes NAME=VALUE" in output


# -- deepinv -------------------------------------------------------------------------------------------------------


def gaussian() -> invflow.GaussianMixtureFlow:
    return invflow.GaussianMixtureFlow(torch.full((1, *SHAPE), 0.5), std=0.2)


def hidden_columns(sigma: float = 0.1) -> Any:
    import deepinv

    mask = torch.ones(SHAPE)
    mask[..., 3:5] = 0
    return deepinv.physics.Inpainting(SHAPE, mask=mask, noise_model=deepinv.physics.GaussianNoise(sigma, seeded()))


def test_a_solver_is_a_deepinv_reconstructor() -> None:
    import deepinv

    prior, physics = gaussian(), hidden_columns()
    truth = prior.generate(4, generator=seeded(1))
    y = physics(truth)
    model = as_reconstructor(invflow.ExactPosterior(prior), num_samples=400)
    assert isinstance(model, deepinv.models.Reconstructor)
    images = model(y, physics)
    assert torch.equal(images, model(y, physics))  # the same y, the same image
    operator = invflow.operators.DeepinvOperator(physics, SHAPE)
    mean, covariance = invflow.ExactPosterior(prior).moments(invflow.GaussianLikelihood(operator, y, 0.1))
    error = covariance.diagonal(dim1=1, dim2=2).sqrt().unflatten(1, SHAPE) / 20
    assert bool(((images - mean).abs() < 5 * error).all())
    posterior = model.posterior(y, physics)
    torch.testing.assert_close(posterior.mean(), images)


def test_a_reconstructor_passes_through_deepinv_test() -> None:
    import deepinv

    prior, physics = gaussian(), hidden_columns()
    truth = prior.generate(4, generator=seeded(1))
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(truth, physics(truth)), batch_size=2)
    model = as_reconstructor(invflow.ExactPosterior(prior), num_samples=50)
    found = deepinv.test(model, data, physics, metrics=[deepinv.loss.metric.PSNR()], verbose=False,
                         show_progress_bar=False, compare_no_learning=True)
    assert found["PSNR"] > found["PSNR no learning"] + 1
    expected = torch.cat([invflow.metrics.psnr(model(y, physics), x) for x, y in data]).mean()
    assert found["PSNR"] == pytest.approx(float(expected), abs=1e-3)


def test_a_reconstructor_of_samples_and_of_other_noise() -> None:
    import deepinv

    prior, physics = gaussian(), hidden_columns()
    y = physics(prior.generate(2, generator=seeded(1)))
    solver = invflow.ExactPosterior(prior)
    draws = torch.stack([as_reconstructor(solver, estimate="sample", num_samples=1, seed=k)(y, physics)
                         for k in range(40)])
    hole = draws[..., 3:5].std(0).mean()
    assert hole == pytest.approx(0.2, rel=0.1)  # of the prior, where nothing is observed; 5 standard errors
    seen = draws[..., :3].std(0).mean()
    assert seen == pytest.approx((1 / (1 / 0.04 + 1 / 0.01)) ** 0.5, rel=0.1)
    counts = deepinv.physics.Denoising(deepinv.physics.PoissonNoise(gain=0.1, rng=seeded()))
    y = counts(torch.full((2, *SHAPE), 0.6))
    with pytest.raises(ValueError, match=r"PoissonNoise, not Gaussian noise.*likelihood="):
        as_reconstructor(solver)(y, counts)
    model = as_reconstructor(invflow.NoiseSMC(prior, num_moves=2), num_samples=32, likelihood=lambda operator, y: (
        invflow.PoissonLikelihood(operator, (y / 0.1).round(), 10.0)))
    assert model(y, counts).mean() == pytest.approx(0.6, abs=0.1)


def test_a_complex_measurement_is_taken() -> None:
    import deepinv

    physics = deepinv.physics.MultiCoilMRI(img_size=(2, 6, 6), coil_maps=torch.ones(1, 2, 6, 6, dtype=torch.cfloat),
                                           noise_model=deepinv.physics.GaussianNoise(0.05, seeded()))
    prior = invflow.GaussianMixtureFlow(torch.zeros(1, 2, 6, 6), std=0.5)
    truth = prior.generate(2, generator=seeded(1))
    y = physics(truth)
    images = as_reconstructor(invflow.ExactPosterior(prior), num_samples=100)(y, physics)
    assert (images - truth).square().mean().sqrt() < 0.1


@pytest.mark.parametrize(("make", "error", "words"), [
    (lambda: as_reconstructor("vfm"), TypeError, "solver is a str"),  # type: ignore[arg-type]
    (lambda: as_reconstructor(invflow.ExactPosterior(gaussian()), estimate="median"), ValueError, "pass 'mean'"),
    (lambda: as_reconstructor(invflow.ExactPosterior(gaussian()), num_samples=0), ValueError, "at least one"),
])
def test_mistakes_are_named(make: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make()


def test_a_deepinv_metric_is_a_metric_here() -> None:
    import deepinv

    x, truth = torch.rand(2, 5, *SHAPE, generator=seeded()), torch.rand(2, *SHAPE, generator=seeded(1))
    psnr = metric_from_deepinv(deepinv.loss.metric.PSNR())
    torch.testing.assert_close(psnr(x, truth), invflow.metrics.psnr(x, truth))
    torch.testing.assert_close(psnr(x[:, 0], truth), invflow.metrics.psnr(x[:, 0], truth))
    with pytest.raises(ValueError, match=r"x has shape \(5, 1, 8, 8\)"):
        psnr(x[0], truth)
    with pytest.raises(ValueError, match="build it without reduction"):
        metric_from_deepinv(deepinv.loss.metric.PSNR(reduction="mean"))(x, truth)


def test_the_door_to_deepinv_costs_nothing_until_it_is_used() -> None:
    code = "import sys, invflow.deepinv_bridge; sys.exit('deepinv' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=300).returncode == 0


def test_images_that_were_written_are_read_back(tmp_path: Path) -> None:
    """The walk-through of the documentation writes a digit and solves with it."""
    from PIL import Image

    digit = invflow.load_problem("mnist/denoising").images()[3, 0]
    Image.fromarray((255 * digit).round().byte().numpy()).save(tmp_path / "digit.png")
    read = read_image(tmp_path / "digit.png", image_shape=(1, 28, 28), say=lambda text: None)
    torch.testing.assert_close(read[0], digit, atol=0.5 / 255, rtol=0)
