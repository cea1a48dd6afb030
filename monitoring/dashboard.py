"""The live page: static files that read `GET /v1/events`, and nothing else.

No build step and no dependency: the page must open on a machine without a network. A strict content security policy
forbids inline script and every other origin.
"""

from __future__ import annotations

from importlib import resources

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

_TYPES = {
    "index.html": "text/html; charset=utf-8",
    "page.css": "text/css; charset=utf-8",
    **dict.fromkeys(
        ("page.js", "dom.js", "trend.js", "versions.js", "fleet.js", "panels.js"), "text/javascript; charset=utf-8"
    ),
}
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; connect-src 'self'; img-src data:; "
        "style-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def page_routes() -> list[Route]:
    """Routes of the page (`/`) and its files (`/static/...`), to be mounted beside `/v1/events`."""
    return [
        Route("/", _index, methods=["GET"]),
        Route("/static/{name}", _static, methods=["GET"]),
    ]


async def _index(request: Request) -> Response:
    return _file("index.html")


async def _static(request: Request) -> Response:
    return _file(str(request.path_params["name"]))


def _file(name: str) -> Response:
    kind = _TYPES.get(name)
    if kind is None:
        return Response("not found", status_code=404, media_type="text/plain")
    data = resources.files("monitoring").joinpath("static", name).read_bytes()
    return Response(data, media_type=kind, headers=_HEADERS)
