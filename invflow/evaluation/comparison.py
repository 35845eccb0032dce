"""A comparison of solvers, with text, figures, files and a page."""

from __future__ import annotations

import contextlib
import html
import os
from pathlib import Path
from typing import TYPE_CHECKING

from invflow._core.files import write_atomically, write_text
from invflow._core.records import read_record, write_record
from invflow.evaluation.page.page import write_report
from invflow.evaluation.results.results import Results
from invflow.evaluation.results.text import cells, markdown

if TYPE_CHECKING:
    from collections.abc import Mapping

    from matplotlib.figure import Figure

    from invflow.evaluation.certificate.certificate import Certificate

__all__ = ["Comparison"]

_KINDS = ("invflow.comparison/2", "invflow.comparison/1")
_RECORD, _PAGE = "comparison.json", "report.html"
_FILES = (_RECORD, "table.csv", "observations.csv", "table.md", "pareto.png", _PAGE)


class Comparison(Results):
    """Result of :func:`invflow.compare`: :class:`~invflow.evaluation.results.results.Results` with text and figures."""

    def to_markdown(self, metrics: list[str] | None = None) -> str:
        """A table for each problem: means with standard errors, the leaders in bold, and the cost.

        Args:
            metrics: Metrics to show as columns; all by default.
        """
        return markdown(self, metrics)

    def plot(self, metric: str = "crps") -> Figure:
        """Plot quality against calls with the Pareto front, one panel per problem."""
        from invflow.evaluation.results.figure import pareto_figure

        return pareto_figure(self, metric)

    def report(self, path: str | os.PathLike[str], *, reference: str | None = None,
               certificates: Mapping[str, Certificate] | None = None, command: str | None = None) -> None:
        """Write a self-contained HTML page: tables, plots, galleries, and how to reproduce it.

        Args:
            path: Path of the page; parent folders are created.
            reference, certificates, command: See :func:`invflow.evaluation.page.page.render_report`.
        """
        write_report(self, path, reference=reference, certificates=certificates, command=command)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write ``comparison.json``, ``table.csv``, ``observations.csv``, ``table.md`` and ``pareto.png``.

        Files of another comparison in that folder are removed, including its page.
        """
        place = Path(folder)
        try:
            before = read_record(place / _RECORD, *_KINDS, tensors=None)[0]["digest"]
        except (OSError, ValueError):
            before = None
        record = {"settings": self.settings, "solvers": self.solvers, "seeds": self.seeds, "versions": self.versions,
                  "values": self.values, "sets": self.sets, "costs": self.costs, "failures": self.failures,
                  "missing": self.missing, "descriptions": self.descriptions}
        page = place / _PAGE
        if write_record(place / _RECORD, _KINDS[0], record) != before:
            page.unlink(missing_ok=True)
        write_text(place / "table.csv", self.to_csv())
        write_text(place / "observations.csv", self.observations_csv())
        write_text(place / "table.md", self.to_markdown() + "\n")
        metric = next((m for m in ("crps", "reward", "residual") if any(m in self.metrics(p) for p in self.problems)),
                      None)
        if metric is not None:
            write_atomically(place / "pareto.png", lambda path: self.plot(metric).savefig(path, format="png"))
        else:
            (place / "pareto.png").unlink(missing_ok=True)

    @staticmethod
    def clear(folder: str | os.PathLike[str]) -> None:
        """Remove the files that :meth:`save` and :meth:`report` wrote into a folder; the parts remain."""
        for name in _FILES:
            with contextlib.suppress(FileNotFoundError):
                (Path(folder) / name).unlink()

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Comparison:
        """Read a comparison from a folder.

        Raises:
            FileNotFoundError: If there is none.
            ValueError: If its file is damaged, was changed, or is from another version.
        """
        path = Path(folder) / _RECORD
        try:
            found, _ = read_record(path, *_KINDS, tensors=None)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"there is no {str(path)!r}: pass the folder of a finished comparison; an "
                                    "interrupted one resumes with the same call of invflow.compare") from error
        try:
            sets = {p: {s: {m: (v[0], v[1]) for m, v in row.items()} for s, row in table.items()}
                    for p, table in found["sets"].items()}
            read = cls(found["values"], sets, found["costs"], found["failures"], found["settings"], found["solvers"],
                       found["seeds"], found["versions"], Path(folder), missing=found.get("missing", {}),
                       descriptions=found.get("descriptions", {}))
            read.to_markdown()  # this uses every number
        except Exception as error:  # another kind of file can raise any error
            raise ValueError(f"{path} does not hold a readable comparison: {error!r}") from error
        return read

    def __str__(self) -> str:
        return self.to_markdown()

    def __repr__(self) -> str:
        return (f"Comparison({len(self.solvers)} solvers, {len(self.problems)} problems, "
                f"{self.settings.get('num_observations')} observations x {self.settings.get('num_samples')} samples)")

    def _repr_markdown_(self) -> str:
        return self.to_markdown()

    def _repr_html_(self) -> str:
        out = []
        for problem in self.problems:
            head, *body = cells(self, problem, None)
            lines = [f"<caption>{html.escape(problem)}</caption>",
                     "<tr>" + "".join(f"<th>{html.escape(c)}</th>" for c in head) + "</tr>"]
            for row in body:
                lines.append("<tr>" + "".join(f"<td>{html.escape(c.replace('**', ''))}</td>" for c in row) + "</tr>")
            out.append("<table>" + "".join(lines) + "</table>")
        return "".join(out)
