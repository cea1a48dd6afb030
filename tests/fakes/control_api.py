"""A coordinator's control API as a command meets it: over real HTTP on a loopback port, answering as a test chooses."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Protocol

from atoll.settings import Broker, DataFolder, Endpoints


class Answers(Protocol):
    """What a test's coordinator says. It is asked by several threads."""

    url: str

    def answer(self, method: str, path: str, body: bytes) -> Any:
        """The response: bytes as they are, anything else as JSON."""


@contextmanager
def answering(coordinator: Answers, data: Path | None = None) -> Iterator[None]:
    """Serve `coordinator`, whose `url` is set, until the block ends; `data` becomes a data folder that leads to it."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            sent = self.rfile.read(int(self.headers["Content-Length"] or 0))
            said = coordinator.answer(self.command, self.path, sent)
            content = said if isinstance(said, bytes) else json.dumps(said).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_POST = do_PUT = do_GET  # noqa: N815 (the names that the library looks for)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    coordinator.url = f"http://127.0.0.1:{server.server_address[1]}"
    if data is not None:
        places = Endpoints(coordinator=coordinator.url, broker=Broker("127.0.0.1", 1, "embedded"), gateways={})
        DataFolder.open(data, create=True).write_endpoints(places)
    serving = threading.Thread(target=server.serve_forever, args=(0.02,))
    serving.start()
    try:
        yield
    finally:
        server.shutdown()
        serving.join()
        server.server_close()
