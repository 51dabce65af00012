"""A headless Chromium that opens pages, controlled over its debugging pipe: no driver and no port."""

from __future__ import annotations

import fcntl
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

SECONDS = 60.0
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def installed() -> str | None:
    """Return the browser's path; None if it is not installed."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


@dataclass
class Opened:
    """An opened page: its width, faults and requests."""

    faults: list[str] = field(default_factory=list)  # console errors, warnings and exceptions
    requests: list[str] = field(default_factory=list)  # requested addresses except the page's own and data: URLs
    width: int = 0  # width of the document in pixels


class Browser:
    """One browser process, created by `browser()`."""

    def __init__(self, executable: str, folder: str):
        theirs_in, self._to = os.pipe()
        self._from, theirs_out = os.pipe()

        # The browser reads from descriptor 3 and writes to 4. Ours may have these numbers, so duplicate them first.
        def give() -> None:
            ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (theirs_in, theirs_out)]
            os.dup2(ends[0], 3)
            os.dup2(ends[1], 4)

        command = [executable, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        command += ["--no-first-run", f"--user-data-dir={folder}", "--remote-debugging-pipe", "about:blank"]
        quiet = subprocess.DEVNULL
        self.process = subprocess.Popen(
            command, stdin=quiet, stdout=quiet, stderr=quiet, close_fds=False, preexec_fn=give, start_new_session=True
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._buffer, self._number = b"", 0
        self.events: list[dict[str, Any]] = []

    def call(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """Return the response to one command; events before it are kept."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if session is not None:
            message["sessionId"] = session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def wait_for(self, method: str, seconds: float = SECONDS) -> None:
        end = time.monotonic() + seconds
        while not any(event.get("method") == method for event in self.events):
            assert time.monotonic() < end, f"no {method} in {seconds} s"
            self.events.append(self._next())

    def _next(self) -> dict[str, Any]:
        end = time.monotonic() + SECONDS
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._from], [], [], max(end - time.monotonic(), 0.0))
            assert ready, "the browser says nothing"
            data = os.read(self._from, 1 << 20)
            assert data, "the browser has ended"
            self._buffer += data
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def open(self, address: str, width: int, dark: bool = False, first: str = "") -> Opened:
        """Open an address in a window `width` pixels wide, and run the script `first` once it is loaded."""
        self.events.clear()
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        tab = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable", tab)
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 640}
        self.call("Emulation.setDeviceMetricsOverride", tab, **metrics)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", tab, features=[scheme])
        self.call("Page.bringToFront", tab)  # background tabs are rendered late or not at all
        self.call("Page.navigate", tab, url=address)
        self.wait_for("Page.loadEventFired")
        if first:
            self.evaluate(tab, first)
        page = Opened(width=self.evaluate(tab, "document.documentElement.scrollWidth"))
        self.call("Target.closeTarget", targetId=target)
        for event in self.events:
            method, params = event.get("method"), event.get("params", {})
            if method == "Runtime.exceptionThrown":
                page.faults.append(str(params["exceptionDetails"].get("exception", params["exceptionDetails"])))
            elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
                page.faults.append(str(params["args"]))
            elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
                page.faults.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")
            elif method == "Network.requestWillBeSent":
                url = params["request"]["url"]
                if url != address and not url.startswith("data:"):
                    page.requests.append(url)
        return page

    def evaluate(self, tab: str, script: str) -> Any:
        return self.call("Runtime.evaluate", tab, expression=script, returnByValue=True)["result"].get("value")

    def close(self) -> None:
        os.close(self._to)  # the browser ends when its pipe closes
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self._from)


@contextmanager
def browser() -> Iterator[Browser]:
    """Start a browser with an empty profile."""
    executable = installed()
    assert executable is not None, "ask `installed` first"
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        opened = Browser(executable, folder)
        try:
            yield opened
        finally:
            opened.close()
