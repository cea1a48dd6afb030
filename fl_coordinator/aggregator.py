"""One aggregator: the shell around a party of the secure round.

It holds two key pairs (in its folder, 0600): X25519, to which devices and the other aggregators seal, and Ed25519, with
which it signs what it opened. Nobody can make it open more than the protocol allows: whoever commands it, the round
must be signed by the role `round`, the list of contributions of a round is fixed by the first command, an attempt
number is used once, and what was decided is on disk before it has any effect. After a kill -9 it answers the same
command with the same bytes, or, if it had not got so far, asks for a new attempt.

It knows no HTTP and no Flower: it is handed a callable that fetches the frozen contributions and one that delivers
bytes to a peer's `deliver`. Arithmetic and disk run in a thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import stat
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Set
from pathlib import Path
from typing import Any, BinaryIO, ParamSpec, TypeVar

import msgspec
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fl_coordinator.aggregation import OPENING_TYPE, Opening
from fl_coordinator.channel import Channel, ChannelMessage
from fl_coordinator.kept_memories import KeptMemories
from fl_coordinator.memory_chain import after, proven
from fl_coordinator.rules.policy import remembers
from fl_coordinator.shares.bounds import contributions_max, require_announceable
from fl_coordinator.shares.contribution import Holding, hold
from fl_coordinator.shares.fixed_point import Rng
from fl_coordinator.shares.freezing import FROZEN_TYPE
from fl_coordinator.shares.party import AggregationParty, Decision, Keep, Outcome, Protocol
from fl_coordinator.shares.remembering import RoundMemory, empty_memory
from fl_coordinator.shares.sharing import Exchange, to_bytes
from model_delta.digest import digest_of, require_digest, require_match
from model_delta.encoding import pack, unpack, unpack_plain
from model_delta.errors import AtollError, DigestMismatch, Expired, Malformed, NotFound, Unavailable, Untrusted
from model_delta.merkle import root as merkle_root
from model_delta.store import DirectoryStore
from model_delta.task import TASK_TYPE, AggregatorKey, RoundTask
from model_delta.trust.signing import open_envelope, public_bytes, seal_envelope, sign
from model_delta.trust.signing import verify as verify_envelope
from model_delta.trust.updater import TrustAnchors, role_keys

MAILBOX_BYTES_MAX = 64 << 20
KEPT_S = 30 * 86_400
"""How long after its deadline a round is remembered; an older one is refused."""

_log = logging.getLogger("atoll.aggregator")
_ABORT = "abort"
_RETRY_FIRST_S, _RETRY_MAX_S = 0.05, 1.0

P = ParamSpec("P")
T = TypeVar("T")

FetchContributions = Callable[[str], Awaitable[Iterable[bytes]]]
"""The contributions of a round, by round id, in the frozen order, read one by one in a thread. Raises Unavailable."""
FetchMemory = Callable[[str], Awaitable[bytes]]
"""The packed `MemoryProof` of what a round begins with, by round id. Raises Unavailable."""
Send = Callable[[str, str, bytes], Awaitable[None]]
"""send(peer, name, data): hand `data` to that aggregator's `deliver(own name, name, data)`. Raises Unavailable."""


class RoundCommand(msgspec.Struct, frozen=True, kw_only=True):
    """What the coordinator asks: `task` is the packed signed announcement, `contributions` the frozen digests in order,
    `root` the Merkle root over the digests' 32 raw bytes, `attempt` counts from 1 and never repeats. `deadline_s` is
    how long the attempt may take, because later nobody waits for it; 0: as long as its steps do."""

    round_id: str
    attempt: int
    task: bytes
    contributions: tuple[str, ...]
    root: str
    deadline_s: float = 0.0


class _Keys(msgspec.Struct, frozen=True):
    sealing: bytes
    signing: bytes
    format: int = 1


class _Memory(msgspec.Struct, frozen=True, kw_only=True):
    """What must survive a crash: the frozen list's root, the last attempt begun, the decision (`final` once all three
    agreed on it)."""

    round_id: str
    root: str
    deadline: int
    attempt: int = 0
    decision: bytes = b""
    final: bool = False
    format: int = 1


