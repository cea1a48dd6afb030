"""What stands between the SuperLink's port and its handlers: one lock that Flower lacks, and fewer layers.

The lock: the Control API of an open-source SuperLink answers anybody who reaches the port; here it wants a token.

The layers: each request passes nine of Starlette's `BaseHTTPMiddleware`, one inside the other, at 0.5 to 1 ms of
processor time each, and a round is about a hundred requests. All but three of them do nothing to a node's request but
hand it on: they are about the Control API, or for event logs and traces that nobody switched on. `Shortcut` leaves
those out where they have nothing to do; what authenticates and translates a request stays. Names that the installed
Flower does not have are not left out.
"""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

FLEET, RUNTIME = "/v1/fleet/", "/v1/runtime/"
IDLE: Mapping[str, tuple[str, ...]] = {
    "ControlSensitiveResponseMiddleware": (FLEET, RUNTIME),
    "ControlAuthenticationMiddleware": (FLEET, RUNTIME),
    "ControlLicenseMiddleware": (FLEET, RUNTIME),
    "ControlEventLogMiddleware": (FLEET, RUNTIME),
    "RuntimeTracingMiddleware": (FLEET, RUNTIME),
    "FleetEventLogMiddleware": (FLEET, RUNTIME),
    "NodeAuthMiddleware": (RUNTIME,),
}
"""Flower's middleware, by name, and where it only hands a request on. Event logs are off without FLWR_ENABLE_EVENT_LOG,
traces without FLWR_TRACING_ENABLED, and no variable of that kind reaches the SuperLink (`superlink_environment`)."""

App = Callable[[MutableMapping[str, Any], Any, Any], Awaitable[None]]


class ControlToken:
    """ASGI middleware: no request passes without the token, but those that Flower authenticates by itself."""

    def __init__(self, app: App, token: str) -> None:
        self._app = app
        self._expected = f"Bearer {token}".encode("ascii")

    async def __call__(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan" or self._passes(scope):
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await send({"type": "http.response.start", "status": 401, "headers": []})
            await send({"type": "http.response.body", "body": b""})

    def _passes(self, scope: MutableMapping[str, Any]) -> bool:
        if scope["type"] != "http":
            return False
        if scope["path"].startswith((FLEET, RUNTIME)):
            return True
        return any(
            name == b"authorization" and hmac.compare_digest(value, self._expected) for name, value in scope["headers"]
        )


class Shortcut:
    """ASGI middleware: the middleware `made(app)`, left out for paths that begin with one of `idle`."""

    def __init__(self, app: App, made: Callable[[App], App], idle: tuple[str, ...]) -> None:
        self._app, self._made, self._idle = app, made(app), idle

    async def __call__(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        skipped = scope["type"] == "http" and scope["path"].startswith(self._idle)
        await (self._app if skipped else self._made)(scope, receive, send)


def lighten(app: Any) -> list[str]:
    """Put a shortcut around each of the application's layers that `IDLE` names, before it starts; their names."""
    found = []
    for place, layer in enumerate(app.user_middleware):
        name = getattr(layer.cls, "__name__", "")
        if name in IDLE and not layer.args and not layer.kwargs:
            app.user_middleware[place] = type(layer)(Shortcut, made=layer.cls, idle=IDLE[name])
            found.append(name)
    return found
