"""A TUF mirror over real HTTP on a loopback port, before a `Site`; single answers can be bent by a test."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

from model_delta.errors import NotFound
from tests.fakes.tuf_site import Mirror


class HttpMirror:
    """`url` + "metadata/" and "targets/" are a mirror's. `bent` maps a path to what to do with the raw socket."""

    def __init__(self, mirror: Mirror, url: str) -> None:
        self.mirror, self.url = mirror, url
        self.asked: list[str] = []
        self.bent: dict[str, Callable[[socket.socket], None]] = {}


@contextmanager
def served(mirror: Mirror) -> Iterator[HttpMirror]:
    """The mirror on a port of its own until the block ends."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            site.asked.append(self.path)
            if self.path in site.bent:
                site.bent[self.path](self.connection)
                self.close_connection = True
                return
            name = unquote(self.path).lstrip("/").partition("/")[2]
            try:
                data = b"".join(mirror.open(name if "/targets/" in self.path else self.path.rpartition("/")[2], 10.0))
            except NotFound:
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    site = HttpMirror(mirror, f"http://127.0.0.1:{server.server_address[1]}/")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield site
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
