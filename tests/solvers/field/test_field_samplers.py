"""Existing samplers on Gaussians, where the truth is known and linear recursions give the result of each method.

Prior N(0.5, 0.1^2) for each of 64 pixels, y = 0.7 with noise 0.1: the posterior of each is N(0.6, 0.0707^2).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import invflow
from invflow.linear.structure import find_system, regularised_solution
from invflow.operators import BoxInpainting, Denoising, MatrixOperator, MotionBlur, RandomInpainting, SuperResolution
from invflow.solvers.field.ddrm import DDRM
from invflow.solvers.field.diffpir import DiffPIR
from invflow.solvers.field.dps import DPS
from invflow.solvers.field.flower import Flower
from invflow.solvers.field.langevin import ULA
from invflow.solvers.field.moment_matching import MomentMatching
from invflow.solvers.field.pigdm import PiGDM
from invflow.solvers.field.pnp_flow import PnPFlow
from invflow.solvers.tilting.twisted_diffusion import TwistedDiffusion
from invflow.testing import check_solver

SHAPE = (1, 8, 8)
PRIOR = (0.5, 0.1)
TRUTH = (0.6, 0.1 / math.sqrt(2))
NOISE, Y, COUNT = 0.1, 0.7, 128


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussian(shape: tuple[int, ...] = SHAPE, std: float = PRIOR[1], **options: object) -> invflow.GaussianMixtureFlow:
    return invflow.GaussianMixtureFlow(torch.full((1, *shape), PRIOR[0]), std=std, **options)


def denoising(observations: int = 1) -> invflow.GaussianLikelihood:
    return invflow.GaussianLikelihood(Denoising(SHAPE), torch.full((observations, *SHAPE), Y), sigma=NOISE)


def moments(solver: invflow.Solver) -> tuple[float, float]:
    """Mean and standard deviation over all samples and pixels, which are alike."""
    samples = solver.sample(denoising(), COUNT, generator=seeded()).samples.double()
    return float(samples.mean()), float(samples.std())


def close(found: tuple[float, float], wanted: tuple[float, float], errors: float = 4.5) -> bool:
    """Within standard errors of COUNT x 64 independent draws."""
    n = COUNT * 64
    off_mean = abs(found[0] - wanted[0]) / (wanted[1] / math.sqrt(n))
    off_std = abs(found[1] - wanted[1]) / (wanted[1] / math.sqrt(2 * n))
    return off_mean < errors and off_std < errors


# -- what linear recursions say ----------------------------------------------------------------------------------------


class Affine:
    """A Gaussian scalar that goes through affine maps: x becomes gain x + shift + noise xi."""

    def __init__(self, mean: float, variance: float) -> None:
        self.mean, self.variance = mean, variance

    def step(self, gain: float, shift: float, noise: float = 0.0) -> None:
        self.mean, self.variance = gain * self.mean + shift, gain**2 * self.variance + noise**2

    @property
    def moments(self) -> tuple[float, float]:
        return self.mean, math.sqrt(self.variance)


def bars(steps: int) -> list[float]:
    """alpha bar of the papers' diffusion at steps from 0 on, and 1 before them."""
    found = [1.0]
    for k in range(1000):
        found.append(found[-1] * (1 - 1e-4 - 0.0199 * k / 999))
    return [1.0, *(found[1 + k * 1000 // steps] for k in range(steps))]


def pigdm(steps: int) -> tuple[float, float]:
    """The paper's, with eta 1, for images in [0, 1] as 0.5 + x / 2."""
    x, y, tau, sigma = Affine(0.0, 1.0), 2 * Y - 1, 2 * PRIOR[1], 2 * NOISE
    levels = bars(steps)
    for bar, after in zip(levels[:0:-1], levels[-2::-1]):
        gain = math.sqrt(bar) * tau**2 / (bar * tau**2 + 1 - bar)  # the denoised image is gain x
        fresh = (1 - bar / after) * (1 - after) / (1 - bar)
        kept = math.sqrt(max(1 - after - fresh, 0) / (1 - bar))
        push = math.sqrt(after * bar) * (1 - bar) * gain / (1 - bar + sigma**2)
        x.step(math.sqrt(after) * gain + kept * (1 - math.sqrt(bar) * gain) - push * gain, push * y, math.sqrt(fresh))
    return 0.5 + x.mean / 2, math.sqrt(x.variance) / 2


def moment_matching(steps: int) -> tuple[float, float]:
    """The paper's, which for a Gaussian has the posterior's own denoiser."""
    x, levels = Affine(0.0, 100.0**2), [100 * 1e-5 ** (k / (steps - 1)) for k in range(steps)]
    precision = (1 / PRIOR[1] ** 2 + 1 / NOISE**2) / 4
    for level, after in zip(levels, [*levels[1:], 0.0]):
        gain = 1 / (1 + precision * level**2)
        share = 1 - (after / level) ** 2
        x.step(1 - share * (1 - gain), share * (1 - gain) * (2 * TRUTH[0] - 1), after * math.sqrt(share))
    return 0.5 + x.mean / 2, math.sqrt(x.variance) / 2


def ddrm(steps: int) -> tuple[float, float]:
    eta, c, blur = 0.85, math.sqrt(1 - 0.85**2), 2 * NOISE
    levels = [math.sqrt(1 / bar - 1) for bar in bars(steps)[:0:-1]]
    x = Affine(2 * Y - 1, levels[0] ** 2 - blur**2)
    for level, after in zip(levels, [*levels[1:], None]):
        k = (2 * PRIOR[1]) ** 2 / ((2 * PRIOR[1]) ** 2 + level**2)
        x.step(k, 0.0)
        if after is not None and after < blur:
            x.step(1 - c * after / blur, c * after / blur * (2 * Y - 1), eta * after)
        elif after is not None:
            x.step(0.0, 2 * Y - 1, math.sqrt(after**2 - blur**2))
    return 0.5 + x.mean / 2, math.sqrt(x.variance) / 2


def guided_diffusion(steps: int, curvature: Callable[[float, float], float]) -> tuple[float, float]:
    """deepinv's variance-preserving ancestral sampling with a likelihood score -k (D - y) / curvature(sigma, k)."""
    levels = []
    for i in range(steps + 1):
        t = 1 - i / steps
        levels.append(math.sqrt(math.exp(0.1 * t + 0.5 * 19.9 * t**2) - 1) / 2)  # of images in [0, 1]
    x = Affine(0.5, levels[0] ** 2)
    for before, after in itertools.pairwise(levels):
        k = PRIOR[1] ** 2 / (PRIOR[1] ** 2 + before**2)
        ratio = (after / before) ** 2
        # the score of x: (D - x) / sigma^2 - k (D - y) / c, D = 0.5 + k (x - 0.5)
        slope = (k - 1) / before**2 - k * k / curvature(before, k)
        offset = (0.5 - 0.5 * k) / before**2 - k * (0.5 - 0.5 * k - Y) / curvature(before, k)
        weight = before**2 * (1 - ratio)
        x.step(1 + weight * slope, weight * offset, after * math.sqrt(1 - ratio))
    return x.moments


def flower(steps: int, spread: float, sampling: bool) -> tuple[float, float]:
    x = Affine(0.0, 1.0)
    for i in range(steps):
        t, after = i / steps, (i + 1) / steps
        gain = t * PRIOR[1] ** 2 / ((1 - t) ** 2 + (t * PRIOR[1]) ** 2)
        precision = 1 / ((spread * (1 - t)) ** 2 / ((1 - t) ** 2 + (spread * t) ** 2))
        total = precision + 1 / NOISE**2
        x.step(gain, 0.5 - gain * t * 0.5)
        x.step(precision / total, Y / NOISE**2 / total, 1 / math.sqrt(total) if sampling else 0.0)
        x.step(after, 0.0, 1 - after)
    return x.moments


def pnp_flow(steps: int, average: int) -> tuple[float, float]:
    x = Affine(0.0, 0.0)
    for i in range(steps):
        t = i / steps
        gain = t * PRIOR[1] ** 2 / ((1 - t) ** 2 + (t * PRIOR[1]) ** 2)
        x.step(1 - (1 - t), (1 - t) * Y)
        x.step(t, 0.0, (1 - t) / math.sqrt(average))
        x.step(gain, 0.5 - gain * t * 0.5)
    return x.moments


def ddrm_deepinv(steps: int) -> tuple[float, float]:
    """Its noise is divided by the root of two, as in deepinv 0.5."""
    eta, c = 0.85, math.sqrt(1 - 0.85**2)
    levels = [1 - i / (steps - 1) for i in range(steps)]
    x = Affine(Y, (1 - NOISE**2) / 2)
    for sigma in levels[1:]:
        previous = levels[levels.index(sigma) - 1]
        k = PRIOR[1] ** 2 / (PRIOR[1] ** 2 + previous**2)
        x.step(k, 0.5 - 0.5 * k)
        if sigma < NOISE:
            x.step(1 - c * sigma / NOISE, c * sigma / NOISE * Y, eta * sigma / math.sqrt(2))
        else:
            x.step(0.0, Y, math.sqrt(max(sigma**2 - NOISE**2, 0)) / math.sqrt(2))
    return x.moments


def langevin(step: float, blur: float) -> tuple[float, float]:
    """Stationary law of the unadjusted chain, whose prior is blurred by the denoiser's noise."""
    precision = 1 / (PRIOR[1] ** 2 + blur**2)
    total = precision + 1 / NOISE**2
    size = step / (1 / blur**2 + 1 / NOISE**2)
    size = 2 ** (math.floor(8 * math.log2(size)) / 8)
    return (precision * 0.5 + Y / NOISE**2) / total, math.sqrt(1 / total / (1 - size * total / 2))


RECURSIONS = {
    "dps, deepinv": (lambda p: DPS(p, steps=100, guidance="annealed", variant="deepinv"),
                     guided_diffusion(100, lambda s, k: NOISE**2 + s**2)),
    "pigdm": (PiGDM, pigdm(100)),
    "pigdm, deepinv": (lambda p: PiGDM(p, steps=100, variant="deepinv"),
                       guided_diffusion(100, lambda s, k: NOISE**2 + s**2 / (1 + s**2))),
    "moment-matching": (MomentMatching, moment_matching(256)),
    "moment-matching, deepinv": (lambda p: MomentMatching(p, steps=100, variant="deepinv"),
                                 guided_diffusion(100, lambda s, k: NOISE**2 + s**2 * k)),
    "ddrm": (DDRM, ddrm(20)),
    "ddrm, deepinv": (lambda p: DDRM(p, steps=60, variant="deepinv"), ddrm_deepinv(60)),
    "ula": (lambda p: ULA(p, burn_in=150, step=0.3, denoiser_sigma=0.05), langevin(0.3, 0.05)),
    "pnp-flow": (lambda p: PnPFlow(p, steps=50, average=2), pnp_flow(50, 2)),
    "flower": (lambda p: Flower(p, steps=50), flower(50, 1.0, True)),
    "flower mean": (lambda p: Flower(p, steps=50, sampling=False), flower(50, 1.0, False)),
    "flower right": (lambda p: Flower(p, steps=4, spread=0.1), TRUTH),
}


@pytest.mark.parametrize("name", RECURSIONS)
def test_each_makes_what_its_recursion_says(name: str) -> None:
    make, wanted = RECURSIONS[name]
    found = moments(make(gaussian()))
    assert close(found, wanted), (found, wanted)


def test_moment_matching_is_right() -> None:
    errors = [abs(moment_matching(n)[1] - TRUTH[1]) for n in (200, 400, 800)]
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.2)  # what is left is discretisation, first order
    assert errors[1] / errors[2] == pytest.approx(2, rel=0.2)
    found = moments(MomentMatching(gaussian(), steps=1000, iterations=1))
    assert found[0] == pytest.approx(0.600, abs=0.003)
    assert found[1] == pytest.approx(0.0707, abs=0.003)


def test_deepinvs_dps_hardly_sees_the_measurement_by_default() -> None:
    mean, std = moments(DPS(gaussian(), variant="deepinv"))
    assert mean < 0.51
    assert std > 0.09
    heavy = moments(DPS(gaussian(), steps=200, weight=100.0, variant="deepinv"))
    assert 0.57 < heavy[0] < 0.7
    assert heavy[1] < 0.08
    # the paper's takes the noise for truth: 64 measurements pull with a step of fixed length
    mean, std = moments(DPS(gaussian()))
    assert mean == pytest.approx(Y, abs=0.005)
    assert std < 0.04


# -- operators ---------------------------------------------------------------------------------------------------------


def mixed_problem(kind: str, dtype: torch.dtype = torch.float32) -> invflow.GaussianLikelihood:
    """Three observations with their own operators and noise levels."""
    g = seeded(1)
    operator = {
        "masks": lambda: RandomInpainting(SHAPE, generator=g).randomize(3, g),
        "blurs": lambda: MotionBlur(SHAPE, kernel_size=5, generator=g).randomize(3, g),
        "pooling": lambda: SuperResolution(SHAPE, factor=4),
        "matrices": lambda: MatrixOperator(torch.randn(3, 5, 64, generator=g) / 8, SHAPE),
        "tall": lambda: MatrixOperator(torch.randn(80, 64, generator=g) / 8, SHAPE),
        "negative": lambda: MatrixOperator(-torch.eye(64), SHAPE),
    }[kind]()
    truth = PRIOR[0] + PRIOR[1] * torch.randn(3, *SHAPE, generator=g)
    sigma = torch.tensor([0.05, 0.1, 0.2])
    y = operator.measure(truth, sigma, generator=g)
    return invflow.GaussianLikelihood(operator, y, sigma).to(dtype)


KINDS = ["masks", "blurs", "pooling", "matrices", "tall", "negative"]


@pytest.mark.parametrize("kind", KINDS)
def test_singular_systems(kind: str) -> None:
    likelihood = mixed_problem(kind, torch.float64)
    system = find_system(likelihood)
    assert system is not None
    structured = {"masks": "_Diagonal", "blurs": "_Circular"}
    assert type(system).__name__ == structured.get(kind, "_Dense")
    system = system.select(torch.tensor([0, 1, 2]))
    x = torch.randn(3, *SHAPE, generator=seeded(2), dtype=torch.float64)
    y = torch.randn(3, *likelihood.operator.measurement_shape, generator=seeded(3), dtype=torch.float64)
    observed = likelihood.operator.observed()
    y = y if observed is None else y * observed
    z = system.v_adjoint(x)
    torch.testing.assert_close(system.v(z), x)  # V is orthogonal
    torch.testing.assert_close(z.square().sum(1), x.square().flatten(1).sum(1))
    torch.testing.assert_close(system.u(system.values * z), likelihood.operator(x))
    torch.testing.assert_close(system.v(system.values * system.u_adjoint(y)), likelihood.operator.adjoint(y))
    solved = regularised_solution(likelihood, system, x, y, 0.3, scale=0.5)
    iterated = regularised_solution(likelihood, None, x, y, 0.3, scale=0.5, iterations=200)
    torch.testing.assert_close(solved, iterated)


@pytest.mark.parametrize(("name", "kind"), [*(("flower", kind) for kind in KINDS), ("moment-matching", "blurs"),
                                            ("moment-matching", "matrices")])
def test_right_methods_are_right_for_any_linear_operator(name: str, kind: str) -> None:
    # decoding is affine here, and states have unit variance
    prior = invflow.from_velocity(lambda x, t: (2 * t - 1).reshape(-1, 1, 1, 1) / ((1 - t) ** 2 + t**2).reshape(
        -1, 1, 1, 1) * x, SHAPE, steps=1, decode=(PRIOR[1], PRIOR[0]))
    solver = {"flower": lambda: Flower(prior, steps=3),
              "moment-matching": lambda: MomentMatching(prior, steps=600, iterations=6)}[name]()
    likelihood = mixed_problem(kind)
    mean, covariance = invflow.ExactPosterior(gaussian()).moments(likelihood)
    samples = solver.sample(likelihood, 80, generator=seeded()).samples.flatten(2)
    # in the eigenvectors of the exact covariance the posterior is white
    values, vectors = torch.linalg.eigh(covariance)
    z = torch.einsum("bnd,bde->bne", samples - mean.flatten(1)[:, None], vectors) / values.sqrt()[:, None]
    n = z.shape[1]
    slack = 0.0 if name == "flower" else 0.08  # discretisation
    assert float((z.mean(1).square().mean() - 1 / n).abs()) < 5 * math.sqrt(2 / 192) / n + slack**2
    assert float((z.var(1).mean() - 1).abs()) < 5 * math.sqrt(2 / (192 * n)) + 2 * slack
    assert float((z.var(1) - 1).abs().max()) < 5.5 * math.sqrt(2 / n) + 2 * slack


def test_noise_levels_are_each_observations_own() -> None:
    likelihood = mixed_problem("masks")
    alone = likelihood.select([2])
    for solver in (DPS(gaussian(), steps=20), DiffPIR(gaussian(), steps=20), DDRM(gaussian(), steps=20),
                   ULA(gaussian(), burn_in=20), Flower(gaussian(), steps=5)):
        # the last of three, in the place of the first: rows have noise by their place
        together = likelihood.select([2, 1, 0])
        first = solver.sample(together, 16, generator=seeded()).samples[0]
        torch.testing.assert_close(first, solver.sample(alone, 16, generator=seeded()).samples[0], atol=2e-5, rtol=1e-4)


# -- the contract ------------------------------------------------------------------------------------------------------


def small_problem() -> dict[str, object]:
    prior = invflow.GaussianMixtureFlow(torch.tensor([[0.5, 0.3]]), std=0.2)
    operator = MatrixOperator(torch.tensor([[1.0, 0.5]]))
    y = torch.tensor([[0.9], [0.4], [0.6]])
    return {"prior": prior, "likelihood": invflow.GaussianLikelihood(operator, y, 0.2)}


MAKERS = {
    "dps": lambda p: DPS(p, steps=10),
    "dps-annealed": lambda p: DPS(p, steps=10, guidance="annealed", variant="deepinv"),
    "pigdm": lambda p: PiGDM(p, steps=10), "moment-matching": lambda p: MomentMatching(p, steps=10),
    "diffpir": lambda p: DiffPIR(p, steps=10), "ddrm": lambda p: DDRM(p, steps=10),
    "ula": lambda p: ULA(p, burn_in=10, thinning=2, chains=8), "pnp-flow": lambda p: PnPFlow(p, steps=5),
    "flower": lambda p: Flower(p, steps=5),
    **{f"{kind.__name__} of deepinv": lambda p, kind=kind: kind(p, steps=10, variant="deepinv")
       for kind in (DPS, PiGDM, MomentMatching, DiffPIR, DDRM)},
}


@pytest.mark.parametrize("name", MAKERS)
def test_contract(name: str) -> None:
    check_solver(MAKERS[name], exact=False, num_samples=24, **small_problem())


def test_calls_are_counted() -> None:
    likelihood = denoising(2)
    calls = {name: MAKERS[name](gaussian()).sample(likelihood, 8).nfe for name in MAKERS}
    assert calls["dps"] == invflow.NFE(10.0, 10.0)
    assert calls["pigdm"] == invflow.NFE(10.0, 10.0)
    assert calls["moment-matching"] == invflow.NFE(10.0, 20.0)  # an iteration, the gradient
    assert calls["MomentMatching of deepinv"] == invflow.NFE(10.0, 30.0)  # and the first residual
    assert calls["diffpir"] == invflow.NFE(9.0, 0.0)
    assert calls["DiffPIR of deepinv"] == invflow.NFE(10.0, 0.0)
    assert calls["ddrm"] == invflow.NFE(10.0, 0.0)
    assert calls["ula"] == invflow.NFE(12.0, 0.0)
    assert calls["pnp-flow"] == invflow.NFE(25.0, 0.0)
    assert calls["flower"] == invflow.NFE(5.0, 0.0)


def test_value_range_moves_the_methods_to_other_data() -> None:
    # ten times the problem, at another place: the same answer, but for the range
    prior = invflow.GaussianMixtureFlow(torch.full((1, *SHAPE), 25.0), std=1.0)
    likelihood = invflow.GaussianLikelihood(Denoising(SHAPE), torch.full((1, *SHAPE), 27.0), sigma=1.0)
    for make in (lambda p, r: MomentMatching(p, steps=50, value_range=r), lambda p, r: DiffPIR(p, value_range=r),
                 lambda p, r: DDRM(p, value_range=r), lambda p, r: DPS(p, steps=50, value_range=r),
                 lambda p, r: PiGDM(p, value_range=r),
                 lambda p, r: DPS(p, steps=50, value_range=r, guidance="annealed", variant="deepinv")):
        solver = make(prior, (20.0, 30.0))
        moved = solver.sample(likelihood, 8, generator=seeded()).samples
        if solver.settings().get("guidance"):  # its variance adds a noise level of images to one of measurements
            assert float(moved.mean()) == pytest.approx(26, abs=0.5)
            continue
        plain = make(gaussian(), (0.0, 1.0)).sample(denoising(), 8, generator=seeded()).samples
        torch.testing.assert_close((moved - 20) / 10, plain, atol=2e-4, rtol=0)


def test_range_of_images_shifts_any_linear_operator() -> None:
    likelihood = mixed_problem("pooling")
    for form in ("paper", "deepinv"):
        plain = PiGDM(gaussian(), steps=20, variant=form).sample(likelihood, 64, generator=seeded())
        shifted = PiGDM(gaussian(), steps=20, variant=form, value_range=(0.2, 1.2)).sample(likelihood, 64,
                                                                                          generator=seeded())
        assert float((plain.mean() - shifted.mean()).abs().mean()) < 0.03


def test_refusals() -> None:
    prior, likelihood = gaussian(), denoising()
    entangled = gaussian()
    entangled.independent_noise = False
    jumping = gaussian()
    jumping.has_velocity = False
    for make in (*MAKERS.values(), lambda p: TwistedDiffusion(p)):
        with pytest.raises(ValueError, match="NoiseSMC"):
            make(jumping)
        if isinstance(make(prior), (PnPFlow, Flower)):  # of which a denoiser is enough, whatever couples the noise
            assert make(entangled).prior is entangled
        else:
            with pytest.raises(ValueError, match="NoiseSMC"):
                make(entangled)
        with pytest.raises(TypeError, match="load_prior"):
            make(torch.nn.Identity())
    flat = invflow.GaussianMixtureFlow(torch.full((1, 64), 0.5), std=0.1, image_shape=SHAPE)
    with pytest.raises(ValueError, match="affine"):
        DPS(flat)
    assert PnPFlow(flat, steps=2).sample(likelihood, 2).samples.shape == (1, 2, *SHAPE)
    with pytest.raises(TypeError, match="GaussianLikelihood"):
        DPS(prior).sample(invflow.FunctionReward(lambda x: x.flatten(1).sum(1)), 2)
    curved = Squares()
    curved_likelihood = invflow.GaussianLikelihood(curved, torch.full((1, *SHAPE), 0.36), sigma=0.05)
    for make in (PiGDM, MomentMatching, DiffPIR, DDRM, ULA, Flower):
        with pytest.raises(ValueError, match=r"linear.*invflow\.DPS"):
            make(prior).sample(curved_likelihood, 2)
    found = DPS(prior, steps=100).sample(curved_likelihood, 64, generator=seeded())
    assert float(found.mean().mean()) == pytest.approx(0.6, abs=0.02)  # the prior is forgotten: the root of 0.36
    annealed = DPS(prior, steps=100, guidance="annealed", variant="deepinv")
    found = annealed.sample(curved_likelihood, 64, generator=seeded())
    assert float(found.mean().mean()) == pytest.approx(0.585, abs=0.02)  # of y = x^2: the root of 0.36 is 0.6


def test_ddrm_says_where_it_cannot_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("invflow.linear.structure._MOST_SINGULAR", 100)
    with pytest.raises(ValueError, match="DPS"):
        DDRM(gaussian()).sample(mixed_problem("pooling"), 2)
    # the others then solve by iteration
    solvers = (DiffPIR(gaussian(), steps=10), PiGDM(gaussian(), steps=10), Flower(gaussian(), steps=4))
    iterated = [solver.sample(mixed_problem("pooling"), 4, generator=seeded()).samples for solver in solvers]
    monkeypatch.undo()
    for solver, samples in zip(solvers, iterated):
        found = solver.sample(mixed_problem("pooling"), 4, generator=seeded()).samples
        torch.testing.assert_close(found, samples, atol=2e-3, rtol=0)


def test_inpainting_keeps_what_is_seen_and_spreads_where_it_is_not() -> None:
    operator = BoxInpainting(SHAPE, box=(4, 4))
    likelihood = invflow.GaussianLikelihood(operator, torch.full((1, *SHAPE), 0.65), sigma=0.01)
    hidden = ~operator.observed()[0]
    for make in (lambda p: PiGDM(p, steps=200), lambda p: Flower(p), lambda p: DDRM(p, steps=200)):
        posterior = make(gaussian()).sample(likelihood, 64, generator=seeded())
        std, mean = posterior.std()[0], posterior.mean()[0]
        assert float((mean[~hidden] - 0.65).abs().mean()) < 0.02
        assert float(std[~hidden].mean()) < 0.02
        assert float((mean[hidden] - 0.5).abs().mean()) < 0.03
        assert float(std[hidden].mean()) > 0.04


class Squares(invflow.Operator):
    """y = x^2, entry by entry."""

    linear = False

    def __init__(self) -> None:
        super().__init__()
        self.image_shape = self.measurement_shape = SHAPE

    def forward(self, x: Tensor) -> Tensor:
        return x.square()
