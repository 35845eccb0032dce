"""Renders a comparison and certificates of calibration as one self-contained HTML page."""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from invflow._core.files import write_text
from invflow.evaluation.certificate.certificate import Certificate
from invflow.evaluation.measures import LEVEL, METRICS
from invflow.evaluation.page.gallery import choose_extent, gallery
from invflow.evaluation.page.pictures import data_uri, svg
from invflow.evaluation.page.table import column_notes, problem_table, signed
from invflow.evaluation.results.figure import direction, pareto_panel, plotted_metrics, points_of
from invflow.evaluation.results.text import with_error

if TYPE_CHECKING:
    from invflow.evaluation.results.results import Results

__all__ = ["render_report", "write_report"]

#: probability of calling calibrated intervals too narrow or too wide
_CHANCE = 0.01


def write_report(comparison: Results, path: str | os.PathLike[str], **options: Any) -> None:
    """Write the page of :func:`render_report` to a file, atomically; parent folders are created."""
    write_text(Path(path), render_report(comparison, **options))


def render_report(comparison: Results, *, reference: str | None = None,
                  certificates: Mapping[str, Certificate] | None = None, command: str | None = None) -> str:
    """Render the page as text.

    Args:
        comparison: Comparison of solvers.
        reference: Solver to which differences are shown when the page opens: its name, ``"best"``, or None for the
            first solver. Readers of the page can choose another.
        certificates: Certificates from :func:`invflow.calibrate`, by their names on the page.
        command: Command that made the comparison; None shows the Python call instead.

    Raises:
        KeyError: If the reference is not a solver.
        TypeError: If the certificates have the wrong type.
    """
    if reference not in (None, "best", *comparison.solvers):
        raise KeyError(f"there is no solver {reference!r}: choose one of {', '.join(comparison.solvers)}, or 'best'")
    certificates = {} if certificates is None else certificates
    if not isinstance(certificates, Mapping) or not all(isinstance(c, Certificate) for c in certificates.values()):
        raise TypeError(f"certificates={certificates!r}: pass {{'name': certificate}} with what invflow.calibrate "
                        "returned, or Certificate.load")
    from jinja2 import Environment, PackageLoader, StrictUndefined

    examples = {p: {s: found for s in comparison.solvers if "samples" in (found := comparison.examples(p, s))}
                for p in comparison.problems}
    extent = choose_extent([found for table in examples.values() for found in table.values()])
    rows = comparison.rows(reference)
    problems = [{"name": p, "description": comparison.descriptions.get(p, {}), "sentences": _sentences(comparison, p),
                 "table": problem_table(comparison, p, rows), "plots": _plots(comparison, p),
                 "gallery": gallery(comparison, p, examples[p], extent) if examples[p] else None}
                for p in comparison.problems]
    counts = _count(len(comparison.solvers), "solver"), _count(len(comparison.problems), "problem")
    # autoescape, because names of problems and solvers can be any text
    engine = Environment(loader=PackageLoader("invflow"), autoescape=True, undefined=StrictUndefined,
                         trim_blocks=True, lstrip_blocks=True)
    return engine.get_template("report.html").render(
        title="Comparison of {} on {}".format(*counts), settings=comparison.settings, problems=problems,
        solvers=list(comparison.solvers), reference=reference, notes=column_notes(comparison),
        certificates=[_certificate(name, c) for name, c in certificates.items()],
        reproduce=_reproduce(comparison, command), versions=comparison.versions)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _plots(comparison: Results, problem: str) -> list[dict[str, Any]]:
    """Plots of quality against calls, one for each suitable metric."""
    plots = []
    for metric in plotted_metrics(comparison, problem):
        points = points_of(comparison, problem, metric)
        found = "; ".join(f"{s}: {with_error(mean, error)} at {calls:.4g}"
                          for s, (calls, mean, error) in points.items())
        words = f"{direction(metric)}, on {problem}, against network calls for each sample. {found}"
        plots.append({"metric": metric, "drawing": svg(
            pareto_panel(comparison, problem, metric), words, f"{problem}-{metric}")})
    return plots


# -- in words --------------------------------------------------------------------------------------------------------


