"""Metrics against independent implementations of the same definitions: scipy, torchmetrics, scoringrules, POT."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from invflow import metrics

F64 = torch.float64


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=F64)


# -- scores ---------------------------------------------------------------------------------------------------


def test_crps_agrees_with_scoringrules():
    scoring = pytest.importorskip("scoringrules")
    samples, truth, log_weights = randn(4, 23, 3), randn(4, 3, seed=1), randn(4, 23, seed=2)
    members = samples.movedim(1, 2).numpy()
    for fair, name in ((True, "fair"), (False, "nrg")):
        expected = scoring.crps_ensemble(truth.numpy(), members, estimator=name)
        np.testing.assert_allclose(metrics.crps(samples, truth, fair=fair).numpy(), expected, rtol=1e-10)
    weights = log_weights.softmax(1)[:, None, :].expand(4, 3, 23).numpy()
    expected = scoring.crps_ensemble(truth.numpy(), members, ens_w=weights, estimator="nrg")
    np.testing.assert_allclose(metrics.crps(samples, truth, log_weights, fair=False).numpy(), expected, rtol=1e-10)


def test_energy_score_agrees_with_scoringrules():
    scoring = pytest.importorskip("scoringrules")
    samples, truth, log_weights = randn(4, 23, 3), randn(4, 3, seed=1), randn(4, 23, seed=2)
    for fair, name in ((True, "fair"), (False, "nrg")):
        expected = scoring.es_ensemble(truth.numpy(), samples.numpy(), estimator=name)
        np.testing.assert_allclose(metrics.energy_score(samples, truth, fair=fair).numpy(), expected, rtol=1e-10)
    weights = log_weights.softmax(1).numpy()
    expected = scoring.es_ensemble(truth.numpy(), samples.numpy(), ens_w=weights, estimator="nrg")
    found = metrics.energy_score(samples, truth, log_weights, fair=False)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-10)


def test_gaussian_crps_agrees_with_scoringrules():
    scoring = pytest.importorskip("scoringrules")
    mean, std, truth = randn(5), randn(5, seed=1).abs() + 0.1, randn(5, seed=2)
    expected = scoring.crps_normal(truth.numpy(), mean.numpy(), std.numpy())
    np.testing.assert_allclose(metrics.gaussian_crps(mean, std, truth).numpy(), expected, rtol=1e-10)


def test_psnr_agrees_with_torchmetrics():
    reference = pytest.importorskip("torchmetrics.functional.image").peak_signal_noise_ratio
    truth = torch.rand(3, 1, 8, 9, generator=generator(), dtype=F64)
    x = truth + 0.1 * randn(3, 1, 8, 9)
    expected = reference(x, truth, data_range=1.0, reduction="none", dim=(1, 2, 3))
    torch.testing.assert_close(metrics.psnr(x, truth), expected)


def test_psnr_of_two_bare_images_is_refused():
    """Their rows are no images: 28 numbers would say nothing of one image."""
    x, truth = torch.full((28, 28), 0.6), torch.full((28, 28), 0.5)
    with pytest.raises(ValueError, match=r"shape \(28, 28\), without an axis of images: pass x\[None, None\]"):
        metrics.psnr(x, truth)
    torch.testing.assert_close(metrics.psnr(x[None, None], truth[None, None]), torch.tensor([20.0]))


# -- distances ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize(("n", "m", "weighted"), [(40, 40, False), (40, 25, False), (40, 25, True)])
def test_sliced_wasserstein_agrees_with_pot(p, n, m, weighted):
    ot = pytest.importorskip("ot")
    x, y, directions = randn(1, n, 4), 0.3 + 1.5 * randn(1, m, 4, seed=1), randn(17, 4, seed=2)
    wx, wy = (randn(1, n, seed=3), randn(1, m, seed=4)) if weighted else (None, None)
    a, b = (None, None) if not weighted else (wx[0].softmax(0).numpy(), wy[0].softmax(0).numpy())
    unit = (directions / directions.norm(dim=1, keepdim=True)).T.numpy()
    ours = {"p": p, "projections": directions, "log_weights": wx, "y_log_weights": wy}
    theirs = {"a": a, "b": b, "p": p, "projections": unit}
    expected = ot.sliced_wasserstein_distance(x[0].numpy(), y[0].numpy(), **theirs)
    assert metrics.sliced_wasserstein(x, y, **ours).item() == pytest.approx(expected, rel=1e-9)
    expected = ot.max_sliced_wasserstein_distance(x[0].numpy(), y[0].numpy(), **theirs)
    assert metrics.max_sliced_wasserstein(x, y, steps=0, **ours).item() == pytest.approx(expected, rel=1e-9)


def test_mmd_agrees_with_torchmetrics_kernel_sums():
    # the unbiased estimate of Kernel Inception Distance, with a Gaussian kernel in place of its polynomial one
    kid = pytest.importorskip("torchmetrics.image.kid")
    x, y = randn(30, 3), randn(30, 3, seed=1) + 0.4

    def kernel(u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.exp(-0.5 * ((u[:, None] - v[None]) / 1.3).square().sum(-1))

    expected = kid.maximum_mean_discrepancy(kernel(x, x), kernel(x, y), kernel(y, y))
    torch.testing.assert_close(metrics.mmd(x[None], y[None], bandwidth=1.3)[0], expected)


def test_frechet_distance_agrees_with_scipy_and_torchmetrics():
    from scipy.linalg import sqrtm

    reference = pytest.importorskip("torchmetrics.image.fid")._compute_fid
    x, y = randn(50, 6) @ randn(6, 6, seed=3), randn(40, 6, seed=1) + 0.5
    mean_x, mean_y, cov_x, cov_y = x.mean(0), y.mean(0), x.T.cov(), y.T.cov()
    root = np.trace(sqrtm(cov_x.numpy() @ cov_y.numpy())).real
    expected = float((mean_x - mean_y).square().sum() + cov_x.trace() + cov_y.trace()) - 2 * root
    found = metrics.frechet_distance(x, y)
    assert found.item() == pytest.approx(expected, rel=1e-8)
    assert found.item() == pytest.approx(reference(mean_x, cov_x, mean_y, cov_y).item(), rel=1e-6)
    # weights are repetition, but for the unbiased factor n / (n - 1), which is that of independent weighted draws
    np.testing.assert_allclose(metrics.frechet_distance(x, y, torch.zeros(50, dtype=F64)).item(), found.item())
    assert metrics.frechet_distance(x, x).item() == pytest.approx(0.0, abs=1e-9)
    few = metrics.frechet_distance(x[:4], y[:5]).item()  # fewer samples than dimensions
    mean, cov = x[:4].mean(0) - y[:5].mean(0), (x[:4].T.cov(), y[:5].T.cov())
    root = np.sqrt(np.clip(np.linalg.eigvals(cov[0].numpy() @ cov[1].numpy()).real, 0, None)).sum()
    assert few == pytest.approx(float(mean.square().sum() + cov[0].trace() + cov[1].trace()) - 2 * root, rel=1e-6)


def test_frechet_weights_move_a_law_onto_another():
    x, y = 1.3 * randn(20000, 2), randn(20000, 2, seed=1)
    log_weights = (-0.5 * x.square() + 0.5 * x.square() / 1.69).sum(1)
    weighted = metrics.frechet_distance(x, y, log_weights).item()
    assert weighted < 0.005 < 0.1 < metrics.frechet_distance(x, y).item()


def test_precision_and_recall_by_hand():
    x, truth, k = randn(30, 2).numpy(), 0.7 * randn(25, 2, seed=1).numpy() + 0.5, 3

    def share(points: np.ndarray, manifold: np.ndarray) -> float:
        inside = 0
        for p in points:
            for i, centre in enumerate(manifold):
                others = sorted(np.linalg.norm(centre - manifold[j]) for j in range(len(manifold)) if j != i)
                if np.linalg.norm(p - centre) <= others[k - 1]:
                    inside += 1
                    break
        return inside / len(points)

    found = metrics.precision_recall(torch.from_numpy(x), torch.from_numpy(truth), k)
    assert found.precision == pytest.approx(share(x, truth))
    assert found.recall == pytest.approx(share(truth, x))
    chunked = metrics.precision_recall(torch.from_numpy(x), torch.from_numpy(truth), k, chunk_size=7)
    assert chunked == pytest.approx(found)
    log_weights = torch.zeros(30, dtype=F64)
    log_weights[20:] = -math.inf
    weighted = metrics.precision_recall(torch.from_numpy(x), torch.from_numpy(truth), k, log_weights=log_weights)
    assert weighted == pytest.approx(metrics.precision_recall(torch.from_numpy(x[:20]), torch.from_numpy(truth), k))


def test_precision_sees_rubbish_and_recall_sees_collapse():
    truth, x = randn(300, 2), randn(300, 2, seed=1)
    honest = metrics.precision_recall(x, truth)
    wide, narrow = metrics.precision_recall(4 * x, truth), metrics.precision_recall(0.1 * x, truth)
    assert wide.precision < 0.4 < 0.8 < honest.precision
    assert narrow.recall < 0.2 < 0.8 < honest.recall
    assert narrow.precision > 0.95


# -- max sliced, classifier test --------------------------------------------------------------------------------


def test_max_sliced_wasserstein_finds_the_direction():
    x = randn(2, 200, 10)
    shift = torch.zeros(10, dtype=F64)
    shift[3], shift[7] = 1.2, -1.6
    # the best direction of a shift s is s itself, and the distance its length, 2, by far the largest
    found = metrics.max_sliced_wasserstein(x, x + shift, generator=generator(), num_projections=5)
    torch.testing.assert_close(found, torch.full((2,), 2.0, dtype=F64))
    # without the axis between the means, ascent must find the one stretched axis, of W_2 = (3 - 1) rms
    stretched = x.clone()
    stretched[..., 4] *= 3
    expected = 2 * x[..., 4].square().mean(1).sqrt()
    start = metrics.max_sliced_wasserstein(x, stretched, projections=randn(5, 10, seed=1), steps=0)
    found = metrics.max_sliced_wasserstein(x, stretched, projections=randn(5, 10, seed=1), steps=200)
    assert (start < 0.9 * expected).all()
    assert (found > 0.99 * expected).all()
    mean = metrics.sliced_wasserstein(x, stretched, 2, generator=generator())
    assert (mean < found).all()


def test_max_sliced_wasserstein_with_weights_is_repetition():
    x, y = randn(1, 3, 2), randn(1, 4, 2, seed=1)
    log_weights = torch.tensor([[1.0, 1.0, 3.0]], dtype=F64).log()
    found = metrics.max_sliced_wasserstein(x, y, 1, log_weights=log_weights, generator=generator())
    expected = metrics.max_sliced_wasserstein(x[:, [0, 1, 2, 2, 2]], y, 1, generator=generator())
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=0)


def test_c2st_reaches_the_best_accuracy_and_keeps_its_level():
    n, dimension, delta = 800, 2, 1.0
    x = randn(6, n, dimension)
    y = randn(6, n, dimension, seed=1)
    y[..., 0] += delta
    found = metrics.classifier_two_sample_test(x, y, generator=generator())
    best = 0.5 * (1 + math.erf(delta / 2 / math.sqrt(2)))  # Bayes: Phi(delta / 2)
    error = math.sqrt(best * (1 - best) / (6 * n))
    assert best - 0.03 < found.accuracy.mean() < best + 3 * error
    assert (found.p_value < 1e-6).all()
    equal = metrics.classifier_two_sample_test(randn(300, 40, 2), randn(300, 40, 2, seed=1), steps=60, hidden=16,
                                               generator=generator())
    rate = (equal.p_value <= 0.05).double().mean().item()
    # the normal approximation is discrete at 20 held-out samples a side
    assert 0.01 < rate < 0.05 + 3 * math.sqrt(0.05 * 0.95 / 300)
    assert abs(equal.accuracy.mean().item() - 0.5) < 3 * math.sqrt(0.25 / 40 / 300)


def test_c2st_sees_a_difference_of_width_and_takes_weights():
    x, y = randn(1, 1000, 3), 2 * randn(1, 1000, 3, seed=1)
    assert metrics.classifier_two_sample_test(x, y, generator=generator()).p_value.item() < 1e-6
    # weights that move N(0, 2^2) onto N(0, 1)
    log_weights = (-0.5 * y.square() + 0.125 * y.square()).sum(2)
    weighted = metrics.classifier_two_sample_test(x, y, None, log_weights, generator=generator())
    assert weighted.p_value.item() > 0.01
    alone = metrics.classifier_two_sample_test(x[:1, :, :2], y[:1, :, :2], generator=generator())
    both = metrics.classifier_two_sample_test(
        torch.cat([x, x])[..., :2], torch.cat([y, y])[..., :2], generator=generator())
    assert both.accuracy.shape == (2,)
    assert abs(both.accuracy[0] - alone.accuracy[0]) < 0.05


# -- features -------------------------------------------------------------------------------------------------


def test_classifier_features_are_what_its_last_layer_sees():
    from invflow.nets.classifier import Classifier
    from invflow_problems.samples import load_samples

    images, labels = load_samples("mnist")
    features = metrics.classifier_features(images, chunk_size=64)
    model = Classifier.load("mnist")
    torch.testing.assert_close(model.layers[-1](features), model(images), rtol=1e-4, atol=1e-4)
    half = len(images) // 2
    within = metrics.frechet_distance(features[:half], features[half:]).item()
    noise = metrics.classifier_features(torch.rand(half, 1, 28, 28, generator=generator()))
    assert metrics.frechet_distance(noise, features[half:]).item() > 3 * within
    assert metrics.precision_recall(noise, features[half:]).recall < 0.05
    honest = metrics.precision_recall(features[:half], features[half:])
    sevens = metrics.precision_recall(features[labels == 7], features[labels != 7])
    assert sevens.recall < 0.5 * honest.recall
    with pytest.raises(ValueError, match=r"\(2, 3, 1, 28, 28\)"):
        metrics.classifier_features(torch.zeros(2, 3, 1, 28, 28))


def test_inception_features_with_weights_that_are_there(tmp_path):
    from torchvision.models import inception_v3

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = inception_v3(weights=None, init_weights=False, aux_logits=True, transform_input=False)
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    images = torch.rand(2, 1, 40, 40, generator=generator())
    features = metrics.inception_features(images, tmp_path / "weights.safetensors", chunk_size=1)
    assert features.shape == (2, 2048)
    assert torch.isfinite(features).all()
    torch.testing.assert_close(metrics.inception_features(images, tmp_path / "weights.safetensors"), features,
                               rtol=1e-3, atol=1e-4)
    (tmp_path / "weights.safetensors").rename(tmp_path / "inception_v3_google-0cc3c7bd.safetensors")
    assert torch.equal(metrics.inception_features(images, tmp_path, chunk_size=1), features)
    with pytest.raises(FileNotFoundError, match=r"nothing\.safetensors"):
        metrics.inception_features(images, tmp_path / "nothing.safetensors")
    torch.save(model.state_dict(), tmp_path / "pickle.safetensors")
    with pytest.raises(ValueError, match="pickles are not read"):
        metrics.inception_features(images, tmp_path / "pickle.safetensors")


def test_lpips_with_weights_that_are_there(tmp_path, monkeypatch):
    pytest.importorskip("torchmetrics")
    from torchmetrics.functional.image import learned_perceptual_image_patch_similarity
    from torchvision.models import alexnet

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr("invflow.metrics.perceptual.weights_file", lambda net: None)
    truth = torch.rand(2, 3, 64, 64, generator=generator())
    with pytest.raises(FileNotFoundError, match=r"alexnet-owt-7be5be79\.pth"):
        metrics.lpips(truth, truth)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = alexnet(weights=None)
    (tmp_path / "checkpoints").mkdir()
    torch.save(network.state_dict(), tmp_path / "checkpoints" / "alexnet-owt-7be5be79.pth")
    monkeypatch.setattr("torchvision.models._api.WeightsEnum.get_state_dict", lambda *_, **__: network.state_dict())
    x = (truth + 0.1 * torch.randn(2, 3, 64, 64, generator=generator(1))).clamp(0, 1)
    expected = [learned_perceptual_image_patch_similarity(a[None], b[None], "alex", normalize=True)
                for a, b in zip(x, truth)]
    torch.testing.assert_close(metrics.lpips(x, truth), torch.stack(expected), rtol=1e-4, atol=1e-6)
    several = metrics.lpips(torch.stack([x, truth], 1), truth)
    torch.testing.assert_close(several[:, 0], torch.stack(expected), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(several[:, 1], torch.zeros(2))
    small = metrics.lpips(torch.rand(2, 1, 28, 28, generator=generator()), torch.zeros(2, 1, 28, 28))
    assert (small > 0).all()


@pytest.mark.parametrize(("call", "message"), [
    (lambda: metrics.frechet_distance(randn(5, 2), randn(5, 3)), r"\(5, 2\) and \(5, 3\)"),
    (lambda: metrics.precision_recall(randn(3, 2), randn(9, 2)), "at least 4"),
    (lambda: metrics.classifier_two_sample_test(randn(1, 3, 2), randn(1, 9, 2)), "at least four"),
    (lambda: metrics.max_sliced_wasserstein(randn(1, 3, 2), randn(1, 9, 2), 3), "p=1 and p=2"),
    (lambda: metrics.lpips(randn(2, 1, 8, 8), randn(2, 1, 8, 8), "resnet"), "'alex', 'vgg', 'squeeze'"),
    (lambda: metrics.inception_features(randn(2, 28, 28)), r"\(2, 28, 28\)"),
])
def test_errors_say_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_nothing_touches_the_global_seed():
    before = torch.random.get_rng_state()
    metrics.max_sliced_wasserstein(randn(1, 5, 2), randn(1, 5, 2, seed=1), steps=2)
    metrics.classifier_two_sample_test(randn(1, 8, 2), randn(1, 8, 2, seed=1), steps=2)
    assert torch.equal(before, torch.random.get_rng_state())
