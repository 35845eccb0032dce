"""How an error of the map, and the dimension, affect the weights of tilted sampling."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from benchmarks.tables.mixture_table import CountedMixture
from benchmarks.tables.tilting_parts import REPLICATES, Replicated, sample_quietly
from invflow.flowmap import FlowMap, Time, expand_time
from invflow.likelihood import GaussianLikelihood
from invflow.models.mixture import GaussianMixtureFlow
from invflow.operator import Operator
from invflow.smc import effective_sample_size, pareto_k_hat
from invflow.solver import Solver
from invflow.solvers.exact import ExactPosterior
from invflow.solvers.noise.tempered import NoiseSMC
from invflow.solvers.tilting.conjugate import Conjugate
from invflow.solvers.tilting.fmtt import FMTT
from invflow.solvers.tilting.schedules import AnnealedVariance
from invflow_problems.half_plane import left_penalty, ring_of_gaussians

__all__ = ["DIMENSIONS", "ERROR_FIELDS", "ERROR_METHODS", "ERROR_SIZES", "PRIORS", "WEIGHT_FIELDS", "WEIGHT_METHODS",
           "FirstHalf", "PerturbedMap", "evaluate_dimension", "evaluate_error", "sees_error"]

#: steps of a mixture's jump, in the tables of dimension and of error
_JUMP_STEPS = 6
_QUICK_STEPS = 4
ERROR_SIZES = (0.0, 0.05, 0.1, 0.2, 0.4)
ERROR_STEPS, ERROR_PARTICLES, BASE_DRAWS = 25, 400, 12_000


class PerturbedMap(FlowMap):
    r"""A mixture's flow map X_{s,t}(x) = x + (t - s) u(x, s, t) with a smooth error of a known size in u.

    The error is :math:`e\, \sigma\, h(x)` with :math:`h_i(x) = \sqrt 2 \sin(x_{i+1} + \pi / 4)`, indices modulo d, and
    sigma the data's root mean square deviation from their mean. Under x ~ N(0, I) the mean square of each h_i is 1, so
    the one-step map's error has the root mean square e sigma.

    Args:
        mixture: The exact map.
        size: e, at least 0.
        where: ``"jump"``: the error is multiplied by t - s and vanishes in the velocity b_t = u(x, t, t);
            ``"both"``: it does not vanish, and velocity and jump are both wrong.

    Raises:
        ValueError: For a negative size, or an invalid ``where``.
    """

    def __init__(self, mixture: GaussianMixtureFlow, size: float, where: str = "both") -> None:
        super().__init__()
        if not size >= 0 or where not in ("jump", "both"):
            raise ValueError(f"size={size}, where={where!r}: pass size >= 0 and where='jump' or 'both'")
        self.mixture, self.size, self.where = mixture, size, where
        self.state_shape, self.image_shape = mixture.state_shape, mixture.image_shape
        center = (mixture.weights[:, None] * mixture.means).sum(0)
        spread = (mixture.weights[:, None] * (mixture.means - center).square()).sum(0) + (
            mixture.weights * mixture.std**2).sum()
        self.spread = float(spread.mean().sqrt())

    @property
    def decode_affine(self) -> tuple[float, float] | None:
        """Same as in the mixture."""
        return self.mixture.decode_affine

    def error(self, x: Tensor) -> Tensor:
        """e sigma h(x): ``(n, d)`` to the same."""
        return self.size * self.spread * math.sqrt(2) * torch.sin(x.roll(1, -1) + math.pi / 4)

    def velocity(self, x: Tensor, t: Time) -> Tensor:
        """b_t(x), with the error for ``"both"``."""
        b = self.mixture.velocity(x, t)
        return b + self.error(x) if self.where == "both" else b

    def jump(self, x: Tensor, s: Time, t: Time) -> Tensor:
        """X_{s,t}(x), with the error."""
        gap = expand_time(t, x) - expand_time(s, x)
        scale = gap if self.where == "both" else gap * gap.abs()
        return self.mixture.jump(x, s, t) + scale * self.error(x)


#: name: settings of FMTT
ERROR_METHODS: dict[str, dict[str, Any]] = {
    **{f"twisted, {name}": {"look_ahead": kind}
       for name, kind in (("flow map", "flow_map"), ("denoiser", "denoiser"), ("none", "none"))},
    "twisted, flow map, renoise": {"look_ahead": "flow_map", "kernel": "renoise"},
    **{f"Jarzynski, {name}": {"look_ahead": kind, "weights": "jarzynski"}
       for name, kind in (("flow map", "flow_map"), ("denoiser", "denoiser"), ("none", "none"))},
    "unweighted, flow map": {"look_ahead": "flow_map", "weights": "none"},
    "unweighted, denoiser": {"look_ahead": "denoiser", "weights": "none"},
}
ERROR_FIELDS = ("where", "size", "method", "replicate", "share", "reward", "base_share", "base_share_error",
                "base_reward", "base_reward_error", "ess")


def _half_plane_values(x: Tensor) -> Tensor:
    """Share with x_0 > 0 and reward: ``(..., 2)`` to ``(..., 2)``, in float64."""
    flat = x.flatten(0, -2)
    return torch.stack([(flat[:, 0] > 0).double(), left_penalty(flat).double()], 1).view(x.shape)


@functools.cache
def _base(where: str, size: float, kernel: str, steps: int) -> tuple[list[float], list[float]]:
    """Share and reward of the base sampler's draws weighted by e^r, with their standard errors."""
    solver = FMTT(_perturbed(where, size), steps=steps, kernel=kernel, chunk_size=10**6)
    x = solver.prior_samples(BASE_DRAWS, generator=torch.Generator().manual_seed(7))
    weights, values = left_penalty(x).double().softmax(0), _half_plane_values(x)
    mean = weights @ values
    return mean.tolist(), (weights.square()[:, None] * (values - mean).square()).sum(0).sqrt().tolist()


