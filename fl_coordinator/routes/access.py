"""Who may call what: a token per role, for a few routes this machine alone; and the one table from our errors to HTTP.

Tokens are compared in constant time. The page, its event stream, the metrics and the health check are open on the
loopback interface, since the page cannot hold a token; and there only to whoever asked for this machine by name, so
that a web page whose name was made to point here (DNS rebinding) and a proxy in front of us get nothing.
"""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable, Mapping
from urllib.parse import urlsplit

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from model_delta.errors import AtollError, Malformed, NotFound, StorageFull, Unavailable, Untrusted

STATUS: tuple[tuple[type[AtollError], int], ...] = (
    (NotFound, 404),
    (StorageFull, 507),
    (Unavailable, 503),
    (Untrusted, 403),
    (Malformed, 400),
    (AtollError, 500),
)
"""Our errors as HTTP, the first match counts."""

_LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost", "testclient"})
_FORWARDED = ("forwarded", "via", "x-forwarded-for", "x-forwarded-host", "x-real-ip")

Handler = Callable[[Request], Awaitable[Response]]


class Denied(Exception):
    """No token, or a token of another role. Becomes 401 or 403 here and nowhere else."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class Access:
    """The platform's tokens, and what each opens."""

    def __init__(self, tokens: Mapping[str, str]) -> None:
        """`tokens` maps a role to its bearer token; a role without one is nobody's."""
        self._tokens = {role: token for role, token in tokens.items() if token}

    def guard(self, handler: Handler, *roles: str, loopback: bool = False) -> Handler:
        """`handler` behind the token check and the error table. `admin` may call everything."""

        async def guarded(request: Request) -> Response:
            try:
                self._authorize(request, ("admin", *roles), loopback)
                return await handler(request)
            except Denied as error:
                return JSONResponse({"error": str(error)}, error.status)
            except AtollError as error:
                status = next(code for kind, code in STATUS if isinstance(error, kind))
                return JSONResponse({"error": str(error)}, status)

        return guarded

    def _authorize(self, request: Request, roles: tuple[str, ...], loopback: bool) -> None:
        role = self.role(request)
        if role in roles:
            return
        if loopback and role is None and _from_this_machine(request):
            return
        if role is None:
            raise Denied(401, "expected `Authorization: Bearer TOKEN` with a token of this platform, found none")
        raise Denied(403, f"a token of role {role} may not call {request.method} {request.url.path}")

    def role(self, request: Request) -> str | None:
        """The role whose token the request carries. Every token is compared, so that the time says nothing."""
        given = request.headers.get("authorization", "")
        found = None
        for role, token in self._tokens.items():
            if hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
                found = role
        return found


def _from_this_machine(request: Request) -> bool:
    """Whether a browser or program of this machine asked for it under this machine's own name, with nobody between."""
    if request.client is None or request.client.host not in _LOOPBACK:
        return False
    if any(name in request.headers for name in _FORWARDED):
        return False
    try:
        asked_for = urlsplit(f"//{request.headers.get('host', '')}").hostname
    except ValueError:
        return False
    return asked_for in _LOOPBACK
