"""VFM on images of any size: resized maps, tiles, rows by area, too little memory."""

from __future__ import annotations

import pytest
import torch

import invflow
from invflow.models.adapter import Adapter
from invflow.models.neural import NeuralFlowMap
from invflow.models.spectral_adapter import SpectralAdapter
from invflow.operators import BoxInpainting, Denoising, SuperResolution
from invflow.training.loop import seeded

TRAINED = (3, 16, 16)
NETWORK = {"channels": [8, 12], "blocks": 1, "embedding": 8, "attention": False}
CLASSES = ["denoising", "box-inpainting", "super-resolution-x2"]


def shaken(module, seed):
    """Move every weight off its initial value: layers that start at zero would hide what follows them."""
    g = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        p.data += 0.1 * torch.randn(p.shape, generator=g)
    return module.eval().requires_grad_(False)


class AnySize(Adapter):
    """A plain adapter without attention takes measurements of any size."""

    @property
    def resizable(self):
        return self.network.attention.__class__ is torch.nn.Identity


def photo_vfm(shape=TRAINED, network=NETWORK, spectral=False, **settings):
    skip = {"skip": "spectral", "mean": torch.full((3, 1, 1), -0.1), "std": torch.full((3, 1, 1), 0.5)}
    prior = shaken(NeuralFlowMap(shape, options=network, generator=seeded(0, 0, 0), **(skip if spectral else {})), 1)
    if spectral:
        adapter = SpectralAdapter.for_map(prior, CLASSES, generator=seeded(0, 0, 1))
    else:
        adapter = AnySize(shape, classes=CLASSES, options=network, generator=seeded(0, 0, 1))
    shaken(adapter, 2).trained_for = prior.fingerprint()
    return invflow.VFM(prior, adapter, **settings)


def likelihood_for(operator, n=1, sigma=0.1):
    g = seeded(3, 0, 0)
    x = torch.rand(n, *operator.image_shape, generator=g)
    return invflow.GaussianLikelihood(operator, operator.measure(x, sigma, generator=g), sigma)


@pytest.mark.parametrize("spectral", [False, True])
@pytest.mark.parametrize("shape", [(3, 41, 30), (3, 16, 70), (3, 9, 9)])
def test_the_operator_says_how_large_the_images_are(shape, spectral):
    """One call of the resized pair on the whole image, with noise of the image's size."""
    vfm = photo_vfm(spectral=spectral)
    for operator in (Denoising(shape), BoxInpainting(shape), SuperResolution(shape, 2)):
        likelihood = likelihood_for(operator, n=2)
        posterior = vfm.sample(likelihood, 3, generator=seeded(7, 0, 0))
        assert posterior.samples.shape == (2, 3, *shape)
        mean, std = vfm.adapter.resized(shape).propose(likelihood)
        xi = torch.randn(6, *shape, generator=seeded(7, 0, 0)).unflatten(0, (2, 3))
        prior = vfm.prior.resized(shape)
        z = vfm.adapter.to_state((mean[:, None] + std[:, None] * xi).flatten(0, 1))
        expected = prior.decode(prior.jump(z, 0.0, 1.0)).unflatten(0, (2, 3))
        torch.testing.assert_close(posterior.samples, expected, atol=1e-5, rtol=1e-5)
        assert posterior.nfe.forward == pytest.approx(1 + 1 / 3)
    assert vfm.prior.image_shape == vfm.adapter.image_shape == TRAINED


@pytest.mark.parametrize("importance", [False, True])
def test_tiles_change_nothing_but_the_rounding(importance):
    shape = (3, 101, 82)
    likelihood = likelihood_for(Denoising(shape))
    whole = photo_vfm(importance=importance).sample(likelihood, 2, generator=seeded(7, 0, 0))
    vfm = photo_vfm(importance=importance, tile=16)
    tiled = vfm.sample(likelihood, 2, generator=seeded(7, 0, 0))
    assert whole.samples.std() > 0.05
    torch.testing.assert_close(tiled.samples, whole.samples, atol=1e-5, rtol=0)
    if importance:
        torch.testing.assert_close(tiled.log_evidence, whole.log_evidence, atol=0.05, rtol=1e-5)
    assert vfm.prior.network.tile is None
    prior = [photo_vfm(tile=tile).prior_samples(1, shape, generator=seeded(7, 0, 0)) for tile in (None, 24)]
    torch.testing.assert_close(*prior, atol=1e-5, rtol=0)


