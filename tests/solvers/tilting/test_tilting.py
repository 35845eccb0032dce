"""The pieces of tilted sampling: grids, schedules, base kernels, look-aheads and chunks, against closed forms."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from tilting_models import Gaussian, Row
from torch import Tensor

from invflow import FMTT, FunctionReward, GaussianLikelihood, GaussianMixtureFlow
from invflow.operator import Operator
from invflow.operators import MatrixOperator, RandomInpainting, SuperResolution
from invflow.reward import Reward
from invflow.solvers.tilting.kernels import HeunStep, base_steps
from invflow.solvers.tilting.look_ahead import LookAhead
from invflow.solvers.tilting.particles import make_chunks
from invflow.solvers.tilting.schedules import AnnealedVariance, logit_grid, make_times, measured_gain, schedule_values

F64 = torch.float64


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Shared(Reward):
    """A reward that has a number of observations and nothing else."""

    def __init__(self, count: int) -> None:
        self.num_observations = count

    def select(self, index: Any) -> Reward:
        return Shared(len(torch.arange(self.num_observations or 1)[index]))

    def __call__(self, x: Tensor) -> Tensor:
        return x.flatten(2).sum(2)




@pytest.mark.parametrize("look_ahead", ["denoiser", "none", "flow_map"])
def test_rate_is_the_change_along_the_flow(look_ahead: str) -> None:
    means = torch.tensor([[2.0, 0.0], [-1.0, 1.0]], dtype=F64)
    prior, t, h = GaussianMixtureFlow(means, std=0.6), 0.4, 1e-4
    x = torch.randn(6, 2, generator=generator(), dtype=F64)
    reward = FunctionReward(lambda image: torch.sin(image).sum(1))
    ahead = LookAhead(prior, look_ahead)
    look = ahead(reward, x, t, (2, 3), rate=True)
    later, earlier = (ahead(reward, prior.jump(x, t, s), s, (2, 3)).value for s in (t + h, t - h))
    torch.testing.assert_close(look.rate, (later - earlier) / (2 * h), atol=2e-5, rtol=1e-4)
    if look_ahead == "flow_map":  # which sees the same end all along its way
        torch.testing.assert_close(look.rate, torch.zeros(6, dtype=F64), atol=1e-4, rtol=0)


def test_several_jumps_of_an_exact_map_look_ahead_like_one() -> None:
    x, reward = torch.randn(4, 3, generator=generator(), dtype=F64), FunctionReward(lambda image: image.sum(1))
    one, four = (LookAhead(Gaussian(), jumps=k)(reward, x, 0.3, (1, 4), gradient=True) for k in (1, 4))
    torch.testing.assert_close(one.value, four.value)
    torch.testing.assert_close(one.gradient, four.gradient)


@pytest.mark.parametrize("diffusion", [1.0, 0.3, math.inf, lambda t: (1 - t) ** 2])
def test_renoising_has_the_marginals_of_the_path(diffusion: Any) -> None:
    prior, generator_ = Gaussian(), generator()
    x = torch.randn(20_000, 3, generator=generator_, dtype=F64)
    for step in base_steps("renoise", [0.0, 0.2, 0.5, 0.6, 0.9, 1.0], diffusion):
        x = step.mean(prior, x) + step.variance**0.5 * torch.randn(x.shape, generator=generator_, dtype=F64)
        exact = (1 - step.end) ** 2 + step.end**2
        assert abs(x.var() / exact - 1) < 4 * (2 / x.numel()) ** 0.5
    assert step.variance == 0


def test_the_error_of_euler_steps_is_of_first_order() -> None:
    """For N(0, I), both kernels are linear, and the variance of their law follows from a recursion."""
    errors = []
    for steps in (20, 40, 80):
        variance = 1.0
        for step in base_steps("sde", make_times("uniform", steps), 1.0):
            slope = float(step.mean(Gaussian(), torch.ones(1, 3, dtype=F64))[0, 0])
            variance = slope**2 * variance + step.variance
        errors.append(abs(variance - 1))
    rates = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert all(0.8 < rate < 1.3 for rate in rates), rates


def test_the_error_of_heun_steps_is_of_second_order() -> None:
    """As above: a Heun step is linear in the state and in its noise."""
    errors, prior = [], Gaussian()
    for steps in (20, 40, 80):
        variance = 1.0
        for step in base_steps("heun", make_times("uniform", steps), 1.0):
            moved = []
            for x, noise in ((1.0, 0.0), (0.0, 1.0)):
                state = torch.full((1, 3), x, dtype=F64)
                end = step.mean(prior, state) + step.variance**0.5 * noise
                moved.append(float((step.correct(prior, state, end) if isinstance(step, HeunStep) else end)[0, 0]))
            variance = moved[0] ** 2 * variance + moved[1] ** 2
        errors.append(abs(variance - 1))
    rates = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert all(1.8 < rate < 2.3 for rate in rates), rates


def test_grids_and_schedules() -> None:
    assert make_times("uniform", 4) == [0.0, 0.25, 0.5, 0.75, 1.0]
    for steps in (1, 2, 3, 20):
        times = make_times("logit", steps)
        assert len(times) == steps + 1
        assert times == sorted(set(times))
    inner = torch.tensor(logit_grid(10, first=0.01, last=0.9)[1:-1], dtype=F64)
    torch.testing.assert_close(torch.logit(inner).diff().diff(), torch.zeros(7, dtype=F64))
    assert FMTT(Gaussian(), time_grid=[0.0, 0.3, 1.0]).steps == 2
    likelihood = GaussianLikelihood(Row(torch.ones(1, 2)), torch.zeros(2, 1), sigma=torch.tensor([0.5, 2.0]))
    values = schedule_values(AnnealedVariance(1.5), [0.0, 0.5, 1.0], likelihood, Gaussian())
    at_half = [s**2 / (s**2 + 1.5**2 / 2) for s in (0.5, 2.0)]
    torch.testing.assert_close(values[:, 1], torch.tensor(at_half, dtype=F64))
    torch.testing.assert_close(values[:, 0], torch.tensor([0.25 / 2.5, 4 / 6.25], dtype=F64))
    assert (values[:, 2] == 1).all()


def test_the_gain_of_an_operator_is_the_mean_squared_norm_of_its_rows() -> None:
    def gain(operator: Operator, sets: int = 1) -> Tensor:
        return measured_gain(GaussianLikelihood(operator, torch.zeros(sets, *operator.measurement_shape), sigma=0.1))

    shape = (1, 8, 8)
    masks = RandomInpainting(shape).randomize(3, torch.Generator().manual_seed(0))
    torch.testing.assert_close(gain(masks, 3), torch.ones(3, dtype=F64), rtol=0, atol=0)
    torch.testing.assert_close(gain(SuperResolution(shape, factor=4, filter="average")),
                               torch.full((1,), 1 / 16, dtype=F64))
    matrix = torch.randn(400, 30, generator=torch.Generator().manual_seed(1))
    rows = matrix.double().square().sum(1).mean()
    assert abs(float(gain(MatrixOperator(matrix, image_shape=(30,)))) / float(rows) - 1) < 0.2
    assert measured_gain(Shared(2)).tolist() == [1.0]


def test_an_annealed_schedule_knows_what_the_operator_makes_of_a_pixel() -> None:
    # the mean of 64 values varies 64 times less than they do: a schedule that takes it for one of them lets the
    # likelihood narrow when the states can no longer follow
    prior = GaussianMixtureFlow(torch.zeros(1, 64), std=1.0)
    operator = MatrixOperator(torch.full((1, 64), 1 / 64), image_shape=(64,))
    likelihood = GaussianLikelihood(operator, torch.tensor([[0.25]]), sigma=0.02)
    posterior = FMTT(prior, steps=40, kernel="ancestral", look_ahead="denoiser", schedule="annealed", weights="none",
                     proposal="conjugate").sample(likelihood, 400, generator=torch.Generator().manual_seed(0))
    assert 0.8 < float(likelihood.residual(posterior.samples).mean()) < 4  # 160 with a gain of 1


@pytest.mark.parametrize(("observations", "count", "size"), [(3, 5, 4), (3, 5, 11), (1, 1, 1), (2, 7, 100)])
def test_chunks_cover_every_row_once(observations: int, count: int, size: int) -> None:
    chunks = make_chunks(Shared(observations), observations, count, size)
    rows = [row for chunk in chunks for row in range(observations * count)[chunk.rows]]
    assert rows == list(range(observations * count))
    for chunk in chunks:
        assert math.prod(chunk.shape) == chunk.rows.stop - chunk.rows.start <= max(size, 1)
        assert chunk.reward.num_observations == chunk.shape[0]
