"""Each existing sampler against its authors' algorithm, written here in plain arithmetic on a toy denoiser.

Images have three pixels in [-1, 3], which the papers see as [-1, 1]. The prior is a mixture of two Gaussians, so the
denoiser is nonlinear. Two of three combinations are measured. Both sides use the same stream of noise, so their
numbers agree up to rounding.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import invflow
from invflow.operators import MatrixOperator
from invflow.solvers.field.rows import RowNoise

F64 = torch.float64
LOW, HIGH = -1.0, 3.0
HALF, MID = (HIGH - LOW) / 2, (HIGH + LOW) / 2
MEANS, SPREAD = torch.tensor([[0.2, 0.6, 2.0], [1.5, 2.2, 0.4]], dtype=F64), 0.5
MATRIX = torch.tensor([[1.0, 0.3, -0.2], [0.1, -0.8, 0.6]], dtype=F64)
SIGMA = 0.3
Y = torch.tensor([[0.5, 0.7], [0.2, -0.4], [1.4, -1.0]], dtype=F64)
COUNT = 4  # samples of each of three observations

Noise = Callable[[], Tensor]


def prior() -> invflow.GaussianMixtureFlow:
    return invflow.GaussianMixtureFlow(MEANS, std=SPREAD).double()


def likelihood() -> invflow.GaussianLikelihood:
    return invflow.GaussianLikelihood(MatrixOperator(MATRIX, image_shape=(3,)), Y, sigma=SIGMA)


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Noise]:
    """Samplers draw from a stream that starts anew; so does what is returned, noise of three numbers for each row."""
    def start(size: int = 3) -> Noise:
        for side in ("sampler", "formula"):
            sources[side] = torch.Generator().manual_seed(8)
        return lambda: torch.randn(len(Y) * COUNT, size, generator=sources["formula"], dtype=F64)

    sources: dict[str, torch.Generator] = {}
    monkeypatch.setattr(RowNoise, "__call__", lambda self, like: torch.randn(
        like.shape, generator=sources["sampler"], dtype=F64).to(like))
    return start


def drawn(solver: invflow.Solver) -> Tensor:
    """One row for each sample."""
    return solver.sample(likelihood(), COUNT, generator=0).samples.flatten(0, 1)


# -- what the papers know ----------------------------------------------------------------------------------------------


MU, TAU = (MEANS - MID) / HALF, SPREAD / HALF
OBSERVED = ((Y - MID * MATRIX.sum(1)) / HALF).repeat_interleave(COUNT, 0)  # y = A x + noise, for x in [-1, 1]
S = SIGMA / HALF


def denoise(x: Tensor, level: float | Tensor) -> Tensor:
    """E[x_0 | x_0 + level z = x], for images in [-1, 1]."""
    total = TAU**2 + level**2
    apart = x[:, None] - MU
    shares = (-apart.square().sum(-1) / (2 * total)).softmax(1)
    return (shares[..., None] * (MU + TAU**2 / total * apart)).sum(1)


def image(x: Tensor) -> Tensor:
    return MID + HALF * x


def bars(steps: int, spacing: str) -> list[float]:
    """alpha bar of 1,000 training steps, at the times that a paper visits, growing noise."""
    all_of_them, product = [], 1.0
    for k in range(1000):
        product *= 1 - (1e-4 + (0.02 - 1e-4) * k / 999)
        all_of_them.append(product)
    if spacing == "both ends":
        return [all_of_them[round(k * 999 / (steps - 1))] for k in range(steps)]
    return [all_of_them[t] for t in range(0, 1000, 1000 // steps)]


def jacobian(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """d function_i / d x_j of each row, ``(n, i, j)``."""
    return torch.stack([torch.autograd.functional.jacobian(lambda row: function(row[None])[0], row) for row in x])


def gradient(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(function(leaf).sum(), leaf)[0]


# -- the algorithms ----------------------------------------------------------------------------------------------------


def dps(noise: Noise, steps: int, zeta: float, clip: bool) -> Tensor:
    """Chung et al. (2023), algorithm 1, with the step size of their section on hyperparameters."""
    alpha_bar = [1.0, *bars(steps, "both ends")]
    x = noise()
    for i in range(steps, 0, -1):
        alpha = alpha_bar[i] / alpha_bar[i - 1]
        beta = 1 - alpha

        def x0(x: Tensor, bar: float = alpha_bar[i]) -> Tensor:
            score = (denoise(x / math.sqrt(bar), math.sqrt(1 / bar - 1)) * math.sqrt(bar) - x) / (1 - bar)
            found = (x + (1 - bar) * score) / math.sqrt(bar)
            return found.clamp(-1, 1) if clip else found

        prime = (math.sqrt(alpha) * (1 - alpha_bar[i - 1]) / (1 - alpha_bar[i]) * x
                 + math.sqrt(alpha_bar[i - 1]) * beta / (1 - alpha_bar[i]) * x0(x))
        if i > 1:
            prime = prime + math.sqrt((1 - alpha_bar[i - 1]) / (1 - alpha_bar[i]) * beta) * noise()
        x = prime - zeta * gradient(lambda x: (OBSERVED - x0(x) @ MATRIX.T).square().sum(1).sqrt(), x)
    return image(x)


def pigdm(noise: Noise, steps: int, eta: float) -> Tensor:
    """Song et al. (2023), algorithm 1, with the weights of the authors' later code (Mardani et al. 2023)."""
    alpha = [1.0, *bars(steps, "from zero")]
    x = noise()
    for i in range(steps, 0, -1):
        at, as_ = alpha[i], alpha[i - 1]

        def x0(x: Tensor, at: float = at) -> Tensor:
            return denoise(x / math.sqrt(at), math.sqrt(1 / at - 1))

        found, r2 = x0(x), 1 - at
        inner = torch.linalg.solve(r2 * MATRIX @ MATRIX.T + S**2 * torch.eye(2), (OBSERVED - found @ MATRIX.T).T).T
        g = r2 * torch.einsum("ni,nij->nj", inner @ MATRIX, jacobian(x0, x))
        c1 = eta * math.sqrt((1 - at / as_) * (1 - as_) / (1 - at))
        c2 = math.sqrt(1 - as_ - c1**2) if as_ < 1 else 0.0
        e = (x - math.sqrt(at) * found) / math.sqrt(1 - at)
        x = math.sqrt(as_) * found + c2 * e + math.sqrt(as_) * math.sqrt(at) * g
        if c1 > 0:
            x = x + c1 * noise()
    return image(x)