def rows_at_a_time(vfm, monkeypatch):
    """The rows, and the tiles, of each call of the map."""
    seen, jump = [], NeuralFlowMap.jump
    def recorded(self, x, s, t):
        seen.append((len(x), self.network.tile))
        return jump(self, x, s, t)
    monkeypatch.setattr(NeuralFlowMap, "jump", recorded)
    return seen


@pytest.mark.parametrize(("side", "chunks"), [(8, [4, 4, 1]), (16, [4, 4, 1]), (17, [3, 3, 3]), (40, [1] * 9)])
def test_rows_at_a_time_fall_with_the_area(side, chunks, monkeypatch):
    vfm = photo_vfm(chunk_size=4)
    seen = rows_at_a_time(vfm, monkeypatch)
    likelihood = likelihood_for(Denoising((3, side, side)))
    few = vfm.sample(likelihood, 9, generator=seeded(1, 0, 0)).samples
    assert [rows for rows, _ in seen] == chunks
    many = photo_vfm(chunk_size=1024).sample(likelihood, 9, generator=seeded(1, 0, 0)).samples
    torch.testing.assert_close(few, many, atol=1e-5, rtol=0)


def test_large_images_are_tiled_unless_told_otherwise(monkeypatch):
    import invflow.solvers.vfm as module

    monkeypatch.setattr(module, "WHOLE", 40 * 40)
    monkeypatch.setattr(module, "TILE", 16)
    seen = rows_at_a_time(None, monkeypatch)
    for side, tile in ((40, None), (41, 16)):
        photo_vfm().sample(likelihood_for(Denoising((3, side, side))), 1)
        assert seen[-1][1] == tile
    photo_vfm(tile=32).sample(likelihood_for(Denoising((3, 41, 41))), 1)
    assert seen[-1][1] == 32


def test_where_memory_ends_tiles_go_on_with_the_same_noise(monkeypatch):
    shape = (3, 150, 300)
    likelihood = likelihood_for(Denoising(shape))
    vfm, halo = photo_vfm(), photo_vfm().prior.network.halo
    whole = vfm.sample(likelihood, 2, generator=seeded(7, 0, 0)).samples
    from invflow.nets.unet import UNet

    work, limit = UNet._whole, (150 + 0) * (75 + 2 * halo)
    def scarce(self, x, embedding):
        if x.shape[-1] * x.shape[-2] > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return work(self, x, embedding)
    monkeypatch.setattr(UNet, "_whole", scarce)
    with pytest.warns(UserWarning, match=r"\(3, 150, 300\) does not fit in memory .* tile=75 avoids the attempt"):
        posterior = vfm.sample(likelihood, 2, generator=seeded(7, 0, 0))
    torch.testing.assert_close(posterior.samples, whole, atol=1e-5, rtol=0)
    limit = 100
    with (pytest.warns(UserWarning, match="in tiles"),
          pytest.raises(torch.OutOfMemoryError, match="a single row does not fit")):
        vfm.sample(likelihood, 2, generator=seeded(7, 0, 0))
    assert vfm.prior.network.tile is None


def test_sizes_that_cannot_be_are_refused():
    tied = {**NETWORK, "attention": True}
    vfm = photo_vfm(network=tied)
    with pytest.raises(ValueError, match=r"\(3, 16, 16\).*image_shape=\(3, 16, 16\)"):
        vfm.sample(likelihood_for(Denoising((3, 20, 20))), 1)
    with pytest.raises(ValueError, match="has a fixed size"):
        vfm.prior_samples(1, (3, 20, 20))
    with pytest.raises(ValueError, match="leave tile=None"):
        photo_vfm(network=tied, tile=64)
    vfm = photo_vfm()
    with pytest.raises(ValueError, match=r"\(3, 16, 16\).*cannot take \(1, 20, 20\)"):
        vfm.sample(likelihood_for(Denoising((1, 20, 20))), 1)
    for bad in (0, -3):
        with pytest.raises(ValueError, match=f"tile={bad}"):
            photo_vfm(tile=bad)
    with pytest.raises(ValueError, match="n=0"):
        vfm.prior_samples(0)


