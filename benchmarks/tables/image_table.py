"""Table of the image problems: ``python -m benchmarks.tables.image_table mnist`` evaluates a VFM on test images.

For comparison, the table has the pseudo-inverse of the measurement, and the linear minimum-mean-square-error estimate
fitted to the training images (:class:`invflow.LinearMMSE`), with its Gaussian. For CIFAR-10, the full covariance is too
large to ship. Instead, the table has the linear estimate under a stationary Gaussian with the images' spectrum
(:func:`~invflow.linear.spectral.gaussian_estimate`), from which the VFM's adapter starts; ``--lmmse FOLDER`` adds the
full estimate. The test images were never used for training. The last lines are the shares of unconditional draws that
the shipped classifier recognises with confidence; ``--tasks --flow`` prints only these, also along the prior's
velocity.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from benchmarks.tables.shared import head, line, mean_and_error, parser, plus_minus
from invflow.evaluation.measures import measure
from invflow.evaluation.summary import is_collapsed, write_json
from invflow.flowmap import FlowMap
from invflow.likelihood import GaussianLikelihood
from invflow.linear.spectral import gaussian_estimate
from invflow.metrics import psnr
from invflow.models.neural import NeuralFlowMap, load_prior
from invflow.models.wrappers import VelocityFlow
from invflow.nets.classifier import confident_share
from invflow.plugins import SHIPPED
from invflow.posterior import Posterior
from invflow.problem import Problem, load_problem
from invflow.solver import Solver
from invflow.solvers.baselines.lmmse import LinearMMSE
from invflow.solvers.vfm import VFM

__all__ = ["TASKS", "evaluate", "main", "stationary_estimate"]

SHOWN = ("psnr", "crps", "coverage", "residual", "ess")
TASKS = ("denoising", "random-inpainting", "box-inpainting", "super-resolution", "gaussian-blur", "motion-blur")


def judge(posterior: Posterior, likelihood: GaussianLikelihood, truth: Tensor,
          only: Sequence[str] = SHOWN) -> dict[str, Tensor]:
    """Metrics for each observation, each ``(B,)``; the spread is over the hidden pixels."""
    hidden = likelihood.operator.observed()
    spread = posterior.std().flatten(1)
    quiet = torch.ones_like(spread, dtype=torch.bool) if hidden is None else ~hidden.flatten(1).expand_as(spread)
    found = measure(posterior, likelihood, truth, only=only)
    return {**found, "spread": (spread.square() * quiet).sum(dim=1).div(quiet.sum(dim=1).clamp(min=1)).sqrt()}


def stationary_estimate(prior: NeuralFlowMap, likelihood: GaussianLikelihood) -> Tensor:
    """The linear estimate under the Gaussian of a map with ``skip="spectral"``, ``(B, *image_shape)``."""
    assert prior.spectrum is not None
    return prior.decode(gaussian_estimate(prior.spectrum, prior.mean, prior.decode_affine, likelihood.operator,
                                          likelihood.y, likelihood.sigma))


def evaluate(problem: Problem, solvers: dict[str, Solver], *, num_observations: int, num_samples: int, seed: int,
             estimates: Mapping[str, Callable[[GaussianLikelihood], Tensor]] = MappingProxyType({})) -> dict[str, Any]:
    """Evaluate solvers on the same observations of the first test images.

    Args:
        problem: Problem that defines the observations.
        solvers: Solvers by name.
        num_observations: Number of test images, starting with the first.
        num_samples: Samples of each posterior.
        seed: Random seed of the observations, and of each solver.
        estimates: By name, functions of the likelihood that return one image for each observation.

    Returns:
        By name of the solver, its metrics: means, standard errors, calls per sample and seconds. The name of a solver
        with :func:`~invflow.evaluation.summary.is_collapsed` ends with "(collapsed)"; estimates and ``pseudo-inverse``
        only have their PSNR.
    """
    g = torch.Generator().manual_seed(seed)
    truth, likelihood = problem.simulate(num_observations, generator=g, shuffle=False)
    table: dict[str, Any] = {}
    for name, estimate in {"pseudo-inverse": lambda l: l.operator.pseudo_inverse(l.y), **estimates}.items():
        values = psnr(estimate(likelihood), truth)
        table[name] = {"psnr": mean_and_error(values)}
    for name, solver in solvers.items():
        posterior = solver.sample(likelihood, num_samples, generator=torch.Generator().manual_seed(seed), progress=True)
        columns = judge(posterior, likelihood, truth)
        if is_collapsed(columns.get("ess", torch.empty(0)).tolist(), num_samples):
            name = f"{name} (collapsed)"  # under ten effective samples
        table[name] = {key: mean_and_error(value) for key, value in columns.items()}
        table[name] |= {"calls": posterior.nfe.forward, "seconds": posterior.seconds}
    return table


def recognised_shares(makers: Mapping[str, FlowMap], data: str, seed: int) -> dict[str, float]:
    """Return and print the recognised shares of 1,000 unconditional samples in 1, 2 and 4 steps."""
    shares = {}
    for label, maker in makers.items():
        for steps in (1, 2, 4):
            images = maker.generate(1000, steps, generator=torch.Generator().manual_seed(seed))
            shares[f"{label}, {steps}"] = share = confident_share(images, data)
            print(f"{label}, {steps} step{'s' * (steps > 1)}: {share:.3f} recognised with over 0.9 confidence")
    return shares


def along_velocity(prior: FlowMap, steps: int = 32) -> FlowMap:
    """The flow along a prior's velocity, in Heun steps: the limit for jumps without error."""
    assert prior.decode_affine is not None
    return VelocityFlow(prior.velocity, prior.state_shape, image_shape=prior.image_shape, steps=steps, method="heun",
                        decode=prior.decode_affine)


