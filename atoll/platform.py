"""One platform on one machine: which processes it has, who they are, where they listen.

`prepare` makes what every process expects to find in the data folder (keyring, tokens, identities, addresses) and may
be called again and again; `programs` names what runs, in the order in which it starts. `atoll up` and `atoll demo`
differ only in how many regions they ask for and in what they do next.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgspec

from atoll.ports import port_answers
from atoll.processes import Program
from atoll.settings import (
    LOOPBACK,
    TENANT,
    Broker,
    ConfigurationError,
    DataFolder,
    Endpoints,
    quiet_environment,
    write_private,
)
from edge_runtime.identity import Identity
from model_delta.encoding import pack, unpack
from model_delta.keys.certificates import days_left, require_identity
from model_delta.keys.keyring import EmbeddedKeyring, Keyring
from model_delta.trust.updater import TrustAnchors
from regional_gateway import mosquitto

AGGREGATORS = ("a0", "a1", "a2")
COORDINATOR = "coordinator"
BROKER = "broker"
BROKER_METRICS = "broker metrics"
SUPERLINK = "superlink"
CERTIFICATE_DAYS = 400
RENEW_DAYS = 30
"""A certificate that is valid for less than this is renewed at the next start."""
READY_SECONDS = 90.0
"""A dozen processes that start together on two busy cores take their time; one that ends is noticed at once."""
ANCHORS, ROOT = "anchors.cbor", "root.json"
REVOKED = "revoked.pem"


class Layout(msgspec.Struct, frozen=True, kw_only=True):
    """What to start: `regions` with a gateway each, `broker` auto | mosquitto | embedded, Flower and the aggregators
    when `learning`."""

    regions: tuple[str, ...]
    broker: str = "auto"
    learning: bool = False


def gateway_name(region: str) -> str:
    """The identity of a region's gateway."""
    return f"gateway-{region}"


def relay_name(region: str) -> str:
    """The Flower node of a region's relay."""
    return f"relay-{region}"


def is_server(name: str) -> bool:
    """Whether the identity `name` is one of the platform's own, which no device may take."""
    return name in (COORDINATOR, BROKER, SUPERLINK, *AGGREGATORS) or name.startswith(gateway_name(""))


def check(layout: Layout, next_port: Callable[[str], int]) -> Endpoints:
    """The addresses of such a platform; nothing is written. `next_port(what)` gives a free port.

    Raises ConfigurationError.
    """
    for region in layout.regions:
        require_identity(gateway_name(region))
    kind = broker_kind(layout.broker)
    return Endpoints(
        coordinator=f"http://{LOOPBACK}:{next_port(COORDINATOR)}",
        broker=Broker(LOOPBACK, next_port(BROKER), kind),
        gateways={region: f"http://{LOOPBACK}:{next_port(f'gateway {region}')}" for region in layout.regions},
        aggregators={name: f"http://{LOOPBACK}:{next_port(f'aggregator {name}')}" for name in AGGREGATORS}
        if layout.learning
        else {},
        flower_port=next_port("Flower SuperLink") if layout.learning else 0,
        broker_metrics=f"http://{LOOPBACK}:{next_port(BROKER_METRICS)}" if kind == "embedded" else "",
    )


def ports_of(endpoints: Endpoints) -> dict[str, int]:
    """The port of each process, by the names that `check` asks for."""
    found = {COORDINATOR: port_of(endpoints.coordinator), BROKER: endpoints.broker.port}
    found.update({f"gateway {region}": port_of(url) for region, url in endpoints.gateways.items()})
    found.update({f"aggregator {name}": port_of(url) for name, url in endpoints.aggregators.items()})
    if endpoints.broker_metrics:
        found[BROKER_METRICS] = port_of(endpoints.broker_metrics)
    return found | ({"Flower SuperLink": endpoints.flower_port} if endpoints.flower_port else {})


def prepare(data: DataFolder, layout: Layout, next_port: Callable[[str], int]) -> Endpoints:
    """Make keyring, tokens, identities and addresses; what exists is kept. Raises ConfigurationError, StorageFull."""
    endpoints = check(layout, next_port)
    data.tokens()
    keyring = open_keyring(data)
    servers = (BROKER, SUPERLINK) if layout.learning else (BROKER,)
    for name in servers:
        issue_identity(data, keyring, name, server=True)
    issue_identity(data, keyring, COORDINATOR)
    write_private(revocation_list_of(data), keyring.revocation_list())
    data.write_endpoints(endpoints)
    return endpoints


def open_keyring(data: DataFolder) -> Keyring:
    """The folder's keyring: on the server that its `vault.json` names, or else embedded and made on first use."""
    if data.vault_path.exists():
        from atoll.vault import keyring_at, place_of  # hvac comes with the extra `coordinator`, and takes its time

        return keyring_at(place_of(data))
    if data.keyring_path.exists():
        keyring = EmbeddedKeyring.open(data.keyring_path)
        keyring.add_missing_roles()
        return keyring
    return EmbeddedKeyring.create(data.keyring_path, TENANT)


