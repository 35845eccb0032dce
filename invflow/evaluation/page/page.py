"""A comparison, and certificates of calibration, as one HTML page that needs nothing but itself."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from invflow._core.records import write_atomically
from invflow.evaluation.certificate.certificate import Certificate
from invflow.evaluation.page.elements import Cell, Markup, data_uri, element, sortable
from invflow.evaluation.page.gallery import choose_extent, gallery
from invflow.evaluation.page.plot import pareto_drawings
from invflow.evaluation.page.table import column_notes, problem_table, reference_choice, signed
from invflow.evaluation.results.text import with_error
from invflow.evaluation.summary import LEVEL, METRICS

if TYPE_CHECKING:
    from invflow.evaluation.results.results import Results

__all__ = ["render_report", "write_report"]

#: of calling honest intervals too narrow or too wide
_CHANCE = 0.01
#: even a page that had an address in it by mistake could not fetch it
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def write_report(comparison: Results, path: str | os.PathLike[str], **options: Any) -> None:
    """Write :func:`render_report` to a file, whole or not at all; folders above it are made."""
    page = render_report(comparison, **options)
    write_atomically(Path(path), lambda name: Path(name).write_text(page, encoding="utf-8"))


def render_report(comparison: Results, *, reference: str | None = None,
                  certificates: Mapping[str, Certificate] | None = None, command: str | None = None) -> str:
    """The page as text.

    Args:
        comparison: of solvers.
        reference: what the differences are to when the page opens: a solver's name, ``"best"``, or None for the first
            solver. Readers of the page can choose another.
        certificates: from :func:`invflow.calibrate`, by the names they get on the page.
        command: that made the comparison; None shows the call instead.

    Raises:
        KeyError: for a reference that is no solver.
        TypeError: for certificates of another type.
    """
    if reference not in (None, "best", *comparison.solvers):
        raise KeyError(f"there is no solver {reference!r}: choose one of {', '.join(comparison.solvers)}, or 'best'")
    certificates = {} if certificates is None else certificates
    if not isinstance(certificates, Mapping) or not all(isinstance(c, Certificate) for c in certificates.values()):
        raise TypeError(f"certificates={certificates!r}: pass {{'name': certificate}} with what invflow.calibrate "
                        "returned, or Certificate.load")
    settings = comparison.settings
    examples = {p: {s: found for s in comparison.solvers if "samples" in (found := comparison.examples(p, s))}
                for p in comparison.problems}
    extent = choose_extent([found for table in examples.values() for found in table.values()])
    rows = comparison.rows(reference)
    counts = _count(len(comparison.solvers), "solver"), _count(len(comparison.problems), "problem")
    title = "Comparison of {} on {}".format(*counts)
    links = [element("a", name, href=f"#problem-{i}") for i, name in enumerate(comparison.problems)]
    links += [element("a", "calibration", href="#calibration")] if certificates else []
    links.append(element("a", "how to reproduce it", href="#reproduce"))
    truths = f"{settings.get('split')} images" if settings.get("source") == "data" else "draws of the prior"
    lead = (f"{settings.get('num_observations')} observations of each problem ({truths} where the problem has images), "
            f"the same for every solver; {settings.get('num_samples')} posterior samples for each; seed "
            f"{settings.get('seed')}. Numbers are means ± standard errors over observations, the best of a column in "
            "bold.")
    sections = [element("header", element("h1", title), element("p", lead), element("nav", *links)),
                element("div", reference_choice(comparison, reference), _key(), class_="controls choice")]
    for i, problem in enumerate(comparison.problems):
        sections.append(_problem(comparison, problem, i, rows, reference))
        if examples[problem]:
            sections.append(_fold("Gallery", gallery(comparison, problem, examples[problem], extent), "h3"))
    sections.append(_fold("What the columns mean", column_notes(comparison), "h2", closed=True))
    if certificates:
        sections.append(element("section", element("h2", "Calibration"),
                                *(_certificate(name, c) for name, c in certificates.items()), id="calibration"))
    sections.append(element("section", element("h2", "How to reproduce it"), *_reproduce(comparison, command),
                            id="reproduce"))
    head = element("head", element("meta", charset="utf-8"),
                   element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
                   element("meta", name="viewport", content="width=device-width, initial-scale=1"),
                   element("meta", name="generator", content=f"invflow {comparison.versions.get('invflow', '')}"),
                   element("title", title), element("style", _template("report.css")))
    body = element("body", element("main", *sections), element("script", _template("report.js")))
    return "<!DOCTYPE html>\n" + element("html", head, body, lang="en") + "\n"


def _template(name: str) -> Markup:
    return Markup(files("invflow").joinpath("templates", name).read_text(encoding="utf-8"))


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _key() -> Markup:
    better, worse = (element("span", word, class_=word) for word in ("better", "worse"))
    return element("span", "Under each number its paired difference: ", better, " or ", worse,
                   " by more than two standard errors.", class_="hint")


def _fold(title: str, content: Markup, heading: str, closed: bool = False) -> Markup:
    """A part that can be folded away; open in print and where scripts do not run."""
    return element("section", element(heading, element("button", title, type="button", aria_expanded="true")),
                   element("div", content, class_="folding"), class_="fold", data_closed=closed)


def _problem(comparison: Results, problem: str, index: int, rows: list[dict[str, Any]],
             reference: str | None) -> Markup:
    summary = [element("p", sentence) for sentence in _sentences(comparison, problem)]
    plots = pareto_drawings(comparison, problem)
    parts = [element("h2", problem), *summary, problem_table(comparison, problem, rows, reference)]
    if plots:
        note = "On the line: solvers that no other beats at as few calls. Bars are one standard error."
        parts += [element("h3", "Quality against calls"), element("p", note, class_="hint"),
                  element("div", *plots, class_="plots")]
    return element("section", *parts, id=f"problem-{index}", class_="problem")


# -- in words --------------------------------------------------------------------------------------------------------


def _sentences(comparison: Results, problem: str) -> list[str]:
    """Which solver is best, at what cost, and whether its intervals are honest."""
    metric = next((m for m in ("crps", "sliced_wasserstein", "psnr", "rmse", "residual")
                   if comparison.best(problem, m) is not None), None)
    best = None if metric is None else comparison.best(problem, metric)
    if metric is None or best is None:
        return []
    title, costs = METRICS[metric].title, comparison.costs[problem][best]
    text = (f"Best {title}: {best}, {with_error(*comparison.mean(problem, best, metric))}, with "
            f"{comparison.calls(problem, best):.4g} network calls for each sample and {costs['seconds']:.3g} s for "
            "each observation.")
    level = [] if metric not in comparison.values[problem].get(best, {}) else [
        s for s in comparison.solvers if s != best and metric in comparison.values[problem].get(s, {})]
    near = []
    for solver in level:
        difference, error = comparison.difference(problem, solver, metric, best)
        if math.isfinite(error) and abs(difference) <= 2 * error:
            near.append(f"{solver} ({signed(difference, error)})")
    if near:
        text += f" Within two standard errors of it, by paired differences: {', '.join(near)}."
    return [text, *_honesty(comparison, problem, best)]


def _honesty(comparison: Results, problem: str, solver: str) -> list[str]:
    """Coverage against its level by Student's t, since few observations give a standard error that is itself rough."""
    from scipy import stats

    if "coverage" not in comparison.values[problem][solver]:
        return []
    share, error = comparison.mean(problem, solver, "coverage")
    if math.isnan(share):
        return [f"Its {LEVEL:.0%} intervals cannot be judged: some observations have too few effective samples."]
    text = f"Its {LEVEL:.0%} intervals hold {100 * share:.1f}%"
    count = len(comparison.values[problem][solver]["coverage"])
    if count < 2 or not error > 0:
        return [f"{text} of the truth's values; too few observations to judge that."]
    distance = abs(share - LEVEL) / error
    if 2 * float(stats.t.sf(distance, count - 1)) > _CHANCE:
        found = f"which is no evidence against their level ({distance:.1f} standard errors off)"
    else:
        found = f"so they are too {'narrow' if share < LEVEL else 'wide'} ({distance:.1f} standard errors off)"
    return [f"{text} ± {100 * error:.1f}% of the truth's values, {found}."]


