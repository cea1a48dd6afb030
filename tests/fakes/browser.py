"""A real Chromium, driven through its DevTools protocol over one WebSocket.

Only what a page's test needs: open an address at a size and colour scheme, run an expression, wait for one, press a
key, take a picture; and what went wrong on the way (console errors, uncaught exceptions, refused loads, addresses
asked for). Protocol: https://chromedevtools.github.io/devtools-protocol/.
"""

from __future__ import annotations

import base64
import contextlib
import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from websockets.sync.client import ClientConnection, connect

from tests.fakes.real_servers import absent

DEADLINE_S = 60.0
_CONTRAST = Path(__file__).with_name("contrast.js")
_NAMES = ("chromium", "chromium-browser", "google-chrome")
_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
    "--remote-debugging-port=0",
)  # fmt: skip


class Page:
    """One tab. `problems` are console errors, exceptions and browser messages (a policy violation is one); `requests`
    are the addresses asked for."""

    def __init__(self, socket: ClientConnection, session: str) -> None:
        self.problems: list[str] = []
        self.requests: list[str] = []
        self._socket, self._session, self._last = socket, session, 0
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One protocol command's result; events that arrive meanwhile are kept. Raises AssertionError."""
        self._last += 1
        asked = {"id": self._last, "method": method, "params": parameters, "sessionId": self._session}
        self._socket.send(json.dumps(asked))
        while True:
            found = json.loads(self._socket.recv(timeout=DEADLINE_S))
            if found.get("id") == self._last:
                assert "error" not in found, f"{method}: {found['error']}"
                result: dict[str, Any] = found["result"]
                return result
            self._heard(found.get("method", ""), found.get("params", {}))

    def show(self, url: str, *, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        """Load an address in a window of this size (CSS pixels) and colour scheme."""
        self.resize(width, height)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=url)
        self.wait(f"location.href === {json.dumps(url)} && document.readyState === 'complete'")

    def resize(self, width: int, height: int) -> None:
        """Give the window another size in CSS pixels."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def run(self, expression: str) -> Any:
        """The value of a JavaScript expression, as JSON carries it. Raises AssertionError when it throws."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, f"{expression}: {found['exceptionDetails']}"
        return found["result"].get("value")

    def wait(self, expression: str, seconds: float = DEADLINE_S) -> Any:
        """The expression's first true value. Raises AssertionError with what the page said after `seconds`."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            found = self.run(expression)
            if found:
                return found
            time.sleep(0.05)
        raise AssertionError(f"not true within {seconds:.0f} s: {expression}; problems: {self.problems}")

    def text(self, selector: str) -> str:
        """What a reader sees in the first element that matches."""
        return str(self.run(f"document.querySelector({json.dumps(selector)}).innerText"))

    def overflowing(self) -> list[str]:
        """Elements that stick out of the window on the right, apart from those in a box that scrolls."""
        found: list[str] = self.run(
            """[...document.querySelectorAll('body *')].filter((one) => !one.closest('.scroll, .skip, [hidden]')
            && one.getBoundingClientRect().right > innerWidth + 1).map((one) => one.outerHTML.slice(0, 80))"""
        )
        return found

    def low_contrast(self) -> list[str]:
        """Visible texts whose colour is too close to what is behind them (WCAG 2.2, 1.4.3, level AA)."""
        found: list[str] = self.run(_CONTRAST.read_text())
        return found

    def press(self, key: str) -> None:
        """One key, down and up: `Tab`, `Enter`, `ArrowRight`."""
        text = {"Enter": "\r", " ": " "}.get(key, "")
        code = {"Tab": 9, "Enter": 13, " ": 32, "ArrowRight": 39, "ArrowDown": 40, "Escape": 27}[key]
        pressed = {"key": key, "code": "Space" if key == " " else key, "windowsVirtualKeyCode": code}
        self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **pressed)
        self.call("Input.dispatchKeyEvent", type="keyUp", **pressed)

    def picture(self, path: Path) -> None:
        """The whole page as a PNG file."""
        found = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(found["data"]))

    def _heard(self, method: str, said: dict[str, Any]) -> None:
        if method == "Network.requestWillBeSent":
            self.requests.append(said["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.problems.append(str(said["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled" and said["type"] in ("error", "warning", "assert"):
            self.problems.append(str([part.get("value", part.get("description")) for part in said["args"]]))
        elif method == "Log.entryAdded" and said["entry"]["level"] in ("error", "warning"):
            self.problems.append(f"{said['entry']['source']}: {said['entry']['text']}")


class Browser:
    """A running Chromium."""

    def __init__(self, address: str) -> None:
        self._address = address

    @contextlib.contextmanager
    def page(self) -> Iterator[Page]:
        """A new tab with nothing in it, closed afterwards."""
        with connect(self._address, max_size=None, proxy=None, open_timeout=DEADLINE_S, ping_interval=None) as socket:
            target = _ask(socket, 1, "Target.createTarget", url="about:blank")["targetId"]
            session = _ask(socket, 2, "Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
            page = Page(socket, session)
            yield page
            page.call("Page.close")


def _ask(socket: ClientConnection, number: int, method: str, **parameters: Any) -> dict[str, Any]:
    socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
    while True:
        found = json.loads(socket.recv(timeout=DEADLINE_S))
        if found.get("id") == number:
            result: dict[str, Any] = found["result"]
            return result


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    """A browser with an empty profile. Skips the test where there is none, unless ATOLL_REQUIRE_SERVERS=1."""
    program = next(filter(None, map(shutil.which, _NAMES)), None)
    if program is None:
        absent("Chromium on the PATH")
    with tempfile.TemporaryDirectory(prefix="atoll-browser-", ignore_cleanup_errors=True) as profile:
        argv = [program, *_FLAGS, f"--user-data-dir={profile}", "about:blank"]
        process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            yield Browser(_address(Path(profile) / "DevToolsActivePort", process))
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(60)


def _address(told: Path, process: subprocess.Popen[bytes]) -> str:
    """Where the browser listens: it writes port and path into its profile once it does."""
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline and process.poll() is None:
        lines = told.read_text().split() if told.exists() else []
        if len(lines) == 2:
            return f"ws://127.0.0.1:{lines[0]}{lines[1]}"
        time.sleep(0.05)
    raise AssertionError(f"chromium: expected it to listen within {DEADLINE_S:.0f} s; exit code {process.poll()}")
