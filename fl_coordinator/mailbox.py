"""Messages of the other two aggregators that arrived and were not yet asked for."""

from __future__ import annotations

import asyncio

from fl_coordinator.channel import ChannelMessage
from model_delta.errors import Malformed

MAILBOX_BYTES_MAX = 64 << 20
_MESSAGES_MAX = 4096
_ROUNDS_MAX = 64


class Bell:
    """Rung for everybody who waits at that moment; `rings` counts. For one event loop at a time."""

    def __init__(self) -> None:
        self.rings = 0
        self._waiting: set[asyncio.Future[None]] = set()

    def ring(self) -> None:
        """Wake all who wait."""
        self.rings += 1
        for waiter in self._waiting:
            if not waiter.done():
                waiter.set_result(None)

    async def rung(self, since: int | None = None) -> None:
        """Return when it is rung next; at once if that was more than `since` times already."""
        if since is not None and self.rings > since:
            return
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.add(waiter)
        try:
            await waiter
        finally:
            self._waiting.discard(waiter)


class Mailbox:
    """Of bounded size, the oldest messages go first. `arrival` is rung for each message."""

    def __init__(self) -> None:
        self.arrival = Bell()
        self._messages: list[ChannelMessage] = []
        self._size = 0
        self._over: dict[str, int] = {}  # round -> the last attempt that ended

    def add(self, message: ChannelMessage) -> None:
        """Keep a message. Raises Malformed for one that is too long."""
        if len(message.box) > MAILBOX_BYTES_MAX:
            raise Malformed(f"mailbox: expected at most {MAILBOX_BYTES_MAX} bytes, found {len(message.box)}")
        if message.attempt <= self._over.get(message.round_id, 0):
            return
        self._messages.append(message)
        self._size += len(message.box)
        while self._size > MAILBOX_BYTES_MAX or len(self._messages) > _MESSAGES_MAX:
            self._size -= len(self._messages.pop(0).box)
        self.arrival.ring()

    def find(self, round_id: str, attempt: int, step: str, sender: str) -> list[ChannelMessage]:
        """The messages of a step by a sender, as they arrived."""
        wanted = (round_id, attempt, step, sender)
        return [m for m in self._messages if (m.round_id, m.attempt, m.step, m.sender) == wanted]

    def discard(self, round_id: str, attempt: int) -> None:
        """Forget this and earlier attempts of a round, and what still arrives for them."""
        self._over[round_id] = max(attempt, self._over.pop(round_id, 0))
        while len(self._over) > _ROUNDS_MAX:
            del self._over[next(iter(self._over))]
        self._messages = [m for m in self._messages if m.round_id != round_id or m.attempt > attempt]
        self._size = sum(len(m.box) for m in self._messages)
