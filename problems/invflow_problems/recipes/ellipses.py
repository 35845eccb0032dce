"""Learned priors on phantoms: ``invflow train ellipses`` for CT, ``invflow train ellipses-complex`` for MRI."""

from __future__ import annotations

from invflow.models.neural import NeuralFlowMap, load_trainable
from invflow.training import LoopSettings, train_prior
from invflow.training.recipe import Recipe, Run
from invflow_problems.phantoms import DECODE, draw_complex_phantoms, draw_phantoms

__all__ = ["ellipses", "ellipses_complex"]

NETWORK = {"channels": [24, 48, 64], "blocks": 1, "attention": False}
SETTINGS = LoopSettings(steps=1500, batch_size=48, learning_rate=1.5e-3, ema=0.997, precision="no",
                        checkpoint_seconds=15.0)


def _train(run: Run, channels: int) -> NeuralFlowMap:
    draw = draw_phantoms if channels == 1 else draw_complex_phantoms
    return train_prior(draw, run.settings, run.folder, options=NETWORK, skip="spectral", tangent="semigroup",
                       decode_affine=DECODE[channels], start=load_trainable(run.prior) if run.prior else None,
                       progress=run.progress, stop_at=run.stop_at)


ellipses = Recipe("ellipses", "prior on phantoms of 32 x 32 pixels, drawn in training, for phantoms/ct", SETTINGS,
                  lambda run: _train(run, 1), takes=("prior",))
ellipses_complex = Recipe("ellipses-complex", "prior on complex phantoms, for phantoms/mri", SETTINGS,
                          lambda run: _train(run, 2), takes=("prior",))
