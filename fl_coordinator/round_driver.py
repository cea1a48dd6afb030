"""Drives federated rounds: walks each through the table in `rounds`, and has done what the table asks for.

`round_announcing` begins a round, `round_opening` has it opened by the aggregators, `round_candidate` judges and
releases what came of it; waiting for contributions and freezing them is here.

Each command is idempotent and its result durable before the state says so; a coordinator that died continues in the
state in which it was. Blocking work (the ledger, the log, signatures, evaluation) runs in threads.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable

import msgspec

from fl_coordinator.admission import OVER_BUDGET
from fl_coordinator.intake import Intake
from fl_coordinator.ledger import Ledger
from fl_coordinator.ports import Clock, Note, UpdatesLog
from fl_coordinator.recorded_rounds import every_round, recorded_round, save_round
from fl_coordinator.relaying import Relaying, complaints
from fl_coordinator.rollout_driver import AWAKE_S
from fl_coordinator.round_announcing import Announcing, signed_task
from fl_coordinator.round_candidate import Candidates
from fl_coordinator.round_opening import Opening
from fl_coordinator.rounds import Command, Event, Round, RoundSpec, State, step
from fl_coordinator.shares.bounds import contributions_max
from fl_coordinator.standing import Standing
from fl_coordinator.threads import in_thread
from model_delta import merkle
from model_delta.encoding import unpack
from model_delta.errors import AtollError, NotFound, Unavailable
from model_delta.keys.keyring import Keyring
from model_delta.task import PASSING, RoundTask
from model_delta.trust.signing import open_envelope
from monitoring.metrics import Counter

LEFT_OUT_FIRST_S = 2.0
"""How long a round waits with its announcement for the devices that it leaves out to be told."""

_log = logging.getLogger("atoll.coordinator")


class RoundDriver:
    """Every round of this coordinator. For one event loop. `due` takes the ids of rounds that `run` drives."""

    def __init__(
        self,
        *,
        ledger: Ledger,
        log: UpdatesLog,
        keyring: Keyring,
        relaying: Relaying,
        standing: Standing,
        intake: Intake,
        announcing: Announcing,
        opening: Opening,
        candidates: Candidates,
        failures: Counter,
        clock: Clock,
        tick_s: float,
        note: Note,
        publish_soon: Callable[[], Awaitable[None]],
    ) -> None:
        self.due: asyncio.Queue[str] = asyncio.Queue()
        self._ledger = ledger
        self._log = log
        self._keyring = keyring
        self._relaying = relaying
        self._standing = standing
        self._intake = intake
        self._announcing = announcing
        self._opening = opening
        self._candidates = candidates
        self._count_failures = failures
        self._clock = clock
        self._tick_s = tick_s
        self._note = note
        self._publish_soon = publish_soon
        self._opening_one = asyncio.Lock()
        self._stops: dict[str, asyncio.Event] = {}
        self._driving: set[str] = set()
        self._telling: dict[str, asyncio.Task[None]] = {}

    def recall(self) -> list[str]:
        """The rounds that a coordinator which starts must go on with. Blocking."""
        for round_id in self._ledger.aborted_rounds():
            self._stop_of(round_id).set()
        return [found.round_id for found in every_round(self._ledger) if found.live]

    async def run(self, tasks: asyncio.TaskGroup) -> None:
        """Give each round that is due a task of its own, until cancelled."""
        while True:
            round_id = await self.due.get()
            if round_id not in self._driving:
                self._driving.add(round_id)
                tasks.create_task(self._drive(round_id), name=f"round {round_id}")

    async def open(self, spec: RoundSpec) -> Round:
        """Announce a federated round, or find the one of this name. Raises Malformed for a spec that cannot work,
        Unavailable while another one is open."""
        async with self._opening_one:  # of two askers at once the second sees what the first was given
            opened = await in_thread(self._announcing.announced, spec.checked())
        self.due.put_nowait(opened.round_id)
        return opened

    async def abort(self, round_id: str) -> Round:
        """Stop a round before its result is published. An attempt at opening is not waited for: nothing that the
        aggregators still answer is put together, though they may have done their part. Raises NotFound."""
        found = await asyncio.to_thread(self.round, round_id)
        if found.live:
            await in_thread(self._ledger.abort_round, round_id)
            self._stop_of(round_id).set()
            async with self._intake.admitted:
                self._intake.admitted.notify_all()
            self.due.put_nowait(round_id)  # in case that nobody drives it any more
        return found

    def _stop_of(self, round_id: str) -> asyncio.Event:
        return self._stops.setdefault(round_id, asyncio.Event())

    def round(self, round_id: str) -> Round:
        """A round as it stands. Raises NotFound."""
        return recorded_round(self._ledger, round_id)

    def frozen_contribution(self, round_id: str, digest: str) -> bytes:
        """One contribution of a frozen round from the log. Blocking. Raises NotFound when it is not in the frozen list,
        or of a round that has ended, Unavailable before the freeze."""
        found = self.round(round_id)
        if not found.root:
            raise Unavailable(f"round {round_id}: not frozen yet, it is {found.state}")
        for entry in self._ledger.contributions(round_id):
            if entry.digest == digest and digest in found.frozen:
                return self._log.read(entry.log_offset)
        raise NotFound(f"round {round_id}: no contribution {digest[:16]}… was frozen")

    def announcement(self, round_id: str) -> bytes:
        """The packed signed announcement of a round that has not ended. Blocking. Raises NotFound."""
        found = self.round(round_id)
        if not found.live:
            raise NotFound(f"round {round_id}: has ended, it is {found.state}")
        return found.announcement

    async def _drive(self, round_id: str) -> None:
        """Walk one round to its end. When its state cannot be written down, the walk starts over from what is there."""
        try:
            while True:
                try:
                    await self._walk(round_id)
                    return
                except Unavailable as error:
                    self._count_failures.add(1, "round")
                    _log.warning("round %s: %s", round_id, error)
                    await asyncio.sleep(self._tick_s)
                except AtollError:
                    self._count_failures.add(1, "round")
                    _log.exception("round %s is left as it is", round_id)
                    return
        finally:
            await self._standing.end(round_id)
            if (telling := self._telling.pop(round_id, None)) is not None:
                telling.cancel()
                await asyncio.gather(telling, return_exceptions=True)
            self._driving.discard(round_id)
            self._stops.pop(round_id, None)

    async def _walk(self, round_id: str) -> None:
        """Take a round through the table until it rests. Each command is idempotent, so that BOOTED may repeat it."""
        found = await asyncio.to_thread(self.round, round_id)
        state, command = step(found.at, Event.BOOTED)
        while command is not Command.REST:
            before = self._clock()
            found, event = await self._perform(command, found)
            if self._stop_of(round_id).is_set():
                event = Event.ABORTED if event is not Event.RELEASED else event
                reason = found.reason or "an operator aborted it"
                found = msgspec.structs.replace(found, reason=reason)
            if found.at in (State.ANNOUNCED, State.COLLECTING):
                found = await self._relayed(found, over=event is not Event.HEARD)
            state, command = step(found.at, event)
            taken = {
                **found.seconds,
                found.state: round(found.seconds.get(found.state, 0.0) + self._clock() - before, 3),
            }
            found = msgspec.structs.replace(found, state=state.value, seconds=taken)
            if not found.live or state is State.FROZEN:
                found = await asyncio.to_thread(self._closed, found)
            await asyncio.to_thread(save_round, self._ledger, found)
            if not found.live:
                await self._standing.end(round_id)
            if event is not Event.ATTEMPT_FAILED:
                kind = "alert" if state in (State.FAILED, State.REFUSED) else "info"
                told = f": {found.reason}" if found.reason and not found.live else ""
                await asyncio.to_thread(self._note, kind, f"round {round_id}: {state.name.lower()}{told}")
            if not found.live or state is State.FROZEN:
                self._relaying.wake()
                await self._publish_soon()
        await self._trim_log()

    async def _trim_log(self) -> None:
        """Let go of the contributions of rounds that have ended: their transcripts and means are in the ledger, and
        nobody may open them again. What a batch adds at this moment is not in the ledger yet, so it is waited for."""
        async with self._intake.admitting:
            try:
                await asyncio.to_thread(lambda: self._log.remove_before(self._oldest_needed()))
            except (AtollError, OSError) as error:  # it is tried again after the next round
                _log.warning("updates log: old contributions are still there: %s", error)

    def _oldest_needed(self) -> int:
        live = [found for found in every_round(self._ledger) if found.live]
        offsets = [entry.log_offset for found in live for entry in self._ledger.contributions(found.round_id)]
        return min(offsets, default=self._log.end)

    async def _relayed(self, found: Round, *, over: bool) -> Round:
        """The round with what its relays did in its record; once collecting is `over`, people hear of those that did
        not do their part."""
        told = await asyncio.to_thread(self._relaying.record, found)
        for complaint in complaints(told) if over else ():
            await asyncio.to_thread(self._note, "alert", f"round {found.round_id}: {complaint}")
        return msgspec.structs.replace(found, figures={**found.figures, "relays": told})

    def _closed(self, found: Round) -> Round:
        """The round with an announcement that says so; devices stop training and sending."""
        if not unpack(open_envelope(found.announcement).payload, RoundTask).open:
            return found
        task = msgspec.structs.replace(found.task, open=False, issued=max(int(self._clock()), found.task.issued + 1))
        return msgspec.structs.replace(found, announcement=signed_task(self._keyring, task))

    async def _perform(self, command: Command, found: Round) -> tuple[Round, Event]:
        """Do what the table asks for; failures that no retry cures end the round with their name."""
        perform = {
            Command.ANNOUNCE: self._announce,
            Command.COLLECT: self._collect,
            Command.FREEZE: self._freeze,
            Command.AGGREGATE: self._aggregate,
            Command.JUDGE: self._candidates.judge,
            Command.PUBLISH: self._candidates.release,
        }[command]
        while True:
            try:
                return await perform(found)
            except Unavailable as error:
                # The disk is full or the broker away: nothing is decided, so the same command is tried again.
                self._count_failures.add(1, "round")
                _log.warning("round %s: %s", found.round_id, error)
                if self._stop_of(found.round_id).is_set():
                    return found, Event.ABORTED
                await asyncio.sleep(self._tick_s)
            except AtollError as error:
                return msgspec.structs.replace(found, reason=f"{type(error).__name__}: {error}"), Event.BROKEN
            except Exception as error:
                _log.exception("round %s failed", found.round_id)
                return msgspec.structs.replace(found, reason=f"{type(error).__name__}: {error}"), Event.BROKEN

    async def _announce(self, found: Round) -> tuple[Round, Event]:
        """Wait until one relay has announced the round; the others are told meanwhile, and waited for by nobody. Whom
        the round leaves out hears so first: devices begin to train as soon as it is announced. The aggregators, which
        begin later, are told at once, so that it costs no time then."""
        self._stand(found)
        await asyncio.wait({self._leaving_out(found)}, timeout=LEFT_OUT_FIRST_S)
        self._relaying.wake()
        while not await self._relaying.announced(found, self._tick_s):
            if self._stop_of(found.round_id).is_set():
                return found, Event.ABORTED
            if self._clock() > found.task.deadline:
                said = "; ".join(complaints(await asyncio.to_thread(self._relaying.record, found)))
                reason = f"the deadline passed before it could be announced: {said}"
                return msgspec.structs.replace(found, reason=reason), Event.TOO_FEW
        return found, Event.HEARD

    async def _collect(self, found: Round) -> tuple[Round, Event]:
        """Wait until all that can come have come, or the deadline."""
        self._stand(found)
        self._leaving_out(found)  # it began before this coordinator did, if it was announced by the one before it
        return await self._collected(found)

    def _leaving_out(self, found: Round) -> asyncio.Task[None]:
        """What tells the devices that the round leaves out, once a life of this process."""
        if found.round_id not in self._telling:
            telling = asyncio.create_task(self._leave_out(found), name=f"round {found.round_id} leaves out")
            self._telling[found.round_id] = telling
        return self._telling[found.round_id]

    async def _leave_out(self, found: Round) -> None:
        try:
            await self._intake.leave_out(found)
        except Exception as error:  # whom it did not reach is refused at admission
            _log.warning("round %s: devices that it leaves out were not told: %s", found.round_id, error)

    def _stand(self, found: Round) -> None:
        """Have the aggregators stand by for the round's frozen list, unless they do."""
        stands_s = max(0.0, found.task.deadline - self._clock()) + found.spec.aggregation_s
        names = [key.name for key in found.task.aggregators]
        self._standing.begin(found.round_id, found.announcement, names, stands_s)

    async def _collected(self, found: Round) -> tuple[Round, Event]:
        while True:
            able = found.spec.contributions_max or await asyncio.to_thread(self._able, found)
            wanted = min(able, contributions_max(found.task))
            left = found.task.deadline - self._clock()
            async with self._intake.admitting:  # counted after the clock was read: what came in time counts
                admitted = len(await asyncio.to_thread(self._ledger.contributions, found.round_id))
            if self._stop_of(found.round_id).is_set():
                return found, Event.ABORTED
            if admitted >= found.spec.quorum and (admitted >= wanted or left <= 0):
                return found, Event.COLLECTED
            if left <= 0:
                reason = f"expected a quorum of {found.spec.quorum} contributions, found {admitted} at the deadline"
                reason += await asyncio.to_thread(self._why_few, found.round_id)
                return msgspec.structs.replace(found, reason=reason), Event.TOO_FEW
            with contextlib.suppress(TimeoutError):
                async with self._intake.admitted, asyncio.timeout(min(left, self._tick_s)):
                    await self._intake.admitted.wait()

    def _why_few(self, round_id: str) -> str:
        """What is known of those who are not in: who sat out, and what was refused."""
        counted = (("sat out", self._ledger.sat_out(round_id)), ("refused", self._ledger.refusals(round_id)))
        return "".join(
            f"; {what}: {', '.join(f'{number} {reason}' for reason, number in counts.items())}"
            for what, counts in counted
            if counts
        )

    def _able(self, found: Round) -> int:
        """How many devices may take part: those heard lately that run the base and do not sit the round out, for as
        long as it lasts. The quorum is always waited for."""
        since = self._clock() - AWAKE_S
        able = {
            record.device_id
            for record in self._ledger.devices()
            if record.last_seen >= since and record.running == found.task.base
        }
        sitting = self._ledger.sitting_out(found.round_id).items()
        return max(found.spec.quorum, len(able - {name for name, reason in sitting if reason not in PASSING}))

    async def _aggregate(self, found: Round) -> tuple[Round, Event]:
        return await self._opening.attempt(found, self._stop_of(found.round_id))

    async def _freeze(self, found: Round) -> tuple[Round, Event]:
        """Fix the ordered list. The state is FROZEN already, so whatever is not admitted by now is refused as late;
        the lock waits for a batch that began to be admitted before. A device whose budget of privacy went into another
        model's round since it was admitted is not on the list."""
        async with self._intake.admitting:
            admitted = await asyncio.to_thread(self._ledger.contributions, found.round_id)
        if not found.frozen:
            over = await asyncio.to_thread(self._intake.over_budget, found, [entry.device_id for entry in admitted])
            rejected = {name: f"{OVER_BUDGET}: {text}" for name, text in over.items()}
            found = msgspec.structs.replace(found, rejected=rejected)
            if len(admitted) - len(over) < found.spec.quorum <= len(admitted):
                left = f"{len(over)} of {len(admitted)} contributions are of devices {OVER_BUDGET} by now"
                reason = f"expected a quorum of {found.spec.quorum} contributions to freeze; {left}"
                return msgspec.structs.replace(found, reason=reason), Event.BROKEN
        admitted = [entry for entry in admitted if entry.device_id not in found.rejected]
        frozen = found.frozen or tuple(entry.digest for entry in admitted)
        root = merkle.root([bytes.fromhex(digest) for digest in frozen])
        figures = {**found.figures, "bytes_uploaded": sum(entry.size for entry in admitted)}
        return msgspec.structs.replace(found, frozen=frozen, root=root, figures=figures), Event.BEGUN
