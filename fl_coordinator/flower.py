"""Flower between the coordinator and its aggregators: server program, registrations and run, nodes, ServerApp.

Flower carries commands, not data. One round is one message per node and one small answer back; the devices' shares
travel elsewhere. A command's way:

- `FlowerBridge` (in `flower_bridge`) queues commands in the coordinator.
- The ServerApp, a process that Flower starts, fetches them over HTTP and sends each to the named nodes
  (`server_app`). It runs as long as the platform does; there is no `flwr run` per round and no strategy.
- The SuperLink, Flower's server process, keeps messages and registrations in SQLite. `flower_superlink` supervises it;
  what runs inside is `run_superlink`; `Control` registers nodes and starts the run.
- `FlowerNode`, a thread in the aggregator's process, takes a message, calls the aggregator, returns its answer.

Flower is pinned to one version, and this file is the only one that imports it (inside functions, so that importing
this module is cheap and works without Flower). Besides its public Grid it uses Flower's server program and the
protobuf clients of the Fleet and Control APIs, which are private; `tests/fl_coordinator/test_flower_process.py` holds
them to what is assumed here. `FleetHttpClient` is used rather than `http_request_response` around it, because the
latter ends the whole process (`sys.exit`, SIGINT to itself) when the server refuses, and a node only wants to try
again.

What is closed off, and how: the Control API of an open-source SuperLink answers anybody who reaches the port, and a
run that it starts is code that the SuperLink executes. `run_superlink` therefore puts a bearer token in front of every
path but `/v1/fleet/` (each request signed with a registered node's key) and `/v1/runtime/` (task tokens). A node runs
no bundle: it knows one kind of message, whose payload the aggregator must still find signed by the coordinator.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import hmac
import importlib
import logging
import os
import signal
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fl_coordinator.flower_bridge import REPLY_MARGIN_S, read_command, write_reply
from model_delta.encoding import pack, unpack_plain
from model_delta.errors import AtollError, Malformed, Unavailable

Handler = Callable[[dict[str, Any]], Mapping[str, Any]]
"""What a node does with a command: a map of plain values to a map of plain values (what CBOR carries). Blocks."""

APP_FOLDER = Path(__file__).resolve().parent / "flower_app"
POLL_S = 0.2
POLL_IDLE_S = 1.0
"""A node that had no command for `BUSY_S` seconds polls this often: each poll costs the SuperLink about 10 ms."""
BUSY_S = 20.0
SERVER_POLL_WAIT_S = 2.0
AFTER_FAILURE_S = 3.0
"""How long the other nodes may still take when one has failed: long enough for their reasons to be heard."""
CONTENT_S = 4.0
"""How long a message that is there may wait for its content. Content follows its message at once; if it does not, its
sender died between the two, and Flower itself would wait for two hours."""
CARRY_FAILURES_MAX = 3
WORKS_MAX = 4
REQUEST_TIMEOUT_S = 10.0
NODE_LIFE_S = 10.0
"""Flower's shortest heartbeat interval; it counts a node as gone after twice this."""

NIST_CURVES = (ec.SECP256R1, ec.SECP384R1, ec.SECP521R1)

_log = logging.getLogger("atoll.flower")


# --- the SuperLink's process -----------------------------------------------------------------------------------------


