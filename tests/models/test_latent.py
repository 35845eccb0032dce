"""Flow maps in a latent space, against the exact posterior of a mixture of codes behind a linear decoder."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from invflow import (
    FMTT,
    BestOfN,
    ExactPosterior,
    FlowMap,
    GaussianLikelihood,
    GaussianMixtureFlow,
    LatentFlowMap,
    NoiseRTO,
    NoiseSMC,
    PiGDM,
    Posterior,
)
from invflow.operators import MatrixOperator
from invflow.testing import check_flow_map

F64 = torch.float64
IMAGE = (1, 2, 3)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=F64)


class Linear(nn.Module):
    """Codes (2,) to images (1, 2, 3): W m + c; its encoder is the least-squares inverse."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(randn(6, 2, seed=3), requires_grad=False)

    def decode(self, state: Tensor) -> Tensor:
        return (state @ self.weight.T + 0.5).unflatten(1, IMAGE)

    def encode(self, image: Tensor) -> Tensor:
        return (image.flatten(1) - 0.5) @ torch.linalg.pinv(self.weight).T


def codes(components: int = 3) -> GaussianMixtureFlow:
    return GaussianMixtureFlow(1.5 * randn(components, 2, seed=1), 0.5, steps=12)


def latent(flow: FlowMap | None = None) -> LatentFlowMap:
    decoder = Linear()
    return LatentFlowMap(flow or codes(), decoder.decode, decoder.encode)


def problem() -> tuple[GaussianLikelihood, GaussianLikelihood]:
    """The same two observations as seen from images, y = A x, and from codes, y - A c = A W m."""
    matrix, decoder = randn(1, 6, seed=4) / 2, Linear()
    y, sigma = torch.tensor([[0.4], [-0.8]], dtype=F64), 0.3
    offset = matrix @ torch.full((6,), 0.5, dtype=F64)
    images = GaussianLikelihood(MatrixOperator(matrix, image_shape=IMAGE), y, sigma=sigma)
    return images, GaussianLikelihood(MatrixOperator(matrix @ decoder.weight, image_shape=(2,)), y - offset,
                                      sigma=sigma)


def exact_moments(components: int = 3) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the posterior's images, ``(2, 6)``."""
    weight = Linear().weight
    mean, covariance = ExactPosterior(codes(components)).moments(problem()[1])
    return mean @ weight.T + 0.5, torch.einsum("pi,bij,pj->bp", weight, covariance, weight).sqrt()


def assert_agrees(posterior: Posterior, share: float, components: int = 3) -> None:
    """Moments within 4 standard errors of so many independent draws as ``share`` of the particles."""
    mean, std = exact_moments(components)
    count = posterior.samples.shape[1] * share
    assert posterior.samples.shape[2:] == IMAGE
    errors = (posterior.mean().flatten(1) - mean).abs() / (std / math.sqrt(count))
    assert errors.max() < 4, errors
    # the deviation of a mixture's sample deviation is at most about twice a Gaussian's here
    spread = (posterior.std().flatten(1) / std - 1).abs() * math.sqrt(2 * count) / 2
    assert spread.max() < 4, spread


def test_noise_smc_through_a_decoder() -> None:
    images, in_codes = problem()
    posterior = NoiseSMC(latent(), num_moves=4).sample(images, 1000, generator=generator())
    assert_agrees(posterior, 0.25)
    assert posterior.log_evidence is not None
    torch.testing.assert_close(posterior.log_evidence, ExactPosterior(codes()).log_evidence(in_codes), rtol=0, atol=0.2)


def test_noise_rto_through_a_decoder() -> None:
    """One component: the map is affine, and every draw independent and exact."""
    images, _ = problem()
    posterior = NoiseRTO(latent(codes(1))).sample(images, 500, generator=generator())
    assert_agrees(posterior, 1.0, 1)


