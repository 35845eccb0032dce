"""The trainings that made the shipped weights, and the checkerboard's."""

from __future__ import annotations

import dataclasses

import torch

from invflow.datasets import load_images
from invflow.neural import NeuralFlowMap, load_prior
from invflow.pretrained import kind_of
from invflow.solvers.vfm import VFM
from invflow.training import LoopSettings, TrainingProblem, train_prior, train_vfm
from invflow.training.recipe import Recipe, Run
from invflow_operators import blur, elementwise, inpainting, superresolution
from invflow_problems.checkerboard import NOISE, board_sample
from invflow_problems.checkerboard import checkerboard as board_problem

__all__ = ["checkerboard", "fashion_mnist", "fashion_mnist_vfm", "mnist", "mnist_vfm"]

#: a U-Net on 14 x 14 and 7 x 7 positions, of the size that two CPU cores can train in under an hour
MAP_NETWORK = {"channels": [32, 128], "blocks": 2}
ADAPTER_NETWORK = {"channels": [32, 96], "blocks": 2}

PRIOR_SETTINGS = LoopSettings(steps=2000, batch_size=128, learning_rate=1.5e-3)
VFM_SETTINGS = LoopSettings(steps=4800, batch_size=96, learning_rate=1e-3)
#: tau is the scale of the data states (0.6); alpha keeps one path in five unconditional
TAU, ALPHA = 0.7, 0.8


def image_problems(image_shape: tuple[int, int, int]) -> list[TrainingProblem]:
    """The six problem classes, with the ranges of noise and operators that the shipped adapters know."""
    levels = (0.01, 0.2)
    return [
        TrainingProblem(elementwise.Denoising(image_shape), (0.05, 0.5)),
        TrainingProblem(inpainting.RandomInpainting(image_shape), levels),
        TrainingProblem(inpainting.BoxInpainting(image_shape, sides=(0.25, 0.55)), levels),
        TrainingProblem(superresolution.SuperResolution(image_shape, factor=4), levels),
        TrainingProblem(blur.GaussianBlur(image_shape), levels),
        TrainingProblem(blur.MotionBlur(image_shape), levels),
    ]


def _train_image_prior(run: Run) -> NeuralFlowMap:
    images = load_images(str(run.data), split="train", dtype=torch.uint8)
    start = load_prior(run.prior) if run.prior else None
    return train_prior(images, run.settings, run.folder, options=MAP_NETWORK, start=start, tangent="map",
                       progress=run.progress, stop_at=run.stop_at)


def _train_image_vfm(run: Run, name: str) -> VFM:
    images = load_images(str(run.data), split="train", dtype=torch.uint8)
    if run.prior and kind_of(run.prior) == "vfm":  # go on from its map and its adapter
        begun = VFM.load(run.prior)
        prior, adapter = begun.prior, begun.adapter
    else:
        prior, adapter = load_prior(run.prior or name), None
    return train_vfm(images, prior, image_problems(prior.image_shape), run.settings, run.folder,  # type: ignore[arg-type]
                     options=ADAPTER_NETWORK, adapter=adapter, progress=run.progress, stop_at=run.stop_at, tau=TAU,
                     alpha=ALPHA, level_power=0.0, model_error=True, tangent="map")


mnist = Recipe("mnist", "prior on MNIST, 28 x 28", PRIOR_SETTINGS, _train_image_prior, data="mnist")
fashion_mnist = Recipe("fashion-mnist", "prior on Fashion-MNIST, 28 x 28", PRIOR_SETTINGS, _train_image_prior,
                       data="fashion-mnist")
mnist_vfm = Recipe("mnist-vfm", "VFM for six problem classes on MNIST, from the prior", VFM_SETTINGS,
                   lambda run: _train_image_vfm(run, "mnist"), data="mnist")
fashion_mnist_vfm = Recipe("fashion-mnist-vfm", "VFM for six problem classes on Fashion-MNIST, from the prior",
                           dataclasses.replace(VFM_SETTINGS, steps=1800),
                           lambda run: _train_image_vfm(run, "fashion-mnist"), data="fashion-mnist")

#: without sinusoids of the input: in 2,000 steps of pretraining they raised the share of four-step draws on the board
#: from 0.62 to 0.83, but joint training through so rough a map diverged at learning rates of 1e-3 and 3e-4
BOARD_MAP, BOARD_ADAPTER = {"width": 256, "depth": 5}, {"width": 256, "depth": 4}
BOARD_SETTINGS = LoopSettings(steps=8000, batch_size=1024, learning_rate=1e-3, weight_decay=0.0, ema=0.998,
                              precision="no", log_every=200)
BOARD_PRETRAINING = 3000


def board_prior(settings: LoopSettings, run: Run) -> NeuralFlowMap:
    """The checkerboard's prior, which joint training starts from, in ``folder/pretraining``."""
    folder = run.folder / "pretraining"
    if (folder / "prior" / "config.json").exists():
        return load_prior(folder / "prior")
    return train_prior(board_sample, settings, folder, network="mlp", options=BOARD_MAP, decode_affine=(1.0, 0.0),
                       progress=run.progress, stop_at=run.stop_at)


def train_board(run: Run, *, tau: float = 1.0, alpha: float = 0.5, frozen: bool = False) -> VFM:
    """Pretrain and train jointly (or the adapter alone) on the checkerboard; ``run.prior`` skips the pretraining."""
    pretraining = dataclasses.replace(run.settings, steps=min(BOARD_PRETRAINING, run.settings.steps))
    prior = load_prior(run.prior) if run.prior else board_prior(pretraining, run)
    return train_vfm(board_sample, prior, [TrainingProblem(board_problem.operator, NOISE)], run.settings, run.folder,
                     options=BOARD_ADAPTER, tau=tau, alpha=alpha, frozen=frozen, progress=run.progress,
                     stop_at=run.stop_at)


checkerboard = Recipe("checkerboard", "VFM on the checkerboard of the VFM paper, prior included", BOARD_SETTINGS,
                      train_board)
