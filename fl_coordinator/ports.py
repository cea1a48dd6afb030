"""What the coordinator needs from outside: a line to the broker, a way to the aggregators, the updates log, the time.

`atoll` hands in the objects; tests hand in fakes that behave.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Protocol

from fl_coordinator.updates_log import LogPart

Clock = Callable[[], float]
"""Unix seconds."""

Note = Callable[[str, str], None]
"""note(kind, text): a line in the history that the page shows; kind is `info`, `alert` or `act`. Blocking."""

Tell = Callable[[Mapping[str, Any]], Awaitable[Mapping[str, Any]]]
"""Hands a command to one region's relay and gives its answer; see `regional_gateway.relay`. Raises Unavailable."""


class Link(Protocol):
    """The line to the broker; see `edge_runtime.link`."""

    @property
    def connected(self) -> bool:
        """Whether the broker can be reached now."""

    async def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        """Returns after the broker's acknowledgement; raises Unavailable after its own deadline."""

    def subscribe(self, topic_filter: str, handler: Callable[[str, bytes], None]) -> None:
        """`handler(topic, payload)` runs in the event loop; renewed on every reconnect."""


class Bridge(Protocol):
    """How commands reach the aggregators; see `flower_bridge`."""

    async def command(
        self,
        payload: Mapping[str, Any],
        nodes: Sequence[str],
        deadline_s: float,
        fetched: asyncio.Event | None = None,
    ) -> dict[str, dict[str, Any]]:
        """Every node's answer by name; `fetched` is set once a node may hear of it. Raises Unavailable naming the
        nodes that did not answer."""


class StandingBridge(Bridge, Protocol):
    """A bridge for commands that stand, too; see `standing`."""

    async def command(
        self,
        payload: Mapping[str, Any],
        nodes: Sequence[str],
        deadline_s: float,
        fetched: asyncio.Event | None = None,
        due: asyncio.Future[float] | None = None,
    ) -> dict[str, dict[str, Any]]:
        """As that of a `Bridge`. With `due` no answer is expected before that future is done; its result says how many
        seconds they may take then."""


class UpdatesLog(Protocol):
    """See `updates_log`, which is embedded, and `kafka_log`."""

    def append(self, records: Sequence[bytes]) -> list[int]:
        """Make records durable; their offsets."""

    def read(self, offset: int) -> bytes:
        """The record at an offset."""

    def read_from(self, offset: int) -> LogPart:
        """What is there from an offset on, some megabytes at a time; see `LogPart`."""

    @property
    def end(self) -> int:
        """The offset that the next record gets."""

    def remove_before(self, offset: int) -> int:
        """Let go of records below `offset`, as far as that saves something; how many files or records."""

    def close(self) -> None:
        """Let go of files and connections; what was appended is durable already."""
