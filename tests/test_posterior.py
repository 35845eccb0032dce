"""Posterior: weighted summaries against closed forms, resampling, files, figures."""

from __future__ import annotations

import base64
import json
import pickle
import struct
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import invflow
from invflow import NFE, Posterior
from invflow._core.records import bytes_of, digest


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


@pytest.fixture
def weighted() -> Posterior:
    diagnostics = {"steps": [1, 2], "k_hat": normal(3, seed=3)}
    return Posterior(normal(3, 40, 1, 4, 5), normal(3, 40, seed=1), normal(3, seed=2), NFE(2.5, 1.0), 0.5,
                     diagnostics, {"solver": "test", "steps": 4, "sigma": 0.1})


# -- summaries -----------------------------------------------------------------------------------------------


def test_equal_weights_agree_with_torch() -> None:
    samples = normal(2, 30, 3, 4)
    posterior = Posterior(samples)
    assert torch.allclose(posterior.mean(), samples.mean(1), atol=1e-14)
    assert torch.allclose(posterior.std(), samples.std(1), atol=1e-13)
    assert posterior.ess() is None
    assert torch.allclose(posterior.log_weights.exp().sum(1), torch.ones(2, dtype=torch.float64))
    # weights that are passed and happen to be equal give the same numbers, and an effective sample size
    passed = Posterior(samples, torch.full((2, 30), 7.0))
    for q in (0.0, 0.1, 0.5, 1.0):
        assert torch.allclose(passed.quantile(q), posterior.quantile(q), atol=1e-12)
    assert torch.allclose(passed.ess(), torch.full((2,), 30.0, dtype=torch.float64))


def test_weights_act_as_copies() -> None:
    """Integer weights stand for copies: the mean is theirs, and the variance with that of the weighted mean added."""
    samples = normal(1, 5, 2)
    counts = torch.tensor([3, 0, 1, 4, 2])
    posterior = Posterior(samples, counts.log()[None])
    copies = samples[0].repeat_interleave(counts, 0)
    assert torch.allclose(posterior.mean()[0], copies.mean(0), atol=1e-14)
    square = (counts / 10.0).double() ** 2
    of_mean = (square[:, None] * (samples[0] - copies.mean(0)) ** 2).sum(0) / (1 - square.sum())
    assert torch.allclose(posterior.std()[0] ** 2, copies.var(0, correction=0) + of_mean, atol=1e-13)
    assert posterior.ess().item() == pytest.approx(100 / (9 + 1 + 16 + 4))


def test_log_weights_of_any_size_are_normalised() -> None:
    log_weights = 1e4 + torch.tensor([[0, np.log(3), -torch.inf]])
    posterior = Posterior(normal(1, 3, 2), log_weights)
    expected = torch.tensor([[0.25, 0.75, 0.0]], dtype=torch.float64)
    assert torch.allclose(posterior.weights, expected, atol=1e-9)


def test_one_particle_shows_no_spread() -> None:
    assert bool(Posterior(normal(1, 1, 2)).std().isnan().all())
    degenerate = Posterior(normal(1, 3, 2), torch.tensor([[0.0, -torch.inf, -torch.inf]]))
    assert bool(degenerate.std().isnan().all())


@pytest.mark.parametrize("q", [0.0, 0.03, 0.37, 0.5, 0.9, 1.0])
def test_quantile_is_weibulls(q: float) -> None:
    samples = normal(2, 17, 3, 2)
    expected = np.quantile(samples.numpy(), q, axis=1, method="weibull")
    assert np.allclose(Posterior(samples).quantile(q).numpy(), expected, atol=1e-13)


def test_quantile_ignores_particles_without_weight() -> None:
    samples, extremes = normal(1, 9, 4), torch.full((1, 2, 4), 50.0, dtype=torch.float64)
    extremes[:, 0] = -50
    log_weights = torch.cat([normal(1, 9, seed=1), torch.full((1, 2), -torch.inf)], 1)
    whole = Posterior(torch.cat([samples, extremes], 1), log_weights)
    part = Posterior(samples, log_weights[:, :9])
    for q in (0.0, 0.2, 0.8, 1.0):
        assert torch.allclose(whole.quantile(q), part.quantile(q), atol=1e-12)


