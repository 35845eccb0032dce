"""Existing samplers on a Gaussian with a known posterior: ``python -m benchmarks.tables.field_table``.

The prior is N(0.5, 0.1^2) for each of 8 x 8 pixels. Half of the pixels are measured as 0.7 with noise 0.1. The
posterior is N(0.6, 0.0707^2) for these, and the prior for the others. Each sampler runs with its defaults; a sampler
that has both its paper's and deepinv's form runs once in each. The seed is 0.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch

import invflow
from benchmarks.tables.shared import head, line, parser
from invflow.operators import MatrixOperator

__all__ = ["EXACT", "SAMPLERS", "main", "moments"]

SHAPE = (1, 8, 8)
#: means and standard deviations of the measured pixels and of the others
EXACT = (0.6, 0.1 / 2**0.5, 0.5, 0.1)

def _of_deepinv(kind: Callable[..., invflow.Solver], **settings: Any) -> Callable[[invflow.FlowMap], invflow.Solver]:
    return lambda prior: kind(prior, variant="deepinv", **settings)


SAMPLERS: dict[str, Callable[[invflow.FlowMap], invflow.Solver]] = {
    "exact": lambda prior: invflow.ExactPosterior(prior),  # type: ignore[arg-type]
    "DPS": invflow.DPS, "DPS, zeta 0.3": lambda prior: invflow.DPS(prior, zeta=0.3), "PiGDM": invflow.PiGDM,
    "MomentMatching": invflow.MomentMatching, "DiffPIR": invflow.DiffPIR, "DDRM": invflow.DDRM,
    "DDRM, 100 steps": lambda prior: invflow.DDRM(prior, steps=100), "ULA": invflow.ULA, "PnPFlow": invflow.PnPFlow,
    "Flower": invflow.Flower, "Flower, mean": lambda prior: invflow.Flower(prior, sampling=False),
    "DAPS": invflow.DAPS, "FlowDPS": invflow.FlowDPS, "DPnP": invflow.DPnP, "NoiseLangevin": invflow.NoiseLangevin,
    "DFlow": invflow.DFlow, "WeightedDiamondMaps": invflow.WeightedDiamondMaps,
    "WeightedDiamondMaps, reward": lambda prior: invflow.WeightedDiamondMaps(prior, weights="reward"),
    "TwistedDiffusion": invflow.TwistedDiffusion,
    **{f"{kind.__name__}, deepinv": _of_deepinv(kind) for kind in (
        invflow.DPS, invflow.PiGDM, invflow.MomentMatching, invflow.DiffPIR, invflow.DDRM)},
    "DPS, deepinv, weight 100": _of_deepinv(invflow.DPS, weight=100.0),
    "DPS, deepinv, annealed": _of_deepinv(invflow.DPS, guidance="annealed"),
}


def moments(name: str, count: int, seed: int = 0) -> tuple[tuple[float, float, float, float], invflow.NFE]:
    """Means and standard deviations over samples and pixels, in the order of :data:`EXACT`, and calls per sample."""
    prior = invflow.GaussianMixtureFlow(torch.full((1, *SHAPE), 0.5), std=0.1)
    operator = MatrixOperator(torch.eye(64)[:32], image_shape=SHAPE)
    likelihood = invflow.GaussianLikelihood(operator, torch.full((1, 32), 0.7), sigma=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # particles do not converge at the paper's schedule
        posterior = SAMPLERS[name](prior).sample(likelihood, count, generator=seed)
    flat, weights = posterior.samples[0].flatten(1).double(), posterior.weights[0].double()[:, None]
    found: list[float] = []
    for part in (flat[:, :32], flat[:, 32:]):
        mean = float((weights * part).sum(0).mean())
        found += [mean, float((weights * (part - mean).square()).sum(0).mean().sqrt())]
    return tuple(found), posterior.nfe  # type: ignore[return-value]


def main(argv: list[str] | None = None, say: Callable[[str], Any] = print) -> None:
    """Print the table, row by row."""
    command = parser("field_table", __doc__, samples=512)
    command.add_argument("--only", nargs="+", choices=list(SAMPLERS), default=list(SAMPLERS), metavar="SAMPLER")
    options = command.parse_args(argv)
    say(head("", "calls forward + backward", "mean, measured", "std, measured", "mean, hidden", "std, hidden"))
    say(line("*truth*", "", *(f"{value:.4f}" for value in EXACT)))
    for name in options.only:
        found, nfe = moments(name, options.samples)
        say(line(name, f"{nfe.forward:g} + {nfe.backward:g}", *(f"{value:.4f}" for value in found)))


if __name__ == "__main__":
    main()
