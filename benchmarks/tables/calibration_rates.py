"""Rejection rates of calibration: ``python -m benchmarks.tables.calibration_rates``, for exact and wrong posteriors.

The distances of an exact posterior's samples from their mean are multiplied by a factor, and the result is calibrated
repeatedly with new truths. With a factor of 1, every rejection is false, and at most 5% of the calibrations should
reject; with other factors, the share of rejections is the power. Both problems have closed forms: a mixture in the
plane, and noisy images of 6 x 6 independent pixels with all image checks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

import invflow
from benchmarks.tables.shared import head, line, parser
from invflow.operators import Denoising

__all__ = ["Spread", "main", "pictures", "rate"]

FACTORS = (1.0, 0.9)


class Spread(invflow.Solver):
    """An exact posterior's samples, with their distances from the mean multiplied by a factor."""

    def __init__(self, exact: invflow.ExactPosterior, factor: float) -> None:
        self.exact, self.factor = exact, factor

    def _sample(self, reward: invflow.Reward, n: int, generator: torch.Generator, progress: bool) -> invflow.Posterior:
        x = self.exact.sample(reward, n, generator=generator).samples
        assert isinstance(reward, invflow.GaussianLikelihood)
        mean = self.exact.moments(reward)[0][:, None]
        return invflow.Posterior(mean + self.factor * (x - mean))

    def prior_samples(self, n: int, *, generator: torch.Generator | int | None = None) -> Tensor:
        """Prior samples of the exact posterior."""
        return self.exact.prior_samples(n, generator=generator)


def pictures() -> invflow.Problem:
    """Noisy images of 6 x 6 independent pixels."""
    prior = invflow.GaussianMixtureFlow(torch.full((1, 1, 6, 6), 0.5), std=0.2)
    return invflow.Problem("pictures", None, Denoising((1, 6, 6)), 0.1, prior=lambda: prior,
                           sampler=lambda n, generator: prior.generate(n, generator=generator))


def rate(problem: invflow.Problem, factor: float, repetitions: int, simulations: int, ranks: int,
         seed: int = 0) -> tuple[float, float]:
    """Share of calibrations that reject at 5%, and its standard error."""
    exact = problem.exact_posterior()
    assert isinstance(exact, invflow.ExactPosterior)
    generator = torch.Generator().manual_seed(seed)
    failed = sum(invflow.calibrate(Spread(exact, factor), problem, num_simulations=simulations, num_samples=ranks,
                                   num_particles=ranks, generator=generator).verdict == "fails"
                 for _ in range(repetitions)) / repetitions
    return failed, math.sqrt(failed * (1 - failed) / repetitions)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    command = parser("calibration_rates", __doc__.splitlines()[0], repetitions=300, simulations=200, ranks=99)
    options = command.parse_args(arguments)
    print(head("problem", "factor of the spread", "rejected"))
    for problem in (invflow.load_problem("gaussian/linear"), pictures()):
        for factor in FACTORS:
            share, error = rate(problem, factor, options.repetitions, options.simulations, options.ranks)
            print(line(problem.name, f"{factor:g}", f"{share:.1%} ± {error:.1%}"), flush=True)


if __name__ == "__main__":
    main()
