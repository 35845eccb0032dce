from __future__ import annotations

import math
import warnings

import pytest
import torch

import invflow
from invflow import FunctionReward, GaussianLikelihood, PoissonLikelihood, Reward
from invflow.likelihood import estimate_sigma
from invflow.operators import (
    BoxInpainting,
    Denoising,
    GaussianBlur,
    MaskInpainting,
    MatrixOperator,
    SuperResolution,
)
from invflow.testing import check_reward

SHAPE = (2, 8, 8)
MAKERS = {
    "denoising": lambda: Denoising(SHAPE),
    "box": lambda: BoxInpainting(SHAPE),
    "boxes": lambda: BoxInpainting(SHAPE).randomize(3, seeded()),
    "blurs": lambda: GaussianBlur(SHAPE).randomize(3, seeded()),
    "super-resolution": lambda: SuperResolution(SHAPE, 2),
    "composed": lambda: BoxInpainting(SHAPE).randomize(3, seeded()) @ GaussianBlur(SHAPE),
}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=seeded(seed), dtype=torch.float64)


def gaussian(name: str) -> GaussianLikelihood:
    operator = MAKERS[name]()
    sigma = torch.tensor([0.1, 0.2, 0.4], dtype=torch.float64)
    return GaussianLikelihood(operator, operator.measure(rand(3, *SHAPE), sigma, generator=seeded(1)), sigma)


def poisson(name: str) -> PoissonLikelihood:
    operator = MAKERS[name]()
    gain = torch.tensor([10.0, 20.0, 40.0])
    counts = torch.poisson(30 * operator(rand(3, *SHAPE)), generator=seeded(1))
    return PoissonLikelihood(operator, counts, gain, background=0.5)


@pytest.mark.parametrize("likelihood", [gaussian, poisson])
@pytest.mark.parametrize("name", MAKERS)
def test_contract_of_likelihoods(name, likelihood):
    check_reward(likelihood(name))


@pytest.mark.parametrize("reward", [
    FunctionReward(lambda x: -x.square().flatten(1).sum(1)),
    FunctionReward(lambda x: (x.flatten(1).mean(1) > 0.5).numpy().tolist(), differentiable=False),
    2 * FunctionReward(lambda x: x.flatten(1).sum(1)) + FunctionReward(lambda x: x.amax((1, 2, 3))),
    gaussian("boxes") + 0.5 * FunctionReward(lambda x: x.flatten(1).sum(1)),
], ids=["function", "black-box", "sum", "tilted-likelihood"])
def test_contract_of_rewards(reward):
    check_reward(reward, SHAPE)


# -- values ----------------------------------------------------------------------------------------


def test_gaussian_is_the_summed_normal_log_density():
    likelihood, x = gaussian("blurs"), rand(3, 4, *SHAPE, seed=2)
    clean = torch.stack([likelihood.operator(x[:, j]) for j in range(4)], dim=1)
    normal = torch.distributions.Normal(clean, likelihood.sigma.reshape(3, 1, 1, 1, 1))
    expected = normal.log_prob(likelihood.y[:, None]).sum((2, 3, 4))
    torch.testing.assert_close(likelihood(x), expected, rtol=1e-12, atol=0)


def test_only_what_is_observed_counts():
    mask = torch.zeros(4, 4, dtype=torch.bool)
    mask[0, :3] = True
    y, x = rand(1, 1, 4, 4), rand(1, 5, 1, 4, 4, seed=1)
    masked = GaussianLikelihood(MaskInpainting(mask), y, 0.3)
    matrix = torch.eye(16, dtype=torch.float64)[:3]
    seen = GaussianLikelihood(MatrixOperator(matrix, image_shape=(1, 4, 4)), y.flatten(1)[:, :3], 0.3)
    torch.testing.assert_close(masked(x), seen(x))
    torch.testing.assert_close(masked.residual(x), seen.residual(x))
    assert masked.count_observed().tolist() == [3]
    y = y.clone()
    y[..., 3, 3] = math.nan  # unknown where it is not observed anyway
    torch.testing.assert_close(GaussianLikelihood(MaskInpainting(mask), y, 0.3)(x), masked(x))


def grid(low: float, high: float, points: int) -> tuple[torch.Tensor, float]:
    line = torch.linspace(low, high, points, dtype=torch.float64)
    return torch.cartesian_prod(line, line), float(line[1] - line[0]) ** 2


