"""The app in headless Chromium, if available: paint, restore, slide, a phone, two visitors, no foreign requests."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import CHROMIUM, Browser, Page
from PIL import Image

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None or importlib.util.find_spec("gradio") is None,
                       reason="needs Chromium and gradio"),
]

READY = "document.querySelector('#restore') && document.querySelector('#editor canvas') && true"
SAID = "(text => text.includes('samples in') && text)((document.querySelector('#said-first') || {}).innerText || '')"
UPLOAD = "input[data-testid='Upload your own-upload-button']"
PICTURES = """Array.from(document.querySelectorAll('.picture img')).filter(image => image.checkVisibility())
  .map(image => [image.src, image.naturalWidth, Math.round(image.getBoundingClientRect().width)])"""


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("cache")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryFile("w+") as errors:
        command = [sys.executable, "-m", "invflow", "app", "--port", str(port)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True,
                                   env={**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(folder)})
        assert process.stdout is not None
        said = process.stdout.readline()
        errors.seek(0)
        assert f"http://127.0.0.1:{port}/" in said, errors.read()
        yield f"http://127.0.0.1:{port}/"
        process.terminate()
        process.wait(20)
        assert not list(folder.glob("invflow-app-*"))  # what users uploaded is gone


def paint(page: Page, share: float) -> None:
    """A horizontal stroke at a share of the canvas's height."""
    page.run("document.querySelector('#editor').scrollIntoView({block: 'center'})")
    x, y, width, height = page.run("(r => [r.x, r.y, r.width, r.height])"
                                   "(document.querySelector('#editor canvas').getBoundingClientRect())")
    along = [x + width * part for part in (0.4, 0.45, 0.5, 0.55, 0.6, 0.6)]
    page.drag([(point, y + share * height) for point in along])


def test_the_app(address: str, tmp_path: Path) -> None:
    browser = Browser(tmp_path / "profile")
    try:
        desk, phone = browser.open(address, 1280, 900), browser.open(address, 390, 844)
        for page in (desk, phone):
            page.wait(READY)
            assert page.overflow() == 0
        assert phone.run("window.innerWidth") == 390
        # what does not fit is a sentence on the page, and the app goes on
        phone.click("#restore")
        phone.wait("document.body.innerText.includes('no hole is painted yet')")
        bad = tmp_path / "bad.png"
        bad.write_bytes(b"no picture")
        desk.upload(UPLOAD, bad)
        desk.wait("document.body.innerText.includes('bad.png')")
        # two at once, each with a hole of their own
        paint(desk, 0.5)
        paint(phone, 0.6)
        for page in (desk, phone):
            page.run("new Promise(done => setTimeout(done, 800))")  # the canvas is sent once the brush rests
            page.click("#restore")
        for page in (desk, phone):
            text = page.wait(SAID)
            assert "vfm: 64 samples" in text
            assert "dB" in text
        seen = {page: page.wait(f"(found => found.length === 6 && found.every(image => image[1] === 252) && found)"
                                f"({PICTURES})") for page in (desk, phone)}
        assert len({width for _, _, width in seen[desk]}) == 1  # one zoom
        assert phone.overflow() == desk.overflow() == 0
        # gradio names files by their content: the truth is the same, the holes are not
        names = {page: [address_of.rpartition("/file=")[2] for address_of, *_ in seen[page]] for page in seen}
        assert names[desk][0] == names[phone][0]
        assert names[desk][1] != names[phone][1]
        # the slider goes through the samples, of one visitor and not of the other
        desk.run("""(slider => { slider.value = 5; slider.dispatchEvent(new Event('input', {bubbles: true})); })
            (document.querySelector('#number input[type=range]'))""")
        before, still = json.dumps(seen[desk][2][0]), json.dumps(seen[desk][3][0])
        desk.wait(f"(found => found[2][0] !== {before} && found[3][0] === {still})({PICTURES})")
        assert phone.run(PICTURES)[2][0] == seen[phone][2][0]
        own = tmp_path / "own.png"
        Image.new("L", (60, 40), 30).save(own)
        phone.upload(UPLOAD, own)
        phone.wait("Array.from(document.querySelectorAll('input')).some(input => input.value === 'your own file')")
        assert phone.overflow() == 0
        outside = [url for url in browser.requests if not url.startswith((address, "data:", "blob:"))]
        assert outside == []
        assert len(browser.requests) > 20
        assert not browser.console
        if os.environ.get("INVFLOW_SCREENSHOT"):
            desk.run("window.scrollTo(0, 0)")
            desk.screenshot(Path(os.environ["INVFLOW_SCREENSHOT"]))
    finally:
        browser.close()