@functools.cache
def _perturbed(where: str, size: float) -> PerturbedMap:
    return PerturbedMap(ring_of_gaussians(steps=_QUICK_STEPS), size, where)


def sees_error(where: str, method: str) -> bool:
    """Whether an error affects a method; an error in the jump alone does not affect a method without jumps."""
    return where == "both" or "flow map" in method


def evaluate_error(where: str, size: float, method: str, *, particles: int = ERROR_PARTICLES,
                   steps: int = ERROR_STEPS) -> list[dict[str, Any]]:
    """Rows for the replicates of FMTT on the tilted ring, with an error in the map.

    Args:
        where: ``"jump"`` or ``"both"``, see :class:`PerturbedMap`.
        size: Size of the error.
        method: A name in :data:`ERROR_METHODS`.
        particles: Number of particles of each replicate.
        steps: Number of steps of the sampler.

    Returns:
        A value for each of :data:`ERROR_FIELDS`. The columns of the base are importance-weighted means, with standard
        errors, over draws from the law that the sampler tilts; ``ess`` is a share of the particles.
    """
    settings = ERROR_METHODS[method]
    solver = FMTT(_perturbed(where, size), steps=steps, chunk_size=10**6, **settings)
    posterior = sample_quietly(solver, Replicated(left_penalty), particles, seed=11)
    means = (posterior.weights.double()[..., None] * _half_plane_values(posterior.samples)).sum(1)
    kernel = settings.get("kernel", "sde")
    # the SDE makes no jumps, so an error in the jump does not change its law
    base, error = _base(where, 0.0 if kernel == "sde" and where == "jump" else size, kernel, steps)
    found = posterior.ess()
    ess = [math.nan] * REPLICATES if found is None else (found / particles).tolist()
    return [{"where": where, "size": size, "method": method, "replicate": k, "share": float(means[k, 0]),
             "reward": float(means[k, 1]), "base_share": base[0], "base_share_error": error[0],
             "base_reward": base[1], "base_reward_error": error[1], "ess": ess[k]} for k in range(REPLICATES)]


# -- weights against dimension -----------------------------------------------------------------------------------------