# -- calibration -----------------------------------------------------------------------------------------------------


def _certificate(name: str, certificate: Certificate) -> Markup:
    import io

    head, *body = certificate._table()
    rows = []
    for texts, check in zip(body, certificate.judgement.checks, strict=True):
        values: list[Any] = [check.name, str(check.passed), check.p_value, check.p_adjusted, check.z_mean,
                             check.contraction, check.coverage]
        rows.append([Cell(text.replace("+-", "±"), value if isinstance(value, str) or math.isfinite(value) else None)
                     for text, value in zip(texts, values, strict=True)])
    buffer = io.BytesIO()
    certificate.plot(columns=5).savefig(buffer, format="png", dpi=110)
    figure = element("img", src=data_uri(_fewer_colours(buffer.getvalue())), class_="certificate",
                     alt=f"rank functions in their bands, TARP, coverage and z-scores of {certificate.solver} on "
                         f"{certificate.problem}")
    kind = {"passes": "good", "fails": "bad"}.get(certificate.verdict, "open")
    return element("article", element("h3", name, " ", element("span", certificate.verdict, class_=f"verdict {kind}")),
                   element("p", certificate.sentence),
                   sortable([Cell(text) for text in head], rows, f"Checks of {name}"),
                   element("div", figure, class_="scroll", tabindex=0, role="region", aria_label=f"Figure of {name}"),
                   element("ul", *(element("li", fact.replace("+-", "±")) for fact in certificate._facts())))


