"""Metrics: what is counted is what a scraper reads, and labels cannot grow without bound."""

from __future__ import annotations

import pytest
from prometheus_client.parser import text_string_to_metric_families

from monitoring.metrics import LABEL_SETS_MAX, Metrics


def scraped(metrics: Metrics) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(metrics.render().decode())
        for sample in family.samples
    }


def test_a_scraper_reads_what_was_counted() -> None:
    metrics = Metrics()
    requests = metrics.counter("requests", "Requests answered.", ("route", "status"))
    requests.add(1, "predict", "200")
    requests.add(2, "predict", "200")
    requests.add(1, "predict", "400")
    seconds = metrics.histogram("request_seconds", "Time to answer.", bounds=(0.01, 0.1))
    for value in (0.005, 0.05, 5.0):
        seconds.observe(value)
    loaded = metrics.gauge("models_loaded", "Models in memory.")
    loaded.set(3)

    samples = scraped(metrics)
    assert samples["atoll_requests_total", (("route", "predict"), ("status", "200"))] == 3
    assert samples["atoll_requests_total", (("route", "predict"), ("status", "400"))] == 1
    assert samples["atoll_request_seconds_bucket", (("le", "0.01"),)] == 1
    assert samples["atoll_request_seconds_bucket", (("le", "0.1"),)] == 2
    assert samples["atoll_request_seconds_count", ()] == 3
    assert samples["atoll_models_loaded", ()] == 3
    assert samples["process_resident_memory_bytes", ()] > 1_000_000


def test_two_processes_in_one_test_share_nothing() -> None:
    first, second = Metrics(), Metrics()
    first.counter("x", "x").add(5)
    second.counter("x", "x")
    assert first.value("atoll_x_total") == 5
    assert second.value("atoll_x_total") == 0


def test_a_gauge_can_ask_for_its_value_when_read() -> None:
    metrics = Metrics()
    held: list[int] = []
    metrics.gauge("held", "Things held.").read_from(lambda: len(held))
    held.extend([1, 2])
    assert metrics.value("atoll_held") == 2


def test_label_sets_are_bounded() -> None:
    metrics = Metrics()
    seen = metrics.counter("seen", "Seen.", ("who",))
    for number in range(LABEL_SETS_MAX + 500):
        seen.add(1, f"device-{number}")
    assert len([name for name, _ in scraped(metrics) if name == "atoll_seen_total"]) <= LABEL_SETS_MAX + 1
    assert metrics.value("atoll_seen_total", who="other") == 500


def test_a_wrong_number_of_labels_is_a_bug_and_says_so() -> None:
    seen = Metrics().counter("seen", "Seen.", ("who",))
    with pytest.raises(ValueError, match="expected 1 label values, found 2"):
        seen.add(1, "a", "b")
