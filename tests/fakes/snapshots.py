"""A platform in the middle of a busy day, as a snapshot: what the live page must be able to show.

Four device classes in two regions; a learned version on its way out to a quarter of the fleet, a faulty one stopped
before it; a finished, a refused and a running round; devices that are silent, in safe mode, on probation, fetching and
going back; and names that are markup.
"""

from __future__ import annotations

from itertools import cycle, islice

from model_delta.digest import digest_of
from monitoring.snapshot import (
    DeviceState,
    Note,
    RejectedDevice,
    ReleaseState,
    RolloutEvent,
    RolloutState,
    RoundState,
    Snapshot,
)

NOW = 1_790_000_000.0
CLASSES = ("pos", "pos", "phone", "pi", "pos", "mcu")
REGIONS = ("eu-west", "ap-south")
HOSTILE_TEXT = '<img src=x onerror="window.stolen=1">'
FIRST, LEARNED, FAULTY = (digest_of(name.encode()) for name in ("first", "learned", "faulty"))
ROUND = "fraud-1789999700-a1b2c3"


def sample_snapshot(devices: int = 60, *, time: float = NOW, hostile_text: str = HOSTILE_TEXT) -> Snapshot:
    """Everything at once; `hostile_text` stands wherever somebody outside may choose a name or a reason."""
    fleet = tuple(_device(index, devices, time) for index in range(devices))
    if devices:
        fleet = (*fleet[:-1], _renamed(fleet[-1], hostile_text))
    return Snapshot(
        time=time,
        tenant="acme",
        model="fraud",
        act="act 4: canary",
        decisions=184_233,
        decisions_per_second=devices * 3.97,
        latency_p50_us=46.4,
        latency_p95_us=121.0,
        latency_p99_us=1467.8,
        latency={18: 40, 20: 900, 22: 310, 25: 90, 38: 12},
        devices=fleet,
        releases=_releases(time, [device.running for device in fleet]),
        rollouts=_rollouts(time, devices, hostile_text),
        rounds=_rounds(time, hostile_text),
        notes=_notes(time, hostile_text),
        broker_connected=True,
    )


def empty_snapshot(time: float = NOW) -> Snapshot:
    """A platform that was started a moment ago."""
    return Snapshot(time=time, tenant="acme", model="fraud", broker_connected=True)


def _device(index: int, devices: int, time: float) -> DeviceState:
    device_class = next(islice(cycle(CLASSES), index, None))
    learned = index % 4 == 1
    state = {9: "on_probation", 13: "fetching", 16: "staged", 20: "restoring", 27: "safe"}.get(index, "idle")
    never = index == devices - 2
    safe = state == "safe"
    return DeviceState(
        device_id=f"{device_class}-{index:04d}",
        device_class=device_class,
        region=REGIONS[index % 2],
        running="" if never or safe else LEARNED if learned else FIRST,
        version="" if never or safe else "eu-west:3" if learned else "eu-west:1",
        state="" if never else state,
        safe_mode=safe,
        plan_serial=0 if never else 7,
        last_seen=0.0 if never else time - (140 if index in (5, 30, 41) else index % 3),
        decisions=0 if never else 3000 + 7 * index,
        lost_requests=2 if index == 5 else 0,
        dropped=0,
        reported=not never,
    )


def _renamed(device: DeviceState, text: str) -> DeviceState:
    return DeviceState(
        device_id=text or device.device_id,
        device_class=device.device_class,
        region=device.region,
        running=FIRST,
        version="eu-west:1",
        state="idle",
        plan_serial=7,
        last_seen=device.last_seen or NOW,
        decisions=12,
        reported=True,
    )


def _releases(time: float, running: list[str]) -> tuple[ReleaseState, ...]:
    return (
        ReleaseState(
            manifest=FIRST,
            version="eu-west:1",
            release=1,
            created=time - 5400,
            file_bytes=48_112,
            whole_bytes=45_311,
            devices=running.count(FIRST),
        ),
        ReleaseState(
            manifest=FAULTY,
            version="eu-west:2",
            release=2,
            created=time - 1800,
            file_bytes=49_870,
            whole_bytes=46_020,
            patch_bytes={FIRST: 1_204},
            withdrawn=True,
        ),
        ReleaseState(
            manifest=LEARNED,
            version="eu-west:3",
            release=3,
            created=time - 300,
            file_bytes=48_112,
            whole_bytes=45_402,
            patch_bytes={FIRST: 9_731},
            devices=running.count(LEARNED),
            round_id=ROUND,
        ),
    )


