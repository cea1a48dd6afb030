"""The coordinator's control API, as the command line and the demo use it.

Standard library only, so that a device image can enrol. Connection errors and 502-504 raise Unavailable and may be
retried; every other refusal is final and carries the coordinator's own words.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from typing import Any, TypeVar

from atoll.settings import ConfigurationError
from model_delta.errors import Malformed, NotFound, StorageFull, Unavailable, Untrusted

T = TypeVar("T")
TRY_TIMEOUT_S = 30.0
LASTING = (NotFound, StorageFull)
"""Kinds of Unavailable that trying again within seconds does not cure: a person has to."""


class ControlClient:
    """Calls to one coordinator with one bearer token."""

    def __init__(self, url: str, token: str) -> None:
        self.url = url.rstrip("/")
        self._token = token

    def get(self, path: str, *, timeout_s: float = TRY_TIMEOUT_S, **query: str) -> Any:
        """GET `path` and decode its JSON. Raises Unavailable, NotFound, Malformed, Untrusted."""
        return json.loads(self.request("GET", path, None, "", timeout_s, query) or b"null")

    def get_bytes(self, path: str, *, timeout_s: float = TRY_TIMEOUT_S) -> bytes:
        """GET `path` as raw bytes."""
        return self.request("GET", path, None, "", timeout_s, {})

    def post(self, path: str, body: Any = None, *, timeout_s: float = TRY_TIMEOUT_S, **query: str) -> Any:
        """POST `body` (bytes and str as they are, everything else as JSON) and decode the JSON answer."""
        if isinstance(body, bytes):
            data, kind = body, "application/octet-stream"
        elif isinstance(body, str):
            data, kind = body.encode(), "text/plain; charset=utf-8"
        else:
            data, kind = json.dumps(body if body is not None else {}).encode(), "application/json"
        return json.loads(self.request("POST", path, data, kind, timeout_s, query) or b"null")

    def request(
        self, method: str, path: str, data: bytes | None, kind: str, timeout_s: float, query: dict[str, str]
    ) -> bytes:
        """One exchange; the body of the answer."""
        target = self.url + path + ("?" + urllib.parse.urlencode(query) if query else "")
        headers = {"Authorization": f"Bearer {self._token}", **({"Content-Type": kind} if kind else {})}
        request = urllib.request.Request(target, data=data, method=method, headers=headers)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=timeout_s) as response:
                body: bytes = response.read()
                return body
        except urllib.error.HTTPError as error:
            raise refusal(error.code, _reason(error.read(), error.code), self.url) from None
        except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
            cause = getattr(error, "reason", error)
            raise Unavailable(f"coordinator at {self.url}: expected an answer, found {cause}") from None


def refusal(status: int, reason: str, url: str) -> Exception:
    """The error that an HTTP status stands for."""
    if status == 401:
        return ConfigurationError(f"coordinator at {url}: {reason}; check the token or the --data folder")
    if status == 403:
        return Untrusted(reason)
    if status == 404:
        return NotFound(reason)
    if status == 507:
        return StorageFull(reason)
    if status in (502, 503, 504):
        return Unavailable(reason)
    return Malformed(reason)


def _reason(body: bytes, status: int) -> str:
    try:
        return str(json.loads(body)["error"])
    except (ValueError, KeyError, TypeError):
        return f"HTTP {status}"


def reach(seconds: float, call: Callable[[], T]) -> T:
    """Call the coordinator until it answers, for at most `seconds`; then it is for a person to see why it does not.
    Raises ConfigurationError."""
    try:
        return retry_until(time.monotonic() + seconds, call)
    except LASTING:
        raise
    except Unavailable as error:
        raise ConfigurationError(
            f"{error}; tried for {seconds:g} s; is `atoll up` running on this data folder?"
        ) from None


async def answered(call: Callable[[], T], seconds: float, *, pause_s: float = 0.3) -> T:
    """`retry_until` for an event loop. Each try is a thread's, the pauses are not: whoever is cancelled leaves one try
    behind, not a thread that goes on trying for `seconds`."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return await asyncio.to_thread(call)
        except LASTING:
            raise
        except Unavailable:
            if time.monotonic() >= deadline:
                raise
            await asyncio.sleep(pause_s)


def retry_until(deadline: float, call: Callable[[], T], *, pause_s: float = 0.3) -> T:
    """Call until it answers or `deadline` (time.monotonic) passes; only Unavailable is retried, and of it not
    what is LASTING."""
    while True:
        try:
            return call()
        except LASTING:
            raise
        except Unavailable:
            if time.monotonic() >= deadline:
                raise
            time.sleep(pause_s)
