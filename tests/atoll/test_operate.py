"""The operator's commands, against a coordinator that says what the real one says (see `fl_coordinator.control`)."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from atoll.operate import revoke_identity
from atoll.rounds import run_round
from atoll.settings import Broker, DataFolder, Endpoints

OPENED = {"round_id": "fraud-1", "state": "ANNOUNCED", "chosen": [], "rejected": {}, "candidate": "", "reason": ""}


class Coordinator:
    """Answers an opened round with its short view, and a question about it with the next of `views`."""

    def __init__(self) -> None:
        self.views: list[dict[str, Any]] = []
        self.posted: list[str] = []
        owner = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                owner.posted.append(self.path)
                self.rfile.read(int(self.headers["Content-Length"]))
                self.answer(OPENED)

            def do_GET(self) -> None:
                self.answer({} if self.path == "/v1/health" else owner.views.pop(0))

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


@pytest.fixture
def coordinator(tmp_path: Path) -> Iterator[Coordinator]:
    made = Coordinator()
    serving = threading.Thread(target=made.http.serve_forever, args=(0.02,))
    serving.start()
    data = DataFolder.open(tmp_path / "data", create=True)
    data.write_endpoints(Endpoints(coordinator=made.url, broker=Broker("127.0.0.1", 1, "embedded"), gateways={}))
    yield made
    made.http.shutdown()
    serving.join()
    made.http.server_close()


def run(tmp_path: Path, *, wait: bool) -> None:
    run_round(tmp_path / "data", None, {"quorum": 8, "hostile": 0}, wait=wait, contact_s=2.0, as_json=False)


def view(state: str, admitted: int, **more: Any) -> dict[str, Any]:
    return {**OPENED, "state": state, "admitted": [f"pos-{n:04}" for n in range(admitted)], "refused": {}, **more}


def test_a_round_that_nobody_waits_for_is_shown_as_it_begins(
    tmp_path: Path, coordinator: Coordinator, capsys: pytest.CaptureFixture[str]
) -> None:
    coordinator.views = [view("ANNOUNCED", 0)]
    run(tmp_path, wait=False)
    out, err = capsys.readouterr()
    assert out == "round fraud-1: announced, 0 contributions\n"
    assert err == ""


def test_a_round_that_fails_is_followed_to_its_end_and_fails_the_command(
    tmp_path: Path, coordinator: Coordinator, capsys: pytest.CaptureFixture[str]
) -> None:
    coordinator.views = [view("COLLECTING", 3), view("FAILED", 3, reason="quorum: expected 8, found 3")]
    with pytest.raises(typer.Exit) as ended:
        run(tmp_path, wait=True)
    assert ended.value.exit_code == 1
    out, err = capsys.readouterr()
    assert "reason: quorum: expected 8, found 3" in out
    assert err.splitlines() == ["round fraud-1: collecting, 3 contributions", "round fraud-1: failed, 3 contributions"]


def test_a_name_cannot_lead_to_another_route(
    coordinator: Coordinator, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    revoke_identity(tmp_path / "data", "pos-1/../x?y", contact_s=5.0, as_json=False)
    assert coordinator.posted == ["/v1/identities/pos-1%2F..%2Fx%3Fy/revoke"]
    assert "its certificate was revoked" in capsys.readouterr().out