def moment_matching(noise: Noise, steps: int) -> Tensor:
    """Rozet et al. (2024): DDPM with the posterior's denoiser; the linear systems solved exactly."""
    def posterior_mean(x: Tensor, level: float) -> Tensor:
        j = jacobian(lambda x: denoise(x, level), x)
        v = S**2 * torch.eye(2) + level**2 * MATRIX @ j @ MATRIX.T
        found = denoise(x, level)
        inner = torch.linalg.solve(v, OBSERVED - found @ MATRIX.T)
        return found + level**2 * torch.einsum("nij,ni->nj", j, inner @ MATRIX)

    def sigma(t: float) -> float:
        return math.exp(math.log(1e-3) * (1 - t) + math.log(1e2) * t)

    x = sigma(1.0) * noise()
    for k in range(steps - 1):
        t, s = 1 - k / (steps - 1), 1 - (k + 1) / (steps - 1)
        tau = 1 - sigma(s) ** 2 / sigma(t) ** 2
        x = x - tau * (x - posterior_mean(x, sigma(t))) + sigma(s) * math.sqrt(tau) * noise()
    return image(posterior_mean(x, sigma(0.0)))


def diffpir(noise: Noise, steps: int, lambda_: float, zeta: float) -> Tensor:
    """Zhu et al. (2023), algorithm 1, and their code's units: sigma of images in [0, 1], levels of [-1, 1]."""
    bar = [1 - (1e-4 + (0.02 - 1e-4) * k / 999) for k in range(1000)]
    for k in range(1, 1000):
        bar[k] *= bar[k - 1]
    seq = [int(s) for s in torch.linspace(0, 1000**2, steps, dtype=F64).sqrt()]
    seq[-1] -= 1
    times = [999 - s for s in seq]
    x = noise()
    for i, following in itertools.pairwise(times):
        level = math.sqrt((1 - bar[i]) / bar[i])
        x0 = denoise(x / math.sqrt(bar[i]), level).clamp(-1, 1)
        rho = lambda_ * (S / 2) ** 2 / level**2
        x0 = torch.linalg.solve(MATRIX.T @ MATRIX + rho * torch.eye(3), (OBSERVED @ MATRIX + rho * x0).T).T
        e = (x - math.sqrt(bar[i]) * x0) / math.sqrt(1 - bar[i])
        x = math.sqrt(bar[following]) * x0 + math.sqrt(1 - bar[following]) * (
            math.sqrt(1 - zeta) * e + math.sqrt(zeta) * noise())
    return image(x)