def test_gaussian_integrates_to_one_over_the_observed_measurement():
    y, cell = grid(-4, 5, 181)
    y = torch.cat([y, torch.zeros(len(y), 1, dtype=torch.float64)], dim=1).reshape(-1, 1, 1, 3)
    operator = MaskInpainting(torch.tensor([[True, True, False]]))
    x = torch.tensor([0.2, 0.7, 0.4], dtype=torch.float64).expand(len(y), 1, 1, 1, 3)
    density = GaussianLikelihood(operator, y, 0.5)(x).exp()
    assert float(density.sum()) * cell == pytest.approx(1, abs=1e-9)


def test_poisson_sums_to_one_over_the_counts():
    counts = torch.cartesian_prod(torch.arange(60), torch.arange(60))
    x = torch.tensor([0.0, 0.8], dtype=torch.float64).expand(len(counts), 1, 2)
    likelihood = PoissonLikelihood(Denoising((2,)), counts, gain=10.0, background=2.0)
    assert float(likelihood(x).exp().sum()) == pytest.approx(1, abs=1e-6)


def test_poisson_is_the_summed_poisson_log_probability():
    likelihood, x = poisson("boxes").to(torch.float64), rand(3, 2, *SHAPE, seed=2)
    rate = likelihood.gain.reshape(3, 1, 1, 1, 1) * x + 0.5
    terms = torch.distributions.Poisson(rate).log_prob(likelihood.y[:, None])
    expected = (terms * likelihood.operator.observed()[:, None]).sum((2, 3, 4))
    torch.testing.assert_close(likelihood(x), expected, rtol=1e-12, atol=0)


def test_poisson_of_overshooting_images_points_back():
    likelihood = PoissonLikelihood(Denoising((1,)), torch.tensor([[3]]), gain=10.0, floor=1e-2)
    x = torch.linspace(-0.2, 0.4, 601, dtype=torch.float64).reshape(1, -1, 1).requires_grad_()
    values = likelihood(x)
    (slope,) = torch.autograd.grad(values.sum(), x)
    assert bool(values.isfinite().all())
    assert bool((slope[0, :500] > 0).all())  # the maximum is at 0.3
    assert float(values.detach().diff(dim=1).abs().max()) < 1.1 * 1e-3 * float(slope.max())  # no jump


def test_poisson_pays_nothing_for_negative_rates():
    """For every rate, also a negative one, the probabilities of all counts sum to 1; a dark image has its evidence."""
    x = torch.tensor([-30.0, -1.0, -1e-3, 0.0, 0.2], dtype=torch.float64)
    counts = PoissonLikelihood(Denoising((1,)), torch.arange(40)[:, None], gain=10.0)
    total = counts(x[None, :, None].expand(40, -1, -1)).exp().sum(0)
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=5e-4)  # what the tangent has left of 1e-3
    grid = torch.linspace(-6, 6, 6001, dtype=torch.float64)
    prior = torch.distributions.Normal(torch.tensor(0.1, dtype=torch.float64), 1.0)
    dark = PoissonLikelihood(Denoising((1,)), torch.zeros(1, 1), gain=30.0)
    found = (dark(grid[None, :, None])[0] + prior.log_prob(grid)).exp().sum() * (grid[1] - grid[0])
    # P(x < 0) and, of what is over it, the Laplace transform of a normal number
    rest = math.exp(-30 * 0.1 + 450 + float(torch.special.log_ndtr(torch.tensor(0.1 - 30, dtype=torch.float64))))
    assert float(found) == pytest.approx(float(prior.cdf(torch.zeros_like(grid[0]))) + rest, rel=1e-3)


def test_poisson_posteriors_cover_as_often_as_they_say():
    """Truths, a third of them negative, in the 90% intervals of the posterior that quadrature finds."""
    truths = 0.1 + 0.3 * torch.randn(4000, generator=seeded(3), dtype=torch.float64)
    y = PoissonLikelihood(Denoising((1,)), torch.zeros(4000, 1), gain=10.0).simulate(truths[:, None], seeded(4))
    grid = torch.linspace(-1.4, 1.6, 1501, dtype=torch.float64)
    likelihood = PoissonLikelihood(Denoising((1,)), y, gain=10.0)
    log_density = likelihood(grid[None, :, None].expand(4000, -1, -1)) - 0.5 * ((grid - 0.1) / 0.3).square()
    below = (log_density.softmax(1) * (grid < truths[:, None])).sum(1)
    covered = float(((below > 0.05) & (below < 0.95)).double().mean())
    assert covered == pytest.approx(0.9, abs=4 * math.sqrt(0.09 / 4000))


