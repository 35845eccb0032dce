"""Headless Chromium over a pipe, by its DevTools protocol: needs no driver and no web socket."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))),
                None)


class Browser:
    """Chromium that resolves no name: what it asks for beyond this machine fails, and is noted."""

    def __init__(self, profile: Path) -> None:
        theirs, self._out = os.pipe()
        self._in, answers = os.pipe()
        command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
                   "--disable-background-networking", "--disable-component-update", "--disable-sync",
                   "--enable-unsafe-swiftshader", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
                   f"--user-data-dir={profile}", "--remote-debugging-pipe"]
        self._process = subprocess.Popen(["bash", "-c", f'exec "$@" 3<&{theirs} 4>&{answers}', "bash", *command],
                                         pass_fds=(theirs, answers), stderr=subprocess.DEVNULL)
        os.close(theirs)
        os.close(answers)
        self._number, self._rest = 0, b""
        self.requests: list[str] = []
        self.console: list[str] = []

    def call(self, method: str, session: str | None = None, timeout: float = 120, **parameters: Any) -> dict[str, Any]:
        """Ask, and wait for the answer; what happens meanwhile is noted."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if session is not None:
            message["sessionId"] = session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            for found in self._read(end - time.monotonic()):
                if found.get("method") == "Network.requestWillBeSent":
                    self.requests.append(found["params"]["request"]["url"])
                if found.get("method") == "Runtime.exceptionThrown":
                    self.console.append(str(found["params"]["exceptionDetails"]))
                if found.get("id") == self._number:
                    assert "error" not in found, found["error"]
                    result: dict[str, Any] = found["result"]
                    return result
        raise TimeoutError(method)

    def _read(self, timeout: float) -> list[dict[str, Any]]:
        if not select.select([self._in], [], [], max(0.0, timeout))[0]:
            return []
        *whole, self._rest = (self._rest + os.read(self._in, 2**20)).split(b"\0")
        return [json.loads(text) for text in whole]

    def open(self, address: str, width: int, height: int) -> Page:
        """A page of a size, in a context of its own: another visitor."""
        context = self.call("Target.createBrowserContext")["browserContextId"]
        target = self.call("Target.createTarget", url="about:blank", browserContextId=context)["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = Page(self, session)
        for domain in ("Page", "Network", "Runtime"):
            self.call(f"{domain}.enable", session)
        self.call("Emulation.setDeviceMetricsOverride", session, width=width, height=height, deviceScaleFactor=1,
                  mobile=False)
        self.call("Page.navigate", session, url=address)
        return page

    def close(self) -> None:
        with contextlib.suppress(TimeoutError, OSError):
            self.call("Browser.close", timeout=10)
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._in)
        os.close(self._out)


class Page:
    """One page."""

    def __init__(self, browser: Browser, session: str) -> None:
        self._browser, self._session = browser, session

    def go(self, address: str) -> None:
        """Show another address in the same page."""
        self._browser.call("Page.navigate", self._session, url=address)

    def run(self, script: str) -> Any:
        """The value of an expression in the page."""
        found = self._browser.call("Runtime.evaluate", self._session, expression=script, returnByValue=True,
                                   awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait(self, script: str, timeout: float = 90) -> Any:
        """Wait until an expression is true, and return it."""
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            value = self.run(script)
            if value:
                return value
            time.sleep(0.3)
        raise TimeoutError(f"never true: {script}\n{self.run('document.body.innerText')[-1500:]}\n"
                           f"{self._browser.console[-3:]}")

    def drag(self, points: list[tuple[float, float]]) -> None:
        """Press the mouse at the first point, move along the others, let go."""
        kinds = ["mousePressed", *["mouseMoved"] * (len(points) - 2), "mouseReleased"]
        for kind, (x, y) in zip(kinds, points, strict=True):
            self._browser.call("Input.dispatchMouseEvent", self._session, type=kind, x=x, y=y, button="left",
                               buttons=1, clickCount=1)

    def click(self, selector: str) -> None:
        self.run(f"document.querySelector({selector!r}).click()")

    def upload(self, selector: str, path: Path) -> None:
        """Give a file to a file input."""
        script = f"document.querySelector({selector!r})"
        found = self._browser.call("Runtime.evaluate", self._session, expression=script)["result"]
        self._browser.call("DOM.setFileInputFiles", self._session, files=[str(path)], objectId=found["objectId"])

    def overflow(self) -> int:
        """Pixels by which the page is wider than its window."""
        value: int = self.run("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        return value

    def screenshot(self, path: Path) -> None:
        data = self._browser.call("Page.captureScreenshot", self._session, format="png")["data"]
        path.write_bytes(base64.b64decode(data))