def test_weighted_quantile_is_that_of_the_target() -> None:
    """Draws of N(0, 1) weighted by e^{x/2} are N(1/2, 1)."""
    samples = normal(1, 20_000, 1)
    posterior = Posterior(samples, 0.5 * samples[:, :, 0])
    for q in (0.1, 0.5, 0.9):
        exact = 0.5 + torch.special.ndtri(torch.tensor(q, dtype=torch.float64))
        density = torch.exp(-0.5 * (exact - 0.5) ** 2) / np.sqrt(2 * np.pi)
        error = float(np.sqrt(q * (1 - q) / posterior.ess().item()) / density)
        assert abs(posterior.quantile(q).item() - exact) < 4 * error


def test_interval_holds_a_fresh_draw_with_its_level() -> None:
    """19 uniform samples: the 90% interval is as long as it claims, where torch.quantile's is too short."""
    samples = torch.rand((20_000, 19, 1), generator=generator(), dtype=torch.float64)
    low, high = Posterior(samples).interval(0.9)
    length = high - low  # the probability of a fresh draw in it
    error = float(length.std() / len(length) ** 0.5)
    assert abs(length.mean() - 0.9) < 4 * error
    usual = samples.quantile(0.95, dim=1) - samples.quantile(0.05, dim=1)
    assert usual.mean() < 0.9 - 20 * error


def test_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch, weighted: Posterior) -> None:
    expected = weighted.std(), weighted.quantile(0.3), Posterior(weighted.samples).quantile(0.3)
    monkeypatch.setattr("invflow.posterior._VALUES_AT_A_TIME", 70)
    found = weighted.std(), weighted.quantile(0.3), Posterior(weighted.samples).quantile(0.3)
    for a, b in zip(expected, found, strict=True):
        assert torch.allclose(a, b, atol=1e-13)


# -- resampling and selection --------------------------------------------------------------------------------


def test_resampling_keeps_the_weights_in_counts() -> None:
    weights = torch.tensor([[0.5, 0.0, 0.26, 0.04, 0.2]])
    samples = torch.arange(5.0).reshape(1, 5, 1)
    posterior = Posterior(samples, weights.log())
    for seed in range(20):
        drawn = posterior.resample(10, generator=generator(seed))
        counts = torch.bincount(drawn.samples.flatten().long(), minlength=5)
        assert bool(((counts - 10 * weights[0]).abs() < 1).all())
        assert drawn.ess() is None
        assert "resampled_from_ess" in drawn.diagnostics


def test_resampling_is_unbiased_and_in_random_order() -> None:
    samples = torch.arange(8.0, dtype=torch.float64).expand(4000, 8).unsqueeze(2)
    posterior = Posterior(samples, normal(4000, 8))
    drawn = posterior.resample(3, generator=generator(1)).samples
    for position in range(3):
        error = drawn[:, position] - posterior.mean()
        assert abs(error.mean()) < 4 * error.std() / 4000**0.5


def test_resampling_without_weights_repeats_nobody() -> None:
    posterior = Posterior(torch.arange(50.0).reshape(1, 50, 1))
    drawn = posterior.resample(50, generator=generator()).samples.flatten()
    assert torch.equal(drawn.sort().values, torch.arange(50.0))
    assert not torch.equal(drawn, torch.arange(50.0))


def test_resampling_leaves_the_global_generator_alone(weighted: Posterior) -> None:
    state = torch.get_rng_state()
    first = weighted.resample(7, generator=generator(3))
    assert torch.equal(first.samples, weighted.resample(7, generator=generator(3)).samples)
    weighted.resample(7)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("index", [
    2, slice(1, 3), [0, 2], torch.tensor([2, 0]), torch.tensor([True, False, True]),
])
def test_select_cuts_what_belongs_to_observations(weighted: Posterior, index: object) -> None:
    rows = torch.arange(3)[[index] if isinstance(index, int) else index]
    part = weighted.select(index)  # type: ignore[arg-type]
    assert torch.equal(part.samples, weighted.samples[rows])
    assert torch.allclose(part.log_weights, weighted.log_weights[rows], atol=1e-14)
    assert torch.equal(part.log_evidence, weighted.log_evidence[rows])
    assert torch.equal(part.diagnostics["k_hat"], weighted.diagnostics["k_hat"][rows])
    assert part.diagnostics["steps"] == [1, 2]
    assert len(part) == len(rows)


