"""The coordinator's answers over HTTP: bounded while they arrive, refusals as our errors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import httpx

from model_delta.errors import Malformed, NotFound, Unavailable

ANSWER_S = 10.0
"""How long an answer may take, beside what it was asked to wait."""


async def answer(
    client: httpx.AsyncClient,
    method: str,
    url: str,
    what: str,
    bytes_max: int,
    *,
    wait_s: float = 0.0,
    body: Mapping[str, Any] | None = None,
) -> bytes:
    """The body of an answer, b"" of one without content; `body` is sent as JSON. Raises NotFound, Malformed, and
    Unavailable for everything else that is none."""
    data = bytearray()
    try:
        async with client.stream(method, url, json=body, timeout=wait_s + ANSWER_S) as response:
            async for chunk in response.aiter_bytes():
                data += chunk
                if len(data) > bytes_max:
                    raise Malformed(f"{what}: expected at most {bytes_max} bytes from the coordinator, found more")
    except httpx.HTTPError as error:
        raise Unavailable(f"{what}: the coordinator did not answer: {type(error).__name__}") from None
    if response.status_code in (200, 204):
        return bytes(data)
    kind = {404: NotFound, 400: Malformed}.get(response.status_code, Unavailable)
    text = bytes(data[:200]).decode(errors="replace")
    raise kind(f"{what}: the coordinator answered {response.status_code}: {text}")
