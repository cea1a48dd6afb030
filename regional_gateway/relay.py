"""A region's relay: tells the region's devices which rounds are open.

The coordinator hands it signed announcements (`model_delta.task`), one small message a round; it publishes them
retained at QoS 1, where this region's devices listen. It is believed by nobody: a device checks the signature itself,
so a relay can withhold an announcement or delay it, and not make one up. It checks before it publishes, all the same,
so that a stranger's bytes never reach the devices, and an older announcement never replaces a newer one.

What it took is on disk before it is published, and published again after each reconnection and now and then: broker and
relay may both lose their memory at any moment.

That a round is over it learns by asking (`ask`), from its announcement until its deadline, so that it costs no second
message. What the answer holds is checked as what a message holds, and published before the next question says so. The
coordinator knows the relay that asks by the word which came with its messages. Where nobody can be asked, the message
comes all the same. A coordinator that has no relays is its own, with `region` "".
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from model_delta import topics
from model_delta.digest import digest_of
from model_delta.encoding import pack, unpack
from model_delta.errors import AtollError, Malformed, NotFound, SignatureInvalid, Unavailable
from model_delta.store import DirectoryStore
from model_delta.task import RoundTask
from model_delta.trust.updater import TrustAnchors, TrustState, accept_task
from monitoring.metrics import Metrics
from regional_gateway.supply import Link

log = logging.getLogger(__name__)

ANNOUNCEMENTS_MAX = 16
ANNOUNCEMENT_BYTES_MAX = 128 * 1024
MODELS_MAX = 256
REPUBLISH_S = 60.0
TICK_S = 0.5
WORD_CHARS_MAX = 128
ASK_AFTER_S = 60.0
"""For how long after its deadline a round is asked after: a coordinator may be busy or away for a moment just then."""
ASK_PAUSE_FIRST_S, ASK_PAUSE_MAX_S = 0.05, 2.0

_KIND, _WORD = "announcement", "word"

Ask = Callable[[str, Mapping[str, str]], Awaitable[Mapping[str, Any]]]
"""Asks the coordinator which rounds are over, by the relay's word, and by model the digest of the announcement that it
has: newer sealed announcements by model, none when there is none after a little waiting. Raises NotFound when the word
is not known (any more), Unavailable, Malformed."""


class Kept(msgspec.Struct, frozen=True):
    """The newest announcement of a model, and how far announcements have been seen to advance. `deadline` is that of an
    open round in Unix seconds, 0 of one that is over."""

    model: str
    announcement: bytes
    trust: TrustState
    format: int = 1
    deadline: int = 0


class Relay:
    """Announces rounds of `tenant` in `region`. For one event loop.

    `anchors` holds the keys of the role `round` and may block; `renew` learns newer keys. `reachable` says how many
    devices were heard lately. Without `ask` every end comes as a message. What is in `folder` belongs to this relay
    alone.
    """

    def __init__(
        self,
        *,
        tenant: str,
        region: str,
        link: Link,
        folder: Path,
        anchors: Callable[[], TrustAnchors],
        renew: Callable[[], Awaitable[None]] | None = None,
        reachable: Callable[[], int] | None = None,
        ask: Ask | None = None,
        metrics: Metrics | None = None,
        clock: Callable[[], float] = time.time,
        tick_s: float = TICK_S,
    ) -> None:
        self._tenant, self._region, self._link = tenant, region, link
        self._store = DirectoryStore(folder)
        self._anchors, self._renew, self._reachable, self._clock = anchors, renew, reachable, clock
        self._ask, self._word = ask, ""
        self._tick_s = tick_s
        self._kept: dict[str, Kept] = {}
        self._published: dict[str, bytes] = {}  # on the present connection
        self._loaded = False
        self._taking = asyncio.Lock()
        self._count = (metrics or Metrics()).counter("relay_announcements", "Announcements by result.", ("result",))

    async def carry_out(self, command: Mapping[str, Any]) -> dict[str, Any]:
        """Announce what `command` holds, `{"announcements": {model: sealed envelope}, "word": what to ask by}`.

        The answer names what was taken by digest, `taken`, why the rest was not, `refused`, and `reachable` devices
        (-1: not known). What was taken is on disk and acknowledged by the broker. Raises Malformed for another command,
        and Unavailable while the broker is away or the disk full.
        """
        given = command.get("announcements")
        if not isinstance(given, Mapping) or not 0 < len(given) <= ANNOUNCEMENTS_MAX:
            raise Malformed(f"relay {self._region}: expected 1 to {ANNOUNCEMENTS_MAX} announcements by model")
        taken: dict[str, str] = {}
        refused: dict[str, str] = {}
        for model, sealed in given.items():
            if not isinstance(model, str) or not isinstance(sealed, bytes) or len(sealed) > ANNOUNCEMENT_BYTES_MAX:
                raise Malformed(f"relay {self._region}: expected announcements of up to {ANNOUNCEMENT_BYTES_MAX} bytes")
            why_not = await self._announce(model, sealed, "taken")
            if why_not:
                refused[model] = why_not
            else:
                taken[model] = digest_of(sealed)
        await self._learn_word(command.get("word"))
        return {"taken": taken, "refused": refused, "reachable": self._reachable() if self._reachable else -1}

    async def run(self) -> None:
        """Keep the broker's retained messages equal to what was taken, and ask for the ends of open rounds, until
        cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._keep_published(), name="announcements")
            if self._ask is not None:
                tasks.create_task(self._ask_for_ends(self._ask), name="ends of rounds")

    async def _announce(self, model: str, sealed: bytes, counted: str) -> str:
        """Have an announcement on disk and acknowledged by the broker; why not if it is refused. Raises Unavailable."""
        try:
            async with self._taking:
                await self._take(model, sealed)
                await self._publish(self._kept[model])
        except Unavailable:
            self._count.add(1, "failed")
            raise
        except AtollError as error:
            self._count.add(1, "refused")
            log.warning("announcement of %r refused: %s", model[:64], error)
            return f"{type(error).__name__}: {error}"[:300]
        self._count.add(1, counted)
        return ""

    async def _ask_for_ends(self, ask: Ask) -> None:
        """Learn which rounds are over, as long as one is open and there is a word to ask by."""
        fetched: dict[str, str] = {}  # what the last answer held, which the next question tells
        pause_s, said = ASK_PAUSE_FIRST_S, ""
        while True:
            try:
                async with self._taking:
                    await self._load()
                have = {**fetched, **self._open_rounds(ANNOUNCEMENTS_MAX - len(fetched))}
                if have and self._word:
                    fetched = await self._fetched(ask, have)
                    pause_s, said = ASK_PAUSE_FIRST_S, ""
                else:
                    pause_s = self._tick_s
            except (AtollError, OSError) as error:
                fetched, pause_s = {}, min(2 * pause_s, ASK_PAUSE_MAX_S)
                if str(error) != said:
                    said = str(error)
                    log.warning("relay %s: %s; asking again for what is over", self._region, error)
            await asyncio.sleep(pause_s)

    async def _fetched(self, ask: Ask, have: Mapping[str, str]) -> dict[str, str]:
        """The digests of what was announced from the answer to one question. Raises Unavailable, Malformed."""
        word = self._word
        try:
            newer = await ask(word, have)
        except NotFound:
            if self._word == word:
                self._word = ""  # the next message brings another
            return {}
        found: dict[str, str] = {}
        why_not = ""
        for model in newer.keys() & have.keys():
            sealed = newer[model]
            if not isinstance(sealed, bytes) or len(sealed) > ANNOUNCEMENT_BYTES_MAX:
                raise Malformed(f"relay {self._region}: expected announcements of up to {ANNOUNCEMENT_BYTES_MAX} bytes")
            refused = await self._announce(model, sealed, "fetched")
            if refused:
                why_not = refused
            else:
                found[model] = digest_of(sealed)
        if why_not and not found:  # not to be asked for again at once
            raise Malformed(f"was answered with what it refuses: {why_not}")
        return found

    def _open_rounds(self, most: int) -> dict[str, str]:
        """The digests of announcements whose rounds may end any moment, by model; at `most`, those that end first."""
        now = self._clock()
        still = [kept for kept in self._kept.values() if kept.deadline and now <= kept.deadline + ASK_AFTER_S]
        still.sort(key=lambda kept: kept.deadline)
        return {kept.model: digest_of(kept.announcement) for kept in still[:most]}

    async def _learn_word(self, word: object) -> None:
        if self._ask is None or word == self._word or not isinstance(word, str) or not 0 < len(word) <= WORD_CHARS_MAX:
            return
        self._word = word
        try:
            await asyncio.to_thread(self._store.put, _WORD, _WORD, word.encode())
        except (AtollError, OSError) as error:  # it is needed after a restart only, and the message comes without it
            log.warning("relay %s: its word was not kept: %s", self._region, error)

    async def _keep_published(self) -> None:
        connected, republish_at, said = False, 0.0, ""
        while True:
            now = self._clock()
            if not self._link.connected:
                connected = False
            elif not connected or not republish_at - REPUBLISH_S <= now < republish_at:  # the clock may be set back
                try:
                    await self._publish_all()
                    connected, republish_at, said = True, now + REPUBLISH_S, ""
                except Unavailable:
                    pass  # the broker is away; the next tick tries again
                except (AtollError, OSError) as error:
                    if str(error) != said:
                        said = str(error)
                        log.warning("relay %s: %s; trying again", self._region, error)
            await asyncio.sleep(self._tick_s)

    async def _publish_all(self) -> None:
        async with self._taking:
            await self._load()
            self._published.clear()
            for kept in self._kept.values():
                await self._publish(kept)

    async def _publish(self, kept: Kept) -> None:
        if self._published.get(kept.model) == kept.announcement:
            return
        topic = topics.round_topic(self._tenant, kept.model, self._region)
        await self._link.publish(topic, kept.announcement, retain=True)
        self._published[kept.model] = kept.announcement

    async def _take(self, model: str, sealed: bytes) -> None:
        """Keep an announcement, unless it is the one that is kept. Raises what `accept_task` does, and Unavailable."""
        await self._load()
        before = self._kept.get(model)
        if before is not None and before.announcement == sealed:
            return
        if before is None and len(self._kept) >= MODELS_MAX:
            raise Malformed(f"relay {self._region}: announces {MODELS_MAX} models already; use a tenant's own relay")
        try:
            task, trust = await asyncio.to_thread(self._judge, model, sealed)
        except SignatureInvalid:
            if self._renew is None:
                raise
            await self._renew()  # the role's keys may have been replaced
            task, trust = await asyncio.to_thread(self._judge, model, sealed)
        kept = Kept(model, sealed, trust, deadline=task.deadline if task.open else 0)
        await asyncio.to_thread(self._store.put, _KIND, digest_of(model.encode()), pack(kept))
        self._kept[model] = kept

    def _judge(self, model: str, sealed: bytes) -> tuple[RoundTask, TrustState]:
        before = self._kept[model].trust if model in self._kept else TrustState()
        return accept_task(sealed, model, self._anchors(), before, self._clock())

    async def _load(self) -> None:
        """Remember what was taken before a restart."""
        if self._loaded:
            return
        for name in await asyncio.to_thread(self._store.names, _KIND):
            try:
                kept = unpack(await asyncio.to_thread(self._store.get, _KIND, name), Kept)
            except Malformed as error:  # the coordinator has it
                log.warning("relay %s: forgets a damaged announcement: %s", self._region, error)
                continue
            self._kept.setdefault(kept.model, kept)
        with contextlib.suppress(NotFound):
            self._word = self._word or (await asyncio.to_thread(self._store.get, _WORD, _WORD)).decode(errors="replace")
        self._loaded = True
