"""What runs inside Flower's ServerApp process: the loop that carries commands from the coordinator to the nodes.

It fetches a command over HTTP, sends it to the named nodes through Flower's Grid, and delivers what they answered. It
runs as long as the platform does; there is no `flwr run` per round and no strategy.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import ssl
import time
from collections.abc import Mapping, Sequence
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
        ca = str(config["coordinator-ca-file"])
        carrier = CommandCarrier(
            grid,
            _Coordinator(
                str(config["coordinator-url"]), Path(str(config["coordinator-token-file"])), Path(ca) if ca else None
            ),
        )
        carrier.run()

    return app


def client_app() -> Any:
    """The ClientApp that a bundle must have. It has no function: our nodes run no bundle, a stock one would refuse."""
    from flwr.clientapp import ClientApp

    return ClientApp()


class _Coordinator:
    """The coordinator's two endpoints for the ServerApp. The token is read from its file at every request."""

    def __init__(self, url: str, token: Path, ca: Path | None) -> None:
        import httpx

        verify = ssl.create_default_context(cafile=str(ca)) if ca is not None else True
        self._url = url.rstrip("/")
        self._token = token
        self._client = httpx.Client(verify=verify, timeout=REQUEST_TIMEOUT_S, trust_env=False)

    def _headers(self) -> dict[str, str]:
        try:
            return {"authorization": f"Bearer {self._token.read_text('ascii').strip()}"}
        except OSError as error:
            raise Unavailable(f"coordinator token {self._token}: {error.strerror}") from None

    def next_command(self) -> Any:
        """A command's wire form, or None. Raises Unavailable."""
        with as_unavailable(f"coordinator at {self._url}: asking for a command"):
            wait = {"wait": str(SERVER_POLL_WAIT_S)}
            response = self._client.get(f"{self._url}/v1/flower/commands", params=wait, headers=self._headers())
            response.raise_for_status()
            return None if response.status_code == 204 else response.json()

    def reply(self, body: Mapping[str, Any]) -> bool:
        """Deliver an answer or a sign of progress; says whether it is still wanted. Raises Unavailable."""
        with as_unavailable(f"coordinator at {self._url}: delivering an answer"):
            response = self._client.post(f"{self._url}/v1/flower/replies", json=dict(body), headers=self._headers())
            response.raise_for_status()
            answer = response.json() if response.content else {}
        return not isinstance(answer, dict) or answer.get("wanted", True) is not False


class CommandCarrier:
    """The ServerApp's loop, on Flower's Grid: one message per node and command, its own polling, its own deadline."""

    def __init__(
        self,
        grid: Any,
        coordinator: _Coordinator,
        poll_s: float = POLL_S,
        after_failure_s: float = AFTER_FAILURE_S,
    ) -> None:
        self._grid = grid
        self._coordinator = coordinator
        self._poll_s = poll_s
        self._after_failure_s = after_failure_s

    def run(self) -> None:
        """Carry commands until the process ends. A coordinator that is away is asked again with backoff.

        What Flower raises is no reason to end at once, for a new ServerApp takes many seconds; the command is handed
        out again. After `CARRY_FAILURES_MAX` in a row the process ends, and its supervisor starts a new run.
        """
        pause_s, failures = 0.2, 0
        while True:
            try:
                command = self._coordinator.next_command()
                pause_s = 0.2
                if command is not None:
                    self.carry(command)
                    failures = 0
            except (Unavailable, Malformed) as error:
                print(f"ServerApp: {error}", flush=True)  # into the SuperLink's log
                time.sleep(pause_s)
                pause_s = min(2.0, pause_s * 2)
            except Exception as error:
                failures += 1
                print(f"ServerApp: {type(error).__name__}: {error}", flush=True)
                if failures >= CARRY_FAILURES_MAX:
                    raise
                time.sleep(pause_s)

    def carry(self, command: Any) -> None:
        """Send one command, collect the answers until its deadline, deliver them.

        One node that fails fails the command, so the others are waited for only a little longer: the next attempt is
        what helps, and it should not wait for a node that died with this one in hand.
        """
        command_id, nodes, payload, left_s = read_command(command)
        ends = deadline = time.monotonic() + left_s - REPLY_MARGIN_S
        replies: dict[str, bytes] = {}
        failures: dict[str, str] = {}
        sent: dict[str, tuple[str, str]] = {}  # node name: message id, the activation it was sent to
        report_at = directory_at = 0.0
        while (now := time.monotonic()) < deadline:
            open_nodes = [node for node in nodes if node not in replies and node not in failures]
            if not open_nodes:
                break
            if now >= directory_at:
                self._send(command_id, payload, open_nodes, sent, left_s)
                directory_at = now + 1.0
            if now >= report_at:
                with contextlib.suppress(Unavailable):
                    if not self._coordinator.reply({"id": command_id, "progress": True}):
                        return
                report_at = now + 1.0
            self._collect(sent, replies, failures)
            if failures and deadline == ends:
                deadline = min(ends, time.monotonic() + self._after_failure_s)
            if len(replies) + len(failures) < len(nodes):
                time.sleep(self._poll_s)
        for node in nodes:
            if node not in replies and node not in failures:
                failures[node] = "did not answer in time" if node in sent else "is not online"
        self._deliver(write_reply(command_id, replies, failures), ends + REPLY_MARGIN_S)

    def _send(
        self,
        command_id: str,
        payload: bytes,
        names: Sequence[str],
        sent: dict[str, tuple[str, str]],
        left_s: float,
    ) -> None:
        """Send the command to those of `names` that are online and have not had it since they came online."""
        from flwr.app import ConfigRecord, Message, RecordDict

        online = {node.name: node for node in self._grid.get_nodes() if node.status == "online"}
        due = [n for n in names if n in online and (n not in sent or sent[n][1] != online[n].last_activated_at)]
        # The same record for all: Flower stores and uploads equal objects once.
        content = RecordDict({"command": ConfigRecord({"id": command_id, "payload": payload})})
        messages = [
            Message(content, dst_node_id=online[name].node_id, message_type="query", ttl=left_s + 30.0) for name in due
        ]
        for name, message_id in zip(due, self._grid.push_messages(messages), strict=True):
            if message_id:
                sent[name] = (message_id, online[name].last_activated_at)

    def _collect(self, sent: dict[str, tuple[str, str]], replies: dict[str, bytes], failures: dict[str, str]) -> None:
        waiting = {message_id: name for name, (message_id, _) in sent.items() if name not in replies | failures}
        if not waiting:
            return
        for message in self._grid.pull_messages(list(waiting)):
            name = waiting.get(message.metadata.reply_to_message_id)
            if name is None:
                continue
            if message.has_error():
                # The node went offline, or its answer was lost on the way: ask again when it is there.
                del sent[name]
                continue
            answer = message.content["answer"]
            if "payload" in answer:
                replies[name] = bytes(answer["payload"])
            else:
                failures[name] = str(answer.get("error", "sent an answer without content"))

    def _deliver(self, body: Mapping[str, Any], deadline: float) -> None:
        while True:
            try:
                self._coordinator.reply(body)
                return
            except Unavailable:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.2)
