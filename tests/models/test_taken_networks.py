"""Wrapped networks: evaluation mode, order of arguments, conditions, noise predictions."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import invflow
from invflow.operators import Denoising

SHAPE = (3, 8, 8)


class Noisy(nn.Module):
    """A network with everything that changes in training."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layers = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Dropout(0.5),
                                        nn.Conv2d(4, 3, 3, padding=1))

    def forward(self, x: Tensor, t: Tensor, r: Any = None) -> Tensor:
        return self.layers(x)

    def denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
        return self.layers(x)

    def decode(self, x: Tensor) -> Tensor:
        return self.layers(x)


def codes() -> invflow.FlowMap:
    return invflow.GaussianMixtureFlow(torch.zeros(1, *SHAPE), 0.5)


BUILDERS: dict[str, Callable[[Noisy], invflow.FlowMap]] = {
    "velocity": lambda net: invflow.from_velocity(net, SHAPE, steps=2),
    "a closure": lambda net: invflow.from_velocity(lambda x, t: net(x, t), SHAPE, steps=2),
    "a method": lambda net: invflow.from_velocity(net.denoise, SHAPE, steps=2),
    "a partial": lambda net: invflow.from_velocity(functools.partial(net, r=None), SHAPE, steps=2, order="x, t"),
    "denoiser": lambda net: invflow.from_deepinv(net.denoise, SHAPE, steps=2, sigma_max=10.0),
    "average velocity": lambda net: invflow.from_average_velocity(lambda x, t, r: net(x, t), SHAPE),
    "consistency": lambda net: invflow.from_consistency(net.denoise, SHAPE),
    "epsilon": lambda net: invflow.from_epsilon(net, SHAPE, steps=2),
    "decoder": lambda net: invflow.LatentFlowMap(codes(), net.decode, image_shape=SHAPE),
    "decoder in a closure": lambda net: invflow.LatentFlowMap(codes(), lambda x: net.decode(x), image_shape=SHAPE),
}


@pytest.mark.parametrize("kind", list(BUILDERS))
def test_nothing_drifts(kind: str) -> None:
    """The same seed, the same samples; the network and the global generator as they were."""
    net = Noisy().train()
    before, state = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    prior = BUILDERS[kind](net)
    prior.train()  # as a training loop around it would

    def draw() -> Tensor:
        return prior.generate(4, generator=torch.Generator().manual_seed(0))

    first = draw()
    torch.testing.assert_close(draw(), first, rtol=0, atol=0)
    if "closure" not in kind or "decoder" not in kind:
        net.train()  # by its owner, between two calls
    torch.testing.assert_close(draw(), first, rtol=0, atol=0)
    assert not net.training
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_rewards_and_operators_do_not_drift() -> None:
    class Measure(invflow.Operator):
        linear = False

        def __init__(self, net: Noisy) -> None:
            super().__init__()
            self.image_shape = self.measurement_shape = SHAPE
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            return self.net.decode(x)

    x, state = torch.rand(1, 4, *SHAPE, generator=torch.Generator().manual_seed(0)), torch.get_rng_state()
    net, other = Noisy().train(), Noisy().train()
    before = copy.deepcopy(net.state_dict())
    reward = invflow.FunctionReward(lambda images: net.decode(images).flatten(1).sum(1))
    likelihood = invflow.GaussianLikelihood(Measure(other), torch.zeros(1, *SHAPE), sigma=0.1)
    for score in (reward, likelihood):
        torch.testing.assert_close(score(x), score(x), rtol=0, atol=0)
    net.train()
    torch.testing.assert_close(reward(x), reward(x), rtol=0, atol=0)
    for module in (net, other):
        for name, value in module.state_dict().items():
            assert torch.equal(value, before[name]), name
    assert torch.equal(torch.get_rng_state(), state)


def test_a_copy_has_its_own_network() -> None:
    net = Noisy()
    for kind in ("velocity", "a method"):
        prior = BUILDERS[kind](net)
        other = copy.deepcopy(prior).double()
        assert net.layers[0].weight.dtype == torch.float32
        assert other.generate(2, generator=torch.Generator().manual_seed(0)).dtype == torch.float64


# -- the order of arguments ----------------------------------------------------------------------------------------


class TimeFirst(nn.Module):
    def forward(self, timesteps: Tensor, x: Tensor) -> Tensor:
        return -timesteps.reshape(-1, 1, 1, 1) * x


@pytest.mark.parametrize("network", [
    TimeFirst(), lambda t, x: -t.reshape(-1, 1, 1, 1) * x, lambda sigma, img: -sigma.reshape(-1, 1, 1, 1) * img,
    lambda x, t: -t.reshape(-1, 1, 1, 1) * x, lambda latents, cond_time_t: -cond_time_t.reshape(-1, 1, 1, 1) * latents,
])
def test_order_is_read_from_the_names(network: Any) -> None:
    x = torch.ones(2, *SHAPE)
    torch.testing.assert_close(invflow.from_velocity(network, SHAPE, steps=1).velocity(x, 0.25), -0.25 * x)


