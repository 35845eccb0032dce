"""The law of residuals: known correlations and grids, laws that are told apart or not, and the command."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

import invflow
from benchmarks.tables import photo_law
from benchmarks.tables.residual_law import moments, told_apart
from invflow.linear.spectral import block_dct
from invflow.models.spectral_adapter import SpectralAdapter
from invflow.solvers.vfm import VFM


def noise(n: int = 40, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, 3, 64, 64, generator=torch.Generator().manual_seed(seed))


def test_moments_of_white_noise_are_one_and_zero():
    found = moments(2 * noise())
    # each moment is a mean of at least 40 * 3 * 64^2 / 64 values, but for the slowest band, which has 13 cosines
    assert found["power 5"] == pytest.approx(4, rel=0.02)
    assert found["colour 0"] == pytest.approx(4, rel=5 * (2 / (40 * 2 * 13)) ** 0.5)
    for name in ("red-green", "red-blue", "green-blue", "horizontal", "vertical", "diagonal"):
        assert abs(found[name]) < 5 * (40 * 64**2) ** -0.5
    assert found["block 8"] == pytest.approx(2 / 8, rel=5 * (1 / (2 * 40 * 3 * 64)) ** 0.5)
    assert found["border"] == pytest.approx(1, abs=0.02)
    assert found["step"] == pytest.approx(1, abs=0.03)


def test_correlations_are_those_of_the_residuals():
    """Green is 0.6 red plus 0.8 of its own; a mean of two neighbours in a row has a correlation of one half."""
    x = noise()
    x[:, 1] = 0.6 * x[:, 0] + 0.8 * x[:, 1]
    assert moments(x)["red-green"] == pytest.approx(0.6, abs=0.01)
    smooth = moments(x + x.roll(1, 3))
    assert smooth["horizontal"] == pytest.approx(0.5, abs=0.02)
    assert abs(smooth["vertical"]) < 0.02
    assert abs(smooth["diagonal"]) < 0.02


def test_a_grid_of_blocks_is_seen():
    """Slow cosines alone, drawn for each block: within a block neighbours are alike, across its border they are not."""
    z = torch.zeros(40, 3, 64, 64)
    z[..., ::8, ::8], z[..., ::8, 1::8] = noise()[..., ::8, ::8], noise()[..., ::8, 1::8]
    found = moments(block_dct(z, inverse=True))
    assert found["step"] > 3
    assert found["border"] > 1.1


def test_equal_laws_are_not_told_apart_and_others_are():
    same = told_apart(noise(), noise(seed=1))
    rough = noise(seed=1)
    other = told_apart(noise(), (rough + rough.roll(1, 3)) / 2**0.5)
    # 640 new patches: a standard error of 0.02
    assert abs(same - 0.5) < 0.08
    assert other > 0.95


def test_the_command_prints_the_table_and_draws_the_sheets(tmp_path, capsys):
    folder = tmp_path / "wallpapers" / "Garden" / "contents" / "images"
    folder.mkdir(parents=True)
    Image.radial_gradient("L").resize((400, 300)).convert("RGB").save(folder / "400x300.png")
    prior = invflow.NeuralFlowMap((3, 64, 64), network="none", skip="spectral", mean=torch.zeros(3, 1, 1),
                                  std=torch.full((3, 1, 1), 0.5), independent_noise=False)
    adapter = SpectralAdapter.for_map(prior, ["denoising"], {"channels": [4, 8], "blocks": 1, "attention": False})
    adapter.trained_for = prior.fingerprint()
    VFM(prior, adapter).save_pretrained(tmp_path / "vfm")
    photo_law.main(["--data", str(tmp_path / "wallpapers"), "--vfm", str(tmp_path / "vfm"), "--tasks", "denoising",
                    "--crops", "4", "--size", "64", "--symmetries", "2", "--pictures", str(tmp_path / "sheets")])
    rows = {line.split(" | ")[0].strip("| "): line for line in capsys.readouterr().out.splitlines() if line}
    assert {"brightness below 0.125, ratio", "colour below 1, ratio", "red-green", "block 16, ratio", "step", "CRPS",
            "coverage 8", "told apart"} <= set(rows)
    with Image.open(tmp_path / "sheets" / "denoising.png") as sheet:
        assert sheet.size == (6 * 64, 2 * 64)
