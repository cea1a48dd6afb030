"""How a figure of the demo is told: its name in words, its value with a unit, and which few of an act matter most.

The acts name figures with the unit last (`latency_p95_us`, `bytes_sent`); that decides how a value is written. A key
that is not in `LABELS` is told by its own words, so that an act may add a figure without touching this file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

LABELS = {
    "broker": "MQTT broker",
    "device_classes": "device classes",
    "hostile_devices": "hostile among them",
    "absent_device_name": "device that will be away",
    "absent_device_version": "its factory version",
    "absent_device_days": "days it is away",
    "parameters": "model parameters",
    "bytes_float32": "file as trained (float32)",
    "bytes_int8": "file as published (int8)",
    "bytes_download": "download, compressed and sealed",
    "average_precision_history": "average precision on history",
    "average_precision_today": "average precision on today's payments",
    "seconds_until_all_adopted": "until every device ran it",
    "decisions_per_second": "decisions per second",
    "latency_p50_us": "latency p50",
    "latency_p95_us": "latency p95",
    "latency_p99_us": "latency p99",
    "average_precision": "average precision",
    "average_precision_stale": "average precision before",
    "average_precision_after": "average precision after",
    "average_precision_fedavg": "average precision, plain FedAvg",
    "devices_in_rounds": "devices that take part",
    "hostile": "hostile devices",
    "canary_devices": "devices in the first stage",
    "devices_adopted": "devices that adopted it",
    "by_patch": "of them by patch",
    "bytes_sent": "sent to all devices",
    "bytes_full_downloads": "full downloads would be",
    "bytes_per_device": "sent to each device",
    "bytes_whole": "one full download",
    "share_of_full": "share of full downloads",
    "stages": "decisions of the rollout",
    "average_precision_good": "average precision, good version",
    "average_precision_bad": "average precision, bad version",
    "false_positive_rate_good": "false positives, good version",
    "false_positive_rate_bad": "false positives, bad version",
    "devices_ever": "devices that ever ran it",
    "devices_names": "which",
    "seconds_active": "longest time it answered on a device",
    "seconds_until_stopped": "until the rollout was stopped",
    "seconds_until_undone": "until no device ran it",
    "guardrail": "what stopped it",
    "seconds_dead": "gateway dead for",
    "requests_of_terminal": "requests of one busy terminal",
    "requests_of_fleet": "requests of the fleet",
    "answered_by": "the terminal was answered by",
    "failovers": "switches to the next region",
    "requests_lost": "requests lost",
    "requests_cut_short": "requests whose own device was killed",
    "recovery_ms": "longest switch",
    "slowest_request_ms": "slowest answer to the terminal",
    "why_it_may_not_answer": "why its version may not answer",
    "baseline_bytes": "baseline, signed and sealed",
    "baseline_average_precision": "baseline's average precision on history",
    "baseline_average_precision_today": "baseline's average precision today",
    "radio": "radio (simulated)",
    "radio_frames_sent": "frames sent",
    "radio_frames_lost": "frames lost",
    "radio_air_seconds": "time on the air",
    "radio_wall_seconds": "time with the duty cycle",
    "payments_by_baseline": "payments decided by the baseline",
    "catch_up_route": "way back to today's version",
    "catch_up_bytes": "bytes of the way back",
    "catch_up_bytes_whole": "a full download would be",
    "catch_up_seconds": "time of the way back",
}
"""Words for keys whose own words do not say enough."""

HEADLINES: Mapping[str, tuple[str, ...]] = {
    "up": (
        "{devices} devices ({hostile_devices} hostile)",
        "{regions} regions",
        "{aggregators} aggregators",
        "{processes} processes",
    ),
    "publish": (
        "{decisions_per_second} decisions/s",
        "p95 {latency_p95_us}",
        "download {bytes_download}",
        "everywhere in {seconds_until_all_adopted}",
    ),
    "learn": (
        "average precision {average_precision_stale} to {average_precision_after}",
        "plain FedAvg {average_precision_fedavg}",
    ),
    "canary": (
        "canary of {canary_devices}, then {devices_adopted} devices",
        "{by_patch} by patch",
        "sent {share_of_full} of full downloads",
    ),
    "bad_version": (
        "devices hit: {devices_ever}",
        "undone in {seconds_until_undone}",
        "false positives {false_positive_rate_good} to {false_positive_rate_bad}",
    ),
    "region_loss": (
        "{region} dead {seconds_dead}",
        "{requests_of_terminal} requests, {requests_lost} lost",
        "slowest answer {slowest_request_ms}",
    ),
    "long_absence": (
        "baseline of {baseline_bytes} by radio",
        "{catch_up_bytes} of {catch_up_bytes_whole} by {catch_up_route} in {catch_up_seconds}",
    ),
}
"""What to say of an act in one line; a phrase is left out when one of its figures is missing."""

NO_BREAK = "\u00a0"

_BYTES = re.compile(r"(^|_)bytes(_|$)")
_SECONDS = re.compile(r"(^|_)seconds(_|$)")


def label(key: str) -> str:
    """A figure's name in words."""
    return LABELS.get(key, key.replace("_", " "))


