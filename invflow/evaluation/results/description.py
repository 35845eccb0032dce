"""Describes a problem in lines of text, for the page of a comparison."""

from __future__ import annotations

import inspect
import math
from typing import TYPE_CHECKING

from invflow.likelihood import GaussianLikelihood, Likelihood

if TYPE_CHECKING:
    from invflow.operator import Operator
    from invflow.problem import Problem
    from invflow.reward import Reward

__all__ = ["describe"]


def describe(problem: Problem, reward: Reward) -> dict[str, str]:
    """Describe a problem in short lines of text, by name.

    Args:
        problem: Problem of a comparison.
        reward: Reward of some of its observations.

    Example:
        >>> import invflow
        >>> from invflow.evaluation.results.description import describe
        >>> problem = invflow.load_problem("mnist/super-resolution")
        >>> describe(problem, problem.simulate(2)[1])["operator"]
        "SuperResolution((1, 28, 28), factor=4, filter='average')"
    """
    found = {"problem": problem.description} if problem.description else {}
    if isinstance(reward, Likelihood):
        found["operator"] = _operator(reward.operator, problem.random)
        found["measured"] = _measured(reward.operator)
        found["noise"] = _noise(reward)
    else:
        found["reward"] = repr(problem.reward)
    return {**found, "prior": _prior(problem)}


def _prior(problem: Problem) -> str:
    if problem.prior_name is not None:
        return problem.prior_name
    try:
        return type(problem.prior).__name__
    except ValueError:  # the solvers have their own
        return "none (each solver has its own)"


def _operator(operator: Operator, random: bool) -> str:
    """The call that builds an operator, from its recorded arguments; tensors are left out."""
    words = [str(operator.image_shape)]
    for name in inspect.signature(type(operator).__init__).parameters:
        value = getattr(operator, name, None)
        drawn = isinstance(value, tuple) and any(isinstance(v, float) for v in value)  # a range to draw from
        if name != "image_shape" and isinstance(value, (int, float, str, tuple)) and (random or not drawn):
            words.append(f"{name}={value!r}")
    return f"{type(operator).__name__}({', '.join(words)})" + (", drawn for each observation" if random else "")


def _measured(operator: Operator) -> str:
    observed, whole = operator.observed(), math.prod(operator.image_shape)
    counts = {math.prod(operator.measurement_shape)} if observed is None else set(
        observed.flatten(1).sum(1).long().tolist())
    low, high = min(counts), max(counts)
    return f"{low if low == high else f'{low} to {high}'} value{'s' * (high > 1)}; an image has {whole}"


def _noise(likelihood: Likelihood) -> str:
    if not isinstance(likelihood, GaussianLikelihood):
        return repr(likelihood)
    levels = likelihood.sigma.flatten()
    low, high = float(levels.min()), float(levels.max())
    return f"Gaussian, sigma {low:.4g}" + (f" to {high:.4g}" if high > low else "")
