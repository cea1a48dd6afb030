"""Asking a region: one HTTP question to the nearest gateway, and to the next one when it does not answer.

    POST /predict {"features": {...}, "device_id": ..., "model": ...}   Authorization: Bearer ...
    -> {"score", "decision", "model_version", "manifest", "reason", "region", ...}

A region that refuses the connection, breaks it, answers 5xx or takes longer than `try_deadline_s` is set aside for
`set_aside_s`; after that a single request probes it again, while the others go on elsewhere. A request is lost only if
no region answered it within `total_deadline_s`, which is time for more than one try of each. How long a failure lasted
for the callers is measured from the start of the first failed try to the first answer from another region.

Connections are kept alive in a small pool per region and used by a few threads (`http.client` blocks); a kept
connection that the server has closed meanwhile is replaced once before anything is held against the region.
"""

from __future__ import annotations

import asyncio
import http.client
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Protocol, Self
from urllib.parse import urlsplit

import msgspec

from model_delta.errors import Malformed, NotFound, Unavailable, Untrusted

RESPONSE_BYTES_MAX = 65_536
Clock = Callable[[], float]


class RegionAnswer(msgspec.Struct, frozen=True):
    """What a region said. `region` is filled in by the client when the answer does not name it."""

    score: float
    decision: str
    model_version: str = ""
    reason: str = ""
    manifest: str = ""
    region: str = ""


class Failover(msgspec.Struct, frozen=True):
    """One region's failure as its callers saw it: `recovery_s` from the start of the first failed try
    to the first answer elsewhere."""

    region: str
    answered_by: str
    recovery_s: float
    time: float


class AskRegion(Protocol):
    """What a device needs. Raises Unavailable when no region answers, Untrusted or Malformed when one refuses."""

    async def ask(self, features: Mapping[str, float], device_id: str, nearest: str) -> RegionAnswer: ...