def ddrm(noise: Noise, steps: int, eta: float, eta_b: float) -> Tensor:
    """Kawar et al. (2022), equations 7 and 8, coefficient by coefficient."""
    u, values, vh = torch.linalg.svd(MATRIX)
    s = [*values.tolist(), 0.0]
    bar_y = OBSERVED @ u / values
    levels = [math.sqrt(1 / b - 1) for b in bars(steps, "from zero")][::-1]
    fresh = noise() @ vh.T
    state = torch.zeros_like(fresh)
    for i in range(3):
        if s[i] * levels[0] > S:
            state[:, i] = bar_y[:, i] + math.sqrt(levels[0] ** 2 - (S / s[i]) ** 2) * fresh[:, i]
        else:
            state[:, i] = levels[0] * fresh[:, i]
    for t, after in itertools.pairwise(levels):
        bar_x = denoise(state @ vh, t) @ vh.T
        fresh, new = noise() @ vh.T, torch.zeros_like(state)
        for i in range(3):
            x, z = bar_x[:, i], fresh[:, i]
            if s[i] == 0:
                new[:, i] = x + math.sqrt(1 - eta**2) * after * (state[:, i] - x) / t + eta * after * z
            elif after < S / s[i]:
                new[:, i] = (x + math.sqrt(1 - eta**2) * after * (bar_y[:, i] - x) / (S / s[i]) + eta * after * z)
            else:
                spread = math.sqrt(after**2 - S**2 / s[i] ** 2 * eta_b**2)
                new[:, i] = (1 - eta_b) * x + eta_b * bar_y[:, i] + spread * z
        state = new
    return image(denoise(state @ vh, levels[-1]))


def ula(noise: Noise, steps: int, delta: float, epsilon: float, alpha: float, low: float, high: float) -> Tensor:
    """Laumont et al. (2022), algorithm 2 (projected), of images in [0, 1]."""
    y = (Y.repeat_interleave(COUNT, 0) - LOW * MATRIX.sum(1)) / (HIGH - LOW)
    x = 0.5 + 0.25 * noise()
    for _ in range(steps):
        pull = (y - x @ MATRIX.T) @ MATRIX / (SIGMA / (HIGH - LOW)) ** 2
        regular = (denoise(2 * x - 1, 2 * math.sqrt(epsilon)) + 1) / 2 - x
        x = x + delta * pull + delta * alpha / epsilon * regular + math.sqrt(2 * delta) * noise()
        x = x.clamp(low, high)
    return LOW + (HIGH - LOW) * x


def flow_denoise(x: Tensor, t: float) -> Tensor:
    """E[m | (1 - t) z + t m = x], of images as the library has them."""
    if t == 0:
        return MEANS.mean(0).expand_as(x)
    return image(denoise((x / t - MID) / HALF, (1 - t) / t / HALF))


def pnp_flow(noise: Noise, steps: int, gamma: float, alpha: float, average: int) -> Tensor:
    """Martin et al. (2025), algorithm 3."""
    y = Y.repeat_interleave(COUNT, 0)
    x = torch.zeros(len(y), 3, dtype=F64)
    for n in range(steps):
        t = n / steps
        z = x - gamma * (1 - t) ** alpha * (x @ MATRIX.T - y) @ MATRIX
        x = torch.stack([flow_denoise((1 - t) * noise() + t * z, t) for _ in range(average)]).mean(0)
    return x


def flower(noise: Noise, measured_noise: Noise, steps: int, draws: bool) -> Tensor:
    """Pourya, El Rawas and Unser (2025), algorithm 1."""
    y = Y.repeat_interleave(COUNT, 0)
    x = noise()
    for k in range(steps):
        t, after = k / steps, (k + 1) / steps
        mean = flow_denoise(x, t)
        nu2 = (1 - t) ** 2 / (t**2 + (1 - t) ** 2)
        inverse = torch.linalg.inv(torch.eye(3) / nu2 + MATRIX.T @ MATRIX / SIGMA**2)
        point = (mean / nu2 + y @ MATRIX / SIGMA**2) @ inverse
        if draws:
            point = point + (noise() / math.sqrt(nu2) + measured_noise() @ MATRIX / SIGMA) @ inverse
        x = (1 - after) * noise() + after * point
    return x


# -- the samplers ------------------------------------------------------------------------------------------------------


