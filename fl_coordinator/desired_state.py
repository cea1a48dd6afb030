"""What devices should find on the broker at any time: the newest plan of each model.

It is retained there, so a device that was away learns it on its return. The broker may have lost it, so everything is
published again after each reconnect, and now and then. Announcements of rounds are the relays' (`relaying`).
"""

from __future__ import annotations

import asyncio
import contextlib

from fl_coordinator.ledger import Ledger
from fl_coordinator.ports import Clock, Link
from model_delta import topics
from model_delta.errors import Unavailable

REPUBLISH_S = 60.0


class DesiredState:
    """Keeps the broker's retained messages equal to the ledger. For one event loop."""

    def __init__(self, *, tenant: str, ledger: Ledger, link: Link, clock: Clock) -> None:
        self._tenant = tenant
        self._ledger = ledger
        self._link = link
        self._clock = clock
        self._publishing = asyncio.Lock()
        self._published: dict[str, bytes] = {}
        self._was_connected = False
        self._republish_at = 0.0

    async def publish(self) -> None:
        """Publish newest plans that this broker may not have: new ones, and all after a reconnect.

        One at a time, so that an older plan never overtakes a newer one."""
        async with self._publishing:
            await self._publish_missing()

    async def publish_soon(self) -> None:
        """Publish now if the broker is there; the tick does it in any case, this only saves the wait."""
        with contextlib.suppress(Unavailable):
            await self.publish()

    async def _publish_missing(self) -> None:
        if not self._link.connected:
            self._was_connected = False
            return
        now = self._clock()
        if not self._was_connected or now >= self._republish_at:
            self._published.clear()
            self._republish_at = now + REPUBLISH_S
        self._was_connected = True
        wanted = await asyncio.to_thread(self._retained)
        for topic, payload in wanted.items():
            if self._published.get(topic) != payload:
                await self._link.publish(topic, payload, retain=True)
                self._published[topic] = payload

    def _retained(self) -> dict[str, bytes]:
        wanted: dict[str, bytes] = {}
        for model in self._ledger.planned_models():
            newest = self._ledger.plan(model)
            if newest is not None:
                wanted[topics.plan_topic(self._tenant, model)] = newest[1]
        return wanted