class _Refused(Exception):
    """The region answered that the request itself is wrong: asking elsewhere gives the same answer."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class _NotServing(Unavailable):
    """The region is there and says that it has not got this model (yet)."""


class _NoTime(Unavailable):
    """The region has had its time, with a connection that the server had closed."""


class _Region:
    """One gateway: its address, idle connections, and whether it is set aside. Guarded by `lock`."""

    def __init__(self, name: str, url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise Malformed(f"region {name}: expected an address like http://host:port, found {url[:80]!r}")
        self.name = name
        self.secure = parts.scheme == "https"
        self.host, self.port = parts.hostname, parts.port or (443 if self.secure else 80)
        self.lock = threading.Lock()
        self.idle: deque[http.client.HTTPConnection] = deque(maxlen=8)
        self.aside_until = 0.0
        self.failing_since = 0.0
        self.recovered = True
        self.probing = False


class RegionClient:
    """Shared by every device of a process; the nearest region is each caller's own argument. `model` "" asks for the
    tenant's default. `clock` is monotonic."""

    def __init__(
        self,
        urls: Mapping[str, str],
        token: str,
        *,
        model: str = "",
        try_deadline_s: float = 0.5,
        total_deadline_s: float = 2.0,
        set_aside_s: float = 1.0,
        threads: int = 4,
        clock: Clock = time.monotonic,
        wall_clock: Clock = time.time,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        self._regions = {name: _Region(name, url) for name, url in urls.items()}
        self._headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
        self._asked_for = {"model": model} if model else {}
        self._try_deadline_s, self._total_deadline_s = try_deadline_s, total_deadline_s
        self._set_aside_s = set_aside_s
        self._clock, self._wall_clock = clock, wall_clock
        self._ssl_context = ssl_context
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="region")
        self.requests = 0
        self.lost_requests = 0
        self.answered_by: dict[str, int] = dict.fromkeys(self._regions, 0)
        self.failovers: deque[Failover] = deque(maxlen=1000)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self.close)

    def close(self) -> None:
        """End the threads and close the connections."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        for region in self._regions.values():
            while region.idle:
                region.idle.pop().close()

    async def ask(self, features: Mapping[str, float], device_id: str, nearest: str) -> RegionAnswer:
        """One question, to `nearest` first. Regions that did not answer in time are asked again as long as
        `total_deadline_s` allows, and once more when this process stood still during a try, however late it is then.

        Raises Unavailable when no region answered (the request is counted lost),
        NotFound when all are there and none has ever served this model, Untrusted for a refused token, Malformed for a
        refused question or an answer that cannot be read."""
        body = msgspec.json.encode({"features": dict(features), "device_id": device_id, **self._asked_for})
        deadline = self._clock() + self._total_deadline_s
        self.requests += 1
        loop = asyncio.get_running_loop()
        tried: list[str] = []
        not_serving, silent, stood_still = 0, False, False
        while (left := deadline - self._clock()) > 0:
            region = self._choose(nearest, tried)
            if region is None:
                if not silent:
                    break
                tried, not_serving, silent = [], 0, False
                continue
            tried.append(region.name)
            begun, try_s = self._clock(), min(left, self._try_deadline_s)
            try:
                answer = await loop.run_in_executor(self._threads, self._ask_one, region, body, try_s)
            except _Refused as refused:
                self._works(region)
                kind = Untrusted if refused.status in (401, 403) else Malformed
                raise kind(f"region {region.name}: refused with status {refused.status}: {refused}") from None
            except (OSError, http.client.HTTPException, Unavailable) as error:
                self._fails(region, begun)
                not_serving += isinstance(error, _NotServing)
                silent = silent or isinstance(error, TimeoutError | _NoTime)
                if self._clock() - begun > try_s + self._try_deadline_s and not stood_still:
                    stood_still, deadline = True, max(deadline, self._clock() + self._try_deadline_s)
                continue
            self._works(region)
            self.answered_by[region.name] += 1
            self._note_recovery(region.name)
            return answer
        if not_serving == len(self._regions) and not any(self.answered_by.values()):
            raise NotFound("prediction: no region serves this model yet")
        self.lost_requests += 1
        raise Unavailable(f"prediction: no region answered (tried {', '.join(tried) or 'none'})")

    def down(self) -> tuple[str, ...]:
        """The regions that are set aside now."""
        now = self._clock()
        return tuple(name for name, region in self._regions.items() if now < region.aside_until)

    def _choose(self, nearest: str, tried: list[str]) -> _Region | None:
        """The nearest region that is not set aside; one probe at a time for one whose time is up; else, so that no
        request is lost while anything may work, one that is set aside."""
        order = sorted(self._regions.values(), key=lambda region: (region.name != nearest, region.name))
        order = [region for region in order if region.name not in tried]
        now = self._clock()
        for region in order:
            if not region.failing_since:
                return region
            if now >= region.aside_until and not region.probing:
                region.probing = True
                return region
        return order[0] if order else None

    def _fails(self, region: _Region, begun: float) -> None:
        region.probing = False
        if not region.failing_since:
            region.failing_since, region.recovered = begun, False
        region.aside_until = self._clock() + self._set_aside_s
        with region.lock:
            while region.idle:
                region.idle.pop().close()

    def _works(self, region: _Region) -> None:
        region.probing = False
        region.failing_since, region.recovered = 0.0, True
        region.aside_until = 0.0

    def _note_recovery(self, answered_by: str) -> None:
        """The first answer elsewhere after a region's failure ends that failure for the callers."""
        now = self._clock()
        for region in self._regions.values():
            if not region.recovered and region.name != answered_by:
                region.recovered = True
                took = now - region.failing_since
                self.failovers.append(Failover(region.name, answered_by, took, self._wall_clock()))

    def _ask_one(self, region: _Region, body: bytes, deadline_s: float) -> RegionAnswer:
        """One try, in a thread."""
        end = time.monotonic() + deadline_s
        with region.lock:
            kept = region.idle.pop() if region.idle else None
        for connection in (kept, None):
            if connection is None and kept is not None and time.monotonic() >= end:
                break
            fresh = connection is None
            line = connection or self._connect(region, max(end - time.monotonic(), 0.001))
            try:
                status, payload, keep = self._exchange(line, body, max(end - time.monotonic(), 0.001))
            except (http.client.RemoteDisconnected, BrokenPipeError, ConnectionResetError):
                line.close()
                if fresh:
                    raise
                continue
            except BaseException:
                line.close()
                raise
            if keep:
                with region.lock:
                    region.idle.append(line)
            else:
                line.close()
            return _read_answer(region.name, status, payload)
        raise _NoTime(f"region {region.name}: no time left for a second connection")

    def _connect(self, region: _Region, timeout_s: float) -> http.client.HTTPConnection:
        if region.secure:
            return http.client.HTTPSConnection(region.host, region.port, timeout=timeout_s, context=self._ssl_context)
        return http.client.HTTPConnection(region.host, region.port, timeout=timeout_s)

    def _exchange(self, line: http.client.HTTPConnection, body: bytes, timeout_s: float) -> tuple[int, bytes, bool]:
        line.timeout = timeout_s
        if line.sock is not None:
            line.sock.settimeout(timeout_s)
        line.request("POST", "/predict", body, self._headers)
        response = line.getresponse()
        payload = response.read(RESPONSE_BYTES_MAX)
        return response.status, payload, not response.will_close and response.isclosed()


def _read_answer(region: str, status: int, payload: bytes) -> RegionAnswer:
    if status in (404, 503):  # it has not got this version yet: another region may
        raise _NotServing(f"region {region}: status {status}")
    if status >= 500 or status == 429:
        raise Unavailable(f"region {region}: status {status}")
    if status != 200:
        raise _Refused(status, payload[:200].decode("utf-8", "replace"))
    try:
        answer = msgspec.json.decode(payload, type=RegionAnswer)
    except msgspec.DecodeError as error:
        raise Unavailable(f"region {region}: unreadable answer: {error}") from None
    if not 0.0 <= answer.score <= 1.0 or answer.decision not in ("approve", "decline"):
        raise Unavailable(f"region {region}: expected a score in [0, 1] and approve or decline")
    return msgspec.structs.replace(answer, region=answer.region or region)
