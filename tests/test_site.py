"""Every page of the site in headless Chromium, if available: on a phone and on a desktop, without foreign requests."""

from __future__ import annotations

import contextlib
import functools
import http.server
import importlib.util
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import CHROMIUM, Browser, Page

ROOT = Path(__file__).resolve().parent.parent
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None or importlib.util.find_spec("material") is None,
                       reason="needs Chromium and mkdocs-material"),
]
#: formulas that were left as they were written, in what a reader sees outside code
TEX = re.compile(r"\\\(|\\\[|\$\$|\$[^$\n]*\\[a-z]+[^$\n]*\$|\\(?:frac|mathbb|sigma|nabla|lambda)\b|\w[_^]\{")
READY = "document.readyState === 'complete' && document.querySelector('article') !== null"
SEEN = """(() => { const text = document.querySelector('article').cloneNode(true);
  text.querySelectorAll('pre, code, math, script, style').forEach(part => part.remove());
  return text.textContent; })()"""
BROKEN = "Array.from(document.images).filter(i => i.complete && i.naturalWidth === 0).map(i => i.getAttribute('src'))"


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def copyfile(self, source: Any, outputfile: Any) -> None:
        """Nobody has to wait for a file: the next page may be asked for before this one has all of its own."""
        with contextlib.suppress(ConnectionError):
            super().copyfile(source, outputfile)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, list[str]]]:
    """The address of the built site, and its pages."""
    given = os.environ.get("INVFLOW_SITE")  # a site that is built already
    folder = Path(given) if given else tmp_path_factory.mktemp("site")
    if not given:
        command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
        subprocess.run(command, cwd=ROOT, check=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"})
    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        pages = sorted(path.parent.relative_to(folder).as_posix() for path in folder.rglob("index.html"))
        yield f"http://127.0.0.1:{server.server_port}/", ["" if page == "." else f"{page}/" for page in pages]
        server.shutdown()


def faults(page: Page) -> list[str]:
    """What is wrong with the page that is shown."""
    found = []
    if wide := page.overflow():
        found.append(f"{wide} pixels too wide")
    if raw := TEX.search(page.run(SEEN)):
        found.append(f"raw TeX: {raw[0]}")
    if broken := page.run(BROKEN):
        found.append(f"pictures that are not there: {broken}")
    return found


def test_pages_fit_a_phone_and_a_desk_and_nothing_is_foreign(site: tuple[str, list[str]], tmp_path: Path) -> None:
    address, pages = site
    assert len(pages) > 60
    assert "tutorials/02b_learn_a_flow_map/" in pages
    wrong = []
    browser = Browser(tmp_path / "profile")
    try:
        for width in (390, 1440):
            page = browser.open(address, width, 900)
            for name in pages:
                page.go(address + name)
                page.wait(f"location.href === {address + name!r} && {READY}")
                wrong += [f"{name or 'index'} at {width}: {fault}" for fault in faults(page)]
        outside = [url for url in browser.requests if not url.startswith((address, "data:", "blob:"))]
        assert len(browser.requests) > len(pages)
        assert outside == []
        assert browser.console == []
    finally:
        browser.close()
    assert not wrong, "\n".join(wrong)