def _fewer_colours(png: bytes) -> bytes:
    """The same figure in a third of the space."""
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.open(io.BytesIO(png)).convert("RGB").quantize(64).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


# -- how to reproduce it ---------------------------------------------------------------------------------------------


def _reproduce(comparison: Results, command: str | None) -> list[Markup]:
    parts = []
    if command is not None:
        parts += [element("p", "The command; called once more it reads what is there and computes what is missing."),
                  element("pre", element("code", command))]
    else:
        names = ("num_observations", "num_samples", "seed", "split", "source", "part_size", "gallery")
        arguments = [f"    {n}={comparison.settings[n]!r}," for n in names if n in comparison.settings]
        solvers = ", ".join(f"{name!r}: ..." for name in comparison.solvers)
        call = "\n".join(["import invflow", "", "comparison = invflow.compare(", f"    {comparison.problems!r},",
                          f"    {{{solvers}}},", *arguments, ")", 'comparison.report("report.html")'])
        parts += [element("p", "The call, with solvers of the settings below."), element("pre", element("code", call))]
    versions = ", ".join(f"{name} {version}" for name, version in comparison.versions.items())
    parts.append(element("p", f"Made with {versions}. Settings: {_plain(comparison.settings)}."))
    items = [Markup(element("dt", name) + element("dd", _plain(found) or "defaults"))
             for name, found in comparison.solvers.items()]
    parts.append(_fold("Settings of each solver", element("dl", *items), "h3", closed=len(items) > 6))
    seeds = [Markup(element("dt", problem) + element("dd", ", ".join(dict.fromkeys(map(str, found)))))
             for problem, found in comparison.seeds.items()]
    parts.append(_fold("Seeds of the solvers' random numbers, part by part", element("dl", *seeds), "h3", closed=True))
    return parts


def _plain(found: Any) -> str:
    """Settings as a line of text."""
    if isinstance(found, Mapping):
        return "; ".join(f"{key}: {{{_plain(value)}}}" if isinstance(value, Mapping) else f"{key}: {_plain(value)}"
                         for key, value in found.items())
    return found if isinstance(found, str) else json.dumps(found, default=str)