def _rollouts(time: float, devices: int, hostile_text: str) -> tuple[RolloutState, ...]:
    stages = ("1 devices", "25%", "100%")
    return (
        RolloutState(
            name="faulty",
            state="stopped",
            stage=0,
            stages=stages,
            target=FAULTY,
            stable=FIRST,
            serial=4,
            eligible=devices,
            standing="stopped, rolled back",
            history=(
                RolloutEvent(time=time - 1790, event="begun", stage=0, reason="stage 1 of 3: 1 devices"),
                RolloutEvent(
                    time=time - 1785,
                    event="stopped",
                    stage=0,
                    reason="false_positive_rate 41.18% of 34, control 1.90% of 1052, allowed 3 times control",
                ),
            ),
        ),
        RolloutState(
            name=f"learned {hostile_text}".strip(),
            state="running",
            stage=1,
            stages=stages,
            target=LEARNED,
            stable=FIRST,
            serial=7,
            eligible=devices,
            in_stage=devices // 4 + 1,
            adopted=devices // 4,
            health={
                "target": _health(devices // 4, 1.0, 0.121, 0.0183, 0.0),
                "control": _health(devices // 4, 0.0, 0.118, 0.0191, 1.0),
            },
            history=(
                RolloutEvent(time=time - 40, event="begun", stage=0, reason="stage 1 of 3: 1 devices"),
                RolloutEvent(time=time - 22, event="widened", stage=1, reason="stage 2 of 3: 25%"),
            ),
        ),
    )


def _health(devices: int, rolled_back: float, latency: float, false_alarms: float, silent: float) -> dict[str, float]:
    return {
        "devices": devices,
        "silent": silent,
        "adopted": max(0, devices - 1),
        "decisions": devices * 88.0,
        "errors": 0.0,
        "latency_p95_ms": latency,
        "false_positive_rate": false_alarms,
        "rolled_back": rolled_back,
    }


def _rounds(time: float, hostile_text: str) -> tuple[RoundState, ...]:
    honest = tuple(f"pos-{index:04d}" for index in range(0, 44))
    score = "Krum score {}x the median; the 38 lowest of 44 are kept"
    rejected = (
        RejectedDevice(device_id="pos-0004", reason=score.format(34)),
        RejectedDevice(device_id="phone-0012", reason=score.format(33)),
        RejectedDevice(device_id="pi-0033", reason="norm 41.2 exceeds the clip norm 2"),
        RejectedDevice(device_id=hostile_text or "pos-0039", reason=f"update out of range {hostile_text}".strip()),
        RejectedDevice(device_id="pos-0024", reason="the two holders of share 1 disagree"),
        RejectedDevice(device_id="phone-0018", reason=score.format("1.4")),
    )
    figures = {
        "average_precision_base": 0.312,
        "average_precision_candidate": 0.487,
        "bytes_uploaded": 44 * 321_900,
        "seconds": {"ANNOUNCED": 0.11, "COLLECTING": 6.42, "FROZEN": 0.08, "AGGREGATING": 3.71, "OPENED": 0.54},
    }
    return (
        RoundState(
            round_id="fraud-1789999000-77aa01",
            state="FAILED",
            base=FIRST,
            quorum=30,
            admitted=11,
            sat_out={"training diverged": 3, "no data": 1},
            reason="11 contributions at the deadline, quorum 30",
            opened=time - 1000,
        ),
        RoundState(
            round_id=ROUND,
            state="PUBLISHED",
            base=FIRST,
            candidate=LEARNED,
            quorum=30,
            admitted=44,
            refused={"bad signature": 2, "wrong base": 1},
            chosen=honest[:38],
            rejected=rejected,
            attempt=1,
            opened=time - 300,
            figures=figures,
        ),
        RoundState(
            round_id="fraud-1789999985-0c0ffe",
            state="COLLECTING",
            base=LEARNED,
            quorum=30,
            admitted=19,
            opened=time - 15,
            figures={"seconds": {"ANNOUNCED": 0.1}},
        ),
    )


def _notes(time: float, hostile_text: str) -> tuple[Note, ...]:
    told = (
        (5390, "act", "act 2: publish"),
        (1800, "act", "act 5: a bad version"),
        (1790, "info", "rollout faulty: begun: stage 1 of 3: 1 devices"),
        (1785, "alert", "rollout faulty: stopped: false_positive_rate 41.18% of 34, allowed 3 times control"),
        (1000, "alert", "round fraud-1789999000-77aa01: failed: 11 contributions at the deadline, quorum 30"),
        (300, "info", f"round {ROUND}: announced on {FIRST[:16]}…, 40257 parameters"),
        (60, "info", f"operator: {hostile_text}"),
        (40, "act", "act 4: canary"),
        (22, "info", "rollout learned: widened: stage 2 of 3: 25%"),
    )
    return tuple(Note(time=time - ago, kind=kind, text=text) for ago, kind, text in told)
