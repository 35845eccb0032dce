"""The short table of a posterior: quality, fit to the measurement, and cost."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from invflow._core.files import write_text
from invflow.evaluation.measures import expectations_of, measure
from invflow.posterior import Posterior
from invflow.reward import Reward

__all__ = ["COLLAPSED", "format_table", "is_collapsed", "summarise", "summarise_tilted", "write_json"]

#: weights have collapsed below this number of effective samples
COLLAPSED = 10

_COLUMNS = {
    "psnr": ("PSNR", "{:.2f}"), "rmse": ("RMSE", "{:.3f}"), "ssim": ("SSIM", "{:.3f}"),
    "crps": ("CRPS", "{:.4f}"), "residual": ("residual", "{:.2f}"), "std": ("std. dev.", "{:.4f}"),
    "ess": ("ESS", "{:.0f}"),
}
_MARK = "*"
_NOTES = {
    "psnr": "PSNR (dB) and SSIM of the posterior mean",
    "crps": "CRPS of the samples, mean over pixels; lower is better",
    "residual": "residual: root mean square of (y - A x) / sigma over the samples; near 1 for a good fit",
}


def is_collapsed(ess: Sequence[float], samples: int) -> bool:
    """Whether weights have collapsed: under ten effective samples in half of the observations or more.

    The numbers of such a row come from a few samples, so it is marked and never called best. With fewer than twenty
    samples, weights have collapsed if under half of the samples are effective.

    Args:
        ess: Effective sample size of each observation; empty for a solver without weights.
        samples: N, the number of samples for each observation.
    """
    few = [value < min(COLLAPSED, samples / 2) for value in ess]
    return bool(few) and 2 * sum(few) >= len(few)


@torch.no_grad()
def summarise(posterior: Posterior, likelihood: Reward | None = None,
              truth: Tensor | None = None, progress: bool = False) -> dict[str, Any]:
    """Summarise a posterior in numbers.

    Args:
        posterior: Posterior of B observations.
        likelihood: Likelihood of these observations; a :class:`~invflow.GaussianLikelihood` adds the residual.
        truth: Truths ``(B, *image_shape)``, if known.
        progress: Whether to show a progress bar after two seconds.

    Returns:
        ``per_observation``, lists of B numbers by name, and ``mean``, their means: ``psnr`` (dB) and ``ssim``
        of the posterior mean (``rmse`` for images that are not pictures), ``crps`` of the samples, mean over
        pixels, ``residual``, root mean square over samples and observed entries in units of sigma, ``std``,
        root mean square of the posterior standard deviation, ``ess`` in particles. Numbers that do not apply are
        left out. Also ``standard_error`` of the means (absent for one observation), ``calls_per_sample``,
        ``seconds``, and the numbers of ``observations`` and ``samples``.
    """
    shown = ("psnr", "rmse", "ssim", "crps", "residual")
    return _summary(measure(posterior, likelihood, truth, only=shown, progress=progress), posterior)


@torch.no_grad()
def summarise_tilted(posterior: Posterior, reward: Reward, quantities: Mapping[str, Callable[[Tensor], Tensor]] = {},
                     expectations: Mapping[str, float] = {}) -> dict[str, Any]:
    """Summarise samples of a prior tilted by a reward in numbers.

    Args:
        posterior: Posterior of B repeats, with or without weights.
        reward: Reward of these repeats.
        quantities: Functions of images ``(n, *image_shape)`` to ``(n,)`` by name.
        expectations: Known means of these and of ``"reward"`` under the tilted law, by name.

    Returns:
        Same as :func:`summarise`: weighted means of the ``reward`` and of each quantity, ``std``, ``ess``, and the
        ``log evidence`` if the solver estimates it; also ``expected``, the known means.
    """
    columns = expectations_of(posterior, reward, quantities)
    if posterior.log_evidence is not None:
        columns["log evidence"] = posterior.log_evidence
    return {**_summary(columns, posterior), "expected": {k: v for k, v in expectations.items() if k in columns}}


def _summary(columns: dict[str, Tensor], posterior: Posterior) -> dict[str, Any]:
    if posterior.num_samples > 1:
        columns["std"] = posterior.std().square().flatten(1).mean(1).sqrt()
    ess = posterior.ess()
    if ess is not None:
        columns["ess"] = ess
    return {
        "per_observation": {key: value.tolist() for key, value in columns.items()},
        "mean": {key: float(value.double().mean()) for key, value in columns.items()},
        "standard_error": {key: float(value.double().std() / math.sqrt(len(value))) for key, value in columns.items()
                           if len(value) > 1},
        "calls_per_sample": {"forward": posterior.nfe.forward, "backward": posterior.nfe.backward},
        "seconds": posterior.seconds,
        "observations": len(posterior),
        "samples": posterior.num_samples,
    }


def format_table(summary: dict[str, Any], rows: int = 8) -> str:
    """Format the result of :func:`summarise` as a text table.

    Args:
        summary: Result of :func:`summarise`.
        rows: Largest number of observations to list; the last lines are the mean over all of them and its
            standard error.

    Returns:
        A few lines without a final line break.
    """
    found, count, expected = summary["per_observation"], summary["observations"], summary.get("expected")
    ess, samples = found.get("ess", []), summary["samples"]
    collapsed = is_collapsed(ess, samples)
    marks = [f" {_MARK}" if is_collapsed([value], samples) else "" for value in ess] or [""] * count
    # the problem's own quantities come first
    names = [*(name for name in found if name not in _COLUMNS), *(name for name in _COLUMNS if name in found)]

    def row(first: str, values: dict[str, float]) -> list[str]:
        return [first, *(_COLUMNS.get(n, (n, "{:.4f}"))[1].format(values[n]) if n in values else "" for n in names)]

    cells = [["observation" if expected is None else "repeat", *(_COLUMNS.get(n, (n, ""))[0] for n in names)]]
    for b in range(min(rows, count) if count > 1 else 0):
        cells.append(row(f"{b + 1}{marks[b]}", {n: found[n][b] for n in names}))
    if count > rows:
        cells.append(row("...", {}))
    cells.append(row(("mean" if count > 1 else "1") + (f" {_MARK}" if collapsed else ""), summary["mean"]))
    if summary.get("standard_error"):
        cells.append(row("standard error", summary["standard_error"]))
    if expected:
        cells.append(row("exact", expected))
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in cells]
    calls = summary["calls_per_sample"]
    lines += ["", f"{summary['samples']} samples for each {cells[0][0]}; network calls per sample: "
              f"{calls['forward']:.3g} forward, {calls['backward']:.3g} backward; {summary['seconds']:.2f} s"]
    if any(marks[:rows]) or collapsed:
        lines.append(f"{_MARK} collapsed: under {COLLAPSED} effective samples ({sum(map(bool, marks))} of {count}); "
                     "these numbers come from only a few samples")
    return "\n".join(lines + [note for name, note in _NOTES.items() if name in names])


def write_json(value: Any, path: Path) -> None:
    """Write JSON atomically; numbers that are not finite, which JSON cannot represent, become null."""
    write_text(path, json.dumps(_finite(value), indent=2) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
