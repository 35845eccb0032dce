"""Training recipe of the small prior on MNIST at 14 x 14 pixels: ``invflow train mnist-14``."""

from __future__ import annotations

import torch
from torch import Tensor

from invflow.datasets.sets import load_images
from invflow.models.neural import NeuralFlowMap, load_trainable
from invflow.training import LoopSettings, train_prior
from invflow.training.prior import data_statistics
from invflow.training.recipe import Recipe, Run
from invflow_problems.small_digits import halve

__all__ = ["mnist_14"]

#: a perceptron, because calibrating a sampler takes tens of millions of calls: it makes ten times as many per second as
#: the smallest U-Net that was tried
NETWORK = {"width": 256, "depth": 5, "embedding": 64}
DECODE = (0.5, 0.5)
SETTINGS = LoopSettings(steps=16000, batch_size=256, learning_rate=1e-3, weight_decay=0.0, precision="no",
                        log_every=100)


def train_small_digits(run: Run) -> NeuralFlowMap:
    """Train on the 60,000 digits of the training file, averaged over 2 x 2 pixels, as vectors of 196 values."""
    images = load_images(str(run.data), split="train", dtype=torch.uint8)
    data: Tensor = torch.cat([halve(part.float() / 255).flatten(1) for part in images.split(4096)])
    if run.prior:
        start = load_trainable(run.prior)
    else:
        mean, std = data_statistics(data, DECODE)
        # as for images, a jump from noise is mean + std * network: no share of the noise is added
        start = NeuralFlowMap((data.shape[1],), network="mlp", options=NETWORK, decode_affine=DECODE, mean=mean,
                              std=std, skip="denoiser", generator=torch.Generator().manual_seed(run.settings.seed))
    return train_prior(data, run.settings, run.folder, start=start, tangent="semigroup", progress=run.progress,
                       stop_at=run.stop_at)


mnist_14 = Recipe("mnist-14", "small prior on MNIST averaged to 14 x 14, for calibrating samplers", SETTINGS,
                  train_small_digits, data="mnist")
