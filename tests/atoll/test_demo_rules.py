"""What the demo makes of deaths in the middle of an act."""

from atoll.demo_regions import increase
from atoll.demo_stage import Deaths
from atoll.processes import ProcessEvent


def test_calm_begins_when_the_last_missing_process_is_back() -> None:
    now = [100.0]
    deaths = Deaths(clock=lambda: now[0])
    now[0] = 130.0
    assert deaths.calm_s() == 30.0
    deaths.hear(ProcessEvent("died", "fleet-0", 1, -9, "signal SIGKILL"))
    now[0] = 135.0
    assert deaths.calm_s() == 0.0
    deaths.hear(ProcessEvent("restarted", "fleet-0", 2))
    assert deaths.calm_s() == 0.0
    deaths.hear(ProcessEvent("ready", "fleet-0", 2))
    now[0] = 141.0
    assert deaths.calm_s() == 6.0


def test_deaths_are_named_until_they_are_long_ago() -> None:
    now = [0.0]
    deaths = Deaths(clock=lambda: now[0])
    assert deaths.told() == ""
    deaths.hear(ProcessEvent("died", "broker", 1, -9, "signal SIGKILL"))
    now[0] = 12.0
    assert deaths.told() == "broker died 12 s before: signal SIGKILL"
    now[0] = 91.0
    assert deaths.told() == ""


def _counts(started: float, requests: float, lost: float = 0, failovers: float = 0) -> dict[str, float]:
    return {
        "process_start_time_seconds": started,
        "atoll_region_requests": requests,
        "atoll_region_requests_lost": lost,
        "atoll_region_failovers": failovers,
    }


def test_requests_are_summed_over_processes() -> None:
    before = [_counts(1, 100), _counts(2, 50, 1)]
    after = [_counts(1, 110, 0, 2), _counts(2, 55, 1, 1)]
    assert increase(before, after) == ({"requests": 15, "requests_lost": 0, "failovers": 3}, 0)


def test_a_process_that_was_started_anew_counts_from_zero_and_is_told() -> None:
    before = [_counts(1, 100, 3), _counts(2, 50)]
    after = [_counts(9, 7, 1), _counts(2, 55)]
    assert increase(before, after) == ({"requests": 12, "requests_lost": 1, "failovers": 0}, 1)
