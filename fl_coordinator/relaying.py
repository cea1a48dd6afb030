"""How rounds get announced: every region's relay is kept equal to the ledger.

What a relay should have is the newest announcement of each model, of an open round or of one that has ended. It is
handed over as one small message as soon as there is one, and again, with pauses, until the relay says by digest what it
took. So a relay that is down, slow or lying holds up nobody: the others have been told meanwhile, the round goes on
with the devices of their regions, and the round's record names who did not announce it, and why. One that comes back is
told what it missed.

That a round is over costs no message as a rule. A relay asks over HTTP, a long poll, what has ended of the rounds that
it has announced (`ends`), and its next question shows by digest what it took. Who does not ask, or asks and does not
come back with it, is sent it. A question counts for a region only with the word that its relay, and nobody else, was
given with its messages: regions share one token, and none shall speak for another. The word is of this process; after a
restart a message with a new one goes to each relay.

Whom to tell is a callable by region: a Flower node in that region, or, on a platform without relays, the coordinator's
own relay under the name "".
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import secrets
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from fl_coordinator.ledger import Ledger
from fl_coordinator.mailbox import Bell
from fl_coordinator.ports import Bridge, Clock, Tell
from fl_coordinator.recorded_rounds import every_round, newest_round
from fl_coordinator.rounds import Round, State
from model_delta.digest import digest_of
from model_delta.errors import AtollError, Malformed, NotFound

OWN, OWN_NAME = "", "coordinator"
"""The coordinator's own relay, which tells the devices of all regions; and what a round's record calls it."""
TELL_S = 30.0
"""How long a relay's node may take. One that comes online meanwhile is told at once."""
AT_ONCE_MAX = 16
PAUSE_MAX_S = 15.0
ROUNDS_KEPT = 16
GRACE_TICKS = 3
"""How long a relay that asks may take to fetch an end, retain it and say so, before it is sent. It needs a fraction of
that. Who asks in vain loses no more than one exchange takes with stock nodes (`fl.control.stock.exchange`)."""

_OPEN = frozenset({State.ANNOUNCED, State.COLLECTING})
_log = logging.getLogger("atoll.coordinator")


def through(bridge: Bridge, node: str, deadline_s: float = TELL_S) -> Tell:
    """Tells the relay that is the Flower node `node`."""

    async def tell(command: Mapping[str, Any]) -> Mapping[str, Any]:
        return (await bridge.command(command, [node], deadline_s))[node]

    return tell


