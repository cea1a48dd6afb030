"""A Flower node inside the process of an aggregator or relay: takes commands from the SuperLink, returns answers.

It is no SuperNode: it runs no bundle and starts no process. It knows one kind of message, whose payload the process
must still find signed by the coordinator. It speaks the Fleet API through Flower's own protobuf client, which is
private; `FleetHttpClient` is used rather than `http_request_response` around it, because the latter ends the whole
process (`sys.exit`, SIGINT to itself) when the server refuses, and a node only wants to try again.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fl_coordinator.flower import CONTENT_S, Refused, as_unavailable, http_client, load, node_key, node_public_key
from model_delta.encoding import pack, unpack_plain
from model_delta.errors import AtollError, Malformed, Unavailable

Handler = Callable[[dict[str, Any]], Mapping[str, Any]]
"""What a node does with a command: a map of plain values to a map of plain values (what CBOR carries). Blocks."""

POLL_S = 0.2
POLL_IDLE_S = 0.5
"""A node that had no command for `BUSY_S` seconds polls this often: each poll costs the SuperLink about 3 ms."""
BUSY_S = 20.0
WORKS_MAX = 4
RESTS_MAX = 32
"""Commands that stand and are no work yet: one for each model whose round collects."""
FAILURES_KEPT_MAX = 2 * (WORKS_MAX + RESTS_MAX)
NODE_LIFE_S = 10.0
"""Flower's shortest heartbeat interval; it counts a node as gone after twice this."""

_log = logging.getLogger("atoll.flower")


