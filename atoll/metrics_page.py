"""`GET /metrics` for processes that answer no other HTTP."""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from monitoring.metrics import CONTENT_TYPE, Metrics


def metrics_route(metrics: Metrics) -> Route:
    """The route `/metrics`, in the Prometheus text format."""

    async def render(request: Request) -> Response:
        return Response(metrics.render(), headers={"Content-Type": CONTENT_TYPE})

    return Route("/metrics", render, methods=["GET"])


def metrics_app(metrics: Metrics) -> Starlette:
    """An application that answers `/metrics` and nothing else."""
    return Starlette(routes=[metrics_route(metrics)])
