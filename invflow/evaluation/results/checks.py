"""The column ``certificate`` of a comparison: the checks of calibration on the comparison's own observations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from invflow.evaluation.certificate.judgement import judge
from invflow.evaluation.certificate.quantities import Quantity, default_quantities
from invflow.evaluation.certificate.ranking import rank_truths, tarp_references
from invflow.evaluation.results.parts import derive_seed
from invflow.likelihood import Likelihood

if TYPE_CHECKING:
    from invflow.posterior import Posterior
    from invflow.problem import Problem
    from invflow.reward import Reward

__all__ = ["RANKED", "Checks", "certificate_p"]

#: prefix of the names of a part's tensors that hold ranks
RANKED = "certificate."
_PILOT = 64  # truths for choosing pixels and placing the references of TARP


class Checks:
    """Ranks truths of one problem among samples, by the same quantities for every solver.

    Args:
        problem: A problem without images, whose truths are draws of its prior, and whose exact posterior is known.
        seed: Seed of the comparison.
    """

    def __init__(self, problem: Problem, seed: int) -> None:
        self._name, self._seed = problem.name, seed
        self._pilot: Tensor = problem.simulate(_PILOT, generator=self._generator("pilot"))[0]
        self._quantities: dict[str, Quantity] = default_quantities(self._pilot, self._generator("quantities"))

    @staticmethod
    def apply_to(problem: Problem) -> bool:
        """Whether truths are draws of the problem's prior, so that an exact solver passes."""
        if problem.has_images or problem.tilts:
            return False
        try:
            problem.exact_posterior()
        except (TypeError, ValueError):
            return False
        return True

    def ranks(self, posterior: Posterior, truth: Tensor, reward: Reward, start: int) -> dict[str, Tensor]:
        """Rank truths ``(B, *image_shape)`` among samples, for the tensors of a part.

        Args:
            posterior: Posterior of the B observations; a weighted one is resampled.
            truth: Their truths.
            reward: Their likelihood.
            start: Index of the first one, which determines the random numbers.

        Returns:
            Tensors by name, or an empty dictionary if a quantity has no rank, because the samples are not finite or
            too few.
        """
        if posterior.num_samples < 2 or not isinstance(reward, Likelihood):
            return {}
        generator = self._generator("ranks", start)
        references = tarp_references(self._pilot, truth, self._generator("references", start))
        try:
            draws = posterior.resample(posterior.num_samples, generator=generator) if posterior.weighted else posterior
            found = rank_truths(draws.samples, truth, reward, references, self._quantities, generator)
        except ValueError:  # NaN has no rank
            return {}
        return {RANKED + name: value.cpu().contiguous() for name, value in found.items()}

    def _generator(self, *purpose: object) -> torch.Generator:
        return torch.Generator().manual_seed(derive_seed(self._seed, self._name, "certificate", *purpose))


def certificate_p(parts: Sequence[Mapping[str, Tensor]], num_samples: int) -> float | None:
    """Smallest corrected p-value of all checks; None unless all parts have ranks.

    Args:
        parts: Tensors of all parts of one solver on one problem.
        num_samples: Number of samples among which each truth was ranked.
    """
    names = [name for name in (parts[0] if parts else ()) if name.startswith(RANKED)]
    if not names or any(name not in part for part in parts for name in names):
        return None
    record = {name.removeprefix(RANKED): torch.cat([part[name] for part in parts]) for name in names}
    judged = judge(record, [str(k) for k in range(record["ranks"].shape[1])], num_samples, alpha=0.05)
    # a test that was not run has NaN
    return min((check.p_adjusted for check in judged.checks if check.p_adjusted == check.p_adjusted), default=None)
