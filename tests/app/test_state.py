"""What the app computes, without gradio: views, pictures, texts, and the code that reproduces a view."""

from __future__ import annotations

import io
import shlex
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import invflow
from invflow.app import growth, pictures, plane, sources, state, words
from invflow.app.damage import DAMAGES, hole_of
from invflow.app.inputs import Chosen
from invflow.cli.entry import app


def a_view(**changes: object) -> state.View:
    hole = torch.zeros(28, 28, dtype=torch.bool)
    hole[8:18, 9:15] = True
    view = state.View(sources.sample_picture("digit 4"), hole=hole, samples=8, seed=3)
    return replace(view, **changes)  # type: ignore[arg-type]


def small_photograph(**changes: object) -> state.View:
    image = sources.sample_picture("photograph 2")[:, :48, :64]
    return a_view(image=image, prior="photos", hole=None, samples=2, **changes)


VIEWS = {
    "hole": a_view(),
    "lmmse": a_view(solver="lmmse", damage="box", parameter=9, sigma=0.1),
    "lost pixels": a_view(damage="lost pixels", parameter=0.4, hole=None),
    "motion blur": a_view(damage="motion blur", parameter=0.5, hole=None, seed=5),
    "photograph": small_photograph(damage="low resolution", parameter=2, sigma=0.01),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_the_code_makes_the_same_samples(view: state.View, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    restored = state.restore(view)
    words.write_inputs(view, tmp_path)
    names: dict = {}
    exec(words.python_code(view).rpartition("posterior.plot(")[0], names)
    assert torch.equal(names["posterior"].samples, restored.posterior.samples)
    assert torch.equal(names["image"], view.image)


@pytest.mark.parametrize("name", ["hole", "photograph"])
def test_the_command_makes_the_same_samples(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    view = VIEWS[name]
    words.write_inputs(view, tmp_path)
    done = CliRunner().invoke(app, shlex.split(words.command_line(view))[1:])
    assert done.exit_code == 0, done.output
    posterior = invflow.Posterior.load(tmp_path / "out" / "posterior.safetensors")
    torch.testing.assert_close(posterior.samples, state.restore(view).posterior.samples, atol=1e-6, rtol=0)


def test_every_choice_has_code_that_parses() -> None:
    for prior, image in (("mnist", sources.sample_picture("digit 1")), ("photos", torch.zeros(3, 32, 32))):
        for solver in state.solvers_of(prior):
            for damage, about in DAMAGES.items():
                view = state.View(image, prior, damage, about.range(prior)[3], solver=solver)
                compile(words.python_code(view), "code", "exec")
                assert f"--image image.png --operator {about.command} " in words.command_line(view)


def test_pictures_have_one_size() -> None:
    restored = state.restore(a_view(damage="low resolution", parameter=4))
    found = [pictures.truth(restored), pictures.observation(restored), pictures.sample(restored, 3),
             pictures.mean(restored), pictures.deviation(restored)[0], pictures.interval_width(restored, 0.5)[0]]
    assert {picture.size for picture in found} == {(252, 252)}


def test_a_sample_is_shown_as_it_is() -> None:
    restored = state.restore(a_view())
    shown = torch.tensor(list(pictures.sample(restored, 2).resize((28, 28), 0).getdata()))[:, 0].view(28, 28)
    assert torch.equal(shown, (restored.draws[1, 0].clamp(0, 1) * 255).round().long())
    assert pictures.sample(restored, 99).tobytes() == pictures.sample(restored, 8).tobytes()


def test_a_hole_is_blue_where_it_was_painted() -> None:
    restored = state.restore(a_view())
    picture = pictures.observation(restored)
    assert picture.getpixel((9 * 11 + 4, 9 * 12 + 4)) == (107, 135, 173)
    assert len(set(picture.getpixel((4, 4)))) == 1


def test_the_width_of_an_interval() -> None:
    restored = state.restore(a_view(samples=64))
    low, high = restored.posterior.interval(0.8)
    width = (high - low)[0, 0]
    picture, said = pictures.interval_width(restored, 0.8)
    brightest = divmod(int(width.argmax()), 28)
    assert picture.getpixel((9 * brightest[1] + 4, 9 * brightest[0] + 4))[0] == 255
    assert "80% interval" in said
    assert "Too few" not in said
    assert "Too few" in pictures.interval_width(state.restore(a_view()), 0.95)[1]


def test_an_animation_has_a_frame_for_each_sample() -> None:
    with Image.open(io.BytesIO(pictures.animation(state.restore(a_view())))) as file:
        assert file.format == "GIF"
        assert getattr(file, "n_frames", 1) == 8


def test_what_the_diagnostics_say() -> None:
    text = words.describe(state.restore(a_view()))
    assert "**vfm**: 8 samples" in text
    assert "residuals of" in text
    assert "dB" in text
    assert words._as_sentence("not converged for 1 of 1 observations: in observation 0, it bends.") == (
        "Not converged: it bends.")


def test_a_solver_without_diagnostics_is_measured() -> None:
    view = a_view(solver="ddrm", samples=2, damage="noise alone")
    assert "has no diagnostics of its own" in words.describe(state.restore(view))


def test_asking_the_posterior() -> None:
    restored = state.restore(a_view(samples=64))
    chances, text = state.ask(restored)
    assert sum(chances.values()) == pytest.approx(1)
    each = state._classifier().probabilities(restored.posterior.samples[0])
    for k, name in enumerate(chances):
        assert chances[name] == pytest.approx(float(each[:, k].mean()), abs=1e-6)
    assert f"the digit is {max(chances, key=lambda name: chances[name])}" in text
    log_weights = torch.full((1, 64), -torch.inf)
    log_weights[0, 5] = 0.0
    weighted = invflow.Posterior(restored.posterior.samples, log_weights)
    alone, _ = state.ask(replace(restored, posterior=weighted))
    assert list(alone.values()) == pytest.approx(each[5].tolist(), abs=1e-6)
    with pytest.raises(ValueError, match="only digits"):
        state.ask(replace(restored, view=VIEWS["photograph"]))


@pytest.mark.parametrize(("changes", "words_of_it"), [
    ({"hole": None}, "no hole is painted"),
    ({"hole": torch.ones(28, 28, dtype=torch.bool)}, "whole image"),
    ({"damage": "box", "parameter": 40}, "box"),
    ({"sigma": 3.0}, "sigma"),
    ({"solver": "wiener"}, "offers"),
    ({"samples": 100000}, "samples"),
])
def test_what_does_not_fit_is_a_sentence(changes: dict, words_of_it: str) -> None:
    with pytest.raises(ValueError, match=words_of_it):
        state.restore(a_view(**changes))


def test_paint_on_a_larger_canvas() -> None:
    opacity = torch.zeros(252, 252)
    opacity[9 * 3 : 9 * 5, 9 * 7 : 9 * 8] = 1.0  # two pixels of the picture
    opacity[9 * 20 : 9 * 20 + 4, 9 * 20 : 9 * 20 + 4] = 1.0  # a fifth of one
    hole = hole_of(opacity, (28, 28))
    assert hole.nonzero().tolist() == [[3, 7], [4, 7]]


def test_own_files(tmp_path: Path) -> None:
    said: list[str] = []
    large, paper = tmp_path / "large.png", tmp_path / "paper.png"
    Image.new("RGB", (640, 480), (200, 30, 30)).save(large)
    Image.new("L", (100, 100), 250).save(paper)
    image = sources.read_own(large, "photos", said.append)
    assert (image.shape, len(said)) == ((3, 240, 320), 1)
    assert torch.equal(image * 255, (image * 255).round())
    assert float(sources.read_own(paper, "mnist", said.append).max()) < 0.1
    assert "swapped" in said[-1]


def test_bad_files_are_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    with pytest.raises(ValueError, match=r"bad\.png") as caught:
        sources.read_own(bad, "mnist", print)
    assert str(tmp_path) not in str(caught.value)
    monkeypatch.setattr(sources, "MEGAPIXELS", 0.001)
    Image.new("L", (100, 100)).save(bad)
    with pytest.raises(ValueError, match="megapixels"):
        sources.read_own(bad, "photos", print)


def test_a_drawn_digit_is_centred() -> None:
    strokes = torch.zeros(300, 300)
    strokes[20:220, 30:50] = 1.0
    image = sources.drawn_digit(strokes)
    assert image.shape == (1, 28, 28)
    rows, columns = (image[0] > 0.5).nonzero().T
    assert int(rows.max() - rows.min()) + 1 == 20
    assert (float(rows.float().mean()), float(columns.float().mean())) == pytest.approx((13.5, 13.5), abs=0.6)
    with pytest.raises(ValueError, match="nothing is drawn"):
        sources.drawn_digit(torch.zeros(300, 300))


@pytest.mark.parametrize("name", plane.LAWS)
def test_particles_move_from_noise_to_data(name: str) -> None:
    jumps, euler = plane.WAYS
    stops = plane.moved(name, 1.0, 4, jumps)
    assert stops.shape == (5, 600, 2)
    # jumps are those of one map, however many
    torch.testing.assert_close(stops[-1], plane.moved(name, 1.0, 1, jumps)[-1], atol=0.02, rtol=0)
    torch.testing.assert_close(plane.moved(name, 0.5, 2, jumps)[-1], stops[2], atol=1e-5, rtol=0)
    # one Euler step from noise ends in the mean of the data, many where the flow ends
    once = plane.moved(name, 1.0, 1, euler)[-1]
    assert float(once.std(0).max()) < 0.05
    many = plane.moved(name, 1.0, 100, euler)[-1]
    assert float((many - stops[-1]).norm(dim=1).median()) < 0.1
    assert plane.moved(name, 0.0, 3, jumps).shape == (1, 600, 2)


def test_a_certificate_grows() -> None:
    what = next(iter(growth.CERTIFIED))
    grown = list(growth.grow(what, 20))
    assert [certificate.num_simulations for certificate in grown] == [5, 10, 15, 20]
    assert torch.equal(grown[0].record["ranks"], grown[-1].record["ranks"][:5])
    assert "No verdict yet" in growth.sentence(grown[1], 20)
    assert growth.sentence(grown[-1], 20) == grown[-1].sentence
    assert growth.rank_picture(grown[-1]).width > 300


def test_a_certificate_stops_when_nobody_looks() -> None:
    growing = growth.grow(next(iter(growth.CERTIFIED)), 500)
    next(growing)
    own = [thread for thread in threading.enumerate() if thread.name == "certificate"]
    assert len(own) == 1
    growing.close()  # type: ignore[attr-defined]
    own[0].join(20)
    assert not own[0].is_alive()


@pytest.mark.parametrize(("view", "seconds"), [(a_view(samples=64), 1.0), (
    a_view(image=sources.sample_picture("photograph 1"), prior="photos", samples=16,
           hole=torch.arange(256).expand(256, 256) % 32 < 4), 5.0)],
    ids=["digit", "photograph"])
def test_how_long_a_painted_hole_takes(view: state.View, seconds: float) -> None:
    """CPU time, once the prior is loaded, of all that is shown first."""
    state._solver(view.solver, view.prior)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        began = time.process_time()
        restored = state.restore(view)
        for show in (pictures.truth, pictures.observation, pictures.mean, pictures.deviation):
            show(restored)
        pictures.sample(restored, 1), pictures.interval_width(restored, 0.8)
        taken = time.process_time() - began
    finally:
        torch.set_num_threads(threads)
    print(f"{taken:.2f} s")
    assert taken < seconds


# -- what comes from the page -----------------------------------------------------------------------------------------


def chosen(**changes: object) -> Chosen:
    layer = np.zeros((252, 252, 4), dtype=np.uint8)
    layer[90:135, 45:180] = 255
    plain = Chosen("digit 4", None, {"background": None, "layers": [layer], "composite": None}, "mnist", "painted hole",
                   0, 0.02, 0, 8)
    return replace(plain, **changes)  # type: ignore[arg-type]


def test_what_is_painted_becomes_the_hole() -> None:
    view = chosen().view("vfm")
    assert view.hole is not None
    assert view.hole.nonzero().amin(0).tolist() == [10, 5]
    assert view.hole.nonzero().amax(0).tolist() == [14, 19]
    assert chosen(editor=None).view("vfm").hole is None
    assert chosen(prior="photos").view("vfm").image.shape == (3, 28, 28)


def test_a_drawn_digit_is_no_hole() -> None:
    view = chosen(source=sources.DRAWN, damage="noise alone").view("vfm")
    assert float(view.image.max()) == 1.0
    assert view.hole is None
    with pytest.raises(ValueError, match="choose another damage"):
        chosen(source=sources.DRAWN).view("vfm")


def test_what_does_not_go_together() -> None:
    with pytest.raises(ValueError, match="upload a file"):
        chosen(source=sources.OWN).view("vfm")
    with pytest.raises(ValueError, match="28 x 28"):
        chosen(source="photograph 1").view("vfm")


def test_without_gradio(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    done = CliRunner().invoke(app, ["app", "--host", "0.0.0.0"])
    assert done.exit_code == 2
    note, error = done.stderr.splitlines()
    assert "anyone who can reach 0.0.0.0" in note
    assert error.startswith("error: invflow app needs gradio 6")
    assert "pip install" in error
