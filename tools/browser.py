"""A headless Chromium driven over a pipe: the DevTools protocol without any library.

Chromium reads commands from its descriptor 3 and answers on its descriptor 4, JSON with a zero byte
after each message. No port is opened and no driver is needed.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-3d-apis",  # without a GPU some canvases of many stay empty; pages then draw with SVG
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-extensions",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)


class BrowserError(RuntimeError):
    """The browser did not start, answered with an error, or not in time."""


def find_browser() -> str | None:
    """Path of an installed Chromium or Chrome, or None."""
    return next((path for path in map(shutil.which, _NAMES) if path), None)


class Browser:
    """One page of a headless browser, to be used in a ``with`` statement.

    Args:
        width, height: size of the page in pixels.
        seconds: how long an answer may take.

    Raises:
        BrowserError: no browser, or no answer.
    """

    def __init__(self, width: int = 1440, height: int = 900, seconds: float = 60) -> None:
        program = find_browser()
        if program is None:
            raise BrowserError(f"none of {', '.join(_NAMES)} is installed")
        self._seconds = seconds
        self._number = 0
        self._rest = b""
        self._profile = tempfile.mkdtemp(prefix="browser-")
        from_us, to_us = os.pipe(), os.pipe()
        # Away from the descriptors 3 and 4, which they are to become in the browser.
        reads = fcntl.fcntl(from_us[0], fcntl.F_DUPFD_CLOEXEC, 10)
        writes = fcntl.fcntl(to_us[1], fcntl.F_DUPFD_CLOEXEC, 10)
        self._out, self._in = from_us[1], to_us[0]

        def pipes() -> None:
            os.dup2(reads, 3)
            os.dup2(writes, 4)

        size, profile = f"--window-size={width},{height}", f"--user-data-dir={self._profile}"
        self._process = subprocess.Popen(
            [program, *_FLAGS, size, profile, "about:blank"],
            preexec_fn=pipes,
            close_fds=False,  # would close 3 and 4 again; all others close by themselves
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        for descriptor in (reads, writes, from_us[0], to_us[1]):
            os.close(descriptor)
        try:
            self._session = None
            target = self._send("Target.createTarget", url="about:blank")["targetId"]
            attached = self._send("Target.attachToTarget", targetId=target, flatten=True)
            self._session = attached["sessionId"]
            self._send(
                "Emulation.setDeviceMetricsOverride",
                width=width,
                height=height,
                deviceScaleFactor=1,
                mobile=False,
            )
        except BaseException:
            self.close()
            raise

    def open(self, url: str) -> None:
        """Go to a page; what it loads may still be on its way."""
        answer = self._send("Page.navigate", url=url)
        if "errorText" in answer:
            raise BrowserError(f"{url}: {answer['errorText']}")

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        answer = self._send("Runtime.evaluate", expression=expression, returnByValue=True)
        if "exceptionDetails" in answer:
            details = answer["exceptionDetails"].get("exception", {})
            raise BrowserError(details.get("description") or answer["exceptionDetails"]["text"])
        return answer["result"].get("value")

    def wait_for(self, expression: str, seconds: float = 60) -> Any:
        """The value of an expression as soon as it is true.

        Raises:
            BrowserError: it was not true in time.
        """
        deadline = time.monotonic() + seconds
        while True:
            value = self.evaluate(expression)
            if value:
                return value
            if time.monotonic() > deadline:
                raise BrowserError(f"not true within {seconds:g} seconds: {expression[:200]}")
            time.sleep(0.2)

    def text(self) -> str:
        """All text of the page, that inside of components (shadow DOM) included."""
        return self.evaluate(
            """(() => {
                const walk = (node) => {
                    if (node.nodeType === Node.TEXT_NODE) return node.textContent + " ";
                    if (["SCRIPT", "STYLE"].includes(node.nodeName)) return "";
                    let text = node.shadowRoot ? walk(node.shadowRoot) : "";
                    for (const child of node.childNodes) text += walk(child);
                    return text;
                };
                return (document.body ? walk(document.body) : "").replace(/\\s+/g, " ");
            })()"""
        )

    def screenshot(self, path: str | Path) -> None:
        """Save what the page shows as a PNG."""
        picture = self._send("Page.captureScreenshot", format="png")["data"]
        Path(path).write_bytes(base64.b64decode(picture))

    def close(self) -> None:
        """End the browser and remove its profile."""
        for descriptor in (self._out, self._in):
            with contextlib.suppress(OSError):
                os.close(descriptor)
        try:
            self._process.wait(5)  # it ends by itself when its pipe is closed
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        shutil.rmtree(self._profile, ignore_errors=True)

    def __enter__(self) -> Browser:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command and wait for its answer; events that come in between are left out."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        try:
            os.write(self._out, json.dumps(message).encode() + b"\0")
        except OSError as error:
            raise BrowserError(f"the browser is gone ({error.strerror})") from error
        deadline = time.monotonic() + self._seconds
        while True:
            answer = json.loads(self._receive(deadline))
            if answer.get("id") == self._number:
                break
        if "error" in answer:
            raise BrowserError(f"{method}: {answer['error']['message']}")
        return answer["result"]

    def _receive(self, deadline: float) -> bytes:
        """The next message."""
        while b"\0" not in self._rest:
            wait = max(0.0, deadline - time.monotonic())
            if not select.select([self._in], [], [], wait)[0]:
                raise BrowserError(f"no answer within {self._seconds:g} seconds")
            data = os.read(self._in, 1 << 20)
            if not data:
                raise BrowserError("the browser ended")
            self._rest += data
        message, self._rest = self._rest.split(b"\0", 1)
        return message
