"""Stored samples of every solver with a fixed seed: a change of structure changes none of them.

A change that is meant to change the numbers must say so and write them again: ``python tests/solvers/test_golden.py``.
"""

from __future__ import annotations

import json
import math
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import invflow
from invflow.problem import load_problem
from invflow.registry import list_solvers, solver_by_name
from invflow.solvers.tilting.annealing import AnnealedCovariance, ReversalDiffusion
from invflow.solvers.tilting.conjugate import Conjugate
from invflow.solvers.tilting.schedules import AnnealedVariance, logit_grid
from invflow_operators.linear import MatrixOperator

GOLDEN = Path(__file__).with_name("golden.json")
#: one thread of float32 and another order of sums may differ by this, relative to the size of the numbers
TOLERANCE = {torch.float32: 2e-3, torch.float64: 1e-7}

FEW: dict[str, dict[str, Any]] = {
    "fmtt": {"steps": 3}, "tds": {"steps": 3}, "noise-smc": {"num_moves": 1, "max_temperatures": 2},
    "noise-rto": {"max_iterations": 2}, "dps": {"steps": 3}, "pigdm": {"steps": 3}, "moment-matching": {"steps": 3},
    "diffpir": {"steps": 3}, "ddrm": {"steps": 3}, "ula": {"burn_in": 2, "thinning": 1}, "pnp-flow": {"steps": 2},
    "flower": {"steps": 3}, "top-k": {"budget": 60}, "beam": {"budget": 8}, "best-of-n": {"budget": 4},
    "daps": {"steps": 2, "langevin_steps": 2}, "flow-dps": {"steps": 2}, "diamond": {"steps": 2},
    "dpnp": {"iterations": 2, "diffusion_steps": 2}, "noise-langevin": {"steps": 2},
    "d-flow": {"iterations": 2, "ode_steps": 1}, "plug-and-play": {"steps": 2}, "tv": {"iterations": 5}}
PACKAGE = dict.fromkeys(("dps", "pigdm", "moment-matching", "diffpir", "ddrm", "ula"), "deepinv")

#: settings of FMTT and the searches on the plane, in double precision, with a measurement of the first coordinate
PLANE: dict[str, dict[str, Any]] = {
    "default": {},
    "never resampled": {"resample_threshold": 0},
    "always resampled": {"resample_threshold": 1.0, "resampling": "residual"},
    "denoiser": {"look_ahead": "denoiser", "schedule": "annealed"},
    "none": {"look_ahead": "none"},
    "two jumps": {"look_ahead_steps": 2, "max_shift": 0.3},
    "ancestral": {"kernel": "ancestral", "look_ahead": "denoiser", "time_grid": "logit"},
    "ancestral, conjugate": {"kernel": "ancestral", "look_ahead": "denoiser", "proposal": "conjugate"},
    "renoise": {"kernel": "renoise"},
    "renoise, far": {"kernel": "renoise", "diffusion": math.inf, "look_ahead_steps": 2},
    "renoise, conjugate": {"kernel": "renoise", "proposal": Conjugate(spread=2.0), "schedule": AnnealedVariance(2.0)},
    "sde, conjugate": {"proposal": "conjugate", "schedule": "annealed", "chunk_size": 7},
    "conjugate, approximate": {"proposal": "conjugate", "weights": "none"},
    "gradient, approximate": {"weights": "none"},
    "jarzynski": {"weights": "jarzynski"},
    "jarzynski, denoiser": {"weights": "jarzynski", "look_ahead": "denoiser", "schedule": lambda t: t**2},
    "jarzynski, none": {"weights": "jarzynski", "look_ahead": "none"},
    "heun": {"weights": "jarzynski", "kernel": "heun"},
    "heun, denoiser": {"weights": "jarzynski", "kernel": "heun", "look_ahead": "denoiser",
                       "diffusion": lambda t: 1 - t},
    "modes apart": {"kernel": "renoise", "schedule": "covariance", "diffusion": ReversalDiffusion(),
                    "time_grid": partial(logit_grid, first=1e-2)},
}


