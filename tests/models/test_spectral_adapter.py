"""The adapter for photographs: its initial state, coordinates, symmetries, spread, and saving."""

import math

import pytest
import torch
from spectral_parts import AFFINE, OPTIONS, spectral_map

import invflow
from invflow.linear.spectral import gaussian_estimate
from invflow.models.spectral_adapter import SYMMETRIES, SpectralAdapter, turned_summary
from invflow.operators import (
    Blur,
    BoxInpainting,
    Denoising,
    GaussianBlur,
    SuperResolution,
)
from invflow.solvers.vfm import VFM


def test_adapter_begins_at_the_best_linear_estimate():
    prior = spectral_map()
    adapter = SpectralAdapter.for_map(prior, ["denoising", "gaussian-blur"], OPTIONS)
    for operator in (Denoising((3, 40, 30)), GaussianBlur((3, 40, 30), std=1.5, kernel_size=7)):
        y = torch.rand(2, 3, 40, 30, generator=torch.Generator().manual_seed(0))
        mean, _ = adapter.resized((3, 40, 30)).propose(invflow.GaussianLikelihood(operator, y, sigma=0.1))
        image = prior.resized((3, 40, 30)).jump(adapter.to_state(mean), 0.0, 1.0)
        expected = gaussian_estimate(prior.spectrum, prior.mean, AFFINE, operator, y, torch.full((2,), 0.1))
        torch.testing.assert_close(image, expected, rtol=0, atol=2e-4)


def test_adapter_begins_at_the_exact_spread_for_white_images():
    prior = invflow.NeuralFlowMap((3, 32, 32), options=OPTIONS, skip="spectral", mean=torch.zeros(3, 1, 1),
                                  std=torch.ones(3, 1, 1))
    adapter = SpectralAdapter.for_map(prior, ["denoising"], OPTIONS)
    likelihood = invflow.GaussianLikelihood(Denoising((3, 32, 32)), torch.rand(1, 3, 32, 32), sigma=0.2)
    _, std = adapter.propose(likelihood)
    # states of variance 1 are images of variance 1/4
    torch.testing.assert_close(std, torch.full_like(std, (1 + 0.25 / 0.2**2) ** -0.5))


def test_adapter_begins_at_the_spread_of_the_prior_in_blocks_that_are_hidden():
    prior = invflow.NeuralFlowMap((3, 32, 32), options=OPTIONS, skip="spectral", mean=torch.zeros(3, 1, 1),
                                  std=torch.ones(3, 1, 1))
    adapter = SpectralAdapter.for_map(prior, ["box-inpainting"], OPTIONS)
    operator = BoxInpainting((3, 32, 32), box=(16, 16))  # four blocks of 8 x 8
    _, std = adapter.propose(invflow.GaussianLikelihood(operator, torch.rand(1, 3, 32, 32), sigma=0.2))
    seen = operator.observed().expand_as(std)
    torch.testing.assert_close(std, torch.where(seen, (1 + 0.25 / 0.2**2) ** -0.5, 1.0))


def test_adapter_coordinates_are_orthonormal():
    adapter = SpectralAdapter.for_map(spectral_map(), ["denoising"], OPTIONS).double()
    z = torch.randn(2, 3, 19, 32, dtype=torch.float64)
    torch.testing.assert_close(adapter.from_state(adapter.to_state(z)), z)
    torch.testing.assert_close(adapter.to_state(z).square().sum(), z.square().sum())


