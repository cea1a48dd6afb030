"""The queue between the coordinator and its Flower ServerApp, and the form in which commands cross it.

The ServerApp is a process of its own, started by Flower, and it may die and come back at any moment. So it fetches its
work: it asks for the next command (`next_command`, a long poll), sends it to the named nodes through Flower, and
delivers what they answered (`reply`). Both are mounted by the coordinator's HTTP control API, which also checks the
bearer token; nothing here knows HTTP.

A standing command is one that no node answers for hours, and then all at once. Until its answers are `due` it rests:
the ServerApp looks after it every few seconds instead of ten times a second, and is told when that is over.

A command is handed out again at every poll until it is answered or its deadline passes, unless the poll says that the
ServerApp holds it: it works on several at once, for a relay that is down must not keep the aggregators waiting. A new
ServerApp holds none. A node recognises the id of a command that it has done already and repeats its answer. Delivery is
therefore at least once, execution once.

Wire form (JSON; `payload` and the values of `replies` are the canonical CBOR of `model_delta.encoding`, in base64).
Fields may be added; a reader ignores those that it does not know.

    command  {"id": str, "nodes": [str], "payload": str, "deadline_s": float, "rests": bool}   seconds left by then
             again, with another deadline, when a command that the ServerApp says is at rest is due
    reply    {"id": str, "replies": {node: str}, "failures": {node: reason}, "undone": [node], "unasked": [node]}
             the end of the command; `undone`: those of the failures that said so themselves, or were never asked;
             `unasked`: only the latter
    progress {"id": str, "progress": true}                                         "still waiting for nodes"
    answer to reply and progress: {"wanted": bool}, false when nobody waits for this command any more
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import time
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

from model_delta.encoding import pack, unpack_plain
from model_delta.errors import Malformed, Unavailable

PENDING_MAX = 512
"""Commands that may wait at once; a round needs one for the aggregators and one for each relay, which may be down."""
STANDING_MAX = 128
"""As many of them may stand: they must not keep the others out of the queue."""

REPLY_MARGIN_S = 0.5
"""How much earlier than the coordinator the ServerApp gives up on silent nodes, so that its answer names them."""


class CommandFailed(Unavailable):
    """A command that not every node answered. `replies` has what did arrive, `failures` a reason per missing node;
    `undone` are those of the missing that surely did not carry it out: the others may have, and nobody heard of it."""

    def __init__(
        self,
        message: str,
        replies: Mapping[str, dict[str, Any]],
        failures: Mapping[str, str],
        undone: Collection[str] = (),
    ) -> None:
        super().__init__(message)
        self.replies = dict(replies)
        self.failures = dict(failures)
        self.undone = frozenset(undone)


class _Pending:
    """One command that has not been answered."""

    def __init__(
        self,
        nodes: tuple[str, ...],
        payload: str,
        deadline: float,
        fetched: asyncio.Event,
        due: asyncio.Future[float] | None,
    ) -> None:
        self.nodes = nodes
        self.payload = payload
        self.deadline = deadline
        self.handed_out = 0
        self.fetched = fetched
        self.due = due
        self.answer: asyncio.Future[Mapping[str, Any]] = asyncio.get_running_loop().create_future()

    @property
    def rests(self) -> bool:
        """Whether no answer is expected yet."""
        return self.due is not None and not self.due.done()

    def undone(self, body: Mapping[str, Any], missing: Collection[str]) -> Collection[str]:
        """Those of the missing that surely did not carry it out, by the ServerApp's answer.

        A ServerApp that had the command before, and died, may have asked whom this one did not. While a command rested
        there was nothing to carry out: what counts of it is who said so."""
        if self.handed_out != 1:
            return ()
        unasked = _names(body.get("unasked")) if self.due is not None else set()
        return set(missing) & _names(body.get("undone")) - unasked


class FlowerBridge:
    """Commands in, the nodes' answers out. Belongs to one event loop; nothing in it survives a restart."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._pending: dict[str, _Pending] = {}
        self._arrived = asyncio.Event()
        self._contact = clock()

    @property
    def silent_s(self) -> float:
        """Seconds since the ServerApp last asked for work or reported progress (or since this bridge was made)."""
        return max(0.0, self._clock() - self._contact)

    async def command(
        self,
        payload: Mapping[str, Any],
        nodes: Sequence[str],
        deadline_s: float,
        fetched: asyncio.Event | None = None,
        due: asyncio.Future[float] | None = None,
    ) -> dict[str, dict[str, Any]]:
        """Have every node carry out `payload`, and return its answer by node name. `fetched` is set as soon as a
        ServerApp has the command: who stops waiting before that knows that no node will hear of it. With `due` it is a
        standing command: answers are expected once that future is done, within as many seconds as its result says.

        Raises CommandFailed, which names each missing node and why, when one did not answer within `deadline_s`
        seconds (or those of `due`) or answered with an error; Unavailable when too many commands wait already.
        """
        if not nodes:
            raise Malformed("Flower command: expected at least one node, found none")
        if len(self._pending) >= PENDING_MAX:
            raise Unavailable(f"Flower command: {PENDING_MAX} commands wait already; is the ServerApp running?")
        if due is not None and sum(one.due is not None for one in self._pending.values()) >= STANDING_MAX:
            raise Unavailable(f"Flower command: {STANDING_MAX} commands stand already")
        command_id = uuid.uuid4().hex
        armoured, deadline = _armour(pack(dict(payload))), self._clock() + deadline_s
        pending = _Pending(tuple(nodes), armoured, deadline, fetched or asyncio.Event(), due)
        self._pending[command_id] = pending
        self._arrived.set()
        try:
            async with asyncio.timeout(deadline_s) as limit:
                if due is not None:
                    waiting: tuple[asyncio.Future[Any], ...] = (due, pending.answer)
                    await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                    if due.done():
                        deadline_s = due.result()
                        limit.reschedule(asyncio.get_running_loop().time() + deadline_s)
                        pending.deadline = self._clock() + deadline_s
                        pending.handed_out = min(pending.handed_out, 1)
                        self._arrived.set()
                body = await pending.answer
        except TimeoutError:
            why = "did not answer" if pending.handed_out else "was not asked: the ServerApp fetched no command"
            failures = dict.fromkeys(pending.nodes, f"{why} within {deadline_s:g} s")
            undone = () if pending.handed_out or due is not None else pending.nodes
            raise CommandFailed(_describe(failures, pending.nodes), {}, failures, undone) from None
        finally:
            del self._pending[command_id]
        replies, failures = _read_reply(body, pending.nodes)
        if failures:
            described = _describe(failures, pending.nodes)
            raise CommandFailed(described, replies, failures, pending.undone(body, failures))
        return replies

    async def next_command(
        self, wait_s: float, holds: Collection[str] = (), rests: Collection[str] = ()
    ) -> dict[str, Any] | None:
        """The oldest command without an answer that is not one of `holds` (ids), or that is due though it is one of
        those which the asker lets rest, `rests`; as its wire form. None when there was none for `wait_s` seconds."""
        deadline = self._clock() + min(max(wait_s, 0.0), 60.0)
        while True:
            now = self._contact = self._clock()
            for command_id, pending in self._pending.items():
                if pending.answer.done() or pending.deadline <= now:
                    continue
                if command_id not in holds:
                    pending.handed_out += 1
                    pending.fetched.set()
                elif command_id not in rests or pending.rests:
                    continue
                return {
                    "id": command_id,
                    "nodes": list(pending.nodes),
                    "payload": pending.payload,
                    "deadline_s": round(pending.deadline - now, 3),
                    "rests": pending.rests,
                }
            self._arrived.clear()
            try:
                async with asyncio.timeout(max(0.0, deadline - now)):
                    await self._arrived.wait()
            except TimeoutError:
                self._contact = self._clock()
                return None

    def reply(self, body: Any) -> dict[str, bool]:
        """Take the ServerApp's answer or sign of progress, a decoded JSON object; says whether it is still wanted.

        Raises Malformed when `body` is neither.
        """
        if not isinstance(body, Mapping) or not isinstance(body.get("id"), str):
            raise Malformed("Flower reply: expected an object with the command's `id`")
        self._contact = self._clock()
        pending = self._pending.get(body["id"])
        if pending is None or pending.answer.done():
            return {"wanted": False}
        if body.get("progress") is not True:
            _read_reply(body, pending.nodes)
            pending.answer.set_result(body)
        return {"wanted": True}


