"""Getting named bytes from a region's mirror over the broker: pulled by chunks, a few at a time, resumable.

Every answer is a `ChunkResponse` to a numbered `ChunkRequest`; at most REQUEST_WINDOW are open, so nothing queues up at
the broker. The home region is asked first. A region that does not answer in time is set aside for a while and the next
one is asked for the same chunk, so that a dead region costs one wait. Blobs are checked against the digest that names
them and kept on disk chunk by chunk; a blob that was spoilt on the way is asked for again, from another region first.

The mirror is trusted with nothing: manifests, deliveries and artifacts are judged by the caller.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from typing import TypeVar

from edge_runtime.identity import Identity
from edge_runtime.link import Link
from edge_runtime.slots import Slots
from model_delta.encoding import pack, unpack
from model_delta.errors import AtollError, DigestMismatch, Malformed, NotFound, Unavailable
from model_delta.keys.encryption import open_sealed
from model_delta.manifest import Blob
from model_delta.patch.access import RandomAccess
from model_delta.topics import (
    CHUNK_BYTES,
    REQUEST_WINDOW,
    ChunkRequest,
    ChunkResponse,
    KeyRequest,
    KeyResponse,
    StoreKind,
    artifact_key_info,
    down,
    up,
)
from model_delta.trust.checkin import CheckInAnswer

SMALL_OBJECT_BYTES_MAX = 4_000_000
T = TypeVar("T", ChunkResponse, KeyResponse, CheckInAnswer)


class Fetcher:
    """Fetches for one device. `regions` in order of preference; `clock` is wall time (it only dates key requests)."""

    def __init__(
        self,
        *,
        link: Link,
        identity: Identity,
        regions: Sequence[str],
        slots: Slots,
        rng: random.Random,
        clock: Callable[[], float],
        answer_deadline_s: float = 3.0,
        set_aside_s: float = 10.0,
        window: int = REQUEST_WINDOW,
        chunk_bytes: int = CHUNK_BYTES,
    ) -> None:
        self._link, self._identity, self._slots, self._clock = link, identity, slots, clock
        self._device = identity.name
        self._regions = list(regions)
        self._answer_deadline_s, self._set_aside_s = answer_deadline_s, set_aside_s
        self._window, self._chunk_bytes = window, chunk_bytes
        self._open = asyncio.Semaphore(window)
        self._blob_lock = asyncio.Lock()
        self._request = rng.randrange(1 << 48)  # so that answers to an earlier life fit no question of this one
        self._aside: dict[str, float] = {}
        self._waiting_chunks: dict[int, asyncio.Future[ChunkResponse]] = {}
        self._waiting_keys: dict[int, asyncio.Future[KeyResponse]] = {}
        self._waiting_check_ins: dict[int, asyncio.Future[CheckInAnswer]] = {}
        self.bytes_received = 0

    def start(self) -> None:
        """Subscribe to the answers."""
        self._link.subscribe(down(self._device, "res"), self._on_chunk)
        self._link.subscribe(down(self._device, "key"), self._on_key)
        self._link.subscribe(down(self._device, "trust"), self._on_check_in)

    async def check_in(self, number: int, question: bytes) -> bytes | None:
        """The nearest region's answer to a check-in of that `number`; None when there is none in time. Raises
        Unavailable when the broker is away."""
        region = self._order()[0]
        found = await self._ask(self._waiting_check_ins, number, up(self._device, f"trust/{region}"), question)
        return None if found is None else pack(found)

    async def part(self, kind: StoreKind, name: str, offset: int) -> tuple[int, bytes]:
        """An object's whole size and a chunk of it from `offset`, unchecked. Raises Unavailable, NotFound."""
        found = await self._chunk(kind, name, offset)
        return found.total, found.data

    def set_nearest_aside(self) -> None:
        """Ask another region first for a while: what the nearest one hands out is no good."""
        self._set_aside(self._order()[0])

    async def object(self, kind: StoreKind, name: str) -> bytes:
        """A small object as a whole, unchecked. Raises Unavailable, NotFound, Malformed (too big or inconsistent)."""
        first = await self._chunk(kind, name, 0)
        if first.total > SMALL_OBJECT_BYTES_MAX:
            raise Malformed(f"{kind} {name[:16]}…: {first.total} bytes, at most {SMALL_OBJECT_BYTES_MAX} expected")
        parts = [first.data]
        async for chunk in self._chunks(kind, name, len(first.data), first.total):
            parts.append(chunk)
        return b"".join(parts)

    async def blob(self, blob: Blob) -> RandomAccess:
        """A sealed blob on disk, checked against its digest; resumes at the first chunk not there. Raises Unavailable,
        NotFound, StorageFull, and DigestMismatch when every region gives other bytes."""
        for attempt in range(len(self._regions) + 1):
            async with self._blob_lock:  # an update and a round may want the same blob at the same time
                if not self._slots.has(blob.digest):
                    await self._receive(blob)
            try:
                return self._slots.complete(blob.digest)
            except NotFound:
                continue
            except DigestMismatch:
                if attempt == len(self._regions):
                    raise
                self._set_aside(self._order()[0])
        raise Unavailable(f"blob {blob.digest[:16]}…: damaged on disk again and again")

    async def in_region(self, blobs: Sequence[Blob]) -> frozenset[str]:
        """Which of `blobs` the nearest region's mirror has already, without making it fetch one. No answer is a no, and
        ends the questions."""
        region, there = self._order()[0], set()
        for blob in blobs:
            async with self._open:
                number = self.next_request()
                request = ChunkRequest(number, "blob", blob.digest, 0, 0, kept_only=True)
                response = await self._ask(
                    self._waiting_chunks, number, up(self._device, f"req/{region}"), pack(request)
                )
            if response is None:
                self._set_aside(region)
                break
            if not response.error and response.total == blob.size:
                there.add(blob.digest)
        return frozenset(there)

    async def _receive(self, blob: Blob) -> None:
        """Append what is missing of a blob to its part."""
        here = min(self._slots.received(blob.digest), blob.size)
        here -= here % self._chunk_bytes
        self._slots.truncate(blob.digest, here)
        async for chunk in self._chunks("blob", blob.digest, here, blob.size):
            if self._slots.received(blob.digest) != here:
                raise Unavailable(f"blob {blob.digest[:16]}…: its part was cleared away by another update")
            self._slots.append(blob.digest, here, chunk)
            here += len(chunk)

    async def artifact_key(self, manifest: str) -> bytes:
        """The artifact key of `manifest`, opened with the device's sealing key. Raises Unavailable (no answer in time,
        or refused for now), Untrusted (sealed to somebody else)."""
        number = self.next_request()
        envelope = self._identity.key_request(KeyRequest(number, self._device, manifest, int(self._clock())))
        response = await self._ask(self._waiting_keys, number, up(self._device, "key"), envelope)
        if response is None:
            raise Unavailable(f"key of {manifest[:16]}…: no answer in {self._answer_deadline_s:g} s")
        if response.error:
            raise Unavailable(f"key of {manifest[:16]}…: {response.error}")
        return open_sealed(self._identity.sealing, response.sealed, artifact_key_info(self._device, manifest))

    async def _chunks(self, kind: StoreKind, name: str, start: int, total: int) -> AsyncIterator[bytes]:
        """The bytes [start, total) in order, with the window's worth of requests under way."""
        offsets = iter(range(start, total, self._chunk_bytes))
        running: deque[asyncio.Task[ChunkResponse]] = deque()
        try:
            while True:
                while len(running) < self._window and (offset := next(offsets, None)) is not None:
                    running.append(asyncio.create_task(self._chunk(kind, name, offset), name=f"{kind} {offset}"))
                if not running:
                    return
                response = await running[0]
                running.popleft()
                if response.total != total:
                    raise NotFound(f"{kind} {name[:16]}…: expected {total} bytes, the region has {response.total}")
                yield response.data
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    async def _chunk(self, kind: StoreKind, name: str, offset: int) -> ChunkResponse:
        """One chunk, from the first region that has it."""
        refusals: list[str] = []
        for region in self._order():
            async with self._open:
                number = self.next_request()
                request = ChunkRequest(number, kind, name, offset, self._chunk_bytes)
                response = await self._ask(
                    self._waiting_chunks, number, up(self._device, f"req/{region}"), pack(request)
                )
            if response is None:
                self._set_aside(region)
                continue
            wanted = min(self._chunk_bytes, max(0, response.total - offset))
            if response.error:
                refusals.append(f"{region}: {response.error}")
            elif response.offset != offset or len(response.data) != wanted:
                refusals.append(f"{region}: a chunk that was not asked for")
            else:
                return response
        if refusals:
            raise NotFound(f"{kind} {name[:16]}…: {'; '.join(refusals)}"[:400])
        raise Unavailable(f"{kind} {name[:16]}…: no answer from {', '.join(self._regions)}")

    async def _ask(self, waiting: dict[int, asyncio.Future[T]], number: int, topic: str, payload: bytes) -> T | None:
        """Publish a question and wait for its answer; None when none came in time. Raises Unavailable if the broker is
        away: that is not the region's fault."""
        answer: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        waiting[number] = answer
        try:
            await self._link.publish(topic, payload)
            async with asyncio.timeout(self._answer_deadline_s):
                return await answer
        except TimeoutError:
            return None
        finally:
            del waiting[number]

    def _order(self) -> list[str]:
        """Every region, those that are set aside last."""
        now = time.monotonic()
        return sorted(self._regions, key=lambda region: self._aside.get(region, 0.0) > now)  # stable: home stays first

    def _set_aside(self, region: str) -> None:
        self._aside[region] = time.monotonic() + self._set_aside_s

    def next_request(self) -> int:
        """The number of the next question."""
        self._request += 1
        return self._request

    def _on_chunk(self, topic: str, payload: bytes) -> None:
        self._settle(self._waiting_chunks, payload, ChunkResponse)

    def _on_key(self, topic: str, payload: bytes) -> None:
        self._settle(self._waiting_keys, payload, KeyResponse)

    def _on_check_in(self, topic: str, payload: bytes) -> None:
        self._settle(self._waiting_check_ins, payload, CheckInAnswer)

    def _settle(self, waiting: dict[int, asyncio.Future[T]], payload: bytes, kind: type[T]) -> None:
        self.bytes_received += len(payload)
        try:
            response = unpack(payload, kind)
        except AtollError:
            return  # the question stays open and runs into its deadline
        found = waiting.get(response.request)
        if found is not None and not found.done():
            found.set_result(response)
