"""The VFM solver, its adapter, and models as folders."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

import invflow
from invflow.likelihood import GaussianLikelihood
from invflow.linear.spectral import dct_matrix
from invflow.models.adapter import Adapter
from invflow.models.neural import NeuralFlowMap
from invflow.operators import BoxInpainting, Denoising, GaussianBlur, MatrixOperator, SuperResolution
from invflow.testing import check_flow_map
from invflow.training.loop import seeded

SHAPE = (1, 16, 16)
NETWORK = {"channels": [8, 16], "blocks": 1, "embedding": 16}
CLASSES = ["denoising", "box-inpainting", "super-resolution-x4", "gaussian-blur"]


def shaken(module, seed):
    """Move every weight off its initial value: layers that start at zero would hide what follows them."""
    g = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        p.data += 0.1 * torch.randn(p.shape, generator=g)
    return module.eval()


def tiny_vfm(**settings):
    prior = shaken(NeuralFlowMap(SHAPE, options=NETWORK, generator=seeded(0, 0, 0)), 1)
    adapter = shaken(Adapter(SHAPE, classes=CLASSES, options=NETWORK, generator=seeded(0, 0, 1)), 2)
    adapter.trained_for = prior.fingerprint()
    return invflow.VFM(prior, adapter, **settings)


def likelihood_for(operator, n=3, sigma=0.05):
    g = seeded(3, 0, 0)
    operator = operator.randomize(n, g)
    x = torch.rand(n, *SHAPE, generator=g)
    return invflow.GaussianLikelihood(operator, operator.measure(x, sigma, generator=g), sigma)


@pytest.mark.parametrize("operator", [Denoising(SHAPE), BoxInpainting(SHAPE), SuperResolution(SHAPE, factor=4),
                                      GaussianBlur(SHAPE)], ids=lambda o: type(o).__name__)
@pytest.mark.parametrize("steps", [1, 3])
def test_samples_are_the_map_of_the_adapters_noise(operator, steps):
    """Sample (b, n) is decode(flow(mean_b + std_b xi_bn)), with xi drawn for all (B, N) at once."""
    vfm = tiny_vfm(steps=steps)
    likelihood = likelihood_for(operator)
    posterior = vfm.sample(likelihood, 5, generator=seeded(7, 0, 0))
    mean, std = vfm.adapter.propose(likelihood)
    xi = torch.randn(15, *SHAPE, generator=seeded(7, 0, 0)).unflatten(0, (3, 5))
    with torch.no_grad():
        z = (mean[:, None] + std[:, None] * xi).flatten(0, 1)
        expected = vfm.prior.decode(vfm.prior.flow(z, steps)).unflatten(0, (3, 5))
    torch.testing.assert_close(posterior.samples, expected, atol=1e-5, rtol=1e-5)
    assert posterior.ess() is None
    assert posterior.nfe.forward == pytest.approx(steps + 1 / 5)  # the adapter runs once for each observation
    assert posterior.nfe.backward == 0


def test_samples_do_not_depend_on_chunks():
    likelihood = likelihood_for(BoxInpainting(SHAPE))
    samples = [tiny_vfm(chunk_size=size).sample(likelihood, 7, generator=seeded(1, 0, 0)).samples
               for size in (1, 4, 256)]
    torch.testing.assert_close(samples[0], samples[2], atol=1e-5, rtol=0)
    torch.testing.assert_close(samples[1], samples[2], atol=1e-5, rtol=0)


def test_observations_do_not_see_each_other():
    vfm, likelihood = tiny_vfm(), likelihood_for(GaussianBlur(SHAPE))
    mean, std = vfm.adapter.propose(likelihood)
    mean_1, std_1 = vfm.adapter.propose(likelihood.select([1]))
    torch.testing.assert_close(mean[1:2], mean_1, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(std[1:2], std_1, atol=1e-5, rtol=1e-5)


def test_adapter_sees_class_level_mask_and_kernel():
    """Each thing that the adapter is told changes what it proposes."""
    adapter = tiny_vfm().adapter
    image = torch.rand(1, *SHAPE, generator=seeded(0, 0, 0))
    ones, zeros = torch.ones(1, *SHAPE), torch.zeros(1, 32)
    none, level = torch.zeros(1, dtype=torch.long), torch.full((1,), 0.1)
    base = adapter(image, ones, zeros, none, level)[0]
    for changed in [(image, ones, zeros, none + 1, level), (image, ones, zeros, none, 2 * level),
                    (image, 0 * ones, zeros, none, level), (image, ones, zeros + 1, none, level)]:
        assert (adapter(*changed)[0] - base).abs().max() > 1e-3


def test_fresh_adapter_proposes_the_prior():
    adapter = Adapter(SHAPE, classes=CLASSES, options=NETWORK)
    mean, std = adapter.propose(likelihood_for(Denoising(SHAPE)))
    assert torch.equal(mean, torch.zeros_like(mean))
    assert torch.equal(std, torch.ones_like(std))


def test_unknown_problems_are_refused():
    vfm = tiny_vfm()
    for operator in (SuperResolution(SHAPE, factor=2), MatrixOperator(torch.eye(256), image_shape=SHAPE)):
        with pytest.raises(ValueError, match=r"knows Gaussian likelihoods of denoising, box-inpainting.*NoiseSMC"):
            vfm.sample(likelihood_for(operator), 2)
    with pytest.raises(ValueError, match="at least one sample"):
        vfm.sample(likelihood_for(Denoising(SHAPE)), 0)
    operator = Denoising((1, 8, 8))
    y = torch.rand(1, 1, 8, 8, generator=seeded(0, 0, 0))
    with pytest.raises(ValueError, match=r"image_shape=\(1, 16, 16\)"):
        vfm.sample(invflow.GaussianLikelihood(operator, y, 0.1), 2)


def test_adapter_of_another_map_is_refused():
    vfm = tiny_vfm()
    other = shaken(NeuralFlowMap(SHAPE, options=NETWORK, generator=seeded(0, 0, 0)), 9)
    with pytest.raises(ValueError, match=r"vfm\.prior and vfm\.adapter"):
        invflow.VFM(other, vfm.adapter)


def test_prior_samples_and_seeds():
    vfm = tiny_vfm()
    a, b = (vfm.prior_samples(3, generator=seeded(0, 1, 2)) for _ in range(2))
    assert torch.equal(a, b)
    assert a.shape == (3, *SHAPE)
    before = torch.random.get_rng_state()
    vfm.sample(likelihood_for(Denoising(SHAPE)), 2)
    tiny_vfm()
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("skip", ["flow", "denoiser"])
def test_neural_maps_keep_the_contract(skip):
    prior = shaken(NeuralFlowMap(SHAPE, options=NETWORK, skip=skip, generator=seeded(0, 0, 0)), 1).double()
    check_flow_map(prior, exact=False)


def test_untrained_map_carries_the_gaussian():
    """With a network that gives zero, a jump is the Gaussian's: exactly its flow, or its posterior mean from noise."""
    mean, std = torch.full((2,), 0.5), torch.tensor([0.3, 2.0])
    flow = NeuralFlowMap((2,), network="mlp", options={"width": 8, "depth": 1}, decode_affine=(1.0, 0.0), mean=mean,
                         std=std)
    z = torch.randn(100, 2, generator=seeded(0, 0, 0))
    torch.testing.assert_close(flow.jump(z, 0.0, 1.0), mean + std * z)
    s, t = 0.3, 0.8
    g_s, g_t = (((1 - a) ** 2 + (a * std) ** 2).sqrt() for a in (s, t))
    torch.testing.assert_close(flow.jump(z, s, t), t * mean + g_t / g_s * (z - s * mean))
    image = NeuralFlowMap(SHAPE, options=NETWORK, mean=torch.full(SHAPE, 0.2), std=torch.full(SHAPE, 0.7))
    torch.testing.assert_close(image.jump(torch.randn(2, *SHAPE, generator=seeded(0, 0, 0)), 0.0, 1.0),
                               torch.full((2, *SHAPE), 0.2))