class FlowerNode:
    """One Flower node in a thread of its process: takes commands, calls `handler`, returns its answers.

    The coordinator registers the node's public key under a name; until then, and whenever the SuperLink is away, the
    node tries again with backoff. Each command runs in a thread, so that one which hangs does not keep the next attempt
    from being heard; at most `WORKS_MAX` run at a time, and the handler decides between attempts at the same round.
    Those of which `rests` says that they may wait for hours before they are work are counted by themselves, up to
    `RESTS_MAX`. The answers to the last few commands are kept, so a command that arrives twice runs once. What
    `handler` raises travels as its reason: the text of an AtollError, else only the exception's type.
    """

    def __init__(
        self,
        name: str,
        address: str,
        ca: Path,
        key: Path,
        handler: Handler,
        poll_s: float = POLL_S,
        poll_idle_s: float = POLL_IDLE_S,
        rests: Callable[[dict[str, Any]], bool] = lambda command: False,
    ) -> None:
        self.name = name
        self._address = address
        self._ca = ca
        self._key = key
        self._handler = handler
        self._poll_s = poll_s
        self._poll_idle_s = poll_idle_s
        self._rests = rests
        self._busy_until = 0.0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._done: dict[str, dict[str, Any]] = {}
        self._works: dict[str, bool] = {}  # command id: whether it rests
        self._answers = threading.Lock()
        self._finished = threading.Event()
        self._connected = threading.Event()

    @property
    def connected(self) -> bool:
        """Whether the last request to the SuperLink succeeded."""
        return self._connected.is_set()

    def start(self) -> None:
        """Start the thread."""
        self._thread = threading.Thread(target=self.run, name=f"flower-{self.name}", daemon=True)
        self._thread.start()

    def stop(self, wait_s: float = 5.0) -> None:
        """Stop; a handler that still runs is left to itself and its answer is dropped."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(wait_s)

    def run(self) -> None:
        """Serve until `stop` is called from another thread."""
        pause_s = 0.2
        while not self._stop.is_set():
            try:
                with _FleetSession(self._address, self._ca, self._key) as session:
                    session.activate()
                    self._connected.set()
                    pause_s = 0.2
                    self._serve(session)
            except Unavailable as error:
                _log.log(logging.WARNING if self.connected else logging.DEBUG, "node %s: %s", self.name, error)
            except Exception:
                _log.exception("node %s: unexpected; trying again", self.name)
            self._connected.clear()
            self._stop.wait(pause_s)
            pause_s = min(3.0, pause_s * 1.6)

    def _serve(self, session: _FleetSession) -> None:
        """Take messages, and answer each when its command is done, until stopped or cut off. Messages that are not
        answered by then are asked again: the ServerApp sees that the node came online anew."""
        waiting: list[tuple[str, float, Any]] = []  # command id, until when its answer is wanted, message
        while not self._stop.is_set():
            session.keep_alive()
            self._finished.clear()
            still = []
            for command_id, until, message in waiting:
                if command_id in self._done:
                    self._push(session, message, self._done[command_id])
                elif time.monotonic() < until:
                    still.append((command_id, until, message))
            waiting = still
            message = session.pull()
            if message is not None:
                command_id, refusal = self._begin(message)
                self._busy_until = time.monotonic() + BUSY_S
                if refusal is None:
                    waiting.append((command_id, time.monotonic() + float(message.metadata.ttl), message))
                    self._finished.wait(self._poll_s)  # most commands are done before another could come
                else:
                    self._push(session, message, refusal)
            else:  # a command that rests may take hours to finish: it is no reason to poll more often
                pause_s = self._poll_s if time.monotonic() < self._busy_until else self._poll_idle_s
                (self._finished if waiting else self._stop).wait(pause_s)

    def _push(self, session: _FleetSession, message: Any, answer: Mapping[str, Any]) -> None:
        self._busy_until = time.monotonic() + BUSY_S
        try:
            session.push(message, answer)
        except Refused as error:  # its run was stopped; the next ServerApp asks again
            _log.info("node %s: %s", self.name, error)

    def _begin(self, message: Any) -> tuple[str, dict[str, Any] | None]:
        """Start what a message asks for, unless it runs or has run already; its id, and what to answer if refused."""
        try:
            record = message.content["command"]
            command_id, packed = str(record["id"]), record["payload"]
            payload = unpack_plain(packed) if isinstance(packed, bytes) else packed
            if not isinstance(payload, dict):
                raise Malformed(f"expected a map, found {type(payload).__name__}")
        except (KeyError, TypeError, ValueError, Malformed) as error:
            return "", {"id": "", "error": f"does not understand the command: {error}"[:500]}
        if command_id in self._works or command_id in self._done:  # in this order: it goes from the one to the other
            return command_id, None
        rests = self._rests(payload)
        with self._answers:
            beside = sum(one is rests for one in self._works.values())
            if beside >= (RESTS_MAX if rests else WORKS_MAX):
                return command_id, {"id": command_id, "error": f"is still busy with {beside} earlier commands"}
            self._works[command_id] = rests
        threading.Thread(
            target=self._work, args=(command_id, payload), name=f"{self.name}-command", daemon=True
        ).start()
        return command_id, None

    def _work(self, command_id: str, payload: dict[str, Any]) -> None:
        try:
            answer: dict[str, Any] = {"id": command_id, "payload": pack(dict(self._handler(payload)))}
        except AtollError as error:
            answer = {"id": command_id, "error": f"{type(error).__name__}: {error}"[:500]}
        except Exception as error:
            _log.exception("node %s: command %s", self.name, command_id)
            answer = {"id": command_id, "error": f"failed with {type(error).__name__}; see its log"}
        failed = "error" in answer
        with self._answers:  # short ones are counted by themselves: they must not push out answers that are under way
            alike = [one for one, found in self._done.items() if ("error" in found) is failed]
            for one in alike[: max(0, len(alike) + 1 - (FAILURES_KEPT_MAX if failed else 2 * WORKS_MAX))]:
                del self._done[one]
            self._done[command_id] = answer
            del self._works[command_id]
        self._finished.set()


class _FleetSession:
    """The Fleet API for one node: Flower's client, the node's key, and the node id that the SuperLink gave it."""

    def __init__(self, address: str, ca: Path, key: Path) -> None:
        load()
        from flwr.supercore.interceptors.http.runtime_version import RuntimeVersionHttpInterceptor
        from flwr.supernode.fleet_http_client import FleetHttpClient
        from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

        private = node_key(key)
        signs = NodeAuthHttpInterceptor(private, private.public_key())
        version = RuntimeVersionHttpInterceptor(component_name="SuperNode")
        self._client = http_client(FleetHttpClient, address, ca, [version, signs])
        self._where = f"SuperLink at {address}"
        self._public = node_public_key(key)
        self._memory = key.with_name(f"{key.name}.node")
        self._node: Any = None
        self._beat = 0.0

    def __enter__(self) -> _FleetSession:
        return self

    def __exit__(self, *_: object) -> None:
        if self._node is not None:
            with contextlib.suppress(Unavailable, OSError):
                self._deactivate(self._node.node_id)
                self._memory.unlink()
        self._client.close()

    def activate(self) -> None:
        """Go online. Raises Unavailable, also when the key is not registered yet."""
        from flwr.proto.fleet_pb2 import ActivateNodeRequest
        from flwr.proto.node_pb2 import Node

        # After a crash the SuperLink still counts the node as online for 20 s and would not activate it again.
        with contextlib.suppress(Unavailable, OSError, ValueError):
            self._deactivate(int(self._memory.read_text("ascii")))
        request = ActivateNodeRequest(public_key=self._public, heartbeat_interval=NODE_LIFE_S)
        with as_unavailable(f"{self._where}: activating the node"):
            self._node = Node(node_id=self._client.ActivateNode(request).node_id)
        self._beat = time.monotonic()
        self._memory.write_text(str(self._node.node_id), "ascii")

    def _deactivate(self, node_id: int) -> None:
        from flwr.proto.fleet_pb2 import DeactivateNodeRequest

        with as_unavailable(f"{self._where}: deactivating the node"):
            self._client.DeactivateNode(DeactivateNodeRequest(node_id=node_id))

    def keep_alive(self) -> None:
        """Send a heartbeat if one is due."""
        from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest

        if time.monotonic() - self._beat < NODE_LIFE_S / 3:
            return
        with as_unavailable(f"{self._where}: heartbeat"):
            request = SendNodeHeartbeatRequest(node=self._node, heartbeat_interval=NODE_LIFE_S)
            if not self._client.SendNodeHeartbeat(request).success:
                raise Unavailable(f"{self._where}: does not know this node any more")
        self._beat = time.monotonic()

    def pull(self) -> Any:
        """The next message with its content, or None."""
        from flwr.common.serde import message_from_proto
        from flwr.proto.fleet_pb2 import PullMessagesRequest
        from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest
        from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
        from flwr.supercore.inflatable.inflatable_protobuf_utils import make_pull_object_fn_protobuf
        from flwr.supercore.inflatable.inflatable_utils import (
            ObjectPullError,
            inflate_object_from_contents,
            pull_objects,
        )

        with as_unavailable(f"{self._where}: pulling a message"):
            response = self._client.PullMessages(PullMessagesRequest(node=self._node))
            if not response.messages_list:
                return None
            metadata = message_from_proto(response.messages_list[0]).metadata
            parts = [tree.object_id for tree in iterate_object_tree(response.message_object_trees[0])]
            fetch = make_pull_object_fn_protobuf(self._client.PullObject, self._node, metadata.run_id)
            try:
                contents = pull_objects(parts, fetch, initial_backoff=0.05, backoff_cap=0.5, max_time=CONTENT_S)
            except ObjectPullError as error:
                raise Unavailable(f"{self._where}: a message without its content: {error}") from None
            self._client.ConfirmMessageReceived(
                ConfirmMessageReceivedRequest(
                    node=self._node, run_id=metadata.run_id, message_object_id=metadata.message_id
                )
            )
        message: Any = inflate_object_from_contents(metadata.message_id, contents)
        message.metadata.__dict__["_message_id"] = metadata.message_id
        return message

    def push(self, message: Any, answer: Mapping[str, Any]) -> None:
        """Send `answer` back. Raises Unavailable; the ServerApp then asks again."""
        from flwr.app import ConfigRecord, Message, RecordDict
        from flwr.app.message import remove_content_from_message
        from flwr.common.serde import message_to_proto
        from flwr.proto.fleet_pb2 import PushMessagesRequest
        from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
        from flwr.supercore.inflatable.inflatable_protobuf_utils import make_push_object_fn_protobuf
        from flwr.supercore.inflatable.inflatable_utils import ObjectPushError, push_objects

        reply = Message(RecordDict({"answer": ConfigRecord(dict(answer))}), reply_to=message)
        reply.metadata.__dict__["_message_id"] = reply.object_id
        with as_unavailable(f"{self._where}: sending an answer"):
            response = self._client.PushMessages(
                PushMessagesRequest(
                    node=self._node,
                    messages_list=[message_to_proto(remove_content_from_message(reply))],
                    message_object_trees=[get_object_tree(reply)],
                    clientapp_runtime_list=[0.0],
                )
            )
            run_id = message.metadata.run_id
            store = make_push_object_fn_protobuf(self._client.PushObject, self._node, run_id, response.session_id)
            try:
                push_objects(get_all_nested_objects(reply), store, object_ids_to_push=set(response.objects_to_push))
            except ObjectPushError as error:
                raise Unavailable(f"{self._where}: sending an answer: {error}") from None
