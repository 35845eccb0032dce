"""Reward, and distance from the exact law, against calls of the map, for every tilting sampler and search."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.tables.mixture_table import CountedMixture
from benchmarks.tables.tilting_parts import REPLICATES, Replicated, affordable, sample_quietly
from invflow.likelihood import GaussianLikelihood
from invflow.metrics import sliced_wasserstein
from invflow.models.mixture import GaussianMixtureFlow
from invflow.reward import Reward
from invflow.solver import Solver
from invflow.solvers.exact import ExactPosterior
from invflow.solvers.noise.tempered import NoiseSMC
from invflow.solvers.search import BeamSearch, BestOfN, TopKSearch
from invflow.solvers.tilting.fmtt import FMTT
from invflow.solvers.tilting.schedules import AnnealedVariance
from invflow.solvers.tilting.twisted_diffusion import TwistedDiffusion
from invflow_problems.half_plane import left_penalty, ring_of_gaussians, tilted_sample
from invflow_problems.mixture25 import draw_problem

__all__ = ["BUDGETS", "BUDGET_FIELDS", "CASES", "METHODS", "SEARCHES", "Case", "evaluate_budget", "takes"]

BUDGETS = (12, 25, 50, 100)
PARTICLES = 150
#: number of draws from the exact law; the row "exact" is a sample of PARTICLES exact draws
REFERENCE = 2000
_JUMP_STEPS = 4


@dataclass(frozen=True)
class Case:
    """A problem with exact draws of its tilted law.

    Attributes:
        prior: A mixture, whose jump counts as one call.
        reward: Reward of the replicates.
        exact: ``(M, d)``, draws of the tilted law.
        tilting: Suitable settings of FMTT.
        tempering: Settings of NoiseSMC for each budget: moves, and the share of the sample size that a step keeps. The
            adaptive temperatures determine the number of calls.
    """

    prior: CountedMixture
    reward: Reward
    exact: Tensor
    tilting: dict[str, Any]
    tempering: tuple[tuple[int, float], ...]

    def modes(self, x: Tensor) -> Tensor:
        """The component nearest to each point: ``(n, d)`` to ``(n,)``."""
        return torch.cdist(x, self.prior.means).argmin(1)

    def shares(self, x: Tensor, weights: Tensor) -> Tensor:
        """Total weight near each component: ``(B, N, d)`` and ``(B, N)`` to ``(B, K)``."""
        index = self.modes(x.flatten(0, 1)).view(weights.shape)
        return weights.new_zeros(len(weights), len(self.prior.means)).scatter_add_(1, index, weights)


def _half_plane() -> Case:
    ring = ring_of_gaussians()
    prior = CountedMixture(ring.means, std=ring.std, steps=_JUMP_STEPS)
    return Case(prior, Replicated(left_penalty), tilted_sample(REFERENCE, torch.Generator().manual_seed(1)), {},
                ((4, 0.5), (6, 0.7), (8, 0.8), (16, 0.8)))


def _twenty_five() -> Case:
    problem = draw_problem(8, 1, 9)
    mixture = problem.prior
    assert isinstance(mixture, GaussianMixtureFlow)
    _, likelihood = problem.simulate(1, generator=torch.Generator().manual_seed(9))
    assert isinstance(likelihood, GaussianLikelihood)
    exact = ExactPosterior(mixture).sample(likelihood, REFERENCE, generator=torch.Generator().manual_seed(1))
    prior = CountedMixture(mixture.means, std=1.0, weights=mixture.weights, steps=_JUMP_STEPS)
    return Case(prior, likelihood.select([0] * REPLICATES), exact.samples[0],
                {"time_grid": "logit", "schedule": AnnealedVariance(10.0)},
                ((2, 0.5), (3, 0.6), (5, 0.8), (9, 0.8)))


#: problems by name
CASES: dict[str, Callable[[], Case]] = {"mixture/half-plane": functools.cache(_half_plane),
                                        "mixture/25-8-1": functools.cache(_twenty_five)}


def _tilting(**settings: Any) -> Callable[[Case, int], Solver]:
    def make(case: Case, budget: int) -> Solver:
        chosen = {**case.tilting, **settings}
        if "proposal" in chosen:  # its spread is narrower, as in the table of the 25 Gaussians
            chosen["schedule"] = AnnealedVariance(3.0)
        return affordable(lambda steps: FMTT(case.prior, steps=steps, chunk_size=10**6, **chosen), case.reward, budget)
    return make


def _twisted_diffusion(case: Case, budget: int) -> Solver:
    return affordable(lambda steps: TwistedDiffusion(case.prior, steps=steps, chunk_size=10**6, **case.tilting),
                      case.reward, budget)


def _noise_smc(case: Case, budget: int) -> Solver:
    moves, threshold = case.tempering[BUDGETS.index(budget)]
    return NoiseSMC(case.prior, moves="crank-nicolson-langevin", num_moves=moves, ess_threshold=threshold,
                    chunk_size=10**6)


#: by name, the solver for a problem and a budget of calls
METHODS: dict[str, Callable[[Case, int], Solver]] = {
    "FMTT twisted, flow map": _tilting(),
    "FMTT twisted, denoiser": _tilting(look_ahead="denoiser"),
    "FMTT twisted, none": _tilting(look_ahead="none"),
    "FMTT twisted, flow map, renoise": _tilting(kernel="renoise"),
    "FMTT twisted, denoiser, ancestral": _tilting(look_ahead="denoiser", kernel="ancestral"),
    "FMTT twisted, flow map, renoise, conjugate": _tilting(kernel="renoise", proposal="conjugate"),
    "FMTT Jarzynski, flow map": _tilting(weights="jarzynski"),
    "FMTT Jarzynski, denoiser": _tilting(weights="jarzynski", look_ahead="denoiser"),
    "FMTT Jarzynski, none": _tilting(weights="jarzynski", look_ahead="none"),
    "FMTT unweighted, flow map": _tilting(weights="none"),
    "TwistedDiffusion": _twisted_diffusion,
    "NoiseSMC": _noise_smc,
    "BestOfN": lambda case, budget: BestOfN(case.prior, budget=budget, chunk_size=10**6),
    "multi-BestOfN": lambda case, budget: BestOfN(case.prior, budget=budget, selections=4, chunk_size=10**6),
    "BeamSearch": lambda case, budget: BeamSearch(case.prior, budget=budget, chunk_size=10**6),
    "TopKSearch": lambda case, budget: TopKSearch(
        case.prior, budget=budget, k=8, selections=2, chunk_size=10**6,
        time_grid=case.tilting.get("time_grid", "uniform")),
}
#: methods that maximise the reward
SEARCHES = ("BestOfN", "multi-BestOfN", "BeamSearch", "TopKSearch")
BUDGET_FIELDS = ("problem", "method", "budget", "replicate", "reward", "w1", "mode_error", "modes", "calls", "backward")


def takes(problem: str, method: str) -> bool:
    """Whether a method applies to a problem: the conjugate proposal needs a likelihood."""
    return "conjugate" not in method or problem != "mixture/half-plane"


def evaluate_budget(problem: str, method: str, budget: int, *, particles: int = PARTICLES) -> list[dict[str, Any]]:
    """Rows of the replicates of one method at one budget.

    Args:
        problem: A name in :data:`CASES`.
        method: A name in :data:`METHODS`, or ``"exact"`` for draws of the tilted law.
        budget: Calls of the map per particle, forward and backward. For NoiseSMC, its settings determine the calls.
        particles: Number of particles of each replicate.

    Returns:
        A value for each of :data:`BUDGET_FIELDS`: ``w1`` is the sliced Wasserstein distance to exact draws,
        ``mode_error`` the total variation between the components' shares and the exact ones, and ``modes`` the number
        of components with at least a fifth of their exact share, among those whose exact share is over 2%.
    """
    case = CASES[problem]()
    truth = case.shares(case.exact[None], torch.full((1, len(case.exact)), 1 / len(case.exact)))
    if method == "exact":
        x = _exact_draws(problem, particles)
        weights, calls = torch.full(x.shape[:2], 1 / particles), (0.0, 0.0)
    else:
        posterior = sample_quietly(METHODS[method](case, budget), case.reward, particles, seed=budget)
        x, weights = posterior.samples, posterior.weights.to(truth)
        calls = posterior.nfe.forward, posterior.nfe.backward
    with torch.no_grad():
        reward = (weights * case.reward(x)).sum(1)
    directions = torch.randn(30, x.shape[2], generator=torch.Generator().manual_seed(0))
    w1 = sliced_wasserstein(x, case.exact.expand(len(x), *case.exact.shape), projections=directions,
                            log_weights=weights.log())
    shares = case.shares(x, weights)
    kept = ((shares >= 0.2 * truth) & (truth > 0.02)).sum(1)
    error = 0.5 * (shares - truth).abs().sum(1)
    return [{"problem": problem, "method": method, "budget": budget, "replicate": k, "reward": float(reward[k]),
             "w1": float(w1[k]), "mode_error": float(error[k]), "modes": int(kept[k]), "calls": calls[0],
             "backward": calls[1]} for k in range(len(x))]


def _exact_draws(problem: str, particles: int) -> Tensor:
    case, generator = CASES[problem](), torch.Generator().manual_seed(2)
    if isinstance(case.reward, GaussianLikelihood):
        return ExactPosterior(case.prior).sample(case.reward, particles, generator=generator).samples
    result: Tensor = tilted_sample(REPLICATES * particles, generator).unflatten(0, (REPLICATES, particles))
    return result
