"""Calls of a coordinator's control API, each in a role, without a socket."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import httpx

from fl_coordinator.control import control_app
from tests.fl_coordinator.platform_in_memory import Platform

TOKENS = {"admin": "a" * 32, "gateway": "g" * 32, "aggregator": "r" * 32, "flower": "f" * 32, "join": "j" * 32}
Call = Callable[..., Coroutine[Any, Any, httpx.Response]]


def calls(platform: Platform, *, client: str = "127.0.0.1") -> Call:
    """What calls the API of a running coordinator, by default as an administrator."""
    app = control_app(platform.coordinator, tokens=TOKENS, flower=platform.bridge)
    transport = httpx.ASGITransport(app, client=(client, 1))

    async def call(method: str, path: str, role: str | None = "admin", **options: Any) -> httpx.Response:
        headers = {b"Authorization": f"Bearer {TOKENS.get(role, role)}".encode("latin-1")} if role is not None else {}
        headers |= options.pop("headers", {})
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost:8080") as http:
            return await http.request(method, path, headers=headers, **options)

    return call


@contextlib.asynccontextmanager
async def calling(platform: Platform, *, client: str = "127.0.0.1") -> AsyncIterator[Call]:
    """A coordinator at work, and what calls its API from the address `client`."""
    async with platform.running():
        yield calls(platform, client=client)
