"""What devices sent and nobody has read yet, bounded so that no device can crowd out the others.

A queue that is only bounded by its length belongs to whoever fills it first. This one also bounds each message, all
bytes together, and what one device may have waiting. Whatever does not fit is dropped: devices repeat what was not
answered.
"""

from __future__ import annotations

import asyncio
from collections import Counter

from model_delta.topics import device_of


class Inbox:
    """A first-in, first-out queue of (topic, payload). For one event loop."""

    def __init__(self, *, messages_max: int, per_device_max: int, message_bytes_max: int, bytes_max: int) -> None:
        self._queue: asyncio.Queue[tuple[str, bytes]] = asyncio.Queue(messages_max)
        self._per_device_max, self._message_bytes_max, self._bytes_max = per_device_max, message_bytes_max, bytes_max
        self._waiting: Counter[str] = Counter()
        self._bytes = 0

    def put(self, topic: str, data: bytes) -> bool:
        """Take a message; False when it was dropped."""
        device = device_of(topic)
        if (
            len(data) > self._message_bytes_max
            or self._bytes + len(data) > self._bytes_max
            or self._waiting[device] >= self._per_device_max
            or self._queue.full()
        ):
            return False
        self._queue.put_nowait((topic, data))
        self._waiting[device] += 1
        self._bytes += len(data)
        return True

    async def get(self) -> tuple[str, bytes]:
        """The oldest message; waits for one."""
        return self._taken(await self._queue.get())

    def get_nowait(self) -> tuple[str, bytes]:
        """The oldest message; there must be one."""
        return self._taken(self._queue.get_nowait())

    def empty(self) -> bool:
        """Whether nothing waits."""
        return self._queue.empty()

    def _taken(self, message: tuple[str, bytes]) -> tuple[str, bytes]:
        device = device_of(message[0])
        self._bytes -= len(message[1])
        self._waiting[device] -= 1
        if not self._waiting[device]:
            del self._waiting[device]
        return message