RANGE = (LOW, HIGH)
CASES: dict[str, tuple[Callable[..., invflow.Solver], Callable[[Noise], Tensor]]] = {
    "dps": (lambda p, **s: invflow.DPS(p, steps=7, **s), lambda n: dps(n, 7, 1.0, False)),
    "dps, zeta": (lambda p, **s: invflow.DPS(p, steps=7, **s, **({"weight": 0.3} if s.get("variant") else
                                                                 {"zeta": 0.3})), lambda n: dps(n, 7, 0.3, False)),
    "pigdm": (lambda p, **s: invflow.PiGDM(p, steps=10, **s), lambda n: pigdm(n, 10, 1.0)),
    "moment matching": (lambda p, **s: invflow.MomentMatching(p, steps=12, iterations=2, **s),
                        lambda n: moment_matching(n, 12)),
    "diffpir": (lambda p, **s: invflow.DiffPIR(p, steps=12, **s), lambda n: diffpir(n, 12, 7.0, 0.1)),
    "diffpir, lambda": (lambda p, **s: invflow.DiffPIR(p, steps=12, lambda_=3.0, zeta=0.4, **s),
                        lambda n: diffpir(n, 12, 3.0, 0.4)),
    "ddrm": (lambda p, **s: invflow.DDRM(p, **s), lambda n: ddrm(n, 20, 0.85, 1.0)),
    "ddrm, eta": (lambda p, **s: invflow.DDRM(p, steps=10, eta=0.5, eta_observed=0.7, **s),
                  lambda n: ddrm(n, 10, 0.5, 0.7)),
}


@pytest.mark.parametrize("name", CASES)
def test_the_papers_algorithm_is_what_runs_and_deepinvs_is_another(name: str, stream: Callable[..., Noise]) -> None:
    make, formula = CASES[name]
    expected = formula(stream())
    found = drawn(make(prior(), value_range=RANGE))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    stream()
    other = drawn(make(prior(), value_range=RANGE, variant="deepinv"))
    assert float((other - expected).abs().max()) > 0.1


def test_what_only_the_authors_code_has(stream: Callable[..., Noise]) -> None:
    expected = dps(stream(), 7, 1.0, True)
    torch.testing.assert_close(drawn(invflow.DPS(prior(), steps=7, clip=True, value_range=RANGE)), expected, rtol=0,
                               atol=1e-6)
    expected = pigdm(stream(), 10, 0.0)
    torch.testing.assert_close(drawn(invflow.PiGDM(prior(), steps=10, eta=0.0, value_range=RANGE)), expected, rtol=0,
                               atol=1e-6)


def test_defaults_are_the_papers() -> None:
    p = prior()
    assert {name: make(p).settings() for name, make in {
        "dps": invflow.DPS, "pigdm": invflow.PiGDM, "mm": invflow.MomentMatching, "diffpir": invflow.DiffPIR,
        "ddrm": invflow.DDRM, "pnp": invflow.PnPFlow, "flower": invflow.Flower}.items()} == {
        name: {**settings, **({} if name in ("pnp", "flower") else {"variant": "paper", "value_range": [0.0, 1.0]}),
               "chunk_size": None} for name, settings in {
            "dps": {"solver": "DPS", "steps": 1000, "zeta": None, "clip": False, "weight": None, "guidance": None},
            "pigdm": {"solver": "PiGDM", "steps": 100, "eta": None, "weight": 1.0},
            "mm": {"solver": "MomentMatching", "steps": 256, "iterations": 1, "weight": 1.0},
            "diffpir": {"solver": "DiffPIR", "steps": 100, "lambda_": 7.0, "zeta": 0.1},
            "ddrm": {"solver": "DDRM", "steps": 20, "eta": 0.85, "eta_observed": 1.0, "sigma_max": None},
            "pnp": {"solver": "PnPFlow", "steps": 100, "gamma": 1.0, "alpha": 1.0, "average": 5, "look_ahead": 0.0},
            "flower": {"solver": "Flower", "steps": 100, "sampling": True, "spread": 1.0}}.items()}
    ula = invflow.ULA(p)
    assert (ula.step, ula.denoiser_sigma, ula.alpha, ula.clip) == (1 / 3, 5 / 255, 1.0, (-1.0, 2.0))


def test_diffpirs_lambda_is_twice_deepinvs(stream: Callable[..., Noise]) -> None:
    # only for images of [0, 1] and of the same noise: deepinv starts otherwise, which no more than the first steps see
    stream()
    paper = drawn(invflow.DiffPIR(prior(), steps=100, lambda_=7.0, value_range=RANGE))
    stream()
    other = drawn(invflow.DiffPIR(prior(), steps=100, lambda_=3.5, value_range=RANGE, variant="deepinv"))
    torch.testing.assert_close(other, paper, rtol=0, atol=2e-2)
    stream()
    same = drawn(invflow.DiffPIR(prior(), steps=100, lambda_=7.0, value_range=RANGE, variant="deepinv"))
    assert float((same - paper).abs().max()) > 0.1