def test_residual_is_one_for_the_truth():
    operator, x = SuperResolution((1, 16, 16), 2), rand(40, 1, 16, 16)
    y = operator.measure(x, 0.2, generator=seeded())
    residual = GaussianLikelihood(operator, y, 0.2).residual(x[:, None])
    assert residual.shape == (40, 1)
    assert float(residual.mean()) == pytest.approx(1, abs=5 * math.sqrt(2 / (40 * 64)))


def test_simulated_counts_have_the_mean_and_variance_of_their_rate():
    x = torch.full((2, 3000, 1), 0.3, dtype=torch.float64)
    likelihood = PoissonLikelihood(Denoising((1,)), torch.tensor([[1], [2]]), torch.tensor([10.0, 30.0]), 1.0)
    y = likelihood.simulate(x, seeded())[..., 0]
    for row, rate in zip(y, (4.0, 10.0)):
        assert float(row.mean()) == pytest.approx(rate, abs=5 * math.sqrt(rate / 3000))
        assert float(row.var()) == pytest.approx(rate, rel=5 * math.sqrt(2.5 / 3000))
    dark = PoissonLikelihood(Denoising((1,)), torch.tensor([[1]]), 10.0)
    assert float(dark.simulate(torch.full((1, 1000, 1), -0.1), seeded()).abs().max()) == 0


def test_simulated_noise_has_its_level():
    likelihood = gaussian("boxes")
    x = rand(3, 1, *SHAPE).expand(3, 200, *SHAPE)
    noise = likelihood.simulate(x, seeded()) - likelihood.predict(x)
    observed = likelihood.operator.observed()[:, None].expand_as(noise)
    assert bool((noise[~observed] == 0).all())
    noise = (noise / likelihood.sigma.reshape(3, 1, 1, 1, 1))[observed]
    assert float(noise.std()) == pytest.approx(1, abs=5 / math.sqrt(2 * noise.numel()))
    assert float(noise.mean()) == pytest.approx(0, abs=5 / math.sqrt(noise.numel()))


@pytest.mark.parametrize("name", ["boxes", "blurs", "super-resolution"])
def test_forward_and_reverse_derivatives_agree(name):
    likelihood, x, v = gaussian(name), rand(3, 2, *SHAPE, seed=2), rand(3, 2, *SHAPE, seed=3)
    _, along = torch.func.jvp(likelihood, (x,), (v,))
    gradient = torch.func.grad(lambda z: likelihood(z).sum())(x)
    torch.testing.assert_close(along, (gradient * v).sum((2, 3, 4)))


# -- batches ---------------------------------------------------------------------------------------


def test_all_observations_and_particles_run_in_one_call(monkeypatch):
    likelihood, x, rows = gaussian("blurs"), rand(3, 7, *SHAPE, seed=2), []
    forward = GaussianBlur.forward
    monkeypatch.setattr(GaussianBlur, "forward", lambda self, x: rows.append(len(x)) or forward(self, x))
    values = likelihood(x)
    assert rows == [21]
    for b in range(3):
        row = slice(b, b + 1)
        one = GaussianLikelihood(likelihood.operator.select(row), likelihood.y[row], likelihood.sigma[row])
        torch.testing.assert_close(values[b], one(x[b:b + 1])[0])


@pytest.mark.parametrize("index", [1, -1, [2, 0], [1, 1, 1], slice(1, None), torch.tensor([0, 2]),
                                   torch.tensor([True, False, True])], ids=str)
def test_select_takes_any_index(index):
    likelihood, x = gaussian("boxes"), rand(3, 2, *SHAPE, seed=2)
    rows = torch.arange(3)[index].reshape(-1)
    some = likelihood.select(index)
    assert some.num_observations == len(rows)
    torch.testing.assert_close(some(x[rows]), likelihood(x)[rows])
    torch.testing.assert_close(some.residual(x[rows]), likelihood.residual(x)[rows])


