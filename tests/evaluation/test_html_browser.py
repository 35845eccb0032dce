"""The report in headless Chromium, if available: sorting, references, the slider, a phone, print."""

from __future__ import annotations

import html
import json
import shutil
import subprocess
from pathlib import Path

import pytest
from html_pages import PROBLEM, SOLVERS, Page, comparison

from invflow.evaluation.page.page import render_report
from invflow.evaluation.page.table import signed

CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))),
                None)

SELF_TEST = """
const table = document.querySelector("table[data-problem]"), found = {};
const order = () => Array.from(table.tBodies[0].rows).map(row => Number(row.cells[0].dataset.solver));
const head = name => Array.from(table.tHead.rows[1].cells).find(cell => cell.dataset.metric === name);
const press = name => { head(name).querySelector("button").click(); return order(); };
found.crps = [press("crps"), head("crps").ariaSort, press("crps"), head("crps").ariaSort];
found.psnr = [press("psnr"), head("psnr").ariaSort, head("crps").ariaSort];
found.memory = press("memory");
table.tHead.rows[1].cells[0].querySelector("button").click();
found.names = order();
head("crps").querySelector("button").focus();
found.focus = document.activeElement === head("crps").querySelector("button");
const differences = value => {
  const choice = document.getElementById("reference");
  choice.value = value;
  choice.dispatchEvent(new Event("change"));
  const column = Array.from(table.tHead.rows[1].cells).indexOf(head("crps"));
  return Object.fromEntries(Array.from(table.tBodies[0].rows).map(row => {
    const cell = row.cells[column], text = cell.querySelector("small");
    return [row.cells[0].dataset.solver, [Number(cell.dataset.difference), Number(cell.dataset.differenceError),
                                          text && text.textContent, text && text.className]];
  }));
};
found.differences = Object.fromEntries(["2", "best", "default"].map(value => [value, differences(value)]));
const gallery = document.querySelector(".gallery"), slider = gallery.querySelector(".slider");
const visible = () => Array.from(gallery.querySelectorAll("[data-sample]"))
  .filter(image => image.checkVisibility()).map(image => image.alt);
found.first = visible();
slider.value = 4;
slider.dispatchEvent(new Event("input"));
found.fourth = [visible(), gallery.querySelector("output").textContent];
gallery.querySelector(".chosen").value = "2";
gallery.querySelector(".chosen").dispatchEvent(new Event("input"));
found.third = Array.from(gallery.querySelectorAll(".observation")).filter(part => part.checkVisibility())
  .map(part => part.dataset.observation);
gallery.querySelector(".together").click();
found.together = visible().length;
const fold = gallery.closest(".fold"), button = fold.querySelector("button");
button.click();
found.folded = [gallery.checkVisibility(), button.ariaExpanded];
button.click();
found.unfolded = [gallery.checkVisibility(), button.ariaExpanded];
gallery.querySelector(".together").click();
found.picture = Math.min(...Array.from(gallery.querySelectorAll("img")).filter(image => image.checkVisibility())
  .map(image => image.getBoundingClientRect().width));
const above = gallery.compareDocumentPosition(document.querySelector(".plots"));
found.galleryFirst = Boolean(above & Node.DOCUMENT_POSITION_FOLLOWING);
found.width = window.innerWidth;
found.overflow = document.documentElement.scrollWidth - document.documentElement.clientWidth;
found.box = [table.parentElement.scrollWidth > table.parentElement.clientWidth];
found.pictures = Array.from(document.images).every(image => image.complete && image.naturalWidth === 8);
found.rendering = getComputedStyle(document.images[0]).imageRendering;
found.evil = document.querySelectorAll("[onerror]").length;
document.documentElement.dataset.found = JSON.stringify(found);
"""


def chromium(page: Path, profile: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
               "--disable-background-networking", "--disable-component-update", "--disable-sync",
               f"--user-data-dir={profile}", *options, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_in_chromium(tmp_path: Path) -> None:
    found, path = comparison(), tmp_path / "report.html"
    text = render_report(found)
    assert text.count("</body>") == 1
    tested = html.escape(text.replace("</body>", f"<script>{SELF_TEST}</script></body>"))
    # in a frame as wide as a phone, since the browser's own window is never narrower than 500
    path.write_text(f"""<!DOCTYPE html><html><head><title>t</title></head><body>
<iframe style="width: 390px; height: 800px; border: 0" srcdoc="{tested}"></iframe>
<script>window.onload = () => {{
  const frame = document.querySelector("iframe");
  document.documentElement.dataset.found = frame.contentDocument.documentElement.dataset.found;
  frame.remove();
}};</script></body></html>""", encoding="utf-8")
    run = chromium(path, tmp_path / "profile", "--dump-dom")
    own = Page(run.stdout).find("html")[0][0]
    assert "data-found" in own, run.stderr[-2000:]
    seen = json.loads(own["data-found"])
    assert seen["crps"] == [[0, 1, 2, 3], "ascending", [2, 1, 0, 3], "descending"]  # without a value: last
    assert seen["psnr"] == [[2, 1, 0, 3], "descending", None]  # the best first
    assert seen["memory"][:2] in ([1, 2], [2, 1])
    assert set(seen["memory"][2:]) == {0, 3}
    assert seen["names"] == [SOLVERS.index(name) for name in sorted(SOLVERS)]
    assert seen["focus"]
    for value, reference in (("2", "third"), ("best", "best"), ("default", None)):
        rows = {row["solver"]: row for row in found.rows(reference) if row["problem"] == PROBLEM
                and row["metric"] == "crps"}
        for i, solver in enumerate(SOLVERS[:3]):
            difference, error, text, kind = seen["differences"][value][str(i)]
            row = rows[solver]
            if row["reference"] == solver:
                assert (text, kind) == ("reference", "own")
                continue
            assert difference == pytest.approx(row["difference"], rel=1e-9)
            assert error == pytest.approx(row["difference_error"], rel=1e-4)
            assert text.replace("\u00a0", " ") == signed(row["difference"], row["difference_error"])
            assert kind == ("better" if difference < 0 else "worse")
    assert seen["first"] == [f"sample 1 of {solver}" for solver in SOLVERS[:3]]
    assert seen["fourth"] == [[f"sample 4 of {solver}" for solver in SOLVERS[:3]], "4 of 9"]
    assert seen["third"] == ["2"]
    assert seen["together"] == 3 * 9
    assert seen["folded"] == [False, "false"]
    assert seen["unfolded"] == [True, "true"]
    assert (seen["width"], seen["overflow"]) == (390, 0)
    assert seen["picture"] >= 170
    assert seen["galleryFirst"]
    assert seen["box"] == [True]
    assert seen["pictures"]
    assert seen["rendering"] == "pixelated"
    assert seen["evil"] == 0


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None or shutil.which("pdftotext") is None, reason="needs Chromium and pdftotext")
def test_print_expands_everything(tmp_path: Path) -> None:
    path, pdf = tmp_path / "report.html", tmp_path / "report.pdf"
    comparison().report(path)
    chromium(path, tmp_path / "profile", f"--print-to-pdf={pdf}", "--no-pdf-header-footer")
    text = subprocess.run(["pdftotext", "-layout", str(pdf), "-"], capture_output=True, text=True, check=True).stdout
    for piece in ("Observation 1", "Observation 4", "continuous ranked probability score", "memory"):
        assert piece in text
    for control in ("Differences to", "all side by side"):
        assert control not in text