class _ControlToken:
    """ASGI middleware: no request passes without the token, but those that Flower authenticates by itself."""

    def __init__(self, app: Callable[..., Awaitable[None]], token: str) -> None:
        self._app = app
        self._expected = f"Bearer {token}".encode("ascii")

    async def __call__(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan" or self._passes(scope):
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await send({"type": "http.response.start", "status": 401, "headers": []})
            await send({"type": "http.response.body", "body": b""})

    def _passes(self, scope: MutableMapping[str, Any]) -> bool:
        if scope["type"] != "http":
            return False
        if scope["path"].startswith(("/v1/fleet/", "/v1/runtime/")):
            return True
        return any(
            name == b"authorization" and hmac.compare_digest(value, self._expected) for name, value in scope["headers"]
        )


def run_superlink(arguments: Sequence[str]) -> None:
    """Be a SuperLink: the main program of the process that `flower_superlink` starts. Returns when it is told to end.

    The same as `flower-superlink`, with a bearer token in front of the Control API, no access log, and an end when
    the supervisor or the SuperExec is gone.
    """
    token = Path(arguments[0]).read_text("ascii").strip()
    sys.argv = ["flower-superlink", *arguments[1:]]
    # The package's attribute of the same name is a function, so the module is fetched by its path.
    program = importlib.import_module("flwr.superlink.cli.flower_superlink")
    config = program._parse_superlink_lifespan_config()
    app = importlib.import_module("flwr.superlink.main").create_app(config, program.SuperLinkLifespan)
    app.add_middleware(_ControlToken, token=token)
    watch = functools.partial(_end_when_alone, os.getppid(), app.state.superlink_lifespan)
    threading.Thread(target=watch, name="watch", daemon=True).start()
    program.uvicorn.run(
        app,
        host=config.host,
        port=config.port,
        ssl_certfile=config.ssl_certfile,
        ssl_keyfile=config.ssl_keyfile,
        access_log=False,
        log_level="warning",
        timeout_graceful_shutdown=1,
    )


def _end_when_alone(supervisor: int, lifespan: Any) -> None:
    executor: subprocess.Popen[bytes] | None = None
    while os.getppid() == supervisor and (executor is None or executor.poll() is None):
        time.sleep(0.3)
        executor = executor or lifespan.superexec_process
    os.kill(os.getpid(), signal.SIGTERM)


# --- the SuperLink's Control API -------------------------------------------------------------------------------------


class Control:
    """Registers nodes and starts the run, over the SuperLink's Control API. Blocks; use it in a thread."""

    def __init__(self, address: str, ca: Path, token: Path) -> None:
        from flwr.supercore.control import ControlHttpClient

        try:
            bearer = _Bearer(token.read_text("ascii").strip())
        except OSError as error:
            raise Unavailable(f"SuperLink control token {token}: {error.strerror}") from None
        self._address = address
        self._client = _client(ControlHttpClient, address, ca, [bearer])

    def __enter__(self) -> Control:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def node_names(self) -> dict[str, int]:
        """Node id by name of every registered node."""
        return {node.name: node.node_id for node in self._nodes()}

    def _nodes(self) -> list[Any]:
        from flwr.proto.control_pb2 import ListNodesRequest

        with _as_unavailable(f"SuperLink at {self._address}: listing nodes"):
            infos = self._client.ListNodes(ListNodesRequest()).nodes_info
        return [info for info in infos if info.status != "unregistered"]

    def register_nodes(self, public_keys: Mapping[str, bytes]) -> dict[str, int]:
        """Make exactly one node of each name, with that key; return node ids by name.

        A node that is registered already stays as it is. One with the same name and another key is removed: the
        caller vouches for the keys. Raises Unavailable; Malformed when a key belongs to a node of another name.
        """
        from flwr.proto.control_pb2 import RegisterNodeRequest, UnregisterNodeRequest

        known = self._nodes()
        ids: dict[str, int] = {}
        for name, key in public_keys.items():
            check_public_key(key, f"Flower node {name}")
            for node in known:
                if node.public_key == key and node.name == name:
                    ids[name] = node.node_id
                elif node.public_key == key:
                    raise Malformed(f"Flower node {name}: its key is registered for {node.name!r}; give it a new key")
                elif node.name == name:
                    with _as_unavailable(f"SuperLink at {self._address}: removing the old {name}"):
                        self._client.UnregisterNode(UnregisterNodeRequest(node_id=node.node_id))
            if name not in ids:
                with _as_unavailable(f"SuperLink at {self._address}: registering {name}"):
                    ids[name] = self._client.RegisterNode(RegisterNodeRequest(public_key=key, name=name)).node_id
        return ids

    def ensure_run(self, coordinator_url: str, token: Path, ca: Path | None = None, *, fresh: bool = False) -> int:
        """Return the id of the one unfinished run of our app with this configuration, starting it if there is none.

        Other unfinished runs are stopped; with `fresh`, so is a matching one, because its process is known to be gone.
        `token` and `ca` are paths that the ServerApp reads; the token itself never enters Flower. Raises Unavailable.
        """
        from flwr.common.serde import fab_to_proto, user_config_from_proto, user_config_to_proto
        from flwr.proto.control_pb2 import ListRunsRequest, StartRunRequest, StopRunRequest
        from flwr.supercore.fab import Fab

        digest, bundle = build_app()
        wanted = {
            "coordinator-url": coordinator_url,
            "coordinator-token-file": str(token.resolve()),
            "coordinator-ca-file": str(ca.resolve()) if ca is not None else "",
        }
        with _as_unavailable(f"SuperLink at {self._address}: starting the run"):
            found: int | None = None
            for run_id, run in self._client.ListRuns(ListRunsRequest()).run_dict.items():
                if run.status.status == "finished":
                    continue
                same = run.fab_hash == digest and user_config_from_proto(run.override_config) == wanted
                if same and not fresh and found is None:
                    found = run_id
                else:
                    self._client.StopRun(StopRunRequest(run_id=run_id))
            if found is not None:
                return found
            request = StartRunRequest(
                fab=fab_to_proto(Fab(digest, bundle, {})), override_config=user_config_to_proto(wanted)
            )
            response = self._client.StartRun(request)
        if not response.HasField("run_id"):
            raise Unavailable(f"SuperLink at {self._address}: refused to start the run")
        return int(response.run_id)


@functools.cache
def build_app() -> tuple[str, bytes]:
    """Our Flower App Bundle: SHA-256 and bytes; the same for the same installed files."""
    from flwr.cli.build import build_fab_from_disk

    bundle: bytes = build_fab_from_disk(APP_FOLDER)
    return hashlib.sha256(bundle).hexdigest(), bundle


class _Bearer:
    """Interceptor of Flower's protobuf clients: sends a bearer token."""

    def __init__(self, token: str) -> None:
        self._value = f"Bearer {token}"

    def intercept(self, context: Any, call_next: Callable[[Any], Any]) -> Any:
        context.request.headers["authorization"] = self._value
        return call_next(context)


def _client(kind: Callable[..., Any], address: str, ca: Path, interceptors: Sequence[Any]) -> Any:
    """One of Flower's protobuf clients, trusting `ca` alone and ignoring the environment's proxies."""
    import httpx

    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        tls.load_verify_locations(cafile=ca)
    except OSError as error:
        raise Unavailable(f"certificate authority {ca}: {error}") from None
    client = kind(f"https://{address}", interceptors=interceptors, verify=tls, timeout=REQUEST_TIMEOUT_S)
    client._client.close()
    client._client = httpx.Client(verify=tls, timeout=REQUEST_TIMEOUT_S, trust_env=False)
    return client


class _Refused(Unavailable):
    """The server answered, but not with what was asked for."""


@contextlib.contextmanager
def _as_unavailable(doing: str) -> Iterator[None]:
    import httpx

    try:
        yield
    except httpx.HTTPStatusError as error:
        found = f"HTTP {error.response.status_code} {error.response.text[:200]}"
        raise _Refused(f"{doing}: {found}") from None
    except (httpx.HTTPError, OSError) as error:
        raise Unavailable(f"{doing}: {type(error).__name__}: {error}") from None


# --- a node ----------------------------------------------------------------------------------------------------------


def node_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """The node's P-384 key from `path` (PEM, 0600), drawn and stored there if the file is missing.

    Raises Malformed when the file holds anything but a key on a NIST curve, which is what Flower accepts.
    """
    if not path.exists():
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        new = ec.generate_private_key(ec.SECP384R1())
        plain = serialization.NoEncryption()
        pem = new.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)
        write_private(path, pem)
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), None)
    except ValueError:
        raise Malformed(f"Flower node key {path}: expected an unencrypted PEM private key") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, NIST_CURVES):
        raise Malformed(f"Flower node key {path}: expected a key on a NIST curve, found {type(key).__name__}")
    return key