def test_adapter_moves_with_the_image():
    """Fully convolutional: far from the borders, an image moved by a block gives noise moved by a block."""
    adapter = SpectralAdapter((1, 64, 64), classes=["denoising"], options={"channels": [4, 8], "blocks": 1},
                              generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for module in (adapter.network.head, adapter.widths):
            module.weight.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    y = torch.rand(1, 1, 72, 64, generator=torch.Generator().manual_seed(2))
    windows = [y[:, :, :64], y[:, :, 8:]]
    stds = [adapter.propose(invflow.GaussianLikelihood(Denoising((1, 64, 64)), w, sigma=0.1))[1] for w in windows]
    inner = slice(24, 40)
    torch.testing.assert_close(stds[0][:, :, 32:40, inner], stds[1][:, :, 24:32, inner], rtol=1e-3, atol=1e-4)


def roughened(prior, classes=("denoising",)):
    adapter = SpectralAdapter.for_map(prior, classes, OPTIONS, torch.Generator().manual_seed(0)).eval()
    with torch.no_grad():  # the last layer of a fresh one is zero
        adapter.network.head.weight.normal_(std=0.3, generator=torch.Generator().manual_seed(1))
    return adapter.requires_grad_(False)


@pytest.mark.parametrize("symmetries", [2, 4, 8])
def test_averaged_correction_turns_with_the_image(symmetries):
    """Those averaged over are a group, so that the estimate of a turned measurement is the turned estimate."""
    prior = spectral_map()
    adapter = roughened(prior)
    def turned(x, turns, mirrored):
        x = x.rot90(turns, (-2, -1))
        return x.flip(-1) if mirrored else x

    def estimate(y):
        mean, _ = adapter.propose(invflow.GaussianLikelihood(Denoising((3, 32, 32)), y, sigma=0.1))
        return prior.jump(adapter.to_state(mean), 0.0, 1.0)

    y = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    plain = estimate(y)
    adapter.symmetries = symmetries
    with adapter.count() as calls:
        straight = estimate(y)
    assert calls.forward == 2 * symmetries
    for turn in SYMMETRIES[1:symmetries]:
        torch.testing.assert_close(estimate(turned(y, *turn)), turned(straight, *turn), rtol=0, atol=2e-4)
    assert (straight - plain).abs().max() > 0.01  # where the average does nothing, this test sees nothing


@pytest.mark.parametrize(("turns", "mirrored"), SYMMETRIES)
def test_the_summary_turns_with_the_kernel(turns, mirrored):
    """It is the summary of the turned kernel, with which turned images have the turned measurement."""
    def turned(x):
        x = x.rot90(turns, (-2, -1))
        return x.flip(-1) if mirrored else x

    g = torch.Generator().manual_seed(0)
    kernel, x = torch.rand(2, 1, 7, 7, generator=g), torch.rand(2, 3, 64, 64, generator=g)
    kernel /= kernel.sum(dim=(2, 3), keepdim=True)
    operator, other = Blur(kernel, (3, 64, 64)), Blur(turned(kernel), (3, 64, 64))
    torch.testing.assert_close(other(turned(x)), turned(operator(x)))
    torch.testing.assert_close(turned_summary(operator.context()[1], turns, mirrored), other.context()[1])


def test_average_is_over_each_symmetry_once():
    """The mean of the plain estimates of all turned measurements, each turned back."""
    prior = spectral_map()
    adapter = roughened(prior)
    y = torch.rand(1, 3, 24, 40, generator=torch.Generator().manual_seed(2))  # not square: sides change places

    def estimate(y):
        shape = tuple(y.shape[1:])
        mean, _ = adapter.resized(shape).propose(invflow.GaussianLikelihood(Denoising(shape), y, sigma=0.1))
        return prior.resized(shape).jump(adapter.to_state(mean), 0.0, 1.0)

    turned = [estimate(y.rot90(k, (2, 3))).rot90(-k, (2, 3)) for k in range(4)]
    mirrored = [estimate(y.flip(3).rot90(k, (2, 3))).rot90(-k, (2, 3)).flip(3) for k in range(4)]
    adapter.symmetries = 8
    torch.testing.assert_close(estimate(y), torch.stack(turned + mirrored).mean(0), rtol=0, atol=2e-4)


def test_spread_multiplies_the_deviations_of_its_class(tmp_path):
    prior = spectral_map(independent_noise=False)
    adapter = roughened(prior, ["denoising", "super-resolution-x2"])
    likelihoods = [invflow.GaussianLikelihood(op, torch.rand(2, *op.measurement_shape), sigma=0.1)
                   for op in (Denoising((3, 32, 32)), SuperResolution((3, 32, 32), factor=2))]
    before = [adapter.propose(likelihood) for likelihood in likelihoods]
    adapter.spread, adapter.symmetries = {"super-resolution-x2": 1.25}, 1
    adapter.trained_for = prior.fingerprint()
    VFM(prior, adapter).save_pretrained(tmp_path / "pair")
    loaded = VFM.load(tmp_path / "pair")
    assert loaded.settings()["spread"] == {"super-resolution-x2": 1.25}
    for kept in (adapter, loaded.adapter):
        for (mean, std), likelihood, factor in zip(before, likelihoods, (1.0, 1.25)):
            now = kept.propose(likelihood)
            torch.testing.assert_close(now[0], mean)
            torch.testing.assert_close(now[1], factor * std)


def test_bands_multiply_the_deviations_of_their_frequencies_and_colours(tmp_path):
    prior = spectral_map(independent_noise=False)
    adapter = roughened(prior, ["denoising", "super-resolution-x2"])
    likelihood = invflow.GaussianLikelihood(Denoising((3, 32, 32)), torch.rand(2, 3, 32, 32), sigma=0.1)
    mean, std = adapter.propose(likelihood)
    rows = [[1.0] * 6 for _ in range(3)]
    rows[1][0], rows[2][5] = 3.0, 2.0
    adapter.bands, adapter.trained_for = {"denoising": rows}, prior.fingerprint()
    VFM(prior, adapter).save_pretrained(tmp_path / "pair")
    loaded = VFM.load(tmp_path / "pair").adapter
    expected = std.clone()
    expected[:, 1, ::8, ::8] *= 3  # frequencies 0, 1/16 and, diagonally, 1.4/16
    expected[:, 1, 1::8, ::8] *= 3
    expected[:, 1, ::8, 1::8] *= 3
    expected[:, 1, 1::8, 1::8] *= 3
    for i in range(8):
        for j in range(8):
            if math.hypot(i, j) >= 8:  # above the highest frequency along an axis
                expected[:, 2, i::8, j::8] *= 2
    for kept in (adapter, loaded):
        now = kept.propose(likelihood)
        torch.testing.assert_close(now[0], mean)
        torch.testing.assert_close(now[1], expected)
    other = invflow.GaussianLikelihood(SuperResolution((3, 32, 32), factor=2), torch.rand(1, 3, 16, 16), sigma=0.1)
    with_bands = adapter.propose(other)[1]
    adapter.bands = {}
    torch.testing.assert_close(adapter.propose(other)[1], with_bands)


def test_lapped_coordinates_are_orthonormal_and_leave_the_estimate(tmp_path):
    """Another transform moves no mean, and an adapter without the setting has blocks, as all saved before it."""
    prior = spectral_map(independent_noise=False)
    adapter = roughened(prior)
    likelihood = invflow.GaussianLikelihood(Denoising((3, 19, 30)), torch.rand(1, 3, 19, 30), sigma=0.1)
    blocks = adapter.resized((3, 19, 30))
    mean, std = blocks.propose(likelihood)
    adapter.transform, adapter.trained_for = "lapped", prior.fingerprint()
    VFM(prior, adapter).save_pretrained(tmp_path / "pair")
    lapped = VFM.load(tmp_path / "pair").adapter.resized((3, 19, 30))
    assert (blocks.transform, lapped.transform, lapped.settings()["transform"]) == ("block", "lapped", "lapped")
    again, same = lapped.propose(likelihood)
    torch.testing.assert_close(same, std)
    torch.testing.assert_close(lapped.to_state(again), blocks.to_state(mean))
    assert (again - mean).abs().max() > 0.01
    z = torch.randn(2, 3, 19, 32)
    torch.testing.assert_close(lapped.from_state(lapped.to_state(z)), z)
    torch.testing.assert_close(lapped.to_state(z).square().sum(), z.square().sum())


def test_settings_of_the_adapter_that_make_no_sense_are_refused():
    adapter = roughened(spectral_map())
    for wrong in (0, 3, 16, True):
        with pytest.raises(ValueError, match="1, 2, 4 or 8"):
            adapter.symmetries = wrong
    for factor in (0, -1.0, math.nan, math.inf, "wide"):
        with pytest.raises(ValueError, match="positive number"):
            adapter.spread = {"denoising": factor}
    with pytest.raises(ValueError, match="knows denoising"):
        adapter.spread = {"denoise": 1.1}
    with pytest.raises(ValueError, match="knows denoising"):
        adapter.bands = {"denoise": [[1.0] * 6] * 3}
    for rows in ([[1.0] * 6] * 2, [[1.0] * 5] * 3, [[0.0] * 6] * 3, [[math.inf] * 6] * 3):
        with pytest.raises(ValueError, match="pass 3 rows, one for each opponent colour, of 6 positive numbers"):
            adapter.bands = {"denoising": rows}
    with pytest.raises(ValueError, match="pass one of 'block', 'lapped'"):
        adapter.transform = "wavelet"


def test_solvers_in_noise_space_refuse_turned_proposals():
    prior = spectral_map()
    adapter = SpectralAdapter.for_map(prior, ["denoising"], OPTIONS)
    adapter.trained_for = prior.fingerprint()
    with pytest.raises(ValueError, match="coordinates of its own"):
        invflow.NoiseSMC(prior, proposal=adapter)


def test_saved_pair_loads_back(tmp_path):
    prior = spectral_map(independent_noise=False)
    adapter = SpectralAdapter.for_map(prior, ["denoising"], OPTIONS, torch.Generator().manual_seed(1))
    adapter.trained_for = prior.fingerprint()
    vfm = VFM(prior, adapter)
    vfm.save_pretrained(tmp_path / "pair")
    loaded = VFM.load(tmp_path / "pair")
    assert isinstance(loaded.adapter, SpectralAdapter)
    assert loaded.prior.skip == "spectral"
    y = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    likelihood = invflow.GaussianLikelihood(Denoising((3, 32, 32)), y, sigma=0.1)
    first, second = (v.sample(likelihood, 3, generator=torch.Generator().manual_seed(0)).samples
                     for v in (vfm, loaded))
    torch.testing.assert_close(first, second)


def test_vfm_of_an_untrained_pair_is_the_exact_posterior_of_white_images():
    """White images, denoising: the posterior factorises in any orthonormal coordinates, so the pair can hold it."""
    shape, sigma = (3, 16, 16), 0.3
    prior = invflow.NeuralFlowMap(shape, options=OPTIONS, skip="spectral", mean=torch.zeros(3, 1, 1),
                                  std=torch.ones(3, 1, 1))
    vfm = VFM(prior, SpectralAdapter.for_map(prior, ["denoising"], OPTIONS))
    y = torch.rand(1, *shape, generator=torch.Generator().manual_seed(0))
    n = 4000
    samples = vfm.sample(invflow.GaussianLikelihood(Denoising(shape), y, sigma=sigma), n,
                         generator=torch.Generator().manual_seed(1)).samples[0]
    gain = 0.25 / (0.25 + sigma**2)
    mean, std = 0.5 + gain * (y[0] - 0.5), math.sqrt(gain) * sigma
    z = (samples.mean(0) - mean) / (std / math.sqrt(n))
    assert abs(float(z.square().mean()) - 1) < 3 * math.sqrt(2 / z.numel())
    assert abs(float(samples.var(0).mean()) / std**2 - 1) < 3 * math.sqrt(2 / (n * z.numel()))


def test_every_weight_of_a_fresh_adapter_can_learn():
    """Two layers that both start at zero would stay there: after one step all weights must have a gradient."""
    adapter = SpectralAdapter.for_map(spectral_map(), ["denoising"], OPTIONS, torch.Generator().manual_seed(0))
    y = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    likelihood = invflow.GaussianLikelihood(Denoising((3, 32, 32)), y, sigma=0.1)
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    for step in range(4):
        mean, std = adapter.propose(likelihood)
        optimizer.zero_grad()
        ((mean - y).square().mean() + (std - y).square().mean()).backward()
        if step < 3:
            optimizer.step()
    still = [name for name, p in adapter.named_parameters()
             if name != "summary.weight" and (p.grad is None or not bool(p.grad.abs().max() > 0))]
    assert not still, still  # denoising has no kernel: its summary is zero