# -- bad input -----------------------------------------------------------------------------------------------


def test_broken_samples_are_named() -> None:
    samples = normal(2, 4, 1, 3, 3)
    samples[1, 2, 0, 0, 1] = torch.nan
    with pytest.raises(ValueError, match="particle 2 of observation 1"):
        Posterior(samples)
    with pytest.raises(ValueError, match="particle 1 of observation 0"):
        Posterior(normal(2, 4, 3), torch.tensor([[0, torch.nan, 0, 0], [0.0, 0, 0, 0]]))
    with pytest.raises(ValueError, match="observation 1 are -inf"):
        Posterior(normal(2, 2, 3), torch.tensor([[0, 0], [-torch.inf, -torch.inf]]))


@pytest.mark.parametrize(("arguments", "message"), [
    ((torch.zeros(4, 3),), r"\(B, N, \*image_shape\)"),
    ((torch.zeros(0, 4, 3),), "at least 1"),
    ((torch.zeros(2, 4, 3), torch.zeros(4, 2)), r"\(2, 4\)"),
    ((torch.zeros(2, 4, 3), None, torch.zeros(3)), r"\(2,\)"),
])
def test_shapes_that_do_not_fit(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Posterior(*arguments)


def test_other_bad_input(weighted: Posterior) -> None:
    with pytest.raises(TypeError, match="int64"):
        Posterior(torch.zeros(2, 4, 3, dtype=torch.int64))
    for call in (lambda: weighted.quantile(5), lambda: weighted.interval(90), lambda: weighted.resample(0)):
        with pytest.raises(ValueError, match=r"90|5|n=0"):
            call()


# -- files ---------------------------------------------------------------------------------------------------


def test_files_hold_everything(weighted: Posterior, tmp_path) -> None:
    path = tmp_path / "made" / "posterior.safetensors"
    weighted.save(path)
    loaded = Posterior.load(path)
    for name in ("samples", "log_evidence"):
        assert torch.equal(getattr(loaded, name), getattr(weighted, name))
    assert torch.allclose(loaded.log_weights, weighted.log_weights, atol=1e-14)
    assert torch.equal(loaded.diagnostics["k_hat"], weighted.diagnostics["k_hat"])
    assert loaded.diagnostics["steps"] == [1, 2]
    assert (loaded.nfe, loaded.seconds, loaded.weighted) == (NFE(2.5, 1.0), 0.5, True)
    versions = loaded.settings.pop("versions")
    assert versions["invflow"] == invflow.__version__
    assert versions["torch"] == torch.__version__
    assert loaded.settings == weighted.settings
    plain = Posterior(weighted.samples.float())
    plain.save(path)
    assert Posterior.load(path).ess() is None
    assert Posterior.load(path).samples.dtype == torch.float32


@pytest.mark.parametrize("odd", [
    torch.rand(2, 20)[:1, :1].T, torch.rand(()).expand(1), torch.rand(()), torch.rand(0, 3), torch.rand(3, 9)[:, 3:4],
    torch.rand(2, 3).bfloat16().T, torch.rand(5, 1).bfloat16().T[:, :1], torch.rand(4) > 0.5,
    torch.arange(6).view(2, 3).T, torch.rand(1, 20).as_strided((1, 1), (7, 7)),
    torch.rand(2, dtype=torch.complex64).conj(), torch.rand(2, dtype=torch.complex64).conj().imag,
], ids=lambda v: f"{v.dtype} {tuple(v.shape)} {v.stride()}")
def test_tensors_of_any_strides_are_saved_and_told_apart(odd: torch.Tensor, tmp_path) -> None:
    posterior = Posterior(torch.rand(1, 3, 2), diagnostics={"odd": odd})
    posterior.save(tmp_path / "a.safetensors")
    loaded = Posterior.load(tmp_path / "a.safetensors").diagnostics["odd"]  # whose digest is that of plain strides
    assert loaded.dtype == odd.dtype
    assert torch.equal(loaded, odd)
    plain = torch.tensor(odd.tolist(), dtype=odd.dtype).reshape(odd.shape)
    assert digest({"a": odd}, {}) == digest({"a": plain}, {})
    if odd.dtype not in (torch.bfloat16, torch.bool):
        assert bytes_of(odd) == np.array(odd.tolist(), str(odd.dtype).removeprefix("torch.")).tobytes()
    if odd.numel():
        assert digest({"a": odd}, {}) != digest({"a": plain.logical_not().to(odd.dtype)}, {})


def test_damaged_and_foreign_files_are_refused(weighted: Posterior, tmp_path) -> None:
    path = tmp_path / "posterior.safetensors"
    with pytest.raises(FileNotFoundError, match="there is no file"):
        Posterior.load(path)
    weighted.save(path)
    whole = path.read_bytes()
    for part in (whole[:-100], whole[:50], b"", b"not a tensor"):
        path.write_bytes(part)
        with pytest.raises(ValueError, match=r"truncated or not a safetensors"):
            Posterior.load(path)
    path.write_bytes(pickle.dumps({"samples": [1.0]}))
    with pytest.raises(ValueError, match="not a safetensors file"):
        Posterior.load(path)
    save_file({"weight": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match="holds no posterior"):
        Posterior.load(path)
    other = {"invflow": json.dumps({"format": "invflow.posterior/99"})}
    save_file({"samples": torch.zeros(1, 1, 2)}, path, other)
    with pytest.raises(ValueError, match=r"invflow.posterior/99"):
        Posterior.load(path)


def test_a_failed_save_leaves_the_old_file(weighted: Posterior, tmp_path) -> None:
    path = tmp_path / "posterior.safetensors"
    weighted.save(path)
    before = path.read_bytes()
    weighted.settings["model"] = object()
    with pytest.raises(TypeError, match="model"):
        weighted.save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_descriptions_are_short(weighted: Posterior) -> None:
    text = repr(weighted)
    assert "3 x 40 of 1 x 4 x 5" in text
    assert "2.5 forward, 1 backward" in text
    assert len(text) < 300
    assert "<table>" in weighted._repr_html_()


# -- notebooks and other libraries ---------------------------------------------------------------------------


def test_a_notebook_sees_figure_and_numbers() -> None:
    samples = torch.rand(3, 6, 1, 8, 8, generator=generator())
    posterior = Posterior(samples, torch.zeros(3, 6), diagnostics={"k_hat": torch.tensor([0.1, float("nan"), 0.9]),
                                                                   "<tag>": 1.0})
    bundle = posterior._repr_mimebundle_()
    assert bundle["text/plain"] == repr(posterior)
    page = bundle["text/html"]
    assert "6 at least of 6" in page
    assert "0.90 at most" in page
    assert "<tag>" not in page
    data = base64.b64decode(page.split("base64,")[1].split("'")[0])
    assert data.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", data[16:24])
    # the truth among the diagnostics is shown too: one more column
    posterior.diagnostics["truth"] = samples[:, 0]
    again = base64.b64decode(posterior._repr_html_().split("base64,")[1].split("'")[0])
    assert struct.unpack(">II", again[16:24])[0] > width
    assert height < 1000
    posterior.diagnostics["truth"] = torch.zeros(3, 5)  # something else of that name
    assert "base64" in posterior._repr_html_()
    assert "base64" not in Posterior(torch.randn(2, 4, 7))._repr_html_()
    assert "base64" in Posterior(torch.randn(2, 4, 2))._repr_html_()


def test_export_to_xarray(weighted: Posterior, tmp_path) -> None:
    pytest.importorskip("xarray")
    weighted.diagnostics |= {"map": weighted.samples[:, 0], "path": torch.arange(6.0).view(3, 2), "note": "a",
                             "other": torch.arange(4)}
    data = weighted.to_xarray()
    assert data["samples"].dims == ("observation", "sample", "channel", "height", "width")
    assert np.array_equal(data["samples"].values, weighted.samples.numpy())
    weights = np.exp(data["log_weight"])
    assert np.allclose(weights.sum("sample"), 1, atol=1e-5)
    mean = (weights * data["samples"]).sum("sample")
    assert np.allclose(mean.values, weighted.mean().numpy(), atol=1e-5)
    assert data["map"].dims == ("observation", "channel", "height", "width")
    assert data["path"].shape == (3, 2)
    assert json.loads(data.attrs["diagnostics"])["note"] == "a"
    assert json.loads(data.attrs["diagnostics"])["other"] == [0, 1, 2, 3]
    assert data.attrs["calls_forward"] == weighted.nfe.forward
    plain = Posterior(torch.zeros(2, 3, 4)).to_xarray()
    assert plain["samples"].dims == ("observation", "sample", "value")
    assert "log_weight" not in plain


def test_export_to_arviz(weighted: Posterior) -> None:
    pytest.importorskip("arviz")
    data = weighted.to_arviz(generator=generator())
    x = data["posterior"]["x"]
    assert x.dims == ("chain", "draw", "observation", "channel", "height", "width")
    assert x.shape == (1, 40, 3, 1, 4, 5)
    resampled = weighted.resample(40, generator=generator())
    assert np.array_equal(x.values[0], resampled.samples.transpose(0, 1).numpy())
    assert json.loads(data["posterior"].attrs["diagnostics"])["resampled_from_ess"] == pytest.approx(
        weighted.ess().tolist())
    plain = Posterior(torch.arange(24.0).view(2, 3, 4)).to_arviz()["posterior"]["x"]
    assert np.array_equal(plain.values[0, :, 1], np.arange(12.0, 24.0).reshape(3, 4))


@pytest.mark.parametrize("name", ["xarray", "arviz"])
def test_exports_say_what_they_need(weighted: Posterior, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=f"pip install {name}"):
        getattr(weighted, f"to_{name}")()


# -- figure --------------------------------------------------------------------------------------------------


def test_figure_shows_what_there_is() -> None:
    truth = torch.rand(6, 1, 12, 12, generator=generator())
    samples = truth[:, None] + 0.8 * torch.randn(6, 9, 1, 12, 12, generator=generator())
    before = samples.clone()
    posterior = Posterior(samples, torch.zeros(6, 9))
    figure = posterior.plot(truth, truth[:, :, ::4, ::4], rows=2, samples=3)
    images = [a.images[0].get_array() for a in figure.axes if a.images]
    assert len(images) == 2 * 7
    assert images[1].shape[:2] == (3, 3)
    assert all(float(i.min()) >= 0 for i in images)
    assert all(float(i.max()) <= 1 for n, i in enumerate(images) if n % 7 < 6)
    assert torch.equal(posterior.samples, before)  # clipped in the figure only
    psnr = 10 * torch.log10(1 / (posterior.mean()[0] - truth[0]).square().mean())
    assert figure.axes[5].get_xlabel() == f"{psnr:.1f} dB"
    assert figure._repr_png_().startswith(b"\x89PNG")


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 8, 8), (5,), (2,)])
@pytest.mark.parametrize("particles", [1, 4])
def test_figures_of_all_shapes(shape: tuple[int, ...], particles: int) -> None:
    samples = torch.rand(2, particles, *shape, generator=generator())
    figure = Posterior(samples).plot(samples[:, 0], torch.rand(2, 30, generator=generator()), title="title")
    assert figure._repr_png_().startswith(b"\x89PNG")


def test_figure_paints_what_was_not_observed() -> None:
    samples = torch.rand(1, 3, 1, 8, 8, generator=generator())
    observed = torch.ones(1, 1, 8, 8, dtype=torch.bool)
    observed[..., 2:5, 2:5] = False
    picture = Posterior(samples).plot(None, samples[:, 0], observed=observed).axes[0].images[0].get_array()
    grey = (picture.max(2) - picture.min(2)) < 1e-6
    assert np.array_equal(grey, observed[0, 0].numpy())


def test_figure_refuses_other_shapes(weighted: Posterior) -> None:
    with pytest.raises(ValueError, match=r"\(3, 1, 4, 5\)"):
        weighted.plot(torch.zeros(2, 1, 4, 5))
    with pytest.raises(ValueError, match="3 observations"):
        weighted.plot(None, torch.zeros(2, 1, 4, 5))
