"""What a request to the control API carries, read within bounds and checked before anybody uses it."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from model_delta.errors import Malformed

BODY_BYTES_MAX = 256 * 2**10
REPLY_BYTES_MAX = 64 * 2**20


async def body_of(request: Request, most: int) -> bytes:
    """The body, read no further than `most` bytes. Raises Malformed."""
    refused = Malformed(f"body of {request.method} {request.url.path}: expected at most {most} bytes, found more")
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > most:
        raise refused
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > most:
            raise refused
    return bytes(data)


async def object_of(request: Request) -> dict[str, Any]:
    """The body as a JSON object; an empty body is an empty one. Raises Malformed."""
    data = await body_of(request, BODY_BYTES_MAX)
    body = decoded(data) if data else {}
    if not isinstance(body, dict):
        raise Malformed(f"body: expected a JSON object, found {type(body).__name__}")
    return body


def decoded(data: bytes) -> Any:
    """JSON as plain values. Raises Malformed."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Malformed(f"body: expected JSON, found {type(error).__name__}") from None


def text_in(body: Mapping[str, Any], key: str, default: str | None = None) -> str:
    """The text under a key. Raises Malformed for another type, and for none where there is no default."""
    value = body.get(key, default)
    if not isinstance(value, str):
        raise Malformed(f"body: {key}: expected text, found {'nothing' if value is None else type(value).__name__}")
    return value


def bytes_in(body: Mapping[str, Any], key: str, optional: bool = False) -> bytes:
    """The bytes under a key, in base64. Raises Malformed."""
    try:
        return base64.b64decode(text_in(body, key, "" if optional else None), validate=True)
    except ValueError:
        raise Malformed(f"body: {key}: expected base64") from None


def number_in(text: str, what: str, low: float, high: float) -> float:
    """A query parameter as a number from `low` to `high`. Raises Malformed."""
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not low <= value <= high:
        raise Malformed(f"query parameter {what}: expected a number from {low:g} to {high:g}, found {text[:32]!r}")
    return value


def whole_number_in(text: str, what: str) -> int:
    """A query parameter as a whole number from 0 up to 18 digits. Raises Malformed."""
    if not (text.isascii() and text.isdigit() and len(text) <= 18):
        raise Malformed(f"query parameter {what}: expected a whole number of up to 18 digits, found {text[:32]!r}")
    return int(text)


def encoded(value: Any) -> Response:
    """Any value of ours as a JSON answer."""
    return Response(msgspec.json.encode(value), media_type="application/json")
