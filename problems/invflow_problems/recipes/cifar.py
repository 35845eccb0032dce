"""Training recipes on CIFAR-10: ``invflow train cifar10``, its two later stages, and ``invflow train cifar10-vfm``."""

from __future__ import annotations

import torch

from invflow.datasets.sets import load_images
from invflow.models.neural import NeuralFlowMap, load_trainable
from invflow.plugins import kind_of
from invflow.solvers.vfm import VFM
from invflow.training import LoopSettings, TrainingProblem, train_prior, train_vfm
from invflow.training.prior import gaussian_map
from invflow.training.recipe import Recipe, Run
from invflow_problems.recipes.digits import JUMPS_SHARE, grown, image_problems

__all__ = ["cifar10", "cifar10_jumps", "cifar10_velocity", "cifar10_vfm"]

SHAPE = (3, 32, 32)
#: states in [-1, 1]
DECODE = (0.5, 0.5)
#: grids of 16 x 16, 8 x 8 and 4 x 4 positions, the last with attention, because a prior has to place objects in the
#: whole image. One CPU core can train this width at 16 x 16 for twenty epochs in an hour
MAP_NETWORK = {"channels": [64, 128, 128], "blocks": 1}
ADAPTER_NETWORK = {"channels": [48, 96], "blocks": 2}
PRIOR_SETTINGS = LoopSettings(steps=1500, batch_size=64, learning_rate=1.5e-3, ema=0.995)
VELOCITY_SETTINGS = LoopSettings(steps=8000, batch_size=128, learning_rate=1.5e-3, ema=0.999)
JUMPS_SETTINGS = LoopSettings(steps=2000, batch_size=128, learning_rate=1e-3, ema=0.998)
VFM_SETTINGS = LoopSettings(steps=2000, batch_size=64, learning_rate=1.5e-3, ema=0.995)
#: as for photographs, the weight of the score dominates, and the map is the exact flow of a Gaussian
SCORE = 5000.0


def cifar_problems() -> list[TrainingProblem]:
    """The seven problem classes of :func:`image_problems`."""
    return image_problems(SHAPE)


def _train_prior(run: Run, name: str | None = None, distinct: float = 0.5) -> NeuralFlowMap:
    images = load_images(str(run.data), split="train", dtype=torch.uint8)
    begun = run.prior or name
    return train_prior(images, run.settings, run.folder, options=MAP_NETWORK, skip="spectral", tangent="semigroup",
                       distinct=distinct, decode_affine=DECODE, start=load_trainable(begun) if begun else None,
                       progress=run.progress, stop_at=run.stop_at)


def _train_vfm(run: Run) -> VFM:
    images = load_images(str(run.data), split="train", dtype=torch.uint8)
    adapter = None
    if run.prior and kind_of(run.prior) == "vfm":  # continue from its map and its adapter
        begun = VFM.load(run.prior)
        prior, adapter = begun.prior, grown(begun.adapter, cifar_problems())
    else:
        prior = load_trainable(run.prior) if run.prior else gaussian_map(
            images, DECODE, torch.Generator().manual_seed(0))
    return train_vfm(images, prior, cifar_problems(), run.settings, run.folder,  # type: ignore[arg-type]
                     options=ADAPTER_NETWORK, adapter=adapter, frozen=True, level_power=0.0, model_error=True,
                     score=SCORE, progress=run.progress, stop_at=run.stop_at)


cifar10 = Recipe("cifar10", "prior on CIFAR-10, 32 x 32 in colour", PRIOR_SETTINGS, _train_prior, data="cifar10")
cifar10_velocity = Recipe("cifar10-velocity", "flow matching only, for a prior on CIFAR-10 (--prior, or a new one)",
                          VELOCITY_SETTINGS, lambda run: _train_prior(run, distinct=0.0), data="cifar10")
cifar10_jumps = Recipe("cifar10-jumps", "jumps along its own velocity, for a prior on CIFAR-10 (--prior)",
                       JUMPS_SETTINGS, lambda run: _train_prior(run, "cifar10", JUMPS_SHARE), data="cifar10")
cifar10_vfm = Recipe("cifar10-vfm", "VFM on CIFAR-10 for seven problem classes", VFM_SETTINGS, _train_vfm,
                     data="cifar10")
