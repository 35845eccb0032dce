"""The tab that measures and restores images, and the tab with the matching code."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from invflow.app import pictures, sources, state, words
from invflow.app.damage import DAMAGES, HOLE
from invflow.app.inputs import PRIVATE, QUIET, Chosen, canvas, friendly

__all__ = ["code_tab", "restore_tab"]

_NONE, _LEVEL = "none", 0.8


def _picture(label: str) -> gr.Image:
    return gr.Image(label=label, type="pil", format="png", interactive=False, elem_classes="picture", min_width=100,
                    buttons=["download"])


def _row(which: str) -> tuple[list[Any], tuple[Any, ...]]:
    """Image widgets of one solver; the first also shows truth and observation."""
    known: list[Any] = []
    with gr.Column(visible=which == "first") as column:
        said = gr.Markdown(elem_id=f"said-{which}")
        with gr.Row(elem_classes="pictures"):
            if which == "first":
                known = [_picture("truth"), _picture("observation")]
            shown = [_picture(name) for name in ("sample", "mean", "deviation", "interval width")]
        scales = gr.Markdown()
    return known, (column, said, shown, scales)


def restore_tab() -> tuple[Any, Any]:
    """Build the first tab; returns the restored view and the event after which it is available."""
    own, first, second = gr.State(None), gr.State(None, time_to_live=3600), gr.State(None, time_to_live=3600)
    with gr.Row():
        with gr.Column(min_width=280):
            source = gr.Dropdown([*sources.DIGITS, *sources.PHOTOGRAPHS, sources.DRAWN, sources.OWN],
                                 value=sources.DIGITS[3], label="picture")
            prior = gr.Radio(list(sources.PRIORS), value="mnist", label="prior")
            upload = gr.UploadButton("Upload your own", file_types=["image"], size="sm", elem_id="upload")
            editor = gr.ImageEditor(
                canvas(sources.sample_picture(sources.DIGITS[3])), label="paint over the part to hide",
                type="numpy", sources=[], transforms=[], layers=False, elem_id="editor", buttons=[],
                format="png", brush=gr.Brush(default_size=26, colors=["#6b87ad"], color_mode="fixed"),
                canvas_size=(252, 252))
        with gr.Column(min_width=280):
            damage = gr.Dropdown(list(DAMAGES), value=HOLE, label="damage")
            parameter = gr.Slider(0, 1, value=0, visible=False, label="setting")
            sigma = gr.Slider(0.005, 0.3, value=0.02, step=0.005, label="noise, standard deviation (white is 1)")
            samples = gr.Slider(2, state.MOST_SAMPLES, value=64, step=1, label="samples")
            seed = gr.Number(0, precision=0, minimum=0, label="seed")
            with gr.Row():
                solver = gr.Dropdown(state.solvers_of("mnist"), value="vfm", label="solver", min_width=120)
                other = gr.Dropdown([_NONE, *state.solvers_of("mnist")], value=_NONE, label="second solver",
                                    min_width=120)
            button = gr.Button("Restore", variant="primary", elem_id="restore")
    with gr.Row():
        number = gr.Slider(1, 64, value=1, step=1, label="sample", elem_id="number")
        level = gr.Slider(0.5, 0.95, value=_LEVEL, step=0.05, label="level of the credible intervals")
    with gr.Row():
        play = gr.Button("Play the samples", size="sm")
        gif = gr.DownloadButton("GIF of the samples", size="sm", interactive=False)
    known, first_row = _row("first")
    rows = [first_row, _row("second")[1]]
    with gr.Accordion("Ask the posterior: which digit, how likely?", open=True):
        asking = gr.Button("Ask", size="sm")
        chances, answer = gr.Label(num_top_classes=5, label="probability of each digit"), gr.Markdown()

    choice = [source, own, editor, prior, damage, parameter, sigma, seed, samples]
    everything = [chances, answer, first, second, *known, number]
    for column, said, shown, scales in rows:
        everything += [column, said, *shown, scales]

    source.change(friendly(_on_source), [source, own], [prior, editor], show_progress="hidden", **PRIVATE)
    prior.change(friendly(_on_prior), [prior, damage], [samples, solver, other, parameter], **QUIET)
    # hidden, so that the error for a bad file does not cover the canvas
    upload.upload(friendly(_on_upload), [upload, prior], [own, source, editor], show_progress="hidden", **PRIVATE)
    damage.change(friendly(_on_damage), [damage, prior], parameter, show_progress="hidden", **PRIVATE)
    done = button.click(friendly(_on_restore), [*choice, solver, other, level], everything, api_name="restore",
                        concurrency_limit=4)
    done.success(friendly(_on_gif), first, gif, show_progress="hidden", **PRIVATE)
    both = [rows[0][2][0], rows[1][2][0]]
    number.input(friendly(_on_number), [first, second, number], both, **QUIET)
    level.input(friendly(_on_level), [first, second, level], [rows[0][2][3], rows[0][3], rows[1][2][3], rows[1][3]],
                **QUIET)
    play.click(friendly(_on_play), [first, second], [number, *both], show_progress="hidden", **PRIVATE)
    asking.click(friendly(_on_ask), first, [chances, answer], **PRIVATE)
    return first, done


def _on_source(source: str, own: Any) -> tuple[Any, Any]:
    if source == sources.DRAWN:
        return gr.Radio(value="mnist"), canvas(None)
    if source == sources.OWN:
        if own is None:
            raise ValueError("upload a file first, with the button below")
        return gr.Radio(), canvas(own)
    return gr.Radio(value=sources.prior_of(source)), canvas(sources.sample_picture(source))


def _on_upload(path: str, prior: str) -> tuple[Any, Any, Any]:
    image = sources.read_own(path, prior, gr.Info)
    return image, sources.OWN, canvas(image)


def _on_prior(prior: str, damage: str) -> tuple[Any, ...]:
    known = state.solvers_of(prior)
    return (sources.samples_of(prior), gr.Dropdown(known, value="vfm"), gr.Dropdown([_NONE, *known], value=_NONE),
            _on_damage(damage, prior))


def _on_damage(damage: str, prior: str) -> Any:
    chosen = DAMAGES[damage]
    low, high, step, usual = chosen.range(prior)
    return gr.Slider(low, high, value=usual, step=step, label=chosen.about or "setting",
                     visible=chosen.setting is not None)


def _on_restore(source: str, own: Any, editor: Any, prior: str, damage: str, parameter: float, sigma: float, seed: int,
                samples: int, solver: str, other: str, level: float) -> list[Any]:
    chosen = Chosen(source, own, editor, prior, damage, parameter, sigma, seed, samples)
    one = state.restore(chosen.view(solver))
    two = None if other == _NONE else state.restore(chosen.view(other))
    found: list[Any] = [None, "", one, two, pictures.truth(one), pictures.observation(one),
             gr.Slider(1, len(one.draws), value=1, step=1)]
    for restored in (one, two):
        if restored is None:
            found += [gr.Column(visible=False), "", None, None, None, None, ""]
            continue
        deviation, white = pictures.deviation(restored)
        width, of_it = pictures.interval_width(restored, level)
        found += [gr.Column(visible=True), words.describe(restored), pictures.sample(restored, 1),
                  pictures.mean(restored), deviation, width, f"{white} {of_it}"]
    return found


def _on_gif(restored: Any) -> Any:
    path = _folder() / "samples.gif"
    path.write_bytes(pictures.animation(restored))
    return gr.DownloadButton(value=str(path), interactive=True)


def _folder() -> Path:
    """A new file among those that gradio deletes automatically."""
    return Path(tempfile.mkdtemp(dir=os.environ.get("GRADIO_TEMP_DIR")))


def _need(restored: Any) -> Any:
    if restored is None:
        raise ValueError("restore an image first")
    return restored


def _on_number(first: Any, second: Any, number: float) -> list[Any]:
    return [None if restored is None else pictures.sample(restored, int(number)) for restored in (first, second)]


def _on_level(first: Any, second: Any, level: float) -> list[Any]:
    found: list[Any] = []
    for restored in (first, second):
        if restored is None:
            found += [None, ""]
            continue
        picture, said = pictures.interval_width(restored, level)
        found += [picture, f"{pictures.deviation(restored)[1]} {said}"]
    return found


def _on_play(first: Any, second: Any) -> Iterator[list[Any]]:
    for number in range(1, min(len(_need(first).draws), 64) + 1):
        yield [number, *_on_number(first, second, number)]
        time.sleep(0.12)


def _on_ask(restored: Any) -> tuple[dict[str, float], str]:
    return state.ask(_need(restored))


def code_tab(restored: Any, done: Any) -> None:
    """Python code, command line and files of the restored view, after the event ``done``."""
    gr.Markdown("This code reproduces the samples of the tab Restore. Put the files below into the same folder.")
    python = gr.Code(language="python", label="Python", interactive=False)
    command = gr.Code(language="shell", label="command line", interactive=False, wrap_lines=True)
    files = gr.File(label="files", file_count="multiple", interactive=False)

    def show(restored: Any) -> tuple[str, str, list[str]]:
        view = _need(restored).view
        written = words.write_inputs(view, _folder())
        return words.python_code(view), words.command_line(view), [str(path) for path in written]

    done.success(friendly(show), restored, [python, command, files], show_progress="hidden", **PRIVATE)