def node_public_key(path: Path) -> bytes:
    """What the coordinator registers for the node whose key is at `path`: PEM of the public key."""
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return node_key(path).public_key().public_bytes(serialization.Encoding.PEM, form)


def check_public_key(pem: bytes, what: str) -> None:
    """Raise Malformed unless `pem` is a public key that Flower takes for a node: one on a NIST curve, in PEM."""
    try:
        key = serialization.load_pem_public_key(pem)
    except ValueError:
        raise Malformed(f"{what}: expected a public key in PEM, found {len(pem)} bytes of something else") from None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, NIST_CURVES):
        raise Malformed(f"{what}: expected a key on a NIST curve, found {type(key).__name__}")


def write_private(path: Path, data: bytes) -> None:
    """Write a secret to `path` at once, readable by its owner alone (0600)."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)


class FlowerNode:
    """One Flower node in a thread of the aggregator's process: takes commands, calls `handler`, returns its answers.

    The coordinator registers the node's public key under a name; until then, and whenever the SuperLink is away, the
    node tries again with backoff. Each command runs in a thread, so that one which hangs does not keep the next attempt
    from being heard; at most `WORKS_MAX` run at a time, and the handler decides between attempts at the same round. The
    answers to the last few commands are kept, so a command that arrives twice runs once. What `handler` raises travels
    as its reason: the text of an AtollError, else only the exception's type.
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
    ) -> None:
        self.name = name
        self._address = address
        self._ca = ca
        self._key = key
        self._handler = handler
        self._poll_s = poll_s
        self._poll_idle_s = poll_idle_s
        self._busy_until = 0.0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._done: dict[str, dict[str, Any]] = {}
        self._works: dict[str, threading.Thread] = {}
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
                else:
                    self._push(session, message, refusal)
            elif waiting:
                self._finished.wait(self._poll_s)
            else:
                self._stop.wait(self._poll_s if time.monotonic() < self._busy_until else self._poll_idle_s)

    def _push(self, session: _FleetSession, message: Any, answer: Mapping[str, Any]) -> None:
        try:
            session.push(message, answer)
        except _Refused as error:  # its run was stopped; the next ServerApp asks again
            _log.info("node %s: %s", self.name, error)

    def _begin(self, message: Any) -> tuple[str, dict[str, Any] | None]:
        """Start what a message asks for, unless it runs or has run already; its id, and what to answer if refused."""
        try:
            record = message.content["command"]
            command_id, payload = str(record["id"]), unpack_plain(bytes(record["payload"]))
            if not isinstance(payload, dict):
                raise Malformed(f"expected a map, found {type(payload).__name__}")
        except (KeyError, TypeError, ValueError, Malformed) as error:
            return "", {"id": "", "error": f"does not understand the command: {error}"[:500]}
        if command_id in self._done or command_id in self._works:
            return command_id, None
        if len(self._works) >= WORKS_MAX:
            return command_id, {"id": command_id, "error": f"is still busy with {len(self._works)} earlier commands"}
        work = threading.Thread(target=self._work, args=(command_id, payload), name=f"{self.name}-command", daemon=True)
        self._works[command_id] = work
        work.start()
        return command_id, None

    def _work(self, command_id: str, payload: dict[str, Any]) -> None:
        try:
            answer: dict[str, Any] = {"id": command_id, "payload": pack(dict(self._handler(payload)))}
        except AtollError as error:
            answer = {"id": command_id, "error": f"{type(error).__name__}: {error}"[:500]}
        except Exception as error:
            _log.exception("node %s: command %s", self.name, command_id)
            answer = {"id": command_id, "error": f"failed with {type(error).__name__}; see its log"}
        with self._answers:
            while len(self._done) >= 2 * WORKS_MAX:
                del self._done[next(iter(self._done))]
            self._done[command_id] = answer
            del self._works[command_id]
        self._finished.set()


