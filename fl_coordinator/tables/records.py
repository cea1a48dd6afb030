"""What the ledger hands out: one value for each kind of thing that it remembers."""

from __future__ import annotations

import msgspec

from fl_coordinator.forms import Form
from model_delta.plan import DeviceTraits
from model_delta.task import AggregatorKey
from monitoring.telemetry import ModelSummary, UpdateOutcome


class ReleaseRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A published version. `source` is the digest of the bytes that the publisher handed in, `source_blob` names those
    bytes sealed under the artifact's key, `wrapped_key` is that key under the keyring. Sizes in bytes of sealed form:
    `bytes_whole` for all segments, `bytes_patch` for the patch from each parent by manifest digest. `form`: see `forms`
    (None of releases before there were any)."""

    manifest: str
    model: str
    name: str
    version: dict[str, int]
    release: int
    parents: tuple[str, ...]
    created: float
    source: str
    source_blob: str
    wrapped_key: bytes
    file_bytes: int
    bytes_whole: int
    bytes_patch: dict[str, int]
    round_id: str = ""
    form: Form | None = None


class DeviceRecord(msgspec.Struct, frozen=True, kw_only=True):
    """An enrolled identity (`kind` is device, gateway or server) and what was last heard of it. Times: Unix seconds."""

    device_id: str
    kind: str
    tenant: str
    device_class: str
    region: str
    labels: dict[str, str]
    certificate: bytes
    certificate_serial: str
    enrolled: float
    last_seen: float = 0.0
    running: str = ""
    state: str = ""
    safe_mode: bool = False
    plan_serial: int = 0
    dropped: int = 0
    lost_requests: int = 0
    model: str = ""

    def trait(self, name: str) -> str:
        """The device's class, or one of its labels; "" when it was enrolled without."""
        return self.device_class if name == "device_class" else self.labels.get(name, "")

    @property
    def traits(self) -> DeviceTraits:
        """What a plan may ask about the device."""
        return DeviceTraits(self.device_id, self.tenant, self.device_class, self.region, self.labels)


class AdmittedContribution(msgspec.Struct, frozen=True):
    """A contribution that is in the updates log at `log_offset`."""

    device_id: str
    digest: str
    log_offset: int
    size: int
    time: float


class AggregatorRecord(msgspec.Struct, frozen=True):
    """An aggregator's public keys and the address of its mailbox."""

    key: AggregatorKey
    url: str


class MemoryRecord(msgspec.Struct, frozen=True):
    """A packed `RoundMemory` under its digest, after that many rounds."""

    name: str
    model: str
    policy: str
    rounds: int
    packed: bytes


class StageEvent(msgspec.Struct, frozen=True):
    """One line of a rollout's history."""

    time: float
    stage: int
    serial: int
    event: str
    text: str


class Event(msgspec.Struct, frozen=True):
    """One line of the coordinator's own history."""

    id: int
    time: float
    kind: str
    text: str


class DeviceSummary(msgspec.Struct, frozen=True):
    """The folded decisions of one version, at one place, by one device, while it followed plan `plan_serial`."""

    device_id: str
    plan_serial: int
    summary: ModelSummary


class DeviceOutcome(msgspec.Struct, frozen=True):
    """How an update ended on a device; `received` is the coordinator's time."""

    device_id: str
    received: float
    outcome: UpdateOutcome


class Directed(msgspec.Struct, frozen=True, kw_only=True):
    """What is remembered of a device's directing: its newest version report (`counter`, `heard` in Unix seconds, and
    the signed bytes), and the newest plan that it was sent (`serial`, and the signed bytes; b"" before the first)."""

    device_id: str
    model: str
    counter: int
    serial: int = 0
    heard: float
    report: bytes
    plan: bytes = b""
