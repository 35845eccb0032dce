"""The certificate of a calibration: simulations, results, and the errors that they could have detected."""

from __future__ import annotations

import html
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from invflow._core.records import as_json, finite, read_record, versions, write_record
from invflow.evaluation.certificate.judgement import CERTIFIABLE, LEVELS, POWER, Check, Judgement, judge

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Certificate", "clear", "read_simulations", "write_simulations"]

_KINDS = ("invflow.certificate/2", "invflow.certificate/1")
_SIMULATIONS = ("invflow.certificate.simulations/2", "invflow.certificate/1")
_JSON, _RECORD = "certificate.json", "simulations.safetensors"


@dataclass(frozen=True)
class Certificate:
    """Result of :func:`invflow.calibrate`.

    Attributes:
        problem, solver: Their names.
        source: Source of the truths, ``"prior"`` or ``"data"``.
        num_simulations: S, the number of pairs of a truth and a measurement.
        num_samples: N, the number of samples among which each truth was ranked.
        num_particles: Number of particles that the solver ran, from which N were resampled.
        alpha: Probability of any false alarm among all checks.
        judgement: Verdict, checks, and the errors that they could have detected.
        record: Numbers of each simulation: ``ranks`` ``(S, Q)`` of the first Q checks, ``tarp_ranks`` ``(S,)``
            and more.
        settings: Settings of the solver and of the simulations.
        calls: Network calls per simulation, ``{"forward": ..., "backward": ...}``.
        seconds: Time of the solver, summed over all simulations.

    Example:
        >>> import invflow
        >>> certificate = invflow.calibrate(solver, problem, output="certificate")  # doctest: +SKIP
        >>> invflow.Certificate.load("certificate").verdict  # doctest: +SKIP
        'passes'
    """

    problem: str
    solver: str
    source: str
    num_simulations: int
    num_samples: int
    num_particles: int
    alpha: float
    judgement: Judgement
    record: dict[str, Tensor] = field(repr=False)
    settings: dict[str, Any] = field(repr=False)
    calls: dict[str, float]
    seconds: float

    @classmethod
    def from_record(cls, record: Mapping[str, Tensor], names: Sequence[str], about: Mapping[str, Any]) -> Certificate:
        """Judge the numbers of all simulations.

        Args:
            record: Record for :func:`invflow.evaluation.certificate.judgement.judge`, with ``forward``, ``backward``
                and ``seconds`` ``(S,)``.
            names: Names of the quantities, in the order of the columns of ``ranks``.
            about: The fields from ``problem`` to ``alpha``, and ``settings``.
        """
        record = dict(record)
        judgement = judge(record, names, about["num_samples"], about["alpha"])
        calls = {key: float(record[key].mean()) for key in ("forward", "backward")}
        return cls(judgement=judgement, record=record, calls=calls, seconds=float(record["seconds"].sum()), **about)

    # -- the verdict ---------------------------------------------------------------------------------------------

    @property
    def verdict(self) -> str:
        """``"passes"``, ``"fails"`` or ``"too few to certify"``."""
        return self.judgement.verdict

    @property
    def passed(self) -> bool:
        """Whether no check rejects and there were enough simulations to certify."""
        return self.verdict == "passes"

    @property
    def checks(self) -> dict[str, Check]:
        """Checks by the name of the quantity."""
        return {check.name: check for check in self.judgement.checks}

    @property
    def coverage(self) -> dict[float, tuple[float, float]]:
        """Coverage of the central intervals of all pixels by nominal level, each with its standard error."""
        values = self.record["pixel_coverage"]
        error = values.std(0) / math.sqrt(len(values)) if len(values) > 1 else torch.full((len(LEVELS),), math.nan)
        return {level: (float(values[:, k].mean()), float(error[k])) for k, level in enumerate(LEVELS)}

    @property
    def sentence(self) -> str:
        """The verdict in words."""
        found = [check for check in self.judgement.checks if not check.passed]
        total, what = len(self.judgement.checks), f"{self.solver} on {self.problem}"
        truths = "its own prior" if self.source == "prior" else "data"
        runs = f"{self.num_simulations} simulations with truths from {truths}"
        if found:
            worst = min(found, key=lambda check: check.p_value)
            others = f" and {len(found) - 1} more of {total} checks" if len(found) > 1 else f" of {total} checks"
            text = (f"{what} is not calibrated: in {runs}, {worst.name}{others} reject{'' if len(found) > 1 else 's'} "
                    f"({worst.reading}; corrected p = {_p(worst.p_adjusted)}).")
            if self.source == "data":
                text += (" With source='data', a mismatch of prior and data counts as well: source='prior' tests the "
                         "solver alone.")
            return text
        power = self._power()
        if self.passed:
            return f"{what} passes: in {runs}, none of {total} checks rejects at {self.alpha:g}. {power}"
        return (f"Too few simulations to certify {what}: in {runs}, none of {total} checks rejects at {self.alpha:g}, "
                f"but a spread wrong by a factor of {CERTIFIABLE:g} could have been missed. {power}")

    def _power(self) -> str:
        j, chance = self.judgement, f"{POWER:.0%}"
        parts = []
        if j.detectable_narrow > 0:
            parts.append(f"under {j.detectable_narrow:.2f}")
        if j.detectable_wide < math.inf:
            parts.append(f"over {j.detectable_wide:.2f}")
        text = f"a standard deviation {' or '.join(parts)} times the right one" if parts else ""
        if j.detectable_shift < math.inf:
            text += (", or " if text else "") + f"a mean off by {j.detectable_shift:.2f} standard deviations"
        if not text:
            return f"No error in a single quantity would have been found with {chance} probability."
        return (f"In any single quantity, the checks would have found {text} with {chance} probability; smaller errors "
                "may remain.")

    # -- text ------------------------------------------------------------------------------------------------------

    def _table(self) -> list[list[str]]:
        rows = [["quantity", "verdict", "p", "corrected p", "z-score", "contraction", "90% interval covers"]]
        for c in self.judgement.checks:
            z = "" if math.isnan(c.z_mean) else f"{c.z_mean:+.2f} +- {c.z_std:.2f}"
            rows.append([c.name, "passes" if c.passed else c.reading, _p(c.p_value), _p(c.p_adjusted), z,
                         "" if math.isnan(c.contraction) else f"{c.contraction:.2f}",
                         f"{c.coverage:.1%} +- {c.coverage_error:.1%}"])
        return rows

    def _facts(self) -> list[str]:
        j = self.judgement
        particles = "" if self.num_particles == self.num_samples else f", resampled from {self.num_particles} particles"
        return [
            f"{self.num_simulations} simulations, truths from {self.source}; ranks among {self.num_samples} samples"
            f"{particles}; {self.seconds:.3g} s; network calls for each simulation: {self.calls['forward']:.4g} "
            f"forward, {self.calls['backward']:.4g} backward",
            f"spread over skill, all pixels: {j.spread_skill:.3f} +- {j.spread_skill_error:.3f} (1 if calibrated)",
        ]

    def __str__(self) -> str:
        table = self._table()
        widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in table]
        return "\n".join([self.sentence, "", *lines, "", *self._facts()])

    def to_markdown(self) -> str:
        """The certificate as markdown."""
        table = [[cell.replace("|", "\\|") for cell in row] for row in self._table()]
        lines = ["| " + " | ".join(row) + " |" for row in table]
        lines.insert(1, "|" + " --- |" * len(table[0]))
        coverage = ["| nominal level | coverage of all pixels |", "| --- | --- |"]
        coverage += [f"| {level:.0%} | {value:.1%} +- {error:.1%} |" for level, (value, error) in self.coverage.items()]
        return "\n".join([f"# Calibration: {self.solver} on {self.problem}", "", f"**{self.sentence}**", "", *lines, "",
                          *(f"- {fact}" for fact in self._facts()), "", *coverage, ""])

    def _repr_html_(self) -> str:
        rows = [[html.escape(cell) for cell in row] for row in self._table()]
        body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows[1:])
        head = "<tr>" + "".join(f"<th>{cell}</th>" for cell in rows[0]) + "</tr>"
        return f"<p>{html.escape(self.sentence)}</p><table>{head}{body}</table>"

    def plot(self, **options: Any) -> Figure:
        """Plot rank functions with their bands, the TARP curve, coverage, z-scores and contraction.

        Args:
            **options: See :func:`invflow.evaluation.certificate.figure.certificate_figure`.
        """
        from invflow.evaluation.certificate.figure import certificate_figure

        return certificate_figure(self, **options)

    # -- files -----------------------------------------------------------------------------------------------------

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write ``certificate.json`` and ``simulations.safetensors`` into a folder, each atomically."""
        folder = Path(folder)
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("record", "judgement")}
        simulations = write_simulations(folder, self.record, self.settings)
        write_record(folder / _JSON, _KINDS[0], finite({
            **as_json(plain, "certificate"), "judgement": as_json(asdict(self.judgement), "judgement"),
            "sentence": self.sentence, "versions": versions(), "simulations": simulations}))

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Certificate:
        """Read a certificate written by :meth:`save`. Nothing in it is executed.

        Raises:
            FileNotFoundError: If there is no certificate.
            ValueError: If a file is damaged, was changed, or holds something else, or if the verdict does not follow
                from the simulations.
        """
        path = Path(folder) / _JSON
        try:
            header, _ = read_record(path, *_KINDS, tensors=None)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"there is no file {str(path)!r}: pass a folder that Certificate.save wrote, or "
                                    "where invflow.calibrate has finished") from error
        record, settings, digest = _read(Path(folder))
        try:
            found = dict(header["judgement"])
            checks = tuple(Check(**_numbers(Check, check)) for check in found.pop("checks"))
            judgement = Judgement(checks=checks, **_numbers(Judgement, found))
            plain = {f.name: header[f.name] for f in fields(cls) if f.name not in ("record", "judgement")}
            read = cls(judgement=judgement, record=record, **plain)
            read.to_markdown()  # this uses every number
            if header["format"] == _KINDS[0]:
                fits = header["simulations"] == digest
            else:  # an older file without a digest: judge it again by the old rule
                again = judge(record, settings["quantities"], read.num_samples, read.alpha, merge=False)
                fits = _verdicts(again) == _verdicts(judgement)
        except Exception as error:  # another kind of file can raise any error
            raise ValueError(f"{path} does not hold a readable certificate ({type(error).__name__}: "
                             f"{error})") from error
        if not fits:
            raise ValueError(f"{path} does not belong to the simulations in its folder: one of them was changed")
        return read


# -- numbers of the simulations on disk ------------------------------------------------------------------------


def write_simulations(folder: Path, record: Mapping[str, Tensor], settings: Mapping[str, Any]) -> str:
    """Write the numbers of the simulations so far, atomically, and return their digest."""
    return write_record(folder / _RECORD, _SIMULATIONS[0], {"settings": finite(as_json(settings, "settings"))}, record)


def read_simulations(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read numbers and settings written by :func:`write_simulations`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged or was changed.
    """
    return _read(folder)[:2]


def clear(folder: Path) -> None:
    """Remove the files derived from the simulations: the certificate as JSON, text and figure."""
    for name in (_JSON, "certificate.md", "figure.png"):
        (folder / name).unlink(missing_ok=True)


def _read(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any], str | None]:
    header, record = read_record(folder / _RECORD, *_SIMULATIONS)
    try:
        return record, dict(header["settings"]), header["digest"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / _RECORD} does not hold simulations: {error!r}") from error


def _verdicts(judgement: Judgement) -> list[Any]:
    """The results of a judgement, rounded to the digits on which machines agree."""
    return [judgement.verdict, *((c.name, c.passed, f"{c.p_value:.3e}", f"{c.p_adjusted:.3e}")
                                 for c in judgement.checks)]


def _numbers(kind: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """Undo :func:`finite` for the fields of a dataclass that are numbers."""
    words = {None: math.nan, "infinity": math.inf, "-infinity": -math.inf}
    numeric = {f.name for f in fields(kind) if f.type == "float"}
    return {key: words.get(v, v) if key in numeric else v for key, v in values.items()}


def _p(value: float) -> str:
    return "" if math.isnan(value) else "< 0.0001" if value < 1e-4 else f"{value:.4f}"
