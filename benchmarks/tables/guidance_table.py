r"""Reweighted noise compared with guidance: ``python -m benchmarks.tables.guidance_table OUTPUT``.

For a deterministic flow, the posterior is the law of f(z), where z ~ N(0, I) is reweighted by the likelihood of f(z)
(arXiv 2606.24516). Guidance changes the trajectory instead,

.. math:: \frac{dx}{dt} = b_t(x) + s \frac{1 - t}{t} \nabla_x \log N(y; A D_t(x), \sigma_t^2),

which would be the exact flow of the posterior only with the true likelihood of the noisy state in place of the
likelihood of the denoised image. ``fixed`` uses sigma for sigma_t, as in diffusion posterior sampling. ``annealed``
adds the uncertainty of the denoised image, sigma_t^2 = sigma^2 + r_t^2 |A|^2 with r_t = (1 - t) / sqrt(t^2 + (1 -
t)^2), as in pseudo-inverse guidance. Guidance has an error at every strength s; reweighting has the error of as many
exact draws as its effective sample size.

The problem is ``gaussian/linear``: five Gaussians in the plane, one measured number. Each row has the sliced
Wasserstein distance to the exact posterior, relative to that of exact draws, over observations and seeds.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from benchmarks.tables.shared import cell, head, line, parser, write_rows
from invflow.likelihood import GaussianLikelihood
from invflow.metrics import floor_ratio
from invflow.plugins import write_atomically, write_text
from invflow.posterior import Posterior
from invflow.problem import Problem, load_problem
from invflow.solvers.noise.rto import NoiseRTO
from invflow.solvers.noise.tempered import NoiseSMC

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["STRENGTHS", "figure", "guided", "main", "reweighted", "rows"]

STRENGTHS = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
#: guidance starts here: its rate is unbounded at t = 0
FIRST = 0.01
FIELDS = ("method", "strength", "seed", "ratio", "calls")


def guided(problem: Problem, likelihood: GaussianLikelihood, n: int, generator: torch.Generator, *, strength: float,
           annealed: bool, steps: int = 200) -> Tensor:
    """Samples ``(B, n, d)`` by guided Euler steps, uniform in log(t / (1 - t)) from 0.01 to 0.999 and one more."""
    prior, count = problem.prior, len(likelihood.y)
    x = torch.randn(count * n, *prior.state_shape, generator=generator)
    y = likelihood.y.repeat_interleave(n, 0)
    sigma = likelihood.sigma.repeat_interleave(n)[:, None]
    operator = likelihood.operator
    norm = float(torch.linalg.matrix_norm(operator(torch.eye(x.shape[1])).T, 2))
    logits = torch.linspace(math.log(FIRST / (1 - FIRST)), math.log(999.0), steps).tolist()
    times = [0.0, *(1 / (1 + math.exp(-value)) for value in logits), 1.0]
    for t, after in itertools.pairwise(times):
        if t == 0.0:
            x = x + after * prior.velocity(x, t)
            continue
        with torch.enable_grad():
            state = x.detach().requires_grad_()
            velocity = prior.velocity(state, t)
            extra = (1 - t) ** 2 / (t**2 + (1 - t) ** 2) * norm**2 if annealed else 0.0
            misfit = 0.5 * ((y - operator(state + (1 - t) * velocity)).square() / (sigma.square() + extra)).sum()
            slope = torch.autograd.grad(misfit, state)[0]
        pull = strength * (1 - t) / t * slope
        # limit a step to the width of the prior; otherwise, strong guidance would overflow
        length = ((after - t) * pull).norm(dim=1, keepdim=True)
        x = x + (after - t) * (velocity.detach() - pull * (2.0 / length).clamp(max=1.0))
    images: Tensor = prior.decode(x).unflatten(0, (count, n))
    return images.detach()


def reweighted(problem: Problem, likelihood: GaussianLikelihood, n: int, generator: torch.Generator) -> Posterior:
    """Draws of the one-step prior, weighted by the likelihood: the posterior of a deterministic flow."""
    count = len(likelihood.y)
    x = problem.prior.generate(count * n, generator=generator).unflatten(0, (count, n))
    return Posterior(x, likelihood(x))


def _methods(n: int) -> dict[tuple[str, float], Callable[[Problem, GaussianLikelihood, torch.Generator], Posterior]]:
    found: dict[tuple[str, float], Any] = {
        ("reweighted noise", 0.0): lambda p, l, g: reweighted(p, l, n, g),
        ("NoiseSMC", 0.0): lambda p, l, g: NoiseSMC(p.prior).sample(l, n, generator=g),
        ("NoiseRTO, weights", 0.0): lambda p, l, g: NoiseRTO(p.prior, weights=True).sample(l, n, generator=g),
    }
    for kind in ("fixed", "annealed"):
        for s in STRENGTHS:
            found[f"guidance, {kind}", s] = lambda p, l, g, s=s, k=kind: Posterior(
                guided(p, l, n, g, strength=s, annealed=k == "annealed"))
    return found


def rows(n: int = 256, observations: int = 8, seeds: int = 3, *,
         only: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """All rows of the table.

    Args:
        n: Samples for each observation.
        observations: Number of observations for each seed.
        seeds: Seeds of observations and samplers.
        only: Names of methods; None for all.
    """
    problem, found = load_problem("gaussian/linear"), []
    for seed in range(seeds):
        g = torch.Generator().manual_seed(seed)
        _, likelihood = problem.simulate(observations, generator=g)
        exact = problem.exact_posterior().sample(likelihood, 3 * n, generator=g).samples
        for (method, strength), draw in _methods(n).items():
            if only is not None and method not in only:
                continue
            with warnings.catch_warnings(), problem.prior.count() as calls:
                warnings.simplefilter("ignore", UserWarning)
                posterior = draw(problem, likelihood, torch.Generator().manual_seed(1000 + seed))
            weights = posterior.log_weights if posterior.weighted else None
            ratio = floor_ratio(posterior.samples, exact, weights, generator=torch.Generator().manual_seed(seed))
            found.append({"method": method, "strength": strength, "seed": seed, "ratio": float(ratio.mean()),
                          "calls": (calls.forward + calls.backward) / (observations * n)})
    return found


def summary(table: Sequence[dict[str, Any]]) -> str:
    """The rows as a table in Markdown: means over seeds with standard errors."""
    lines = [head("method", "strength", "W1 over floor", "calls")]
    for method, strength in dict.fromkeys((row["method"], float(row["strength"])) for row in table):
        own = [row for row in table if (row["method"], float(row["strength"])) == (method, strength)]
        calls = sum(float(row["calls"]) for row in own) / len(own)
        ratio = cell([float(row["ratio"]) for row in own], 2)
        lines.append(line(method, f"{strength:g}" if strength else "", ratio, f"{calls:.0f}"))
    return "\n".join(lines)


def figure(table: Sequence[dict[str, Any]]) -> Figure:
    """Plot the error against the strength of guidance, with reweighting as horizontal lines."""
    import matplotlib.pyplot as plt

    drawn, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for method in dict.fromkeys(row["method"] for row in table):
        own = [row for row in table if row["method"] == method]
        strengths = sorted({float(row["strength"]) for row in own})
        means = [sum(float(r["ratio"]) for r in own if float(r["strength"]) == s) / sum(
            float(r["strength"]) == s for r in own) for s in strengths]
        if strengths == [0.0]:
            axes.axhline(means[0], linestyle="--", label=method, color=f"C{len(axes.get_lines())}")
        else:
            axes.plot(strengths, means, marker="o", label=method, color=f"C{len(axes.get_lines())}")
    axes.set(xscale="log", yscale="log", xlabel="guidance strength", ylabel="W1 to the posterior / floor")
    shown = sorted({float(row["strength"]) for row in table if float(row["strength"]) > 0})
    axes.set_xticks(shown, [f"{s:g}" for s in shown])
    axes.minorticks_off()
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.legend(fontsize=8)
    return drawn


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    command = parser("guidance_table", "Compare reweighted noise with guided trajectories, in the plane.",
                     samples=256, observations=8, seeds=3)
    command.add_argument("output", type=Path, help="folder for guidance.csv, guidance.md and guidance.png")
    options = command.parse_args(arguments)
    table = rows(options.samples, options.observations, options.seeds)
    write_rows(options.output / "guidance.csv", table, FIELDS)
    text = summary(table)
    write_text(options.output / "guidance.md", text + "\n")
    drawn = figure(table)
    write_atomically(options.output / "guidance.png", lambda path: drawn.savefig(path, format="png", dpi=150))
    print(text)


if __name__ == "__main__":
    main()