class Aggregator:
    """The aggregator `name` with its state in `folder`, which no other process may use.

    `anchors` hold the keys of the role `round`; `ca_pem` and `revoked` judge device certificates; `step_timeout_s` is
    how long a peer may take for one message. Keys are created on first start. Raises Untrusted when the key file can be
    read by others.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        *,
        anchors: TrustAnchors,
        ca_pem: bytes,
        revoked: Callable[[], Set[int]],
        fetch_contributions: FetchContributions,
        send: Send,
        fetch_memory: FetchMemory | None = None,
        clock: Callable[[], float] = time.time,
        rng: Rng = os.urandom,
        step_timeout_s: float = 30.0,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.name = name
        self._folder = folder
        self._store = DirectoryStore(folder)
        self._sealing, self._signing = self._open_keys(rng)
        self._anchors = anchors
        self._ca_pem = ca_pem
        self._revoked = revoked
        self._fetch = fetch_contributions
        self._send_bytes = send
        self._fetch_memory = fetch_memory
        self._memories = KeptMemories(self._store)
        self._clock = clock
        self._rng = rng
        self._step_timeout_s = step_timeout_s
        self._mailbox = _Mailbox()
        self._running: dict[str, tuple[RoundCommand, asyncio.Task[dict[str, Any]]]] = {}

    @property
    def key(self) -> AggregatorKey:
        """The public keys, as a round announces them."""
        sealing = self._sealing.public_key().public_bytes_raw()
        return AggregatorKey(self.name, sealing, public_bytes(self._signing.public_key()))

    def deliver(self, sender: str, name: str, data: bytes) -> None:
        """Take a peer's message; to be called in the event loop. It is opened, and so authenticated, when it is needed.

        Raises Malformed for what is no message of `sender` to this aggregator. A full mailbox drops its oldest message.
        """
        message = unpack(data, ChannelMessage)
        if (message.sender, message.receiver, message.step) != (sender, self.name, name):
            raise Malformed(f"mailbox of {self.name}: expected {name!r} from {sender!r}, found another message")
        self._mailbox.add(message)

    async def run_round(self, command: Mapping[str, Any]) -> dict[str, Any]:
        """Carry out a `RoundCommand` (as a map); the answer holds `aggregator`, `round_id`, the signed `opening`
        (`aggregation.Opening`) and the bytes of the two shares, `first` and `second` (empty when nothing is opened).

        Asked again, it gives the same bytes. A higher attempt replaces one that is still running. Raises Untrusted,
        Malformed, Expired, and Unavailable when a new attempt may succeed; the message says who or what is missing.
        """
        wanted = unpack(pack(dict(command)), RoundCommand)
        running, work = self._running.get(wanted.round_id, (wanted, None))
        if work is not None and running == wanted:
            return await _result_of(work, wanted)
        if work is not None and running.attempt >= wanted.attempt:
            raise Unavailable(f"round {wanted.round_id!r}: attempt {running.attempt} is already running")
        if work is not None:
            work.cancel()
            await asyncio.wait([work])
        work = asyncio.create_task(self._run(wanted), name=f"round {wanted.round_id} attempt {wanted.attempt}")
        self._running[wanted.round_id] = (wanted, work)
        try:
            return await _result_of(work, wanted)
        finally:
            work.cancel()
            if self._running.get(wanted.round_id) == (wanted, work):
                del self._running[wanted.round_id]

    async def _run(self, command: RoundCommand) -> dict[str, Any]:
        try:
            async with asyncio.timeout(command.deadline_s or None):
                return await self._attempt(command)
        except TimeoutError:
            raise Unavailable(
                f"round {command.round_id!r} attempt {command.attempt}: took longer than its {command.deadline_s:g} s; "
                "run the round again as a new attempt"
            ) from None

    async def _attempt(self, command: RoundCommand) -> dict[str, Any]:
        task, index = self._accept(command)
        await _in_thread(self._forget_old_rounds)
        memory = await _in_thread(self._begin, command, task)
        if memory.attempt >= command.attempt:
            reply = await _in_thread(self._given_reply, command.round_id)
            if reply is None:
                raise Unavailable(
                    f"round {command.round_id!r}: attempt {memory.attempt} was begun and did not finish; "
                    f"ask again as attempt {memory.attempt + 1}"
                )
            return reply
        begun = await self._memory_of(task)
        data = await self._fetch(command.round_id)
        # Masked vectors wait on disk: a round of many large ones would not fit into memory. The file has no name, so
        # that it is gone with this process.
        with tempfile.TemporaryFile(dir=self._folder, buffering=0) as spool:
            holding = await _in_thread(self._take, command, task, index, data, spool)
            memory = msgspec.structs.replace(memory, attempt=command.attempt)
            await _in_thread(self._remember, memory)
            outcome = await self._take_part(command, task, index, holding, memory, begun)
        await _in_thread(self._keep_memory, task, begun, outcome)
        return await _in_thread(self._sign, command, index, outcome)

    async def _memory_of(self, task: RoundTask) -> RoundMemory:
        """What the round's policy remembers: the copy that is kept here, or one that the coordinator proves."""
        if not remembers(task.policy):
            return empty_memory(task)
        found = await _in_thread(self._memories.announced, task)
        if found is not None:
            return found
        if self._fetch_memory is None:
            raise Unavailable(f"round {task.round_id!r}: the memory that it begins with is not at {self.name}")
        _log.warning("round %s: its memory is not here; it is taken from what three aggregators signed", task.round_id)
        data = await self._fetch_memory(task.round_id)
        found = await _in_thread(proven, data, task, self._anchors)
        await _in_thread(self._memories.accept, task, found)
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
        memory: _Memory,
        begun: RoundMemory,
    ) -> Outcome:
        channels = {
            peer: Channel(
                self._sealing, key.sealing, self.name, key.name, command.round_id, command.attempt, command.root
            )
            for peer, key in enumerate(task.aggregators)
            if peer != index
        }
        party = AggregationParty(
            task=task,
            attempt=command.attempt,
            root=command.root,
            index=index,
            holding=holding,
            pair_secrets={peer: channel.protocol_secret for peer, channel in channels.items()},
            rng=self._rng,
            sign=lambda said: seal_envelope(sign(FROZEN_TYPE, pack(said), [self._signing])),
            announced=digest_of(open_envelope(command.task).payload),
            memory=begun,
            remembered=memory.decision,
            final=memory.final,
            noise_secret=self._noise_secret(),
        )
        names = {peer: task.aggregators[peer].name for peer in channels}
        try:
            return await self._drive(party.steps(), memory, command, channels, names)
        except AtollError as error:
            await self._abort(str(error), command, channels, names)
            raise
        finally:
            self._mailbox.discard(command.round_id, command.attempt)

    def _noise_secret(self) -> bytes:
        """From its own key, so that it is the same after a crash, and nobody's else."""
        info = pack(["atoll noise", self.name])
        return HKDF(hashes.SHA256(), 32, None, info).derive(self._sealing.private_bytes_raw())

    def _accept(self, command: RoundCommand) -> tuple[RoundTask, int]:
        """The announcement, if the role `round` signed it and this aggregator is in it; and its place."""
        what = f"round {command.round_id!r}"
        keys, threshold = role_keys(self._anchors, "round")
        task = unpack(verify_envelope(open_envelope(command.task), TASK_TYPE, keys, threshold), RoundTask)
        if task.tenant != self._anchors.tenant or task.round_id != command.round_id:
            raise Untrusted(f"{what}: the signed announcement is of {task.tenant!r}, round {task.round_id!r}")
        require_announceable(task)
        if self._clock() > task.deadline + KEPT_S:
            raise Expired(f"{what}: closed more than {KEPT_S // 86_400} days ago; it is no longer remembered")
        if self.key not in task.aggregators:
            raise Untrusted(f"{what}: was announced without {self.name}, or with other keys of it")
        if command.attempt < 1 or not 1 <= len(command.contributions) <= contributions_max(task):
            raise Malformed(f"{what}: expected an attempt from 1 and 1 to {contributions_max(task)} contributions")
        leaves = [bytes.fromhex(require_digest(digest, f"{what}: contribution")) for digest in command.contributions]
        found = merkle_root(leaves)
        if found != command.root:
            raise DigestMismatch(f"{what}: expected a frozen list with root {command.root[:16]}…, found {found[:16]}…")
        return task, task.aggregators.index(self.key)

    def _begin(self, command: RoundCommand, task: RoundTask) -> _Memory:
        """What is remembered of the round; its list is fixed here, by the first command."""
        try:
            memory = unpack(self._store.get("round", _file_name(command.round_id)), _Memory)
        except NotFound:
            memory = _Memory(round_id=command.round_id, root=command.root, deadline=task.deadline)
            self._remember(memory)
        if memory.root != command.root:
            raise Untrusted(
                f"round {command.round_id!r}: frozen with root {memory.root[:16]}…, found {command.root[:16]}… now; "
                "opening two sets of one round would give updates away"
            )
        return memory

    def _given_reply(self, round_id: str) -> dict[str, Any] | None:
        """The answer that was given before, if there is one."""
        try:
            reply: dict[str, Any] = unpack_plain(self._store.get("reply", _file_name(round_id)))
        except NotFound:
            return None
        return reply

    def _take(
        self, command: RoundCommand, task: RoundTask, index: int, data: Iterable[bytes], spool: BinaryIO
    ) -> Holding:
        """This aggregator's shares of the frozen contributions, which are checked to be those, one after the other."""
        checked = _checked(command, data)
        return hold(checked, task, index, self._sealing, self._ca_pem, self._revoked(), self._clock(), spool)

    async def _drive(
        self,
        steps: Protocol,
        memory: _Memory,
        command: RoundCommand,
        channels: Mapping[int, Channel],
        names: Mapping[int, str],
    ) -> Outcome:
        received: Mapping[int, bytes] | None = None
        while True:
            wanted = await _in_thread(_advance, steps, received)
            if isinstance(wanted, Outcome):
                return wanted
            if isinstance(wanted, Keep):
                memory = msgspec.structs.replace(memory, decision=wanted.decision, final=wanted.agreed)
                await _in_thread(self._remember, memory)
                received = {}
            else:
                received = await self._exchange(wanted, command, channels, names)

    async def _exchange(
        self, step: Exchange, command: RoundCommand, channels: Mapping[int, Channel], names: Mapping[int, str]
    ) -> dict[int, bytes]:
        """Send and collect the messages of one step. Raises Unavailable naming the peer, at the step's deadline."""
        deadline = asyncio.get_running_loop().time() + self._step_timeout_s
        sends = [
            asyncio.create_task(
                self._send(names[peer], channels[peer].seal(step.step, data, self._rng), deadline),
                name=f"{step.step} to {names[peer]}",
            )
            for peer, data in step.outgoing.items()
        ]
        try:
            received = {}
            for peer in sorted(step.expected):
                received[peer] = await self._receive(step.step, command, channels, names, peer, deadline)
            for task in sends:
                await task
        finally:
            for task in sends:
                task.cancel()
            await asyncio.gather(*sends, return_exceptions=True)
        return received

    async def _send(self, peer: str, message: ChannelMessage, deadline: float) -> None:
        data, pause = pack(message), _RETRY_FIRST_S
        while True:
            try:
                async with asyncio.timeout_at(deadline):
                    await self._send_bytes(peer, message.step, data)
                    return
            except (Unavailable, TimeoutError) as error:
                if asyncio.get_running_loop().time() + pause >= deadline:
                    raise Unavailable(
                        f"round {message.round_id!r} attempt {message.attempt}: {peer} cannot be reached for step "
                        f"{message.step!r} ({error}); nothing was opened, run the round again as a new attempt"
                    ) from None
            await asyncio.sleep(pause)
            pause = min(2 * pause, _RETRY_MAX_S)

    async def _receive(
        self,
        step: str,
        command: RoundCommand,
        channels: Mapping[int, Channel],
        names: Mapping[int, str],
        peer: int,
        deadline: float,
    ) -> bytes:
        what = f"round {command.round_id!r} attempt {command.attempt}"
        while True:
            for message in self._mailbox.find(command.round_id, command.attempt, step, names[peer]):
                with contextlib.suppress(Untrusted):  # forged: the true one may still come
                    return channels[peer].open(message)
            for other, channel in channels.items():
                for message in self._mailbox.find(command.round_id, command.attempt, _ABORT, names[other]):
                    with contextlib.suppress(Untrusted):
                        reason = channel.open(message).decode(errors="replace")
                        raise Unavailable(f"{what}: {names[other]} gave up: {reason}")
            try:
                async with asyncio.timeout_at(deadline):
                    await self._mailbox.arrival()
            except TimeoutError:
                raise Unavailable(
                    f"{what}: no {step!r} from {names[peer]} within {self._step_timeout_s:g} s; "
                    "nothing was opened, run the round again as a new attempt"
                ) from None

    async def _abort(
        self, reason: str, command: RoundCommand, channels: Mapping[int, Channel], names: Mapping[int, str]
    ) -> None:
        """Tell the peers why, so that they need not wait for their deadlines; best effort."""
        for peer, channel in channels.items():
            message = channel.seal(_ABORT, reason[:500].encode(), self._rng)
            with contextlib.suppress(AtollError, TimeoutError):
                async with asyncio.timeout(min(2.0, self._step_timeout_s)):
                    await self._send_bytes(names[peer], _ABORT, pack(message))

    def _sign(self, command: RoundCommand, index: int, outcome: Outcome) -> dict[str, Any]:
        """The answer, written down before it is given; an earlier one stands."""
        given = self._given_reply(command.round_id)
        if given is not None:
            return given
        first = to_bytes(outcome.opened.first) if outcome.opened else b""
        second = to_bytes(outcome.opened.second) if outcome.opened else b""
        digests = (digest_of(first), digest_of(second)) if outcome.opened else ("", "")
        opening = Opening(self.name, index, outcome.decision, *digests)
        envelope = seal_envelope(sign(OPENING_TYPE, pack(opening), [self._signing]))
        reply = {
            "aggregator": self.name,
            "round_id": command.round_id,
            "opening": envelope,
            "first": first,
            "second": second,
        }
        self._store.put("reply", _file_name(command.round_id), pack(reply))
        return reply

    def _remember(self, memory: _Memory) -> None:
        self._store.put("round", _file_name(memory.round_id), pack(memory))

    def _forget_old_rounds(self) -> None:
        """Rounds that would be refused by their age anyway need no memory."""
        for name in self._store.names("round"):
            if unpack(self._store.get("round", name), _Memory).deadline + 2 * KEPT_S < self._clock():
                (self._folder / "reply" / name).unlink(missing_ok=True)
                (self._folder / "round" / name).unlink(missing_ok=True)

    def _open_keys(self, rng: Rng) -> tuple[X25519PrivateKey, Ed25519PrivateKey]:
        path = self._folder / "key" / "aggregator"
        try:
            keys = unpack(self._store.get("key", "aggregator"), _Keys)
        except NotFound:
            keys = _Keys(rng(32), rng(32))
            self._store.put("key", "aggregator", pack(keys))
        mode = stat.S_IMODE(path.stat().st_mode)
        if mode & 0o077:
            raise Untrusted(f"keys of {self.name}: expected mode 0600 on {path}, found {mode:04o}; chmod 600 it")
        return X25519PrivateKey.from_private_bytes(keys.sealing), Ed25519PrivateKey.from_private_bytes(keys.signing)


