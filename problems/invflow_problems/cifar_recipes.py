"""The trainings on CIFAR-10: ``invflow train cifar10`` and ``invflow train cifar10-vfm``."""

from __future__ import annotations

import torch

from invflow.datasets import load_images
from invflow.neural import NeuralFlowMap, load_prior
from invflow.pretrained import kind_of
from invflow.solvers.vfm import VFM
from invflow.training import LoopSettings, TrainingProblem, train_prior, train_vfm
from invflow.training.prior import gaussian_map
from invflow.training.recipe import Recipe, Run
from invflow_problems.recipes import image_problems

__all__ = ["cifar10", "cifar10_vfm"]

SHAPE = (3, 32, 32)
#: states in [-1, 1]
DECODE = (0.5, 0.5)
#: positions of 16 x 16 and 8 x 8, the latter with attention: the prior alone has to place things in the whole image
MAP_NETWORK = {"channels": [32, 96], "blocks": 2}
ADAPTER_NETWORK = {"channels": [48, 96], "blocks": 2}
PRIOR_SETTINGS = LoopSettings(steps=1500, batch_size=64, learning_rate=1.5e-3, ema=0.995)
VFM_SETTINGS = LoopSettings(steps=2000, batch_size=64, learning_rate=1.5e-3, ema=0.995)
#: as for photographs the score alone decides, in effect, and the map is the exact flow of a Gaussian
SCORE = 5000.0


def cifar_problems() -> list[TrainingProblem]:
    """The six problem classes, with the ranges of noise and operators that the shipped adapter knows."""
    return image_problems(SHAPE, least_noise=0.025)


def _train_prior(run: Run) -> NeuralFlowMap:
    images = load_images(str(run.data), split="train", dtype=torch.uint8)
    return train_prior(images, run.settings, run.folder, options=MAP_NETWORK, skip="spectral", tangent="semigroup",
                       decode_affine=DECODE, start=load_prior(run.prior) if run.prior else None,
                       progress=run.progress, stop_at=run.stop_at)


def _train_vfm(run: Run) -> VFM:
    images = load_images(str(run.data), split="train", dtype=torch.uint8)
    adapter = None
    if run.prior and kind_of(run.prior) == "vfm":  # go on from its map and its adapter
        begun = VFM.load(run.prior)
        prior, adapter = begun.prior, begun.adapter
    else:
        prior = load_prior(run.prior) if run.prior else gaussian_map(
            images, DECODE, torch.Generator().manual_seed(0))
    return train_vfm(images, prior, cifar_problems(), run.settings, run.folder,  # type: ignore[arg-type]
                     options=ADAPTER_NETWORK, adapter=adapter, frozen=True, level_power=0.0, model_error=True,
                     score=SCORE, progress=run.progress, stop_at=run.stop_at)


cifar10 = Recipe("cifar10", "prior on CIFAR-10, 32 x 32 in colour", PRIOR_SETTINGS, _train_prior, data="cifar10")
cifar10_vfm = Recipe("cifar10-vfm", "VFM for six problem classes on CIFAR-10", VFM_SETTINGS, _train_vfm,
                     data="cifar10")
