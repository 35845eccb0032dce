"""Noise-space samplers on a sharp likelihood: ``python -m benchmarks.tables.box_table --output runs/box``.

The problem is ``mnist/box-inpainting`` with truths drawn from the solver's own prior: the one-step map for samplers in
noise space, and the untilted dynamics for FMTT. Each truth is therefore an exact draw from its posterior. For each
observation and sampler, the table has the mean squared residual over the observed pixels, in units of sigma^2 (about 1
for exact samples), the standard deviation in the hole, and the squared error of the posterior mean in the hole. For an
exact sampler, the squared error, averaged over observations, is its variance times 1 + 1 / N. The root of their ratio,
*spread / reference*, therefore measures the spread without a reference. The optional row ``reference`` is a long run of
other particles with many times the moves. For it, the table also has the agreement of the chains: split R-hat of the
hole's mean, halves and first principal components.

The work is split into groups of observations. A group that is already in the output folder is skipped.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import invflow
from benchmarks.tables.shared import Rows, append_rows, cell, head, line, parser, plus_minus, read_rows
from invflow.likelihood import GaussianLikelihood
from invflow.plugins import Countable
from invflow.solvers.tilting.schedules import logit_grid

__all__ = ["MAPS", "ROWS", "main", "run_group", "split_r_hat", "table"]

PROBLEM = "mnist/box-inpainting"
MAPS = ("prior", "vfm")
ROWS = ("plain", "tempered", "rto", "reference", "vfm", "fmtt", "fmtt-linear", "fmtt-weighted")
#: rows for only one map: FMTT cannot use the VFM's map, whose noise depends on the data
ROW_MAPS = {"vfm": ("vfm",), "fmtt": ("prior",), "fmtt-linear": ("prior",), "fmtt-weighted": ("prior",)}
#: rows that are one call of a solver, and their titles
SINGLE = {"plain": "NoiseSMC, plain", "tempered": "NoiseSMC, preconditioned moves",
          "fmtt": "FMTT conjugate, annealed", "fmtt-linear": "FMTT conjugate, linear",
          "fmtt-weighted": "FMTT conjugate, twisted weights"}
FIELDS = ("map", "row", "sampler", "observation", "residual", "std", "error", "particles", "forward", "backward",
          "converged", "r_hat", "seconds")


def split_r_hat(values: Tensor) -> Tensor:
    """Split R-hat of scalar statistics (Gelman et al. 2013): ``(chains, times, k)`` to ``(k,)``."""
    times = values.shape[1] // 2
    halves = torch.cat([values[:, :times], values[:, times:2 * times]])
    within = halves.var(1).mean(0)
    between = halves.mean(1).var(0)
    return ((times - 1) / times + between / within).sqrt()


def summaries(hole: Tensor) -> Tensor:
    """Mean, upper, lower, left and right half and three principal components of holes ``(n, times, h, w)``."""
    height, width = hole.shape[2] // 2, hole.shape[3] // 2
    parts = (hole, hole[:, :, :height], hole[:, :, height:], hole[..., :width], hole[..., width:])
    flat = hole.flatten(2)
    centred = (flat - flat.mean((0, 1))).flatten(0, 1)
    axes = torch.linalg.svd(centred, full_matrices=False)[2][:3]
    return torch.cat([torch.stack([part.mean((2, 3)) for part in parts], dim=2), flat @ axes.T], dim=2)


def solvers(prior: invflow.FlowMap, adapter: invflow.Adapter | None, rows: int,
            ) -> dict[str, Callable[[], invflow.NoiseSMC]]:
    """Functions that build the samplers that run state by state, for each row."""
    def from_rto(num_moves: int) -> invflow.NoiseSMC:
        # 150 iterations leave some draws with twice the residual; 300 plus the moves stay under 1,000 calls
        start = invflow.NoiseRTO(prior, proposal=adapter, max_iterations=300, chunk_size=rows)
        return invflow.NoiseSMC(prior, start=start, leapfrog_steps=30, num_moves=num_moves, num_adaptations=3,
                                chunk_size=rows)

    return {
        "plain": lambda: invflow.NoiseSMC(prior, proposal=adapter, num_moves=10, ess_threshold=0.5, chunk_size=rows),
        "tempered": lambda: invflow.NoiseSMC(prior, proposal=adapter, moves="preconditioned-hamiltonian",
                                             leapfrog_steps=15, num_moves=1, ess_threshold=0.5, chunk_size=rows),
        "rto": lambda: from_rto(3), "reference": lambda: from_rto(30),
    }


def tilting(prior: invflow.FlowMap, row: str, rows: int) -> invflow.FMTT:
    """FMTT with conjugate proposals in 100 calls: unweighted with one of two schedules, or with its weights.

    The gradient proposal needs twice as many calls and has a worse spread.
    """
    grid: Any = "logit" if row == "fmtt-linear" else partial(logit_grid, first=0.03, last=0.95)
    return invflow.FMTT(prior, steps=100, kernel="ancestral", look_ahead="denoiser", proposal="conjugate",
                        schedule="linear" if row == "fmtt-linear" else "annealed", time_grid=grid, chunk_size=rows,
                        weights="twisted" if row == "fmtt-weighted" else "none")


def calibration(std: Tensor, error: Tensor, particles: int) -> tuple[float, float]:
    """Spread over that of an exact sampler with the same error of the mean, and the jackknife's standard error.

    It is the root of the squared error that the samples predict over the squared error of their mean.

    Args:
        std: ``(B,)``, standard deviation in the hole, one for each observation.
        error: ``(B,)``, mean squared error of the posterior mean there.
        particles: N, the number of particles behind mean and deviation.
    """
    scale = 1 + 1 / particles
    variance, count = std.square(), len(std)
    ratio = float((variance.sum() * scale / error.sum()).sqrt())
    if count < 2:
        return ratio, math.nan
    without = ((variance.sum() - variance) * scale / (error.sum() - error)).sqrt()
    return ratio, float(((count - 1) * (without - without.mean()).square().mean()).sqrt())


def measure(images: Tensor, truth: Tensor, likelihood: GaussianLikelihood, hidden: Tensor) -> list[dict[str, float]]:
    """Residual, spread and error of samples ``(B, N, 1, H, W)``, for each observation."""
    inside = images[..., hidden]
    error = (inside.mean(1) - truth[..., hidden]).square().flatten(1).mean(1)
    spread = inside.var(1).flatten(1).mean(1).sqrt()
    residual = likelihood.chi_square(images).mean(1)
    return [{"residual": float(r), "std": float(s), "error": float(e)} for r, s, e in zip(residual, spread, error)]


def run_group(map_name: str, row: str, group: range, particles: int, seed: int,
              total: int) -> Iterator[dict[str, float | str]]:
    """Results of one row for a group of observations.

    Args:
        map_name: ``"prior"``, the shipped prior without adapter, or ``"vfm"``, the shipped VFM's map with its adapter.
        row: One of :data:`ROWS`.
        group: Range of observations.
        particles: Number of particles for each observation.
        seed: Random seed.
        total: Number of observations of the whole table, which determines them for any group.

    Yields:
        One result for each sampler of the row and observation; the row ``"rto"`` also has the draws before any move.
    """
    problem = invflow.load_problem(PROBLEM)
    pair = invflow.VFM.load("mnist") if map_name == "vfm" else None
    prior, adapter = (problem.prior, None) if pair is None else (pair.prior, pair.adapter)
    generator, count = torch.Generator().manual_seed(seed), len(group) * particles
    tilted = tilting(prior, row, count) if row.startswith("fmtt") else None
    truth = (tilted.prior_samples if tilted else prior.generate)(total, generator=generator)
    y = problem.operator.measure(truth, problem.sigma, generator=generator)  # type: ignore[arg-type]
    likelihood = GaussianLikelihood(problem.operator, y[group.start:group.stop], problem.sigma)  # type: ignore[arg-type]
    truth = truth[group.start:group.stop]
    hidden = ~problem.operator.observed()[0, 0]  # type: ignore[index]
    draw = torch.Generator().manual_seed(1000 * seed + 10 * group.start + (5 if row == "reference" else 1))
    start = time.perf_counter()

    def results(sampler: str, images: Tensor, calls: tuple[float, float], converged: Tensor | None,
                r_hat: list[float] | None = None) -> Iterator[dict[str, float | str]]:
        for k, values in enumerate(measure(images, truth, likelihood, hidden)):
            yield {"map": map_name, "row": row, "sampler": sampler, "observation": group[k], "particles": particles,
                   "forward": calls[0], "backward": calls[1], "seconds": (time.perf_counter() - start) / len(group),
                   "converged": "" if converged is None else int(converged[k]),
                   "r_hat": "" if r_hat is None else r_hat[k], **values}

    if row == "vfm":
        assert pair is not None
        posterior = pair.sample(likelihood, particles, generator=draw)
        yield from results("VFM", posterior.samples, (posterior.nfe.forward, posterior.nfe.backward), None)
        return
    if row in SINGLE:
        single = tilted or solvers(prior, adapter, count)[row]()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            posterior = single.sample(likelihood, particles, generator=draw)
        images = posterior.resample(particles, generator=draw).samples
        yield from results(SINGLE[row], images, (posterior.nfe.forward, posterior.nfe.backward),
                           posterior.diagnostics["converged"])
        return
    solver = solvers(prior, adapter, count)[row]()
    kept: list[Tensor] = []
    with ExitStack() as scopes:
        calls = [scopes.enter_context(m.count()) for m in (prior, adapter) if isinstance(m, Countable)]
        for k, state in enumerate(solver.iterate(likelihood, particles, generator=draw)):
            cost = (sum(c.forward for c in calls) / count, sum(c.backward for c in calls) / count)
            images = state.particles.images
            if k == 0 and row == "rto":
                yield from results("NoiseRTO", images, cost, None)
            kept += [images] if not state.adapting else []
    if row == "rto":
        yield from results("NoiseSMC from RTO", images, cost, None)
        return
    # discard the first half of the frozen moves
    late = torch.stack(kept[len(kept) // 2:], dim=2)[..., 0, :, :]  # (B, N, times, H, W)
    height, width = int(hidden.any(1).sum()), int(hidden.any(0).sum())
    holes = late[..., hidden].unflatten(-1, (height, width))
    r_hat = [float(split_r_hat(summaries(hole)).max()) for hole in holes]
    yield from results("reference", late.flatten(1, 2)[:, :, None], cost, None, r_hat)


def table(lines: Rows) -> str:
    """Markdown: one line for each map and sampler, means over observations with standard errors."""
    reference = {(li["map"], li["observation"]): float(li["std"]) for li in lines if li["sampler"] == "reference"}
    text = [head("map", "sampler", "observations x particles", "chi-square", "standard deviation in the hole",
                 "over the long run's", "spread / reference", "calls forward + backward")]
    for key in dict.fromkeys((li["map"], li["sampler"]) for li in lines):
        part = [li for li in lines if (li["map"], li["sampler"]) == key]
        ratio = [float(li["std"]) / reference[li["map"], li["observation"]] for li in part
                 if (li["map"], li["observation"]) in reference]
        n = int(part[0]["particles"])
        std, error = (torch.tensor([float(li[k]) for li in part], dtype=torch.float64) for k in ("std", "error"))
        judged, uncertain = calibration(std, error, n)
        forward, backward = (sum(float(li[k]) for li in part) / len(part) for k in ("forward", "backward"))
        text.append(line(*key, f"{len(part)} x {n}", cell([float(li["residual"]) for li in part], 3), cell(std, 3),
                         cell(ratio, 3), plus_minus(judged, uncertain, 2), f"{forward:.0f} + {backward:.0f}"))
    r_hats = [float(li["r_hat"]) for li in lines if li["r_hat"]]
    if r_hats:
        numbers = ", ".join(f"{r:.2f}" for r in r_hats)
        text.append(f"\nLargest split R-hat of the long run, for each observation: {numbers}")
    return "\n".join(text)


def main() -> None:
    """Compute the missing groups, then print the table."""
    command = parser("box_table", __doc__, observations=16, particles=16, seed=0)
    command.add_argument("--output", type=Path, required=True, help="folder of results.csv")
    command.add_argument("--group", type=int, default=4, help="number of observations in a group")
    command.add_argument("--groups", type=int, help="number of groups to compute, from the first; default: all")
    command.add_argument("--rows", nargs="+", choices=ROWS, default=["rto"])
    command.add_argument("--maps", nargs="+", choices=MAPS, default=list(MAPS))
    arguments = command.parse_args()
    path = arguments.output / "results.csv"
    lines = read_rows(path)
    starts = list(range(0, arguments.observations, arguments.group))[: arguments.groups]
    for low in starts:
        for row in arguments.rows:
            for map_name in arguments.maps:
                group = range(low, min(low + arguments.group, arguments.observations))
                done = {int(li["observation"]) for li in lines if (li["map"], li["row"]) == (map_name, row)}
                if set(group) <= done or map_name not in ROW_MAPS.get(row, MAPS):
                    continue
                append_rows(path, run_group(map_name, row, group, arguments.particles, arguments.seed,
                                            arguments.observations), FIELDS)
                lines = read_rows(path)
                print(f"{map_name} {row}: observations {group.start} to {group.stop - 1}", flush=True)
    print(table(lines))


if __name__ == "__main__":
    main()