def _sentences(comparison: Results, problem: str) -> list[str]:
    """Sentences about the best solver, its cost, and the coverage of its intervals."""
    metric = next((m for m in ("crps", "sliced_wasserstein", "psnr", "rmse", "residual")
                   if comparison.best(problem, m) is not None), None)
    best = None if metric is None else comparison.best(problem, metric)
    if metric is None or best is None:
        return []
    title, costs = METRICS[metric].title, comparison.costs[problem][best]
    text = (f"Best {title}: {best}, {with_error(*comparison.mean(problem, best, metric))}, with "
            f"{comparison.calls(problem, best):.4g} network calls for each sample and {costs['seconds']:.3g} s for "
            "each observation.")
    near = [f"{solver} ({signed(*comparison.difference(problem, solver, metric, best))})"
            for solver in comparison.leaders(problem, metric) if solver != best]
    if near:
        text += f" Not clearly worse (paired difference within two standard errors): {', '.join(near)}."
    return [text, *_honesty(comparison, problem, best)]


def _honesty(comparison: Results, problem: str, solver: str) -> list[str]:
    """A sentence on coverage, tested by Student's t: with few observations the standard error itself is uncertain."""
    from scipy import stats

    if "coverage" not in comparison.values[problem][solver]:
        return []
    share, error = comparison.mean(problem, solver, "coverage")
    if math.isnan(share):
        return [f"The coverage of its {LEVEL:.0%} intervals is unknown: some observations have too few effective "
                "samples."]
    text = f"Its {LEVEL:.0%} intervals contain {100 * share:.1f}%"
    count = len(comparison.values[problem][solver]["coverage"])
    if count < 2 or not error > 0:
        return [f"{text} of the truth's values; there are too few observations to judge this."]
    distance = abs(share - LEVEL) / error
    if 2 * float(stats.t.sf(distance, count - 1)) > _CHANCE:
        found = f"which is consistent with their level ({distance:.1f} standard errors off)"
    else:
        found = f"so they are too {'narrow' if share < LEVEL else 'wide'} ({distance:.1f} standard errors off)"
    return [f"{text} ± {100 * error:.1f}% of the truth's values, {found}."]


# -- calibration -----------------------------------------------------------------------------------------------------


def _certificate(name: str, certificate: Certificate) -> dict[str, Any]:
    head, *body = certificate._table()
    rows = []
    for texts, check in zip(body, certificate.judgement.checks, strict=True):
        values: list[Any] = [check.name, str(check.passed), check.p_value, check.p_adjusted, check.z_mean,
                             check.contraction, check.coverage]
        rows.append([{"text": text.replace("+-", "±"), "attributes": {
            "data-value": value if isinstance(value, str) else repr(value) if math.isfinite(value) else None}}
            for text, value in zip(texts, values, strict=True)])
    buffer = io.BytesIO()
    certificate.plot(columns=5).savefig(buffer, format="png", dpi=110)
    return {"name": name, "verdict": certificate.verdict, "sentence": certificate.sentence, "head": head, "rows": rows,
            "kind": {"passes": "good", "fails": "bad"}.get(certificate.verdict, "open"),
            "uri": data_uri(_fewer_colours(buffer.getvalue())), "solver": certificate.solver,
            "problem": certificate.problem, "facts": [fact.replace("+-", "±") for fact in certificate._facts()]}


def _fewer_colours(png: bytes) -> bytes:
    """Reduce the colours of a figure, which compresses it to a third of its size."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.open(io.BytesIO(png)).convert("RGB").quantize(64).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


# -- how to reproduce it ---------------------------------------------------------------------------------------------


def _reproduce(comparison: Results, command: str | None) -> dict[str, Any]:
    call = command
    if command is None:
        names = ("num_observations", "num_samples", "seed", "split", "source", "part_size", "gallery")
        arguments = [f"    {n}={comparison.settings[n]!r}," for n in names if n in comparison.settings]
        solvers = ", ".join(f"{name!r}: ..." for name in comparison.solvers)
        call = "\n".join(["import invflow", "", "comparison = invflow.compare(", f"    {comparison.problems!r},",
                          f"    {{{solvers}}},", *arguments, ")", 'comparison.report("report.html")'])
    return {"command": command, "call": call,
            "settings": "; ".join(f"{name}: {value}" for name, value in _settings(comparison.settings)),
            "solvers": {name: _settings(found) for name, found in comparison.solvers.items()},
            "seeds": {problem: ", ".join(dict.fromkeys(map(str, found)))
                      for problem, found in comparison.seeds.items()}}


def _settings(found: Mapping[str, Any], above: str = "") -> list[tuple[str, str]]:
    """Names and values of settings as text; the name of a nested setting starts with the names above it."""
    rows = []
    for key, value in found.items():
        if isinstance(value, Mapping):
            rows += _settings(value, f"{above}{key}: ")
        else:
            text = value if isinstance(value, str) else "None" if value is None else json.dumps(value, default=str)
            rows.append((f"{above}{key}", text))
    return rows
