"""A comparison: what each solver reached on each problem, as texts, figures, files and one page."""

from __future__ import annotations

import html
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from invflow._core.records import as_json, parse_json, write_atomically
from invflow.evaluation.page.page import write_report
from invflow.evaluation.results.results import Results
from invflow.evaluation.results.text import cells, markdown

if TYPE_CHECKING:
    from collections.abc import Mapping

    from matplotlib.figure import Figure

    from invflow.evaluation.certificate.certificate import Certificate

__all__ = ["Comparison"]

_FORMAT = "invflow.comparison/1"


class Comparison(Results):
    """What :func:`invflow.compare` found: numbers (:class:`~invflow.evaluation.results.results.Results`), shown."""

    def to_markdown(self, metrics: list[str] | None = None) -> str:
        """A table for each problem: means with standard errors, the best in bold, and what it cost.

        Args:
            metrics: columns; all by default.
        """
        return markdown(self, metrics)

    def plot(self, metric: str = "crps") -> Figure:
        """Quality against calls, a panel for each problem, with the Pareto front."""
        from invflow.evaluation.results.figure import pareto_figure

        return pareto_figure(self, metric)

    def report(self, path: str | os.PathLike[str], *, reference: str | None = None,
               certificates: Mapping[str, Certificate] | None = None, command: str | None = None) -> None:
        """Write one HTML page that needs nothing but itself: tables, drawings, galleries, how to reproduce it.

        Args:
            path: of the page; folders above it are made.
            reference, certificates, command: see :func:`invflow.evaluation.page.page.render_report`.
        """
        write_report(self, path, reference=reference, certificates=certificates, command=command)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write ``comparison.json``, ``table.csv``, ``observations.csv``, ``table.md`` and ``pareto.png``."""
        place = Path(folder)
        record = {"format": _FORMAT, "settings": self.settings, "solvers": self.solvers, "seeds": self.seeds,
                  "versions": self.versions, "values": self.values, "sets": self.sets, "costs": self.costs,
                  "failures": self.failures}
        texts = {"comparison.json": json.dumps(as_json(record, "comparison"), indent=1) + "\n",
                 "table.csv": self.to_csv(), "observations.csv": self.observations_csv(),
                 "table.md": self.to_markdown() + "\n"}
        for name, text in texts.items():
            write_atomically(place / name, lambda path, text=text: Path(path).write_text(text, encoding="utf-8"))
        metric = next((m for m in ("crps", "reward", "residual") if any(m in self.metrics(p) for p in self.problems)),
                      None)
        if metric is not None:
            write_atomically(place / "pareto.png", lambda path: self.plot(metric).savefig(path, format="png"))

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Comparison:
        """Read a comparison that was written into a folder.

        Raises:
            FileNotFoundError: if there is none.
            ValueError: if its file is damaged or of another version.
        """
        path = Path(folder) / "comparison.json"
        if not path.is_file():
            raise FileNotFoundError(f"there is no {str(path)!r}: pass the folder of a comparison that has ended; an "
                                    "interrupted one goes on with the same call of invflow.compare")
        try:
            found = parse_json(path.read_text(encoding="utf-8"))
            if found["format"] != _FORMAT:
                raise ValueError(f"its format is {found['format']!r}, not {_FORMAT!r}")
            sets = {p: {s: {m: (v[0], v[1]) for m, v in row.items()} for s, row in table.items()}
                    for p, table in found["sets"].items()}
            read = cls(found["values"], sets, found["costs"], found["failures"], found["settings"], found["solvers"],
                       found["seeds"], found["versions"], Path(folder))
            read.to_markdown()  # which takes every number
        except Exception as error:  # what a table of something else fails with is any error
            raise ValueError(f"{path} holds no comparison that can be read: {error!r}") from error
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
