"""The exact Gaussian-mixture flow, against quadrature, quantile transport and torch's own mixtures."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from invflow import GaussianMixtureFlow
from invflow.testing import check_flow_map

F64 = torch.float64


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=F64)


def plane(std: float | Tensor = 0.5) -> GaussianMixtureFlow:
    """Four components in three dimensions, their means in a plane."""
    means = 2 * randn(4, 3, seed=1)
    means[:, 2] = 0.3
    return GaussianMixtureFlow(means, std, torch.tensor([0.1, 0.2, 0.3, 0.4]))


def line(std: float | Tensor = 0.3) -> GaussianMixtureFlow:
    means = torch.tensor([[-2.0], [0.5], [1.5]], dtype=F64)
    return GaussianMixtureFlow(means, std, torch.tensor([0.5, 0.2, 0.3], dtype=F64))


def benchmark(d: int, **options: int) -> GaussianMixtureFlow:
    """25 well-separated modes at (8i, 8j) repeated, of unit variance and random weights."""
    means = [[8.0 * i, 8.0 * j] * (d // 2) for i in range(-2, 3) for j in range(-2, 3)]
    weights = torch.rand(25, generator=generator(), dtype=F64) + 0.01
    return GaussianMixtureFlow(torch.tensor(means, dtype=F64), 1.0, weights, **options)


STDS = [0.5, torch.tensor([0.2, 0.5, 0.9, 0.4], dtype=F64)]
LINE_STDS = [0.3, torch.tensor([0.2, 0.5, 0.8], dtype=F64)]


def reference(prior: GaussianMixtureFlow, t: float) -> MixtureSameFamily:
    spread = ((1 - t) ** 2 + (t * prior.std) ** 2).sqrt()
    components = Independent(Normal(t * prior.means, spread[:, None].expand_as(prior.means)), 1)
    return MixtureSameFamily(Categorical(prior.weights), components)


def cdf(prior: GaussianMixtureFlow, x: Tensor, t: float, direction: Tensor) -> Tensor:
    """Distribution function of the marginal at time t along a unit vector: ``(n,)`` to ``(n,)``."""
    spread = ((1 - t) ** 2 + (t * prior.std) ** 2).sqrt()
    return Normal(t * prior.means @ direction, spread).cdf(x[:, None]) @ prior.weights


# -- closed forms ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("std", LINE_STDS)
@pytest.mark.parametrize("t", [0.0, 0.3, 0.8])
def test_velocity_and_denoiser_are_conditional_expectations(std: float | Tensor, t: float) -> None:
    prior = line(std)
    m = torch.linspace(-8, 8, 8001, dtype=F64)
    x = torch.tensor([-2.5, -0.4, 0.0, 0.7, 1.9], dtype=F64)
    z = (x[:, None] - t * m) / (1 - t)
    joint = reference(prior, 1.0).log_prob(m[:, None]).exp() * Normal(0, 1).log_prob(z).exp()
    posterior = joint / joint.sum(1, keepdim=True)
    velocity, denoised = prior.velocity(x[:, None], t)[:, 0], prior.denoise(x[:, None], t)[:, 0]
    torch.testing.assert_close(velocity, (posterior * (m - z)).sum(1), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(denoised, posterior @ m, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("std", STDS)
@pytest.mark.parametrize("t", [0.0, 0.2, 0.9, 1.0])
def test_log_prob_and_score(std: float | Tensor, t: float) -> None:
    prior, x = plane(std), (1.5 * randn(8, 3)).requires_grad_()
    expected = reference(prior, t).log_prob(x)
    torch.testing.assert_close(prior.log_prob(x, t), expected, rtol=1e-12, atol=1e-12)
    gradient, = torch.autograd.grad(expected.sum(), x)
    torch.testing.assert_close(prior.score(x, t), gradient, rtol=1e-11, atol=1e-11)
    velocity = prior.velocity(x, t)
    torch.testing.assert_close(t * velocity - x, (1 - t) * gradient, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(prior.denoise(x, t), x + (1 - t) * velocity, rtol=1e-11, atol=1e-11)


def test_times_differ_by_row() -> None:
    prior, x = plane(), randn(4, 3)
    times = torch.tensor([0.0, 0.3, 0.9, 1.0], dtype=F64)
    for method in (prior.velocity, prior.denoise, prior.score, prior.log_prob):
        alone = torch.cat([method(x[i:i + 1], float(times[i])) for i in range(4)])
        torch.testing.assert_close(method(x, times), alone, rtol=1e-12, atol=1e-12)


def test_data_samples() -> None:
    prior, n = plane(STDS[1]), 20_000
    x = prior.sample(n, generator=generator(4))
    variance = prior.weights @ (prior.std[:, None] ** 2 + prior.means**2) - (prior.weights @ prior.means) ** 2
    error = (x.mean(0) - prior.weights @ prior.means).abs() / (variance / n).sqrt()
    assert error.max() < 4.5
    for direction in torch.eye(3, dtype=F64):
        statistic = ks(cdf(prior, x @ direction, 1.0, direction))
        assert statistic < 2.0
    assert torch.equal(x, prior.sample(n, generator=generator(4)))
    assert not torch.equal(x, prior.sample(n, generator=generator(5)))


def ks(uniform: Tensor) -> float:
    """Kolmogorov-Smirnov statistic times sqrt(n): over 1.95 once in a thousand."""
    ordered = uniform.sort().values
    n = len(ordered)
    grid = torch.arange(n + 1, dtype=ordered.dtype) / n
    distance = torch.maximum((grid[1:] - ordered).max(), (ordered - grid[:-1]).max())
    return float(distance) * math.sqrt(n)


# -- the jump -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("std", LINE_STDS)
@pytest.mark.parametrize(("s", "t"), [(0.0, 1.0), (0.0, 0.4), (0.4, 0.9), (1.0, 0.0)])
def test_jump_on_the_line_matches_quantiles(std: float | Tensor, s: float, t: float) -> None:
    """In one dimension the flow is monotone, so it carries quantiles to quantiles: no ODE in the answer."""
    prior, direction = line(std), torch.ones(1, dtype=F64)
    levels = torch.linspace(0.01, 0.99, 99, dtype=F64)

    def quantiles(time: float) -> Tensor:
        low, high = torch.full_like(levels, -20), torch.full_like(levels, 20)
        for _ in range(60):
            middle = (low + high) / 2
            above = cdf(prior, middle, time, direction) > levels
            low, high = torch.where(above, low, middle), torch.where(above, middle, high)
        return (low + high) / 2

    error = prior.jump(quantiles(s)[:, None], s, t)[:, 0] - quantiles(t)
    assert error.square().mean().sqrt() < 1e-4 * quantiles(t).square().mean().sqrt()


def test_one_gaussian_is_affine() -> None:
    mean = torch.tensor([[1.0, -2.0]], dtype=F64)
    prior, z = GaussianMixtureFlow(mean, 0.3), randn(5, 2)
    torch.testing.assert_close(prior.jump(z, 0.0, 1.0), mean + 0.3 * z, rtol=1e-14, atol=1e-14)
    spread = math.sqrt(0.4**2 + (0.6 * 0.3) ** 2)
    later = prior.jump(0.6 * mean + spread * z, 0.6, 1.0)
    torch.testing.assert_close(later, mean + 0.3 * z, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("std", STDS)
@pytest.mark.parametrize("t", [0.3, 1.0])
def test_pushforward_of_noise_is_the_marginal(std: float | Tensor, t: float) -> None:
    prior = plane(std)
    x = prior.jump(randn(8000, 3, seed=7), 0.0, t)
    directions = torch.nn.functional.normalize(randn(4, 3, seed=8))
    assert max(ks(cdf(prior, x @ v, t, v)) for v in directions) < 2.0


@pytest.mark.parametrize("d", [8, 80, 800])
def test_jump_with_separated_modes_in_many_dimensions(d: int) -> None:
    """The grid finds the commitment to a mode, which at d = 800 is over before t = 1/16."""
    prior, fine, z = benchmark(d), benchmark(d, steps=200), randn(400, d)
    x, exact = prior.jump(z, 0.0, 1.0), fine.jump(z, 0.0, 1.0)
    error = (x - exact).square().sum(1).sqrt() / exact.square().sum(1).mean().sqrt()
    assert error.square().mean().sqrt() < 1e-4
    # each sample belongs to a mode, and modes come in their proportions
    nearest = torch.cdist(x, prior.means).argmin(1)
    counts = torch.bincount(nearest, minlength=25)
    chi_square = ((counts - 400 * prior.weights).square() / (400 * prior.weights)).sum()
    assert chi_square < 24 + 4.5 * math.sqrt(48)
    if d == 800:
        early = torch.cdist(40 * prior.jump(z, 0.0, 1 / 40), prior.means).argmin(1)
        assert (early == nearest).double().mean() > 0.97
    # the complement of the span scales in closed form: here by one, since gamma is 1 at both ends
    inside = x @ prior.basis.T @ prior.basis
    torch.testing.assert_close(x - inside, z - z @ prior.basis.T @ prior.basis, rtol=1e-9, atol=1e-9)


def test_single_precision_is_enough() -> None:
    prior, z = benchmark(80), randn(200, 80)
    single = GaussianMixtureFlow(prior.means.float(), 1.0, prior.weights)
    error = single.jump(z.float(), 0.0, 1.0).double() - prior.jump(z, 0.0, 1.0)
    assert error.square().mean().sqrt() < 1e-5 * prior.means.square().mean().sqrt()


def test_small_directions_of_the_means_are_kept() -> None:
    """Two pairs of means, the pairs far apart: within a pair they are told apart at the end of the path."""
    means = torch.tensor([[-3.0, 0.0], [-3.0, 0.02], [3.0, 0.0], [3.0, 0.02]], dtype=F64)
    prior = GaussianMixtureFlow(means, 0.004)
    x = prior.jump(randn(4000, 2), 0.0, 1.0)
    for direction in torch.eye(2, dtype=F64):
        assert ks(cdf(prior, x @ direction, 1.0, direction)) < 2.0


def test_error_falls_with_the_fifth_power_of_the_steps() -> None:
    z = randn(300, 3)
    means = 2 * randn(4, 3, seed=1)
    exact = GaussianMixtureFlow(means, 0.5, steps=400).jump(z, 0.0, 1.0)
    steps = [12, 24, 48]
    solutions = [GaussianMixtureFlow(means, 0.5, steps=k).jump(z, 0.0, 1.0) for k in steps]
    errors = [float((x - exact).square().mean().sqrt()) for x in solutions]
    slope = math.log(errors[0] / errors[-1]) / math.log(steps[-1] / steps[0])
    assert 4.5 < slope < 6.5, errors


@pytest.mark.parametrize("std", STDS)
def test_semigroup_inverse_and_identity(std: float | Tensor) -> None:
    prior, z = plane(std), randn(200, 3)
    x = prior.jump(z, 0.0, 1.0)
    scale = x.square().mean().sqrt()
    for u in (0.1, 0.5, 0.99):
        assert (prior.jump(prior.jump(z, 0.0, u), u, 1.0) - x).square().mean().sqrt() < 1e-5 * scale
    assert (prior.jump(x, 1.0, 0.0) - z).square().mean().sqrt() < 1e-5
    for t in (0.0, 0.37, 1.0):
        assert torch.equal(prior.jump(z, t, t), z)


@pytest.mark.parametrize("std", STDS)
@pytest.mark.parametrize("s", [0.0, 0.3, 0.95])
def test_jump_solves_the_transport_equation(std: float | Tensor, s: float) -> None:
    """(d/ds + b_s . grad) X_{s,t} = 0, by one Jacobian-vector product along (b_s, 1)."""
    prior, x = plane(std), randn(100, 3)
    times = torch.full((100,), s, dtype=F64)
    velocity = prior.velocity(x, times)
    along = (velocity, torch.ones_like(times))
    _, derivative = torch.func.jvp(lambda x, s: prior.jump(x, s, 1.0), (x, times), along)
    assert derivative.square().mean().sqrt() < 1e-5 * velocity.square().mean().sqrt()


@pytest.mark.parametrize("std", STDS)
def test_jump_starts_along_the_velocity(std: float | Tensor) -> None:
    prior, x = plane(std), randn(50, 3)
    times = torch.rand(50, generator=generator(), dtype=F64)
    _, slope = torch.func.jvp(lambda t: prior.jump(x, times, t), (times,), (torch.ones_like(times),))
    torch.testing.assert_close(slope, prior.velocity(x, times), rtol=1e-10, atol=1e-10)


def test_gradient_of_the_jump() -> None:
    prior, z = plane(), randn(3, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: prior.jump(z, 0.0, 1.0), z, atol=1e-6)


def test_rows_run_to_their_own_times_in_either_direction() -> None:
    prior, x = plane(), randn(40, 3)
    s, t = torch.rand(2, 40, generator=generator(), dtype=F64)
    alone = torch.cat([prior.jump(x[i:i + 1], float(s[i]), float(t[i])) for i in range(40)])
    torch.testing.assert_close(prior.jump(x, s, t), alone, rtol=1e-11, atol=1e-11)


# -- cost -----------------------------------------------------------------------------------------------


def test_every_velocity_of_a_jump_is_counted() -> None:
    prior, z = plane(), randn(10, 3)
    with prior.count() as calls:
        prior.jump(z, 0.0, 1.0)
    assert (calls.forward, calls.backward) == (10 * 6 * prior.ode_steps, 0)
    with prior.count() as calls:
        prior.jump(z, 0.999, 1.0)
    assert calls.forward == 10 * 6
    halves = torch.cat([torch.zeros(5), torch.full((5,), 0.999)])
    with prior.count() as calls:
        prior.jump(z, halves, 1.0)
    assert calls.forward == 5 * 6 * prior.ode_steps + 5 * 6


def test_derivatives_are_counted() -> None:
    prior, z = plane(), randn(4, 3).requires_grad_()
    with prior.count() as calls:
        torch.autograd.grad(prior.jump(z, 0.0, 1.0).sum(), z)
    assert calls.backward == calls.forward == 4 * 96
    with prior.count() as calls:
        torch.func.jvp(lambda x: prior.velocity(x, 0.5), (z.detach(),), (z.detach(),))
    assert (calls.forward, calls.backward) == (4, 4)
    with prior.count() as calls:
        prior.score(z, 0.5)
        prior.denoise(z, 0.5)
    assert (calls.forward, calls.backward) == (8, 0)


# -- the contract, and bad input ------------------------------------------------------------------------


@pytest.mark.parametrize("prior", [
    plane(), plane(STDS[1]), line(), GaussianMixtureFlow(torch.randn(3, 2, generator=generator())),
    GaussianMixtureFlow(torch.zeros(1, 1, 2, 2, dtype=F64)),
    GaussianMixtureFlow(torch.zeros(2, 3, dtype=F64), torch.tensor([0.2, 1.0])),
    GaussianMixtureFlow(randn(3, 4), 0.4, image_shape=(1, 2, 2)),
], ids=["plane", "stds", "line", "float32", "one", "scales", "reshaped"])
def test_contract(prior: GaussianMixtureFlow) -> None:
    check_flow_map(prior)


def test_moves_with_to_and_has_no_parameters() -> None:
    prior = plane().to(torch.float32)
    assert prior.dtype == torch.float32
    assert prior.generate(2, generator=generator()).dtype == torch.float32
    assert list(prior.parameters()) == []


@pytest.mark.parametrize(("arguments", "words"), [
    ({"means": torch.zeros(3)}, "expected \\(K, \\*state_shape\\)"),
    ({"means": torch.zeros(3, 2), "std": -1.0}, "must be positive"),
    ({"means": torch.zeros(3, 2), "std": torch.ones(2)}, "one for each of 3"),
    ({"means": torch.zeros(3, 2), "weights": torch.ones(2)}, "expected \\(3,\\)"),
    ({"means": torch.zeros(3, 2), "weights": torch.tensor([1.0, -1.0, 1.0])}, "nonnegative"),
    ({"means": torch.full((3, 2), math.nan)}, "finite"),
    ({"means": torch.zeros(3, 2), "image_shape": (3,)}, "differ in size"),
    ({"means": torch.zeros(3, 2), "steps": 1}, "at least 2 steps"),
])
def test_refuses(arguments: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        GaussianMixtureFlow(**arguments)


def test_refuses_states_and_times_that_do_not_fit() -> None:
    prior = plane()
    with pytest.raises(ValueError, match=r"states have shape .*expected"):
        prior.velocity(randn(4, 2), 0.5)
    with pytest.raises(ValueError, match="between 0"):
        prior.jump(randn(4, 3), 0.0, 1.5)
    with pytest.raises(ValueError, match="n >= 1"):
        prior.sample(0)