def test_any_size_that_the_stride_divides():
    prior = NeuralFlowMap((3, 16, 24), options={**NETWORK, "attention": False})
    assert prior.generate(2, generator=seeded(0, 0, 0)).shape == (2, 3, 16, 24)
    with pytest.raises(ValueError, match="multiples of 4"):
        NeuralFlowMap((1, 18, 16), options=NETWORK)
    with pytest.raises(ValueError, match="network='mlp' for vectors"):
        NeuralFlowMap((5,))
    with pytest.raises(ValueError, match="'resnet'"):
        NeuralFlowMap(SHAPE, network="resnet")


@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_folder_round_trip(tmp_path, dtype):
    vfm, likelihood = tiny_vfm(steps=2), likelihood_for(BoxInpainting(SHAPE))
    vfm.save_pretrained(tmp_path / "vfm", dtype)
    loaded = invflow.VFM.load(tmp_path / "vfm")
    assert loaded.steps == 2
    assert loaded.prior.fingerprint() == vfm.prior.fingerprint()
    a, b = (v.sample(likelihood, 3, generator=seeded(0, 0, 0)).samples for v in (vfm, loaded))
    torch.testing.assert_close(a, b, atol=1e-6 if dtype is None else 0.05, rtol=0)
    assert invflow.VFM.load(tmp_path / "vfm", steps=1).steps == 1
    assert invflow.load_prior(tmp_path / "vfm" / "map").state_shape == SHAPE


