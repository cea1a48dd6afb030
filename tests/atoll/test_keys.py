"""`atoll keys rotate` against a coordinator that takes its time, on a terminal and off it."""

from __future__ import annotations

import http.server
import io
import json
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from atoll.control_client import ControlClient
from atoll.keys import keys_status, rewrapping_shown, rotate_keys
from atoll.settings import Broker, DataFolder, Endpoints

DONE = {"floor": 1, "latest": 2}


class Coordinator:
    """Answers a rotation after it was asked `questions` times how far it is, 2,000 records further each time."""

    def __init__(self, questions: int = 0) -> None:
        self.questions = questions
        self.asked = 0
        enough = threading.Event()
        owner = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                assert not owner.questions or enough.wait(10)
                self.answer(DONE)

            def do_GET(self) -> None:
                if self.path == "/v1/health":
                    return self.answer({})
                self.answer({**DONE, "rewrapped": 2_000 * owner.asked, "to_rewrap": 6_000})
                owner.asked += 1
                if owner.asked == owner.questions:
                    enough.set()
                return None

            def answer(self, body: dict[str, Any]) -> None:
                data = json.dumps(body).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
                return

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def coordinator() -> Iterator[Coordinator]:
    made = Coordinator()
    serving = threading.Thread(target=made.http.serve_forever, args=(0.02,))
    serving.start()
    yield made
    made.http.shutdown()
    serving.join()
    made.http.server_close()


@pytest.fixture
def data(tmp_path: Path, coordinator: Coordinator) -> Path:
    folder = DataFolder.open(tmp_path / "data", create=True)
    folder.write_endpoints(
        Endpoints(coordinator=coordinator.url, broker=Broker("127.0.0.1", 1, "embedded"), gateways={})
    )
    return tmp_path / "data"


def test_a_terminal_is_shown_how_far_the_rotation_is(coordinator: Coordinator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    client = ControlClient(coordinator.url, "t" * 32)
    coordinator.questions = 3
    with rewrapping_shown(client, as_json=False, every_s=0.01):
        assert client.post("/v1/keys/rotate", {}) == DONE
    assert terminal.getvalue().startswith("\rrewrapped 0 of 6000\rrewrapped 2000 of 6000\rrewrapped 4000 of 6000")
    assert terminal.getvalue().endswith("\n")


def test_ctrl_c_ends_the_waiting_and_says_that_the_rotation_goes_on(
    coordinator: Coordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    client = ControlClient(coordinator.url, "t" * 32)
    with pytest.raises(KeyboardInterrupt), rewrapping_shown(client, as_json=False, every_s=0.01):
        raise KeyboardInterrupt
    assert "the coordinator ends what it began; atoll keys status" in terminal.getvalue()
    asked = coordinator.asked
    assert client.get("/v1/health") == {}
    assert coordinator.asked == asked, "nobody asks any more"


def test_neither_a_script_nor_a_log_is_drawn_on(
    coordinator: Coordinator, data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rotate_keys(data, forget=False, contact_s=1.0, as_json=False)
    assert capsys.readouterr() == ("wrapping key: version 2, records open from version 1\n", "")
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    rotate_keys(data, forget=True, contact_s=1.0, as_json=True)
    assert json.loads(capsys.readouterr().out) == DONE
    assert (terminal.getvalue(), coordinator.asked) == ("", 0)


def test_somebody_else_may_ask_how_far_it_is(
    coordinator: Coordinator, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys_status(data, contact_s=1.0, as_json=False)
    assert "; being rotated, rewrapped 0 of 6000" in capsys.readouterr().out