DIMENSIONS = (2, 8, 32, 128, 512)
PRIORS = ("gaussian", "mixture")
SPREAD, SIGMA = 0.5, 0.5
WEIGHT_STEPS, WEIGHT_PARTICLES = 25, 100
#: name: settings of FMTT, or None for NoiseSMC
WEIGHT_METHODS: dict[str, dict[str, Any] | None] = {
    **{f"gradient, {name}": {"look_ahead": kind}
       for name, kind in (("flow map", "flow_map"), ("denoiser", "denoiser"), ("none", "none"))},
    **{f"conjugate, {name}": {"look_ahead": kind, "proposal": Conjugate(spread=SPREAD)}
       for name, kind in (("flow map", "flow_map"), ("denoiser", "denoiser"), ("none", "none"))},
    "NoiseSMC": None,
}
WEIGHT_FIELDS = ("prior", "d", "method", "replicate", "variance", "ess", "k_hat", "log_evidence_error", "temperatures",
                 "calls", "backward")


class FirstHalf(Operator):
    """The first half of the coordinates."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.image_shape, self.measurement_shape = (d,), (d // 2,)

    def forward(self, x: Tensor) -> Tensor:
        """``(n, d)`` to ``(n, d / 2)``."""
        return x[:, :self.measurement_shape[0]]

    def adjoint(self, y: Tensor) -> Tensor:
        """Zeros elsewhere."""
        return torch.nn.functional.pad(y, (0, self.image_shape[0] - y.shape[1]))


@functools.cache
def _posed(prior: str, d: int) -> tuple[CountedMixture, GaussianLikelihood, Tensor]:
    """The map, measurements of ten truths, and their exact log evidence ``(B,)``."""
    generator = torch.Generator().manual_seed(d)
    means = torch.zeros(1, d) if prior == "gaussian" else torch.randn(4, d, generator=generator)
    mixture = CountedMixture(means, std=SPREAD, steps=_JUMP_STEPS)
    truth, operator = mixture.sample(REPLICATES, generator=generator), FirstHalf(d)
    y = operator.measure(truth, sigma=SIGMA, generator=generator)
    likelihood = GaussianLikelihood(operator, y, sigma=SIGMA)
    return mixture, likelihood, ExactPosterior(mixture).log_evidence(likelihood)


def evaluate_dimension(prior: str, d: int, method: str, *, particles: int = WEIGHT_PARTICLES,
                       steps: int = WEIGHT_STEPS) -> list[dict[str, Any]]:
    """Rows for the replicates; each has its own truth, half of whose coordinates are observed.

    FMTT never resamples here, so its weights are those of the whole path.

    Args:
        prior: ``"gaussian"``, N(0, s^2 I), or ``"mixture"``, four Gaussians with means from N(0, I).
        d: Dimension, even.
        method: A name in :data:`WEIGHT_METHODS`.
        particles: Number of particles of each replicate.
        steps: Number of steps of FMTT.

    Returns:
        A value for each of :data:`WEIGHT_FIELDS`: the variance of the log weights, the effective sample size as a share
        of the particles and k-hat; for NoiseSMC, which resamples, the number of temperatures instead.
    """
    mixture, likelihood, evidence = _posed(prior, d)
    settings = WEIGHT_METHODS[method]
    solver: Solver
    if settings is None:
        solver = NoiseSMC(mixture, moves="crank-nicolson-langevin", num_moves=3, ess_threshold=0.5,
                          chunk_size=10**6)
    else:
        solver = FMTT(mixture, steps=steps, resample_threshold=0.0, schedule=AnnealedVariance(SPREAD),
                      chunk_size=10**6, **settings)
    posterior = sample_quietly(solver, likelihood, particles, seed=d)
    assert posterior.log_evidence is not None
    error = posterior.log_evidence - evidence
    rows: list[dict[str, Any]] = []
    for k in range(REPLICATES):
        row: dict[str, Any] = {"prior": prior, "d": d, "method": method, "replicate": k,
                               "log_evidence_error": float(error[k]), "calls": posterior.nfe.forward,
                               "backward": posterior.nfe.backward}
        if settings is None:
            row["temperatures"] = int((posterior.diagnostics["temperatures"][k] < 1).sum()) + 1
        else:
            weights = posterior.log_weights[k:k + 1].double()
            row |= {"variance": float(weights.var()), "ess": float(effective_sample_size(weights)) / particles,
                    "k_hat": float(pareto_k_hat(weights))}
        rows.append(row)
    return rows