def test_the_map_stays_known_by_its_weights():
    vfm = photo_vfm()
    larger = vfm.resized((3, 40, 30))
    prior, adapter = larger.prior, larger.adapter
    adapter.check_map(prior)
    assert prior.fingerprint() == vfm.prior.fingerprint()
    assert prior.network is vfm.prior.network
    other = photo_vfm().prior
    for p in other.parameters():
        p.data += 0.1
    with pytest.raises(ValueError, match="not with"):
        adapter.check_map(other.resized((3, 40, 30)))


def test_saved_and_loaded_again_with_tiles(tmp_path):
    vfm = photo_vfm(spectral=True)
    vfm.save_pretrained(tmp_path)
    loaded = invflow.VFM.load(tmp_path, tile=16)
    likelihood = likelihood_for(Denoising((3, 70, 30)))
    a, b = (v.sample(likelihood, 1, generator=seeded(2, 0, 0)) for v in (vfm, loaded))
    torch.testing.assert_close(a.samples, b.samples, atol=1e-5, rtol=0)
    assert b.settings["tile"] == 16


@pytest.mark.parametrize("steps", [1, 3])
def test_the_mean_of_a_gaussian_map_is_exact(steps):
    """Without a network the map is affine, and so is what it makes of Gaussian noise: no sample is needed."""
    g = seeded(0, 0, 0)
    skip = {"skip": "spectral", "mean": torch.full((3, 1, 1), -0.1), "std": torch.full((3, 1, 1), 0.5)}
    prior = NeuralFlowMap(TRAINED, network="none", generator=g, **skip)
    adapter = shaken(SpectralAdapter.for_map(prior, CLASSES, options=NETWORK, generator=g), 2)
    adapter.trained_for = prior.fingerprint()
    vfm = invflow.VFM(prior, adapter, steps=steps)
    likelihood = likelihood_for(Denoising((3, 20, 12)), n=2)
    few, many = (vfm.sample(likelihood, n, generator=seeded(7, 0, 0)) for n in (2, 4000))
    torch.testing.assert_close(few.mean(), many.mean(), atol=1e-6, rtol=0)
    error = many.samples.std(1) / 4000**0.5
    z = (many.mean() - many.samples.mean(1)) / error
    assert float(z.square().mean()) == pytest.approx(1, abs=0.3)
    torch.testing.assert_close(many.std(), many.samples.std(1))
    torch.testing.assert_close(few.select(1).mean(), few.mean()[1:])
    weighted = invflow.VFM(prior, adapter, steps=steps, importance=True)
    assert "exact_mean" not in weighted.sample(likelihood, 8, generator=seeded(7, 0, 0)).diagnostics


def test_the_shipped_weights_work_in_tiles():
    shape = (3, 150, 40)
    likelihood = likelihood_for(Denoising(shape))
    whole, tiled = (invflow.VFM.load("photos", tile=tile) for tile in (None, 16))
    for vfm in (whole, tiled):
        vfm.adapter.symmetries = 1
    a, b = (vfm.sample(likelihood, 1, generator=seeded(7, 0, 0)).samples for vfm in (whole, tiled))
    torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_where_memory_ends_the_shipped_weights_go_on_in_tiles(monkeypatch):
    from invflow.nets.unet import UNet

    vfm, work = invflow.VFM.load("photos"), UNet._whole
    vfm.adapter.symmetries = 1
    likelihood, halo = likelihood_for(Denoising((3, 40, 600))), vfm.adapter.network.halo

    def scarce(self, x, embedding):
        if x.shape[-1] > 300 + 2 * halo:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return work(self, x, embedding)

    monkeypatch.setattr(UNet, "_whole", scarce)
    with pytest.warns(UserWarning, match="tile=300 avoids the attempt"):
        vfm.sample(likelihood, 1)
