"""The report: one page without outside references, escaped, with the numbers of the comparison."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import matplotlib
import pytest
import torch
from html_pages import EVIL, PLANE, PROBLEM, SOLVERS, Page, cells, comparison, pixels
from matplotlib.figure import Figure
from torch import Tensor
from typer.testing import CliRunner

import invflow
from invflow.cli.entry import app
from invflow.evaluation.comparison import Comparison
from invflow.evaluation.page.gallery import Extent, choose_extent, palette
from invflow.evaluation.page.page import render_report
from invflow.evaluation.page.pictures import INK, plane, svg
from invflow.evaluation.page.table import signed
from invflow.evaluation.results.description import describe
from invflow.evaluation.results.figure import pareto_panel
from invflow.evaluation.results.text import with_error


def test_page_needs_nothing_from_outside_and_names_are_escaped() -> None:
    text = render_report(comparison())
    page = Page(text)
    for tag, own, _ in page.elements:
        assert not any(key.startswith("on") for key in own), own
        assert (own.get("xlink:href") or "#").startswith("#")
        for key in ("src", "srcset", "poster", "data", "action"):
            assert (own.get(key) or "data:").startswith("data:"), (tag, own)
        assert (own.get("href") or "#").startswith("#")
        assert tag not in {"link", "iframe", "object", "embed", "base"}
    assert not re.search(r"@import|https?://|\burl\((?!#)", text)
    policy = page.find("meta", http_equiv="Content-Security-Policy")[0][0]["content"]
    assert "default-src 'none'" in policy
    assert "http" not in policy
    assert next(text for _, text in page.find("h2")) == PROBLEM
    assert EVIL in [text for _, text in page.find("h5")]
    targets = {own.get("id") for _, own, _ in page.elements}
    assert {own["href"][1:] for own, _ in page.find("a")} <= targets
    assert not page.find("b", onerror="alert(1)")
    assert len(page.find("script")) == 3  # the pairs of two problems, and the page's own
    assert len(page.find("script", class_="pairs")) == 2
    for own, text in page.find("script", class_="pairs"):
        assert own["type"] == "application/json"
        json.loads(text)


@pytest.mark.parametrize("reference", [None, "third", "best"])
def test_numbers_are_those_of_the_comparison(reference: str | None) -> None:
    found = comparison()
    shown = cells(Page(render_report(found, reference=reference)), found)
    seen = 0
    for row in found.rows(reference):
        if row["metric"] == "failure":
            assert (row["problem"], row["solver"], "crps") not in shown
            continue
        own, text = shown.pop((row["problem"], row["solver"], row["metric"]))
        if row["mean"] is None or math.isnan(row["mean"]):
            assert "data-value" not in own
            continue
        assert float(own["data-value"]) == row["mean"]
        if "standard_error" not in row:
            continue
        seen += 1
        assert float(own["data-error"]) == row["standard_error"]
        assert text.startswith(with_error(row["mean"], row["standard_error"]))
        if row.get("reference") == row["solver"]:
            assert text.endswith("reference")
        elif "difference" in row:
            assert float(own["data-difference"]) == row["difference"]
            assert float(own["data-difference-error"]) == row["difference_error"]
            assert text.endswith(signed(row["difference"], row["difference_error"]))
    assert seen == 17 - 1  # one mean is no number
    assert all(text == "—" for _, text in shown.values())


def test_errors_of_all_pairs_are_in_the_page() -> None:
    found = comparison()
    page = Page(render_report(found))
    errors = json.loads(page.find("script", class_="pairs")[0][1])
    assert set(errors) == {"crps", "psnr", "extra", "coverage", "spread"}
    for metric in ("crps", "psnr"):
        pairs = [(i, j) for i in range(4) for j in range(i + 1, 4)]
        for (i, j), error in zip(pairs, errors[metric], strict=True):
            if j == 3:
                assert error is None
            else:
                wanted = found.difference(PROBLEM, SOLVERS[i], metric, SOLVERS[j])[1]
                assert error == pytest.approx(wanted, rel=1e-4)
    assert set(errors["extra"]) == {None}


def test_differences_are_coloured_where_a_direction_is_better() -> None:
    found = comparison()
    shown = [(own, kind) for (tag, own, _), (_, inner, _) in zip(*[Page(render_report(found)).elements[i:]
                                                                   for i in (0, 2)], strict=False)
             if tag == "td" and "data-difference" in own for kind in [inner.get("class")]]
    assert len(shown) == 10
    for own, kind in shown:  # made 0.3 apart with noise of 0.1: far beyond two standard errors
        better = {"crps": "worse", "psnr": "better"}.get(own["data-metric"])
        assert kind == better, own


def test_gallery_shows_the_images_at_their_resolution() -> None:
    found = comparison()
    page = Page(render_report(found))
    examples = found.examples(PROBLEM, "plain")
    images = [(own["alt"], pixels(own["src"])) for own, _ in page.find("img")]
    assert len(images) == 4 * (2 + 3 * (9 + 3))  # 4 observations: given, and by solver samples and three summaries
    first = images[: 2 + 12]
    assert torch.equal(first[0][1], (examples["truth"][0, 0] * 255).round().byte())
    y, seen = examples["observation"][0, 0], examples["observed"][0, 0]
    assert torch.equal(first[1][1][seen], (y[seen] * 255).round().byte()[:, None].expand(-1, 3))
    assert first[1][1][~seen].unique(dim=0).tolist() == [[107, 135, 173]]  # blue, not the black of a dark pixel
    for k in range(9):
        assert first[2 + k][0] == f"sample {k + 1} of plain"
        assert torch.equal(first[2 + k][1], (examples["samples"][0, k, 0] * 255).round().byte())
    assert torch.equal(first[11][1], (examples["mean"][0, 0] * 255).round().byte())
    colours = torch.tensor(palette())
    highest = max(float(found.examples(PROBLEM, s)["std"][:4].max()) for s in SOLVERS[:3])
    wanted = colours[(examples["std"][0, 0].double() / highest * 31).round().long()]
    assert torch.equal(first[12][1].long(), wanted)
    covered = examples["covered"][0, 0]
    assert len(first[13][1][covered].unique(dim=0)) == 1
    assert len(first[13][1][~covered].unique(dim=0)) == 1
    assert not torch.equal(first[13][1][covered][0], first[13][1][~covered][0])
    text = "".join(page.elements[0][2])
    assert f"coverage {float(covered.double().mean()):.0%}" in text
    assert f"mean, {found.values[PROBLEM]['plain']['psnr'][0]:.1f} dB" in text


def test_colour_images_and_measurements_of_other_kinds() -> None:
    found = comparison(image=(3, 5, 4))
    rgb = [own for own, _ in Page(render_report(found)).find("img")]
    wanted = (found.examples(PROBLEM, "plain")["truth"][0].permute(1, 2, 0) * 255).round().byte()
    assert torch.equal(pixels(rgb[0]["src"]), wanted)
    for shape in ((40,), (2, 30), (5,)):
        for part in found._parts.values():
            part.tensors.pop("observed", None)
            part.tensors["observation"] = torch.randn(5, *shape)
        assert Page(render_report(found)).find("figcaption")
    for part in found._parts.values():
        part.tensors["observation"] = torch.randn(5, 3, 6, dtype=torch.complex64)
    assert Page(render_report(found)).find("figcaption")


def test_points_in_the_plane_and_curves_are_drawn() -> None:
    found = comparison()
    page = Page(render_report(found))
    drawn = [own["aria-label"] for own, _ in page.find("svg") if "samples in the plane" in str(own["aria-label"])]
    assert len(drawn) == 4 * 3
    assert all(words.startswith("9 samples") for words in drawn)
    x, mean, std, truth = (found.examples(PLANE, "plain")[name][0] for name in ("samples", "mean", "std", "truth"))
    figure = Page(plane(x, mean, std, truth, "name"))
    uses = [(float(own["x"]), float(own["y"])) for own, _ in figure.find("use")]
    places = torch.tensor(uses[:9]) - torch.tensor(uses[:9]).mean(0)
    offset = (x - x.mean(0)) * torch.tensor([1, -1])  # one scale for both coordinates, the second upwards
    slope = float((places * offset).sum() / offset.square().sum())
    assert slope > 100
    assert torch.allclose(places, slope * offset, atol=0.2)
    for part in found._parts.values():
        part.tensors |= {key: torch.rand(*value.shape[:2 if key == "samples" else 1], 300)
                         for key, value in part.tensors.items() if key not in ("covered", "observed")}
    words = [own["aria-label"] for own, _ in Page(render_report(found)).find("svg")]
    assert len([text for text in words if "300 numbers" in text and "one in 2 drawn" in text]) == 2 * 4 * (3 + 2)


def test_figures_follow_the_colours_of_the_page_and_names_stay_names() -> None:
    figure = Figure()
    with matplotlib.rc_context({"text.parse_math": False}):
        figure.add_subplot().annotate(EVIL + " $x^$", (0.5, 0.5), color=INK)
    text = svg(figure, '<"', "name")
    page = Page(text)
    assert page.elements[0][1]["aria-label"] == '<"'
    assert any(EVIL + " $x^$" in found for _, found in page.find("text"))
    assert "var(--ink)" in text
    assert INK not in text
    assert not re.search(r"https?:|<style|xmlns|font-family", text)


def test_page_stays_small() -> None:
    def examples(count: int, *shape: int) -> list[dict[str, Tensor]]:
        return [{"samples": torch.zeros(1).expand(9, 20, *shape)}] * count

    assert choose_extent(examples(15, 1, 28, 28)) == Extent(4, 16)
    assert choose_extent(examples(90, 1, 28, 28)) == Extent(4, 16)
    assert choose_extent(examples(15, 3, 64, 64)) == Extent(4, 8)
    assert choose_extent(examples(15, 3, 512, 512)) == Extent(1, 4)
    found = comparison(shown=6, samples=20, image=(1, 28, 28))
    page = Page(render_report(found))
    assert len({own["data-observation"] for own, _ in page.find("div", class_="observation")}) == 4
    assert len(page.find("img")) == 4 * (2 + 3 * (16 + 3))


def test_words() -> None:
    found = comparison(observations=8)
    values = found.values[PROBLEM]
    values["plain"]["coverage"] = [0.5, 0.52, 0.48, 0.5, 0.51, 0.49, 0.5, 0.5]
    values["third"]["crps"] = [v + (0.1 if i % 2 else -0.0999) for i, v in enumerate(values["plain"]["crps"])]
    page = Page(render_report(found))
    text = " ".join(text for _, text in page.find("p"))
    assert f"Best CRPS: plain, {with_error(*found.mean(PROBLEM, 'plain', 'crps'))}, with 0 network calls" in text
    assert "50.0% ± 0.4% of the truth's values, so they are too narrow" in text
    assert "(paired difference within two standard errors): third (" in text
    assert EVIL not in text
    values["plain"]["coverage"] = [0.5, 1.0, 0.7, 1.0, 0.8, 1.0, 0.9, 1.0]
    assert "consistent with their level" in render_report(found)
    values["plain"]["coverage"] = [0.99, 1.0, 0.98, 1.0, 0.99, 1.0, 0.99, 1.0]
    assert "too wide" in render_report(found)


def test_how_to_reproduce() -> None:
    found = comparison()
    text = "".join(Page(render_report(found)).find("section", id="reproduce")[0][1])
    for piece in ("num_observations=6", "seed=3", "split='test'", "torch 2", repr(PROBLEM), EVIL, "7"):
        assert piece in text
    text = Page(render_report(found, command="invflow compare '<x>'")).find("code")[0][1]
    assert text == "invflow compare '<x>'"


def test_settings_of_each_solver_are_a_table() -> None:
    found = comparison()
    found.solvers |= {"plain": {"steps": None, "first": {"range": [0.0, 1.0], "kind": "x"}, "second": {"kind": EVIL}},
                      "third": {}}
    page = Page(render_report(found))
    assert [text for _, text in page.find("caption")] == SOLVERS
    text = page.find("div", class_="folding settings")[0][1].replace("\n", "")
    assert text.startswith(f"plainstepsNonefirst: range[0.0, 1.0]first: kindxsecond: kind{EVIL}{EVIL}solver{EVIL}")
    assert "thirddefaultsfails" in text


def test_nothing_to_show() -> None:
    empty = Comparison({"p": {}}, {"p": {}}, {"p": {}}, {"p": {"a": "why not"}}, {}, {"a": {}}, {"p": []}, {})
    assert "why not" in render_report(empty)
    one = comparison(observations=1, shown=1, samples=1)
    one.values[PROBLEM]["third"].pop("extra")
    for table in one.values.values():
        for row in table.values():
            for metric, values in row.items():
                row[metric] = values[:1]
    shown = cells(Page(render_report(one)), one)
    assert math.isnan(float(shown[PROBLEM, "plain", "crps"][0]["data-error"]))
    assert "±" not in shown[PROBLEM, "plain", "crps"][1]
    with pytest.raises(KeyError, match="choose one of plain"):
        render_report(one, reference="unknown")
    one._parts = {}
    assert not Page(render_report(one)).find("img")


def test_certificates(tmp_path: Path) -> None:
    posed = invflow.load_problem("gaussian/linear")
    certificate = invflow.calibrate(posed.exact_posterior(), posed, num_simulations=30, num_samples=19)
    found = comparison()
    path = tmp_path / "deep" / "er" / "report.html"
    found.report(path, certificates={EVIL: certificate})
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]
    page = Page(path.read_text(encoding="utf-8"))
    (section,) = page.find("section", id="calibration")
    assert certificate.sentence in section[1]
    assert EVIL in section[1]
    values = [float(own["data-value"]) for own, _ in page.find("td")
              if own.get("data-value") not in (None, "True", "False")]
    for check in certificate.judgement.checks:
        assert {check.p_value, check.p_adjusted} <= set(values)
    (figure,) = page.find("img", class_="certificate")
    assert pixels(figure[0]["src"]).shape[1] > 800
    for wrong in ({"a": 3}, [certificate]):
        with pytest.raises(TypeError, match=r"pass \{'name': certificate\}"):
            render_report(found, certificates=wrong)


def test_drawings_stand_for_the_numbers() -> None:
    found = comparison()
    page = Page(render_report(found))
    plots = page.find("figure", class_="plot")
    assert [own["data-metric"] for own, _ in plots] == ["crps", "coverage", "psnr", "crps"]
    for own, text in plots[:3]:
        assert "network calls for each sample" in text
        assert all(name[:23] in text for name in SOLVERS[:3]), own  # each has its name, as it is
    (axes,) = pareto_panel(found, PROBLEM, "crps").axes
    shown = axes.containers
    for container, solver in zip(shown, SOLVERS, strict=False):
        (x,), (y,) = container.lines[0].get_data()
        assert y == pytest.approx(found.mean(PROBLEM, solver, "crps")[0])
        assert x == max(found.calls(PROBLEM, solver), 1 / 3)  # no call: left of one
    assert len(shown) == 3
    assert axes.texts[0].get_text() == "plain"  # on the front, so it is placed first


def test_names_cover_neither_points_nor_each_other() -> None:
    found = comparison()
    figure = pareto_panel(found, PROBLEM, "crps")
    renderer = figure.canvas.get_renderer()
    (axes,) = figure.axes
    boxes = [text.get_window_extent(renderer) for text in axes.texts]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    places = axes.transData.transform([text.xy for text in axes.texts])
    assert not any(box.contains(*place) for box in boxes for place in places)


@pytest.mark.parametrize(("better", "values", "leaders"), [
    # 0.05 worse in each observation: the means' own errors of 0.3 would not tell, the paired one does
    ("crps", {"a": 0.0, "b": 0.05, "c": 0.0}, ["a"]),
    # as much worse, but not in each observation
    ("crps", {"a": 0.0, "b": 0.05, "c": 0.2}, ["a", "b"]),
    ("psnr", {"a": 0.05, "b": 0.0, "c": 0.0}, ["a"]),
    ("coverage", {"a": 0.95 - 0.9, "b": 0.85 - 0.9, "c": 0.2}, ["a", "b"]),  # as far from 90% on both sides
])
def test_bold_is_what_cannot_be_told_from_the_best(better: str, values: dict[str, float], leaders: list[str]) -> None:
    g = torch.Generator().manual_seed(0)
    shared, noise = 0.1 * torch.randn(12, generator=g).double(), torch.randn(12, generator=g).double()
    level = torch.full((12,), 0.9).double() if better == "coverage" else 1 + 3 * shared
    noise = (noise - noise.mean()) * values["c"]
    table = {name: {better: (level + values[name] + (noise if name == "b" else 0)).tolist()} for name in ("a", "b")}
    table["worst"] = {better: (level + (-9.0 if better == "psnr" else 9.0)).tolist()}
    costs = {name: {"forward": 1.0, "backward": 0.0, "seconds": 1.0, "memory": None} for name in table}

    def made(table: dict[str, dict[str, list[float]]]) -> Comparison:
        sets = {"p": {name: {"frechet": (1.0, 0.1)} for name in table}}
        return Comparison({"p": table}, sets, {"p": costs}, {"p": {}}, {}, {name: {} for name in table}, {"p": [0]}, {})

    found = made(table)
    assert found.leaders("p", better) == leaders
    assert found.leaders("p", "frechet") == []  # no paired errors
    page = Page(render_report(found))
    bold = [text for _, text in page.find("b")]
    assert bold == [with_error(*found.mean("p", name, better)) for name in leaders]
    assert found.to_markdown().count("**") == 2 * len(leaders)
    # one solver alone, or one observation, tells nothing
    assert made({"a": table["a"]}).leaders("p", better) == []
    assert made({name: {better: row[better][:1]} for name, row in table.items()}).leaders("p", better) == []


def test_problems_are_described_and_columns_that_are_not_there_explained(tmp_path: Path) -> None:
    found = invflow.compare("mnist/random-inpainting", ["wiener", "bicubic"], num_observations=2, num_samples=2,
                            output=tmp_path)
    for kept in (found, Comparison.load(tmp_path)):
        described = kept.descriptions["mnist/random-inpainting"]
        assert described["operator"] == "RandomInpainting((1, 28, 28), keep=(0.3, 0.7)), drawn for each observation"
        assert described["noise"] == "Gaussian, sigma 0.025"
        assert described["prior"] == "mnist"
    problem = invflow.load_problem("mnist/random-inpainting")
    _, likelihood = problem.simulate(2, generator=torch.Generator().manual_seed(0))
    counts = [int(mask.sum()) for mask in likelihood.operator.observed()]
    assert describe(problem, likelihood)["measured"] == f"{min(counts)} to {max(counts)} values; an image has 784"
    page = Page(render_report(found))
    assert {text for _, text in page.find("dt")} > set(described)
    hints = " ".join(text for _, text in page.find("p", class_="hint"))
    assert "90% coverage (needs known truths, at least 19 effective samples" in hints
    assert "CRPS (" not in hints
    assert [text for _, text in page.find("th", scope="colgroup")] == ["quality", "honesty", "cost"]


def test_command_line_writes_the_report(tmp_path: Path) -> None:
    out = tmp_path / "with space"
    run = CliRunner().invoke(app, ["compare", "gaussian/linear", "--solver", "exact", "--solver", "few=fmtt:steps=4",
                                   "--observations", "3", "--samples", "20", "--output", str(out)])
    assert run.exit_code == 0, run.output
    page = Page((out / "report.html").read_text(encoding="utf-8"))
    code = page.find("code")[0][1]
    assert code.startswith("invflow compare gaussian/linear --solver exact --solver few=fmtt:steps=4 --observations 3")
    assert f"--output '{out}'" in code
    loaded = Comparison.load(out)
    assert {key for key, _ in zip(cells(page, loaded), range(3))}
    shown = cells(page, loaded)
    for row in loaded.rows():
        if row["mean"] is not None and not math.isnan(row["mean"]) and row["metric"] not in ("seconds", "memory"):
            assert float(shown[row["problem"], row["solver"], row["metric"]][0]["data-value"]) == row["mean"]
    assert len([own for own, _ in page.find("svg") if str(own["aria-label"]).startswith("8 samples")]) == 3 * 2


def test_no_coverage_is_shown_of_intervals_that_cannot_have_their_level() -> None:
    few = invflow.compare("gaussian/linear", ["exact"], num_observations=2, num_samples=18)
    enough = invflow.compare("gaussian/linear", ["exact"], num_observations=2, num_samples=19)
    assert "covered" not in few.examples("gaussian/linear", "exact")
    assert "covered" in enough.examples("gaussian/linear", "exact")
