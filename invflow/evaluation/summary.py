"""The short table of a posterior: how good, how faithful to the measurement, at what cost."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from invflow._core.records import write_atomically
from invflow.evaluation.measures import expectations_of, measure
from invflow.posterior import Posterior
from invflow.reward import Reward

__all__ = ["COLLAPSED", "format_table", "is_collapsed", "summarise", "summarise_tilted", "write_json"]

#: effective samples under which weights have collapsed
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

    What is left of such a row are the numbers of a few samples: it is marked, and never called best. Fewer than twenty
    samples have collapsed where under half of them are effective.

    Args:
        ess: effective sample size of each observation; empty for a solver without weights.
        samples: N, of each observation.
    """
    few = [value < min(COLLAPSED, samples / 2) for value in ess]
    return bool(few) and 2 * sum(few) >= len(few)


@torch.no_grad()
def summarise(posterior: Posterior, likelihood: Reward | None = None,
              truth: Tensor | None = None, progress: bool = False) -> dict[str, Any]:
    """Numbers that judge a posterior.

    Args:
        posterior: of B observations.
        likelihood: of its observations; a :class:`~invflow.GaussianLikelihood` gives the residual.
        truth: ``(B, *image_shape)``, where it is known.
        progress: show a progress bar if it takes over two seconds.

    Returns:
        ``per_observation``, lists of B numbers by name, and ``mean``, their means: ``psnr`` (dB) and ``ssim``
        of the posterior mean (``rmse`` where images are no pictures), ``crps`` of the samples, mean over
        pixels, ``residual``, root mean square over samples and observed entries in units of sigma, ``std``,
        root mean square of the posterior standard deviation, ``ess`` in particles. What does not apply is
        left out. Besides, ``standard_error``, those of the means (none of one observation), ``calls_per_sample``,
        ``seconds``, the numbers of ``observations`` and ``samples``.
    """
    shown = ("psnr", "rmse", "ssim", "crps", "residual")
    return _summary(measure(posterior, likelihood, truth, only=shown, progress=progress), posterior)


@torch.no_grad()
def summarise_tilted(posterior: Posterior, reward: Reward, quantities: Mapping[str, Callable[[Tensor], Tensor]] = {},
                     expectations: Mapping[str, float] = {}) -> dict[str, Any]:
    """Numbers that judge samples of a prior tilted by a reward.

    Args:
        posterior: of B repeats, with or without weights.
        reward: of these repeats.
        quantities: functions of images ``(n, *image_shape)`` to ``(n,)`` by name.
        expectations: their known means under the tilted law, and that of ``"reward"``, by name.

    Returns:
        As :func:`summarise`: weighted means of the ``reward`` and of each quantity, ``std``, ``ess``, and the
        ``log evidence`` where the solver gives it; besides, ``expected``, the known means.
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
    """The table of :func:`summarise`, as text.

    Args:
        summary: from :func:`summarise`.
        rows: observations listed, at most; the last lines are the mean over all of them and its
            standard error.

    Returns:
        A few lines without a final line break.
    """
    found, count, expected = summary["per_observation"], summary["observations"], summary.get("expected")
    ess, samples = found.get("ess", []), summary["samples"]
    collapsed = is_collapsed(ess, samples)
    marks = [f" {_MARK}" if is_collapsed([value], samples) else "" for value in ess] or [""] * count
    # quantities of a problem's own come first
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
                     "these numbers are those of a few samples")
    return "\n".join(lines + [note for name, note in _NOTES.items() if name in names])


def write_json(value: Any, path: Path) -> None:
    """Write JSON, whole or not at all; numbers that are not finite, which JSON does not have, become null."""
    text = json.dumps(_finite(value), indent=2) + "\n"
    write_atomically(path, lambda name: Path(name).write_text(text, encoding="utf-8"))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
