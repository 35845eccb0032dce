"""The MNIST prior, tilted to one digit by a classifier, or to shapes by symmetry or agreement inside a mask.

The base law is that of the shipped prior. For the digits, truths are drawn by rejection from its one-step samples. A
one-step solver (such as :class:`invflow.NoiseSMC`) tilts the same law; a solver with several steps tilts its own,
slightly different law.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from invflow.flowmap import FlowMap
from invflow.problem import Problem
from invflow.reward import Reward
from invflow.rewards.images import ClassReward, MaskMatchReward, MirrorReward, RotationReward
from invflow_problems.rejection import rejection_sample

__all__ = ["mnist_mirror", "mnist_open_centre", "mnist_rotation", "mnist_tilt_0", "mnist_tilt_1", "mnist_tilt_2",
           "mnist_tilt_3", "mnist_tilt_4", "mnist_tilt_5", "mnist_tilt_6", "mnist_tilt_7", "mnist_tilt_8",
           "mnist_tilt_9"]


@functools.cache
def _prior() -> FlowMap:
    from invflow.models.neural import load_prior

    return load_prior("mnist")


@functools.cache
def _class_reward(digit: int) -> ClassReward:
    return ClassReward("mnist", digit)


def _digit(digit: int) -> Problem:
    def sampler(n: int, generator: torch.Generator) -> Tensor:
        prior = _prior()
        return rejection_sample(lambda count, g: prior.generate(count, generator=g), _class_reward(digit).score, n,
                                generator, batch=64)

    def accuracy(x: Tensor) -> Tensor:
        return (_class_reward(digit).predicted(x) == digit).to(x)

    return Problem(f"mnist/tilt-{digit}", "mnist", reward=lambda: _class_reward(digit), sampler=sampler,
                   quantities={"accuracy": accuracy},
                   description=f"the prior tilted by log p({digit} | x) of a classifier")


(mnist_tilt_0, mnist_tilt_1, mnist_tilt_2, mnist_tilt_3, mnist_tilt_4, mnist_tilt_5, mnist_tilt_6, mnist_tilt_7,
 mnist_tilt_8, mnist_tilt_9) = (_digit(digit) for digit in range(10))


def _open_centre() -> Reward:
    mask = torch.zeros(28, 28)
    mask[10:18, 11:17] = 1
    return MaskMatchReward(0.0, mask, scale=0.5)


def _mirror() -> Reward:
    return MirrorReward(scale=1.0)


def _rotation() -> Reward:
    return RotationReward(scale=1.5)


mnist_open_centre = Problem("mnist/open-centre", "mnist", reward=_open_centre,
                            description="the prior tilted to images that are dark inside a box of 8 x 6 pixels")
mnist_mirror = Problem("mnist/mirror", "mnist", reward=_mirror,
                       description="the prior tilted to left-right symmetry")
mnist_rotation = Problem("mnist/rotation", "mnist", reward=_rotation,
                         description="the prior tilted to invariance under quarter turns")
