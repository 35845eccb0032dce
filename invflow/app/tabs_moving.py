"""The animated tabs: particles that flow to data, and a growing certificate."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr

from invflow.app import growth, plane
from invflow.app.inputs import PRIVATE, QUIET, friendly

__all__ = ["certificate_tab", "flow_tab"]


def flow_tab() -> None:
    """Noise flows to data in the plane."""
    gr.Markdown("Noise at t = 0 flows to data at t = 1. The flow map jumps there in one step; Euler steps of the "
                "velocity must be short. Grey: the paths of sixty particles.")
    with gr.Row():
        with gr.Column(min_width=280):
            law = gr.Dropdown(list(plane.LAWS), value=plane.LAWS[0], label="data")
            way = gr.Radio(list(plane.WAYS), value=plane.WAYS[1], label="how")
            t = gr.Slider(0, 1, value=0, step=0.02, label="time t", elem_id="time")
            steps = gr.Slider(1, 50, value=10, step=1, label="steps from 0 to 1")
            play = gr.Button("Play", size="sm")
        with gr.Column(min_width=280):
            picture = gr.Image(plane.flow_picture(plane.LAWS[0], 0.0, 10, plane.WAYS[1]), type="pil", format="png",
                               interactive=False, label="particles", buttons=[])
    inputs = [law, t, steps, way]
    shown = friendly(lambda law, t, steps, way: plane.flow_picture(law, t, int(steps), way))
    for control in (law, steps, way):
        control.input(shown, inputs, picture, **QUIET)
    t.input(shown, inputs, picture, **QUIET)

    def run(law: str, steps: int, way: str) -> Iterator[tuple[float, Any]]:
        for k in range(26):
            yield k / 25, plane.flow_picture(law, k / 25, int(steps), way)

    play.click(friendly(run), [law, steps, way], [t, picture], show_progress="hidden", **PRIVATE)


def certificate_tab() -> None:
    """Rank histograms that grow."""
    gr.Markdown("Truths are drawn from the prior and measured. The solver draws 49 samples for each, and the truth is "
                "ranked among them. If the solver is calibrated, all ranks are equally likely, and nine in ten bars "
                "end in the grey band.")
    what = gr.Dropdown(list(growth.CERTIFIED), value=next(iter(growth.CERTIFIED)), label="solver and problem")
    with gr.Row():
        simulations = gr.Slider(20, 300, value=100, step=10, label="simulations")
        seed = gr.Number(0, precision=0, minimum=0, label="seed")
    with gr.Row():
        start, stop = gr.Button("Grow", variant="primary", elem_id="grow"), gr.Button("Stop")
    said = gr.Markdown(elem_id="certificate")
    picture = gr.Image(type="pil", format="png", interactive=False, label="ranks of the truths", buttons=["download"])

    def grow(what: str, simulations: int, seed: int) -> Iterator[tuple[str, Any]]:
        for certificate in growth.grow(what, int(simulations), int(seed or 0)):
            yield growth.sentence(certificate, int(simulations)), growth.rank_picture(certificate)

    growing = start.click(friendly(grow), [what, simulations, seed], [said, picture], concurrency_limit=2,
                          show_progress="minimal", **PRIVATE)
    stop.click(None, cancels=[growing])
