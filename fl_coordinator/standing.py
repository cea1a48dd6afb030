"""One Flower message to each aggregator a round: it stands by from the announcement on, and fetches the list itself.

Flower by its stock nodes takes seconds from a command to its answer, so a round that told its aggregators only when its
list is frozen would wait for that a second time. Instead they get a standing command together with the announcement.
From then on each asks the coordinator over HTTP for the attempt (`attempt_for`, a long poll); the answers to the
standing command are those of the attempt.

To whoever has attempts carried out this is a bridge like the other (`ports.Bridge`), which it falls back on: where no
command stands, or one of the three does not ask, or does not come for the attempt, the same attempt goes out as a
command of its own, to all three. An aggregator that has it from both sides carries it out once
(`Aggregator.run_round`). A command stands for one attempt: the next ones are sent. Nothing here survives a restart. A
coordinator that starts while a round collects has the three stand by again; one that starts later sends.

What is said about nodes that surely did nothing (`CommandFailed.undone`, `fetched`) counts whoever has fetched the
attempt from here as one that may have carried it out, whether the bytes arrived or not.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from fl_coordinator.flower_bridge import CommandFailed
from fl_coordinator.mailbox import Bell
from fl_coordinator.ports import StandingBridge
from fl_coordinator.round_command import StandingCommand
from model_delta.encoding import pack
from model_delta.errors import AtollError, NotFound, Unavailable

GRACE_TICKS, TRAVEL_TICKS = 2, 8
"""How long an aggregator that has asked before may take to ask again, and then to come for the attempt; and how long
after the announcement one that has not asked yet may still be on its way (see `fl.control.stock.exchange`)."""

Answers = dict[str, dict[str, Any]]
"""What each node answers, by its name."""

_log = logging.getLogger("atoll.coordinator")


class _Place:
    """Where the aggregators of one round ask for its attempt. `answers` are on their way, and are expected once `due`
    says within how many seconds."""

    def __init__(self, names: Sequence[str], due: asyncio.Future[float], answers: asyncio.Task[Answers]) -> None:
        self.names = frozenset(names)
        self.taken: set[str] = set()
        self._due = due
        self._answers = answers
        self._attempt: tuple[bytes, asyncio.Event] | None = None
        self._asking: Counter[str] = Counter()
        self._news = Bell()
        self._began = answers.get_loop().time()
        self._over = False
        answers.add_done_callback(lambda _: self._news.ring())

    @property
    def stands(self) -> bool:
        """Whether anybody waits for the answers."""
        return not self._over and not self._answers.done()

    @property
    def all_ask(self) -> bool:
        """Whether each aggregator asks at this moment."""
        return all(self._asking[name] > 0 for name in self.names)

    @property
    def all_took(self) -> bool:
        """Whether each aggregator was given the attempt."""
        return self.taken >= self.names

    async def asked(self, name: str, wait_s: float) -> bytes | None:
        """See `Standing.attempt_for`."""
        self._asking[name] += 1
        self._news.ring()
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    while self._attempt is None and self.stands:
                        await self._news.rung()
        finally:
            self._asking[name] -= 1
        if self._attempt is None or not self.stands:
            return None
        attempt, fetched = self._attempt  # nothing is awaited from here on: whoever gets it is counted
        fetched.set()
        self.taken.add(name)
        self._news.ring()
        return attempt

    def put_up(self, attempt: bytes, deadline_s: float, fetched: asyncio.Event) -> None:
        """From now on whoever asks gets this; the answers may take `deadline_s`."""
        self._attempt = attempt, fetched
        self._due.set_result(deadline_s)
        self._news.ring()

    async def until(self, holds: Callable[[], bool], seconds: float) -> bool:
        """Whether it holds within so many seconds, while the answers are waited for or after they have come."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while not holds() and self.stands:
                    await self._news.rung()
        return holds()

    def patience_s(self, grace_s: float, travel_s: float) -> float:
        """How long it is worth waiting for those who do not ask at this moment."""
        if all(name in self._asking for name in self.names):
            return grace_s
        return max(grace_s, self._began + travel_s - self._answers.get_loop().time())

    async def answered(self) -> Answers:
        """What the aggregators answer. Raises CommandFailed."""
        return await asyncio.shield(self._answers)

    async def end(self) -> None:
        """Whoever asks from now on hears that it is over."""
        self._over = True
        self._news.ring()
        self._answers.cancel()
        await asyncio.gather(self._answers, return_exceptions=True)