def complaints(told: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What a person should know of a round's relays, from the record of it."""
    found = []
    any_came = any(one["contributions"] for one in told.values())
    for name, one in told.items():
        if "failure" in one and not one["contributions"]:
            found.append(f"relay of {name} did not announce it: {one['failure']}")
        elif any_came and one.get("devices", 0) > 0 and not one["contributions"]:
            found.append(f"relay of {name} says that it announced it, but none of its {one['devices']} devices came")
    return found


class RelayQuestion(msgspec.Struct, frozen=True):
    """A relay's question about ends: its `word`, and `have`, by model the digest of the announcement that is on its
    disk and acknowledged by its broker."""

    word: str
    have: dict[str, str]


class _Relay:
    """What one relay was told and has said."""

    def __init__(self, tell: Tell) -> None:
        self.tell = tell
        self.wanted = asyncio.Event()
        self.wanted.set()
        self.taken: dict[str, str] = {}  # model: digest of the announcement it has
        self.opened: dict[str, tuple[float, int]] = {}  # round: when it had announced it, to how many devices
        self.failure = "did not answer yet"
        self.word = secrets.token_urlsafe(16)
        self.news = Bell()
        self.asks: frozenset[str] = frozenset()  # the models of its newest question
        self.asking, self.asked = 0, float("-inf")  # questions that are open, and when the last one was answered
        self.graces: dict[str, float] = {}  # digest of an end that it lacks: until when it may fetch it


class Relaying:
    """Keeps the relays of one tenant informed. For one event loop."""

    def __init__(self, *, ledger: Ledger, relays: Mapping[str, Tell], clock: Clock, tick_s: float) -> None:
        if not relays:
            raise Malformed("relays: expected at least one, the coordinator's own if there are no others")
        self._ledger = ledger
        self._clock = clock
        self._tick_s = tick_s
        self._grace_s = GRACE_TICKS * tick_s
        self._relays = {region: _Relay(tell) for region, tell in relays.items()}
        self._heard = asyncio.Condition()

    def start(self, tasks: asyncio.TaskGroup) -> None:
        """Tell each relay what it lacks, each in a task of its own, until cancelled."""
        for region, relay in self._relays.items():
            tasks.create_task(self._follow(region, relay), name=f"relay {region}")

    def wake(self) -> None:
        """There may be something new to announce."""
        for relay in self._relays.values():
            relay.wanted.set()
            relay.news.ring()

    async def ends(self, region: str, question: RelayQuestion, wait_s: float) -> dict[str, bytes]:
        """What says that rounds are over whose announcements a region's relay has: sealed announcements by model, none
        if there are none within `wait_s` seconds. An end that it has counts as taken, as by its answer to a message.

        Raises NotFound for a word that this coordinator has not told that relay, Malformed for too many at once.
        """
        relay = self._relays.get(region)
        if relay is None or not hmac.compare_digest(relay.word.encode(), question.word.encode()):
            raise NotFound(f"relay {region[:64]!r}: was not given this word by this coordinator; a message brings one")
        if not 0 < len(question.have) <= AT_ONCE_MAX:
            raise Malformed(f"relay {region}: expected a question about 1 to {AT_ONCE_MAX} announcements")
        loop = asyncio.get_running_loop()
        until = loop.time() + wait_s
        relay.asks, relay.asking = frozenset(question.have), relay.asking + 1
        try:
            while True:
                rings = relay.news.rings
                ended = await asyncio.to_thread(self._ended, question.have)
                newer = {model: sealed for model, sealed in ended.items() if digest_of(sealed) != question.have[model]}
                for model in ended.keys() - newer.keys():
                    if relay.taken.get(model) != question.have[model]:
                        relay.taken[model] = question.have[model]
                        relay.wanted.set()
                if newer or len(ended) == len(question.have) or loop.time() >= until:
                    return newer
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout_at(until):
                        await relay.news.rung(rings)
        finally:
            relay.asking, relay.asked = relay.asking - 1, loop.time()

    async def announced(self, found: Round, patience_s: float) -> bool:
        """Whether any relay has announced the open round; waits up to `patience_s` for the first."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience_s), self._heard:
                await self._heard.wait_for(lambda: self._any(found))
        return self._any(found)

    def record(self, found: Round) -> dict[str, dict[str, Any]]:
        """By relay, for the round's record: `announced_s`, seconds after it was opened, and `devices` within reach
        (-1: not known), if it says that it announced the round, else `failure`; and how many `contributions` came from
        its region. What the record says already stands. Blocking."""
        regions = {record.device_id: record.region for record in self._ledger.devices()}
        came = Counter(regions.get(entry.device_id, "") for entry in self._ledger.contributions(found.round_id))
        told: dict[str, dict[str, Any]] = {}
        for region, relay in self._relays.items():
            name = region or OWN_NAME
            told[name] = {"failure": relay.failure}
            if found.round_id in relay.opened:
                at, devices = relay.opened[found.round_id]
                told[name] = {"announced_s": round(max(0.0, at - found.opened), 3), "devices": devices}
            before = found.figures.get("relays", {}).get(name, {})
            if "announced_s" in before:
                told[name] = dict(before)
            told[name]["contributions"] = came[region] if region else came.total()
        return told

    def _any(self, found: Round) -> bool:
        return any(found.round_id in relay.opened for relay in self._relays.values())

    async def _follow(self, region: str, relay: _Relay) -> None:
        pause_s = self._tick_s
        while True:
            relay.wanted.clear()
            try:
                due = await self._due(relay)
                if due:
                    await self._tell(relay, due)
                    pause_s = self._tick_s
                    continue
            except AtollError as error:
                if relay.failure != str(error):
                    _log.warning("relay %s: %s", region, error)
                relay.failure = str(error)[:300]
            except Exception as error:
                relay.failure = f"failed with {type(error).__name__}; see the log"
                _log.exception("relay %s", region)
            else:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout_at(min(relay.graces.values(), default=None)):
                        await relay.wanted.wait()
                continue
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await relay.wanted.wait()
            pause_s = min(PAUSE_MAX_S, 2 * pause_s)

    def _lacks(self, relay: _Relay) -> dict[str, Round]:
        """The rounds whose announcements a relay has not got, by model. Blocking."""
        newest = {found.task.model: found for found in every_round(self._ledger)}
        lacking = [one for one in newest.items() if relay.taken.get(one[0]) != digest_of(one[1].announcement)]
        return dict(lacking[:AT_ONCE_MAX])

    def _ended(self, models: Iterable[str]) -> dict[str, bytes]:
        """The newest announcements of those models whose newest round is over. Blocking."""
        newest = {model: newest_round(self._ledger, model) for model in models}
        return {model: found.announcement for model, found in newest.items() if found and found.at not in _OPEN}

    async def _due(self, relay: _Relay) -> dict[str, Round]:
        """What a relay lacks and is to be sent now: all but the ends that it is fetching."""
        lacks = await asyncio.to_thread(self._lacks, relay)
        now = asyncio.get_running_loop().time()
        asking = relay.asks if relay.asking or now - relay.asked <= self._grace_s else frozenset()
        ends = {
            model: digest_of(found.announcement)
            for model, found in lacks.items()
            if found.at not in _OPEN and (model in asking or digest_of(found.announcement) in relay.graces)
        }
        relay.graces = {digest: relay.graces.get(digest, now + self._grace_s) for digest in ends.values()}
        return {model: found for model, found in lacks.items() if model not in ends or relay.graces[ends[model]] <= now}

    async def _tell(self, relay: _Relay, lacks: Mapping[str, Round]) -> None:
        """One message. It is given up when there is something newer to say. Raises what the relay's refusal is."""
        announcements = {model: found.announcement for model, found in lacks.items()}
        telling = asyncio.ensure_future(relay.tell({"announcements": announcements, "word": relay.word}))
        try:
            while not telling.done():
                newer = asyncio.ensure_future(relay.wanted.wait())
                await asyncio.wait([telling, newer], return_when=asyncio.FIRST_COMPLETED)
                newer.cancel()
                if telling.done():
                    break
                relay.wanted.clear()
                now = await self._due(relay)
                if {one.announcement for one in now.values()} != {one.announcement for one in lacks.values()}:
                    relay.wanted.set()
                    return
            answer = telling.result()
        finally:
            telling.cancel()
            await asyncio.gather(telling, return_exceptions=True)
        await self._take(relay, lacks, answer)

    async def _take(self, relay: _Relay, lacks: Mapping[str, Round], answer: Mapping[str, Any]) -> None:
        taken, refused, devices = answer.get("taken"), answer.get("refused"), answer.get("reachable")
        if not isinstance(taken, Mapping) or not isinstance(refused, Mapping):
            raise Malformed("its answer: expected `taken` and `refused`, two maps by model")
        missing = []
        for model, found in lacks.items():
            if taken.get(model) != digest_of(found.announcement):
                missing.append(str(refused.get(model, "it did not say that it took this announcement"))[:300])
                continue
            relay.taken[model] = taken[model]
            if found.at in _OPEN:
                relay.opened[found.round_id] = (self._clock(), devices if isinstance(devices, int) else -1)
        while len(relay.opened) > ROUNDS_KEPT:
            del relay.opened[next(iter(relay.opened))]
        async with self._heard:
            self._heard.notify_all()
        if missing:
            raise Malformed("; ".join(missing))