def test_damaged_folders_are_refused(tmp_path):
    prior = tiny_vfm().prior
    prior.save_pretrained(tmp_path / "good")

    def broken(name, change):
        folder = tmp_path / name
        shutil.copytree(tmp_path / "good", folder)
        change(folder)
        return folder

    def edit(folder, **changes):
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    def truncate(folder):
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-100])

    def other_weights(folder):
        Adapter(SHAPE, classes=CLASSES, options=NETWORK).save_pretrained(folder / "other")
        shutil.copy(folder / "other" / "model.safetensors", folder / "model.safetensors")

    cases = {
        "truncated": (truncate, "truncated or not a safetensors"),
        "pickled": (lambda f: (f / "model.safetensors").write_bytes(b"\x80\x04pickle"),
                    "truncated or not a safetensors"),
        "no weights": (lambda f: (f / "model.safetensors").unlink(), "pickled weights are never loaded"),
        "other weights": (other_weights, "does not fit"),
        "no json": (lambda f: (f / "config.json").write_text("{"), "not valid JSON"),
        "a list": (lambda f: (f / "config.json").write_text("[]"), "kind 'list'"),
        "another kind": (lambda f: edit(f, kind="adapter"), "kind 'adapter'"),
        "another network": (lambda f: edit(f, network="resnet"), "no flow map can be built"),
        "another size": (lambda f: edit(f, options={**NETWORK, "channels": [8, 32]}), "does not fit"),
        "no shape": (lambda f: edit(f, state_shape=None), "no flow map can be built"),
    }
    for name, (change, message) in cases.items():
        with pytest.raises(ValueError, match=message):
            invflow.load_prior(broken(name, change))
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        invflow.load_prior(tmp_path)
    with pytest.raises(ValueError, match="did you mean 'mnist'"):
        invflow.load_prior("mnits")


def test_hub_repositories_are_downloaded_without_pickles(tmp_path, monkeypatch):
    tiny_vfm().prior.save_pretrained(tmp_path)
    asked = {}

    def snapshot_download(repo_id, allow_patterns):
        asked.update(repo_id=repo_id, patterns=allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert invflow.load_prior("someone/faces").state_shape == SHAPE
    assert asked["repo_id"] == "someone/faces"
    assert set(asked["patterns"]) == {"*.json", "*.safetensors", "*.md"}


def test_settings_tell_one_adapter_from_another():
    """Tables that go on from a folder know by the settings whether a cell is of the same solver."""
    vfm, other = tiny_vfm(), tiny_vfm()
    assert vfm.settings() == other.settings()
    next(other.adapter.parameters()).data[0] += 0.1
    changed = invflow.VFM(other.prior, other.adapter).settings()
    assert changed["map"] == vfm.settings()["map"]
    assert changed["adapter"] != vfm.settings()["adapter"]
    smc = [invflow.NoiseSMC(v.prior, proposal=v.adapter).settings()["proposal"] for v in (vfm, other)]
    rto = [invflow.NoiseRTO(v.prior, proposal=v.adapter).settings()["proposal"] for v in (vfm, other)]
    assert smc == rto
    assert len(set(smc)) == 2


def test_what_is_made_without_gradients_serves_where_they_are_taken() -> None:
    """Networks run in inference mode, whose tensors take no part in gradients: nothing that leaves them may be one."""
    vfm, likelihood = tiny_vfm(importance=True), likelihood_for(Denoising(SHAPE))

    class Steep(GaussianLikelihood):
        def __call__(self, x):
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                (slope,) = torch.autograd.grad(super().__call__(x).sum(), x)
            return super().__call__(x) + 0 * slope.flatten(2).sum(2)

    steep = Steep(likelihood.operator, likelihood.y, likelihood.sigma)
    with pytest.warns(UserWarning, match="misses"):
        assert not vfm.sample(steep, 2, generator=0).samples.is_inference()
    with torch.no_grad():
        assert not any(part.is_inference() for part in vfm.adapter.propose(likelihood))


def test_matrices_first_asked_for_in_inference_mode_are_trained_with() -> None:
    dct_matrix.cache_clear()
    with torch.inference_mode():
        dct_matrix(6)
    x = torch.ones(2, 6, requires_grad=True)
    (dct_matrix(6) @ x.mT * x.mT.square()).sum().backward()
