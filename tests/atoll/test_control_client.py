import asyncio
import http.server
import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from atoll.control_client import ControlClient, answered, reach, retry_until
from atoll.settings import ConfigurationError
from model_delta.errors import Malformed, NotFound, StorageFull, Unavailable, Untrusted


class Server:
    """A coordinator that answers what a test tells it to, and remembers what it was asked."""

    def __init__(self) -> None:
        self.status, self.body = 200, b"{}"
        self.seen: list[tuple[str, str, dict[str, str], bytes]] = []
        owner = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def answer(self) -> None:
                size = int(self.headers.get("Content-Length") or 0)
                owner.seen.append((self.command, self.path, dict(self.headers), self.rfile.read(size)))
                self.send_response(owner.status)
                self.send_header("Content-Length", str(len(owner.body)))
                self.end_headers()
                self.wfile.write(owner.body)

            do_GET = do_POST = answer  # noqa: N815

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
                return

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.http.shutdown()
    made.http.server_close()


def test_bodies_and_token_travel(server: Server) -> None:
    server.body = b'{"manifest": "x"}'
    client = ControlClient(server.url + "/", "secret")
    assert client.post("/v1/models", b"\x01", model="fraud & co") == {"manifest": "x"}
    client.post("/v1/rollouts", "spec: {}")
    client.post("/v1/rounds", {"quorum": 3})
    binary, text, record = server.seen
    assert binary[:2] == ("POST", "/v1/models?model=fraud+%26+co")
    assert binary[2]["Authorization"] == "Bearer secret"
    assert binary[3] == b"\x01"
    assert text[3] == b"spec: {}"
    assert json.loads(record[3]) == {"quorum": 3}


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, Malformed),
        (401, ConfigurationError),
        (403, Untrusted),
        (404, NotFound),
        (409, Malformed),
        (503, Unavailable),
    ],
)
def test_a_refusal_is_named_by_what_to_do_about_it(server: Server, status: int, kind: type[Exception]) -> None:
    server.status, server.body = status, json.dumps({"error": "stage 2: expected a share"}).encode()
    with pytest.raises(kind, match="stage 2: expected a share"):
        ControlClient(server.url, "t").get("/v1/state")


def test_nobody_there_is_unavailable_and_retried_until_the_deadline(server: Server) -> None:
    server.http.shutdown()
    server.http.server_close()
    client = ControlClient(server.url, "t")
    calls = 0

    def call() -> Any:
        nonlocal calls
        calls += 1
        return client.get("/v1/health")

    for seconds in (0.5, 5.0, 20.0):  # a machine that stands still for the whole of it allows a single call
        with pytest.raises(Unavailable, match="expected an answer"):
            retry_until(time.monotonic() + seconds, call, pause_s=0.02)
        if calls > 1:
            break
        calls = 0
    assert calls > 1


@pytest.mark.parametrize("error", [NotFound("no such rollout"), StorageFull("no room left for key.pem")])
def test_what_only_a_person_can_put_right_is_not_retried(error: Unavailable) -> None:
    calls = 0

    def call() -> None:
        nonlocal calls
        calls += 1
        raise error

    with pytest.raises(type(error)):
        retry_until(time.monotonic() + 5, call)
    with pytest.raises(type(error), match=f"^{error}$"):
        reach(5, call)
    with pytest.raises(type(error)):
        asyncio.run(answered(call, 5))
    assert calls == 3
