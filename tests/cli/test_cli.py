"""The command line, end to end: output, files and errors."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import invflow
from invflow.cli.entry import app
from invflow.datasets.files import write_image
from invflow.registry import list_solvers, solver_by_name

SHAPE = (1, 28, 28)
SUMMARY = {"per_observation": {"psnr": [20.0]}, "mean": {"psnr": 20.0}, "seconds": 1.0, "observations": 1, "samples": 2,
           "calls_per_sample": {"forward": 0.0, "backward": 0.0}}


def run(*arguments: object, code: int = 0) -> tuple[str, str]:
    """Standard output and standard error of a command that has to end with an exit code."""
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result.stdout, result.stderr


def refuse(*arguments: object) -> str:
    """The one line of a command that the user got wrong."""
    out, error = run(*arguments, code=2)
    assert out == ""
    last = error.splitlines()[-1]
    assert last.startswith("error: ")
    return last


@dataclass
class Results:
    """What ``invflow solve`` wrote."""

    posterior: invflow.Posterior
    metrics: dict
    size: tuple[int, int]

    @classmethod
    def read(cls, folder: Path) -> Results:
        names = {p.name for p in folder.iterdir()}
        assert names - {"restored.png", "std.png", "samples"} == {"figure.png", "metrics.json", "posterior.safetensors"}
        posterior = invflow.Posterior.load(folder / "posterior.safetensors")
        metrics = json.loads((folder / "metrics.json").read_text())
        return cls(posterior, metrics, Image.open(folder / "figure.png").size)


@pytest.fixture(scope="module")
def digit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A light stroke on a dark ground, 28 x 28."""
    folder = tmp_path_factory.mktemp("files")
    image = torch.zeros(SHAPE)
    image[0, 4:24, 12:15] = 1
    write_image(image, folder / "digit.png")
    return folder / "digit.png"


