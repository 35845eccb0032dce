"""Rewards of images: contract, invariances, closed-form gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from invflow.rewards.images import ClassReward, MaskMatchReward, MirrorReward, RotationReward
from invflow.testing import check_reward
from invflow_problems.samples import load_samples

F64 = torch.float64


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(n: int = 6, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    return torch.rand(1, n, 1, 28, 28, generator=generator(seed), dtype=dtype)


def box_mask() -> Tensor:
    mask = torch.zeros(28, 28)
    mask[5:9, 10:20] = 1
    return mask


@pytest.mark.parametrize("reward", [MirrorReward(0.7), RotationReward(0.7), MaskMatchReward(0.3, box_mask(), 0.5),
                                    ClassReward("mnist", 4)], ids=repr)
def test_image_rewards_keep_the_contract(reward: Any) -> None:
    # the classifier has kinks, which a few of its many units cross between the two ends of a difference
    check_reward(reward, (1, 28, 28), gradient_tolerance=1e-2 if isinstance(reward, ClassReward) else 1e-4)


@pytest.mark.parametrize(("reward", "moves"), [
    (MirrorReward(0.5), [lambda x: x.flip(-1)]),
    (RotationReward(0.5), [lambda x, k=k: x.rot90(k, (-2, -1)) for k in (1, 2, 3)]),
], ids=["mirror", "rotation"])
def test_invariances(reward: Any, moves: list[Any]) -> None:
    x = images()
    value, projected = reward(x), reward.project(x[0])
    assert (value < 0).all()
    for move in moves:
        torch.testing.assert_close(reward(move(x)), value)
        torch.testing.assert_close(move(projected), projected)
    torch.testing.assert_close(reward(projected[None]), torch.zeros(1, 6, dtype=F64), atol=1e-20, rtol=0)
    # an orthogonal projection: Pythagoras, and so the distance to the nearest invariant image
    square = (x[0] ** 2).sum((1, 2, 3)) - (projected**2).sum((1, 2, 3))
    torch.testing.assert_close(value[0], -square / (2 * 0.5**2))
    y = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(reward(y).sum(), y)
    torch.testing.assert_close(gradient[0], -(x[0] - projected) / 0.5**2)


def test_mask_match_sees_the_inside_only() -> None:
    target = images(1, seed=3)[0, 0]
    reward, x = MaskMatchReward(target, box_mask(), 0.5), images()
    outside = x + (1 - box_mask()) * images(6, seed=4)
    torch.testing.assert_close(reward(outside), reward(x))
    torch.testing.assert_close(reward(x * (1 - box_mask()) + target * box_mask()), torch.zeros(1, 6, dtype=F64),
                               atol=1e-12, rtol=0)
    one_off = x.clone()
    one_off[...] = target.double()
    one_off[..., 6, 12] += 0.5  # one scale off costs half a unit
    torch.testing.assert_close(reward(one_off), torch.full((1, 6), -0.5, dtype=F64), atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="at least one pixel"):
        MaskMatchReward(0.0, torch.zeros(4, 4), 1.0)
    with pytest.raises(ValueError, match="do not match"):
        MaskMatchReward(torch.zeros(1, 5, 5), torch.ones(4, 4), 1.0)
    with pytest.raises(ValueError, match="scale=0"):
        MirrorReward(0.0)
    with pytest.raises(ValueError, match="not square"):
        RotationReward(1.0)(torch.zeros(1, 2, 1, 4, 6))


def test_class_rewards_are_log_probabilities() -> None:
    x = images(dtype=torch.float32)
    total = torch.stack([ClassReward("mnist", digit)(x) for digit in range(10)]).logsumexp(0)
    torch.testing.assert_close(total, torch.zeros(1, 6), atol=1e-5, rtol=0)
    digits, labels = load_samples("mnist")
    scores = torch.stack([ClassReward("mnist", digit)(digits[None])[0] for digit in range(10)], dim=1)
    assert (scores.argmax(1) == labels).double().mean() > 0.97
    with pytest.raises(ValueError, match="labels 0 to 9"):
        ClassReward("mnist", 10)