class _Mailbox:
    """Messages that arrived and were not yet asked for: of bounded size, the oldest go first."""

    def __init__(self) -> None:
        self._messages: list[ChannelMessage] = []
        self._size = 0
        self._waiting: set[asyncio.Future[None]] = set()
        self._over: dict[str, int] = {}  # round -> the last attempt that ended

    def add(self, message: ChannelMessage) -> None:
        if len(message.box) > MAILBOX_BYTES_MAX:
            raise Malformed(f"mailbox: expected at most {MAILBOX_BYTES_MAX} bytes, found {len(message.box)}")
        if message.attempt <= self._over.get(message.round_id, 0):
            return
        self._messages.append(message)
        self._size += len(message.box)
        while self._size > MAILBOX_BYTES_MAX or len(self._messages) > 4096:
            self._size -= len(self._messages.pop(0).box)
        for waiter in self._waiting:
            if not waiter.done():
                waiter.set_result(None)

    async def arrival(self) -> None:
        """Return when the next message has arrived."""
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.add(waiter)
        try:
            await waiter
        finally:
            self._waiting.discard(waiter)

    def find(self, round_id: str, attempt: int, step: str, sender: str) -> list[ChannelMessage]:
        wanted = (round_id, attempt, step, sender)
        return [m for m in self._messages if (m.round_id, m.attempt, m.step, m.sender) == wanted]

    def discard(self, round_id: str, attempt: int) -> None:
        """Forget this and earlier attempts of a round, and what still arrives for them."""
        self._over[round_id] = max(attempt, self._over.pop(round_id, 0))
        while len(self._over) > 64:
            del self._over[next(iter(self._over))]
        self._messages = [m for m in self._messages if m.round_id != round_id or m.attempt > attempt]
        self._size = sum(len(m.box) for m in self._messages)


def _checked(command: RoundCommand, data: Iterable[bytes]) -> Iterator[bytes]:
    """The same contributions. Raises Malformed for another number, DigestMismatch for others than were frozen."""
    count = 0
    for place, contribution in enumerate(data):
        count = place + 1
        if count <= len(command.contributions):
            digest = command.contributions[place]
            require_match(contribution, digest, f"round {command.round_id!r}: contribution {place}")
            yield contribution
    if count != len(command.contributions):
        raise Malformed(
            f"round {command.round_id!r}: expected {len(command.contributions)} contributions, found {count}"
        )


def _advance(steps: Protocol, received: Mapping[int, bytes] | None) -> Exchange | Keep | Outcome:
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


async def _in_thread(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run blocking work in a thread. Cancelled, it waits for the end of the work first: a write must not come late."""
    future = asyncio.ensure_future(asyncio.to_thread(work, *args, **kwargs))
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        await asyncio.wait([future])
        raise


def _file_name(round_id: str) -> str:
    return digest_of(round_id.encode())
