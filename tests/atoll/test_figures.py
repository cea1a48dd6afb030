import pytest

from atoll.figures import HEADLINES, NO_BREAK, duration, headline, label, number, shown, size
from atoll.report import TITLES
from tests.fakes.report_figures import sample_report


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("latency_p95_us", 84.1, "84.1 µs"),
        ("latency_p95_us", 1467.8, "1.47 ms"),
        ("slowest_request_ms", 212.4, "212 ms"),
        ("seconds_until_undone", 6.55, "6.55 s"),
        ("radio_wall_seconds", 2586.1, "43.1 min"),
        ("bytes_sent", 574_129, "574 kB"),
        ("baseline_bytes", 407, "407 B"),
        ("false_positive_rate_bad", 0.4177, "41.8 %"),
        ("share_of_full", 0.214, "21.4 %"),
        ("average_precision_after", 0.5412, "0.541"),
        ("decisions_per_second", 233.4, "233"),
        ("parameters", 40_257, "40,257"),
        ("broker", "mosquitto", "mosquitto"),
        ("supported", True, "yes"),
    ],
)
def test_a_value_is_told_in_the_unit_of_its_key(key: str, value: float | str, told: str) -> None:
    assert shown(key, value) == told


def test_durations_and_sizes_change_unit_at_their_bounds() -> None:
    assert [duration(value) for value in (0, 0.0009994, 0.0012, 1.0, 119.0, 7200.0)] == [
        "0 s",
        "999 µs",
        "1.2 ms",
        "1 s",
        "119 s",
        "2 h",
    ]
    assert [size(value) for value in (0, 999, 1000, 45_311, 2_678_718, 3.2e9)] == [
        "0 B",
        "999 B",
        "1 kB",
        "45.3 kB",
        "2.68 MB",
        "3.2 GB",
    ]


def test_numbers_are_short() -> None:
    assert [number(v) for v in (1234567, 12345, 123.4, 5, 0.04213)] == ["1.23M", "12.3k", "123", "5", "0.0421"]


def test_a_key_without_a_label_is_told_by_its_own_words() -> None:
    assert label("some_new_figure") == "some new figure"
    assert label("latency_p95_us") == "latency p95"


def test_every_act_has_a_headline_and_its_figures_are_ones_that_acts_write() -> None:
    assert HEADLINES.keys() == TITLES.keys()
    for act in sample_report().acts:
        assert headline(act.name, act.figures).count("{") == 0
        assert len(headline(act.name, act.figures).split(", ")) >= len(HEADLINES[act.name])


def test_a_headline_leaves_out_what_was_not_measured() -> None:
    assert headline("publish", {"latency_p95_us": 84.1, "plot_latency": {"5": 2}}) == f"p95 84.1{NO_BREAK}µs"
    assert headline("publish", {}) == ""