def headline(act: str, figures: Mapping[str, Any]) -> str:
    """An act's few figures that matter most, in one line; "" when it has none of them. Values and their units are
    joined by no-break spaces."""
    told = {
        key: shown(key, value).replace(" ", NO_BREAK)
        for key, value in figures.items()
        if isinstance(value, int | float | str)
    }
    return ", ".join(phrase.format_map(told) for phrase in HEADLINES[act] if _fields(phrase) <= told.keys())


def _fields(phrase: str) -> set[str]:
    return set(re.findall(r"{(\w+)}", phrase))


def shown(key: str, value: Any) -> str:
    """A single value with the unit that its key names."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, int | float):
        return str(value)
    if key.endswith("_per_second"):
        return number(value)
    if key.endswith("_us"):
        return duration(value / 1e6)
    if key.endswith("_ms"):
        return duration(value / 1e3)
    if _SECONDS.search(key):
        return duration(value)
    if _BYTES.search(key):
        return size(value)
    if key.startswith("share_") or "_rate" in key:
        return f"{100 * value:.3g} %"
    if "precision" in key:
        return f"{value:.3f}"
    return f"{value:,}" if isinstance(value, int) else number(value)


def duration(seconds: float) -> str:
    """Seconds in the unit that fits: 84 µs, 212 ms, 7.4 s, 43 min."""
    for limit, factor, unit in ((1e-3, 1e6, "µs"), (1.0, 1e3, "ms"), (120.0, 1.0, "s"), (7200.0, 1 / 60, "min")):
        if seconds < limit:
            return f"{_short(seconds * factor)} {unit}" if seconds else "0 s"
    return f"{_short(seconds / 3600)} h"


def size(count: float) -> str:
    """Bytes in the decimal unit that fits: 407 B, 45.3 kB, 2.68 MB."""
    for limit, factor, unit in ((1e3, 1, "B"), (1e6, 1e3, "kB"), (1e9, 1e6, "MB")):
        if count < limit:
            return f"{_short(count / factor)} {unit}"
    return f"{_short(count / 1e9)} GB"


def number(value: float) -> str:
    """A short human form: 1234567 -> 1.23M, 0.04213 -> 0.0421."""
    magnitude = abs(value)
    if magnitude >= 1_000_000:
        return f"{value / 1_000_000:.3g}M"
    if magnitude >= 10_000:
        return f"{value / 1_000:.3g}k"
    if magnitude >= 100 or value == int(value):
        return f"{value:.0f}"
    return f"{value:.3g}"


def _short(value: float) -> str:
    """Three significant digits, never with an exponent."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
