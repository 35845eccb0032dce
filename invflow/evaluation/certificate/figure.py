"""The figure of a certificate. It uses matplotlib's objects, not pyplot, and is imported only when needed."""
from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Protocol

import matplotlib
import torch
from matplotlib.axes import Axes

from invflow.metrics import ecdf_band, tarp_curve
from invflow.views.figure import STYLE, PosteriorFigure

if TYPE_CHECKING:
    from torch import Tensor

    from invflow.evaluation.certificate.judgement import Check, Judgement

__all__ = ["certificate_figure"]

_GOOD, _BAD, _BAND, _LINE = "#3b4cc0", "#b40426", "#dddddd", "#666666"


class Certified(Protocol):
    """The parts of a certificate that the figure shows; see :class:`invflow.Certificate`."""

    @property
    def problem(self) -> str: ...
    @property
    def solver(self) -> str: ...
    @property
    def num_simulations(self) -> int: ...
    @property
    def num_samples(self) -> int: ...
    @property
    def alpha(self) -> float: ...
    @property
    def judgement(self) -> Judgement: ...
    @property
    def record(self) -> dict[str, Tensor]: ...
    @property
    def verdict(self) -> str: ...
    @property
    def checks(self) -> dict[str, Check]: ...
    @property
    def coverage(self) -> dict[float, tuple[float, float]]: ...


def certificate_figure(certificate: Certified, *, columns: int = 5, cell: float = 1.9) -> PosteriorFigure:
    """Plot rank functions with their bands, the TARP curve, coverage, and z-score against contraction.

    A rank function is drawn as its difference from the uniform one, with its simultaneous band in grey. For a
    calibrated solver, a single rank function leaves its band with probability at most alpha. Red marks a rejection
    after correction for all checks.

    Args:
        certificate: Certificate from :func:`invflow.calibrate`.
        columns: Number of columns of the grid, at least 3.
        cell: Side of a panel, in inches.

    Returns:
        A matplotlib figure; ``figure.savefig("figure.png")`` writes it.
    """
    names = [check.name for check in certificate.judgement.checks][: certificate.record["ranks"].shape[1]]
    panels = len(names) + 4
    columns = min(max(3, columns), panels)
    rows = math.ceil(panels / columns)
    with matplotlib.rc_context(STYLE):
        figure = PosteriorFigure(figsize=(cell * columns * 1.12, cell * rows * 1.05 + 0.55), dpi=150,
                                 layout="constrained")
        figure.suptitle(f"{certificate.solver} on {certificate.problem}: {certificate.verdict}", fontsize=11)
        axes = [figure.add_subplot(rows, columns, k + 1) for k in range(panels)]
        for k, name in enumerate(names):
            _ranks(axes[k], certificate, name, certificate.record["ranks"][:, k])
        _ranks(axes[len(names)], certificate, "TARP", certificate.record["tarp_ranks"])
        _tarp(axes[-3], certificate)
        _coverage(axes[-2], certificate)
        _scores(axes[-1], certificate, names)
    return figure


def _colour(certificate: Certified, name: str) -> str:
    return _GOOD if certificate.checks[name].passed else _BAD


def _ranks(axes: Axes, certificate: Certified, name: str, ranks: Tensor) -> None:
    count = certificate.num_samples
    lower, upper = ecdf_band(certificate.num_simulations, count, certificate.alpha)
    level = torch.arange(1, count + 1) / (count + 1)
    share = torch.bincount(ranks, minlength=count + 1).cumsum(0)[:-1] / len(ranks)
    axes.fill_between(level, lower - level, upper - level, color=_BAND, step="mid", lw=0)
    axes.axhline(0, color=_LINE, lw=0.5)
    axes.step(level, share - level, where="mid", color=_colour(certificate, name), lw=1)
    axes.set_title(name, fontsize=8, color=_colour(certificate, name))
    axes.set_xlabel("rank / (N + 1)", fontsize=7)
    axes.set_xlim(0, 1)


def _diagonal(axes: Axes, title: str, colour: str = "black") -> None:
    axes.plot([0, 1], [0, 1], color=_LINE, lw=0.5)
    axes.set_title(title, fontsize=8, color=colour)
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)


def _tarp(axes: Axes, certificate: Certified) -> None:
    levels = torch.linspace(0, 1, 101, dtype=torch.float64)
    curve = tarp_curve(certificate.record["tarp_ranks"], certificate.num_samples, levels)
    colour = _colour(certificate, "TARP")
    axes.plot(levels, curve, color=colour, lw=1)
    _diagonal(axes, "TARP: expected coverage", colour)
    axes.set_xlabel("credibility", fontsize=7)


def _coverage(axes: Axes, certificate: Certified) -> None:
    colour = _colour(certificate, "all pixels, spread")
    levels = list(certificate.coverage)
    values, errors = zip(*certificate.coverage.values())
    axes.errorbar(levels, values, [2 * e for e in errors], color=colour, lw=1, marker=".", ms=3, capsize=1.5)
    _diagonal(axes, "coverage, all pixels (2 s.e.)", colour)
    axes.set_xlabel("nominal", fontsize=7)


def _scores(axes: Axes, certificate: Certified, names: list[str]) -> None:
    record: dict[str, Any] = certificate.record
    for k, name in enumerate(names):
        std, variance = record["stds"][:, k], record["truths"][:, k].var()
        keep = std > 0
        if not bool(keep.any()) or not float(variance) > 0:
            continue
        z = (record["means"][:, k] - record["truths"][:, k])[keep] / std[keep]
        contraction = 1 - std[keep].square() / variance
        axes.plot(contraction.clamp(-0.5, 1), z.clamp(-5, 5), ".", ms=1.5, alpha=0.5, color=_colour(certificate, name))
    axes.axhline(0, color=_LINE, lw=0.5)
    axes.set_ylim(-5.2, 5.2)
    axes.set_xlim(-0.55, 1.05)
    axes.set_title("z-score against contraction", fontsize=8)
    axes.set_xlabel("contraction", fontsize=7)
