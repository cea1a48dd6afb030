"""The state of a whole platform at one moment, as the live page and the command line read it.

It is what `GET /v1/state` returns and what each event of `GET /v1/events` carries, as JSON. Compatibility promise:
fields are added with defaults, never renamed. Versions are shown as `label` (`eu-west:3`) beside their digest.
"""

from __future__ import annotations

from typing import Any

import msgspec


class DeviceState(msgspec.Struct, frozen=True, kw_only=True):
    """One device as last heard. `state` is the update's state; times are Unix seconds; `reported` is False until the
    first report arrived."""

    device_id: str
    device_class: str
    region: str
    running: str = ""
    version: str = ""
    state: str = ""
    safe_mode: bool = False
    plan_serial: int = 0
    last_seen: float = 0.0
    decisions: int = 0
    lost_requests: int = 0
    dropped: int = 0
    reported: bool = False


class ReleaseState(msgspec.Struct, frozen=True, kw_only=True):
    """One published version. Sizes in bytes; `patch_bytes` maps the base's digest to the sealed patch's size."""

    manifest: str
    version: str
    release: int
    created: float
    file_bytes: int
    whole_bytes: int
    patch_bytes: dict[str, int] = {}
    devices: int = 0
    withdrawn: bool = False
    round_id: str = ""
    model: str = ""


class RolloutEvent(msgspec.Struct, frozen=True, kw_only=True):
    """A decision about a rollout: started, widened, completed, stopped, aborted; with its reason."""

    time: float
    event: str
    stage: int
    reason: str = ""


class RolloutState(msgspec.Struct, frozen=True, kw_only=True):
    """One rollout. `state` is running, paused, completed, stopped or aborted, and `standing` the same in words for
    people; `reason` is what it waits for, or what ended it. `eligible` and `in_stage` count devices; `health` holds the
    newest figures per arm (`target`, `control`)."""

    name: str
    state: str
    stage: int
    stages: tuple[str, ...]
    target: str
    stable: str
    serial: int
    eligible: int = 0
    in_stage: int = 0
    adopted: int = 0
    model: str = ""
    health: dict[str, dict[str, float]] = {}
    history: tuple[RolloutEvent, ...] = ()
    standing: str = ""
    reason: str = ""


class RejectedDevice(msgspec.Struct, frozen=True, kw_only=True):
    """A device whose contribution was not used, and why."""

    device_id: str
    reason: str


class RoundState(msgspec.Struct, frozen=True, kw_only=True):
    """One federated round. `refused` counts refusals at admission by reason, `sat_out` devices that take no part, as
    they or the coordinator said, by reason; `reveal` is what was opened of the updates beside the sum; `figures` holds
    what was measured (average precision of base and candidate, seconds by phase, bytes)."""

    round_id: str
    state: str
    base: str
    candidate: str = ""
    quorum: int = 0
    admitted: int = 0
    refused: dict[str, int] = {}
    sat_out: dict[str, int] = {}
    chosen: tuple[str, ...] = ()
    rejected: tuple[RejectedDevice, ...] = ()
    attempt: int = 0
    reason: str = ""
    reveal: str = "distances"
    opened: float = 0.0
    figures: dict[str, Any] = {}


class Note(msgspec.Struct, frozen=True, kw_only=True):
    """Something that happened, in words: a process restarted, an act began, a stage widened."""

    time: float
    text: str
    kind: str = "info"


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """Everything at `time`. Rates and latency quantiles are over the last ten seconds; `latency` maps bucket index
    (`monitoring.telemetry.LATENCY_BOUNDS_US`) to count over the same time."""

    time: float
    tenant: str
    model: str
    act: str = ""
    decisions: int = 0
    decisions_per_second: float = 0.0
    latency_p50_us: float = 0.0
    latency_p95_us: float = 0.0
    latency_p99_us: float = 0.0
    latency: dict[int, int] = {}
    devices: tuple[DeviceState, ...] = ()
    releases: tuple[ReleaseState, ...] = ()
    rollouts: tuple[RolloutState, ...] = ()
    rounds: tuple[RoundState, ...] = ()
    notes: tuple[Note, ...] = ()
    broker_connected: bool = False
