"""An aggregator reads the updates log at its own pace while rounds are open, and keeps what it will need.

Of each record it asks: is this a contribution to a round that is open and names me, by a device that the tenant's CA
knows, signed, and made for this round? Then it keeps a copy (`copies`), in one transaction with how far it has read, so
that a restart goes on there and counts nothing twice. Anything else it passes over: the log may hold other people's
records, torn or forged ones, and the same one many times. Nothing is decided here. What counts is what the coordinator
freezes; `complete` then fetches what is missing, drops what was left out, and names both.

A log that was cut off below what is wanted, or replaced, is said, and read from its first record.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence, Set
from typing import Protocol

from fl_coordinator.copies import Copies, HeldRound, Reached
from fl_coordinator.mailbox import Bell
from fl_coordinator.round_command import announced_round
from fl_coordinator.shares.bounds import contributions_max
from fl_coordinator.shares.contribution import Claim, KeptContribution, keep, mismatch, size_max, verify_claim
from fl_coordinator.threads import in_thread
from fl_coordinator.updates_log import RECORD_BYTES_MAX, LogPart
from model_delta.encoding import unpack
from model_delta.errors import AtollError, Malformed, NotFound, Unavailable, Untrusted
from model_delta.task import AggregatorKey, RoundTask
from model_delta.trust.updater import TrustAnchors

PER_DEVICE_MAX = 2
"""So many copies of one device are kept of a round: a log that somebody stuffs must not fill our disk."""
KEPT_S = 86_400.0
"""How long after a round's deadline its copies are kept at most, when the coordinator cannot say that it is over."""
TIDY_S = 10.0
"""How often it is asked which rounds are over, and how long it is not asked again about a round that is not open."""
RESULTS = ("kept", "refused", "of no open round", "gaps", "failures")
"""What `Following.counts` counts: records that were new and kept, records that were refused, those of rounds that are
not open, times that the log did not begin where it should, reads that failed."""
_NOT_OPEN_MAX = 1024
_PAUSE_FIRST_S, _PAUSE_MAX_S = 0.1, 5.0

_log = logging.getLogger("atoll.aggregator")

Announcement = Callable[[str], Awaitable[bytes]]
"""The packed signed announcement of a round that has not ended. Raises NotFound, Unavailable."""


class LogSource(Protocol):
    """A log to follow."""

    @property
    def name(self) -> str:
        """Which log it is: an offset in one says nothing of another."""

    async def read_from(self, offset: int) -> LogPart:
        """What is there from `offset` on, after a little waiting for more. Raises Unavailable, Malformed."""