def test_order_is_asked_for() -> None:
    for unclear in (lambda a, b: a, lambda *args: args[0], lambda x, y, t: x):
        with pytest.raises(TypeError, match=r"pass the order, from_velocity\(..., order='x, t' or order='t, x'\)"):
            invflow.from_velocity(unclear, SHAPE, steps=1)
    swapped = invflow.from_velocity(lambda a, b: -a.reshape(-1, 1, 1, 1) * b, SHAPE, steps=1, order="t, x")
    torch.testing.assert_close(swapped.velocity(torch.ones(2, *SHAPE), 0.5), -0.5 * torch.ones(2, *SHAPE))
    with pytest.raises(ValueError, match="once, in the order"):
        invflow.from_velocity(lambda x, t: x, SHAPE, steps=1, order="x")


def test_conditions_are_held_for_every_row() -> None:
    seen: list[Any] = []

    def network(x: Tensor, sigma: Tensor, class_labels: Tensor, scale: float = 1.0, mode: str = "a") -> Tensor:
        seen.append((class_labels.tolist(), mode))
        return x

    prior = invflow.from_deepinv(network, SHAPE, steps=1, sigma_max=10.0, class_labels=3, mode="b")
    prior.velocity(torch.zeros(2, *SHAPE), 0.5)
    assert seen == [([3, 3], "b")]
    with pytest.raises(TypeError, match=r"also takes class_labels.*from_deepinv\(..., class_labels=...\)"):
        invflow.from_deepinv(network, SHAPE, steps=1, sigma_max=10.0)
    with pytest.raises(TypeError, match="takes no argument 'labels'"):
        invflow.from_deepinv(network, SHAPE, steps=1, sigma_max=10.0, class_labels=3, labels=3)
    with pytest.raises(ValueError, match="one row"):
        invflow.from_deepinv(network, SHAPE, steps=1, sigma_max=10.0, class_labels=torch.arange(2))


# -- predictions of the noise -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [3, 6])
@pytest.mark.parametrize("betas", ["linear", "cosine", "scaled-linear"])
def test_epsilon_networks(betas: str, channels: int) -> None:
    """Networks for pixels from N(0.2, 0.4^2), with the betas written out."""
    steps = 1000
    if betas == "cosine":
        bar = [torch.cos(torch.tensor((k / steps + 0.008) / 1.008 * torch.pi / 2, dtype=torch.float64)) ** 2
               for k in range(steps + 1)]
        table = torch.stack([(1 - b / a).clamp(max=0.999) for a, b in itertools.pairwise(bar)])
    elif betas == "linear":
        table = torch.linspace(1e-4, 0.02, steps, dtype=torch.float64)
    else:
        table = torch.linspace(0.00085**0.5, 0.012**0.5, steps, dtype=torch.float64) ** 2
    square = (1 - table).cumprod(0)

    def network(x: Tensor, timesteps: Tensor, y: Any = None) -> Tensor:
        k = timesteps.round().long()
        assert (timesteps - k).abs().max() < 1e-5
        a, s = square[k].sqrt().reshape(-1, 1, 1, 1), (1 - square[k]).sqrt().reshape(-1, 1, 1, 1)
        noise = s * (x - a * 0.2) / ((a * 0.4) ** 2 + s**2)
        return torch.cat([noise, 9 + noise], dim=1) if channels == 6 else noise

    prior = invflow.from_epsilon(network, SHAPE, steps=5, betas=betas).double()
    exact = invflow.GaussianMixtureFlow(torch.full((1, *SHAPE), 0.2, dtype=torch.float64), 0.4)
    k = torch.tensor([900, 500, 100, 20, 3])
    times = square[k].sqrt() / (square[k].sqrt() + (1 - square[k]).sqrt())
    x = torch.randn(5, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(prior.velocity(x, times), exact.velocity(x, times), rtol=1e-6, atol=1e-6)
    assert prior.decode_affine == (0.5, 0.5)


def test_epsilon_refusals() -> None:
    def network(x: Tensor, t: Tensor) -> Tensor:
        return x[:, :2]

    with pytest.raises(ValueError, match="no schedule of betas"):
        invflow.from_epsilon(network, SHAPE, steps=2, betas="sigmoid")
    with pytest.raises(ValueError, match="choose one of epsilon, v, sample"):
        invflow.from_epsilon(network, SHAPE, steps=2, prediction="x0")
    with pytest.raises(ValueError, match=r"pass \(K,\)"):
        invflow.from_epsilon(network, SHAPE, steps=2, betas=torch.ones(5))
    with pytest.raises(ValueError, match="twice the channels, 6"):
        invflow.from_epsilon(network, SHAPE, steps=2).generate(1)
    likelihood = invflow.GaussianLikelihood(Denoising(SHAPE), torch.zeros(1, *SHAPE), sigma=0.1)
    prior = invflow.from_epsilon(lambda x, t: x, SHAPE, steps=2)
    assert invflow.FMTT(prior, steps=2).sample(likelihood, 2, generator=torch.Generator()).num_samples == 2
