"""Hands manifests, deliveries and sealed blobs to the devices of a region.

A device asks for a range of bytes (`ChunkRequest`) and gets it (`ChunkResponse`); it checks everything itself, so the
mirror trusts nothing and needs no trust: it understands neither plans nor models. What it has not got it fetches from
the coordinator once, however many devices wait for it, and keeps. A device may have `WINDOW_MAX` requests waiting; more
are dropped, so that one device cannot crowd out the others. An object that the coordinator has
not got is remembered as missing for a moment. Only the kinds of `StoreKind` can be asked for: a region's plans and
sealed keys lie in the same store.

A published version's objects never change, so nothing kept here needs refreshing, but for one: the timestamp of the TUF
repository (kind `tuf`, whose files go by role and version) is fetched again when it is asked for and older than
TIMESTAMP_SECONDS. While the coordinator is away the one that is kept is handed out. A device that only wants to know
whether there is anything new checks in (`model_delta.trust.checkin`): one question, one answer.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter

from model_delta.digest import require_digest, require_match
from model_delta.encoding import pack, unpack
from model_delta.errors import AtollError, NotFound, Unavailable
from model_delta.store import ArtifactStore
from model_delta.topics import (
    CHUNK_BYTES,
    REQUEST_WINDOW,
    ROOT,
    ChunkRequest,
    ChunkResponse,
    StoreKind,
    device_of,
    down,
)
from model_delta.trust.checkin import CHECK_IN_BYTES_MAX, answer_check_in, newest_root
from model_delta.trust.paths import KIND as TUF
from monitoring.metrics import Metrics
from regional_gateway.supply import Fetch, Link

log = logging.getLogger(__name__)

WINDOW_MAX = 2 * REQUEST_WINDOW
WAITING_MAX = 4_096
WORKERS = 16
FETCHES_AT_ONCE = 4
CHUNK_BYTES_MAX = 8 * CHUNK_BYTES
REQUEST_BYTES_MAX = 1_024
MISSING_SECONDS = 2.0
MISSING_MAX = 1_024
TIMESTAMP = "timestamp.json"
TIMESTAMP_SECONDS = 0.5
"""Short, because a version is vouched for just before the plan that names it is published."""
ROOTS_AT_ONCE = 64
HEARD_S = 900.0
HEARD_MAX = 100_000
"""A device that asked for something within `HEARD_S` seconds counts as reachable."""


class Mirror:
    """Answers the chunk requests of `region` out of `store`, fetching what is not there."""

    def __init__(
        self,
        *,
        region: str,
        link: Link,
        store: ArtifactStore,
        fetch: Fetch,
        metrics: Metrics,
        timestamp_seconds: float = TIMESTAMP_SECONDS,
        distant: bool = False,
    ) -> None:
        """`distant`: reading from `store` takes a network."""
        self._region, self._link, self._store, self._fetch = region, link, store, fetch
        self._timestamp_seconds, self._distant = timestamp_seconds, distant
        self._waiting: asyncio.Queue[tuple[str, ChunkRequest | bytes]] = asyncio.Queue(WAITING_MAX)
        self._window: Counter[str] = Counter()
        self._fetches = asyncio.Semaphore(FETCHES_AT_ONCE)
        self._fetching: dict[tuple[StoreKind, str], asyncio.Task[None]] = {}
        self._missing: dict[tuple[StoreKind, str], float] = {}
        self._timestamp_until = 0.0
        self._heard: dict[str, float] = {}  # device: when it last asked, in this order
        self._requests = metrics.counter("mirror_requests", "Chunk requests by result.", ("result",))
        self._bytes = metrics.counter("mirror_bytes", "Bytes handed to devices, by kind of object.", ("kind",))
        self._fetched = metrics.counter("mirror_fetched_bytes", "Bytes fetched from the coordinator.", ("kind",))

    async def run(self) -> None:
        """Answer until cancelled."""
        self._link.subscribe(f"{ROOT}/dev/+/up/req/{self._region}", self._on_request)
        self._link.subscribe(f"{ROOT}/dev/+/up/trust/{self._region}", self._on_check_in)
        try:
            async with asyncio.TaskGroup() as tasks:
                for number in range(WORKERS):
                    tasks.create_task(self._work(), name=f"mirror {number}")
        finally:
            for task in self._fetching.values():
                task.cancel()
            await asyncio.gather(*self._fetching.values(), return_exceptions=True)

    def _on_request(self, topic: str, payload: bytes) -> None:
        device = device_of(topic)
        try:
            if len(payload) > REQUEST_BYTES_MAX:
                raise Unavailable("request too large")
            request = unpack(payload, ChunkRequest)
        except AtollError:
            # Without a request number there is nothing to answer to.
            self._requests.add(1, "malformed")
            return
        self._admit(device, request)

    def _on_check_in(self, topic: str, payload: bytes) -> None:
        if len(payload) > CHECK_IN_BYTES_MAX:
            self._requests.add(1, "malformed")
            return
        self._admit(device_of(topic), bytes(payload))

    def reachable(self) -> int:
        """How many devices asked for something within the last `HEARD_S` seconds."""
        since = asyncio.get_running_loop().time() - HEARD_S
        while self._heard and next(iter(self._heard.values())) < since:
            del self._heard[next(iter(self._heard))]
        return len(self._heard)

    def _admit(self, device: str, request: ChunkRequest | bytes) -> None:
        self._heard.pop(device, None)
        while len(self._heard) >= HEARD_MAX:
            del self._heard[next(iter(self._heard))]
        self._heard[device] = asyncio.get_running_loop().time()
        if self._window[device] >= WINDOW_MAX or self._waiting.full():
            # Dropped, not answered: an answer would cost what the window saves. The device asks again.
            self._requests.add(1, "over_window")
            return
        self._window[device] += 1
        self._waiting.put_nowait((device, request))

    async def _work(self) -> None:
        while True:
            device, request = await self._waiting.get()
            try:
                if isinstance(request, bytes):
                    await self._answer_check_in(device, request)
                    continue
                response = await self._answer(request)
                await self._link.publish(down(device, "res"), pack(response))
            except Unavailable as error:
                # The broker is away, and the device knows: it asks again when it is back.
                self._requests.add(1, "undelivered")
                log.info("chunk for %s: %s", device, error)
                continue
            finally:
                self._window[device] -= 1
                if not self._window[device]:
                    del self._window[device]
            if response.error:
                self._requests.add(1, "refused")
            else:
                self._requests.add(1, "answered")
                self._bytes.add(len(response.data), request.kind)

    async def _answer_check_in(self, device: str, question: bytes) -> None:
        """Say what is newest; nothing where that is not known: the device then asks for the files."""
        try:
            await self._renew_timestamp()
            answer = answer_check_in(question, self._store, TUF)
        except Unavailable as error:
            log.info("check-in of %s: %s", device, error)
            self._requests.add(1, "refused")
        except AtollError:
            self._requests.add(1, "malformed")
        else:
            await self._link.publish(down(device, "trust"), answer)
            self._requests.add(1, "answered")

    async def _answer(self, request: ChunkRequest) -> ChunkResponse:
        """The chunk, or why there is none."""
        try:
            if request.kind != "tuf":
                require_digest(request.name, request.kind)
            elif request.name == TIMESTAMP and not request.kept_only:
                await self._renew_timestamp()
            length = min(request.length, CHUNK_BYTES_MAX)
            try:
                total, data = await self._read(request, length)
            except NotFound:
                if request.kept_only:
                    raise
                await self._have(request.kind, request.name)
                total, data = await self._read(request, length)
        except AtollError as error:
            return ChunkResponse(request.request, error=str(error))
        return ChunkResponse(request.request, total=total, offset=request.offset, data=data)

    async def _renew_timestamp(self) -> None:
        """Have a timestamp that is not old, if the coordinator gives one."""
        now = asyncio.get_running_loop().time()
        if now < self._timestamp_until:
            return
        try:
            await self._have("tuf", TIMESTAMP)
            await self._new_roots()
            self._timestamp_until = now + self._timestamp_seconds
        except Unavailable as error:
            log.info("timestamp of the TUF repository: %s", error)

    async def _new_roots(self) -> None:
        """Learn of the roots that came since, so that a check-in can tell of them."""
        for _ in range(ROOTS_AT_ONCE):
            try:
                await self._have("tuf", f"{newest_root(self._store, TUF) + 1}.root.json")
            except NotFound:
                return

    async def _read(self, request: ChunkRequest, length: int) -> tuple[int, bytes]:
        """A chunk is a page or eight from the page cache: 20 us, less than the hop to a thread and back. A distant
        store takes a round trip."""
        if self._distant:
            return await asyncio.to_thread(self._store.read, request.kind, request.name, request.offset, length)
        return self._store.read(request.kind, request.name, request.offset, length)

    async def _have(self, kind: StoreKind, name: str) -> None:
        """Bring an object into the store, once for all who wait. Raises NotFound, Unavailable, DigestMismatch."""
        key = (kind, name)
        now = asyncio.get_running_loop().time()
        if self._missing.get(key, 0.0) > now:
            raise NotFound(f"{kind} {name[:12]}: the coordinator has not got it")
        task = self._fetching.get(key)
        if task is None:
            task = self._fetching[key] = asyncio.create_task(self._bring(kind, name), name=f"fetch {kind} {name[:12]}")
            task.add_done_callback(lambda done: done.cancelled() or done.exception())
        await asyncio.shield(task)

    async def _bring(self, kind: StoreKind, name: str) -> None:
        try:
            async with self._fetches:
                data = await self._fetch(kind, name)
            if kind in ("blob", "artifact"):
                # Not for trust's sake: a damaged copy would be kept and handed out for ever.
                require_match(data, name, f"{kind} {name[:12]} from the coordinator")
            await asyncio.to_thread(self._store.put, kind, name, data)
            self._fetched.add(len(data), kind)
        except NotFound:
            if len(self._missing) >= MISSING_MAX:
                self._missing.clear()
            self._missing[kind, name] = asyncio.get_running_loop().time() + MISSING_SECONDS
            raise
        finally:
            del self._fetching[kind, name]