@pytest.fixture(scope="module")
def small_vfm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained VFM in a folder: its samples are noise, but everything around them is real."""
    folder = tmp_path_factory.mktemp("vfm")
    g = torch.Generator().manual_seed(0)
    options = {"channels": [4, 4], "blocks": 1}
    prior = invflow.NeuralFlowMap(SHAPE, options=options, generator=g)
    classes = ["box-inpainting", "motion-blur"]
    adapter = invflow.Adapter(SHAPE, classes=classes, options=options, trained_for=prior.fingerprint(),
                              generator=g)
    invflow.VFM(prior, adapter).save_pretrained(folder)
    return folder


# -- solve, a problem ----------------------------------------------------------------------------------------


def test_main_job(tmp_path: Path) -> None:
    """One line, and a stranger sees posterior samples of degraded digits that explain the measurement."""
    out, _ = run("solve", "mnist/box-inpainting", "--output", tmp_path)
    assert all(word in out for word in ("PSNR", "SSIM", "CRPS", "residual", "network calls per sample", " s"))
    results = Results.read(tmp_path)
    posterior, mean = results.posterior, results.metrics["mean"]
    assert posterior.samples.shape == (4, 64, *SHAPE)
    assert results.metrics["calls_per_sample"] == {"forward": 1 + 1 / 64, "backward": 0}
    assert results.size[0] > 1500
    assert posterior.settings["problem"] == "mnist/box-inpainting"
    assert posterior.settings["versions"]["invflow"] == invflow.__version__
    # the data are explained, the hole is filled in, and the samples differ in the hole alone
    assert mean["residual"] < 2.5
    assert mean["psnr"] > 14
    std = posterior.std()
    hole = torch.zeros(28, 28, dtype=torch.bool)
    hole[7:21, 7:21] = True
    assert std[..., hole].mean() > 4 * std[..., ~hole].mean()


def test_a_problem_with_its_exact_posterior(tmp_path: Path) -> None:
    options = ("--solver", "exact", "--samples", 500, "--observations", 5, "--seed", 3)
    out, _ = run("solve", "gaussian/linear", *options, "--output", tmp_path)
    results = Results.read(tmp_path)
    assert results.posterior.samples.shape == (5, 500, 2)
    assert set(results.metrics["mean"]) == {"rmse", "crps", "residual", "std"}
    assert "gaussian/linear, exact, sigma 0.3" in out
    # the same seed gives the same file, another one another
    run("solve", "gaussian/linear", *options, "--output", tmp_path / "again")
    again = Results.read(tmp_path / "again")
    assert torch.equal(again.posterior.samples, results.posterior.samples)
    run("solve", "gaussian/linear", *options[:-1], 4, "--output", tmp_path / "other")
    assert not torch.equal(Results.read(tmp_path / "other").posterior.samples, results.posterior.samples)


def test_metrics_are_those_of_the_samples(tmp_path: Path) -> None:
    """The numbers in the file follow from the posterior beside it."""
    run("solve", "mnist/super-resolution", "--solver", "lmmse", "--observations", 2, "--samples", 8,
        "--output", tmp_path)
    results = Results.read(tmp_path)
    posterior = results.posterior
    truth, y = posterior.diagnostics["truth"], posterior.diagnostics["observation"]
    found = results.metrics["per_observation"]
    psnr = -10 * torch.log10((posterior.mean() - truth).square().flatten(1).mean(1))
    assert torch.allclose(torch.tensor(found["psnr"]), psnr, atol=1e-4)
    pooled = torch.nn.functional.avg_pool2d(posterior.samples.flatten(0, 1), 4).unflatten(0, (2, 8))
    residual = ((y[:, None] - pooled) / 0.025).square().flatten(1).mean(1).sqrt()
    assert torch.allclose(torch.tensor(found["residual"]), residual, rtol=1e-3)
    assert results.metrics["mean"]["psnr"] == pytest.approx(float(psnr.mean()), abs=1e-4)
    assert results.metrics["settings"]["seed"] == 0
    assert y.shape == (2, 1, 7, 7)


def test_one_sample_has_no_spread_to_report(tmp_path: Path) -> None:
    run("solve", "gaussian/linear", "--solver", "exact", "--samples", 1, "--output", tmp_path)
    assert set(Results.read(tmp_path).metrics["mean"]) == {"rmse", "residual"}


def test_own_weights_take_the_place_of_the_problems(small_vfm: Path, tmp_path: Path) -> None:
    run("solve", "mnist/motion-blur", "--prior", small_vfm, "--samples", 2, "--output", tmp_path)
    results = Results.read(tmp_path)
    assert results.posterior.settings["map"] == invflow.VFM.load(small_vfm).prior.fingerprint()
    assert results.metrics["calls_per_sample"]["forward"] == 1.5


def test_compile_first(small_vfm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []

    def compile_in_place(self: torch.nn.Module, **options: object) -> None:  # without the half minute
        self._compiled_call_impl = self._call_impl
        compiled.append(type(self).__name__)

    monkeypatch.setattr(torch.nn.Module, "compile", compile_in_place)
    run("solve", "mnist/motion-blur", "--prior", small_vfm, "--samples", 2, "--compile", "--output", tmp_path)
    assert compiled == ["UNet", "UNet"]
    assert "no network" in refuse("solve", "gaussian/linear", "--solver", "exact", "--compile", "--output", tmp_path)


# -- solve, the user's own file ------------------------------------------------------------------------------


def test_own_image_is_degraded(digit: Path, small_vfm: Path, tmp_path: Path) -> None:
    out, _ = run("solve", "--image", digit, "--operator", "box-inpainting", "--prior", small_vfm,
                     "--samples", 3, "--steps", 2, "--set", "chunk-size=2", "--output", tmp_path)
    results = Results.read(tmp_path)
    assert results.posterior.samples.shape == (1, 3, *SHAPE)
    assert results.posterior.settings["steps"] == 2
    assert results.posterior.settings["chunk_size"] == 2
    assert "sigma 0.05" in out
    assert "psnr" in results.metrics["mean"]
    truth = results.posterior.diagnostics["truth"]
    y = results.posterior.diagnostics["observation"]
    assert torch.equal(y[..., 7:21, 7:21], torch.zeros(1, 1, 14, 14))
    assert float((y - truth)[..., :7, :].std()) == pytest.approx(0.05, rel=0.2)


def test_own_measurement_is_taken_as_it_is(digit: Path, tmp_path: Path) -> None:
    mask = np.ones((28, 28))
    mask[10:16, 8:20] = 0
    np.savetxt(tmp_path / "mask.txt", mask)
    run("solve", "--image", digit, "--observed", "--operator", "inpainting",
        "--mask", tmp_path / "mask.txt", "--sigma", 0.1, "--solver", "lmmse", "--output", tmp_path / "out")
    results = Results.read(tmp_path / "out")
    assert "psnr" not in results.metrics["mean"]
    assert "residual" in results.metrics["mean"]
    y = results.posterior.diagnostics["observation"]
    given = torch.from_numpy(np.array(Image.open(digit))) / 255 * torch.from_numpy(mask)
    assert torch.allclose(y[0, 0].double(), given)


def test_a_painted_mask_goes_to_the_class_that_takes_it(digit: Path, tmp_path: Path) -> None:
    """A mask of any form, under the name that a user guesses: a note says which class the adapter treats it as."""
    mask = np.ones((28, 28))
    mask[5:9, 3:25] = mask[20:24, 4:10] = 0
    np.savetxt(tmp_path / "mask.txt", mask)
    _, error = run("solve", "--image", digit, "--observed", "--operator", "inpainting", "--mask", tmp_path / "mask.txt",
                   "--sigma", 0.05, "--samples", 2, "--output", tmp_path / "out")
    posterior = Results.read(tmp_path / "out").posterior
    known = "free-form-inpainting" in invflow.VFM.load("mnist").adapter.classes
    assert ("treats this MaskInpainting as random-inpainting" in error) is not known
    assert "verdict" in posterior.diagnostics


def test_own_kernel(digit: Path, small_vfm: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "kernel.npy", np.array([[0.0, 2.0, 2.0]]))
    _, error = run("solve", "--image", digit, "--operator", "motion-blur", "--sigma", 1e-6,
                   "--kernel", tmp_path / "kernel.npy", "--prior", small_vfm, "--samples", 2,
                   "--output", tmp_path / "out")
    assert "sums to 4" in error
    diagnostics = Results.read(tmp_path / "out").posterior.diagnostics
    truth, y = diagnostics["truth"], diagnostics["observation"]
    assert torch.allclose(y, (truth + truth.roll(1, -1)) / 2, atol=1e-4)


def test_own_photograph_is_scaled_when_asked(tmp_path: Path) -> None:
    paper = torch.ones(3, 90, 60)
    paper[:, 20:70, 25:32] = 0.1
    paper[0] *= 0.9
    write_image(paper, tmp_path / "photo.png")
    options = ("solve", "--image", tmp_path / "photo.png", "--operator", "denoising", "--solver", "lmmse")
    assert "--resize" in refuse(*options)
    _, error = run(*options, "--resize", "--output", tmp_path / "out")
    assert all(word in error for word in ("luminance", "cropped", "scaled", "--invert"))
    _, error = run(*options, "--resize", "--invert", "--output", tmp_path / "out")
    assert "--invert" not in error
    assert Results.read(tmp_path / "out").posterior.diagnostics["truth"].median() < 0.1


# -- what is refused -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("arguments", "message"), [
    (["mnist/box-inpaintin"], "did you mean 'mnist/box-inpainting'"),
    (["mnist/denoising", "--solver", "vmf"], "did you mean 'vfm'"),
    (["mnist/denoising", "--solver", "lmmse", "--steps", "3"], "no setting 'steps': it has chunk_size"),
    (["mnist/denoising", "--solver", "lmmse", "--set", "steps"], "NAME=VALUE"),
    (["mnist/denoising", "--solver", "lmmse", "--device", "gpu"], "'gpu' cannot be used"),
    (["mnist/denoising", "--solver", "lmmse", "--observations", "10000000"], "10000000"),
    (["mnist/denoising", "--solver", "exact"], "exact posterior"),
    (["gaussian/linear", "--solver", "lmmse"], "--solver exact"),
    (["mnist/denoising", "--sigma", "0"], "--sigma belongs to --image"),
    ([], "pass a problem"),
])
def test_bad_problems(arguments: list[str], message: str, tmp_path: Path) -> None:
    assert message in refuse("solve", *arguments, "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("arguments", "message"), [
    (["--operator", "box-inpaintng"], "did you mean 'box-inpainting'"),
    (["--operator", "denoising", "--sigma", "-1"], "sigma"),
    (["--operator", "denoising", "--prior", "mnits"], "mnist"),
    (["--operator", "denoising", "--factor", "2"], "--factor belongs to super-resolution"),
    (["--operator", "super-resolution", "--factor", "29"], "from 1 to 28"),
    (["--operator", "denoising", "--mask", "mask.npy"], "--mask belongs to box-inpainting, free-form-inpainting"),
    (["--operator", "denoising", "--kernel", "mask.npy"], "--kernel belongs to blur, gaussian-"),
    (["--operator", "mask-inpainting"], "--mask FILE"),
    (["--operator", "box-inpainting", "--mask", "mask.npy"], "(1, 5, 5)"),
    (["--operator", "matrix-operator"], "its matrix"),
    (["--operator", "random-inpainting", "--observed"], "--mask FILE"),
    (["--operator", "motion-blur", "--observed"], "--kernel FILE"),
    (["--operator", "super-resolution", "--observed"], "7 x 7 is needed"),
    (["--operator", "super-resolution", "--observed", "--resize"], "would change the measurement"),
    (["--operator", "denoising", "--observations", "2"], "one observation"),
    (["mnist/denoising", "--operator", "denoising"], "not both"),
    ([], "--operator NAME"),
])
def test_bad_images(digit: Path, arguments: list[str], message: str, tmp_path: Path,
                    monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    np.save("mask.npy", np.ones((5, 5)))
    solver = [] if "--prior" in arguments else ["--solver", "lmmse"]
    assert message in refuse("solve", "--image", digit, *arguments, *solver)
    assert not Path("invflow-results").exists()


def test_an_untrained_class_is_refused(digit: Path, small_vfm: Path) -> None:
    message = refuse("solve", "--image", digit, "--operator", "denoising", "--prior", small_vfm)
    assert "box-inpainting, motion-blur" in message
    assert "NoiseSMC" in message


def test_a_file_that_is_no_image(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("nothing to see")
    options = ("--operator", "denoising", "--solver", "lmmse")
    assert "is not an image" in refuse("solve", "--image", tmp_path / "notes.txt", *options)
    assert "no file" in refuse("solve", "--image", tmp_path / "absent.png", *options)


def test_an_output_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    out, error = run("solve", "gaussian/linear", "--solver", "exact", "--output", tmp_path / "file", code=2)
    assert "RMSE" not in out  # said before the work
    assert len(error.splitlines()) == 1
    assert "cannot write into this folder" in error


def test_files_of_another_run_do_not_lie_beside_new_ones(digit: Path, tmp_path: Path) -> None:
    options = ("solve", "--image", digit, "--operator", "denoising", "--solver", "lmmse", "--samples", 4, "--output",
               tmp_path)
    run(*options, "--write-samples", 3)
    (tmp_path / "samples" / "notes.txt").write_text("mine")
    assert (tmp_path / "samples" / "2.png").exists()
    run(*options, "--write-samples", 1)
    assert {path.name for path in (tmp_path / "samples").iterdir()} == {"0.png", "notes.txt"}
    run("solve", "gaussian/linear", "--solver", "exact", "--samples", 4, "--output", tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"posterior.safetensors", "metrics.json", "figure.png",
                                                          "samples"}


@pytest.mark.parametrize(("broken", "name"), [
    ("invflow._core.records.save_file", "posterior.safetensors"), ("invflow.Posterior.plot", "figure.png"),
    ("invflow.evaluation.summary.write_json", "metrics.json"), ("invflow.Posterior.std", "pictures"),
    ("invflow.cli.results.write_image", "restored.png"),
])
def test_a_file_that_fails_takes_no_other_with_it(digit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                  broken: str, name: str) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("of no\nimportance")

    monkeypatch.setattr("invflow.evaluation.summary.summarise", lambda *_, **__: SUMMARY)
    monkeypatch.setattr(broken, fail)
    out, error = run("solve", "--image", digit, "--operator", "denoising", "--solver", "lmmse", "--samples", 2,
                     "--output", tmp_path / "out", code=2)
    assert "PSNR" in out
    last = error.splitlines()[-1]
    assert last.startswith("error: not written to ")
    assert name in last
    assert "(of no importance)" in last
    expected = {"posterior.safetensors", "figure.png", "metrics.json", "restored.png", "std.png", "samples"}
    lost = {"pictures": {"std.png", "figure.png"}, "restored.png": {"restored.png", "std.png", "samples"}}
    expected -= lost.get(name, {name})
    assert {path.name for path in (tmp_path / "out").iterdir()} == expected
    assert all(part in out.split("wrote ")[1] for part in expected)


def test_samples_outlive_a_failure_to_judge_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ValueError("no numbers")

    monkeypatch.setattr("invflow.evaluation.summary.summarise", fail)
    error = refuse("solve", "gaussian/linear", "--solver", "exact", "--output", tmp_path)
    assert "no numbers" in error
    assert len(invflow.Posterior.load(tmp_path / "posterior.safetensors")) == 4


def test_a_weighted_posterior_of_a_file(digit: Path, tmp_path: Path) -> None:
    """One observation and few samples: tensors of size 1 along a dimension."""
    run("solve", "--image", digit, "--operator", "denoising", "--solver", "fmtt", "--prior", "mnist", "--samples", 4,
        "--steps", 2, "--output", tmp_path)
    posterior = Results.read(tmp_path).posterior
    assert posterior.weighted
    assert posterior.samples.shape == (1, 4, *SHAPE)


# -- solvers by name, list, train, bench ---------------------------------------------------------------------


def test_solvers_by_name() -> None:
    problem = invflow.load_problem("gaussian/linear")
    assert isinstance(solver_by_name("exact", problem), invflow.ExactPosterior)
    assert isinstance(solver_by_name("EXACT", problem.prior, max_entries=5), invflow.ExactPosterior)
    assert isinstance(solver_by_name("lmmse", "mnist", chunk_size=2), invflow.LinearMMSE)
    assert isinstance(solver_by_name("lmmse", invflow.load_problem("mnist/denoising")), invflow.LinearMMSE)
    with pytest.raises(ValueError, match="by the name of its prior"):
        solver_by_name("vfm", problem.prior)
    with pytest.raises(ValueError, match="'max_entry': it has max_entries"):
        solver_by_name("exact", problem.prior, max_entry=5)


def test_list_names_everything() -> None:
    out, _ = run("list")
    lines = [line.split()[0] for line in out.splitlines() if line.startswith("  ")]
    assert {"box-inpainting", "deepinv-operator", "mnist/motion-blur", *list_solvers()} <= set(lines)
    headings = [line for line in out.splitlines() if line and not line.startswith(" ")]
    assert headings == ["priors", "operators", "problems", "solvers", "trainings"]
    out, _ = run("list", "solvers")
    assert len(out.splitlines()) == 1 + len(list_solvers())
    assert "did you mean 'problems'" in refuse("list", "problem")


def test_train_hands_everything_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from invflow.training import LoopSettings, recipe

    seen: list[recipe.Run] = []
    made = recipe.Recipe("tiny", "nothing", LoopSettings(steps=9), seen.append)
    monkeypatch.setattr(recipe, "list_recipes", lambda: {"tiny": made})
    run("train", "tiny", "--output", tmp_path, "--data", "here", "--steps", 5, "--set", "learning-rate=0.5")
    assert seen[0].folder == tmp_path
    assert seen[0].data == "here"
    assert (seen[0].settings.steps, seen[0].settings.learning_rate) == (5, 0.5)
    assert "did you mean 'tiny'" in refuse("train", "tinny").lower()
    assert "unknown settings" in refuse("train", "tiny", "--set", "speed=1")


def test_bench_prints_and_fails_beyond_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    from invflow.bench import runner as bench

    ratios = {"fast": 1.0, "slow": 3.0}

    def measure(repeats: int, device: str, only: list[str], seed: int) -> list[bench.Result]:
        return [bench.Result(only[0], f"{repeats} on {device}", 1.0, 1.0, ratios[only[0]], 2.0)]

    monkeypatch.setattr(bench, "run", measure)
    out, _ = run("bench", "--only", "fast", "--repeats", 3)
    assert "3 on cpu" in out
    out, _ = run("bench", "--only", "slow", code=1)
    assert "slow" in out


def test_help_and_unknown_commands() -> None:
    out, _ = run("--help")
    assert all(command in out for command in ("solve", "list", "train", "bench"))
    _, error = run("slove", code=2)
    assert "solve" in error
