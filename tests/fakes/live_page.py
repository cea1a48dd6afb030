"""The live page's own routes beside a scripted `/v1/events`, on a real socket.

A test says what the next events carry (`snapshot`), ends the running streams (`drop`), has new ones refused
(`refusing`) or leaves them silent (`silent`).
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import AsyncIterator, Iterator

import msgspec
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from monitoring.dashboard import page_routes
from monitoring.snapshot import Snapshot

EVENT_SECONDS = 0.05


class LivePage:
    """The server. `viewers` counts open streams, `opened` all there were."""

    def __init__(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        self.refusing = self.silent = False
        self.viewers = self.opened = 0
        self.url = ""
        self._generation = 0

    def drop(self) -> None:
        """End every stream, as a coordinator does that dies."""
        self._generation += 1

    @contextlib.contextmanager
    def serving(self) -> Iterator[LivePage]:
        """Serve on a free port in a thread while the block runs."""
        app = Starlette(routes=[Route("/v1/events", self._events), *page_routes()])
        listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{listening.getsockname()[1]}/"
        config = uvicorn.Config(app, log_level="warning", lifespan="off", ws="none", timeout_graceful_shutdown=1)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self.drop()
            server.should_exit = True
            thread.join(30)
            listening.close()

    async def _events(self, request: Request) -> Response:
        if self.refusing:
            return PlainTextResponse("starting", status_code=503)
        return StreamingResponse(self._stream(request, self._generation), media_type="text/event-stream")

    async def _stream(self, request: Request, generation: int) -> AsyncIterator[bytes]:
        self.viewers += 1
        self.opened += 1
        try:
            yield b"retry: 100\n\n"
            while generation == self._generation and not await request.is_disconnected():
                if not self.silent:
                    yield b"data: " + msgspec.json.encode(self.snapshot) + b"\n\n"
                await asyncio.sleep(EVENT_SECONDS)
        finally:
            self.viewers -= 1
