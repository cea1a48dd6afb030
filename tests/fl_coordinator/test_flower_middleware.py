"""The SuperLink's layers: which are left out for whom, and the lock in front of the Control API."""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import MutableMapping
from dataclasses import dataclass, field
from typing import Any

import pytest

from fl_coordinator.flower_middleware import FLEET, IDLE, RUNTIME, ControlToken, lighten


@dataclass
class Layer:
    """As Starlette keeps middleware until the application starts."""

    cls: Any
    kwargs: dict[str, Any] = field(default_factory=dict)
    args: tuple[Any, ...] = ()

    def __init__(self, cls: Any, *args: Any, **kwargs: Any) -> None:
        self.cls, self.args, self.kwargs = cls, args, kwargs


@dataclass
class Application:
    user_middleware: list[Layer]


def layer(name: str, seen: list[str]) -> Any:
    """A class of middleware of that name, which notes whatever passes it."""

    class Noting:
        def __init__(self, app: Any) -> None:
            self.app = app

        async def __call__(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
            seen.append(name)
            await self.app(scope, receive, send)

    Noting.__name__ = name
    return Noting


async def nothing(*_: Any) -> None:
    pass


def passed(application: Application, path: str, seen: list[str], kind: str = "http") -> list[str]:
    """The layers that a request passes, outermost first."""
    seen.clear()
    app: Any = nothing
    for one in reversed(application.user_middleware):
        app = one.cls(app, *one.args, **one.kwargs)
    asyncio.run(app({"type": kind, "path": path}, nothing, nothing))
    return list(seen)


def test_a_nodes_request_passes_what_authenticates_it_and_nothing_that_is_idle() -> None:
    seen: list[str] = []
    stays = ("ProtobufTranslationMiddleware",)
    application = Application([Layer(layer(name, seen)) for name in (*IDLE, *stays)])
    assert lighten(application) == list(IDLE)
    assert passed(application, f"{FLEET}pull-messages", seen) == ["NodeAuthMiddleware", *stays]
    assert passed(application, f"{RUNTIME}push-messages", seen) == [*stays]
    for path in ("/v1/control/start-run", "/v1/fleetx", "/docs"):
        assert passed(application, path, seen) == [*IDLE, *stays]
    assert passed(application, FLEET, seen, "websocket") == [*IDLE, *stays]


def test_the_pinned_flower_has_every_layer_that_is_left_out() -> None:
    layers = importlib.import_module("flwr.superlink.main")._get_middleware()
    names = {one.cls.__name__ for one in layers}
    assert set(IDLE) <= names
    assert "ProtobufTranslationMiddleware" in names - set(IDLE)


@pytest.mark.parametrize(
    ("path", "header", "status"),
    [
        ("/v1/control/list-runs", b"Bearer right", 0),
        ("/v1/control/list-runs", b"Bearer wrong", 401),
        ("/docs", None, 401),
        (f"{FLEET}pull-messages", None, 0),
    ],
)
def test_the_control_api_wants_its_token(path: str, header: bytes | None, status: int) -> None:
    sent: list[int] = []

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message.get("status", 0))

    headers = [] if header is None else [(b"authorization", header)]
    scope = {"type": "http", "path": path, "headers": headers}
    asyncio.run(ControlToken(nothing, "right")(scope, nothing, send))
    assert sent[:1] == ([status] if status else [])
