"""One HTTP server for every process that answers HTTP (the only importer of uvicorn)."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from typing import Any

import uvicorn

from atoll.settings import LOOPBACK, ConfigurationError

START_DEADLINE_S = 20.0
DRAIN_DEADLINE_S = 5


class _Server(uvicorn.Server):
    """uvicorn without its own signal handling: the process that runs it decides when it stops."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@contextlib.asynccontextmanager
async def serving(app: Any, port: int, what: str) -> AsyncIterator[None]:
    """Serve the ASGI `app` on the loopback address while the block runs, then finish what is in flight.

    Nothing else is listened on: bearer tokens do not cross a network in clear. Raises ConfigurationError when the port
    is taken.
    """
    config = uvicorn.Config(
        app,
        host=LOOPBACK,
        port=port,
        log_level="warning",
        access_log=False,
        lifespan="off",
        proxy_headers=False,  # who asks is whoever holds the socket; a header could claim loopback
        server_header=False,
        timeout_graceful_shutdown=DRAIN_DEADLINE_S,
    )
    server = _Server(config)
    task = asyncio.create_task(_serve(server, port, what), name=f"http {what}")
    try:
        async with asyncio.timeout(START_DEADLINE_S):
            while not server.started:
                if task.done():
                    task.result()
                await asyncio.sleep(0.02)
        yield
    finally:
        server.should_exit = True
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def _serve(server: _Server, port: int, what: str) -> None:
    try:
        await server.serve()
    except SystemExit:  # uvicorn's answer to a port that cannot be bound
        raise ConfigurationError(
            f"port {port} ({what}): expected it free, found it taken; stop what listens there or choose another port"
        ) from None