def issue_identity(data: DataFolder, keyring: Keyring, name: str, *, server: bool = False) -> Path:
    """The identity folder of `name`, with a key, a certificate of the platform's CA and the trust anchors; a
    certificate that runs out soon is renewed for the same key."""
    folder = data.identity(name)
    certificate_path = folder / "certificate.pem"
    write_private(folder / ANCHORS, pack(keyring.anchors()))
    if certificate_path.exists() and days_left(certificate_path.read_bytes(), time.time()) >= RENEW_DAYS:
        return folder
    identity = Identity.create(folder, name)
    certificate = keyring.issue_certificate(
        identity.request_pem(), name, identity.sealing_public, days=CERTIFICATE_DAYS, server=server
    )
    identity.enrolled(certificate, keyring.ca_pem())
    return folder


def revocation_list_of(data: DataFolder) -> Path:
    """Where the coordinator keeps the CA's list of revoked certificates for mosquitto."""
    return data.identity(BROKER) / REVOKED


def read_anchors(folder: Path) -> TrustAnchors:
    """The trust anchors that an identity was given. Raises ConfigurationError when it has none."""
    path = folder / ANCHORS
    if not path.exists():
        raise ConfigurationError(f"{path}: expected trust anchors, found none; enrol this identity again")
    return unpack(path.read_bytes(), TrustAnchors)


def read_root(folder: Path) -> bytes:
    """The TUF root that an identity was given. Raises ConfigurationError when it has none."""
    path = folder / ROOT
    if not path.exists():
        raise ConfigurationError(f"{path}: expected a root of trust, found none; enrol this identity again")
    return path.read_bytes()


def broker_kind(wanted: str) -> str:
    """mosquitto or embedded; `auto` takes mosquitto when this machine has it. Raises ConfigurationError."""
    if wanted not in ("auto", "mosquitto", "embedded"):
        raise ConfigurationError(f"--broker: expected auto, mosquitto or embedded, found {wanted!r}")
    if wanted == "mosquitto" and mosquitto.find() is None:
        raise ConfigurationError("--broker mosquitto: no mosquitto on the PATH; install it or pass --broker embedded")
    if wanted == "auto":
        return "mosquitto" if mosquitto.find() is not None else "embedded"
    return wanted


def programs(data: DataFolder, endpoints: Endpoints) -> list[Program]:
    """Everything that runs, in the order in which it starts."""
    started = [
        broker_program(data, endpoints),
        _program(data, COORDINATOR, ("coordinator", "run"), endpoints.coordinator),
    ]
    for region, url in endpoints.gateways.items():
        started.append(_program(data, gateway_name(region), ("gateway", "run", "--region", region), url))
    for name, url in endpoints.aggregators.items():
        started.append(_program(data, f"aggregator-{name}", ("aggregator", "run", "--name", name), url))
    return started


def broker_program(data: DataFolder, endpoints: Endpoints) -> Program:
    """mosquitto or our own broker, as `endpoints` say."""
    address = endpoints.broker
    argv = atoll_argv("broker", "run", "--data", str(data.path))
    if address.kind == "mosquitto":
        argv = mosquitto_argv(data, endpoints)
    return Program(
        BROKER, argv, data.child("logs") / f"{BROKER}.log", env=quiet_environment(), ready=port_answers(address.port)
    )


def mosquitto_argv(data: DataFolder, endpoints: Endpoints) -> list[str]:
    """Write mosquitto's configuration into the data folder; the command that starts it."""
    found = mosquitto.find()
    if found is None:
        raise ConfigurationError("broker: expected mosquitto 2.0 or newer, found none; pass --broker embedded")
    identity = data.identity(BROKER)
    return mosquitto.prepare(
        found,
        data.child("broker"),
        mosquitto.BrokerFiles(
            identity / "ca.pem", identity / "certificate.pem", identity / "key.pem", revocation_list_of(data)
        ),
        host=endpoints.broker.host,
        port=endpoints.broker.port,
        platform=(COORDINATOR, *map(gateway_name, endpoints.gateways)),
        autosave_seconds=1,
    )


def _program(data: DataFolder, name: str, command: Sequence[str], url: str) -> Program:
    return Program(
        name,
        atoll_argv(*command, "--data", str(data.path)),
        data.child("logs") / f"{name}.log",
        env=quiet_environment(),
        ready=port_answers(port_of(url)),
        ready_seconds=READY_SECONDS,
        stop_seconds=10.0,
        restarts_per_minute_max=8,
    )


def atoll_argv(*arguments: str) -> list[str]:
    """How a child of this program is started, without relying on the PATH."""
    return [sys.executable, "-m", "atoll", *arguments]


def urls(endpoints: Endpoints) -> Mapping[str, str]:
    """Every HTTP address by process name, for people."""
    named = {COORDINATOR: endpoints.coordinator}
    named.update({gateway_name(region): url for region, url in endpoints.gateways.items()})
    named.update({f"aggregator {name}": url for name, url in endpoints.aggregators.items()})
    if endpoints.broker_metrics:
        named[BROKER_METRICS] = f"{endpoints.broker_metrics}/metrics"
    return named


def port_of(url: str) -> int:
    """The port at the end of one of our own addresses."""
    return int(url.rsplit(":", 1)[1])


def regions_from(endpoints: Endpoints, home: str) -> Sequence[str]:
    """Regions in the order in which a device of `home` asks them: the nearest first."""
    if home not in endpoints.gateways:
        raise ConfigurationError(
            f"region {home!r}: expected one of {', '.join(sorted(endpoints.gateways))}; pass --region"
        )
    return [home, *(region for region in endpoints.gateways if region != home)]