def test_moving_a_likelihood_leaves_the_original():
    likelihood = gaussian("blurs")
    single = likelihood.to(torch.float32)
    assert single.y.dtype == single.operator.kernel.dtype == single.sigma.dtype == torch.float32
    assert likelihood.y.dtype == torch.float64
    double = GaussianLikelihood(GaussianBlur(SHAPE), rand(2, *SHAPE), 0.1).to(torch.float64)
    assert double.operator.kernel.dtype == torch.float64


def test_sums_and_scalings_keep_what_a_solver_asks():
    black_box = FunctionReward(lambda x: x.sum((1, 2, 3)), differentiable=False)
    total = gaussian("box") + 2 * black_box
    assert total.num_observations == 3
    assert not total.differentiable
    assert black_box.select([0]) is black_box
    with pytest.raises(ValueError, match="2 and 3 observations"):
        gaussian("box") + gaussian("box").select([0, 1])
    with pytest.raises(TypeError):
        black_box + 1  # type: ignore[operator]


# -- the noise level -------------------------------------------------------------------------------


def smooth_images(n: int) -> torch.Tensor:
    rows = torch.linspace(0, 3, 32, dtype=torch.float64)
    phase = torch.arange(n, dtype=torch.float64).reshape(-1, 1, 1, 1)
    return 0.5 + 0.4 * torch.sin(rows[:, None] + phase) * torch.cos(2 * rows)


@pytest.mark.parametrize("operator", [Denoising((1, 32, 32)), BoxInpainting((1, 32, 32)),
                                      MaskInpainting(rand(32, 32, seed=3) < 0.5)],
                         ids=["all", "box", "half-the-pixels"])
def test_sigma_is_estimated_and_said(operator):
    sigma = torch.tensor([0.02, 0.1], dtype=torch.float64)
    y = operator.measure(smooth_images(2), sigma, generator=seeded())
    with pytest.warns(UserWarning, match=r"sigma was estimated from y as 0\.0.*pass sigma="):
        likelihood = GaussianLikelihood(operator, y, sigma=None)
    torch.testing.assert_close(likelihood.sigma, sigma, rtol=0.25, atol=0)


def test_an_estimate_needs_noise_and_pictures():
    with pytest.raises(ValueError, match="carry no noise"):
        estimate_sigma(torch.zeros(1, 1, 16, 16))
    with pytest.raises(ValueError, match=r"\(2, 5\).*pass sigma"):
        estimate_sigma(rand(2, 5))


# -- bad input -------------------------------------------------------------------------------------


def bad_y(value: float) -> torch.Tensor:
    y = rand(2, *SHAPE)
    y[0, 0, 0, 0] = value
    return y


