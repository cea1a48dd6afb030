"""Every MQTT topic, and the small records that devices, regions and the coordinator exchange over them.

    atoll/1/dev/{device}/up/...     the device writes, nobody else may
    atoll/1/dev/{device}/down/...   the device reads, nobody else may
    atoll/1/cfg/{tenant}/...        retained desired state: the newest plan and round announcement, signed

A broker enforces this with the certificate's common name as `{device}`. Chunks are pulled by request and response with
a small window, and never retained.
"""

from __future__ import annotations

import re
from typing import Literal

import msgspec

from model_delta.errors import Malformed

ROOT = "atoll/1"
PACKET_BYTES_MAX = 5_000_000
"""The longest MQTT packet that brokers take and links send: a contribution of a million parameters is one."""
MESSAGE_BYTES_MAX = PACKET_BYTES_MAX - 4_096
"""The longest payload, whatever its topic and properties."""
CHUNK_BYTES = 32_768
REQUEST_WINDOW = 8

NAME = re.compile(r"[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?")
NAME_TOLD = "lower-case letters, digits, '-' and '.'"
"""Of a model, a rollout, a round: a model's is a level of topics, and part of a path."""

StoreKind = Literal["manifest", "delivery", "blob", "artifact", "tuf"]


def require_model(name: str) -> str:
    """Return `name` if a model can have it. Raises Malformed."""
    if not NAME.fullmatch(name):
        raise Malformed(f"model: expected a name of {NAME_TOLD}, found {name[:80]!r}; pass another")
    return name


def plan_topic(tenant: str, model: str) -> str:
    """Retained: the newest signed plan of a model."""
    return f"{ROOT}/cfg/{tenant}/plan/{model}"


def round_topic(tenant: str, model: str, region: str = "") -> str:
    """Retained: the newest signed round announcement of a model, as the relay of `region` publishes it to its devices;
    "": as a coordinator without relays does, to all."""
    return f"{ROOT}/cfg/{tenant}/round/{model}" + (f"/{region}" if region else "")


def up(device: str, channel: str) -> str:
    """A topic the device writes. Channels: hello, report, version, contribution, key, req/{region}, trust/{region}."""
    return f"{ROOT}/dev/{device}/up/{channel}"


def down(device: str, channel: str) -> str:
    """A topic the device reads. Channels: res (chunks), key, plan, trust, ack (reports), receipt (contributions)."""
    return f"{ROOT}/dev/{device}/down/{channel}"


def device_of(topic: str) -> str:
    """The device id in an `up` or `down` topic ("" if it is neither)."""
    parts = topic.split("/")
    return parts[3] if len(parts) > 4 and parts[2] == "dev" else ""


class Hello(msgspec.Struct, frozen=True):
    """Who is here, said once a connection. `running`: the version that answers, by manifest digest. `root`: the Merkle
    root of the file that stands on the device, which names a release unless the file was damaged or changed; "" when
    there is no file, or from a program that does not say. `model`: whose plans it follows; "" from an older one."""

    device_id: str
    device_class: str = ""
    region: str = ""
    running: str = ""
    state: str = ""
    root: str = ""
    model: str = ""


class ChunkRequest(msgspec.Struct, frozen=True):
    """Bytes [offset, offset + length) of a stored object. `request` is echoed in the response. `kept_only`: answer with
    an error rather than fetch what is not in the mirror; left out of the packed form otherwise."""

    request: int
    kind: StoreKind
    name: str
    offset: int = 0
    length: int = CHUNK_BYTES
    kept_only: bool | msgspec.UnsetType = msgspec.UNSET


class ChunkResponse(msgspec.Struct, frozen=True):
    """The bytes asked for and the object's whole size, or an `error` ("" when there is none)."""

    request: int
    total: int = 0
    offset: int = 0
    data: bytes = b""
    error: str = ""


class KeyRequest(msgspec.Struct, frozen=True):
    """Asks for the artifact key of `manifest`. Carried in an Envelope of type `key-request` signed by the device."""

    request: int
    device_id: str
    manifest: str
    time: int


class KeyResponse(msgspec.Struct, frozen=True):
    """The artifact key sealed (HPKE, context `artifact_key_info`) to the device's X25519 key, or an `error`."""

    request: int
    sealed: bytes = b""
    error: str = ""


class PlanAnswer(msgspec.Struct, frozen=True):
    """What the director says to the version report with this `nonce`: `plan` is a sealed envelope of type
    `device-plan`, or empty with an `error`. `rollout`: the newest sealed rollout plan, where the report shows that the
    device does not know it. Nothing outside the envelopes is believed."""

    nonce: bytes
    plan: bytes = b""
    rollout: bytes = b""
    error: str = ""


class ReportAck(msgspec.Struct, frozen=True):
    """All records up to and including `sequence` of boot `epoch` are durable at the coordinator."""

    epoch: int
    sequence: int


class ContributionReceipt(msgspec.Struct, frozen=True):
    """The contribution to `round_id` is in the updates log, or was refused for `reason`; a refusal may come before
    there is a contribution: any would be refused."""

    round_id: str
    accepted: bool
    reason: str = ""


def artifact_key_info(device_id: str, manifest: str) -> bytes:
    """The HPKE context of a `KeyResponse.sealed`: an answer for one device and version opens as nothing else."""
    return f"atoll artifact key|{device_id}|{manifest}".encode()
