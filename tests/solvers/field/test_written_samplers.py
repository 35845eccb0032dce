"""DAPS, FlowDPS, DPnP, Langevin in noise space and D-Flow on Gaussians, where scalar recursions give each result.

Prior N(0.5, 0.1^2) for each of 64 pixels, y = 0.7 with noise 0.1: the posterior of each is N(0.6, 0.0707^2).
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch

import invflow
from invflow.operators import BoxInpainting, Denoising, MatrixOperator
from invflow.solvers.field.daps import powers
from invflow.solvers.field.rows import RowNoise, Rows
from invflow.testing import check_solver

SHAPE = (1, 8, 8)
MEAN, STD, NOISE, Y, COUNT = 0.5, 0.1, 0.1, 0.7, 64


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def prior() -> invflow.GaussianMixtureFlow:
    return invflow.GaussianMixtureFlow(torch.full((1, *SHAPE), MEAN), std=STD)


def denoising(observations: int = 1) -> invflow.GaussianLikelihood:
    return invflow.GaussianLikelihood(Denoising(SHAPE), torch.full((observations, *SHAPE), Y), sigma=NOISE)


class Affine:
    """A Gaussian scalar that goes through affine maps: x becomes gain x + shift + noise xi."""

    def __init__(self, mean: float, variance: float) -> None:
        self.mean, self.variance = mean, variance

    def step(self, gain: float, shift: float, noise: float = 0.0) -> None:
        self.mean, self.variance = gain * self.mean + shift, gain**2 * self.variance + noise**2

    def agrees(self, samples: torch.Tensor, errors: float = 4.5) -> bool:
        x, n = samples.double(), samples.numel()
        off_mean = abs(float(x.mean()) - self.mean) / math.sqrt(self.variance / n)
        off_std = abs(float(x.std()) / math.sqrt(self.variance) - 1) * math.sqrt(2 * n)
        return off_mean < errors and off_std < errors


def denoiser(level: float) -> tuple[float, float]:
    """Gain and shift of E[m | m + level z]."""
    gain = STD**2 / (STD**2 + level**2)
    return gain, MEAN * (1 - gain)


# -- DAPS --------------------------------------------------------------------------------------------------------------


def daps(steps: int, ode_steps: int, langevin: int, first: float, size: float, tau: float) -> Affine:
    levels = powers(first, 0.1, steps)
    x = Affine(0.0, first**2)
    for k in range(steps):
        level = levels[k]
        ode = powers(level, 0.01, ode_steps)
        for now, after in itertools.pairwise(ode):
            gain, shift = denoiser(now)
            rate = (after - now) / now
            x.step(1 + rate * (1 - gain), -rate * shift)
        # Langevin steps around the estimate e: the pair (x, e) is Gaussian
        step = size * (1 + k / steps * (0.01 - 1))
        pull, data = 1 / level**2, 1 / tau**2
        mean, var, cov, estimate, spread = x.mean, x.variance, x.variance, x.mean, x.variance
        keep = 1 - step * (pull + data)
        for _ in range(langevin):
            var = keep**2 * var + (step * pull) ** 2 * spread + 2 * keep * step * pull * cov + 2 * step
            cov = keep * cov + step * pull * spread
            mean = keep * mean + step * pull * estimate + step * data * Y
        x = Affine(mean, var)
        x.step(1.0, 0.0, levels[k + 1])
    return x


@pytest.mark.parametrize("tau", [None, 0.05])
def test_daps_makes_what_its_recursion_says(tau: float | None) -> None:
    solver = invflow.DAPS(prior(), steps=8, ode_steps=3, langevin_steps=12, sigma_max=2.0, step_size=5e-4, tau=tau)
    wanted = daps(8, 3, 12, 2.0, 5e-4, NOISE if tau is None else tau)
    assert wanted.agrees(solver.sample(denoising(), COUNT, generator=seeded()).samples)


def test_levels_are_the_authors() -> None:
    # sigma_max 100 down to 0.1 in 200 steps: the first, the second and the last before 0, by the formula
    levels = powers(100.0, 0.1, 200)
    assert len(levels) == 201
    assert levels[0] == pytest.approx(100)
    root = 100 ** (1 / 7) + 1 / 200 * (0.1 ** (1 / 7) - 100 ** (1 / 7))
    assert levels[1] == pytest.approx(root**7)
    assert levels[-1] == 0
    assert levels[-2] > 0.1
    assert all(a > b for a, b in itertools.pairwise(levels))


def test_daps_takes_an_operator_that_is_not_linear_and_chunks_change_nothing() -> None:
    class Square(invflow.Operator):
        linear = False
        image_shape = measurement_shape = SHAPE

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.square()

    likelihood = invflow.GaussianLikelihood(Square(), torch.full((2, *SHAPE), 0.36), sigma=0.05)
    settings = {"steps": 4, "ode_steps": 2, "langevin_steps": 3, "sigma_max": 1.0}
    whole = invflow.DAPS(prior(), **settings).sample(likelihood, 5, generator=seeded()).samples
    parts = invflow.DAPS(prior(), **settings, chunk_size=3).sample(likelihood, 5, generator=seeded()).samples
    torch.testing.assert_close(parts, whole)


# -- FlowDPS -----------------------------------------------------------------------------------------------------------


def test_flow_dps_without_data_steps_is_the_flow_with_fresh_noise() -> None:
    solver = invflow.FlowDPS(prior(), steps=12, data_steps=0)
    levels = solver.levels()
    x = Affine(0.0, 1.0)
    for sigma, after in itertools.pairwise(levels):
        # clean = D(x), noisy = (x - (1 - sigma) D(x)) / sigma
        t = 1 - sigma
        gain = t * STD**2 / (sigma**2 + (t * STD) ** 2)
        shift = MEAN - gain * t * MEAN
        keep = after**1.5 / sigma
        x.step((1 - after) * gain + keep * (1 - t * gain), (1 - after) * shift - keep * t * shift,
               after * math.sqrt(1 - after))
    assert x.agrees(solver.sample(denoising(), COUNT, generator=seeded()).samples)


def test_levels_of_flow_dps_are_shifted() -> None:
    levels = invflow.FlowDPS(prior(), steps=4, shift=4.0).levels()
    assert levels == pytest.approx([1, 4 * 0.75 / (1 + 3 * 0.75), 2 / 2.5, 1 / 1.75, 0])
    assert invflow.FlowDPS(prior(), steps=4, shift=1.0).levels() == pytest.approx([1, 0.75, 0.5, 0.25, 0])


def test_a_data_step_of_flow_dps_is_as_long_as_its_step_size() -> None:
    # one step at sigma = 1: the estimate is the prior's mean whatever the noise, moved towards y, and after is 0
    solver = invflow.FlowDPS(prior(), steps=1, data_steps=1, step_size=0.3)
    samples = solver.sample(denoising(), 3, generator=seeded()).samples
    moved = MEAN + 0.3 / math.sqrt(64)
    torch.testing.assert_close(samples, torch.full_like(samples, moved), rtol=0, atol=1e-4)


def test_flow_dps_stands_still_where_nothing_is_missed() -> None:
    likelihood = invflow.GaussianLikelihood(Denoising(SHAPE), torch.full((1, *SHAPE), MEAN), sigma=NOISE)
    samples = invflow.FlowDPS(prior(), steps=1, data_steps=2, step_size=0.3).sample(likelihood, 2, generator=0).samples
    assert bool(torch.isfinite(samples).all())


# -- DPnP --------------------------------------------------------------------------------------------------------------


def dpnp(etas: list[float], steps: int) -> Affine:
    x = Affine(0.0, (etas[0] / 2) ** 2)
    for eta in etas:
        precision = 1 / eta**2 + 1 / NOISE**2
        x.step(1 / eta**2 / precision, Y / NOISE**2 / precision, precision**-0.5)
        levels = [((1 - k / steps) * eta ** (1 / 7)) ** 7 for k in range(steps + 1)]
        for level, after in itertools.pairwise(levels):
            gain, shift = denoiser(level)
            ratio = (after / level) ** 2
            x.step(ratio + (1 - ratio) * gain, (1 - ratio) * shift, after * math.sqrt(1 - ratio))
    return x


def test_dpnp_makes_what_its_recursion_says() -> None:
    solver = invflow.DPnP(prior(), iterations=8, diffusion_steps=25)
    assert dpnp(solver.etas(), 25).agrees(solver.sample(denoising(), COUNT, generator=seeded()).samples)


def test_dpnp_is_right_as_levels_fall_slowly_and_steps_are_fine() -> None:
    law = dpnp(invflow.DPnP(prior(), iterations=2000, eta_first=0.3, eta_last=0.01).etas(), 400)
    assert law.mean == pytest.approx(0.6, abs=1e-3)
    assert law.variance**0.5 == pytest.approx(STD / 2**0.5, abs=1e-3)
    coarse = dpnp(invflow.DPnP(prior()).etas(), 20)  # at the defaults the likelihood is still blurred by 0.1
    assert coarse.mean < 0.59
    # each coarse diffusion narrows what it draws, and the next one starts from there
    assert coarse.variance < 0.9 * STD**2 / 2


def test_levels_of_dpnp_are_held_then_fall() -> None:
    etas = invflow.DPnP(prior(), iterations=40).etas()
    assert etas[:9] == pytest.approx([1.0] * 9)
    assert etas[-1] == pytest.approx(0.1)
    assert etas[24] / etas[23] == pytest.approx(etas[31] / etas[30])


def test_dpnp_conditions_on_what_a_matrix_measures() -> None:
    flow = invflow.GaussianMixtureFlow(torch.zeros(1, 3), std=1.0)
    matrix = torch.tensor([[1.0, 1.0, 0.0]])
    likelihood = invflow.GaussianLikelihood(MatrixOperator(matrix), torch.tensor([[2.0]]), sigma=0.2)
    solver = invflow.DPnP(flow, iterations=25, eta_first=1.0, eta_last=0.1, diffusion_steps=100)
    x = solver.sample(likelihood, 800, generator=seeded()).samples[0].double()
    mean, covariance = invflow.ExactPosterior(flow).moments(likelihood)
    assert float((x.mean(0) - mean[0]).abs().max()) < 0.15
    assert float((x.T.cov() - covariance[0]).abs().max()) < 0.2


# -- Langevin in noise space -------------------------------------------------------------------------------------------


def langevin(steps: int, h: float) -> Affine:
    """Unadjusted semi-implicit steps: the gradient at z is 2 - z."""
    rho = math.sqrt(1 - h * h)
    x = Affine(0.0, 1.0)
    for _ in range(steps):
        x.step(rho - (1 - rho), 2 * (1 - rho), h)
    x.step(STD, MEAN)
    return x


def test_unadjusted_chains_make_what_their_recursion_says() -> None:
    solver = invflow.NoiseLangevin(prior(), steps=15, step_size=0.6, adjusted=False)
    law = langevin(15, 0.6)
    assert law.agrees(solver.sample(denoising(), COUNT, generator=seeded()).samples)
    stationary = langevin(400, 0.6)
    assert stationary.variance / STD**2 == pytest.approx((1 + 0.8) / (4 * 0.8))  # the bias that a test removes


def test_adjusted_chains_are_exact() -> None:
    solver = invflow.NoiseLangevin(prior(), steps=60, step_size=0.5)
    posterior = solver.sample(denoising(), COUNT, generator=seeded())
    assert Affine(0.6, STD**2 / 2).agrees(posterior.samples)
    assert 0.2 < float(posterior.diagnostics["acceptance"][0]) < 0.99


def test_adaptive_chains_without_adaptation_make_what_their_recursion_says() -> None:
    # decay 1: V stays zero, so that G = 1 / damping
    solver = invflow.NoiseLangevin(prior(), steps=20, step_size=0.4, preconditioner="rmsprop", decay=1.0, damping=2.0)
    x = Affine(0.0, 1.0)
    for _ in range(20):
        x.step(1 - 0.1 * 2, 0.1 * 2, math.sqrt(0.2))
    x.step(STD, MEAN)
    assert x.agrees(solver.sample(denoising(), COUNT, generator=seeded()).samples)


def test_one_adaptive_step_is_that_of_the_formula() -> None:
    solver = invflow.NoiseLangevin(prior(), steps=1, step_size=0.3, preconditioner="rmsprop", decay=0.9, damping=0.1)
    found = solver.sample(denoising(), 4, generator=seeded()).samples
    g = seeded()
    z, xi = (torch.randn(1, 4, *SHAPE, generator=g) for _ in range(2))
    slope = 2 - 2 * z
    scale = 1 / (0.1 + (0.1 * slope**2).sqrt())
    moved = z + 0.15 * scale * slope + (0.3 * scale).sqrt() * xi
    torch.testing.assert_close(found, MEAN + STD * moved, rtol=1e-4, atol=1e-4)


def test_a_black_box_is_refused() -> None:
    reward = invflow.FunctionReward(lambda x: x.flatten(1).sum(1), differentiable=False)
    for solver, other in ((invflow.NoiseLangevin(prior()), "NoiseSMC"), (invflow.DFlow(prior()), "BestOfN")):
        with pytest.raises(ValueError, match=f"use invflow.{other}"):
            solver.sample(reward, 2)


# -- D-Flow ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ode_steps", [6, None])
def test_d_flow_fits_the_measurement_and_its_noise(ode_steps: int | None) -> None:
    posterior = invflow.DFlow(prior(), ode_steps=ode_steps).sample(denoising(2), 3, generator=seeded())
    torch.testing.assert_close(posterior.samples, torch.full_like(posterior.samples, Y), rtol=0, atol=1e-3)
    assert posterior.settings["kind"] == posterior.diagnostics["kind"] == "search"


def test_what_d_flow_does_not_see_stays_at_its_start() -> None:
    operator = BoxInpainting(SHAPE, box=(4, 4))
    hidden = ~operator.observed()[0]
    likelihood = invflow.GaussianLikelihood(operator, torch.full((1, *SHAPE), Y), sigma=NOISE)
    x = invflow.DFlow(prior(), ode_steps=None).sample(likelihood, 200, generator=seeded()).samples[0]
    torch.testing.assert_close(x[:, ~hidden], torch.full_like(x[:, ~hidden], Y), rtol=0, atol=1e-3)
    # the pseudo-inverse is 0 there, which lies at (0 - 0.5) / 0.1 in noise space
    start = Affine(MEAN + STD * math.sqrt(0.1) * (0 - MEAN) / STD, STD**2 * 0.9)
    assert start.agrees(x[:, hidden])


# -- PnP-Flow with the denoiser of a flow map --------------------------------------------------------------------------


@pytest.mark.parametrize("look_ahead", [0.0, 0.3, 1.0])
def test_look_ahead_runs_from_the_mean_to_a_sample(look_ahead: float) -> None:
    solver = invflow.PnPFlow(prior(), steps=6, average=1, look_ahead=look_ahead)
    x = Affine(0.0, 0.0)
    for k in range(6):
        t = k / 6
        x.step(1 - (1 - t), (1 - t) * Y)
        x.step(t, 0.0, 1 - t)
        spread = math.hypot(1 - t, t * STD)
        if look_ahead == 0:
            gain = t * STD**2 / spread**2
            shift = MEAN * (1 - gain * t)
        else:  # X carries t mean + spread u to t' mean + spread' u
            later = t + look_ahead * (1 - t)
            ratio = math.hypot(1 - later, later * STD) / spread
            gain = 1 + (ratio - 1) / look_ahead
            shift = (later - ratio * t) * MEAN / look_ahead
        x.step(gain, shift)
    assert x.agrees(solver.sample(denoising(), COUNT, generator=seeded()).samples)


# -- weighted Diamond Maps ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [0.5, 0.8])
@pytest.mark.parametrize("z", [-1.0, 1.0])
def test_the_gradient_of_the_value_is_that_of_the_closed_form(t: float, z: float) -> None:
    """One pixel, whose image given its state is Gaussian: V = log N(y; D(x), variance + sigma^2)."""
    variance = t**2 * STD**2 + (1 - t) ** 2
    gain = t * STD**2 / variance
    x = t * MEAN + z * math.sqrt(variance)
    left = STD**2 * (1 - gain * t)
    exact = gain * (Y - MEAN - gain * (x - t * MEAN)) / (left + NOISE**2)
    found, error = diamond_gradient(x, t, "density")
    assert abs(found - exact) < 4 * error + 0.01 * abs(exact)  # the mean of ratios is off by 1 / particles
    published, error = diamond_gradient(x, t, "published")  # with the score at t in the place of that at t'
    assert abs(published - exact) > 8 * error


def diamond_gradient(x: float, t: float, weights: str, particles: int = 2000, count: int = 400) -> tuple[float, float]:
    one = invflow.GaussianMixtureFlow(torch.full((1, 1, 1, 1), MEAN, dtype=torch.float64), std=STD)
    y = torch.full((count, 1, 1, 1), Y, dtype=torch.float64)
    likelihood = invflow.GaussianLikelihood(Denoising((1, 1, 1)), y, sigma=NOISE)
    noise = RowNoise(RowNoise.seeds(count, seeded()), slice(0, count), torch.device("cpu"))
    solver = invflow.WeightedDiamondMaps(one, particles=particles, weights=weights)
    states = torch.full((count, 1, 1, 1), x, dtype=torch.float64)
    values = solver._value_gradient(Rows(likelihood, None, noise), states, t, one.score(states, t))
    return float(values.mean()), float(values.std()) / math.sqrt(count)


def test_diamond_maps_go_back_by_the_ratio_of_signal_to_noise() -> None:
    solver = invflow.WeightedDiamondMaps(prior(), snr=9.0)
    before, factor, spread = solver.earlier(0.6)
    assert (before / (1 - before)) ** 2 == pytest.approx((0.6 / 0.4) ** 2 / 9)
    # noise added to t m + (1 - t) z gives t' m + (1 - t') z'
    assert (factor * 0.6, math.hypot(factor * 0.4, spread)) == pytest.approx((before, 1 - before))


def test_diamond_maps_with_many_particles_sample_the_posterior_of_a_pixel() -> None:
    one = invflow.GaussianMixtureFlow(torch.full((1, 1, 1, 1), MEAN), std=STD)
    likelihood = invflow.GaussianLikelihood(Denoising((1, 1, 1)), torch.full((1, 1, 1, 1), Y), sigma=NOISE)
    solver = invflow.WeightedDiamondMaps(one, particles=64, snr=20.0)
    samples = solver.sample(likelihood, 400, generator=0).samples.double()
    assert abs(float(samples.mean()) - 0.6) < 0.011  # three standard errors
    assert 0.055 < float(samples.std()) < 0.0757  # 0.0707, two standard errors above; 50 Euler steps make it 0.060


# -- the contract ------------------------------------------------------------------------------------------------------

MAKERS = {
    "daps": lambda p: invflow.DAPS(p, steps=4, ode_steps=2, langevin_steps=3, sigma_max=2.0, step_size=1e-3),
    "flow-dps": lambda p: invflow.FlowDPS(p, steps=4, step_size=0.1),
    "dpnp": lambda p: invflow.DPnP(p, iterations=3, diffusion_steps=3),
    "diamond": lambda p: invflow.WeightedDiamondMaps(p, steps=4, particles=2),
    "d-flow": lambda p: invflow.DFlow(p, iterations=3, ode_steps=2),
    "sgld": lambda p: invflow.NoiseLangevin(p, steps=4, preconditioner="rmsprop"),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", MAKERS)
def test_contract(name: str) -> None:
    check_solver(MAKERS[name], exact=False, num_samples=24)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_long_adjusted_chains_pass_as_exact() -> None:
    check_solver(lambda p: invflow.NoiseLangevin(p, steps=60, step_size=0.5), num_samples=64)


@pytest.mark.parametrize(("build", "words"), [
    (lambda p: invflow.DAPS(p, steps=0), "at least"), (lambda p: invflow.DAPS(p, sigma_min=200.0), "under sigma_max"),
    (lambda p: invflow.DAPS(p, step_ratio=2.0), "step_ratio=2.0"), (lambda p: invflow.FlowDPS(p, shift=0.0), "shift=0"),
    (lambda p: invflow.WeightedDiamondMaps(p, snr=1.0), "over 1"),
    (lambda p: invflow.WeightedDiamondMaps(p, weights="all"), "density, published, reward"),
    (lambda p: invflow.DPnP(p, eta_last=2.0), "eta_last=2.0"), (lambda p: invflow.DFlow(p, blend=2.0), "blend=2.0"),
    (lambda p: invflow.NoiseLangevin(p, step_size=1.5), "under 1"),
    (lambda p: invflow.PnPFlow(p, look_ahead=2), "0 for the mean"),
    (lambda p: invflow.NoiseLangevin(p, preconditioner="none"), "prior, rmsprop")])
def test_settings_out_of_range(build: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build(prior())  # type: ignore[operator]
