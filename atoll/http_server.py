"""One HTTP server for every process that answers HTTP (the only importer of uvicorn)."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
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
async def serving(
    app: Any, port: int, what: str, *, host: str = LOOPBACK, certificate: Path | None = None, key: Path | None = None
) -> AsyncIterator[None]:
    """Serve the ASGI `app` while the block runs, then finish what is in flight.

    Raises ConfigurationError when the port is taken, or when `host` is not a loopback address and no `certificate` is
    given: bearer tokens do not cross a network in clear.
    """
    if not host.startswith("127.") and host not in ("localhost", "::1") and certificate is None:
        raise ConfigurationError(
            f"{what}: expected a loopback address or a TLS certificate, found host {host!r} without one; "
            "pass --tls-cert and --tls-key"
        )
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        log_level="warning",
        access_log=False,
        lifespan="off",
        proxy_headers=False,  # who asks is whoever holds the socket; a header could claim loopback
        server_header=False,
        timeout_graceful_shutdown=DRAIN_DEADLINE_S,
        ssl_certfile=str(certificate) if certificate else None,
        ssl_keyfile=str(key) if key else None,
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