@pytest.mark.parametrize("options", [{"steps": 30}, {"kernel": "renoise", "steps": 15}])
def test_fmtt_through_a_decoder(options: dict[str, Any]) -> None:
    """Near the exact posterior, and to rounding what FMTT makes of the same problem posed in codes."""
    images, in_codes = problem()
    posterior = FMTT(latent(), **options).sample(images, 400, generator=generator())
    assert_agrees(posterior, 0.1)  # resampled particles share ancestors
    same = FMTT(codes(), **options).sample(in_codes, 400, generator=generator())
    decoded = Linear().decode(same.samples.flatten(0, 1)).unflatten(0, (2, 400))
    torch.testing.assert_close(posterior.samples, decoded, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(posterior.log_weights, same.log_weights, rtol=1e-6, atol=1e-6)
    assert posterior.nfe == same.nfe


def test_search_through_a_decoder() -> None:
    images, _ = problem()
    found = BestOfN(latent(), budget=150).sample(images, 4, generator=generator())
    assert found.samples.shape == (2, 4, *IMAGE)


def test_solvers_that_need_an_affine_decoding_refuse() -> None:
    with pytest.raises((TypeError, ValueError), match="affine"):
        PiGDM(latent()).sample(problem()[0], 2, generator=generator())


def test_contract() -> None:
    class Affine(Linear):  # from codes to as many values, so that encoding is an inverse
        def decode(self, state: Tensor) -> Tensor:
            return (state @ self.weight[:2].T).unflatten(1, (1, 2))

        def encode(self, image: Tensor) -> Tensor:
            return image.flatten(1) @ torch.linalg.inv(self.weight[:2]).T

    decoder = Affine()
    check_flow_map(LatentFlowMap(codes(), decoder.decode, decoder.encode))


def test_every_velocity_of_an_ode_is_counted() -> None:
    inner, outer, z = codes(), latent(codes()), randn(5, 2).requires_grad_()
    with inner.count() as wanted, outer.count() as found:
        for prior in (inner, outer):
            prior.jump(z, 0.0, 1.0).sum().backward()
            prior.velocity(z, 0.5)
    assert wanted.forward == found.forward > 10
    assert wanted.backward == found.backward > 0


def test_gradient_passes_through_the_decoder() -> None:
    prior = LatentFlowMap(codes(), nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Unflatten(1, IMAGE)).double())
    z, direction, h = randn(3, 2).requires_grad_(), randn(3, 2, seed=5), 1e-6
    gradient = torch.autograd.grad(prior.one_step(z).square().sum(), z)[0]
    with torch.no_grad():
        ahead, behind = (prior.one_step(z + s * h * direction).square().sum() for s in (1, -1))
    torch.testing.assert_close((gradient * direction).sum(), (ahead - behind) / (2 * h), rtol=1e-6, atol=0)


def test_moves_with_its_decoder_and_copies_it() -> None:
    prior = latent()
    assert (prior.state_shape, prior.image_shape, prior.decode_affine) == ((2,), IMAGE, None)
    other = copy.deepcopy(prior).float()
    assert other.dtype == torch.float32
    assert other.generate(2, generator=generator()).dtype == torch.float32
    assert prior.owners[0].weight.dtype == F64
    plain = LatentFlowMap(codes(), lambda m: m.float().unflatten(1, (1, 2)))
    assert plain.decode(randn(2, 2)).dtype == F64  # images in the type of the codes
    independent = codes()
    independent.independent_noise = False
    assert not latent(independent).independent_noise


def test_another_flow_of_the_same_codes() -> None:
    prior, single = latent(), codes(1)
    x = randn(3, 2)
    other = prior.with_latent(single)
    torch.testing.assert_close(other.one_step(x), Linear().decode(single.jump(x, 0.0, 1.0)))
    with pytest.raises(ValueError, match="this decoder takes"):
        prior.with_latent(GaussianMixtureFlow(torch.zeros(1, 3), 1.0))


def test_refusals() -> None:
    with pytest.raises(TypeError, match="pass a FlowMap"):
        LatentFlowMap(nn.Linear(2, 2), nn.Linear(2, 2))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="decoder is a int"):
        LatentFlowMap(codes(), 3)  # type: ignore[arg-type]
    prior = LatentFlowMap(codes(), Linear().decode, lambda x: x, image_shape=IMAGE)
    with pytest.raises(ValueError, match="belong together"):
        prior.encode(torch.zeros(1, *IMAGE, dtype=F64))
    with pytest.raises(TypeError, match="has no encoder"):
        LatentFlowMap(codes(), Linear().decode).encode(torch.zeros(1, *IMAGE))
    with pytest.raises(ValueError, match=r"image_shape=\(1, 2, 3\)"):
        LatentFlowMap(codes(), Linear().decode, image_shape=(6,)).decode(randn(2, 2))