class _FleetSession:
    """The Fleet API for one node: Flower's client, the node's key, and the node id that the SuperLink gave it."""

    def __init__(self, address: str, ca: Path, key: Path) -> None:
        from flwr.supercore.interceptors.http.runtime_version import RuntimeVersionHttpInterceptor
        from flwr.supernode.fleet_http_client import FleetHttpClient
        from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

        private = node_key(key)
        signs = NodeAuthHttpInterceptor(private, private.public_key())
        version = RuntimeVersionHttpInterceptor(component_name="SuperNode")
        self._client = _client(FleetHttpClient, address, ca, [version, signs])
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
        with _as_unavailable(f"{self._where}: activating the node"):
            self._node = Node(node_id=self._client.ActivateNode(request).node_id)
        self._beat = time.monotonic()
        self._memory.write_text(str(self._node.node_id), "ascii")

    def _deactivate(self, node_id: int) -> None:
        from flwr.proto.fleet_pb2 import DeactivateNodeRequest

        with _as_unavailable(f"{self._where}: deactivating the node"):
            self._client.DeactivateNode(DeactivateNodeRequest(node_id=node_id))

    def keep_alive(self) -> None:
        """Send a heartbeat if one is due."""
        from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest

        if time.monotonic() - self._beat < NODE_LIFE_S / 3:
            return
        with _as_unavailable(f"{self._where}: heartbeat"):
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

        with _as_unavailable(f"{self._where}: pulling a message"):
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
        with _as_unavailable(f"{self._where}: sending an answer"):
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


# --- inside the ServerApp's process ----------------------------------------------------------------------------------


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
        with _as_unavailable(f"coordinator at {self._url}: asking for a command"):
            wait = {"wait": str(SERVER_POLL_WAIT_S)}
            response = self._client.get(f"{self._url}/v1/flower/commands", params=wait, headers=self._headers())
            response.raise_for_status()
            return None if response.status_code == 204 else response.json()

    def reply(self, body: Mapping[str, Any]) -> bool:
        """Deliver an answer or a sign of progress; says whether it is still wanted. Raises Unavailable."""
        with _as_unavailable(f"coordinator at {self._url}: delivering an answer"):
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
        poll_s: float = POLL_S / 2,
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


if __name__ == "__main__":
    run_superlink(sys.argv[1:])