def plane(options: dict[str, Any], make: Callable[..., invflow.Solver] = invflow.FMTT,
          tilt: invflow.Reward | None = None) -> invflow.Posterior:
    angle = 2 * math.pi * torch.arange(5, dtype=torch.float64) / 5
    prior = invflow.GaussianMixtureFlow(3 * torch.stack([angle.cos(), angle.sin()], dim=1), std=0.5, steps=4)
    if options.get("schedule") == "covariance":
        options = {**options, "schedule": AnnealedCovariance.of_mixture(prior)}
    operator = MatrixOperator(torch.tensor([[1.0, 0.2]], dtype=torch.float64), image_shape=(2,))
    y = torch.tensor([[1.0], [-2.0]], dtype=torch.float64)
    likelihood = invflow.GaussianLikelihood(operator, y, sigma=0.4)
    return make(prior, **{"steps": 6, **options} if make is not invflow.TopKSearch else options).sample(
        likelihood if tilt is None else tilt, 12, generator=3)


def constraint(differentiable: bool) -> invflow.Reward:
    return invflow.FunctionReward(lambda x: torch.where(x[:, 0] > 0, -x[:, 1] ** 2, -torch.inf),
                                  differentiable=differentiable)


def registered(name: str) -> invflow.Posterior:
    if name in PACKAGE:
        pytest.importorskip(PACKAGE[name])
    problem = load_problem("gaussian/linear" if name == "exact" else "mnist/denoising")
    _, likelihood = problem.simulate(2, generator=torch.Generator().manual_seed(1))
    return solver_by_name(name, problem, **FEW.get(name, {})).sample(likelihood, 3, generator=5)


CASES: dict[str, Callable[[], invflow.Posterior]] = {
    **{f"registry: {name}": partial(registered, name) for name in list_solvers() if name != "bm3d"},
    **{f"FMTT: {name}": partial(plane, options) for name, options in PLANE.items()},
    "FMTT: black box": lambda: plane({}, tilt=constraint(False)),
    "FMTT: constraint": lambda: plane({}, tilt=constraint(True)),
    "FMTT: jarzynski beside a constraint": lambda: plane({"weights": "jarzynski"}, tilt=constraint(True)),
    "TDS: constant": lambda: plane({}, invflow.TwistedDiffusion),
    "TDS: annealed": lambda: plane({"schedule": "annealed", "max_shift": 1.0}, invflow.TwistedDiffusion),
    "top-k: sde": lambda: plane({"budget": 700, "k": 2}, invflow.TopKSearch),
    "top-k: renoise": lambda: plane({"budget": 900, "kernel": "renoise", "selections": 2}, invflow.TopKSearch),
    "top-k: black box": lambda: plane({"budget": 700}, invflow.TopKSearch, constraint(False)),
}


def numbers(posterior: invflow.Posterior) -> dict[str, Any]:
    """What is kept: moments and a few of the samples, weights, cost, and the diagnostics that are numbers."""
    x = posterior.samples
    kept: dict[str, Any] = {"mean": x.mean().item(), "std": x.std().item(), "samples": x.flatten()[::max(
        1, x.numel() // 8)].tolist(), "calls": [posterior.nfe.forward, posterior.nfe.backward]}
    if posterior.log_weights is not None:
        kept["log_weights"] = posterior.log_weights.flatten().nan_to_num(neginf=-1e9).tolist()[:12]
    for name in ("ess_path", "resamplings", "distinct_ancestors", "capped_share", "converged", "calls"):
        found = posterior.diagnostics.get(name)
        if found is not None:
            kept[name] = torch.as_tensor(found).double().flatten().tolist()
    return kept


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
def test_samples_are_those_of_the_file(case: str) -> None:
    golden = json.loads(GOLDEN.read_text())
    posterior = CASES[case]()
    found, wanted = numbers(posterior), golden[case]
    assert found.keys() == wanted.keys()
    share = TOLERANCE[posterior.samples.dtype]
    for name, value in wanted.items():
        one, two = torch.tensor(found[name], dtype=torch.float64), torch.tensor(value, dtype=torch.float64)
        slack = share * (1 + two.abs().max().item()) if name != "calls" else 0
        assert torch.allclose(one, two, rtol=0, atol=slack), (name, found[name], value)


if __name__ == "__main__":
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        written = {case: numbers(draw()) for case, draw in CASES.items()}
    GOLDEN.write_text(json.dumps(written, indent=0) + "\n")
    sys.stdout.write(f"wrote {GOLDEN.name}: {len(written)} cases\n")
