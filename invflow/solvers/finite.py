"""Stops a solver at values that are not finite, with an error that says where they occurred."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["FARTHEST", "check_finite", "first_row", "not_finite"]

#: absolute value of noise beyond which a network may overflow; only a failed trial step leads so far
FARTHEST = 100.0

_ADVICE = {
    "state": "the steps or the flow map's velocity fail there; try a flow map that is finite everywhere, or more steps",
    "image": "values that are not finite come from a flow map that fails on such states, or from steps or weights "
             "that are too large",
    "reward": "the state there is finite, so check the reward on images of such states; it may be -inf, a weight of "
              "zero, never +inf or NaN",
}


def first_row(bad: Tensor) -> int | None:
    """Index of the first row that is True, in ``(n,)`` or ``(n, ...)``; None if there is none."""
    rows = bad.flatten(1).any(1) if bad.ndim > 1 else bad
    return int(rows.nonzero()[0]) if bool(rows.any()) else None


def not_finite(solver: str, what: str, where: str, observation: int, particle: int) -> ValueError:
    """The error for a value that is NaN or infinite: solver, step, observation and particle."""
    advice = next((text for word, text in _ADVICE.items() if what.startswith(word)), _ADVICE["reward"])
    return ValueError(f"{solver}: the {what} is NaN or infinite at {where}, observation {observation}, particle "
                      f"{particle}: {advice}")


def check_finite(solver: str, where: str, count: int, images: Tensor, scores: Tensor | None = None) -> None:
    """Raise an error if images are not finite, or scores are NaN or +inf.

    Args:
        solver: Name of the solver.
        where: Name of the step.
        count: N, the number of particles per observation.
        images: Images ``(B N, *image_shape)``.
        scores: Rewards or log weights, ``(B N,)``.

    Raises:
        ValueError: If a value is not finite; the message names solver, step, observation and particle.
    """
    if scores is None and math.isfinite(images.sum().item()):
        return  # if the sum overflows, check the images one by one
    bad = {"image": ~torch.isfinite(images)}
    if scores is not None:
        bad["reward"] = scores.isnan() | (scores == torch.inf)
    for what, places in bad.items():
        row = first_row(places)
        if row is not None:
            raise not_finite(solver, what, where, *divmod(row, count))
