"""One aggregator: the shell around a party of the secure round.

Nobody can make it open more than the protocol allows: whoever commands it, the round must be signed by the role
`round`, the list of contributions of a round is fixed by the first command, an attempt number is used once, and what
was decided is on disk before it has any effect. After a kill -9 it answers the same command with the same bytes, or,
if it had not got so far, asks for a new attempt.

A command comes with a round's announcement, and stands (`standing_by`): the aggregator asks for the frozen list itself,
and takes it as it takes a command that came without. While rounds are open it follows the updates log (`follow`) and
keeps its own copies of contributions, so that a command finds most of them there: what is frozen and missing is fetched
one by one, what it holds and is not frozen is dropped.

    aggregator_state    keys, decisions, answers
    following, copies   what it read of the log
    completing          what it did not read is fetched
    round_command       which commands it takes
    standing_by         waits for the list of a round that was announced
    conversation        what it says to the other two
    shares.party        the protocol

It knows no HTTP and no Flower: it is handed a log, callables that fetch contributions and attempts, and one that
delivers bytes to a peer's `deliver`. Arithmetic and disk run in a thread.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Awaitable, Callable, Mapping, Set
from pathlib import Path
from typing import Any

import msgspec

from fl_coordinator.aggregation import OPENING_TYPE, Opening
from fl_coordinator.aggregator_state import AggregatorState, RoundProgress
from fl_coordinator.channel import ChannelMessage
from fl_coordinator.completing import Completing, Fetch
from fl_coordinator.conversation import Conversation, Send
from fl_coordinator.copies import Copies
from fl_coordinator.following import Announcement, Following, LogSource
from fl_coordinator.kept_memories import KeptMemories
from fl_coordinator.kept_spends import KeptSpends
from fl_coordinator.mailbox import Bell, Mailbox
from fl_coordinator.memory_chain import after, proven
from fl_coordinator.round_command import RoundCommand, accepted, stands_s
from fl_coordinator.rules.policy import remembers
from fl_coordinator.shares.contribution import Holding, hold
from fl_coordinator.shares.decision import Decision
from fl_coordinator.shares.fixed_point import Rng
from fl_coordinator.shares.freezing import FROZEN_TYPE
from fl_coordinator.shares.party import AggregationParty, Committed, Keep, Outcome, Protocol, own_secret_of
from fl_coordinator.shares.remembering import RoundMemory, empty_memory
from fl_coordinator.shares.sharing import Exchange, to_bytes
from fl_coordinator.standing_by import FetchAttempt, StandingBy
from fl_coordinator.threads import in_thread
from model_delta.digest import digest_of
from model_delta.encoding import pack, unpack
from model_delta.errors import AtollError, Malformed, Unavailable
from model_delta.task import AggregatorKey, RoundTask
from model_delta.trust.signing import open_envelope, public_bytes, seal_envelope, sign
from model_delta.trust.updater import TrustAnchors

RUNS_MAX = 4
"""Rounds that may run because they stood, and were frozen at about the same moment: each needs memory."""

_log = logging.getLogger("atoll.aggregator")

FetchMemory = Callable[[str], Awaitable[bytes]]
"""The packed `MemoryProof` of what a round begins with, by round id. Raises Unavailable."""


class Aggregator:
    """The aggregator `name` with its state in `folder`, which no other process may use.

    `anchors` hold the keys of the role `round`; `ca_pem` and `revoked` judge device certificates; `step_timeout_s` is
    how long a peer may take for one message. Keys are created on first start. Raises Untrusted when the key file can be
    read by others, Unavailable when another process has the folder.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        *,
        anchors: TrustAnchors,
        ca_pem: bytes,
        revoked: Callable[[], Set[int]],
        fetch: Fetch,
        send: Send,
        fetch_memory: FetchMemory | None = None,
        fetch_attempt: FetchAttempt | None = None,
        clock: Callable[[], float] = time.time,
        rng: Rng = os.urandom,
        step_timeout_s: float = 30.0,
    ) -> None:
        self.name = name
        self._state = AggregatorState(name, folder, rng)
        self._copies = Copies(folder / "copies")
        self._anchors = anchors
        self._ca_pem = ca_pem
        self._revoked = revoked
        self._send_bytes = send
        self._fetch_memory = fetch_memory
        self._memories = KeptMemories(self._state.store)
        self._spends = KeptSpends(self._state.store)
        self._clock = clock
        self._rng = rng
        self._step_timeout_s = step_timeout_s
        self._mailbox = Mailbox()
        self._kept = Bell()
        self._completing = Completing(
            name, copies=self._copies, kept=self._kept, fetch=fetch, step_timeout_s=step_timeout_s
        )
        self._running: dict[str, tuple[RoundCommand, asyncio.Task[dict[str, Any]]]] = {}
        self._standing_by = fetch_attempt and StandingBy(
            anchors=anchors, key=self.key, fetch=fetch_attempt, run=self._run_stood, clock=clock
        )

    @property
    def key(self) -> AggregatorKey:
        """The public keys, as a round announces them."""
        sealing = self._state.sealing.public_key().public_bytes_raw()
        return AggregatorKey(self.name, sealing, public_bytes(self._state.signing.public_key()))

    def close(self) -> None:
        """Let go of the folder; what was promised is durable already."""
        self._copies.close()

    def following(self, log: LogSource, announcement: Announcement) -> Following:
        """What keeps copies from `log`; see `follow`."""
        return Following(
            log=log,
            announcement=announcement,
            copies=self._copies,
            key=self.key,
            anchors=self._anchors,
            ca_pem=self._ca_pem,
            revoked=self._revoked,
            clock=self._clock,
            kept=self._kept,
        )

    async def follow(self, following: Following) -> None:
        """Keep copies of contributions as they come, until cancelled."""
        self._completing.follows = True
        try:
            await following.run()
        finally:
            self._completing.follows = False

    def deliver(self, sender: str, name: str, data: bytes) -> None:
        """Take a peer's message; to be called in the event loop. It is opened, and so authenticated, when it is needed.

        Raises Malformed for what is no message of `sender` to this aggregator. A full mailbox drops its oldest message.
        """
        message = unpack(data, ChannelMessage)
        if (message.sender, message.receiver, message.step) != (sender, self.name, name):
            raise Malformed(f"mailbox of {self.name}: expected {name!r} from {sender!r}, found another message")
        self._mailbox.add(message)

    async def carry_out(self, command: Mapping[str, Any]) -> dict[str, Any]:
        """Answer what came by Flower: a `RoundCommand` (`run_round`), or a `StandingCommand`, with what the attempt is
        answered that it stands for (`StandingBy.answer`). Raises what these do."""
        if stands_s(command) is None:
            return await self.run_round(command)
        if self._standing_by is None:
            raise Unavailable(f"{self.name}: expected a command to run a round, found one to stand by")
        return await self._standing_by.answer(command)

    async def _run_stood(self, command: Mapping[str, Any]) -> dict[str, Any]:
        if len(self._running) >= RUNS_MAX and command["round_id"] not in self._running:
            raise Unavailable(f"{self.name}: is still busy with {len(self._running)} rounds")
        return await self.run_round(command)

    async def run_round(self, command: Mapping[str, Any]) -> dict[str, Any]:
        """Carry out a `RoundCommand` (as a map); the answer holds `aggregator`, `round_id`, the signed `opening`
        (`aggregation.Opening`) and the bytes of the two shares, `first` and `second` (empty when nothing is opened).

        Asked again, it gives the same bytes. A higher attempt replaces one that is still running. Raises Untrusted,
        Malformed, Expired, and Unavailable when a new attempt may succeed; the message says who or what is missing.
        """
        wanted = unpack(pack(dict(command)), RoundCommand)
        # Asked anew after every wait: of several who wait for one attempt to end, one at a time begins the next. Two
        # attempts side by side could come to two decisions, and open both.
        while (found := self._running.get(wanted.round_id)) is not None:
            running, work = found
            if running == wanted:
                return await _result_of(work, wanted)
            if running.attempt >= wanted.attempt and not work.done():
                raise Unavailable(f"round {wanted.round_id!r}: attempt {running.attempt} is already running")
            work.cancel()
            await asyncio.wait([work])
            self._ended(wanted.round_id, work)
        work = asyncio.create_task(self._run(wanted), name=f"round {wanted.round_id} attempt {wanted.attempt}")
        self._running[wanted.round_id] = (wanted, work)
        work.add_done_callback(lambda ended: self._ended(wanted.round_id, ended))
        try:
            return await _result_of(work, wanted)
        finally:
            work.cancel()

    def _ended(self, round_id: str, work: asyncio.Task[dict[str, Any]]) -> None:
        if self._running.get(round_id, (None, None))[1] is work:
            del self._running[round_id]

    async def _run(self, command: RoundCommand) -> dict[str, Any]:
        try:
            async with asyncio.timeout(command.deadline_s or None):
                task, reply = await self._attempt(command)
        except TimeoutError:
            raise Unavailable(
                f"round {command.round_id!r} attempt {command.attempt}: took longer than its {command.deadline_s:g} s; "
                "run the round again as a new attempt"
            ) from None
        return await in_thread(self._let_go, task, reply)  # outside of that time: what counts as opened is answered

    async def _attempt(self, command: RoundCommand) -> tuple[RoundTask, dict[str, Any]]:
        task, index = accepted(command, self._anchors, self.key, self._clock())
        await in_thread(self._state.forget_old_rounds, self._clock())
        progress = await in_thread(self._state.begin, command, task)
        if progress.attempt >= command.attempt:
            reply = await in_thread(self._state.given_reply, command.round_id)
            if reply is None:
                raise Unavailable(
                    f"round {command.round_id!r}: attempt {progress.attempt} was begun and did not finish; "
                    f"ask again as attempt {progress.attempt + 1}"
                )
            return task, reply
        conversation = Conversation(
            own=self._state.sealing,
            index=index,
            task=task,
            command=command,
            mailbox=self._mailbox,
            send=self._send_bytes,
            rng=self._rng,
            step_timeout_s=self._step_timeout_s,
        )
        try:
            begun = await self._memory_of(task)
            await self._completing.complete(command, task, index)
            # Masked vectors stay on disk: a round of many large ones would not fit into memory.
            with self._copies.opened(command.round_id, command.contributions) as copies:
                revoked, now = self._revoked(), self._clock()
                sealing = self._state.sealing
                holding = await in_thread(hold, copies, task, index, sealing, self._ca_pem, revoked, now)
                await in_thread(self._spends.promise, task, command.spent, holding.device_ids)
                progress = msgspec.structs.replace(progress, attempt=command.attempt)
                await in_thread(self._state.remember, progress)
                outcome = await self._take_part(command, task, index, holding, progress, begun, conversation)
        except AtollError as error:
            await conversation.farewell(str(error))
            raise
        finally:
            conversation.end()
        await in_thread(self._keep_memory, task, begun, outcome)
        return task, await in_thread(self._sign, command, index, outcome)

    async def _memory_of(self, task: RoundTask) -> RoundMemory:
        """What the round's policy remembers: the copy that is kept here, or one that the coordinator proves."""
        if not remembers(task.policy):
            return empty_memory(task)
        found = await in_thread(self._memories.announced, task)
        if found is not None:
            return found
        if self._fetch_memory is None:
            raise Unavailable(f"round {task.round_id!r}: the memory that it begins with is not at {self.name}")
        _log.warning("round %s: its memory is not here; it is taken from what three aggregators signed", task.round_id)
        data = await self._fetch_memory(task.round_id)
        found = await in_thread(proven, data, task, self._anchors)
        await in_thread(self._memories.accept, task, found)
        return found

    def _keep_memory(self, task: RoundTask, begun: RoundMemory, outcome: Outcome) -> None:
        """Spares a later round to ask for it."""
        if remembers(task.policy):
            self._memories.left(task, after(begun, task, unpack(outcome.decision, Decision)))

    async def _take_part(
        self,
        command: RoundCommand,
        task: RoundTask,
        index: int,
        holding: Holding,
        progress: RoundProgress,
        begun: RoundMemory,
        conversation: Conversation,
    ) -> Outcome:
        party = AggregationParty(
            task=task,
            attempt=command.attempt,
            root=command.root,
            index=index,
            holding=holding,
            pair_secrets=conversation.pair_secrets,
            rng=self._rng,
            sign=lambda said: seal_envelope(sign(FROZEN_TYPE, pack(said), [self._state.signing])),
            announced=digest_of(open_envelope(command.task).payload),
            memory=begun,
            remembered=progress.decision,
            final=progress.final,
            committed=progress.commitments,
            own_secret=own_secret_of(self.name, self._state.sealing),
            spent=command.spent,
        )
        steps = party.steps()
        received: Mapping[int, bytes] | None = None
        while True:
            wanted = await in_thread(_advance, steps, received)
            if isinstance(wanted, Outcome):
                return wanted
            if isinstance(wanted, Keep):
                progress = msgspec.structs.replace(progress, decision=wanted.decision, final=wanted.agreed)
                await in_thread(self._state.remember, progress)
                received = {}
            elif isinstance(wanted, Committed):
                progress = msgspec.structs.replace(progress, commitments=wanted.commitments)
                await in_thread(self._state.remember, progress)
                received = {}
            else:
                received = await conversation.exchange(wanted)

    def _sign(self, command: RoundCommand, index: int, outcome: Outcome) -> dict[str, Any]:
        """The answer, written down before it is given; an earlier one stands."""
        given = self._state.given_reply(command.round_id)
        if given is not None:
            return given
        first = to_bytes(outcome.opened.first) if outcome.opened else b""
        second = to_bytes(outcome.opened.second) if outcome.opened else b""
        digests = (digest_of(first), digest_of(second)) if outcome.opened else ("", "")
        opening = Opening(self.name, index, outcome.decision, *digests)
        envelope = seal_envelope(sign(OPENING_TYPE, pack(opening), [self._state.signing]))
        reply = {
            "aggregator": self.name,
            "round_id": command.round_id,
            "opening": envelope,
            "first": first,
            "second": second,
        }
        self._state.give(command.round_id, reply)
        return reply

    def _let_go(self, task: RoundTask, reply: dict[str, Any]) -> dict[str, Any]:
        """The answer, whose shares count as opened from here on and not before: an aggregator that says that it failed
        has let go of nothing, and the coordinator, which takes its word, must not keep another account."""
        if reply["first"]:
            opening = unpack(open_envelope(reply["opening"]).payload, Opening)
            decision = unpack(opening.decision, Decision)
            self._spends.opened(task, [device.device_id for device in decision.devices])
        return reply


def _advance(steps: Protocol, received: Mapping[int, bytes] | None) -> Exchange | Keep | Committed | Outcome:
    """One stretch of computing, until the party needs its peers or is done."""
    try:
        return next(steps) if received is None else steps.send(received)
    except StopIteration as done:
        outcome: Outcome = done.value
        return outcome


async def _result_of(work: asyncio.Task[dict[str, Any]], command: RoundCommand) -> dict[str, Any]:
    """Wait for a run that others may wait for too. Raises Unavailable when it was replaced or its first caller left."""
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        if work.cancelled():
            raise Unavailable(f"round {command.round_id!r}: attempt {command.attempt} was replaced") from None
        raise