def test_ula(stream: Callable[..., Noise]) -> None:
    solver = invflow.ULA(prior(), burn_in=6, thinning=1, denoiser_sigma=0.1, step=0.4, alpha=0.8, clip=(-0.1, 0.9),
                         value_range=RANGE)
    norm = float(torch.linalg.matrix_norm(MATRIX, 2))
    delta = 0.4 / (0.8 / 0.01 + (norm * (HIGH - LOW) / SIGMA) ** 2)
    delta = 2 ** (math.floor(8 * math.log2(delta)) / 8)
    expected = ula(stream(), 7, delta, 0.01, 0.8, -0.1, 0.9)
    torch.testing.assert_close(drawn(solver), expected, rtol=0, atol=2e-5)  # deepinv's runs in float32


def test_pnp_flow(stream: Callable[..., Noise]) -> None:
    expected = pnp_flow(stream(), 6, 0.8, 0.5, 3)
    solver = invflow.PnPFlow(prior(), steps=6, gamma=0.8, alpha=0.5, average=3)
    torch.testing.assert_close(drawn(solver), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("draws", [True, False])
def test_flower(draws: bool, stream: Callable[..., Noise]) -> None:
    # noise of images and of measurements come from the same stream: here in the order of the formula
    source = torch.Generator().manual_seed(8)
    stream()
    expected = flower(lambda: torch.randn(12, 3, generator=source, dtype=F64),
                      lambda: torch.randn(12, 2, generator=source, dtype=F64), 6, draws)
    torch.testing.assert_close(drawn(invflow.Flower(prior(), steps=6, sampling=draws)), expected, rtol=0, atol=1e-6)


def test_twisted_diffusion() -> None:
    """Wu et al. (2023), algorithm 1, in the times of a flow; no resampling, so that weights add up."""
    steps, count = 6, 5
    posed = likelihood().select(slice(1))

    def r(x: Tensor, t: float) -> Tensor:
        return -(Y[:1] - flow_denoise(x, t) @ MATRIX.T).square().sum(1) / (2 * SIGMA**2)

    source = torch.Generator().manual_seed(8)
    x, log_weight = torch.randn(count, 3, generator=source).double(), 0.0
    log_weight = r(x, 0.0)
    constant = -Y.shape[1] * math.log(SIGMA * math.sqrt(2 * math.pi))
    states = [x]
    for k in range(steps):
        t, s = k / steps, (k + 1) / steps
        rho = (t * (1 - s) / (s * (1 - t))) ** 2
        variance = (1 - s) ** 2 * (1 - rho)
        twisted = flow_denoise(x, t)
        plain = s * (1 - rho) * twisted + (rho * s / t * x if t else 0.0)
        if t:
            twisted = twisted + (1 - t) ** 2 / t * gradient(lambda x, t=t: r(x, t), x)
        mean = s * (1 - rho) * twisted + (rho * s / t * x if t else 0.0)
        if s < 1:
            new = mean + math.sqrt(variance) * torch.randn(count, 3, generator=source).double()
            log_weight = log_weight + r(new, s) - r(x, t) + (
                (new - mean).square() - (new - plain).square()).sum(1) / (2 * variance)
        else:
            new = plain
            log_weight = log_weight - r(x, t) - (Y[:1] - new @ MATRIX.T).square().sum(1) / (2 * SIGMA**2)
        x = new
        states.append(x)
    solver = invflow.TwistedDiffusion(prior(), steps=steps, resample_threshold=0.0)
    found = list(solver.iterate(posed, count, generator=torch.Generator().manual_seed(8)))
    for state, expected in zip(found, states):
        torch.testing.assert_close(state.states[0], expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(found[-1].log_weights[0], (log_weight + constant).to(F64), rtol=0, atol=1e-5)


def test_what_belongs_to_one_form_is_refused_in_the_other() -> None:
    p = prior()
    for make, words in (
            (lambda: invflow.DPS(p, weight=100.0), r"weight=100.0 .* pass zeta"),
            (lambda: invflow.DPS(p, guidance="annealed"), r"pass variant='deepinv'"),
            (lambda: invflow.DPS(p, zeta=0.5, variant="deepinv"), "zeta=0.5 is a setting of the paper's form"),
            (lambda: invflow.DDRM(p, sigma_max=2.0), "levels are those of the diffusion"),
            (lambda: invflow.DiffPIR(p, regularisation=3.5), r"half of the paper's lambda: pass lambda_=7\.0"),
            (lambda: invflow.PiGDM(p, variant="paperr"), "choose 'paper' or 'deepinv'"),
            (lambda: invflow.DDRM(p, steps=1001), "at most 1000")):
        with pytest.raises(ValueError, match=words):
            make()