class Following:
    """Follows `log` for the aggregator with the public `key`. For one event loop. `kept` is rung after records
    were kept; `counts` tells what became of all (`RESULTS`)."""

    def __init__(
        self,
        *,
        log: LogSource,
        announcement: Announcement,
        copies: Copies,
        key: AggregatorKey,
        anchors: TrustAnchors,
        ca_pem: bytes,
        revoked: Callable[[], Set[int]],
        clock: Callable[[], float],
        kept: Bell,
    ) -> None:
        self.counts: Counter[str] = Counter()
        self._log = log
        self._announcement = announcement
        self._copies = copies
        self._key = key
        self._anchors = anchors
        self._ca_pem = ca_pem
        self._revoked = revoked
        self._clock = clock
        self._kept = kept
        self._next = copies.reached(log.name)
        self._open: dict[str, tuple[RoundTask, int]] = {}
        self._not_open: dict[str, float] = {}  # round id -> when the coordinator said so
        self._tidy_at = 0.0

    @property
    def reached(self) -> int:
        """The offset that is read next."""
        return self._next

    async def run(self) -> None:
        """Follow until cancelled; what fails is tried again, with pauses."""
        pause, said = _PAUSE_FIRST_S, ""
        while True:
            try:
                await self.tidy()
                await self.step()
                await asyncio.sleep(0)  # a log that always has more must not keep the loop
                pause, said = _PAUSE_FIRST_S, ""
            except (AtollError, OSError) as error:
                self.counts["failures"] += 1
                if str(error) != said:
                    said = str(error)
                    _log.warning("%s; trying again", error)
                await asyncio.sleep(pause)
                pause = min(2 * pause, _PAUSE_MAX_S)

    async def step(self) -> int:
        """Read one part of the log and keep what belongs to us; how many records there were. Raises Unavailable and
        Malformed with nothing changed."""
        part = await self._log.read_from(self._next)
        if part.start != self._next:
            if self._next:
                self.counts["gaps"] += 1
                _log.warning(
                    "updates log %s: expected offset %d, it begins at %d; going on there. What is frozen and was "
                    "not read is fetched from the coordinator",
                    *(self._log.name, self._next, part.start),
                )
            self._next = part.start
        if not part.records:
            self._next = part.next
            return 0
        entries = await in_thread(self._parsed, part)
        for round_id in {claim.round_id for _, claim, _ in entries}:
            await self._look_up(round_id)
        arrived = await in_thread(self._verified, entries)
        new = await in_thread(self._copies.keep, arrived, Reached(self._log.name, part.next))
        self.counts["kept"] += new
        self._next = part.next
        if new:
            self._kept.ring()
        return len(part.records)

    async def tidy(self) -> None:
        """Remove the copies of rounds that are over; from time to time."""
        now = self._clock()
        if now < self._tidy_at:
            return
        self._tidy_at = now + TIDY_S
        for held in await in_thread(self._copies.rounds):
            if now <= held.deadline + KEPT_S:
                try:
                    await self._announcement(held.round_id)
                    continue
                except NotFound:
                    pass
                except Unavailable:
                    continue
            await in_thread(self._copies.forget, held.round_id)
            self._open.pop(held.round_id, None)
        self._not_open = {name: at for name, at in self._not_open.items() if now < at + TIDY_S}

    def _parsed(self, part: LogPart) -> list[tuple[KeptContribution, Claim, int]]:
        """The records that are contributions, with what they claim and how long they are."""
        found = []
        for _, record in part.records:
            entry = keep(record, RECORD_BYTES_MAX)
            if entry.flaw:
                self._refuse(entry, entry.flaw)
            else:
                found.append((entry, unpack(entry.claim, Claim), len(record)))
        return found

    async def _look_up(self, round_id: str) -> None:
        """Learn of a round that a record names, unless it is known already."""
        if round_id in self._open or self._clock() < self._not_open.get(round_id, 0.0) + TIDY_S:
            return
        try:
            envelope = await self._announcement(round_id)
            task, index = announced_round(envelope, round_id, self._anchors, self._key, self._clock())
        except NotFound:
            pass
        except (Untrusted, Malformed) as error:
            _log.warning("updates log %s: %s", self._log.name, error)
        else:
            await in_thread(self._copies.begin, HeldRound(round_id, task.deadline))
            self._open[round_id] = task, index
            return
        while len(self._not_open) >= _NOT_OPEN_MAX:
            del self._not_open[next(iter(self._not_open))]
        self._not_open[round_id] = self._clock()

    def _verified(
        self, entries: Sequence[tuple[KeptContribution, Claim, int]]
    ) -> Mapping[str, Sequence[KeptContribution]]:
        """What is kept of the entries, by round."""
        arrived: dict[str, list[KeptContribution]] = {}
        devices: dict[str, Counter[str]] = {}
        for entry, claim, size in entries:
            found = self._open.get(claim.round_id)
            if found is None:
                self.counts["of no open round"] += 1
                continue
            task, index = found
            try:
                verify_claim(entry.claim, entry.signature, self._ca_pem, self._revoked(), self._clock())
                if size > size_max(task):
                    raise Malformed(f"expected at most {size_max(task)} bytes, found {size}")
                reason = mismatch(claim, entry.masked_bytes, task)
                if reason:
                    raise Malformed(reason)
            except (Malformed, Untrusted) as error:
                self._refuse(entry, str(error))
                continue
            if claim.round_id not in devices:
                devices[claim.round_id] = Counter(self._copies.devices(claim.round_id).values())
            already = devices[claim.round_id]
            if already[entry.device_id] >= PER_DEVICE_MAX or already.total() >= PER_DEVICE_MAX * contributions_max(
                task
            ):
                self._refuse(entry, "too many of this device or round")
                continue
            already[entry.device_id] += 1
            arrived.setdefault(claim.round_id, []).append(entry.needed_by(index))
        return arrived

    def _refuse(self, entry: KeptContribution, reason: str) -> None:
        self.counts["refused"] += 1
        _log.info(
            "updates log %s: contribution of %r is not kept: %s", self._log.name, entry.device_id[:64], reason[:300]
        )
