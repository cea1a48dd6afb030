"""A demo report with figures such as a real run leaves, for every act, in the keys that the acts write."""

from __future__ import annotations

from typing import Any

from atoll.report import TITLES, ActResult, Report

HOSTILE = ["pos-0004", "phone-0012", "pi-0033", "pos-0039", "pos-0024", "phone-0018"]
PRECISION = (0.312, 0.441, 0.502, 0.528, 0.541)


def sample_report(**changes: Any) -> Report:
    """A run in which everything worked; `changes` replace fields of the report."""
    values: dict[str, Any] = {
        "seed": 7,
        "commit": "71c22dabe21f+",
        "machine": {"system": "Linux", "processor": "x86_64", "cores": 2, "python": "3.11.2"},
        "seconds": 96.4,
        "memory_mb_peak": 1873.2,
        "acts": tuple(ActResult(name, True, seconds, _figures(name)) for name, seconds in _SECONDS.items()),
        **changes,
    }
    return Report(**values)


_SECONDS = dict(zip(TITLES, (14.82, 12.31, 33.07, 14.9, 9.64, 8.71, 6.02), strict=True))


def _figures(name: str) -> dict[str, Any]:
    return {
        "up": _up,
        "publish": _publish,
        "learn": _learn,
        "canary": _canary,
        "bad_version": _bad_version,
        "region_loss": _region_loss,
        "long_absence": _long_absence,
    }[name]()


def _up() -> dict[str, Any]:
    return {
        "broker": "mosquitto",
        "regions": 2,
        "aggregators": 3,
        "processes": 11,
        "devices": 60,
        "device_classes": {"pos": 30, "phone": 12, "pi": 10, "mcu": 8},
        "hostile_devices": 6,
    }


def _publish() -> dict[str, Any]:
    latency = {16: 14, 17: 90, 18: 401, 19: 1202, 20: 1730, 21: 980, 22: 420, 23: 160, 24: 81, 25: 60, 26: 22, 30: 9}
    return {
        "absent_device_name": "pos-0055",
        "absent_device_version": "eu-west:1",
        "absent_device_days": 120,
        "parameters": 40_257,
        "bytes_float32": 162_404,
        "bytes_int8": 48_112,
        "bytes_download": 45_311,
        "average_precision_history": 0.684,
        "average_precision_today": 0.3124,
        "seconds_until_all_adopted": 4.18,
        "decisions_per_second": 233.4,
        "latency_p50_us": 46.4,
        "latency_p95_us": 84.1,
        "latency_p99_us": 146.8,
        "plot_latency": {str(bucket): count for bucket, count in latency.items()},
    }


def _learn() -> dict[str, Any]:
    rows = []
    for number in range(1, 5):
        reasons = [
            f"{name}: Krum score {30 + index}x the median; the 38 lowest of 44 are kept"
            for index, name in enumerate(HOSTILE)
        ]
        rows.append(
            {
                "round": number,
                "average_precision": PRECISION[number],
                "average_precision_fedavg": 0.08 + 0.01 * number,
                "average_precision_stale": PRECISION[0],
                "contributions": 44,
                "chosen": 37,
                "hostile_rejected": 6,
                "hostile_present": 6,
                "honest_rejected": 1,
                "seconds": 7.9 + 0.1 * number,
                "rejected": [*reasons, "pos-0001: Krum score 1.4x the median; the 38 lowest of 44 are kept"],
            }
        )
    return {
        "average_precision_stale": PRECISION[0],
        "average_precision_after": PRECISION[-1],
        "average_precision_fedavg": 0.12,
        "devices_in_rounds": 51,
        "hostile": sorted(HOSTILE),
        "rejected": [f"{name} (4 of 4 rounds)" for name in sorted(HOSTILE)] + ["pos-0001 (4 of 4 rounds)"],
        "rounds": rows,
    }


def _timeline(*samples: tuple[float, int], new: str, old: str) -> list[dict[str, Any]]:
    return [
        {"seconds": seconds, "devices": {old: 59 - count, **({new: count} if count else {})}}
        for seconds, count in samples
    ]


def _canary() -> dict[str, Any]:
    early = ((0.0, 0), (1.2, 1), (5.6, 1), (6.0, 4), (6.4, 11), (6.8, 15))
    late = ((10.1, 15), (10.5, 31), (11.0, 52), (11.5, 59), (13.9, 59))
    return {
        "canary_devices": 1,
        "devices_adopted": 59,
        "by_patch": 59,
        "bytes_sent": 574_129,
        "bytes_full_downloads": 2_678_718,
        "bytes_per_device": 9_731,
        "bytes_whole": 45_402,
        "share_of_full": 0.214,
        "stages": [
            "begun stage 1 of 3: 1 devices",
            "widened stage 2 of 3: 25%",
            "widened stage 3 of 3: 100%",
            "completed 9f86d081884c7d65… is everybody's stable version",
        ],
        "plot_timeline": _timeline(*early, *late, new="eu-west:6", old="eu-west:2"),
    }


def _bad_version() -> dict[str, Any]:
    counts = ((0.0, 0), (1.1, 1), (4.9, 1), (5.3, 1), (6.1, 0), (6.55, 0))
    return {
        "average_precision_good": 0.5412,
        "average_precision_bad": 0.5412,
        "false_positive_rate_good": 0.0184,
        "false_positive_rate_bad": 0.4177,
        "devices_ever": 1,
        "devices_names": ["phone-0021"],
        "seconds_active": 4.31,
        "seconds_until_stopped": 5.3,
        "seconds_until_undone": 6.55,
        "guardrail": "latency_p95_ms 112 ms over 31 decisions, allowed 50 ms; "
        "false_positive_rate 41.94% of 31, control 1.90% of 1052, allowed 3 times control",
        "plot_timeline": _timeline(*counts, new="eu-west:7", old="eu-west:6"),
    }


def _region_loss() -> dict[str, Any]:
    return {
        "region": "eu-west",
        "seconds_dead": 7.41,
        "requests_of_terminal": 316,
        "requests_of_fleet": 57,
        "answered_by": {"eu-west": 97, "ap-south": 219},
        "failovers": 3,
        "requests_lost": 0,
        "recovery_ms": 5.3,
        "slowest_request_ms": 176.0,
    }


def _long_absence() -> dict[str, Any]:
    return {
        "device": "pos-0055",
        "days_away": 120,
        "why_it_may_not_answer": "expired",
        "baseline_bytes": 407,
        "baseline_average_precision": 0.581,
        "baseline_average_precision_today": 0.244,
        "radio": "LoRaWAN EU868 DR0, 10% loss",
        "radio_frames_sent": 14,
        "radio_frames_lost": 2,
        "radio_air_seconds": 25.86,
        "radio_wall_seconds": 2586.1,
        "payments_by_baseline": 20,
        "catch_up_route": "patch",
        "catch_up_bytes": 13_422,
        "catch_up_bytes_whole": 45_402,
        "catch_up_seconds": 2.87,
    }
