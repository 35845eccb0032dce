"""A verdict on samples without weights: whether they fit the data, and whether the solver was trained for it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["MEETS", "MISSES", "sentence"]

#: residuals of samples, in units of sigma: range in which they fit a measurement, limit above which they do not
MEETS, MISSES = (0.8, 1.2), 2.0


def sentence(residual: Tensor, level_known: Tensor | None, operator_known: Tensor | None, stand_in: str | None = None,
             moved: Tensor | None = None) -> str:
    """A verdict on the samples of B observations, in words.

    Args:
        residual: Root mean square of (y - A x) / sigma over the samples, ``(B,)``.
        level_known: Whether each noise level lies in the training range, ``(B,)``; None if that range was not
            recorded.
        operator_known: The same for the operator.
        stand_in: The class used for the operator, if its own class was not trained for.
        moved: Root mean square of the change made by the correction, ``(B,)``, in image units.

    Returns:
        One or more sentences. They report these findings and do not show that the samples are correct: only a
        certificate (:func:`invflow.calibrate`) tests the spread where nothing was measured.
    """
    given = (residual, level_known, operator_known, moved)
    # all numbers in one copy to the host, which waits for the GPU only once; small tensors would take most of the time
    rows = iter(torch.stack([x.to(residual) for x in given if x is not None]).tolist())
    values: list[float] = next(rows)
    levels, operators, moves = (None if x is None else next(rows) for x in given[1:])
    said = [_fit(values)]
    strange = []
    if levels is not None and not all(levels):
        strange.append(f"{_lower([not known for known in levels])} noise lies outside the levels that the adapter was "
                       "trained for")
    if stand_in is not None:
        strange.append(f"the operator was treated as one of {stand_in}")
    elif operators is not None and not all(operators):
        strange.append(f"{_lower([not known for known in operators])} operator lies outside those that the adapter was "
                       "trained for")
    if strange:
        said.append(f"But {', and '.join(strange)}: the samples are an extrapolation.")
    elif levels is not None or operators is not None:
        inside = [what for what, known in (("noise", levels), ("operator", operators)) if known is not None]
        said.append(f"{' and '.join(inside).capitalize()} {'are' if len(inside) > 1 else 'is'} within the range "
                    "that the adapter was trained for.")
    if moves is not None:
        said.append(f"The correction by the data moved the samples by {math.hypot(*moves) / len(moves) ** 0.5:.3f} "
                    "(root mean square).")
    return " ".join(said)


def _fit(values: list[float]) -> str:
    low, high = min(values), max(values)
    span = f"{low:.2f}" + (f" to {high:.2f}" if len(values) > 1 else "")
    if high > MISSES:
        return (f"{_share([v > MISSES for v in values])} samples do not fit the measurement: residuals of {span} times "
                "the noise, where 1 is expected. They are not draws from the posterior.")
    if high > MEETS[1]:
        return (f"{_share([v > MEETS[1] for v in values])} samples do not quite fit the measurement: residuals of "
                f"{span} times the noise, where 1 is expected.")
    if low < MEETS[0]:
        return (f"{_share([v < MEETS[0] for v in values])} samples fit the measurement too closely, including its "
                f"noise: residuals of {span} times the noise, where 1 is expected.")
    return f"The samples fit the measurement{'s' * (len(values) > 1)}: residuals of {span} times the noise."


def _share(rows: list[bool]) -> str:
    return "The" if len(rows) == 1 else f"In {sum(rows)} of {len(rows)} observations the"


def _lower(rows: list[bool]) -> str:
    return _share(rows)[0].lower() + _share(rows)[1:]
