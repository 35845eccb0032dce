"""Noise levels at which exact sampling works on images: ``python -m benchmarks.tables.exact_table mnist``.

For each problem and noise level, on the first validation images, the table shows how far the importance weights of a
VFM's samples can be trusted, whether NoiseSMC converges from the VFM's proposal and from N(0, I), and at what cost. The
proposals are from the adapter without the correction, because importance weights apply to uncorrected samples. Every
sampler runs twice. Two correct runs agree in the log evidence, and in the posterior mean up to the samples' own noise.
"""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.tables.shared import head, line, parser
from invflow.evaluation.summary import write_json
from invflow.likelihood import GaussianLikelihood
from invflow.posterior import Posterior
from invflow.problem import load_problem
from invflow.smc import reliable_k_hat
from invflow.solver import Solver
from invflow.solvers.noise.tempered import NoiseSMC
from invflow.solvers.vfm import VFM

__all__ = ["main", "row", "solvers"]

COLUMNS = ("VFM", "problem", "sigma", "sampler", "k-hat", "can be trusted", "effective share",
           "gap of two log evidences", "gap of two means", "calls", "CPU seconds")


def solvers(vfm: VFM, weighted: int, particles: int) -> dict[str, tuple[Callable[[], Solver], int]]:
    """Samplers and their numbers of samples."""
    return {
        "importance weights": (lambda: NoiseSMC(vfm.prior, proposal=vfm.adapter, num_moves=0), weighted),
        "NoiseSMC from the adapter": (lambda: NoiseSMC(vfm.prior, proposal=vfm.adapter), particles),
        "NoiseSMC from N(0, I)": (lambda: NoiseSMC(vfm.prior), particles),
    }


def row(first: Posterior, second: Posterior) -> dict[str, float]:
    """Results of two runs of a sampler, averaged over observations (k-hat: median).

    Returns:
        ``k_hat``; ``trusted``, the share of observations whose k-hat is under the limit, or which converged by
        NoiseSMC's own verdict; ``effective``, effective sample size over N; ``evidence``, the absolute difference of
        the log evidences; ``means``, the root mean square difference of the means relative to that of independent exact
        samples, so about 1 if correct; ``calls`` for each sample of one run, forward and backward.
    """
    count = first.samples.shape[1]
    k_hat = torch.cat([run.diagnostics["k_hat"] for run in (first, second)]).float()
    ess = first.ess()
    share = torch.ones(1) if ess is None else ess / count
    if ess is None:
        trusted = torch.cat([run.diagnostics["converged"] for run in (first, second)])
    else:
        trusted = k_hat < reliable_k_hat(count)
    evidences = [run.log_evidence for run in (first, second) if run.log_evidence is not None]
    variance = 0.5 * (first.std().square() + second.std().square()).flatten(1).sum(1)
    noise = variance * 2 / (count * share.to(variance))
    apart = (first.mean() - second.mean()).square().flatten(1).sum(1)
    return {"k_hat": float(k_hat.median()), "trusted": float(trusted.float().mean()), "effective": float(share.mean()),
            "evidence": float((evidences[0] - evidences[1]).abs().mean()),
            "means": float((apart / noise.clamp(min=1e-12)).mean().sqrt()),
            "calls": first.nfe.forward + first.nfe.backward}


def main() -> None:
    """Print the table as markdown, and write it as JSON if requested."""
    command = parser("exact_table", __doc__, observations=3, seed=0)
    command.add_argument("data", choices=["mnist", "fashion-mnist"])
    command.add_argument("--vfms", nargs="+", help="names or folders; default: the shipped one")
    command.add_argument("--tasks", nargs="+", default=["denoising", "box-inpainting", "super-resolution"])
    command.add_argument("--levels", nargs="+", type=float, default=[0.025, 0.1, 0.3, 1.0], help="of noise")
    command.add_argument("--samplers", nargs="+", help="first words of the samplers' names; default: all")
    command.add_argument("--weighted", type=int, default=1000, help="number of weighted samples")
    command.add_argument("--particles", type=int, default=64, help="of NoiseSMC")
    command.add_argument("--output", type=Path, help="JSON file to write")
    arguments = command.parse_args()
    results: dict[str, Any] = {}
    print(head(*COLUMNS))
    for name in arguments.vfms or [arguments.data]:
        vfm = VFM.load(name)
        for task in arguments.tasks:
            for level in arguments.levels:
                problem = copy.copy(load_problem(f"{arguments.data}/{task}"))
                problem.sigma = level
                _, likelihood = problem.simulate(arguments.observations, split="validation", shuffle=False,
                                                 generator=torch.Generator().manual_seed(arguments.seed))
                assert isinstance(likelihood, GaussianLikelihood)
                for label, (build, count) in solvers(vfm, arguments.weighted, arguments.particles).items():
                    if arguments.samplers and not label.startswith(tuple(arguments.samplers)):
                        continue
                    begun = time.process_time()
                    with warnings.catch_warnings():  # the table has its own column for these warnings
                        warnings.simplefilter("ignore")
                        runs = [build().sample(likelihood, count, generator=torch.Generator().manual_seed(
                            arguments.seed + k)) for k in range(2)]
                    found = row(*runs) | {"seconds": (time.process_time() - begun) / 2}
                    results[f"{name}, {task}, {level:g}, {label}"] = found
                    k_hat, means = ("" if math.isnan(found[key]) else f"{found[key]:.2f}" for key in ("k_hat", "means"))
                    print(line(name, task, f"{level:g}", label, k_hat, f"{found['trusted']:.0%}",
                               f"{found['effective']:.3f}", f"{found['evidence']:.2f}", means,
                               f"{found['calls']:.0f}", f"{found['seconds']:.0f}"), flush=True)
    if arguments.output:
        write_json(results, arguments.output)


if __name__ == "__main__":
    main()