class Standing:
    """The standing commands of one coordinator, on its `bridge`. For one event loop."""

    def __init__(self, bridge: StandingBridge, tick_s: float = 1.0) -> None:
        self._bridge = bridge
        self._grace_s, self._travel_s = GRACE_TICKS * tick_s, TRAVEL_TICKS * tick_s
        self._places: dict[str, _Place] = {}

    def begin(self, round_id: str, announcement: bytes, aggregators: Sequence[str], stands_s: float) -> None:
        """Have the three stand by for the attempt at a round, for so many seconds; unless they do. It is not waited
        for, and nothing depends on it."""
        if round_id in self._places:
            return
        command = StandingCommand(round_id=round_id, task=announcement, stands_s=stands_s)
        due: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        answers = asyncio.create_task(
            self._bridge.command(msgspec.structs.asdict(command), aggregators, stands_s, due=due),
            name=f"standing command of {round_id}",
        )
        answers.add_done_callback(lambda ended: _say_why(round_id, due.done(), ended))
        self._places[round_id] = _Place(aggregators, due, answers)

    async def end(self, round_id: str) -> None:
        """The round needs no attempt any more, or not by this way."""
        place = self._places.pop(round_id, None)
        if place is not None:
            await place.end()

    async def attempt_for(self, round_id: str, aggregator: str, wait_s: float) -> bytes | None:
        """The packed `RoundCommand` of the round's attempt for one who stands by for it; None when it is not there
        after `wait_s` seconds. Raises NotFound when nobody is to wait for it (any more)."""
        place = self._places.get(round_id)
        if place is None or aggregator not in place.names or not place.stands:
            raise NotFound(f"round {round_id[:200]}: no command stands for {aggregator[:64]!r}")
        found = await place.asked(aggregator, wait_s)
        if found is None and not place.stands:
            raise NotFound(f"round {round_id[:200]}: its standing command is over")
        return found

    async def command(
        self,
        payload: Mapping[str, Any],
        nodes: Sequence[str],
        deadline_s: float,
        fetched: asyncio.Event | None = None,
    ) -> Answers:
        """Have the attempt that `payload` describes (a `RoundCommand`) carried out; see `ports.Bridge`."""
        fetched = fetched or asyncio.Event()
        end = asyncio.get_running_loop().time() + deadline_s
        round_id = str(payload["round_id"])
        place = self._places.get(round_id)
        if place is not None:
            try:
                if await self._taken_up(place, payload, deadline_s, fetched):
                    return await place.answered()
            finally:
                await self.end(round_id)
        taken = frozenset() if place is None else frozenset(place.taken)
        if place is not None:
            _log.warning("round %s: its standing command was not taken up by all; asking anew", round_id)
        try:
            left_s = end - asyncio.get_running_loop().time()
            return await self._bridge.command(payload, nodes, left_s, fetched)
        except CommandFailed as error:
            # Who fetched the attempt may carry it out from there, whatever became of the second message.
            raise CommandFailed(str(error), error.replies, error.failures, error.undone - taken) from None
        except Unavailable as error:
            failures = dict.fromkeys(nodes, str(error))
            raise CommandFailed(str(error), {}, failures, failures.keys() - taken) from None

    async def _taken_up(
        self, place: _Place, payload: Mapping[str, Any], deadline_s: float, fetched: asyncio.Event
    ) -> bool:
        """Whether all three have the attempt. It is put up only once all three ask for it: who begins early waits for
        the others, and its patience is shorter than Flower's way may be."""
        most_s = deadline_s / 4
        patience_s = min(most_s, place.patience_s(self._grace_s, self._travel_s))
        if not await place.until(lambda: place.all_ask, patience_s) or not place.stands:
            return False
        place.put_up(pack(dict(payload)), deadline_s, fetched)
        return await place.until(lambda: place.all_took, min(most_s, self._grace_s))


def _say_why(round_id: str, due: bool, ended: asyncio.Task[Answers]) -> None:
    """Log why a command stands no more, unless it was due: whoever has the attempt carried out hears that itself."""
    if ended.cancelled():
        return
    error = ended.exception()
    if isinstance(error, AtollError):
        if not due:
            _log.warning("round %s: its standing command: %s", round_id, error)
    elif error is not None:
        _log.error("round %s: its standing command", round_id, exc_info=error)