def recognised_along_flow(prior: FlowMap, data: str, seed: int, steps: int = 32) -> dict[str, float]:
    """Same as :func:`recognised_shares`, by :func:`along_velocity`."""
    flow = along_velocity(prior, steps)
    share = confident_share(flow.generate(1000, 1, generator=torch.Generator().manual_seed(seed)), data)
    print(f"velocity of the prior, {steps} Heun steps: {share:.3f} recognised with over 0.9 confidence")
    return {f"velocity of the prior, {steps}": share}


def main() -> None:
    """Print the table as markdown and write it as JSON."""
    command = parser("image_table", __doc__, observations=100, samples=64, seed=0)
    command.add_argument("data", choices=["mnist", "fashion-mnist", "cifar10"])
    command.add_argument("--steps", type=int, nargs="+", default=[1, 4], help="numbers of jumps of the VFM")
    command.add_argument("--vfm", help="folder of a VFM, instead of the shipped one")
    command.add_argument("--prior", help="folder of a prior, instead of the shipped one")
    command.add_argument("--lmmse", help="folder written by benchmarks.release.fit_lmmse, instead of the shipped one")
    command.add_argument("--tasks", nargs="*", default=TASKS, choices=TASKS, help="problems; none: only the shares")
    command.add_argument("--flow", action="store_true", help="add the recognised share along the prior's velocity")
    command.add_argument("--output", type=Path, help="JSON file to write")
    arguments = command.parse_args()
    name = arguments.vfm or arguments.data
    solvers: dict[str, Solver] = {}
    if arguments.lmmse or (SHIPPED / f"{arguments.data}-lmmse").is_dir():
        solvers["LMMSE"] = LinearMMSE.load(arguments.lmmse or arguments.data)
    solvers |= {f"VFM, {k} step{'s' * (k > 1)}": VFM.load(name, steps=k) for k in arguments.steps}
    vfm_map = VFM.load(name).prior
    estimates = {}
    if isinstance(vfm_map, NeuralFlowMap) and vfm_map.spectrum is not None:
        estimates["stationary linear"] = functools.partial(stationary_estimate, vfm_map)
    results: dict[str, Any] = {"observations": arguments.observations, "samples": arguments.samples}
    if arguments.tasks:
        print(head("problem", "solver", "PSNR of the mean", "CRPS", "90% coverage", "residual", "spread", "calls",
                   "seconds"))
    for task in arguments.tasks:
        problem = load_problem(f"{arguments.data}/{task}")
        results[task] = evaluate(problem, solvers, num_observations=arguments.observations,
                                 num_samples=arguments.samples, seed=arguments.seed, estimates=estimates)
        for solver, row in results[task].items():
            cells = [plus_minus(row[k][0], row[k][1], d) if k in row else ""
                     for k, d in (("psnr", 2), ("crps", 4), ("coverage", 3), ("residual", 2), ("spread", 3))]
            cells += [f"{row['calls']:.2f}", f"{row['seconds']:.1f}"] if "calls" in row else ["", ""]
            print(line(task, solver, *cells), flush=True)
    if (SHIPPED / f"{arguments.data}-classifier").is_dir():
        prior = load_prior(arguments.prior or arguments.data)
        results |= recognised_shares({"prior": prior, "map of the VFM": vfm_map}, arguments.data, arguments.seed)
        if arguments.flow:
            results |= recognised_along_flow(prior, arguments.data, arguments.seed)
    if arguments.output:
        write_json(results, arguments.output)


if __name__ == "__main__":
    main()
