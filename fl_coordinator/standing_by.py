"""An aggregator stands by: from a round's announcement until its frozen list is there, it asks for the list.

The other end is `standing`. What stands is checked as a command is, signature and all, before anybody waits; what is
fetched is a `RoundCommand` and judged as one that came by itself, and must be of the round as it was announced. A
coordinator that is away is asked again, with pauses, until the command's time is over. One that says that it is over is
believed: an attempt can still come as a command.

Of several standing commands of one round (the coordinator started anew, or Flower did) all get what the first gets, so
that an aggregator which says that it did nothing has no second hand in which it did.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from fl_coordinator.round_command import WAITS_MAX_S, RoundCommand, StandingCommand, announced_round, stands_s
from model_delta.encoding import pack, unpack, unpack_plain
from model_delta.errors import Expired, Malformed, NotFound, Unavailable, Untrusted
from model_delta.task import AggregatorKey, terms_of
from model_delta.trust.updater import TrustAnchors

_PAUSE_FIRST_S, _PAUSE_MAX_S = 0.05, 2.0

FetchAttempt = Callable[[str], Awaitable[bytes | None]]
"""The packed `RoundCommand` that a round's aggregators stand by for, by round id; None when it is not there yet, after
a little waiting. Raises NotFound when nobody is to wait for it, Unavailable."""
Run = Callable[[Mapping[str, Any]], Awaitable[dict[str, Any]]]
"""Carries out a `RoundCommand`, as a map."""


class StoodDown(Unavailable):
    """The coordinator says that nobody is to wait for the attempt: the round is over, or it was sent as a command."""


class StandingBy:
    """The rounds that the aggregator with this `key` stands by for. For one event loop. `clock` gives Unix seconds."""

    def __init__(
        self, *, anchors: TrustAnchors, key: AggregatorKey, fetch: FetchAttempt, run: Run, clock: Callable[[], float]
    ) -> None:
        self._anchors = anchors
        self._key = key
        self._fetch = fetch
        self._run = run
        self._clock = clock
        self._waiting: dict[str, tuple[str, asyncio.Task[dict[str, Any]]]] = {}

    async def answer(self, command: Mapping[str, Any]) -> dict[str, Any]:
        """What the attempt's command is answered with, once it is there and was carried out.

        Raises what `round_command.announced_round` does, StoodDown when the coordinator says that it is over, Expired
        for a round whose list can no longer come, Unavailable when it did not come in time, and what `run` raises.
        """
        wanted = unpack(pack(dict(command)), StandingCommand)
        now = self._clock()
        task, _ = announced_round(wanted.task, wanted.round_id, self._anchors, self._key, now)
        left_s = min(stands_s(command) or 0.0, task.deadline + WAITS_MAX_S - now)
        if left_s <= 0:
            raise Expired(f"round {wanted.round_id!r}: its list was to come until {-left_s:.0f} s ago")
        terms, work = self._waiting.get(wanted.round_id, ("", None))
        if work is None:
            terms = terms_of(task)
            work = asyncio.create_task(
                self._carried_out(wanted.round_id, terms, left_s), name=f"standing by for {wanted.round_id}"
            )
            self._waiting[wanted.round_id] = terms, work
            work.add_done_callback(lambda _: self._waiting.pop(wanted.round_id))
        if terms != terms_of(task):
            raise Untrusted(f"round {wanted.round_id!r}: is announced with other terms than at first")
        return await asyncio.shield(work)

    async def _carried_out(self, round_id: str, terms: str, left_s: float) -> dict[str, Any]:
        data = await self._fetched(round_id, left_s)
        found = unpack(data, RoundCommand)
        if found.round_id != round_id:
            raise Malformed(f"round {round_id!r}: expected its attempt, found one of {found.round_id[:200]!r}")
        task, _ = announced_round(found.task, round_id, self._anchors, self._key, self._clock())
        if terms_of(task) != terms:
            raise Untrusted(f"round {round_id!r}: its attempt is of other terms than were announced")
        return await self._run(unpack_plain(data))

    async def _fetched(self, round_id: str, left_s: float) -> bytes:
        loop, pause_s, reason = asyncio.get_running_loop(), _PAUSE_FIRST_S, "there is none yet"
        end = loop.time() + left_s
        while True:
            try:
                data = await self._fetch(round_id)
                if data is not None:
                    return data
                pause_s = _PAUSE_FIRST_S
            except NotFound as error:
                raise StoodDown(f"round {round_id!r}: {error}") from None
            except Unavailable as error:
                pause_s, reason = min(2 * pause_s, _PAUSE_MAX_S), str(error)
            if loop.time() + pause_s >= end:
                raise Unavailable(f"round {round_id!r}: no frozen list came within {left_s:.0f} s: {reason}")
            await asyncio.sleep(pause_s)
