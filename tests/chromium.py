"""A page in headless Chromium, driven over its DevTools pipe (descriptors 3 and 4): no package needed."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

# Without network a browser that looks for updates waits and complains.
_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-dev-shm-usage", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--hide-scrollbars",
    "--host-resolver-rules=MAP * ~NOTFOUND", "--remote-debugging-pipe",
)  # fmt: skip
_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def chromium_path() -> str | None:
    """Return the browser's program, if there is one: $CHROMIUM, else the usual names."""
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, _NAMES)), None)
    return found if os.name == "posix" else None


class Page:
    """One page; what the browser says about it gathers in `events`."""

    def __init__(self, to: int, back: int, limit: float) -> None:
        self._to, self._back, self._limit = to, back, limit
        self._rest, self._number, self._session = b"", 0, ""
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **words: Any) -> dict[str, Any]:
        """Do one command of the DevTools protocol and return its result."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": words}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                assert "error" not in answer, (method, answer["error"])
                return dict(answer["result"])

    def open(self, path: Path, *, width: int, height: int = 800, dark: bool = False) -> None:
        """Show a file in a window of that many pixels, and wait until it has loaded."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.events.clear()
        self.call("Page.navigate", url=path.absolute().as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self._read()

    def value(self, expression: str) -> Any:
        """Return what an expression of JavaScript gives on the page; DevTools are not under its policy."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def complaints(self) -> list[str]:
        """Return what console and log said since the page was opened: errors and warnings."""
        self.value("0")  # events come in order: those before this answer are here
        said = []
        for event in self.events:
            words = event["params"]
            if event["method"] == "Log.entryAdded" and words["entry"]["level"] in ("error", "warning"):
                said.append(words["entry"]["text"])
            elif event["method"] in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled"):
                said.append(json.dumps(words))
        return said

    def requests(self) -> list[str]:
        """Return the addresses that the page asked for, but those that hold their data themselves."""
        asked = [each["params"] for each in self.events if each["method"] == "Network.requestWillBeSent"]
        return [each["request"]["url"] for each in asked if not each["request"]["url"].startswith("data:")]

    def screenshot(self, path: Path, *, whole: bool = False, y: int = 0, height: int = 0) -> None:
        """Write a PNG of the window, of the whole page, or of `height` pixels of it from `y` on."""
        words: dict[str, Any] = {"format": "png"}
        if whole or height:
            width, full = self.value("[innerWidth, document.documentElement.scrollHeight]")
            clip = {"x": 0, "y": y, "width": width, "height": height or full, "scale": 1}
            words |= {"clip": clip, "captureBeyondViewport": True}
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", **words)["data"]))

    def _read(self) -> dict[str, Any]:
        until = time.monotonic() + self._limit
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._back], [], [], max(0.0, until - time.monotonic()))
            part = os.read(self._back, 1 << 20) if ready else b""
            if not part:
                raise RuntimeError("chromium gave no answer" if not ready else "chromium ended")
            self._rest += part
        message, self._rest = self._rest.split(b"\0", 1)
        found: dict[str, Any] = json.loads(message)
        if "method" in found:
            self.events.append(found)
        return found


def _pipe() -> tuple[int, int]:
    """Return a pipe whose descriptors are neither 3 nor 4, so that moving one there overwrites no other."""
    import fcntl  # not on Windows, where no test comes this far

    ends = os.pipe()
    high = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in ends]
    for end in ends:
        os.close(end)
    return high[0], high[1]


@contextmanager
def chromium(folder: Path, limit: float = 60.0) -> Iterator[Page]:
    """Give a page of a browser of its own.

    Args:
        folder: for the browser's own files; emptied beforehand.
        limit: seconds that one answer may take.
    """
    program = chromium_path()
    assert program is not None
    down, to = _pipe()
    back, up = _pipe()
    # The browser's numbers are fixed; bash, unlike sh, can move descriptors of two digits there.
    process = subprocess.Popen(
        ["bash", "-c", f'exec "$0" "$@" 3<&{down} 4>&{up}', program, *_FLAGS, f"--user-data-dir={folder}"],
        pass_fds=(down, up),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(down)
    os.close(up)
    try:
        page = Page(to, back, limit)
        yield page
        with suppress(OSError, RuntimeError, AssertionError):
            page._session = ""
            page.call("Browser.close")
    finally:
        os.close(to)
        os.close(back)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
