"""``invflow solve --image`` on photographs: any size, grey and colour, degraded by invflow or elsewhere."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import invflow
from invflow.cli.entry import app
from invflow.cli.image_task import ImageTask
from invflow.datasets.files import read_image, write_image
from invflow.linear.spectral import Spectrum
from invflow.models.neural import NeuralFlowMap
from invflow.models.spectral_adapter import SpectralAdapter
from invflow.operators import Blur, Denoising

CLASSES = ["denoising", "random-inpainting", "box-inpainting", "super-resolution-x2", "super-resolution-x3",
           "gaussian-blur", "motion-blur"]


def smooth(channels: int, height: int, width: int) -> torch.Tensor:
    """A picture of slow waves, in [0.2, 0.8]."""
    rows, columns = torch.arange(height)[:, None] / 9, torch.arange(width) / 7
    return torch.stack([0.5 + 0.3 * torch.sin(rows + c) * torch.cos(columns - c) for c in range(channels)])


def vfm() -> invflow.VFM:
    """Untrained: the adapter proposes the best linear estimate under a power law."""
    spectrum = Spectrum(3, (0.03 / Spectrum.frequencies()).log().float().expand(3, -1))
    prior = NeuralFlowMap((3, 16, 16), options={"channels": [8, 8], "blocks": 1, "embedding": 8, "attention": False},
                          skip="spectral", mean=torch.zeros(3, 1, 1), std=torch.full((3, 1, 1), 0.5),
                          spectrum=spectrum, independent_noise=False,
                          generator=torch.Generator().manual_seed(0))
    adapter = SpectralAdapter.for_map(prior, CLASSES, generator=torch.Generator().manual_seed(1))
    adapter.trained_for = prior.fingerprint()
    return invflow.VFM(prior, adapter)


@pytest.fixture(scope="module")
def photo_vfm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights") / "photos"
    vfm().save_pretrained(folder)
    return folder


def run(*arguments: object, code: int = 0) -> tuple[str, str]:
    result = CliRunner().invoke(app, ["solve", *map(str, arguments)])
    assert result.exit_code == code, result.output + result.stderr
    return result.stdout, result.stderr


def metrics(folder: Path) -> Any:
    return json.loads((folder / "metrics.json").read_text())


def test_a_colour_photograph_of_any_size(photo_vfm: Path, tmp_path: Path) -> None:
    truth = smooth(3, 70, 93)
    write_image(truth, tmp_path / "photo.png", bits=16)
    out, said = run("--image", tmp_path / "photo.png", "--operator", "super-resolution", "--factor", 2, "--sigma", 0.02,
                    "--prior", photo_vfm, "--samples", 8, "--write-samples", 2, "--output", tmp_path / "out")
    folder = tmp_path / "out"
    posterior = invflow.Posterior.load(folder / "posterior.safetensors")
    assert posterior.samples.shape == (1, 8, 3, 70, 93)
    assert tuple(posterior.diagnostics["observation"].shape) == (1, 3, 35, 47)
    torch.testing.assert_close(read_image(folder / "restored.png"), posterior.mean()[0].clamp(0, 1), atol=0.003, rtol=0)
    assert sorted(p.name for p in (folder / "samples").iterdir()) == ["0.png", "1.png"]
    torch.testing.assert_close(read_image(folder / "samples" / "1.png"), posterior.samples[0, 1].clamp(0, 1),
                               atol=0.003, rtol=0)
    white = metrics(folder)["pictures"]["std.png"]["white"]
    std = posterior.std()[0].square().mean(0).sqrt()
    assert float((std <= white).float().mean()) == pytest.approx(0.999, abs=2e-3)
    torch.testing.assert_close(read_image(folder / "std.png")[0], (std / white).clamp(0, 1), atol=0.003, rtol=0)
    torch.testing.assert_close(posterior.diagnostics["truth"][0], truth, atol=1e-4, rtol=0)
    assert all(name in out for name in ("restored.png", "std.png", "samples/0.png", "posterior.safetensors"))
    assert metrics(folder)["mean"]["psnr"] > 25
    assert not said


def test_large_posteriors_are_kept_only_when_asked(photo_vfm: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("invflow.cli.results.LARGEST", 1000)
    write_image(smooth(3, 20, 30), tmp_path / "a.png")
    arguments = ("--image", tmp_path / "a.png", "--operator", "denoising", "--prior", photo_vfm, "--samples", 1)
    _, said = run(*arguments, "--output", tmp_path / "out")
    assert "--keep-posterior writes it" in said
    assert not (tmp_path / "out" / "posterior.safetensors").exists()
    assert (tmp_path / "out" / "restored.png").exists()
    assert not (tmp_path / "out" / "std.png").exists()  # one sample has no spread
    run(*arguments, "--output", tmp_path / "kept", "--keep-posterior", "--write-samples", 0)
    assert (tmp_path / "kept" / "posterior.safetensors").exists()
    assert not (tmp_path / "kept" / "samples").exists()


def test_a_grey_file_is_restored_as_grey(photo_vfm: Path, tmp_path: Path) -> None:
    write_image(smooth(1, 40, 33), tmp_path / "grey.png")
    _, said = run("--image", tmp_path / "grey.png", "--operator", "random-inpainting", "--prior", photo_vfm,
                  "--samples", 4, "--output", tmp_path / "out")
    assert "grey" in said
    posterior = invflow.Posterior.load(tmp_path / "out" / "posterior.safetensors")
    assert posterior.samples.shape == (1, 4, 1, 40, 33)
    assert read_image(tmp_path / "out" / "restored.png").shape == (1, 40, 33)
    assert tuple(posterior.diagnostics["observation"].shape) == (1, 1, 40, 33)


def test_three_channels_whose_mean_is_the_grey_file_have_independent_noise(tmp_path: Path) -> None:
    """The mean of y_c = truth + sqrt(3) sigma e_c is exactly the grey measurement, and the e_c are uncorrelated."""
    truth, sigma = smooth(1, 200, 200), 0.05
    write_image(truth, tmp_path / "grey.png", bits=16)
    task = ImageTask(tmp_path / "grey.png", "denoising", sigma)
    posed = task.pose(vfm(), torch.Generator().manual_seed(0), lambda _: None)
    assert posed.shown.y.shape == (1, 1, 200, 200)
    torch.testing.assert_close(posed.likelihood.y.mean(1, keepdim=True), posed.shown.y, atol=1e-6, rtol=0)
    assert float(posed.likelihood.sigma) == pytest.approx(math.sqrt(3) * sigma)
    noise = (posed.likelihood.y - truth)[0].flatten(1) / sigma
    covariance, error = noise @ noise.T / noise.shape[1], 3 / 200  # standard error of each entry, about
    assert (covariance - 3 * torch.eye(3)).abs().max() < 5 * error * math.sqrt(2)
    # the log likelihood of a grey image is that of the grey measurement, up to a constant
    x = truth + torch.tensor([0.0, 0.02]).view(1, 2, 1, 1, 1)
    colour = posed.likelihood(x.expand(-1, -1, 3, -1, -1)).diff()
    torch.testing.assert_close(colour, posed.shown(x).diff(), rtol=1e-3, atol=0.5)


def test_random_masks_are_the_same_for_the_grey_and_the_colour_operator(tmp_path: Path) -> None:
    write_image(smooth(1, 30, 20), tmp_path / "grey.png")
    posed = ImageTask(tmp_path / "grey.png", "random-inpainting").pose(vfm(), torch.Generator().manual_seed(3), print)
    shown, seen = posed.shown.operator.observed(), posed.likelihood.operator.observed()
    assert shown is not None
    assert seen is not None
    assert torch.equal(seen, shown.expand(-1, 3, -1, -1))


def test_a_photograph_already_degraded(photo_vfm: Path, tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(0)
    truth = smooth(3, 150, 170)
    small = invflow.operators.SuperResolution((3, 150, 170), 3)(truth[None])[0]
    write_image(small + 0.05 * torch.randn(small.shape, generator=g), tmp_path / "small.png", bits=16)
    run("--image", tmp_path / "small.png", "--observed", "--operator", "super-resolution", "--factor", 3, "--prior",
        photo_vfm, "--samples", 2, "--sigma", 0.05, "--output", tmp_path / "large")
    assert read_image(tmp_path / "large" / "restored.png").shape == (3, 150, 171)  # 57 x 3
    noisy = truth + 0.05 * torch.randn(truth.shape, generator=g)
    write_image(noisy, tmp_path / "noisy.png", bits=16)
    _, said = run("--image", tmp_path / "noisy.png", "--observed", "--operator", "denoising", "--prior", photo_vfm,
                  "--samples", 2, "--output", tmp_path / "clean")
    assert "sigma was estimated" in said
    assert metrics(tmp_path / "clean")["settings"]["sigma"][0] == pytest.approx(0.05, rel=0.05)
    restored = read_image(tmp_path / "clean" / "restored.png")
    assert (restored - truth).square().mean() < 0.6 * (noisy - truth).square().mean()
    mask = np.ones((150, 170))
    mask[60:80, 50:90] = 0
    np.save(tmp_path / "mask.npy", mask)
    run("--image", tmp_path / "noisy.png", "--observed", "--operator", "box-inpainting", "--mask",
        tmp_path / "mask.npy", "--prior", photo_vfm, "--samples", 2, "--sigma", 0.05, "--output", tmp_path / "filled")
    np.savetxt(tmp_path / "kernel.txt", np.ones((1, 5)) / 5)
    run("--image", tmp_path / "noisy.png", "--observed", "--operator", "motion-blur", "--kernel",
        tmp_path / "kernel.txt", "--prior", photo_vfm, "--samples", 2, "--sigma", 0.05, "--output", tmp_path / "sharp")
    _, said = run("--image", tmp_path / "noisy.png", "--observed", "--operator", "gaussian-blur", "--prior", photo_vfm,
                  "--samples", 1, "--sigma", 0.05, "--output", tmp_path / "b")
    assert "std 2, kernel_size 25" in said


def test_a_kernel_without_a_class_and_a_file_made_small_by_others(photo_vfm: Path, tmp_path: Path) -> None:
    write_image(smooth(3, 40, 52), tmp_path / "a.png")
    np.save(tmp_path / "kernel.npy", np.ones((5, 5)) / 25)
    common = ("--image", tmp_path / "a.png", "--observed", "--prior", photo_vfm, "--samples", 2, "--sigma", 0.05,
              "--output", tmp_path / "out")
    _, said = run(*common, "--operator", "blur", "--kernel", tmp_path / "kernel.npy")
    assert "treats this Blur as gaussian-blur" in said
    _, said = run(*common, "--operator", "super-resolution", "--factor", 2)
    assert "assumed bicubic downsampling of the file" in said
    assert "'bicubic'" in metrics(tmp_path / "out")["settings"]["operator"]
    _, said = run(*common, "--operator", "super-resolution", "--factor", 2, "--filter", "lanczos")
    assert "bicubic downsampling" not in said
    assert "'lanczos'" in metrics(tmp_path / "out")["settings"]["operator"]
    _, said = run(*common, "--operator", "denoising", "--filter", "lanczos", code=2)
    assert "no setting 'filter'" in said


@pytest.mark.parametrize(("bits", "least"), [(8, 1 / 255), (16, 1 / 65535)])
def test_a_file_has_at_least_the_noise_of_its_rounding(photo_vfm: Path, tmp_path: Path, bits: int,
                                                       least: float) -> None:
    write_image(smooth(3, 40, 52), tmp_path / "a.png", bits=bits)
    _, said = run("--image", tmp_path / "a.png", "--observed", "--operator", "denoising", "--prior", photo_vfm,
                  "--samples", 1, "--sigma", 1e-9, "--output", tmp_path / "out")
    assert "below the rounding noise of a.png" in said
    assert metrics(tmp_path / "out")["settings"]["sigma"] == [pytest.approx(least / np.sqrt(12))]


def test_a_camera_does_not_wrap_around(photo_vfm: Path, tmp_path: Path) -> None:
    """The blur of a file brings in what lay outside its frame; taken for what lies across, it rings."""
    whole, kernel, sigma = smooth(3, 110, 134), torch.ones(9, 9) / 81, 0.01
    blurred = Blur(kernel, whole.shape).measure(whole[None], sigma, generator=torch.Generator().manual_seed(0))[0]
    truth, seen = whole[:, 20:-20, 20:-20], blurred[:, 20:-20, 20:-20]
    write_image(seen, tmp_path / "seen.png", bits=16)
    np.savetxt(tmp_path / "kernel.txt", kernel.numpy())
    common = ("--image", tmp_path / "seen.png", "--observed", "--operator", "motion-blur", "--kernel",
              tmp_path / "kernel.txt", "--prior", photo_vfm, "--samples", 8, "--sigma", sigma)
    errors, says = [], []
    for padding in ("circular", "reflect", None):
        folder = tmp_path / str(padding)
        chosen = () if padding is None else ("--operator-set", f"padding={padding}")
        says.append(run(*common, *chosen, "--output", folder)[1])
        mean = invflow.Posterior.load(folder / "posterior.safetensors").mean()[0]
        errors.append(float((mean - truth).square().mean()))
    assert errors[0] > 4 * errors[1]
    assert errors[2] == errors[1]
    assert [said.count("reflected at its border") for said in says] == [0, 0, 1]
    assert "padding=circular" in says[2]
    # what is degraded here, the usual way, wraps around; a border that is named leaves the rest as for photographs
    (operator, said), (named, _), (seen_operator, _) = (
        posed(tmp_path / "seen.png", **options) for options in ({}, {"settings": {"padding": "reflect"}},
                                                                {"observed": True}))
    assert (operator.padding, named.padding, seen_operator.padding) == ("circular", "reflect", "reflect")
    assert operator.kernel.shape[2:] == named.kernel.shape[2:] == seen_operator.kernel.shape[2:] == (25, 25)
    assert "reflected at its border" not in said


def posed(file: Path, **options: Any) -> tuple[Any, str]:
    """The operator of a Gaussian blur of a file, and what was said."""
    said: list[str] = []
    task = ImageTask(file, "gaussian-blur", **options)
    posed = task.pose(invflow.Wiener(), torch.Generator().manual_seed(0), say=said.append)
    return posed.likelihood.operator, " ".join(said)


@pytest.mark.parametrize(("arguments", "message"), [
    (["--operator", "super-resolution", "--factor", 40], "from 1 to 20"),
    (["--operator", "super-resolution", "--factor", 4], "super-resolution-x2"),
    (["--operator", "box-inpainting", "--mask", "{mask}"], "(1, 20, 30)"),
    (["--operator", "motion-blur", "--kernel", "{kernel}"], "(41, 41) pixels"),
    (["--operator", "denoising", "--observed", "--resize"], "no --resize"),
    (["--operator", "denoising", "--set", "tile=0"], "tile=0"),
])
def test_bad_input_is_named(arguments: list[Any], message: str, photo_vfm: Path, tmp_path: Path) -> None:
    write_image(smooth(3, 20, 30), tmp_path / "a.png")
    write_image(torch.ones(1, 20, 31), tmp_path / "mask.png")
    np.save(tmp_path / "kernel.npy", np.ones((41, 41)))
    files = {"{mask}": tmp_path / "mask.png", "{kernel}": tmp_path / "kernel.npy"}
    arguments = [files.get(a, a) for a in arguments]
    _, said = run("--image", tmp_path / "a.png", *arguments, "--prior", photo_vfm, "--output", tmp_path / "out", code=2)
    assert message in said


def test_resize_takes_the_size_that_was_trained_on(photo_vfm: Path, tmp_path: Path) -> None:
    write_image(smooth(3, 40, 30), tmp_path / "a.png")
    _, said = run("--image", tmp_path / "a.png", "--operator", "denoising", "--resize", "--prior", photo_vfm,
                  "--output", tmp_path / "out")
    assert "cropped" in said
    posterior = invflow.Posterior.load(tmp_path / "out" / "posterior.safetensors")
    assert posterior.samples.shape == (1, 64, 3, 16, 16)


def test_large_images_get_sixteen_samples(photo_vfm: Path, tmp_path: Path) -> None:
    write_image(smooth(3, 130, 127), tmp_path / "a.png")
    run("--image", tmp_path / "a.png", "--operator", "denoising", "--prior", photo_vfm, "--output", tmp_path / "out")
    assert metrics(tmp_path / "out")["samples"] == 16


def test_solvers_on_the_prior_alone_are_given_the_resized_one(tmp_path: Path) -> None:
    write_image(smooth(3, 20, 30), tmp_path / "a.png")
    solver = invflow.NoiseSMC(vfm().prior)
    posed = ImageTask(tmp_path / "a.png", "denoising").pose(solver, torch.Generator().manual_seed(0), print)
    assert posed.solver.prior.image_shape == posed.likelihood.operator.image_shape == (3, 20, 30)
    assert solver.prior.image_shape != (3, 20, 30)  # which is the caller's
    assert isinstance(posed.likelihood.operator, Denoising)


def test_figures_of_photographs_keep_their_proportions() -> None:
    samples = torch.rand(1, 3, 3, 100, 400, generator=torch.Generator().manual_seed(0))
    figure = invflow.Posterior(samples).plot(samples[:, 0], samples[:, 1], title="wide")
    size = figure.get_size_inches()
    pictures = [a for a in figure.axes if a.images]
    assert [a.get_title() for a in pictures][:3] == ["truth", "observation", "posterior sample"]
    for axes in pictures:
        box = axes.get_position()
        assert box.width * size[0] / (box.height * size[1]) == pytest.approx(4.0)
        assert max(axes.images[0].get_array().shape[:2]) <= 150 * box.width * size[0] + 1
    boxes = [a.get_position() for a in pictures]
    assert all(not a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[i + 1 :])
    assert size[0] < 15
    large = torch.zeros(1, 2, 3, 1200, 900)
    large[..., ::2] = 1.0  # stripes that skipping pixels would turn into one colour
    shown = next(a for a in invflow.Posterior(large).plot().axes if a.images).images[0].get_array()
    assert shown.shape[0] < 700
    assert float(np.abs(np.asarray(shown)[5:-5, 5:-5] - 0.5).max()) < 0.3


def test_white_paint_of_a_mask_hides_where_that_is_said(photo_vfm: Path, tmp_path: Path) -> None:
    x = smooth(3, 40, 50)
    x[:, 10:14, 5:45] = 1.0
    write_image(x, tmp_path / "damaged.png")
    mask = torch.zeros(1, 40, 50)
    mask[:, 10:14, 5:45] = 1
    write_image(mask, tmp_path / "white.png")
    options = ("--image", tmp_path / "damaged.png", "--observed", "--operator", "inpainting", "--sigma", 0.02,
               "--prior", photo_vfm, "--samples", 2, "--output", tmp_path / "out")
    _, said = run(*options, "--mask", tmp_path / "white.png", code=2)
    assert "--mask-hides white" in said
    run(*options, "--mask", tmp_path / "white.png", "--mask-hides", "white")
    filled = read_image(tmp_path / "out" / "restored.png")
    assert float((filled - smooth(3, 40, 50))[:, 10:14, 5:45].abs().max()) < 0.1
    _, said = run(*options, "--mask-hides", "white", code=2)
    assert "pass --mask FILE" in said


def test_solve_studies_one_file(photo_vfm: Path, tmp_path: Path) -> None:
    write_image(smooth(3, 20, 20), tmp_path / "a.png")
    options = ("--image", tmp_path / "a.png", "--operator", "denoising", "--prior", photo_vfm)
    for other in (("--image", tmp_path / "b.png"), ("--image", tmp_path)):
        _, said = run(*(options if "b.png" in str(other[1]) else options[2:]), *other, code=2)
        assert "invflow restore takes a folder" in said


def test_a_small_icon_in_colour_is_no_digit(tmp_path: Path) -> None:
    from invflow.cli.solve import _usual_prior

    write_image(smooth(3, 30, 40), tmp_path / "icon.png")
    write_image(smooth(1, 28, 28).expand(3, -1, -1), tmp_path / "digit.png")
    assert _usual_prior(ImageTask(tmp_path / "icon.png", "denoising"), "vfm") == "photos"
    assert _usual_prior(ImageTask(tmp_path / "icon.png", "denoising", resize=True), "vfm") == "mnist"
    assert _usual_prior(ImageTask(tmp_path / "digit.png", "denoising"), "vfm") == "mnist"


def test_noise_above_white_is_drawn_without_a_note_of_the_drawing_tool(caplog: pytest.LogCaptureFixture) -> None:
    """Over a hole, where pixels are put together, noise above white was added to the colour of what is not observed."""
    x = torch.full((1, 3, 900, 900), 0.9)
    observed = torch.rand(900, 900, generator=torch.Generator().manual_seed(0)) < 0.5
    y = (x + 0.4 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))) * observed
    posterior = invflow.Posterior(x[:, None].expand(-1, 2, -1, -1, -1))
    posterior.plot(None, y, observed=observed.expand(1, 3, -1, -1))
    assert "Clipping" not in caplog.text
