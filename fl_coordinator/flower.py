"""Flower between the coordinator and its aggregators: server program, registrations and the run, and shared clients.

Flower carries commands, not data. One round is one message per node and one small answer back; the devices' shares
travel elsewhere. A command's way:

- `FlowerBridge` (in `flower_bridge`) queues commands in the coordinator.
- The ServerApp, a process that Flower starts, fetches them over HTTP and sends each to the named nodes
  (`flower_carrier`).
- The SuperLink, Flower's server process, keeps messages and registrations in memory. `flower_superlink` supervises it;
  what runs inside is `run_superlink`; `Control` registers nodes and starts the run.
- `FlowerNode` (in `flower_node`), a thread in the aggregator's process, takes a message, calls the aggregator, returns
  its answer.

Flower is pinned to one version, and only this file, `flower_node` and `flower_carrier`, one for each process that has a
part in it, import it (inside functions, so that importing them is cheap and works without Flower). Besides its public
Grid they use Flower's server program and the protobuf clients of the Fleet and Control APIs, which are private;
`tests/fl_coordinator/test_flower_process.py` holds them to what is assumed here.

What is closed off, and how: the Control API of an open-source SuperLink answers anybody who reaches the port, and a
run that it starts is code that the SuperLink executes. `run_superlink` therefore puts a bearer token in front of every
path but `/v1/fleet/` (each request signed with a registered node's key) and `/v1/runtime/` (task tokens).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import os
import signal
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fl_coordinator.flower_middleware import ControlToken, lighten
from model_delta.errors import Malformed, Unavailable

APP_FOLDER = Path(__file__).resolve().parent / "flower_app"
CONTENT_S = 4.0
"""How long a message that is there may wait for its content. Content follows its message at once; if it does not, its
sender died between the two, and Flower itself would wait for two hours."""
REQUEST_TIMEOUT_S = 10.0

NIST_CURVES = (ec.SECP256R1, ec.SECP384R1, ec.SECP521R1)


# --- the SuperLink's process -----------------------------------------------------------------------------------------


def run_superlink(arguments: Sequence[str]) -> None:
    """Be a SuperLink: the main program of the process that `flower_superlink` starts. Returns when it is told to end.

    The same as `flower-superlink`, with a bearer token in front of the Control API, fewer layers (`flower_middleware`),
    no access log, and an end when the supervisor or the SuperExec is gone.
    """
    token = Path(arguments[0]).read_text("ascii").strip()
    sys.argv = ["flower-superlink", *arguments[1:]]
    # The package's attribute of the same name is a function, so the module is fetched by its path.
    program = importlib.import_module("flwr.superlink.cli.flower_superlink")
    config = program._parse_superlink_lifespan_config()
    app = importlib.import_module("flwr.superlink.main").create_app(config, program.SuperLinkLifespan)
    lighten(app)
    app.add_middleware(ControlToken, token=token)
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
        load()
        from flwr.supercore.control import ControlHttpClient

        try:
            bearer = _Bearer(token.read_text("ascii").strip())
        except OSError as error:
            raise Unavailable(f"SuperLink control token {token}: {error.strerror}") from None
        self._address = address
        self._client = http_client(ControlHttpClient, address, ca, [bearer])

    def __enter__(self) -> Control:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def node_names(self) -> dict[str, int]:
        """Node id by name of every registered node."""
        return {node.name: node.node_id for node in self._nodes()}

    def _nodes(self) -> list[Any]:
        from flwr.proto.control_pb2 import ListNodesRequest

        with as_unavailable(f"SuperLink at {self._address}: listing nodes"):
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
                    with as_unavailable(f"SuperLink at {self._address}: removing the old {name}"):
                        self._client.UnregisterNode(UnregisterNodeRequest(node_id=node.node_id))
            if name not in ids:
                with as_unavailable(f"SuperLink at {self._address}: registering {name}"):
                    ids[name] = self._client.RegisterNode(RegisterNodeRequest(public_key=key, name=name)).node_id
        return ids

    def ensure_run(self, coordinator_url: str, token: Path, *, fresh: bool = False, app: Path = APP_FOLDER) -> int:
        """Return the id of the one unfinished run of the `app` with this configuration, starting it if there is none.

        Other unfinished runs are stopped; with `fresh`, so is a matching one, because its process is known to be gone.
        `token` is a path that the ServerApp reads; the token itself never enters Flower. Raises Unavailable.
        """
        from flwr.common.serde import fab_to_proto, user_config_from_proto, user_config_to_proto
        from flwr.proto.control_pb2 import ListRunsRequest, StartRunRequest, StopRunRequest
        from flwr.supercore.fab import Fab

        digest, bundle = build_app(app)
        wanted = {"coordinator-url": coordinator_url, "coordinator-token-file": str(token.resolve())}
        with as_unavailable(f"SuperLink at {self._address}: starting the run"):
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
def build_app(app: Path = APP_FOLDER) -> tuple[str, bytes]:
    """A Flower App Bundle of the files in the folder `app`: SHA-256 and bytes; the same for the same files."""
    from flwr.cli.build import build_fab_from_disk

    bundle: bytes = build_fab_from_disk(app)
    return hashlib.sha256(bundle).hexdigest(), bundle


class _Bearer:
    """Interceptor of Flower's protobuf clients: sends a bearer token."""

    def __init__(self, token: str) -> None:
        self._value = f"Bearer {token}"

    def intercept(self, context: Any, call_next: Callable[[Any], Any]) -> Any:
        context.request.headers["authorization"] = self._value
        return call_next(context)


def http_client(kind: Callable[..., Any], address: str, ca: Path, interceptors: Sequence[Any]) -> Any:
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


_loading = threading.Lock()


def load() -> None:
    """Import Flower. Its modules import each other in circles, which two threads that begin at once trip over."""
    with _loading:
        import flwr  # noqa: F401


class Refused(Unavailable):
    """The server answered, but not with what was asked for."""


@contextlib.contextmanager
def as_unavailable(doing: str) -> Iterator[None]:
    """In the block, failures of an HTTP exchange are Unavailable (`Refused` for an error status), and say `doing`."""
    import httpx

    try:
        yield
    except httpx.HTTPStatusError as error:
        found = f"HTTP {error.response.status_code} {error.response.text[:200]}"
        raise Refused(f"{doing}: {found}") from None
    except (httpx.HTTPError, OSError) as error:
        raise Unavailable(f"{doing}: {type(error).__name__}: {error}") from None


# --- a node's keys ---------------------------------------------------------------------------------------------------


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


if __name__ == "__main__":
    run_superlink(sys.argv[1:])
