"""True and false residual warnings of a VFM: ``python -m benchmarks.tables.misfit_table``.

The test images of the shipped problems are restored with the likelihood from which the measurement was drawn, and with
wrong ones: sigma ten times too large or too small, the mask inverted, a different blur. The table has the number of
observations about which :meth:`invflow.Solver.sample` warns, and, after a comma, of those with
``diagnostics["trained_for"]`` False, which compares numbers of the likelihood with the ranges of the training.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator

import torch

import invflow
from benchmarks.tables.shared import head, line, parser
from invflow.likelihood import GaussianLikelihood
from invflow.operator import Operator
from invflow.operators import GaussianBlur, MaskInpainting, MotionBlur

__all__ = ["main", "mistaken", "untrained", "warned_of"]

TASKS = ("denoising", "super-resolution", "box-inpainting", "random-inpainting", "gaussian-blur", "motion-blur")
COLUMNS = ("right", "sigma x 10", "sigma / 10", "wrong operator")


def mistaken(likelihood: GaussianLikelihood) -> Iterator[tuple[str, GaussianLikelihood]]:
    """The likelihood itself, and likelihoods with wrong noise levels and operators, each with its name."""
    operator, y, sigma = likelihood.operator, likelihood.y, likelihood.sigma
    yield "right", likelihood
    yield "sigma x 10", GaussianLikelihood(operator, y, 10 * sigma)
    yield "sigma / 10", GaussianLikelihood(operator, y, sigma / 10)
    wrong = _wrong_operator(operator)
    if wrong is not None:
        yield "wrong operator", GaussianLikelihood(wrong, y, sigma)


def _wrong_operator(operator: Operator) -> Operator | None:
    observed = operator.observed()
    if observed is not None:
        return MaskInpainting((~observed[:, :1]).float(), operator.image_shape, operator.problem_class)
    if isinstance(operator, GaussianBlur):
        return MotionBlur(operator.image_shape, generator=torch.Generator().manual_seed(1))
    if isinstance(operator, MotionBlur):
        return GaussianBlur(operator.image_shape)
    return None


def warned_of(solver: invflow.Solver, likelihood: GaussianLikelihood, samples: int, seed: int) -> int:
    """Number of observations with a warning, out of at least two."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        solver.sample(likelihood, samples, generator=torch.Generator().manual_seed(seed))
    found = [re.search(r"the mean of the samples .* (\d+) of \d+ measurements", str(given.message)) for given in said]
    return sum(int(match[1]) for match in found if match)


def untrained(solver: invflow.VFM, likelihood: GaussianLikelihood, seed: int) -> int:
    """Number of observations whose ``trained_for`` is False."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        posterior = solver.sample(likelihood, 1, generator=torch.Generator().manual_seed(seed))
    return int((~posterior.diagnostics["trained_for"]).sum())


def main(arguments: list[str] | None = None, say: Callable[[str], None] = print) -> None:
    """Print a row for each problem, as markdown."""
    command = parser("misfit_table", __doc__, observations=100, samples=32, seed=0)
    command.add_argument("priors", nargs="*", metavar="PRIOR", default=["mnist", "fashion-mnist", "cifar10", "photos"])
    options = command.parse_args(arguments)
    torch.set_num_threads(1)
    say(head("problem", *COLUMNS))
    for prior in options.priors:
        solver = invflow.VFM.load(prior)
        for task in TASKS:
            problem = invflow.load_problem(f"{prior}/{task}")
            generator = torch.Generator().manual_seed(options.seed)
            _, likelihood = problem.simulate(options.observations, generator=generator)
            assert isinstance(likelihood, GaussianLikelihood)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # unusual noise levels and values
                rows = dict(mistaken(likelihood))
            cells = {name: f"{warned_of(solver, given, options.samples, options.seed)}, "
                           f"{untrained(solver, given, options.seed)}" for name, given in rows.items()}
            say(line(problem.name, *(f"{cells[name]} of {len(likelihood.y)}" if name in cells else ""
                                     for name in COLUMNS)))


if __name__ == "__main__":
    main()