class WireCommand(NamedTuple):
    """A command as the ServerApp takes it up: `payload` is CBOR, `left_s` how many seconds are left for it."""

    id: str
    nodes: tuple[str, ...]
    payload: bytes
    left_s: float
    rests: bool


def read_command(body: Any) -> WireCommand:
    """Take a command's wire form apart. Raises Malformed."""
    try:
        nodes = tuple(str(node) for node in body["nodes"])
        payload, left_s = _disarm(body["payload"]), float(body["deadline_s"])
        return WireCommand(str(body["id"]), nodes, payload, left_s, body.get("rests") is True)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise Malformed(f"Flower command: expected id, nodes, payload and deadline_s: {error!r}") from None


def write_reply(
    command_id: str,
    replies: Mapping[str, bytes],
    failures: Mapping[str, str],
    undone: Collection[str] = (),
    unasked: Collection[str] = (),
) -> dict[str, Any]:
    """The wire form of an answer; `replies` are CBOR bytes by node name, `undone` as in `CommandFailed`, `unasked` are
    those of them that were never sent the command."""
    return {
        "id": command_id,
        "replies": {node: _armour(reply) for node, reply in replies.items()},
        "failures": dict(failures),
        "undone": sorted(undone),
        "unasked": sorted(unasked),
    }


def _read_reply(body: Mapping[str, Any], nodes: Sequence[str]) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    replies: dict[str, dict[str, Any]] = {}
    failures: dict[str, str] = {}
    armoured, reasons = body.get("replies"), body.get("failures")
    if not isinstance(armoured, Mapping) or not isinstance(reasons, Mapping):
        raise Malformed("Flower reply: expected `replies` and `failures`, two objects keyed by node name")
    for node in nodes:
        if node in armoured:
            try:
                answer = unpack_plain(_disarm(armoured[node]))
            except Malformed as error:  # the node's own doing: it is named, and the others' answers count
                failures[node] = f"sent an answer that cannot be read: {error}"[:500]
                continue
            if isinstance(answer, dict):
                replies[node] = answer
            else:
                failures[node] = f"sent an answer that is no map but {type(answer).__name__}"
        else:
            failures[node] = str(reasons.get(node, "is missing from the ServerApp's answer"))[:500]
    return replies, failures


def _names(said: Any) -> set[str]:
    return {node for node in said if isinstance(node, str)} if isinstance(said, list) else set()


def _describe(failures: Mapping[str, str], nodes: Sequence[str]) -> str:
    reasons = "; ".join(f"{node} {reason}" for node, reason in failures.items())
    return f"Flower command: {len(nodes) - len(failures)} of {len(nodes)} nodes answered; {reasons}"


def _armour(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _disarm(text: Any) -> bytes:
    if not isinstance(text, str):
        raise Malformed(f"Flower message: expected base64 text, found {type(text).__name__}")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise Malformed(f"Flower message: not base64: {error}") from None
