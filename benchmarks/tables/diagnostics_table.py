"""Error rates of the samplers' diagnostics: ``python -m benchmarks.tables.diagnostics_table [KIND ...]``.

Each problem has an answer in closed form or by quadrature, and is solved many times with few particles. A run is *bad*
if the error of a scalar's mean exceeds half of the posterior's standard deviation, if the error of its standard
deviation exceeds a quarter, or if the error of the log evidence exceeds 1. The table has the share of bad runs, the
alarms (``converged`` False) among good runs, and the misses (``converged`` True) among bad runs. Nothing was tuned on
the problems and particle numbers of the kinds with "further" in their names.

A second table gives the same numbers for each check within ``converged``, with the bad runs that only this check finds,
and for checks that ``converged`` does not use.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

import invflow
from benchmarks.tables.diagnostics_checks import checks_of, rivals_of
from benchmarks.tables.shared import line, parser
from invflow.flowmap import FlowMap, Time
from invflow.operators import MatrixOperator
from invflow.posterior import Posterior
from invflow.reward import FunctionReward, RepeatedReward, Reward
from invflow.solver import Solver
from invflow_problems.half_plane import left_penalty, ring_of_gaussians, tilted_expectations, tilted_sample

__all__ = ["KINDS", "Case", "judge_runs", "main"]

F64 = torch.float64


class Bend(FlowMap):
    """A one-jump map of two-dimensional noise, given only by its function."""

    state_shape = image_shape = (2,)

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.register_buffer("one", torch.ones((), dtype=F64))

    def velocity(self, x: Tensor, t: Time) -> Tensor:
        """None: only the jump is used."""
        return torch.zeros_like(x)

    def jump(self, x: Tensor, s: Time, t: Time) -> Tensor:
        """The function of the first coordinate, and that coordinate itself, which shows the side of a fold."""
        return torch.stack([self.function(x[:, 0]), x[:, 0]], dim=1)


@dataclass(frozen=True)
class Case:
    """A solver, a reward, the mean and standard deviation of a scalar, and the log evidence."""

    name: str
    solver: Solver
    reward: Reward
    scalar: Callable[[Tensor], Tensor]  # (B, N, *image_shape) to (B, N)
    mean: float
    std: float
    log_evidence: float
    particles: int = 500

    def run(self, count: int, seed: int) -> Posterior:
        """``count`` independent runs, as observations of one posterior."""
        repeated = (RepeatedReward(self.reward, count) if self.reward.num_observations is None
                    else self.reward.select([0] * count))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            return self.solver.sample(repeated, self.particles, generator=torch.Generator().manual_seed(seed))


def judge_runs(case: Case, posterior: Posterior) -> tuple[Tensor, Tensor]:
    """Whether each run is bad, and whether it raises an alarm, ``(B,)`` each."""
    values, weights = case.scalar(posterior.samples).double(), posterior.weights.double()
    mean = (weights * values).sum(1)
    std = (weights * (values - mean[:, None]).square()).sum(1).sqrt()
    bad = ((mean - case.mean).abs() > 0.5 * case.std) | ((std / case.std).log().abs() > math.log(1.25))
    if posterior.log_evidence is not None:
        bad |= (posterior.log_evidence.double() - case.log_evidence).abs() > 1
    return bad, ~posterior.diagnostics["converged"]


# -- problems ----------------------------------------------------------------------------------------------------------


def _linear(dimension: int, measured: int, sigma: float) -> tuple[FlowMap, Reward, dict[str, Any]]:
    """A standard Gaussian, random measurements of it, and the exact posterior along one random direction."""
    g = torch.Generator().manual_seed(5)
    prior = invflow.GaussianMixtureFlow(torch.zeros(1, dimension, dtype=F64), std=1.0, steps=2)
    matrix = torch.randn(measured, dimension, generator=g, dtype=F64) / dimension**0.5
    y = matrix @ torch.randn(dimension, generator=g, dtype=F64) + sigma * torch.randn(measured, generator=g, dtype=F64)
    reward = invflow.GaussianLikelihood(MatrixOperator(matrix, image_shape=(dimension,)), y[None], sigma)
    covariance = torch.linalg.inv(torch.eye(dimension, dtype=F64) + matrix.T @ matrix / sigma**2)
    direction = torch.nn.functional.normalize(torch.randn(dimension, generator=g, dtype=F64), dim=0)
    evidence = invflow.ExactPosterior(prior).log_evidence(reward)
    return prior, reward, {
        "scalar": lambda x: x @ direction, "mean": float(direction @ covariance @ matrix.T @ y / sigma**2),
        "std": float((direction @ covariance @ direction).sqrt()), "log_evidence": float(evidence)}


def _half_plane() -> tuple[FlowMap, Reward, dict[str, Any]]:
    """The ring of eight Gaussians tilted to the right."""
    prior = ring_of_gaussians(steps=6)
    draws = tilted_sample(200_000, torch.Generator().manual_seed(1), prior)[:, 1].double()
    return prior, FunctionReward(left_penalty), {
        "scalar": lambda x: x[..., 1], "mean": float(draws.mean()), "std": float(draws.std()),
        "log_evidence": tilted_expectations(prior)["log evidence"]}


def _constraint(edge: float) -> tuple[FlowMap, Reward, dict[str, Any]]:
    """A standard normal number that must exceed an edge."""
    normal = torch.distributions.Normal(torch.zeros((), dtype=F64), 1.0)
    share = 1 - float(normal.cdf(torch.tensor(edge, dtype=F64)))
    mean = float(normal.log_prob(torch.tensor(edge, dtype=F64)).exp()) / share
    prior = invflow.GaussianMixtureFlow(torch.zeros(1, 1, dtype=F64), std=1.0, steps=2)
    return prior, FunctionReward(lambda x: torch.where(x[:, 0] > edge, 0.0, -torch.inf), differentiable=False), {
        "scalar": lambda x: x[..., 0], "mean": mean, "std": math.sqrt(1 + edge * mean - mean**2),
        "log_evidence": math.log(share)}


def _circle(sigma: float) -> tuple[FlowMap, Reward, dict[str, Any]]:
    """A standard Gaussian in the plane, whose distance from the origin was measured as 1.5."""
    prior = invflow.GaussianMixtureFlow(torch.zeros(1, 2, dtype=F64), std=1.0, steps=2)
    r = torch.linspace(1e-6, 8, 400_001, dtype=F64)
    log_density = (r.log() - 0.5 * r.square() - 0.5 * ((r - 1.5) / sigma).square() + math.log(float(r[1] - r[0])))
    square = float(log_density.softmax(0) @ r.square())
    return prior, FunctionReward(lambda x: -0.5 * ((x.norm(dim=1) - 1.5) / sigma).square()), {
        "scalar": lambda x: x[..., 0], "mean": 0.0, "std": math.sqrt(square / 2),
        "log_evidence": float(log_density.logsumexp(0))}


def _folded(function: Callable[[Tensor], Tensor], y: float, sigma: float) -> tuple[FlowMap, Reward, dict[str, Any]]:
    """A measured value of a nonlinear map; the posterior of its noise is known by quadrature."""
    matrix = torch.tensor([[1.0, 0.0]], dtype=F64)
    likelihood = invflow.GaussianLikelihood(MatrixOperator(matrix, image_shape=(2,)),
                                            torch.tensor([[y]], dtype=F64), sigma)
    z = torch.linspace(-9, 9, 180_001, dtype=F64)
    x = function(z)
    log_density = (-0.5 * z.square() - 0.5 * ((x - y) / sigma).square() - math.log(2 * math.pi * sigma)
                   + math.log(float(z[1] - z[0])))
    mean = float(log_density.softmax(0) @ z)
    return Bend(function), likelihood, {
        "scalar": lambda images: images[..., 1], "mean": mean,
        "std": float((log_density.softmax(0) @ (z - mean).square()).sqrt()),
        "log_evidence": float(log_density.logsumexp(0))}


MAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "z + 0.1 z^2": lambda z: z + 0.1 * z.square(), "z + 0.8 tanh z": lambda z: z + 0.8 * z.tanh(),
    "z + 0.3 sin 3z": lambda z: z + 0.3 * (3 * z).sin(), "|z| + 0.1 z": lambda z: z.abs() + 0.1 * z,
    "z^3 - 2z": lambda z: z**3 - 2 * z, "z + sin 3z": lambda z: z + (3 * z).sin(),
}


# -- cases -------------------------------------------------------------------------------------------------------------


def _linears(*sizes: tuple[int, int, float]) -> dict[str, tuple[FlowMap, Reward, dict[str, Any]]]:
    return {f"{d}-d, {m} values, sigma {sigma}": _linear(d, m, sigma) for d, m, sigma in sizes}


def fmtt_cases(further: bool = False) -> Iterator[Case]:
    """Tilting: easy, sharp and too sharp measurements, soft and hard edges."""
    rows: dict[str, Any] = {"chunk_size": 10**5}
    if further:
        problems = {f"x > {edge}": _constraint(edge) for edge in (0.5, 1.5, 1.8)}
        problems |= _linears((5, 2, 0.05), (5, 4, 0.1), (12, 4, 0.05), (12, 6, 0.3), (16, 6, 0.1))
        problems |= {f"circle, sigma {sigma}": _circle(sigma) for sigma in (0.3, 0.1)}
    else:
        problems = {"half-plane": _half_plane(), "x > 2": _constraint(2.0)}
        problems |= _linears((8, 3, 0.1), (8, 3, 0.01), (8, 6, 0.02), (8, 6, 0.005), (20, 8, 0.05))
    for (problem, (prior, reward, truth)), count in product(problems.items(), (200, 1000) if further else (500,)):
        where: dict[str, Any] = {"reward": reward, **truth, "particles": count}
        named = f"N = {count} | {problem}"
        yield Case(f"renoise, flow map, {named}", invflow.FMTT(prior, steps=25, kernel="renoise", **rows), **where)
        if not isinstance(reward, invflow.GaussianLikelihood):
            continue
        for ahead in ("denoiser", "none"):
            solver = invflow.FMTT(prior, steps=50, look_ahead=ahead, schedule="annealed", **rows)
            yield Case(f"annealed, {ahead}, {named}", solver, **where)
        yield Case(f"twisted diffusion, annealed, {named}",
                   invflow.TwistedDiffusion(prior, steps=50, schedule="annealed", **rows), **where)


def smc_cases(further: bool = False) -> Iterator[Case]:
    """Tempering, with the default moves and with few."""
    quick: dict[str, Any] = {"num_moves": 1, "ess_threshold": 0.5}
    problems = {f"circle, sigma {sigma}": _circle(sigma) for sigma in ((0.2, 0.03) if further else (0.1, 0.01))}
    problems |= _linears((5, 2, 0.02), (5, 4, 0.1), (12, 4, 0.1)) if further else _linears((8, 3, 0.05), (8, 6, 0.01))
    for problem, (prior, reward, truth) in problems.items():
        for name, settings in {"default": {}, "one move, 0.5": quick}.items():
            for particles in (50, 100, 400) if further else (64, 200):
                solver = invflow.NoiseSMC(prior, chunk_size=10**5, **settings)
                yield Case(f"{name}, N = {particles} | {problem}", solver, reward, **truth, particles=particles)


def rto_cases() -> Iterator[Case]:
    """Randomise-then-optimise through maps that bend and maps that fold, without and with weights."""
    for name, function in MAPS.items():
        for y, sigma in ((0.7, 0.3), (1.5, 0.1)):
            prior, reward, truth = _folded(function, y, sigma)
            for weights in (False, True):
                solver = invflow.NoiseRTO(prior, weights=weights, tolerance=1e-3, chunk_size=10**5)
                yield Case(f"{'weights' if weights else 'plain'} | {name}, y = {y}, sigma {sigma}", solver, reward,
                           **truth, particles=200)


def chain_cases() -> Iterator[Case]:
    """Chains that start at the draws of randomise-then-optimise: plain, weighted, and cut short at both."""
    moves: dict[str, Any] = {"plain": {}, "weights": {}, "short": {"num_moves": 2, "leapfrog_steps": 3}}
    draws: dict[str, Any] = {"plain": {"tolerance": 1e-3}, "weights": {"tolerance": 1e-3, "weights": True},
                             "short": {"max_iterations": 3}}
    for name, function in MAPS.items():
        for y, sigma in ((0.7, 0.3), (1.5, 0.1)):
            prior, reward, truth = _folded(function, y, sigma)
            for setting in moves:
                start = invflow.NoiseRTO(prior, chunk_size=10**5, **draws[setting])
                solver = invflow.NoiseSMC(prior, start=start, chunk_size=10**5, **moves[setting])
                yield Case(f"{setting} | {name}, y = {y}, sigma {sigma}", solver, reward, **truth, particles=200)


def importance_cases() -> Iterator[Case]:
    """Draws of the prior, weighted: from easy to hopeless measurements."""
    problems = _linears((2, 1, 0.3), (2, 1, 0.05), (4, 2, 0.2), (8, 3, 0.3), (8, 3, 0.1), (8, 6, 0.2), (20, 8, 0.3))
    problems |= {f"circle, sigma {sigma}": _circle(sigma) for sigma in (0.3, 0.03)}
    for (problem, (prior, reward, truth)), count in product(problems.items(), (200, 1000)):
        yield Case(f"N = {count} | {problem}", invflow.NoiseSMC(prior, num_moves=0, chunk_size=10**5), reward, **truth,
                   particles=count)


KINDS: dict[str, Callable[[], Iterator[Case]]] = {
    "fmtt": fmtt_cases, "fmtt-further": partial(fmtt_cases, True), "noise-smc": smc_cases,
    "noise-smc-further": partial(smc_cases, True), "noise-rto": rto_cases, "noise-rto-chains": chain_cases,
    "importance": importance_cases,
}


def main(arguments: list[str] | None = None, say: Callable[[str], None] = print) -> None:
    """Print a row for each case, the totals of each setting and kind, and the checks of each kind, as markdown."""
    command = parser("diagnostics_table", __doc__, runs=40, seed=0)
    command.add_argument("kinds", nargs="*", metavar="KIND", help=f"one or more of {', '.join(KINDS)}; default: all")
    options = command.parse_args(arguments)
    unknown = set(options.kinds) - set(KINDS)
    if unknown:
        command.error(f"there is no {', '.join(sorted(unknown))}: choose from {', '.join(KINDS)}")
    torch.set_num_threads(1)
    for kind in options.kinds or KINDS:
        say("| case | bad | alarms on good | misses on bad |\n|---|---|---|---|")
        sums: dict[str, Tensor] = {}  # by setting: good, alarms among them, bad, misses among them
        checks: dict[str, Tensor] = {}  # the same by check, and the bad runs that no other check of the verdict sees
        for case in KINDS[kind]():
            posterior = case.run(options.runs, options.seed)
            bad, alarm = judge_runs(case, posterior)
            say(_row(case.name, _count(bad, alarm)))
            setting = case.name.partition(" | ")[0]
            sums[setting] = sums.get(setting, 0) + _count(bad, alarm)
            parts = checks_of(posterior, case.reward)
            seen = torch.stack([*parts.values()]).sum(0)
            rivals = {f"({name})": raised for name, raised in rivals_of(posterior).items()}
            for name, raised in (parts | rivals).items():
                alone = bad & raised & (seen == (1 if name in parts else 0))
                checks[name] = checks.get(name, 0) + torch.cat([_count(bad, raised), alone.sum()[None]])
        for setting, counts in sums.items():
            say(_row(f"**{setting}**", counts))
        say(_row(f"**all of {kind}**", torch.stack([*sums.values()]).sum(0)))
        say(f"\n| check of {kind} (in brackets: not of `converged`) | bad | alarms on good | misses on bad | "
            "bad that no check of `converged` sees but this |\n|---|---|---|---|---|")
        for name, counts in checks.items():
            say(f"{_row(name, counts[:4])} {int(counts[4])} |")
        say("")


def _count(bad: Tensor, alarm: Tensor) -> Tensor:
    """Good runs, alarms among them, bad runs, misses among them, ``(4,)``."""
    return torch.stack([(~bad).sum(), (~bad & alarm).sum(), bad.sum(), (bad & ~alarm).sum()])


def _row(name: str, counts: Tensor) -> str:
    good, alarms, bad, misses = counts.tolist()
    return line(name.replace(" | ", ": "), f"{bad} of {good + bad}", f"{alarms} of {good}", f"{misses} of {bad}")


if __name__ == "__main__":
    main()
