"""How an aggregator reaches what it reads: the updates log, announcements of rounds, single frozen contributions.

All comes from the coordinator over HTTP with the aggregators' token, but for a log in Kafka, which it reads itself.
What arrives is bounded while it arrives, and believed only after the aggregator has verified it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from urllib.parse import quote

import httpx

from atoll.bounded_answers import answer
from atoll.updates import EMBEDDED, UpdatesPlace, login_properties
from fl_coordinator.following import LogSource
from fl_coordinator.threads import in_thread
from fl_coordinator.updates_log import PART_BYTES, RECORD_BYTES_MAX, LogPart, unpacked_part

LOG_WAIT_S = 2.0
"""Short, because a coordinator that is told to stop finishes what it answers."""
TOPIC_WAIT_S = 0.5
ATTEMPT_WAIT_S = 2.0
"""As short, and for the same reason."""
ATTEMPT_BYTES_MAX = 32 * 2**20
ANNOUNCEMENT_BYTES_MAX = 16 * 2**20
MEMORY_BYTES_MAX = 128 * 2**20
_FRAMES_BYTES = 2**20


class CoordinatorClient:
    """The coordinator at `url`, asked by an aggregator; `client` carries its token."""

    def __init__(self, client: httpx.AsyncClient, url: str) -> None:
        self._client = client
        self._url = url

    async def announcement(self, round_id: str) -> bytes:
        """The packed signed announcement of a round that has not ended. Raises NotFound, Unavailable, Malformed."""
        named = quote(round_id, safe="")  # it may come from a record in the log that anybody wrote
        return await self._get(
            f"/v1/rounds/{named}/announcement", f"announcement of round {named[:200]}", ANNOUNCEMENT_BYTES_MAX
        )

    async def attempt(self, round_id: str, aggregator: str) -> bytes | None:
        """The attempt for which `aggregator` stands by, None while there is none. Raises NotFound when it need not wait
        any more, Unavailable, Malformed."""
        path = f"/v1/rounds/{quote(round_id, safe='')}/attempt?aggregator={quote(aggregator, safe='')}"
        what = f"attempt at round {round_id}"
        return await self._get(f"{path}&wait={ATTEMPT_WAIT_S:g}", what, ATTEMPT_BYTES_MAX, ATTEMPT_WAIT_S) or None

    async def contribution(self, round_id: str, digest: str) -> bytes:
        """One frozen contribution. Raises NotFound, Unavailable, Malformed."""
        what = f"contribution {digest[:16]}… of round {round_id}"
        return await self._get(f"/v1/rounds/{round_id}/contributions/{digest}", what, RECORD_BYTES_MAX)

    async def memory(self, round_id: str) -> bytes:
        """What the policy of a round remembers when it begins, with its proof. Raises Unavailable, Malformed."""
        return await self._get(f"/v1/rounds/{round_id}/memory", f"memory of round {round_id}", MEMORY_BYTES_MAX)

    async def log_from(self, offset: int, wait_s: float) -> LogPart:
        """What the coordinator's log holds from `offset` on; see `LogPart`. Raises Unavailable, Malformed."""
        most = PART_BYTES + RECORD_BYTES_MAX + _FRAMES_BYTES
        data = await self._get(f"/v1/log?from={offset}&wait={wait_s:g}", "updates log", most, wait_s)
        return await asyncio.to_thread(unpacked_part, data)

    async def _get(self, path: str, what: str, bytes_max: int, wait_s: float = 0.0) -> bytes:
        return await answer(self._client, "GET", self._url + path, what, bytes_max, wait_s=wait_s)


class CoordinatorLog:
    """The coordinator's log, whatever it is kept in, by long poll."""

    name = EMBEDDED

    def __init__(self, coordinator: CoordinatorClient) -> None:
        self._coordinator = coordinator

    async def read_from(self, offset: int) -> LogPart:
        """See `LogSource`."""
        return await self._coordinator.log_from(offset, LOG_WAIT_S)


class TopicLog:
    """A topic of Kafka. `read` is a reader's `read_from`."""

    def __init__(self, url: str, read: Callable[[int, int, float], LogPart]) -> None:
        self.name = url
        self._read = read

    async def read_from(self, offset: int) -> LogPart:
        """See `LogSource`."""
        return await in_thread(self._read, offset, PART_BYTES, TOPIC_WAIT_S)


@contextlib.asynccontextmanager
async def open_source(place: UpdatesPlace, coordinator: CoordinatorClient) -> AsyncIterator[LogSource]:
    """The log at `place`, to be followed. Raises Malformed for a property that will not do, ConfigurationError for
    a login that cannot be read."""
    if place.url == EMBEDDED:
        yield CoordinatorLog(coordinator)
        return
    from fl_coordinator.kafka_log import TopicReader  # comes with the extra `kafka`

    reader = TopicReader(place.url, login_properties(place))
    try:
        yield TopicLog(place.url, reader.read_from)
    finally:
        await asyncio.to_thread(reader.close)
