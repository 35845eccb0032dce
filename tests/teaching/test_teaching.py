"""Figures of the lessons: axes, number of frames, and a row of pictures in place of a slider."""

import io
import sys

import matplotlib
import pytest
import torch
from matplotlib import pyplot as plt

from invflow import teaching


@pytest.fixture(autouse=True)
def figures():
    plt.switch_backend("Agg")
    with matplotlib.rc_context():
        yield
    plt.close("all")


def test_style_has_110_dots_an_inch():
    teaching.use_style()
    assert plt.rcParams["figure.dpi"] == plt.rcParams["savefig.dpi"] == 110
    assert plt.figure(figsize=(2, 1)).canvas.get_width_height() == (220, 110)


def test_hidden_pixels_are_blue_and_the_others_as_they_are():
    image, hidden = torch.full((1, 4, 4), 0.5), torch.zeros(1, 4, 4, dtype=torch.bool)
    hidden[0, 1, 2] = True
    _, axes = plt.subplots()
    drawn = teaching.show_image(axes, image, "title", "below", hidden=hidden)
    assert drawn.get_array().shape == (4, 4)
    assert (axes.get_title(), axes.get_xlabel(), list(axes.get_xticks())) == ("title", "below", [])
    paint = axes.images[1].get_array()
    assert [(int(i), int(j)) for i, j in zip(*paint[..., 3].nonzero(), strict=True)] == [(1, 2)]
    assert paint[1, 2, 2] > paint[1, 2, 0]


def test_points_of_more_than_two_coordinates_are_refused():
    _, axes = plt.subplots()
    drawn = teaching.show_points(axes, torch.tensor([[0.0, 1.0], [2.0, 3.0]]))
    assert drawn.get_offsets().tolist() == [[0.0, 1.0], [2.0, 3.0]]
    with pytest.raises(ValueError, match=r"shape \(5, 3\), expected \(n, 2\)"):
        teaching.show_points(axes, torch.zeros(5, 3))


def test_plane_is_a_square_with_its_letter():
    _, axes = plt.subplots()
    teaching.show_plane(axes, "here", reach=3, tick=2, space="z")
    assert axes.get_xlim() == axes.get_ylim() == (-3, 3)
    assert list(axes.get_xticks()) == [-2, 0, 2]
    assert axes.get_xlabel() == "$z_0$"


def test_animation_has_its_frames_and_times():
    pytest.importorskip("IPython")
    from PIL import Image

    figure, axes = plt.subplots(figsize=(1, 1), layout="none")
    [dot] = axes.plot(0, 0, "o")
    axes.set(xlim=(0, 4), ylim=(-1, 1))
    picture = teaching.animate(figure, lambda k: dot.set_xdata([k]), 4, milliseconds=100, last=900)
    with Image.open(io.BytesIO(picture.data)) as gif:
        assert gif.n_frames == 4
        frames, times = [], []
        for k in range(4):
            gif.seek(k)
            frames.append(gif.convert("RGB").tobytes())
            times.append(gif.info["duration"])
    assert len(set(frames)) == 4
    assert times == [100, 100, 100, 900]


def test_explore_draws_a_row_where_there_is_no_slider(monkeypatch):
    monkeypatch.setenv("INVFLOW_STATIC", "1")
    seen = []
    assert teaching.explore(lambda axes, k: seen.append(k), [1, 2, 4, 8, 16], name="K", title="steps") is None
    assert seen == [1, 4, 16]
    assert [axes.get_title() for axes in plt.gcf().axes] == ["K = 1", "K = 4", "K = 16"]
    seen.clear()
    teaching.explore(lambda axes, k: seen.append(k), [1, 2, 4], name="K", shown=[2])
    assert seen == [2]
    with pytest.raises(ValueError, match="at least one value"):
        teaching.explore(lambda axes, k: None, [], name="K")


def test_explore_draws_a_row_without_ipywidgets(monkeypatch):
    monkeypatch.delenv("INVFLOW_STATIC", raising=False)
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    assert teaching.explore(lambda axes, k: None, [1], name="K") is None


def test_explore_is_a_slider_over_all_values_in_a_notebook():
    pytest.importorskip("ipywidgets")
    seen = []
    box = teaching.explore(lambda axes, k: seen.append(k), [0.25, 0.5, 1.0], name="strength", static=False)
    slider = box.children[0]
    assert [value for _, value in slider.options] == [0.25, 0.5, 1.0]
    assert [label for label, _ in slider.options] == ["0.25", "0.5", "1"]
    slider.value = 1.0
    assert seen[-1] == 1.0
