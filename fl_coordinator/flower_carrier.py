"""What runs inside Flower's ServerApp process: the loop that carries commands from the coordinator to the nodes.

It fetches commands over HTTP, sends each to the nodes it names through Flower's Grid, and delivers what they answered;
several at once, each with its own deadline. One that rests, since no answer is expected yet, is looked after whenever
the coordinator was asked for news, every `SERVER_POLL_WAIT_S`: it may stand for hours. It runs as long as the platform
does; there is no `flwr run` per round and no strategy.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fl_coordinator.flower import CONTENT_S, REQUEST_TIMEOUT_S, as_unavailable
from fl_coordinator.flower_bridge import REPLY_MARGIN_S, read_command, write_reply
from model_delta.errors import Malformed, Unavailable

POLL_S = 0.1
SERVER_POLL_WAIT_S = 2.0
AFTER_FAILURE_S = 3.0
"""How long the other nodes may still take when one has failed: long enough for their reasons to be heard."""
CARRY_FAILURES_MAX = 3
FAILURE_S = 60.0
"""How long a failure counts: a ServerApp that holds a command for hours has some, which have nothing to do with each
other."""
AT_ONCE_MAX = 16
"""Commands that are taken up before the first is sent, so that a round's messages leave together."""
ANSWER_BYTES_MAX = 15 * 2**20
"""Of one node. The answers of three fit into what the coordinator takes at once (`routes.requests.REPLY_BYTES_MAX`)."""


def server_app() -> Any:
    """The ServerApp of our bundle: carries commands from the coordinator to the nodes until Flower ends it."""
    from flwr.serverapp import ServerApp

    # An answer can be seen a moment before its content has arrived; Flower then waits a whole second. An answer whose
    # node died while it sent the content comes back as an error after `CONTENT_S`, and the command is sent again.
    grids: Any = importlib.import_module("flwr.superlink.grid.http_grid")
    grids.pull_objects = functools.partial(
        grids.pull_objects, initial_backoff=0.05, backoff_cap=0.5, max_time=CONTENT_S
    )
    app = ServerApp()

    @app.main()  # type: ignore[untyped-decorator]
    def carry_commands(grid: Any, context: Any) -> None:
        config = context.run_config
        coordinator = _Coordinator(str(config["coordinator-url"]), Path(str(config["coordinator-token-file"])))
        CommandCarrier(grid, coordinator).run()

    return app


def client_app() -> Any:
    """The ClientApp that a bundle must have. It has no function: our nodes run no bundle, a stock one would refuse."""
    from flwr.clientapp import ClientApp

    return ClientApp()


class _Coordinator:
    """The coordinator's two endpoints for the ServerApp. The token is read from its file at every request."""

    def __init__(self, url: str, token: Path) -> None:
        import httpx

        self._url = url.rstrip("/")
        self._token = token
        self._client = httpx.Client(timeout=REQUEST_TIMEOUT_S, trust_env=False)

    def _headers(self) -> dict[str, str]:
        try:
            return {"authorization": f"Bearer {self._token.read_text('ascii').strip()}"}
        except OSError as error:
            raise Unavailable(f"coordinator token {self._token}: {error.strerror}") from None

    def next_command(self, holds: Collection[str], rests: Collection[str], wait_s: float) -> Any:
        """A command's wire form, or None: one that it does not hold, or that is due though it lets it rest. Raises
        Unavailable."""
        with as_unavailable(f"coordinator at {self._url}: asking for a command"):
            asked = {"wait": str(wait_s), "holds": ",".join(holds), "rests": ",".join(rests)}
            response = self._client.get(f"{self._url}/v1/flower/commands", params=asked, headers=self._headers())
            response.raise_for_status()
            return None if response.status_code == 204 else response.json()

    def reply(self, body: Mapping[str, Any]) -> bool:
        """Deliver an answer or a sign of progress; says whether it is still wanted. Raises Unavailable."""
        with as_unavailable(f"coordinator at {self._url}: delivering an answer"):
            response = self._client.post(f"{self._url}/v1/flower/replies", json=dict(body), headers=self._headers())
            response.raise_for_status()
            answer = response.json() if response.content else {}
        return not isinstance(answer, dict) or answer.get("wanted", True) is not False


