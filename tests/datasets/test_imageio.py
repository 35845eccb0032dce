"""Image files: every pixel as stored, every change reported, nothing but images accepted."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from invflow.datasets.files import fit_to, read_image, read_kernel, read_mask, write_image

GREY = np.arange(35, dtype=np.uint8).reshape(5, 7) * 7
COLOUR = np.stack([GREY, 255 - GREY, GREY // 2], 2)


class Said(list[str]):
    """Collects what is said."""

    def __call__(self, message: str) -> None:
        self.append(message)


def silent(message: str) -> None:
    raise AssertionError(f"nothing was to be said, but: {message}")


# -- reading -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".png", ".tif", ".bmp"])
@pytest.mark.parametrize("pixels", [GREY, COLOUR])
def test_eight_bits_are_exact(tmp_path, suffix: str, pixels: np.ndarray) -> None:
    Image.fromarray(pixels).save(tmp_path / f"a{suffix}")
    expected = torch.from_numpy(pixels).reshape(5, 7, -1).permute(2, 0, 1) / 255
    image = read_image(tmp_path / f"a{suffix}", say=silent)
    assert image.dtype == torch.float32
    assert torch.equal(image, expected)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_sixteen_bits_are_exact(tmp_path, suffix: str) -> None:
    pixels = (np.arange(35).reshape(5, 7) * 1800).astype(np.uint16)
    Image.fromarray(pixels).save(tmp_path / f"a{suffix}")
    image = read_image(tmp_path / f"a{suffix}", say=silent)
    assert torch.allclose(image[0].double(), torch.from_numpy(pixels / 65535), atol=1e-7)


def test_floating_point_files_have_to_be_in_range(tmp_path) -> None:
    Image.fromarray((GREY / 255).astype(np.float32)).save(tmp_path / "a.tif")
    assert torch.allclose(read_image(tmp_path / "a.tif", say=silent)[0], torch.from_numpy(GREY / 255).float())
    for bad in (GREY.astype(np.float32), np.full((3, 3), np.nan, np.float32)):
        Image.fromarray(bad).save(tmp_path / "a.tif")
        with pytest.raises(ValueError, match="ranges from 0 to 1"):
            read_image(tmp_path / "a.tif")


def test_photographs_are_turned_upright(tmp_path) -> None:
    exif = Image.Exif()
    exif[274] = 6  # the camera was held on its side: turn by 90 degrees clockwise
    Image.fromarray(GREY).save(tmp_path / "a.png", exif=exif)
    image = read_image(tmp_path / "a.png", say=silent)
    assert torch.equal(image[0], torch.from_numpy(np.rot90(GREY, -1).copy()) / 255)


def test_channels_are_converted_aloud(tmp_path) -> None:
    Image.fromarray(COLOUR).save(tmp_path / "colour.png")
    Image.fromarray(GREY).save(tmp_path / "grey.png")
    Image.fromarray(np.stack([GREY] * 3, 2)).save(tmp_path / "grey_as_colour.png")
    grey = torch.from_numpy(GREY)[None] / 255
    said = Said()
    luminance = read_image(tmp_path / "colour.png", channels=1, say=said)
    expected = torch.from_numpy(COLOUR / 255 @ np.array([0.299, 0.587, 0.114])).float()
    assert torch.allclose(luminance[0], expected, atol=1e-6)
    assert torch.equal(read_image(tmp_path / "grey.png", channels=3, say=said), grey.expand(3, -1, -1))
    assert ["grey" in message for message in said] == [True, True]
    assert torch.equal(read_image(tmp_path / "grey_as_colour.png", channels=1, say=silent), grey)
    with pytest.warns(UserWarning, match="luminance"):
        read_image(tmp_path / "colour.png", channels=1)
    with pytest.raises(ValueError, match="not 2"):
        read_image(tmp_path / "colour.png", channels=2)


def test_transparency_is_laid_on_white(tmp_path) -> None:
    rgba = np.zeros((2, 2, 4), np.uint8)
    rgba[0, 0] = (255, 0, 0, 255)
    rgba[0, 1] = (0, 0, 255, 51)  # a fifth of blue
    Image.fromarray(rgba).save(tmp_path / "a.png")
    said = Said()
    image = read_image(tmp_path / "a.png", say=said)
    assert torch.allclose(image[:, 0, 0], torch.tensor([1.0, 0.0, 0.0]))
    assert torch.allclose(image[:, 0, 1], torch.tensor([0.8, 0.8, 1.0]))
    assert torch.equal(image[:, 1], torch.ones(3, 2))
    assert "white" in said[0]
    palette = Image.fromarray(np.array([[0, 1]], np.uint8), "L").convert("P")
    palette.save(tmp_path / "b.png", transparency=0)
    assert torch.equal(read_image(tmp_path / "b.png", say=said)[:, 0, 0], torch.ones(3))


def test_the_first_of_several_images(tmp_path) -> None:
    first, second = Image.fromarray(GREY), Image.fromarray(255 - GREY)
    first.save(tmp_path / "a.tif", save_all=True, append_images=[second])
    said = Said()
    assert torch.equal(read_image(tmp_path / "a.tif", say=said)[0], torch.from_numpy(GREY) / 255)
    assert "using the first" in said[0]


def test_what_is_no_image(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="no file"):
        read_image(tmp_path / "absent.png")
    (tmp_path / "text.png").write_text("not an image")
    with pytest.raises(ValueError, match="is not an image"):
        read_image(tmp_path / "text.png")
    noise = np.random.default_rng(0).integers(0, 255, (64, 64), np.uint8)
    Image.fromarray(noise).save(tmp_path / "whole.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "whole.png").read_bytes()[:900])
    with pytest.raises(ValueError, match="cannot be read"):
        read_image(tmp_path / "half.png")


# -- sizes ---------------------------------------------------------------------------------------------------


def test_sizes_change_only_when_asked(tmp_path) -> None:
    Image.fromarray(GREY).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png", image_shape=(1, 5, 7), say=silent).shape == (1, 5, 7)
    with pytest.raises(ValueError, match=r"5 x 7 .* 4 x 4 is needed.*--resize"):
        read_image(tmp_path / "a.png", image_shape=(1, 4, 4))
    said = Said()
    assert read_image(tmp_path / "a.png", image_shape=(1, 4, 4), resize=True, say=said).shape == (1, 4, 4)
    assert ["cropped" in said[0], "scaled" in said[1]] == [True, True]


def test_scaling_is_centred_and_antialiased() -> None:
    lines = (torch.arange(120) % 4 == 0).float().expand(1, 80, 120)
    small = fit_to(lines, (20, 20), say=Said())
    assert torch.allclose(small[:, :, 1:-1], torch.full((1, 20, 18), 0.25), atol=0.02)  # unfiltered: 0 or 1
    ramp = torch.linspace(-1, 1, 101).expand(1, 51, 101)
    assert abs(float(fit_to(ramp, (10, 10), say=Said()).mean())) < 1e-6
    assert torch.equal(fit_to(ramp, (51, 101), say=silent), ramp)
    cropped = fit_to(ramp, (51, 51), say=Said())
    assert torch.equal(cropped, ramp[:, :, 25:76])
    said = Said()
    fit_to(torch.ones(3, 4, 4), (8, 8), say=said)
    assert "UP to 8 x 8" in said[0]


# -- masks and kernels ---------------------------------------------------------------------------------------


def test_masks_from_all_kinds_of_files(tmp_path) -> None:
    mask = (np.arange(16).reshape(4, 4) % 3 > 0).astype(np.uint8)
    Image.fromarray(mask * 255).save(tmp_path / "mask.png")
    np.save(tmp_path / "mask.npy", mask.astype(bool))
    np.savetxt(tmp_path / "mask.txt", mask)
    for name in ("mask.png", "mask.npy", "mask.txt"):
        said = Said()
        found = read_mask(tmp_path / name, (3, 4, 4), say=said)
        assert torch.equal(found, torch.from_numpy(mask)[None].float())
        assert list(said) == [f"the mask {name} hides 37.50% of the picture"]
    with pytest.raises(ValueError, match=r"\(1, 4, 4\).*\(3, 4, 5\)"):
        read_mask(tmp_path / "mask.png", (3, 4, 5))
    np.save(tmp_path / "grey.npy", np.array([[0.1, 0.9], [1.0, 0.0]]))
    said = Said()
    assert read_mask(tmp_path / "grey.npy", say=said).flatten().tolist() == [0, 1, 1, 0]
    assert "2 values" in said[0]
    np.save(tmp_path / "empty.npy", np.zeros((4, 4)))
    with pytest.raises(ValueError, match="observes no pixel"):
        read_mask(tmp_path / "empty.npy")


def test_kernels_are_scaled_to_one(tmp_path) -> None:
    kernel = np.array([[1.0, 2.0, 1.0]])
    np.save(tmp_path / "kernel.npy", kernel)
    said = Said()
    assert torch.allclose(read_kernel(tmp_path / "kernel.npy", say=said), torch.tensor([[0.25, 0.5, 0.25]]))
    assert "sums to 4" in said[0]
    np.savetxt(tmp_path / "kernel.txt", kernel / 4)
    assert torch.allclose(read_kernel(tmp_path / "kernel.txt", say=silent), torch.tensor([[0.25, 0.5, 0.25]]))
    Image.fromarray(GREY).save(tmp_path / "kernel.png")
    assert read_kernel(tmp_path / "kernel.png", say=Said()).sum().item() == pytest.approx(1)
    np.save(tmp_path / "cancels.npy", np.array([[1.0, -1.0]]))
    with pytest.raises(ValueError, match="positive sum"):
        read_kernel(tmp_path / "cancels.npy")


def test_arrays_are_never_unpickled(tmp_path) -> None:
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    np.save(tmp_path / "mask.npy", np.array([Trap()], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="no array of numbers"):
        read_mask(tmp_path / "mask.npy")
    assert not (tmp_path / "sprung").exists()
    (tmp_path / "mask.txt").write_text("1 0 one")
    with pytest.raises(ValueError, match="no array of numbers"):
        read_mask(tmp_path / "mask.txt")
    np.save(tmp_path / "kernel.npy", np.array([[1.0, np.inf]]))
    with pytest.raises(ValueError, match="not finite"):
        read_kernel(tmp_path / "kernel.npy")


# -- writing -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
def test_written_images_come_back(tmp_path, channels: int) -> None:
    image = torch.rand(channels, 6, 9, generator=torch.Generator().manual_seed(0)) * 2 - 0.5
    write_image(image, tmp_path / "made" / "a.png")
    found = read_image(tmp_path / "made" / "a.png", say=silent)
    assert (found - image.clamp(0, 1)).abs().max() <= 0.5 / 255 + 1e-6
    assert [p.name for p in (tmp_path / "made").iterdir()] == ["a.png"]


def test_writing_refuses_other_shapes_and_formats(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"\(2, 4, 4\)"):
        write_image(torch.zeros(2, 4, 4), tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"use a name that ends in \.png"):
        write_image(torch.zeros(1, 4, 4), tmp_path / "a.xyz")
    assert list(tmp_path.iterdir()) == []