@pytest.mark.parametrize(("make", "message"), [
    (lambda: GaussianLikelihood(Denoising(SHAPE), rand(2, *SHAPE), 0.0)(rand(2, 3, *SHAPE)), "no density"),
    (lambda: GaussianLikelihood(Denoising(SHAPE), rand(2, *SHAPE), -1.0), "sigma is .*>= 0"),
    (lambda: GaussianLikelihood(Denoising(SHAPE), rand(2, *SHAPE), math.nan), "finite"),
    (lambda: GaussianLikelihood(Denoising(SHAPE), rand(2, *SHAPE), torch.ones(3)), r"\(3,\).*\(2,\)"),
    (lambda: GaussianLikelihood(Denoising(SHAPE), bad_y(math.nan), 0.1), "1 entries that are NaN.*mask"),
    (lambda: GaussianLikelihood(Denoising(SHAPE), bad_y(math.inf), 0.1), "NaN or infinite"),
    (lambda: GaussianLikelihood(Denoising(SHAPE), rand(0, *SHAPE), 0.1), "empty batch"),
    (lambda: GaussianLikelihood(Denoising(SHAPE), rand(*SHAPE), 0.1), r"pass y\[None\]"),
    (lambda: GaussianLikelihood(Denoising(SHAPE), rand(2, 2, 8, 9), 0.1), r"\(2, 2, 8, 9\).*\(n, 2, 8, 8\)"),
    (lambda: GaussianLikelihood(Denoising(SHAPE), rand(2, *SHAPE).byte(), 0.1), r"uint8.*float\(\) / 255"),
    (lambda: GaussianLikelihood(MAKERS["boxes"](), rand(2, *SHAPE), 0.1), r"2 observations.*3 param.*select"),
    (lambda: gaussian("box")(rand(3, *SHAPE)), r"\(3, N, 2, 8, 8\).*x\[:, None\]"),
    (lambda: gaussian("box")(rand(2, 4, *SHAPE)), r"3 observations.*select\(index\)"),
    (lambda: gaussian("box").select([3]), "does not fit 3 rows"),
    (lambda: PoissonLikelihood(Denoising(SHAPE), rand(2, *SHAPE), 1.0), "expected counts"),
    (lambda: PoissonLikelihood(Denoising(SHAPE), -torch.ones(2, *SHAPE), 1.0), "expected counts"),
    (lambda: PoissonLikelihood(Denoising(SHAPE), torch.ones(2, *SHAPE), 0.0), "gain is .*> 0"),
    (lambda: PoissonLikelihood(Denoising(SHAPE), torch.ones(2, *SHAPE), 1.0, -1.0), "background is .*>= 0"),
    (lambda: FunctionReward(lambda x: x.mean())(rand(2, 3, *SHAPE)), r"returned shape \(\).*\(6,\)"),
    (lambda: FunctionReward(lambda x: x)(rand(2, 8)), r"\(2, 8\).*x\[None\]"),
])
def test_bad_input_is_named_with_what_would_work(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_bytes_as_floats_draw_a_warning():
    with pytest.warns(UserWarning, match=r"y has values up to 255.*y / 255"):
        GaussianLikelihood(Denoising((3, 8, 8)), torch.full((2, 3, 8, 8), 255.0), 0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # an operator that amplifies is no mistake
        GaussianLikelihood(MatrixOperator(100 * torch.eye(64), (1, 8, 8)), torch.full((2, 64), 90.0), 0.1)


# -- the check catches what is broken --------------------------------------------------------------


class Averaged(Reward):
    """Scores that depend on the other particles."""

    def __call__(self, x):
        values = x.flatten(2).sum(2)
        return values - values.mean(1, keepdim=True)


class WrongShape(Reward):
    def __call__(self, x):
        return x.flatten(1).sum(1)


class ForgetsToSelect(GaussianLikelihood):
    level_names = ()  # so that select leaves sigma as it is


class TakesFirst(GaussianLikelihood):
    def select(self, index):
        return super().select(torch.arange(3)[index].reshape(-1).sort().values)


class Detached(Reward):
    def __call__(self, x):
        return x.detach().flatten(2).sum(2)


class WrongGradient(Reward):
    def __call__(self, x):
        return (x + 0.1 * x.detach()).flatten(2).sum(2)


class GlobalNoise(Reward):
    def __call__(self, x):
        return x.flatten(2).sum(2) + 0 * torch.randn(x.shape[:2])


class WritesImages(Reward):
    def __call__(self, x):
        if not x.requires_grad:
            x[0, 0] = 0.25
        return x.flatten(2).sum(2)


class FixedSimulation(GaussianLikelihood):
    def draw(self, clean, generator):
        return super().draw(clean, seeded(5))


def likelihood_of(kind: type[GaussianLikelihood]) -> GaussianLikelihood:
    source = gaussian("boxes")
    return kind(source.operator, source.y, source.sigma)


@pytest.mark.parametrize(("make", "message"), [
    (Averaged, "particle 1 alone"), (WrongShape, r"expected floats \(B, N\)"),
    (Detached, "its score has no gradient"), (WrongGradient, "finite differences"),
    (GlobalNoise, "global random state"), (WritesImages, "in place"),
    (lambda: likelihood_of(ForgetsToSelect), "select"), (lambda: likelihood_of(TakesFirst), "select"),
    (lambda: likelihood_of(FixedSimulation), "simulate"),
    (lambda: FunctionReward(lambda x: x.flatten(1).sum(1) * math.nan), "NaN"),
])
def test_check_reward_catches(make, message):
    with pytest.raises(AssertionError, match=message):
        check_reward(make, SHAPE)


def test_public_names():
    assert invflow.Reward is Reward
    assert invflow.PoissonLikelihood is PoissonLikelihood
