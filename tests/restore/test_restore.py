"""``invflow restore``: a folder of mixed files, and each kind of damage."""

from __future__ import annotations

import functools
import io
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from typer.testing import CliRunner

import invflow
from invflow.cli.entry import app
from invflow.datasets.files import read_image, write_image
from invflow.datasets.pictures import read_picture
from invflow.datasets.sixteen_bits import encode_tiff
from invflow.linear.spectral import Spectrum
from invflow.models.neural import NeuralFlowMap
from invflow.models.spectral_adapter import SpectralAdapter
from invflow.operators import Blur, SuperResolution
from invflow.restore.blocks import posterior_in_blocks

CLASSES = ["denoising", "random-inpainting", "box-inpainting", "super-resolution-x2", "gaussian-blur", "motion-blur"]
HEIGHT, WIDTH, SIGMA = 70, 96, 0.04


def waves(channels: int = 3, height: int = HEIGHT, width: int = WIDTH) -> torch.Tensor:
    """A picture of slow waves, in [0.2, 0.8]."""
    rows, columns = torch.arange(height)[:, None] / 9, torch.arange(width) / 7
    return torch.stack([0.5 + 0.3 * torch.sin(rows + c) * torch.cos(columns - c) for c in range(channels)])


def noisy(channels: int = 3) -> torch.Tensor:
    x = waves(channels)
    return x + SIGMA * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def prior(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Untrained: the adapter proposes the best linear estimate under a power law."""
    spectrum = Spectrum(3, (0.03 / Spectrum.frequencies()).log().float().expand(3, -1))
    flow = NeuralFlowMap((3, 16, 16), network="none", skip="spectral", mean=torch.zeros(3, 1, 1),
                         std=torch.full((3, 1, 1), 0.5), spectrum=spectrum)
    adapter = SpectralAdapter.for_map(flow, CLASSES, options={"channels": [8, 8], "blocks": 1, "embedding": 8},
                                      generator=torch.Generator().manual_seed(1))
    adapter.trained_for = flow.fingerprint()
    folder = tmp_path_factory.mktemp("weights") / "photos"
    invflow.VFM(flow, adapter).save_pretrained(folder)
    return folder


def run(*arguments: object, code: int = 0) -> tuple[str, str]:
    result = CliRunner().invoke(app, ["restore", *map(str, arguments)])
    assert result.exit_code == code, result.output + result.stderr
    return result.stdout, result.stderr


def eight(x: torch.Tensor) -> np.ndarray[Any, Any]:
    array = (x.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    return array[..., 0] if array.shape[2] == 1 else array


def error(x: torch.Tensor, truth: torch.Tensor) -> float:
    return float((x - truth).square().mean().sqrt())


PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def mixed(folder: Path) -> list[str]:
    """Twenty files: what they are, and two that are none."""
    folder.mkdir()
    y, grey = noisy(), noisy(1)
    colour, dark = Image.fromarray(eight(y)), Image.fromarray(eight(grey))
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "Maker"
    alpha = np.full((HEIGHT, WIDTH), 255, dtype=np.uint8)
    alpha[:20, :30], alpha[40:50, 40:50] = 128, 0
    for name, image, options in (
        ("a.jpg", colour, {"quality": 95, "exif": exif, "icc_profile": PROFILE}),
        ("b.png", colour, {"icc_profile": PROFILE}),
        ("c.tif", colour, {"icc_profile": PROFILE}), ("d.webp", colour, {"lossless": True}), ("e.bmp", colour, {}),
        ("f.ppm", colour, {}), ("g.gif", colour, {}), ("h.jpg", dark, {}), ("i.png", dark, {}), ("j.tif", dark, {}),
        ("k.tga", colour, {}), ("l.png", colour.convert("P"), {}), ("m.jpg", colour.convert("CMYK"), {}),
    ):
        image.save(folder / name, **options)
    for name, image in (("n.png", colour), ("o.png", dark)):
        image.putalpha(Image.fromarray(alpha))
        image.save(folder / name)
    for name, image in (("p.png", y), ("q.tif", y), ("r.png", grey)):
        write_image(image, folder / name, bits=16)
    (folder / "s.jpg").write_bytes(b"no image")
    colour.convert("RGB").resize((5, 5)).save(folder / "t.png")
    (folder / "notes.txt").write_text("not a picture")
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".txt")


def test_a_folder_of_twenty_files(prior: Path, tmp_path: Path) -> None:
    names = mixed(tmp_path / "in")
    assert len(names) == 20
    out, said = run(tmp_path / "in", "--prior", prior, "--output", tmp_path / "out", code=2)
    made = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert made == sorted({name.replace("g.gif", "g.png") for name in names} - {"s.jpg", "t.png"})
    assert "error: s.jpg" in said
    assert "error: t.png: the picture is too small or too uniform to estimate the noise" in said
    assert "2 of 20 files were not restored" in said
    assert all(f"/20] {name}" in out for name in names if name not in ("s.jpg", "t.png"))
    assert "s left" in out
    for name in set(made) - {"a.jpg", "g.png", "l.png"}:  # a turned one; two with few colours
        truth = waves(1 if name[0] in "hijor" else 3)
        before, after = read_picture(tmp_path / "in" / name, say=str), read_picture(tmp_path / "out" / name, say=str)
        for kept in ("kind", "bits", "profile", "exif"):
            assert getattr(before, kept) == getattr(after, kept), (name, kept)
        assert (before.alpha is None) == (after.alpha is None)
        assert after.values.shape == before.values.shape == truth.shape
        opaque = torch.ones(1, HEIGHT, WIDTH) if after.alpha is None else after.alpha
        if before.alpha is not None:
            torch.testing.assert_close(after.alpha, before.alpha)
        where = (opaque == 1).expand_as(truth)
        assert error(after.values[where], truth[where]) < 0.75 * error(before.values[where], truth[where]), name
    turned = Image.open(tmp_path / "out" / "a.jpg")
    assert turned.size == (HEIGHT, WIDTH)
    assert turned.getexif().get(0x0112) is None
    assert turned.getexif()[0x010F] == "Maker"
    assert turned.info["icc_profile"] == PROFILE


def big_tiff(pixels: np.ndarray[Any, Any], maker: bytes) -> bytes:
    """A TIFF of ``(H, W, 3)`` with 8 bits whose places have 64, as Pillow reads and does not write it."""
    height, width, _ = pixels.shape
    entries = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, 3, 8 | 8 << 16 | 8 << 32), (259, 3, 1, 1),
               (262, 3, 1, 2), (271, 2, len(maker), int.from_bytes(maker, "little")), (273, 16, 1, 0), (277, 3, 1, 3),
               (278, 4, 1, height), (279, 16, 1, pixels.nbytes)]
    start = 16 + 8 + 20 * len(entries) + 8
    entries[6] = (273, 16, 1, start)
    directory = b"".join(struct.pack("<HHQQ", *entry) for entry in entries)
    return (struct.pack("<2sHHHQQ", b"II", 43, 8, 0, 16, len(entries)) + directory + struct.pack("<Q", 0)
            + pixels.tobytes())


def test_tags_and_profiles_of_tiffs(prior: Path, tmp_path: Path) -> None:
    (tmp_path / "big.tif").write_bytes(big_tiff(eight(noisy()), b"Leica\0"))
    (tmp_path / "deep.tif").write_bytes(encode_tiff(np.full((40, 50, 3), 30000, np.uint16), PROFILE))
    exif = Image.Exif()
    exif[0x010F], exif[0x8769], exif[0x8825] = "Maker", {0x829A: 0.5}, {1: "N"}
    Image.fromarray(eight(noisy())).save(tmp_path / "camera.jpg", exif=exif)
    Image.fromarray(noisy(1)[0].numpy().clip(0, 1)).save(tmp_path / "float.tif")
    for name in ("big.tif", "deep.tif", "camera.jpg", "float.tif"):
        run(tmp_path / name, "--prior", prior, "--sigma", SIGMA, "--output", tmp_path / f"after-{name}")
    assert Image.open(tmp_path / "after-big.tif").getexif()[0x010F] == "Leica"
    assert Image.open(tmp_path / "after-deep.tif").info["icc_profile"] == PROFILE
    torch.testing.assert_close(read_image(tmp_path / "after-deep.tif"), torch.full((3, 40, 50), 30000 / 65535),
                               atol=1e-3, rtol=0)
    assert Image.open(tmp_path / "after-float.tif").mode == "F"
    found = Image.open(tmp_path / "after-camera.jpg").getexif()
    assert (found.get_ifd(0x8769)[0x829A], found.get_ifd(0x8825)[1]) == (0.5, "N")


def test_whatever_one_file_fails_with_the_others_are_restored(prior: Path, tmp_path: Path,
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.png", "b.png"):
        write_image(noisy(), tmp_path / name)

    def read(path: Path, **options: Any) -> Any:
        if path.name == "a.png":
            raise struct.error("unpack requires a buffer of 8 bytes")
        return read_picture(path, **options)

    monkeypatch.setattr("invflow.restore.task.read_picture", read)
    _, said = run(tmp_path, "--prior", prior, "--output", tmp_path / "out", code=2)
    assert "error: a.png: unpack requires" in said
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["b.png"]


def test_scratches_are_filled_and_the_rest_stays(prior: Path, tmp_path: Path) -> None:
    x = waves()
    damaged, mask = x.clone(), np.full((HEIGHT, WIDTH), 255, dtype=np.uint8)
    damaged[:, 30:33, 10:80] = 1.0
    mask[30:33, 10:80] = 0
    Image.fromarray(eight(damaged)).save(tmp_path / "damaged.png")
    Image.fromarray(mask).save(tmp_path / "mask.png")
    _, said = run(tmp_path / "damaged.png", "--mask", tmp_path / "mask.png", "--prior", prior, "--samples", 2)
    assert "hides 3.12% of the picture" in said
    restored = np.asarray(Image.open(tmp_path / "damaged-restored.png"))
    assert np.array_equal(restored[mask == 255], eight(damaged)[mask == 255])
    assert error(torch.from_numpy(restored[mask == 0] / 255), torch.from_numpy(eight(x)[mask == 0] / 255)) < 0.03
    for i in range(2):
        sample = np.asarray(Image.open(tmp_path / "damaged-restored-samples" / f"{i}.png"))
        assert np.array_equal(sample[mask == 255], eight(damaged)[mask == 255])
    run(tmp_path / "damaged.png", "--mask", tmp_path / "mask.png", "--prior", prior, "--no-keep-observed", "--sigma",
        0.05, "--output", tmp_path / "all.png")
    assert not np.array_equal(np.asarray(Image.open(tmp_path / "all.png"))[mask == 255], eight(damaged)[mask == 255])
    Image.fromarray(255 - mask).save(tmp_path / "white.png")
    _, said = run(tmp_path / "damaged.png", "--mask", tmp_path / "white.png", "--prior", prior, code=2)
    assert "--mask-hides white" in said
    run(tmp_path / "damaged.png", "--mask", tmp_path / "white.png", "--mask-hides", "white", "--prior", prior)


def test_blur_and_smallness(prior: Path, tmp_path: Path) -> None:
    x = 0.5 + 0.3 * torch.sin(torch.arange(120) / 1.7 + torch.arange(120)[:, None] / 9).expand(3, -1, -1)
    kernel = torch.ones(1, 9) / 9
    g = torch.Generator().manual_seed(0)
    seen = Blur(kernel, x.shape, padding="reflect").measure(x[None], 0.01, generator=g)[0]
    write_image(seen, tmp_path / "blurred.png")
    shifted = np.zeros((9, 25))
    shifted[4, 14:23] = 1.0  # the same blur, six pixels beside the centre, not scaled
    np.save(tmp_path / "kernel.npy", shifted)
    _, said = run(tmp_path / "blurred.png", "--kernel", tmp_path / "kernel.npy", "--prior", prior)
    assert "centred" in said
    assert error(read_image(tmp_path / "blurred-restored.png"), x) < 0.6 * error(seen, x)
    small = SuperResolution(x.shape, 2)(x[None])[0]
    write_image(small, tmp_path / "small.png")
    run(tmp_path / "small.png", "--factor", 2, "--sigma", 0.01, "--prior", prior)
    large = read_image(tmp_path / "small-restored.png")
    assert large.shape == x.shape
    assert error(large, x) < 0.02
    finer = 0.5 + 0.3 * torch.sin(torch.arange(120) / 1.2 + torch.arange(120)[:, None] / 2).expand(3, -1, -1)
    write_image(SuperResolution(x.shape, 2, "gaussian")(finer[None])[0], tmp_path / "small.png", bits=16)
    errors = []
    for filter in ("gaussian", "lanczos"):
        run(tmp_path / "small.png", "--factor", 2, "--sigma", 0.01, "--prior", prior, "--filter", filter)
        errors.append(error(read_image(tmp_path / "small-restored.png"), finer))
    assert errors[0] < 0.5 * errors[1]
    _, said = run(tmp_path / "small.png", "--factor", 2, "--filter", "box", "--prior", prior, code=2)
    assert "'lanczos', 'gaussian'" in said
    _, said = run(tmp_path / "small.png", "--factor", 7, "--sigma", 0.01, "--prior", prior, code=2)
    assert "enlarges by 2" in said


@pytest.mark.parametrize("suffix", [".npy", ".fits", ".tif"])
def test_files_of_numbers_with_a_range_and_holes(prior: Path, tmp_path: Path, suffix: str) -> None:
    x, y = 1000 + 3000 * waves(1)[0].numpy(), (1000 + 3000 * noisy(1)[0].numpy()).astype(np.float32)
    y[20:24, 30:40] = np.nan
    file = tmp_path / f"numbers{suffix}"
    if suffix == ".npy":
        np.save(file, y)
    elif suffix == ".tif":
        Image.fromarray(y).save(file)
    else:
        fits = pytest.importorskip("astropy.io.fits")
        fits.PrimaryHDU(y, header=fits.Header({"OBJECT": "waves"})).writeto(file)
    _, said = run(file, "--prior", prior, code=2)
    assert "pass --range 1" in said
    run(file, "--prior", prior, "--range", 1000, 4000, "--no-keep-observed", "--sigma", SIGMA)
    after = read_picture(tmp_path / f"numbers-restored{suffix}", value_range=(0.0, 5000.0), say=str)
    found = 5000 * after.values[0].numpy()
    known = np.isfinite(y)
    assert np.isfinite(found).all()
    assert np.abs(found - x)[known].mean() < 0.75 * np.abs(y - x)[known].mean()
    assert np.abs(found - x)[~known].mean() < 200
    if suffix == ".fits":
        assert after.header["OBJECT"] == "waves"


def test_heic_is_read_by_its_plug_in_or_the_plug_in_is_named(prior: Path, tmp_path: Path,
                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    heif = pytest.importorskip("pillow_heif")
    stream = io.BytesIO()
    heif.from_pillow(Image.fromarray(eight(noisy()))).save(stream, quality=95)
    (tmp_path / "phone.heic").write_bytes(stream.getvalue())
    _, said = run(tmp_path / "phone.heic", "--prior", prior, "--sigma", SIGMA)
    assert "written as PNG" in said
    assert error(read_image(tmp_path / "phone-restored.png"), waves()) < SIGMA
    monkeypatch.setitem(__import__("sys").modules, "pillow_heif", None)
    _, said = run(tmp_path / "phone.heic", "--prior", prior, code=2)
    assert "pip install pillow-heif" in said


@pytest.mark.parametrize(("options", "match"), [
    (("--sigma", 5), "a scale of 0 to 255, pass 0.0196"), (("--sigma", -1), "from 0 to 1"),
    (("--mask-hides", "white"), "pass --mask FILE"),
    (("--filter", "lanczos"), "pass --factor 2"), (("--factor", 2, "--kernel", "k.npy"), "one at a time"),
    (("--range", 0, 255), "--range belongs to files of numbers"),
])
def test_what_makes_no_sense_is_refused(prior: Path, tmp_path: Path, options: tuple[object, ...], match: str) -> None:
    write_image(noisy(), tmp_path / "a.png")
    _, said = run(tmp_path / "a.png", "--prior", prior, *options, code=2)
    assert match in said


def test_nothing_is_written_over_and_folders_have_to_hold_something(prior: Path, tmp_path: Path) -> None:
    write_image(noisy(), tmp_path / "a.png")
    _, said = run(tmp_path / "a.png", "--prior", prior, "--output", tmp_path / "a.png", code=2)
    assert "would overwrite the source file" in said
    _, said = run(tmp_path, "--prior", prior, "--output", tmp_path, code=2)
    assert "would overwrite the source file" in said
    (tmp_path / "empty").mkdir()
    _, said = run(tmp_path / "empty", "--prior", prior, code=2)
    assert "contains no picture" in said
    _, said = run(tmp_path / "none.png", "--prior", prior, code=2)
    assert "there is no file" in said


def test_samples_of_an_earlier_run_go_and_noise_beyond_the_training_is_said(prior: Path, tmp_path: Path) -> None:
    write_image(noisy(), tmp_path / "a.png")
    (tmp_path / "a-restored-samples").mkdir()
    (tmp_path / "a-restored-samples" / "notes.txt").write_text("mine")
    run(tmp_path / "a.png", "--prior", prior, "--samples", 3)
    _, said = run(tmp_path / "a.png", "--prior", prior, "--samples", 1, "--sigma", 0.001)
    assert "outside the range that the prior was trained for: using 0.01" in said
    assert sorted(path.name for path in (tmp_path / "a-restored-samples").iterdir()) == ["0.png", "notes.txt"]


def test_progress_within_a_large_file(prior: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = functools.partial(posterior_in_blocks, block=256)
    monkeypatch.setattr("invflow.restore.task.posterior_in_blocks", small)
    write_image(waves(3, 300, 400) + SIGMA * torch.randn(3, 300, 400), tmp_path / "a.png")
    _, said = run(tmp_path / "a.png", "--prior", prior)
    count = said.count("a.png: block ")
    assert count >= 4
    assert f"a.png: block 1 of {count}, " in said
    assert f"a.png: block {count} of {count}, 0 s left" in said
    assert error(read_image(tmp_path / "a-restored.png"), waves(3, 300, 400)) < 0.75 * SIGMA