@dataclass
class _Carried:
    """A command under way. Times are of the carrier's clock; `ends` is when nobody waits for it any more."""

    id: str
    nodes: tuple[str, ...]
    payload: bytes
    left_s: float
    rests: bool
    ends: float
    deadline: float
    sent: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Node name: message id, the activation it was sent to."""
    replies: dict[str, bytes] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    undone: set[str] = field(default_factory=set)
    """Nodes that said themselves that they did not carry it out."""
    asked: set[str] = field(default_factory=set)
    """Nodes that it was sent to, whatever became of them."""
    report_at: float = 0.0
    directory_at: float = 0.0
    wanted: bool = True

    @property
    def silent(self) -> list[str]:
        """The nodes that neither answered nor failed."""
        return [node for node in self.nodes if node not in self.replies and node not in self.failures]

    def done(self, now: float) -> bool:
        return not self.silent or now >= self.deadline


class CommandCarrier:
    """The ServerApp's loop, on Flower's Grid: one message per node and command, its own polling, its own deadlines.
    `clock` gives seconds that never go back."""

    def __init__(
        self,
        grid: Any,
        coordinator: _Coordinator,
        poll_s: float = POLL_S,
        after_failure_s: float = AFTER_FAILURE_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._grid = grid
        self._coordinator = coordinator
        self._poll_s = poll_s
        self._after_failure_s = after_failure_s
        self._clock = clock
        self._held: dict[str, _Carried] = {}
        self._singly = False

    def run(self) -> None:
        """Carry commands until the process ends. A coordinator that is away is asked again with backoff.

        What Flower raises is no reason to end at once, for a new ServerApp takes many seconds; what was held is then
        handed out again. After `CARRY_FAILURES_MAX` in a row the process ends, and its supervisor starts a new run.
        """
        pause_s, failures, failed_at, ask_at = 0.2, 0, 0.0, 0.0
        while True:
            try:
                if self._clock() >= ask_at:
                    self._take_up()
                    pause_s = 0.2
            except (Unavailable, Malformed) as error:
                print(f"ServerApp: {error}", flush=True)  # into the SuperLink's log
                ask_at = self._clock() + pause_s
                pause_s = min(2.0, pause_s * 2)
            try:
                if self.step():
                    failures = 0
            except Exception as error:
                failures = failures + 1 if self._clock() < failed_at + FAILURE_S else 1
                failed_at = self._clock()
                print(f"ServerApp: {type(error).__name__}: {error}", flush=True)
                if failures >= CARRY_FAILURES_MAX:
                    raise
                self._held.clear()
                time.sleep(pause_s)
            if self._busy or self._clock() < ask_at:
                time.sleep(self._poll_s)

    @property
    def _busy(self) -> bool:
        return any(not one.rests for one in self._held.values())

    def _take_up(self) -> None:
        """Take up what the coordinator has; wait for it if there is nothing else to do. Raises Unavailable,
        Malformed."""
        wait_s = 0.0 if self._busy else SERVER_POLL_WAIT_S
        for _ in range(AT_ONCE_MAX):
            rests = [one.id for one in self._held.values() if one.rests]
            command = self._coordinator.next_command(list(self._held), rests, wait_s)
            if command is None:
                return
            self.begin(command)
            wait_s = 0.0

    def begin(self, command: Any) -> None:
        """Take up a command in its wire form, or hear that one which rested is due. Raises Malformed."""
        read = read_command(command)
        ends = self._clock() + read.left_s
        held = self._held.get(read.id)
        if held is not None and held.rests:
            held.rests, held.ends, held.deadline = read.rests, ends, ends - REPLY_MARGIN_S
            return
        self._held[read.id] = _Carried(*read, ends, ends - REPLY_MARGIN_S)

    @property
    def holds(self) -> bool:
        """Whether a command is under way."""
        return bool(self._held)

    def step(self) -> bool:
        """Send what is to be sent, collect what has come, deliver what is complete; whether anything was delivered.

        One node that fails fails its command, so the command's others are waited for only a little longer: the next
        attempt is what helps, and it should not wait for a node that died with this one in hand.
        """
        now = self._clock()
        self._send(now, [one for one in self._held.values() if not one.done(now) and now >= one.directory_at])
        for one in self._held.values():
            if now >= one.report_at and not one.done(now):
                with contextlib.suppress(Unavailable):
                    one.wanted = self._coordinator.reply({"id": one.id, "progress": True})
                one.report_at = now + 1.0
        self._collect()
        delivered = False
        for one in list(self._held.values()):
            if one.failures:
                one.deadline = min(one.deadline, self._clock() + self._after_failure_s)
            if one.wanted and one.done(self._clock()):
                one.wanted = not self._deliver(one)
                delivered = delivered or not one.wanted
            if not one.wanted:
                del self._held[one.id]
        return delivered

    def _send(self, now: float, due: Sequence[_Carried]) -> None:
        """Send each command to those of its nodes that are online and have not had it since they came online."""
        from flwr.app import ConfigRecord, Message, RecordDict

        if not due:
            return
        online = {node.name: node for node in self._grid.get_nodes() if node.status == "online"}
        for one in due:
            one.directory_at = now + 1.0
            names = [
                name
                for name in one.silent
                if name in online and (name not in one.sent or one.sent[name][1] != online[name].last_activated_at)
            ]
            if not names:
                continue
            one.asked.update(names)
            # The same record for all: Flower stores and uploads equal objects once.
            content = RecordDict({"command": ConfigRecord({"id": one.id, "payload": one.payload})})
            ttl = one.left_s + 30.0
            messages = [
                Message(content, dst_node_id=online[name].node_id, message_type="query", ttl=ttl) for name in names
            ]
            for name, message_id in zip(names, self._grid.push_messages(messages), strict=True):
                if message_id:
                    one.sent[name] = (message_id, online[name].last_activated_at)

    def _collect(self) -> None:
        import httpx

        waiting = {
            one.sent[name][0]: (one, name) for one in self._held.values() for name in one.silent if name in one.sent
        }
        if not waiting:
            return
        for group in [[each] for each in waiting] if self._singly else [list(waiting)]:
            try:
                messages = list(self._grid.pull_messages(group))
            except (OSError, httpx.HTTPError):
                raise
            except Exception as error:
                if not self._singly:
                    # An answer that Flower cannot put together takes along all that came with it. They are asked for
                    # again, and from now on each by itself, so that a node which lies fails alone.
                    self._singly = True
                    raise
                one, name = waiting[group[0]]
                one.failures[name] = f"sent an answer that cannot be put together ({type(error).__name__})"
                continue
            for message in messages:
                if message.metadata.reply_to_message_id in waiting:
                    one, name = waiting[message.metadata.reply_to_message_id]
                    _take(message, one, name)

    def _deliver(self, one: _Carried) -> bool:
        """Hand over what came of a command; False when the coordinator is away and there is time to try again."""
        missing = {name: "did not answer in time" if name in one.sent else "is not online" for name in one.silent}
        unasked = set(one.nodes) - one.asked
        try:
            failures = one.failures | missing
            self._coordinator.reply(write_reply(one.id, one.replies, failures, one.undone | unasked, unasked))
        except Unavailable as error:
            if self._clock() < one.ends:
                return False
            print(f"ServerApp: {error}", flush=True)
        return True


def _take(message: Any, one: _Carried, name: str) -> None:
    """What a node answered, of whatever form."""
    if message.has_error():
        # The node went offline, or its answer was lost on the way: ask again when it is there.
        del one.sent[name]
        return
    try:
        answer = message.content["answer"]
        payload, said = answer.get("payload"), answer.get("error")
        reason = "sent an answer without content" if said is None else str(said)
        if payload is None and said is not None:
            one.undone.add(name)
    except Exception as error:
        payload, reason = None, f"sent an answer that makes no sense ({type(error).__name__})"
    if isinstance(payload, bytes) and len(payload) <= ANSWER_BYTES_MAX:
        one.replies[name] = payload
    elif payload is not None:
        one.failures[name] = f"sent an answer that is not up to {ANSWER_BYTES_MAX} bytes"
    else:
        one.failures[name] = reason[:500]
